/* A static program without a C library, with system calls alone.
 *
 * Connects to the host's port 7000, sends "raw", and prints the reply.
 */
static long call(long number, long a, long b, long c)
{
    long result;
#if defined(__x86_64__)
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b,
                  x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    result = x0;
#endif
    return result;
}

#if defined(__x86_64__)
enum { READ = 0, WRITE = 1, SOCKET = 41, CONNECT = 42, EXIT = 231 };
#else
enum { READ = 63, WRITE = 64, SOCKET = 198, CONNECT = 203, EXIT = 94 };
#endif

struct address {
    unsigned short family, reserved;
    unsigned int port, cid;
    unsigned char zero[4];
};

void _start(void)
{
    char buffer[16];
    struct address host = {40, 0, 7000, 2, {0}};
    long fd = call(SOCKET, 40, 1, 0), size = -1;
    if (fd >= 0 && call(CONNECT, fd, (long)&host, sizeof host) == 0 &&
        call(WRITE, fd, (long)"raw", 3) == 3)
        size = call(READ, fd, (long)buffer, sizeof buffer);
    if (size > 0)
        call(WRITE, 1, (long)buffer, size);
    call(EXIT, size > 0 ? 0 : 1, 0, 0);
}
