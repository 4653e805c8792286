/* Blocking calls and signals.  Prints a line for each result, for the test to compare.
 *
 *     signals accept      a signal during accept(), without and with SA_RESTART
 *     signals timeout     SO_RCVTIMEO
 *     signals storm       a signal every three milliseconds, as of Go's runtime
 *     signals again       one each millisecond without SA_RESTART; calls are repeated after EINTR
 *     signals killed      a thread that waits in accept() while the process ends
 */
#include "vmci_sockets.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>

static volatile sig_atomic_t signals;
static long eintr;
static struct sockaddr_vm address = {.svm_family = 40};

static void count(int number)
{
    signals++;
}

static void *connect_later(void *unused)
{
    /* After the third signal: accept() was restarted after the first two. */
    int fd = socket(40, SOCK_STREAM, 0);
    while (signals < 3)
        usleep(1000);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        perror("connect");
    return NULL;
}

static int listener(void)
{
    socklen_t size = sizeof address;
    int fd = socket(40, SOCK_STREAM, 0);
    address.svm_cid = VMADDR_CID_LOCAL;
    address.svm_port = VMADDR_PORT_ANY;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &size) < 0)
        perror("listener");
    return fd;
}

static void tick(int restart, int interval_ms)
{
    struct sigaction action = {.sa_handler = count, .sa_flags = restart};
    struct itimerval timer = {{0, interval_ms * 1000}, {0, interval_ms * 1000}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

#define MUST(call)                                                                                 \
    do {                                                                                           \
        long result;                                                                               \
        while ((result = (call)) < 0 && errno == EINTR)                                            \
            eintr++;                                                                               \
        if (result < 0) {                                                                          \
            printf("round %d: %s: %s\n", number, #call, strerror(errno));                           \
            return;                                                                                \
        }                                                                                          \
    } while (0)

static void round_trip(int number)
{
    struct sockaddr_vm here = {.svm_family = 40, .svm_cid = VMADDR_CID_LOCAL}, there;
    socklen_t size = sizeof here;
    char text[16] = "text";
    int server, client, accepted, datagrams;
    here.svm_port = VMADDR_PORT_ANY;
    MUST(server = socket(40, SOCK_STREAM, 0));
    MUST(bind(server, (struct sockaddr *)&here, sizeof here));
    MUST(listen(server, 4));
    MUST(getsockname(server, (struct sockaddr *)&here, &size));
    MUST(client = socket(40, SOCK_STREAM, 0));
    MUST(connect(client, (struct sockaddr *)&here, sizeof here));
    MUST(accepted = accept(server, (struct sockaddr *)&there, &size));
    MUST(send(client, text, 4, 0));
    MUST(recv(accepted, text, sizeof text, 0));
    MUST(getpeername(client, (struct sockaddr *)&there, &size));
    MUST(close(accepted));
    MUST(close(client));
    MUST(close(server));
    MUST(datagrams = socket(40, SOCK_DGRAM, 0));
    MUST(bind(datagrams, (struct sockaddr *)&here, sizeof here));
    MUST(sendto(datagrams, text, 4, 0, (struct sockaddr *)&here, sizeof here));
    MUST(recvfrom(datagrams, text, sizeof text, 0, (struct sockaddr *)&there, &size));
    if (there.svm_port != here.svm_port)
        printf("round %d: from %u\n", number, there.svm_port);
    MUST(close(datagrams));
}

static int descriptors(void)
{
    int found = 0;
    for (int fd = 0; fd < 1024; fd++)
        found += fcntl(fd, F_GETFD) >= 0;
    return found;
}

static void again(int rounds)
{
    int before = descriptors();
    tick(0, 1);
    for (int number = 0; number < rounds; number++)
        round_trip(number);
    printf("%s, %d descriptors left\n", eintr ? "interrupted" : "calm", descriptors() - before);
}

static void storm(int rounds)
{
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
    struct itimerval timer = {{0, 3000}, {0, 3000}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
    for (int number = 0; number < rounds; number++)
        round_trip(number);
    printf("%s\n", signals > rounds / 10 ? "stormy" : "calm");
}

static void *wait_in_accept(void *fd)
{
    accept(*(int *)fd, NULL, NULL);
    return NULL;
}

int main(int argc, char **argv)
{
    int fd = listener();
    pthread_t thread;
    if (!strcmp(argv[1], "accept")) {
        tick(0, 50);
        int result = accept(fd, NULL, NULL);
        printf("without SA_RESTART: %d %s\n", result, strerror(errno));
        signals = 0;
        sigset_t alarms;
        sigemptyset(&alarms);
        sigaddset(&alarms, SIGALRM);
        pthread_sigmask(SIG_BLOCK, &alarms, NULL);
        pthread_create(&thread, NULL, connect_later, NULL);
        pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
        tick(SA_RESTART, 50);
        result = accept(fd, NULL, NULL);
        printf("with SA_RESTART: %s after %s signals\n", result >= 0 ? "accepted" : strerror(errno),
               signals >= 3 ? "three" : "few");
        pthread_join(thread, NULL);
    } else if (!strcmp(argv[1], "timeout")) {
        struct timeval limit = {0, 100000};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        int result = accept(fd, NULL, NULL);
        printf("%d %s\n", result, strerror(errno));
    } else if (!strcmp(argv[1], "storm")) {
        storm(300);
    } else if (!strcmp(argv[1], "again")) {
        again(300);
    } else {
        pthread_create(&thread, NULL, wait_in_accept, &fd);
        printf("%u\n", address.svm_port);
        fflush(stdout);
        getchar();
    }
    return 0;
}
