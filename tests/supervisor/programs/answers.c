// Prints the answers of AF_VSOCK sockets: every call, in every state, each on a new socket.
//
//   answers stream|seqpacket|dgram CID [PORT]
//
// The sockets connect to each other through CID.  With a PORT that never answers, "connecting" is the
// only state; without, the only one omitted.  Each line has a type, call, state and answer.  With a
// PORT, prints "ready" and waits for a line before it connects.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define AF_VSOCK_ 40
#define ANY 0xFFFFFFFFu
#define SIOCOUTQ_ 0x5411

struct address {
    uint16_t family, reserved;
    uint32_t port, cid;
    uint8_t flags, zero[3];
};

// A socket in some state, and related addresses and sockets.
struct scene {
    int type, fd, peer, listener;
    struct address own, far;  // its local address; its peer, or an address to connect to
};

static uint32_t cid, silent, held;
static volatile sig_atomic_t broken_pipes, alarms;

static void count_pipe(int number) { broken_pipes++; }
static void count_alarm(int number) { alarms++; }

static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static struct address address(uint32_t to, uint32_t port)
{
    struct address made = {.family = AF_VSOCK_, .port = port, .cid = to};
    return made;
}

static int make(int type)
{
    int fd = socket(AF_VSOCK_, type, 0);
    if (fd < 0)
        die("socket");
    return fd;
}

static struct address name_of(int fd)
{
    struct address found;
    socklen_t size = sizeof found;
    if (getsockname(fd, (void *)&found, &size))
        die("getsockname");
    return found;
}

static void bind_to(int fd, uint32_t to)
{
    struct address wanted = address(to, ANY);
    if (bind(fd, (void *)&wanted, sizeof wanted))
        die("bind");
}

static int listening(int type)
{
    int fd = make(type);
    bind_to(fd, ANY);
    if (listen(fd, 4))
        die("listen");
    return fd;
}

static void wait_for(int fd, short events)
{
    struct pollfd one = {fd, events, 0};
    if (poll(&one, 1, 10000) != 1)
        die("poll");
}

// Returns an unused port: one that was just released.
static uint32_t nobodys(int type)
{
    int fd = make(type);
    bind_to(fd, ANY);
    uint32_t port = name_of(fd).port;
    close(fd);
    return port;
}

static void connect_to(struct scene *s, uint32_t port)
{
    s->far = address(cid, port);
    if (connect(s->fd, (void *)&s->far, sizeof s->far))
        die("connect");
}

static void establish(struct scene *s)
{
    s->listener = listening(s->type);
    s->fd = make(s->type);
    connect_to(s, name_of(s->listener).port);
    s->peer = accept(s->listener, NULL, NULL);
    if (s->peer < 0)
        die("accept");
}

static void have_data(struct scene *s)
{
    if (s->type == SOCK_DGRAM) {
        struct address to = address(cid, name_of(s->fd).port);
        if (sendto(s->peer, "data", 4, 0, (void *)&to, sizeof to) != 4)
            die("sendto");
    } else if (send(s->peer, "data", 4, 0) != 4)
        die("send");
    wait_for(s->fd, POLLIN);
}

static void shut_and_wait(struct scene *s, int how)
{
    if (shutdown(s->peer, how))
        die("shutdown");
    if (how != SHUT_RD)
        wait_for(s->fd, POLLRDHUP);
    else  // a datagram sent there is the only sign
        for (int tries = 0; tries < 2000 && send(s->fd, "", 0, MSG_NOSIGNAL) == 0; tries++)
            usleep(1000);
}

static void be_non_blocking(int fd)
{
    if (fcntl(fd, F_SETFL, O_NONBLOCK))
        die("fcntl");
}

enum state {
    NEW, BOUND, LISTENING, WAITING, CONNECTING, REFUSED, REFUSED_LATER, REFUSED_ASKED,
    CONNECTED, DATA, PEER_CLOSED, PEER_CLOSED_DATA, PEER_SHUT_WR, PEER_SHUT_RD,
    SHUT_READ, SHUT_WRITE, SHUT_BOTH, STATES
};

static const char *const STATE_NAMES[] = {
    "new", "bound", "listening", "waiting", "connecting", "refused", "refused-later",
    "refused-asked", "connected", "data", "peer-closed", "peer-closed-data", "peer-shut-wr",
    "peer-shut-rd", "shut-rd", "shut-wr", "shut-rdwr",
};

