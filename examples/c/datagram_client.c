/* The guide's chapter 4, "Having the Client Request a Connection", as a complete program.
 *
 *     datagram_client CID PORT
 *
 * Asks once with sendto(), and once with connect() and send().
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
    char buf[BUFSIZE] = "sendto", send_buf[BUFSIZE] = "send";

    if (argc != 3) {
        fprintf(stderr, "usage: %s CID PORT\n", argv[0]);
        return 2;
    }

    int afVMCI = VMCISock_GetAFValue();
    if ((sockfd = socket(afVMCI, SOCK_DGRAM, 0)) == -1) {
        perror("socket");
        return EXIT_FAILURE;
    }

    struct sockaddr_vm their_addr = {0};
    their_addr.svm_family = afVMCI;
    their_addr.svm_cid = atoi(argv[1]);
    their_addr.svm_port = atoi(argv[2]);
    if ((numbytes = sendto(sockfd, buf, strlen(buf), 0,
                           (struct sockaddr *)&their_addr, sizeof their_addr)) == -1) {
        perror("sendto");
        goto close;
    }

    struct sockaddr_vm from_addr;
    socklen_t from_addr_size = sizeof from_addr;
    if ((numbytes = recvfrom(sockfd, buf, sizeof buf, 0, (struct sockaddr *)&from_addr,
                             &from_addr_size)) == -1) {
        perror("recvfrom");
        goto close;
    }
    printf("context %u says: %.*s\n", from_addr.svm_cid, numbytes, buf);

    if ((connect(sockfd, (struct sockaddr *)&their_addr, sizeof their_addr)) == -1) {
        perror("connect");
        goto close;
    }
    if ((numbytes = send(sockfd, send_buf, strlen(send_buf), 0)) == -1) {
        perror("send");
        goto close;
    }
    if ((numbytes = recv(sockfd, buf, sizeof buf, 0)) == -1) {
        perror("recv");
        goto close;
    }
    printf("and again: %.*s\n", numbytes, buf);
    status = EXIT_SUCCESS;

close:
    close(sockfd);
    return status;
}
