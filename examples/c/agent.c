/* An agent in a guest: it answers each line with a line, and serves the host alone. */
#define _GNU_SOURCE
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void serve(int sock, unsigned cid)
{
    FILE *in = fdopen(sock, "r"), *out = fdopen(dup(sock), "w");
    char line[256];
    int one, two;

    while (fgets(line, sizeof line, in)) {
        if (strcmp(line, "ping\n") == 0)
            fprintf(out, "pong from context %u\n", cid);
        else if (sscanf(line, "add %d %d", &one, &two) == 2)
            fprintf(out, "%d\n", one + two);
        else
            fprintf(out, "unknown request\n");
        fflush(out);
    }
}

int main(int count, char **words)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK,
        .svm_cid = VMADDR_CID_ANY,
        .svm_port = count > 1 ? atoi(words[1]) : 5000,
    };
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);

    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8)) {
        perror("agent");
        return 1;
    }
    signal(SIGCHLD, SIG_IGN);
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct sockaddr_vm peer, local;
        socklen_t size = sizeof peer;
        int sock = accept(listener, (struct sockaddr *)&peer, &size);

        if (sock < 0) {
            perror("agent");
            return 1;
        }
        if (peer.svm_cid == VMADDR_CID_HOST && fork() == 0) {
            size = sizeof local;
            getsockname(sock, (struct sockaddr *)&local, &size);
            serve(sock, local.svm_cid);
            _exit(0);
        }
        close(sock);
    }
}