static int is_for_datagrams(enum state state)
{
    return state == NEW || state == BOUND || state == CONNECTED || state == DATA ||
           state == PEER_CLOSED || state >= SHUT_READ;
}

static void refuse(struct scene *s, enum state state)
{
    s->fd = make(s->type);
    s->far = address(cid, nobodys(s->type));
    if (state != REFUSED)
        be_non_blocking(s->fd);
    if (connect(s->fd, (void *)&s->far, sizeof s->far) == 0)
        die("a connect to nobody");
    if (state != REFUSED)
        wait_for(s->fd, POLLOUT);
    if (state == REFUSED_ASKED) {
        int code;
        socklen_t size = sizeof code;
        getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &code, &size);
    }
}

static struct scene arrange(int type, enum state state)
{
    struct scene s = {.type = type, .fd = -1, .peer = -1, .listener = -1};
    if (type == SOCK_DGRAM && state > BOUND) {
        s.fd = make(type);
        s.peer = make(type);
        bind_to(s.peer, ANY);
        connect_to(&s, name_of(s.peer).port);
        if (state == DATA)
            have_data(&s);
        if (state == PEER_CLOSED)
            close(s.peer), s.peer = -1;
    } else switch (state) {
    case NEW:
    case BOUND:
        s.fd = make(type);
        if (state == BOUND)
            bind_to(s.fd, ANY);
        break;
    case LISTENING:
    case WAITING:
        s.fd = listening(type);
        if (state == WAITING) {
            struct address to = address(cid, name_of(s.fd).port);
            s.peer = make(type);
            if (connect(s.peer, (void *)&to, sizeof to))
                die("connect");
            if (send(s.peer, "early", 5, 0) != 5)
                die("send");
            wait_for(s.fd, POLLIN);
        }
        break;
    case CONNECTING:
        s.fd = make(type);
        be_non_blocking(s.fd);
        s.far = address(cid, silent);
        if (connect(s.fd, (void *)&s.far, sizeof s.far) == 0 || errno != EINPROGRESS)
            die("connecting");
        break;
    case REFUSED:
    case REFUSED_LATER:
    case REFUSED_ASKED:
        refuse(&s, state);
        break;
    default:
        establish(&s);
    }
    if (type != SOCK_DGRAM && (state == DATA || state == PEER_CLOSED_DATA))
        have_data(&s);
    if (type != SOCK_DGRAM && (state == PEER_CLOSED || state == PEER_CLOSED_DATA)) {
        close(s.peer), s.peer = -1;
        wait_for(s.fd, POLLRDHUP);
    }
    if (state == PEER_SHUT_WR)
        shut_and_wait(&s, SHUT_WR);
    if (state == PEER_SHUT_RD)
        shut_and_wait(&s, SHUT_RD);
    if (state >= SHUT_READ && shutdown(s.fd, (int)state - SHUT_READ))
        die("shutdown");
    if (state == SHUT_BOTH && type != SOCK_DGRAM) {  // the peer's kernel answers with a reset
        wait_for(s.peer, POLLRDHUP);
        for (int tries = 0; tries < 10; tries++)
            if (sendto(s.fd, "", 0, MSG_NOSIGNAL, (void *)&s.far, sizeof s.far) == 0 ||
                errno == EISCONN)
                usleep(1000);
    }
    be_non_blocking(s.fd);
    s.own = name_of(s.fd);
    if (s.far.family == 0) {  // an address to connect to
        if (s.listener < 0 && type != SOCK_DGRAM)
            s.listener = listening(type);
        s.far = address(cid, type == SOCK_DGRAM ? nobodys(type) : name_of(s.listener).port);
    } else if (state == REFUSED || state == REFUSED_LATER || state == REFUSED_ASKED) {
        s.listener = listening(type);
        s.far = address(cid, name_of(s.listener).port);
    }
    return s;
}

static void clear(struct scene *s)
{
    close(s->fd);
    if (s->peer >= 0)
        close(s->peer);
    if (s->listener >= 0)
        close(s->listener);
}

// Values that calls return besides their result.
static char note[256];

static void describe(const struct scene *s, const struct address *found, socklen_t size)
{
    char *end = note + strlen(note);
    if (size < sizeof *found || found->family != AF_VSOCK_) {
        sprintf(end, " address-of-%u-bytes", size);
        return;
    }
    const char *who = found->cid == ANY ? "any" : "cid";
    const char *port = found->port == ANY          ? "any"
                       : found->port == s->far.port ? "peer's"
                       : found->port == s->own.port ? "own"
                                                    : "some";
    sprintf(end, " %s:%s", who, port);
}

