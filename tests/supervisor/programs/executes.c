/* A thread receives into 1024 buffers while another thread executes a program, again and again.
 *
 *     executes ATTEMPTS     prints how many of the executed programs found bytes in their memory
 *     executes              the program that is executed
 *
 * Linked to fixed addresses (-no-pie), both have the buffers in the same place.
 */
#define _GNU_SOURCE
#include "vmci_sockets.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 1024 };
static char buffers[BUFFERS], text[BUFFERS];
static int fd;
static struct sockaddr_vm address = {
    .svm_family = 40, .svm_cid = VMADDR_CID_LOCAL, .svm_port = VMADDR_PORT_ANY};

static long delay;
static char *self;

static void receive(void)
{
    static struct iovec vectors[BUFFERS];
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = BUFFERS};
    for (int i = 0; i < BUFFERS; i++)
        vectors[i] = (struct iovec){&buffers[i], 1};
    recvmsg(fd, &message, 0);
}

static void pause_ns(long ns)
{
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < ns);
}

/* exec ends the first thread and gives this one its number. */
static void *execute(void *unused)
{
    while (!*(volatile char *)&buffers[0])
        ;
    pause_ns(delay);
    execl(self, self, NULL);
    _exit(2);
}

static int attempt(int number)
{
    pid_t pid = fork();
    if (pid == 0) {
        struct sockaddr *own = (struct sockaddr *)&address;
        socklen_t size = sizeof address;
        pthread_t thread;
        delay = number * 7919L % 1500000;
        fd = socket(40, SOCK_DGRAM, 0);
        if (bind(fd, own, size) || getsockname(fd, own, &size) ||
            sendto(fd, text, sizeof text, 0, own, size) != sizeof text) {
            perror("datagram");
            _exit(2);
        }
        pthread_create(&thread, NULL, execute, NULL);
        receive();
        for (;;)
            pause();
    }
    int status;
    waitpid(pid, &status, 0);
    return WEXITSTATUS(status);
}

static int look(void)
{
    struct timespec moment = {0, 5000000};
    nanosleep(&moment, NULL);
    for (int i = 0; i < BUFFERS; i++)
        if (buffers[i])
            return 1;
    return 0;
}

int main(int argc, char **argv)
{
    int counts[3] = {0, 0, 0};
    if (argc < 2)
        return look();
    self = argv[0];
    memset(text, 'x', sizeof text);
    for (int number = 0; number < atoi(argv[1]); number++)
        counts[attempt(number) % 3]++;
    printf("%d untouched, %d written to, %d failed\n", counts[0], counts[1], counts[2]);
    return 0;
}
