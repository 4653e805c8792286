/* Blocking calls and signals.  Prints a line for each thing; the test compares them.
 *
 *     signals accept      a signal during accept(), without and with SA_RESTART
 *     signals timeout     SO_RCVTIMEO
 *     signals killed      a thread that waits in accept() while the process ends
 */
#include "vmci_sockets.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>

static volatile sig_atomic_t signals;
static struct sockaddr_vm address = {.svm_family = 40};

static void count(int number)
{
    signals++;
}

static void *connect_later(void *unused)
{
    /* After the third signal: two went to a restarted accept(). */
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
    } else {
        pthread_create(&thread, NULL, wait_in_accept, &fd);
        printf("%u\n", address.svm_port);
        fflush(stdout);
        getchar();
    }
    return 0;
}
