/* Asks vsockd one question: the bytes of standard input, sent to the control socket PATH of type
   seqpacket; its answer goes to standard output.  Usage: request_client PATH */

#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char buffer[4096];
    ssize_t size;
    int sock = socket(AF_UNIX, SOCK_SEQPACKET, 0);

    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) != 0)
        return 3;
    if ((size = read(0, buffer, sizeof buffer)) <= 0 || send(sock, buffer, size, 0) != size)
        return 4;
    if ((size = recv(sock, buffer, sizeof buffer, 0)) < 0)
        return 5;
    return write(1, buffer, size) == size ? 0 : 6;
}
