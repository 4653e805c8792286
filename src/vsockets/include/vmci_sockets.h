/*
 * vmci_sockets.h: vSockets for C and C++, on Linux and on Windows.
 *
 * The names are those of VMware's vSockets Programming Guide.  Written for the vsockets project
 * from the guide, vsock(7) and linux/vm_sockets.h.  Apache-2.0.
 *
 * Everything is in this file; there is nothing to link with (but ws2_32 on Windows).
 */
#ifndef VSOCKETS_VMCI_SOCKETS_H
#define VSOCKETS_VMCI_SOCKETS_H

#if defined(_WIN32)
#include <winsock2.h>
#include <windows.h>
#include <winioctl.h>
#include <stdint.h>
typedef unsigned short sa_family_t;
#else
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#endif

#if defined(__linux__)
/* The kernel's header has the address structure.  One definition lets a program include both. */
#include <linux/vm_sockets.h>
#else
struct sockaddr_vm {
    sa_family_t svm_family; /* VMCISock_GetAFValue() */
    unsigned short svm_reserved1;
    unsigned int svm_port;
    unsigned int svm_cid;
    unsigned char svm_zero[4]; /* as large as struct sockaddr */
};
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The guide's listings call it so (page 14). */
typedef uint64_t uint64;

/* Socket options, at the level VMCISock_GetAFValue(): 64-bit sizes in bytes. */
#define SO_VMCI_BUFFER_SIZE 0
#define SO_VMCI_BUFFER_MIN_SIZE 1
#define SO_VMCI_BUFFER_MAX_SIZE 2
/* Read only: which virtual machine the peer is; whether this endpoint is trusted. */
#define SO_VMCI_PEER_HOST_VM_ID 3
#define SO_VMCI_SERVICE_LABEL 4
#define SO_VMCI_TRUSTED 5
/* struct timeval: how long connect() waits. */
#define SO_VMCI_CONNECT_TIMEOUT 6
#define SO_VMCI_NONBLOCK_TXRX 7

/* Wildcards, and the contexts that are always there. */
#ifndef VMADDR_CID_ANY
#define VMADDR_CID_ANY ((unsigned int)-1)
#endif
#ifndef VMADDR_PORT_ANY
#define VMADDR_PORT_ANY ((unsigned int)-1)
#endif
#ifndef VMADDR_CID_HYPERVISOR
#define VMADDR_CID_HYPERVISOR 0
#endif
#ifndef VMADDR_CID_LOCAL
#define VMADDR_CID_LOCAL 1
#endif
#ifndef VMADDR_CID_RESERVED
#define VMADDR_CID_RESERVED 1
#endif
#ifndef VMADDR_CID_HOST
#define VMADDR_CID_HOST 2
#endif

/* -std=c89 knows no other spelling. */
#define VSOCKETS_INLINE __inline

/* What VMCISock_Version() returns, taken apart. */
#define VMCI_SOCKETS_INVALID_VERSION ((unsigned int)-1)
#define VMCI_SOCKETS_VERSION_EPOCH(version) (((version) >> 24) & 0xff)
#define VMCI_SOCKETS_VERSION_MAJOR(version) (((version) >> 16) & 0xff)
#define VMCI_SOCKETS_VERSION_MINOR(version) ((version) & 0xffff)

#if defined(_WIN32)

#define VSOCKETS_IOCTL_VERSION 0x81032058
#define VSOCKETS_IOCTL_AF_VALUE 0x81032068
#define VSOCKETS_IOCTL_LOCAL_CID 0x8103206c

/* Ask VMware's driver; all bits set when there is none. */
static VSOCKETS_INLINE unsigned int vsockets_ask_device(unsigned int request)
{
    unsigned int answer = (unsigned int)-1;
    DWORD size = 0;
    HANDLE device = CreateFileW(L"\\\\.\\VMCI", GENERIC_READ, 0, NULL, OPEN_EXISTING, 0, NULL);
    if (device == INVALID_HANDLE_VALUE)
        return answer;
    if (!DeviceIoControl(device, request, &answer, sizeof answer, &answer, sizeof answer, &size,
                         NULL))
        answer = (unsigned int)-1;
    CloseHandle(device);
    return answer;
}

/* The address family for socket(); -1 without VMware's driver. */
static VSOCKETS_INLINE int VMCISock_GetAFValue(void)
{
    return (int)vsockets_ask_device(VSOCKETS_IOCTL_AF_VALUE);
}

/* As VMCISock_GetAFValue(); there is no descriptor to hold on Windows, *outFd becomes -1. */
static VSOCKETS_INLINE int VMCISock_GetAFValueFd(int *outFd)
{
    *outFd = -1;
    return VMCISock_GetAFValue();
}

static VSOCKETS_INLINE void VMCISock_ReleaseAFValueFd(int fd)
{
    (void)fd;
}

#else /* Linux and other Unix */

#define VSOCKETS_DEVICE "/dev/vsock"
#define VSOCKETS_AF_VSOCK 40 /* since Linux 3.9, whatever sys/socket.h knows */
#define VSOCKETS_IOCTL_VERSION 0x7b4
#define VSOCKETS_IOCTL_AF_VALUE 0x7b8
#define VSOCKETS_IOCTL_LOCAL_CID 0x7b9

/* Something that answers the ioctls: the device, or a socket; -1 when there are no vSockets. */
static VSOCKETS_INLINE int vsockets_open(void)
{
    int fd = open(VSOCKETS_DEVICE, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : socket(VSOCKETS_AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static VSOCKETS_INLINE unsigned int vsockets_ask_device(unsigned int request)
{
    unsigned int answer = (unsigned int)-1;
    int fd = vsockets_open();
    if (fd >= 0) {
        if (ioctl(fd, request, &answer) < 0)
            answer = (unsigned int)-1;
        close(fd);
    }
    return answer;
}

/*
 * The address family for socket(), and a descriptor that keeps vSockets there while it is open;
 * give it to VMCISock_ReleaseAFValueFd().  -1 when there are no vSockets.
 */
static VSOCKETS_INLINE int VMCISock_GetAFValueFd(int *outFd)
{
    int family = -1;
    *outFd = vsockets_open();
    if (*outFd < 0)
        return -1;
    /* Linux's own driver has no such ioctl; it has but one family. */
    return ioctl(*outFd, VSOCKETS_IOCTL_AF_VALUE, &family) < 0 ? VSOCKETS_AF_VSOCK : family;
}

static VSOCKETS_INLINE void VMCISock_ReleaseAFValueFd(int fd)
{
    if (fd >= 0)
        close(fd);
}

/* As VMCISock_GetAFValueFd(), for programs that open a socket soon (guide page 11). */
static VSOCKETS_INLINE int VMCISock_GetAFValue(void)
{
    int fd;
    int family = VMCISock_GetAFValueFd(&fd);
    VMCISock_ReleaseAFValueFd(fd);
    return family;
}

#endif

/* The context this program runs in (guide page 11); VMADDR_CID_ANY when it cannot be told. */
static VSOCKETS_INLINE unsigned int VMCISock_GetLocalCID(void)
{
    return vsockets_ask_device(VSOCKETS_IOCTL_LOCAL_CID);
}

/* The version of vSockets; VMCI_SOCKETS_INVALID_VERSION when it cannot be told. */
static VSOCKETS_INLINE unsigned int VMCISock_Version(void)
{
    return vsockets_ask_device(VSOCKETS_IOCTL_VERSION);
}

#ifdef __cplusplus
}
#endif

#endif
