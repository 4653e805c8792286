/* A suite in C for `vsock fabric`: binds a port, and starts the guest's half by `vsock run`.
   Its arguments are the words of `vsock run --cid 3 --`; without any it is the guest's half. */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int count, char **words)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = 5000};
    socklen_t size = sizeof address;
    int sock = socket(AF_VSOCK, SOCK_STREAM, 0), status;
    char data[16] = "";

    if (count == 1) {
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(sock, (struct sockaddr *)&address, sizeof address) != 0) {
            perror("connect");
            return 1;
        }
        return write(sock, "ready", 5) != 5;
    }
    address.svm_cid = VMADDR_CID_ANY;
    if (bind(sock, (struct sockaddr *)&address, sizeof address) != 0 || listen(sock, 1) != 0) {
        perror("bind");
        return 1;
    }
    if (fork() == 0) {
        char *call[32] = {0};
        memcpy(call, words + 1, (count - 1) * sizeof *call);
        call[count - 1] = words[0];
        execvp(call[0], call);
        _exit(127);
    }
    sock = accept(sock, (struct sockaddr *)&address, &size);
    if (read(sock, data, sizeof data - 1) < 0) {
        perror("read");
        return 1;
    }
    printf("%u %s\n", address.svm_cid, data);
    wait(&status);
    return WEXITSTATUS(status);
}
