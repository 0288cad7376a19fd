/* A mock OpenAI-compatible provider for bench.py: one thread, epoll, no dependencies.
 *
 *   mock TEXT_FILE      binds a free port of 127.0.0.1 and prints it; ends when stdin closes
 *
 * Every POST is a chat completion. Without "stream": true the answer is one JSON object whose
 * content is the file's text. With it the answer is a stream whose shape the model's name says:
 * "mock-c200-g5" is 200 chunks, 5 ms apart (g0: as fast as the socket takes them). Chunk number
 * 17 carries the content "seq000017 ", so the client can see loss, repetition and order.
 * Every chunk is a send() of its own, as a provider's would be.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 16384
#define MAX_BODY (64u << 20)
#define STEPS_PER_TURN 16 /* chunks of one gapless stream before the others get their turn */

struct buffer {
    char *data;
    size_t len, cap;
};

struct conn {
    int fd, waits_for_room;
    struct buffer in, out;
    size_t sent;
    int streaming, next, chunks;
    uint64_t gap_us, due;
};

static int poller;
static struct conn *conns[MAX_FD];
static int streams[MAX_FD], stream_count; /* fds of the conns that are streaming */
static struct buffer whole;               /* the ready-made whole answer */

#define EVENT_HEAD \
    "data: {\"id\":\"chatcmpl-bench00000000000000000000\",\"object\":\"chat.completion.chunk\"," \
    "\"created\":1750000000,\"model\":\"mock\",\"system_fingerprint\":\"fp_bench\","

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void append(struct buffer *b, const char *data, size_t len) {
    if (b->len + len + 1 > b->cap) {
        b->cap = (b->len + len + 1) * 2;
        b->data = realloc(b->data, b->cap);
        if (!b->data) abort();
    }
    memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = 0;
}

static void forget_stream(struct conn *c) {
    if (!c->streaming) return;
    c->streaming = 0;
    for (int i = 0; i < stream_count; i++)
        if (streams[i] == c->fd) {
            streams[i] = streams[--stream_count];
            return;
        }
}

static void hang_up(struct conn *c) {
    forget_stream(c);
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

/* Sends what is queued; returns -1 when the connection is gone (and freed). */
static int flush_out(struct conn *c) {
    while (c->sent < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->sent, c->out.len - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            hang_up(c);
            return -1;
        }
        c->sent += (size_t)n;
    }
    int waits = c->sent < c->out.len;
    if (waits != c->waits_for_room) {
        struct epoll_event e = {.events = EPOLLIN | (waits ? EPOLLOUT : 0), .data.fd = c->fd};
        epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
        c->waits_for_room = waits;
    }
    if (!waits) c->sent = c->out.len = 0;
    return 0;
}

static void queue_event(struct conn *c, const char *event) {
    char size[24];
    size_t len = strlen(event);
    append(&c->out, size, (size_t)sprintf(size, "%zx\r\n", len));
    append(&c->out, event, len);
    append(&c->out, "\r\n", 2);
}

static void queue_stream_head(struct conn *c) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
        "Transfer-Encoding: chunked\r\n\r\n";
    append(&c->out, head, sizeof head - 1);
    queue_event(c, EVENT_HEAD "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\","
                              "\"content\":\"\"},\"finish_reason\":null}]}\n\n");
}

static void queue_stream_tail(struct conn *c) {
    queue_event(c, EVENT_HEAD
                "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n");
    queue_event(c, EVENT_HEAD "\"choices\":[],\"usage\":{\"prompt_tokens\":50,"
                              "\"completion_tokens\":200,\"total_tokens\":250}}\n\n");
    queue_event(c, "data: [DONE]\n\n");
    append(&c->out, "0\r\n\r\n", 5);
}

/* Sends the chunks that are due; returns -1 when the connection is gone. */
static int step_stream(struct conn *c, uint64_t now) {
    char event[512];
    for (int i = 0; i < STEPS_PER_TURN && c->streaming && !c->waits_for_room; i++) {
        if (now < c->due) return 0;
        if (c->next == c->chunks) {
            queue_stream_tail(c);
            forget_stream(c);
            return flush_out(c);
        }
        snprintf(event, sizeof event,
                 EVENT_HEAD "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"seq%06d \"},"
                            "\"logprobs\":null,\"finish_reason\":null}]}\n\n",
                 c->next++);
        queue_event(c, event);
        c->due += c->gap_us;
        if (flush_out(c)) return -1;
    }
    return 0;
}

