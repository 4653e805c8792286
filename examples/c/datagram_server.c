/* The guide's chapter 4, "Preparing the Server for a Connection", as a complete program.
 *
 *     datagram_server PORT
 *
 * Prints its address, answers two datagrams.
 */
#include "vmci_sockets.h"
#include <stdio.h>
#include <stdlib.h>
#define BUFSIZE 4096

int main(int argc, char **argv)
{
    int sockfd_dgram;
    int status = EXIT_FAILURE;
    int numbytes;
    char buf[BUFSIZE];

    if (argc != 2) {
        fprintf(stderr, "usage: %s PORT\n", argv[0]);
        return 2;
    }

    int afVMCI = VMCISock_GetAFValue();
    if ((sockfd_dgram = socket(afVMCI, SOCK_DGRAM, 0)) == -1) {
        perror("socket");
        return EXIT_FAILURE;
    }

    struct sockaddr_vm my_addr = {0};
    my_addr.svm_family = afVMCI;
    my_addr.svm_cid = VMADDR_CID_ANY;
    my_addr.svm_port = atoi(argv[1]) ? (unsigned int)atoi(argv[1]) : VMADDR_PORT_ANY;
    if (bind(sockfd_dgram, (struct sockaddr *)&my_addr, sizeof my_addr) == -1) {
        perror("bind");
        goto close;
    }

    socklen_t my_addr_size = sizeof my_addr;
    if (getsockname(sockfd_dgram, (struct sockaddr *)&my_addr, &my_addr_size) == -1) {
        perror("getsockname");
        goto close;
    }
    printf("context %u, port %u\n", my_addr.svm_cid, my_addr.svm_port);
    fflush(stdout);

    for (int count = 0; count < 2; count++) {
        struct sockaddr_vm their_addr;
        my_addr_size = sizeof their_addr;
        if ((numbytes = recvfrom(sockfd_dgram, buf, sizeof buf, 0,
                                 (struct sockaddr *)&their_addr, &my_addr_size)) == -1) {
            perror("recvfrom");
            goto close;
        }
        printf("%.*s from context %u\n", numbytes, buf, their_addr.svm_cid);
        numbytes = snprintf(buf, sizeof buf, "you are context %u", their_addr.svm_cid);
        if ((numbytes = sendto(sockfd_dgram, buf, numbytes, 0,
                               (struct sockaddr *)&their_addr, sizeof their_addr)) == -1) {
            perror("sendto");
            goto close;
        }
    }
    status = EXIT_SUCCESS;

close:
    close(sockfd_dgram);
    return status;
}