static const char *flags_of(unsigned mask)
{
    static const struct { unsigned bit; const char *name; } NAMES[] = {
        {POLLIN, "IN"}, {POLLPRI, "PRI"}, {POLLOUT, "OUT"}, {POLLERR, "ERR"}, {POLLHUP, "HUP"},
        {POLLNVAL, "NVAL"}, {POLLRDNORM, "RDNORM"}, {POLLRDBAND, "RDBAND"},
        {POLLWRNORM, "WRNORM"}, {POLLWRBAND, "WRBAND"}, {POLLRDHUP, "RDHUP"},
    };
    static char text[128];
    strcpy(text, mask ? "" : "nothing");
    for (unsigned i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (mask & NAMES[i].bit)
            sprintf(text + strlen(text), "%s%s", *text ? "+" : "", NAMES[i].name);
    return text;
}

static char buffer[64];
static struct iovec vector = {buffer, sizeof buffer};

static long receive(struct scene *s, int flags, size_t size)
{
    return recv(s->fd, buffer, size, flags);
}

static long receive_from(struct scene *s)
{
    struct address found = {0};
    socklen_t size = sizeof found;
    long result = recvfrom(s->fd, buffer, sizeof buffer, 0, (void *)&found, &size);
    if (result >= 0)
        describe(s, &found, size);
    return result;
}

static long receive_message(struct scene *s)
{
    struct address found = {0};
    struct msghdr message = {&found, sizeof found, &vector, 1, NULL, 0, 0};
    long result = recvmsg(s->fd, &message, 0);
    if (result >= 0) {
        describe(s, &found, message.msg_namelen);
        if (message.msg_flags)
            sprintf(note + strlen(note), " flags-%x", message.msg_flags);
    }
    return result;
}

static long send_message(struct scene *s, int addressed)
{
    struct msghdr message = {addressed ? &s->far : NULL, addressed ? sizeof s->far : 0, &vector, 1};
    vector.iov_len = 4;
    long result = sendmsg(s->fd, &message, 0);
    vector.iov_len = sizeof buffer;
    return result;
}

static long connect_with(struct scene *s, struct address to, socklen_t size)
{
    return connect(s->fd, (void *)&to, size);
}

static long bind_with(struct scene *s, struct address to, socklen_t size)
{
    return bind(s->fd, (void *)&to, size);
}

static long number_of(struct scene *s, int level, int name)
{
    int value = -1;
    socklen_t size = sizeof value;
    long result = getsockopt(s->fd, level, name, &value, &size);
    if (result == 0 && name == SO_ERROR && value)
        sprintf(note, " %s", strerrorname_np(value));
    else if (result == 0)
        sprintf(note, " %d", value);
    return result;
}

static long ask(struct scene *s, int request)
{
    int value = -1;
    long result = ioctl(s->fd, request, &value);
    if (result == 0)
        sprintf(note, " %d", value);
    return result;
}

static long set_timeout(struct scene *s, long seconds, long microseconds, socklen_t size)
{
    struct timeval value = {seconds, microseconds};
    return setsockopt(s->fd, AF_VSOCK_, 6, &value, size);
}

static long by_poll(struct scene *s)
{
    struct pollfd one = {s->fd, (short)0xFFFF, 0};
    poll(&one, 1, 0);
    sprintf(note, " %s", flags_of((unsigned short)one.revents));
    return 0;
}

static long by_epoll(struct scene *s)
{
    int epoll = epoll_create1(0);
    struct epoll_event event = {EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &event))
        die("epoll_ctl");
    event.events = 0;
    epoll_wait(epoll, &event, 1, 0);
    close(epoll);
    sprintf(note, " %s", flags_of(event.events));
    return 0;
}

