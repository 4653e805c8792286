/* Holds a descriptor as a plain C program does: reads it to its end, writes to it, and says what
   each was like.  Usage: stream_holder FD */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const char *outcome(long result) {
    if (result >= 0)
        return result == 0 ? "end" : "data";
    switch (errno) {
    case EPIPE:
        return "EPIPE";
    case ECONNRESET:
        return "ECONNRESET";
    default:
        return "another error";
    }
}

int main(int argc, char **argv) {
    char buffer[4096];
    long result;
    int fd = argc > 1 ? atoi(argv[1]) : 0;

    signal(SIGPIPE, SIG_IGN);
    puts("holds it");
    fflush(stdout);
    while ((result = read(fd, buffer, sizeof buffer)) > 0)
        ;
    printf("read: %s\n", outcome(result));
    printf("write: %s\n", outcome(write(fd, "x", 1)));
    return 0;
}
