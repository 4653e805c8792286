/* A set-user-ID program that returns to its user.  It writes its effective user as a digit ('0' or
   '1') to descriptor 3 and waits there for a byte; with its user's rights again it executes PROGRAM,
   if there is one.  Usage: turncoat [PROGRAM] */

#define _GNU_SOURCE
#include <unistd.h>

int main(int argc, char **argv) {
    char byte = geteuid() ? '1' : '0';

    if (write(3, &byte, 1) != 1 || read(3, &byte, 1) != 1)
        return 1;
    if (argc < 2)
        return 0;
    if (setresuid(getuid(), getuid(), getuid()) != 0)
        return 2;
    execl(argv[1], argv[1], (char *)0);
    return 3;
}
