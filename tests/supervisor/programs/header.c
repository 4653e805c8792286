/* The header beside Linux's own, in C89 and in C++. */
#include <linux/vm_sockets.h>
#include "vmci_sockets.h"

int main(void)
{
    int fd;
    struct sockaddr_vm address;
    address.svm_family = (sa_family_t)VMCISock_GetAFValueFd(&fd);
    VMCISock_ReleaseAFValueFd(fd);
    return (int)(VMCISock_Version() + VMCISock_GetLocalCID()) + VMCISock_GetAFValue() +
           SO_VMCI_CONNECT_TIMEOUT + address.svm_family;
}
