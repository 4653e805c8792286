/* The guide's chapter 3, "Having the Client Request a Connection", as a complete program.
 *
 *     stream_client CID PORT
 */
#include "vmci_sockets.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define BUFSIZE 4096

int main(int argc, char **argv)
{
    int sockfd;
    int status = EXIT_FAILURE;
    int numbytes;
    char send_buf[BUFSIZE], recv_buf[BUFSIZE];

    if (argc != 3) {
        fprintf(stderr, "usage: %s CID PORT\n", argv[0]);
        return 2;
    }

    int afVMCI = VMCISock_GetAFValue();
    if ((sockfd = socket(afVMCI, SOCK_STREAM, 0)) == -1) {
        perror("socket");
        return EXIT_FAILURE;
    }

    struct sockaddr_vm their_addr = {0};
    their_addr.svm_family = afVMCI;
    their_addr.svm_cid = atoi(argv[1]);
    their_addr.svm_port = atoi(argv[2]);
    if ((connect(sockfd, (struct sockaddr *)&their_addr, sizeof their_addr)) == -1) {
        perror("connect");
        goto close;
    }

    /* Initialize send_buf with your data. */
    snprintf(send_buf, sizeof send_buf, "hello from context %u\n", VMCISock_GetLocalCID());
    if ((numbytes = send(sockfd, send_buf, strlen(send_buf), 0)) == -1) {
        perror("send");
        goto close;
    }
    shutdown(sockfd, SHUT_WR);

    while ((numbytes = recv(sockfd, recv_buf, sizeof recv_buf, 0)) > 0)
        fwrite(recv_buf, 1, numbytes, stdout);
    if (numbytes == -1) {
        perror("recv");
        goto close;
    }
    status = EXIT_SUCCESS;

close:
    close(sockfd);
    return status;
}
