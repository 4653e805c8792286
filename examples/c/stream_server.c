/* The guide's chapter 3, "Preparing the Server for a Connection", as a complete program.
 *
 *     stream_server PORT
 *
 * Prints its address, serves one client: what it sends comes back in capitals.
 */
#include "vmci_sockets.h"
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#define BUFSIZE 4096
#define BACKLOG 5

int main(int argc, char **argv)
{
    int sockfd, newfd;
    int status = EXIT_FAILURE;
    int numbytes = 0;
    char recv_buf[BUFSIZE];

    if (argc != 2) {
        fprintf(stderr, "usage: %s PORT\n", argv[0]);
        return 2;
    }

    int afVMCI = VMCISock_GetAFValue();
    if ((sockfd = socket(afVMCI, SOCK_STREAM, 0)) == -1) {
        perror("socket");
        return EXIT_FAILURE;
    }

    uint64 setBuf = 32768, getBuf;
    socklen_t getBufLen = sizeof getBuf;
    /* reduce buffer to above size and check */
    if (setsockopt(sockfd, afVMCI, SO_VMCI_BUFFER_SIZE, (void *)&setBuf, sizeof setBuf) == -1) {
        perror("setsockopt");
        goto close;
    }
    if (getsockopt(sockfd, afVMCI, SO_VMCI_BUFFER_SIZE, (void *)&getBuf, &getBufLen) == -1) {
        perror("getsockopt");
        goto close;
    }
    if (getBuf != setBuf) {
        fprintf(stderr, "SO_VMCI_BUFFER_SIZE not set to size requested.\n");
        goto close;
    }

    struct sockaddr_vm my_addr = {0};
    my_addr.svm_family = afVMCI;
    my_addr.svm_cid = VMADDR_CID_ANY;
    my_addr.svm_port = atoi(argv[1]) ? (unsigned int)atoi(argv[1]) : VMADDR_PORT_ANY;
    if (bind(sockfd, (struct sockaddr *)&my_addr, sizeof my_addr) == -1) {
        perror("bind");
        goto close;
    }

    socklen_t my_addr_size = sizeof my_addr;
    if (getsockname(sockfd, (struct sockaddr *)&my_addr, &my_addr_size) == -1) {
        perror("getsockname");
        goto close;
    }

    if (listen(sockfd, BACKLOG) == -1) {
        perror("listen");
        goto close;
    }
    printf("context %u, port %u\n", my_addr.svm_cid, my_addr.svm_port);
    fflush(stdout);

    struct sockaddr_vm their_addr;
    socklen_t their_addr_len = sizeof their_addr;
    if ((newfd = accept(sockfd, (struct sockaddr *)&their_addr, &their_addr_len)) == -1) {
        perror("accept");
        goto close;
    }
    printf("serving context %u\n", their_addr.svm_cid);

    fd_set readfd;
    struct timeval timeout = {.tv_sec = 10};
    FD_ZERO(&readfd);
    FD_SET(newfd, &readfd);
    if (select(newfd + 1, &readfd, NULL, NULL, &timeout) != 1) {
        perror("select");
        goto close_both;
    }

    while ((numbytes = recv(newfd, recv_buf, sizeof recv_buf, 0)) > 0) {
        for (int i = 0; i < numbytes; i++)
            recv_buf[i] = toupper((unsigned char)recv_buf[i]);
        if (send(newfd, recv_buf, numbytes, 0) == -1) {
            perror("send");
            goto close_both;
        }
    }
    if (numbytes == -1) {
        perror("recv");
        goto close_both;
    }
    status = EXIT_SUCCESS;

close_both:
    close(newfd);
close:
    close(sockfd);
    return status;
}