#define CALLS(CALL)                                                                               \
    CALL("read", read(s->fd, buffer, sizeof buffer))                                              \
    CALL("readv", readv(s->fd, &vector, 1))                                                       \
    CALL("recv", receive(s, 0, sizeof buffer))                                                    \
    CALL("recv of 0 bytes", receive(s, 0, 0))                                                     \
    CALL("recv MSG_PEEK", receive(s, MSG_PEEK, sizeof buffer))                                    \
    CALL("recv MSG_TRUNC", receive(s, MSG_TRUNC, 1))                                              \
    CALL("recv MSG_OOB", receive(s, MSG_OOB, sizeof buffer))                                      \
    CALL("recv MSG_ERRQUEUE", receive(s, MSG_ERRQUEUE, sizeof buffer))                            \
    CALL("recvfrom", receive_from(s))                                                             \
    CALL("recvmsg", receive_message(s))                                                           \
    CALL("write", write(s->fd, "text", 4))                                                        \
    CALL("writev", (vector.iov_len = 4, count = writev(s->fd, &vector, 1),                        \
                    vector.iov_len = sizeof buffer, count))                                       \
    CALL("send", send(s->fd, "text", 4, 0))                                                       \
    CALL("send MSG_NOSIGNAL", send(s->fd, "text", 4, MSG_NOSIGNAL))                               \
    CALL("send of 0 bytes", send(s->fd, "", 0, 0))                                                \
    CALL("send MSG_OOB", send(s->fd, "text", 4, MSG_OOB))                                         \
    CALL("send MSG_EOR", send(s->fd, "text", 4, MSG_EOR))                                         \
    CALL("sendto", sendto(s->fd, "text", 4, 0, (void *)&s->far, sizeof s->far))                   \
    CALL("sendto of 15 bytes' address", sendto(s->fd, "text", 4, 0, (void *)&s->far, 15))         \
    CALL("sendmsg", send_message(s, 0))                                                           \
    CALL("sendmsg with an address", send_message(s, 1))                                           \
    CALL("connect", connect_with(s, s->far, sizeof s->far))                                       \
    CALL("connect, 15 bytes", connect_with(s, s->far, 15))                                        \
    CALL("connect, another family", (s->far.family = AF_INET, connect_with(s, s->far, 16)))       \
    CALL("connect, flags 1", (s->far.flags = 1, connect_with(s, s->far, 16)))                     \
    CALL("connect, flags 2", (s->far.flags = 2, connect_with(s, s->far, 16)))                     \
    CALL("connect, flags 255", (s->far.flags = 255, connect_with(s, s->far, 16)))                 \
    CALL("connect, reserved", (s->far.reserved = 1, connect_with(s, s->far, 16)))                 \
    CALL("connect, zero[0]", (s->far.zero[0] = 1, connect_with(s, s->far, 16)))                   \
    CALL("connect to any CID", connect_with(s, address(ANY, s->far.port), 16))                    \
    CALL("connect to any port", connect_with(s, address(cid, ANY), 16))                           \
    CALL("bind", bind_with(s, address(ANY, ANY), 16))                                             \
    CALL("bind, 15 bytes", bind_with(s, address(ANY, ANY), 15))                                   \
    CALL("bind, another family", (s->far.family = AF_INET, bind_with(s, s->far, 16)))             \
    CALL("bind, flags 2", (other = address(ANY, ANY), other.flags = 2, bind_with(s, other, 16)))  \
    CALL("bind, reserved", (other = address(ANY, ANY), other.reserved = 1,                        \
                            bind_with(s, other, 16)))                                             \
    CALL("bind, zero[0]", (other = address(ANY, ANY), other.zero[0] = 1, bind_with(s, other, 16)))\
    CALL("bind to a stranger's CID", bind_with(s, address(4000000000u, ANY), 16))                 \
    CALL("bind to a port that is held", bind_with(s, address(ANY, held), 16))                     \
    CALL("listen", listen(s->fd, 4))                                                              \
    CALL("listen, -1", listen(s->fd, -1))                                                         \
    CALL("accept", accept(s->fd, NULL, NULL))                                                     \
    CALL("accept4, no such flag", accept4(s->fd, NULL, NULL, 1))                                  \
    CALL("shutdown SHUT_RD", shutdown(s->fd, SHUT_RD))                                            \
    CALL("shutdown SHUT_WR", shutdown(s->fd, SHUT_WR))                                            \
    CALL("shutdown SHUT_RDWR", shutdown(s->fd, SHUT_RDWR))                                        \
    CALL("shutdown 3", shutdown(s->fd, 3))                                                        \
    CALL("getsockname", (size = sizeof other, count = getsockname(s->fd, (void *)&other, &size),  \
                         count ? 0 : describe(s, &other, size), count))                           \
    CALL("getpeername", (size = sizeof other, count = getpeername(s->fd, (void *)&other, &size),  \
                         count ? 0 : describe(s, &other, size), count))                           \
    CALL("SO_ERROR", number_of(s, SOL_SOCKET, SO_ERROR))                                          \
    CALL("SO_TYPE", number_of(s, SOL_SOCKET, SO_TYPE))                                            \
    CALL("SO_DOMAIN", number_of(s, SOL_SOCKET, SO_DOMAIN))                                        \
    CALL("SO_PROTOCOL", number_of(s, SOL_SOCKET, SO_PROTOCOL))                                    \
    CALL("SO_ACCEPTCONN", number_of(s, SOL_SOCKET, SO_ACCEPTCONN))                                \
    CALL("connect timeout of 10^6 us", set_timeout(s, 1, 1000000, 16))                            \
    CALL("connect timeout of -1 us", set_timeout(s, 1, -1, 16))                                   \
    CALL("connect timeout of -1 s", set_timeout(s, -1, 0, 16))                                    \
    CALL("connect timeout of 0", set_timeout(s, 0, 0, 16))                                        \
    CALL("connect timeout of 15 bytes", set_timeout(s, 1, 0, 15))                                 \
    CALL("no such option", number_of(s, AF_VSOCK_, 99))                                           \
    CALL("setting no such option", setsockopt(s->fd, AF_VSOCK_, 99, buffer, 8))                   \
    CALL("a buffer size of 4 bytes", setsockopt(s->fd, AF_VSOCK_, 0, buffer, 4))                  \
    CALL("FIONREAD", ask(s, FIONREAD))                                                            \
    CALL("SIOCOUTQ", ask(s, SIOCOUTQ_))                                                           \
    CALL("poll", by_poll(s))                                                                      \
    CALL("epoll", by_epoll(s))

