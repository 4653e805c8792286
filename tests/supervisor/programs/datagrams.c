// A static program with datagrams: threads that wait, signals with and without SA_RESTART, copied
// descriptors, and many signals during which no datagram is lost or duplicated.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define AF_VSOCK_ 40
#define ANY 0xFFFFFFFFu
#define LOCAL 1

struct address {
    uint16_t family, reserved;
    uint32_t port, cid;
    uint8_t flags, zero[3];
};

static volatile sig_atomic_t signals;

static void count(int number) { signals++; }

static int fail(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static int datagram_socket(struct address *own)
{
    struct address wanted = {AF_VSOCK_, 0, ANY, ANY, 0, {0}};
    socklen_t size = sizeof *own;
    int fd = socket(AF_VSOCK_, SOCK_DGRAM, 0);
    if (fd < 0)
        fail("socket");
    if (bind(fd, (void *)&wanted, sizeof wanted))
        fail("bind");
    if (getsockname(fd, (void *)own, &size))
        fail("getsockname");
    own->cid = LOCAL;
    return fd;
}

static void send_number(int fd, const struct address *to, uint32_t number)
{
    while (sendto(fd, &number, sizeof number, 0, (void *)to, sizeof *to) != sizeof number)
        if (errno != EINTR)
            fail("sendto");
}

static int receive_number(int fd, uint32_t *number, struct address *from)
{
    struct iovec vector = {number, sizeof *number};
    struct msghdr message = {from, sizeof *from, &vector, 1, NULL, 0, 0};
    return recvmsg(fd, &message, 0);
}

static void set_handler(int flags)
{
    struct sigaction action = {.sa_handler = count, .sa_flags = flags};
    sigaction(SIGALRM, &action, NULL);
}

static void every(int microseconds)
{
    struct itimerval timer = {{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &timer, NULL);
}

struct work {
    int from, to;
    struct address address;
};

static void *send_later(void *argument)
{
    struct work *work = argument;
    while (signals < 3)
        usleep(1000);
    send_number(work->from, &work->address, 7);
    return NULL;
}

static void *send_many(void *argument)
{
    struct work *work = argument;
    for (uint32_t number = 0; number < 2000; number++)
        send_number(work->from, &work->address, number);
    return NULL;
}

int main(void)
{
    struct address mine, theirs, source;
    int a = datagram_socket(&mine), b = datagram_socket(&theirs);
    struct work work = {a, b, theirs};
    pthread_t thread;
    uint32_t number;

    set_handler(0);
    every(20000);
    int result = receive_number(b, &number, &source);
    printf("without SA_RESTART: %d %s\n", result, strerror(errno));
    every(0);

    set_handler(SA_RESTART);
    signals = 0;
    pthread_create(&thread, NULL, send_later, &work);
    every(20000);
    result = receive_number(b, &number, &source);
    printf("with SA_RESTART: %d after three signals\n", result);
    every(0);
    pthread_join(thread, NULL);

    struct timeval patience = {0, 50000};
    setsockopt(b, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    result = receive_number(b, &number, &source);
    printf("with SO_RCVTIMEO: %d %s\n", result, strerror(errno));
    patience.tv_usec = 0;
    setsockopt(b, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);

    set_handler(0);
    every(700);
    pthread_create(&thread, NULL, send_many, &work);
    for (uint32_t next = 0; next < 2000; next++) {
        while (receive_number(b, &number, &source) < 0)
            if (errno != EINTR)
                fail("recvmsg");
        if (number != next || source.port != mine.port)
            return printf("%u came instead of %u\n", number, next), 1;
    }
    every(0);
    pthread_join(thread, NULL);
    puts("stormy");

    int copies[] = {dup(a), dup2(a, 100), dup3(a, 101, O_CLOEXEC), fcntl(a, F_DUPFD, 200),
                    fcntl(a, F_DUPFD_CLOEXEC, 201)};
    for (unsigned i = 0; i < sizeof copies / sizeof *copies; i++) {
        send_number(copies[i], &theirs, i);
        if (receive_number(b, &number, &source) != sizeof number || source.port != mine.port)
            fail("a copy");
    }
    puts("copied");
    return 0;
}
