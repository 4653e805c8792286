/* Every function of the header, for mingw-w64. */
#include "vmci_sockets.h"

int main(void)
{
    WSADATA data;
    struct sockaddr_vm address = {0};
    int fd;
    uint64 size = 32768;
    if (WSAStartup(MAKEWORD(2, 2), &data) != 0)
        return 1;
    address.svm_family = (sa_family_t)VMCISock_GetAFValueFd(&fd);
    address.svm_cid = VMCISock_GetLocalCID();
    address.svm_port = VMADDR_PORT_ANY;
    VMCISock_ReleaseAFValueFd(fd);
    return VMCISock_GetAFValue() + (int)VMCISock_Version() + SO_VMCI_BUFFER_SIZE + (int)size +
           (address.svm_cid == VMADDR_CID_ANY) + (int)(sizeof address - sizeof(struct sockaddr));
}
