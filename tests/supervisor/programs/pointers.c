/* Invalid arguments.  Prints the error of each call. */
#define _GNU_SOURCE
#include "vmci_sockets.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define TRY(call) printf("%s\n", (call) < 0 ? strerror(errno) : "Success")

int main(void)
{
    struct sockaddr_vm any = {.svm_family = 40, .svm_cid = VMADDR_CID_ANY, .svm_port = 7001};
    struct sockaddr *address = (struct sockaddr *)&any, *nowhere = (struct sockaddr *)8;
    socklen_t size = sizeof any, negative = -1;
    unsigned long long value = 4096;
    int fd = socket(40, SOCK_STREAM, 0);

    TRY(bind(fd, nowhere, sizeof any));
    TRY(bind(fd, NULL, sizeof any));
    TRY(bind(fd, address, 4));
    TRY(bind(fd, address, -1));
    TRY(bind(fd, address, 4096));
    any.svm_family = AF_INET;
    TRY(bind(fd, address, sizeof any));
    any.svm_family = 40;
    TRY(bind(fd, address, sizeof any));
    TRY(getsockname(fd, nowhere, &size));
    TRY(getsockname(fd, address, (socklen_t *)nowhere));
    TRY(getsockname(fd, address, &negative));
    TRY(setsockopt(fd, 40, SO_VMCI_BUFFER_SIZE, &value, 4));
    TRY(setsockopt(fd, 40, SO_VMCI_BUFFER_SIZE, nowhere, sizeof value));
    TRY(setsockopt(fd, 40, 99, &value, sizeof value));
    size = 4;
    TRY(getsockopt(fd, 40, SO_VMCI_BUFFER_SIZE, &value, &size));
    TRY(listen(fd, 1));
    TRY(accept4(fd, NULL, NULL, 12345));
    /* accept() waits for a connection first. */
    struct sockaddr_vm server;
    int client = socket(40, SOCK_STREAM, 0);
    size = sizeof server;
    TRY(getsockname(fd, (struct sockaddr *)&server, &size));
    fcntl(client, F_SETFL, O_NONBLOCK);
    TRY(connect(client, (struct sockaddr *)&server, size));
    TRY(accept(fd, address, NULL));
    TRY(shutdown(fd, SHUT_RDWR));
    TRY(connect(fd, address, sizeof any));
    TRY(socket(40, SOCK_RAW, 0));
    TRY(socket(40, SOCK_STREAM, 6));
    int pair[2];
    TRY(socketpair(40, SOCK_STREAM, 0, pair));
    TRY(ioctl(0, 0x7b9, &value));
    TRY(ioctl(99, 0x7b9, &value));
    TRY(bind(99, address, sizeof any));
    /* A short buffer gets the beginning, and the size of the whole. */
    size = 2;
    memset(&any, 0xff, sizeof any);
    TRY(getsockname(fd, address, &size));
    printf("%u %u %x\n", size, any.svm_family, any.svm_port);
    return 0;
}