static void begin_answer(struct conn *c, char *body, size_t len) {
    int streamed = memmem(body, len, "\"stream\":true", 13) || memmem(body, len, "\"stream\": true", 14);
    if (!streamed) {
        append(&c->out, whole.data, whole.len);
        return;
    }
    int gap_ms = 0;
    char *shape = memmem(body, len, "mock-c", 6);
    c->chunks = 20;
    if (shape) sscanf(shape, "mock-c%d-g%d", &c->chunks, &gap_ms);
    c->gap_us = (uint64_t)gap_ms * 1000;
    c->next = 0;
    c->due = now_us();
    c->streaming = 1;
    streams[stream_count++] = c->fd;
    queue_stream_head(c);
}

static size_t content_length(char *head) {
    char *line = strcasestr(head, "\r\ncontent-length:");
    return line ? strtoull(line + 17, NULL, 10) : 0;
}

/* Answers the requests that have arrived whole; returns -1 when the connection is gone. */
static int serve(struct conn *c) {
    while (!c->streaming && c->in.len) {
        char *end = memmem(c->in.data, c->in.len, "\r\n\r\n", 4);
        if (!end) return 0;
        *end = 0;
        size_t head = (size_t)(end - c->in.data) + 4, body = content_length(c->in.data);
        int chunked = strcasestr(c->in.data, "\r\ntransfer-encoding:") != NULL;
        *end = '\r';
        if (chunked || body > MAX_BODY) { /* no gateway needs these here: say so, loudly */
            static const char no[] = "HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\n\r\n";
            append(&c->out, no, sizeof no - 1);
            flush_out(c);
            return -1;
        }
        if (c->in.len < head + body) return 0;
        begin_answer(c, c->in.data + head, body);
        c->in.len -= head + body;
        memmove(c->in.data, c->in.data + head + body, c->in.len);
        c->in.data[c->in.len] = 0;
        if (flush_out(c)) return -1;
    }
    return 0;
}

static void read_some(struct conn *c) {
    static char block[1 << 18];
    for (;;) {
        ssize_t n = recv(c->fd, block, sizeof block, 0);
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0) {
            hang_up(c);
            return;
        }
        append(&c->in, block, (size_t)n);
        if ((size_t)n < sizeof block) break;
    }
    serve(c);
}

static void welcome(int listener) {
    int on = 1, fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FD) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        conns[fd] = calloc(1, sizeof **conns);
        conns[fd]->fd = fd;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

/* Milliseconds until the next chunk is due, -1 for never. */
static int patience(void) {
    uint64_t now = now_us(), soonest = UINT64_MAX;
    for (int i = 0; i < stream_count; i++) {
        struct conn *c = conns[streams[i]];
        if (!c->waits_for_room && c->due < soonest) soonest = c->due;
    }
    if (soonest == UINT64_MAX) return -1;
    return soonest <= now ? 0 : (int)((soonest - now + 999) / 1000);
}

static void step_streams(void) {
    uint64_t now = now_us();
    for (int i = stream_count - 1; i >= 0; i--) { /* a stream that ends is replaced by the last */
        if (i >= stream_count) continue;
        struct conn *c = conns[streams[i]];
        if (step_stream(c, now) == 0 && !c->streaming) serve(c);
    }
}

static void prepare_whole(const char *path) {
    static char text[8192], body[10000], head[200];
    FILE *f = fopen(path, "r");
    if (!f) exit(2);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    int len = snprintf(body, sizeof body,
                       "{\"id\":\"chatcmpl-bench00000000000000000000\",\"object\":\"chat.completion\","
                       "\"created\":1750000000,\"model\":\"mock\",\"choices\":[{\"index\":0,"
                       "\"message\":{\"role\":\"assistant\",\"content\":\"%s\",\"refusal\":null},"
                       "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{"
                       "\"prompt_tokens\":50,\"completion_tokens\":150,\"total_tokens\":200},"
                       "\"system_fingerprint\":\"fp_bench\"}",
                       text);
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n",
                     len);
    append(&whole, head, (size_t)n);
    append(&whole, body, (size_t)len);
}

static int listen_anywhere(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(fd, (void *)&at, size) || listen(fd, 4096) || getsockname(fd, (void *)&at, &size)) exit(2);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    signal(SIGPIPE, SIG_IGN);
    prepare_whole(argv[1]);
    poller = epoll_create1(0);
    int listener = listen_anywhere();
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[512];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    e.data.fd = STDIN_FILENO;
    epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &e);
    for (;;) {
        int n = epoll_wait(poller, ready, 512, patience());
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == STDIN_FILENO) return 0; /* bench.py has gone: so do we */
            if (fd == listener) welcome(listener);
            else if (conns[fd] && ready[i].events & EPOLLOUT && flush_out(conns[fd])) continue;
            else if (conns[fd] && ready[i].events & ~EPOLLOUT) read_some(conns[fd]);
        }
        step_streams();
    }
}