static void probe(int type, const char *kind, enum state state)
{
#define CALL(name, doing)                                                                         \
    {                                                                                             \
        struct scene scene = arrange(type, state), *s = &scene;                                   \
        struct address other;                                                                     \
        socklen_t size;                                                                           \
        long count;                                                                               \
        (void)other, (void)size, (void)count;                                                     \
        *note = 0, broken_pipes = 0, alarms = 0;                                                  \
        alarm(5);                                                                                 \
        errno = 0;                                                                                \
        long result = doing;                                                                      \
        int code = errno;                                                                         \
        alarm(0);                                                                                 \
        printf("%s\t%s\t%s\t", kind, name, STATE_NAMES[state]);                                   \
        if (result < 0)                                                                           \
            printf("%s", strerrorname_np(code));                                                  \
        else if (result > 0 && strncmp(name, "accept", 6) == 0)                                   \
            printf("a descriptor"), close(result);                                                \
        else                                                                                      \
            printf("%ld", result);                                                                \
        printf("%s%s%s\n", note, broken_pipes ? " SIGPIPE" : "", alarms ? " blocks" : "");        \
        clear(s);                                                                                 \
    }
    CALLS(CALL)
}

int main(int count, char **arguments)
{
    static const struct { int type; const char *name; } TYPES[] = {
        {SOCK_STREAM, "stream"}, {SOCK_SEQPACKET, "seqpacket"}, {SOCK_DGRAM, "dgram"},
    };
    struct sigaction on_pipe = {.sa_handler = count_pipe}, on_alarm = {.sa_handler = count_alarm};
    sigaction(SIGPIPE, &on_pipe, NULL);
    sigaction(SIGALRM, &on_alarm, NULL);
    const char *chosen = arguments[1];
    cid = strtoul(arguments[2], NULL, 0);
    silent = count > 3 ? strtoul(arguments[3], NULL, 0) : 0;
    for (unsigned i = 0; i < 3; i++) {
        if (strcmp(chosen, TYPES[i].name))
            continue;
        int holder = make(TYPES[i].type);
        bind_to(holder, ANY);
        held = name_of(holder).port;
        if (silent) {  // no answer is needed from here on
            puts("ready");
            fflush(stdout);
            getchar();
        }
        for (enum state state = NEW; state < STATES; state++) {
            int type = TYPES[i].type;
            if ((state == CONNECTING) != (silent != 0))
                continue;
            if (type == SOCK_DGRAM && !is_for_datagrams(state))
                continue;
            probe(type, TYPES[i].name, state);
        }
    }
    return 0;
}
