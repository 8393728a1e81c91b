/* A minimal relay without policies, counters, limits or timeouts.
 *
 * `candidates` builds and runs it as a lower bound: the difference to a balancer is the
 * cost of the balancer's own work. Each process has one edge-triggered epoll set and
 * reads 256 KiB at a time. It is not fit for service, because a receiver that does not
 * read blocks all sessions of its process.
 *
 *   bare PROCESSES LISTEN-PORT CONNECT-PORT [LISTEN-PORT CONNECT-PORT ...]
 *
 * All ports are on 127.0.0.1. If the first process ends, the others end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FDS = 65536, EVENTS = 64, BUFFER = 256 * 1024 };

/* By descriptor: the descriptor of the other side, and whether this side sent FIN. */
static int peer[FDS];
static char ended[FDS];
/* By listener: the port to connect to. */
static int forwards_to[FDS];
static char buffer[BUFFER];
static int set;

static struct sockaddr_in local(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void must(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void watch(int fd, unsigned events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    must(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void listen_on(int port, int to) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = local(port);
    must(fd, "socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    must(bind(fd, (struct sockaddr *)&address, sizeof address), "bind");
    must(listen(fd, 4096), "listen");
    forwards_to[fd] = to;
    watch(fd, EPOLLIN);
}

static void accept_all(int listener) {
    int on = 1, client;
    while ((client = accept4(listener, NULL, NULL, 0)) >= 0) {
        struct sockaddr_in address = local(forwards_to[listener]);
        int backend = socket(AF_INET, SOCK_STREAM, 0);
        must(backend, "socket");
        setsockopt(backend, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        must(connect(backend, (struct sockaddr *)&address, sizeof address), "connect");
        peer[client] = backend;
        peer[backend] = client;
        watch(client, EPOLLIN | EPOLLRDHUP | EPOLLET);
        watch(backend, EPOLLIN | EPOLLRDHUP | EPOLLET);
    }
}

static void close_both(int fd) {
    int other = peer[fd];
    ended[fd] = ended[other] = 0;
    peer[fd] = peer[other] = 0;
    close(fd);
    close(other);
}

static void forward(int fd, unsigned events) {
    ssize_t got;
    do {
        got = recv(fd, buffer, BUFFER, MSG_DONTWAIT);
        for (ssize_t sent = 0; sent < got;) {
            ssize_t more = send(peer[fd], buffer + sent, got - sent, MSG_NOSIGNAL);
            if (more < 0) {
                close_both(fd);
                return;
            }
            sent += more;
        }
        /* After a short read the socket is empty, unless FIN has arrived. */
    } while (got == BUFFER || (got > 0 && events & EPOLLRDHUP));
    if (got < 0 && errno != EAGAIN) {
        close_both(fd);
    } else if (got == 0 && !ended[fd]) {
        ended[fd] = 1;
        shutdown(peer[fd], SHUT_WR);
        if (ended[peer[fd]]) close_both(fd);
    }
}

int main(int count, char **arguments) {
    static struct epoll_event events[EVENTS];
    if (count < 2) return 2;
    for (int more = atoi(arguments[1]); more > 1; more--) {
        int child = fork();
        must(child, "fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            break;
        }
    }
    set = epoll_create1(EPOLL_CLOEXEC);
    must(set, "epoll_create1");
    for (int at = 2; at + 1 < count; at += 2) {
        listen_on(atoi(arguments[at]), atoi(arguments[at + 1]));
    }
    for (;;) {
        int ready = epoll_wait(set, events, EVENTS, -1);
        for (int at = 0; at < ready; at++) {
            int fd = events[at].data.fd;
            if (forwards_to[fd]) {
                accept_all(fd);
            } else if (peer[fd]) {
                forward(fd, events[at].events);
            }
        }
    }
}
