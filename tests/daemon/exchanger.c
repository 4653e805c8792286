/* exchanger UID NAME OTHER TARGET: as that user exchange NAME with OTHER, a link to TARGET, until killed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char **words)
{
    int user = count == 5 ? atoi(words[1]) : -1;
    struct stat found;

    if (user < 0 || setgid(user) || setuid(user) || prctl(PR_SET_PDEATHSIG, SIGKILL))
        return 1;
    for (;;) {
        if (lstat(words[3], &found) || !S_ISLNK(found.st_mode)) {
            unlink(words[3]);
            if (symlink(words[4], words[3])) {}
        }
        syscall(SYS_renameat2, AT_FDCWD, words[2], AT_FDCWD, words[3], RENAME_EXCHANGE);
    }
}
