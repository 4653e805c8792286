/* Two thousand threads, 200 at a time; each tenth makes a socket. */
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static void *run(void *argument)
{
    int fd;

    if (argument == NULL)
        return &run;
    fd = socket(40, SOCK_STREAM, 0);
    if (fd < 0)
        return NULL;
    close(fd);
    return &run;
}

int main(void)
{
    int made = 0;
    for (int round = 0; round < 10; round++) {
        pthread_t threads[200];
        for (int i = 0; i < 200; i++)
            if (pthread_create(&threads[i], NULL, run, i % 10 ? NULL : threads) != 0)
                return 1;
        for (int i = 0; i < 200; i++) {
            void *result;
            pthread_join(threads[i], &result);
            made += result != NULL;
        }
    }
    printf("%d\n", made);
    return 0;
}
