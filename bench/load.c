/* A closed-loop HTTP/1.1 client for bench.py that checks every answer: one thread, epoll.
 *
 *   load PORT REQUEST_FILE TEXT_FILE CLIENTS SECONDS MAX_REQUESTS CHUNKS MODE
 *
 * Each of CLIENTS connections sends the file's bytes, reads the answer, and does so again until
 * SECONDS are over or MAX_REQUESTS are sent; answers still on their way then get 20 s more.
 * CHUNKS 0: the answer must be status 200 and hold the whole text. CHUNKS n: it must be an event
 * stream of content deltas seq000000 ... seq(n-1), each once and in order, that ends in [DONE].
 * MODE loop: as above. once: every client sends one request, all at the same time.
 * MODE probe: a new connection and 200 ms of rest for every request.
 * Prints one JSON object; times in microseconds.
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

#define GRACE_US 20000000
#define PROBE_REST_US 200000

enum framing { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, UNTIL_CLOSED, COMPLETE };

struct buffer {
    char *data;
    size_t len, cap;
};

struct client {
    int fd, busy, status, close_after, seen, disorder;
    enum framing framing;
    size_t sent, left, scanned, parsed;
    struct buffer raw, body; /* raw: bytes of the connection not yet read as HTTP */
    uint64_t began, first, rest_until;
};

static int poller, port, chunks_expected, max_requests;
static enum { LOOP, ONCE, PROBE } mode;
static struct buffer request, text;
static uint64_t deadline;
static int sent_requests, ok_requests, bad_requests, reconnects, streaming_now, streaming_peak;
static long chunks_seen;
static uint32_t *latency, *first_token;
static int first_tokens;
static char complaint[400];

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

static void slurp(const char *path, struct buffer *into) {
    char block[65536];
    size_t n;
    FILE *f = fopen(path, "r");
    if (!f) exit(2);
    while ((n = fread(block, 1, sizeof block, f))) append(into, block, n);
    fclose(f);
}

/* ---- what an answer must be ---- */

static int lines_are_events(struct buffer *b) {
    for (char *p = b->data, *end; p < b->data + b->len; p = end + 1) {
        end = strchr(p, '\n');
        if (!end) return 0;
        if (*p != '\n' && *p != '\r' && strncmp(p, "data:", 5) && *p != ':') return 0;
    }
    return 1;
}

static const char *fault_of(struct client *c) {
    if (c->status != 200) return "status is not 200";
    if (!c->body.len) return "empty body";
    if (!chunks_expected)
        return memmem(c->body.data, c->body.len, text.data, text.len) ? NULL : "text is not whole";
    if (c->disorder) return "chunks out of order";
    if (c->seen != chunks_expected) return "chunks missing";
    if (!memmem(c->body.data, c->body.len, "data: [DONE]", 12)) return "no [DONE]";
    return lines_are_events(&c->body) ? NULL : "a line that is no event";
}

static void look_for_chunks(struct client *c) {
    char *p;
    while ((p = memmem(c->body.data + c->scanned, c->body.len - c->scanned, "seq", 3))) {
        size_t at = (size_t)(p - c->body.data);
        if (at + 10 > c->body.len) { /* not all of it is here yet */
            c->scanned = at;
            return;
        }
        if (!c->first) {
            c->first = now_us();
            if (++streaming_now > streaming_peak) streaming_peak = streaming_now;
        }
        c->disorder |= atoi(p + 3) != c->seen++;
        c->scanned = at + 10;
    }
    if (c->body.len > 2 && c->scanned < c->body.len - 2) c->scanned = c->body.len - 2;
}

/* ---- HTTP ---- */

static const char *header(struct client *c, const char *name) {
    char *at = strcasestr(c->raw.data, name);
    return at ? at + strlen(name) : NULL;
}

static void read_head(struct client *c) {
    char *end = strstr(c->raw.data, "\r\n\r\n");
    if (!end) return;
    *end = 0;
    const char *value = header(c, "\r\nconnection: ");
    c->status = c->raw.len > 12 ? atoi(c->raw.data + 9) : 0;
    c->close_after = value && !strncasecmp(value, "close", 5);
    c->parsed = (size_t)(end - c->raw.data) + 4;
    c->framing = UNTIL_CLOSED;
    if ((value = header(c, "\r\ncontent-length:"))) {
        c->left = strtoull(value, NULL, 10);
        c->framing = LENGTH;
    }
    if (header(c, "\r\ntransfer-encoding: chunked")) c->framing = CHUNK_SIZE;
}

static void read_length(struct client *c) {
    size_t n = c->raw.len - c->parsed;
    if (n > c->left) n = c->left;
    append(&c->body, c->raw.data + c->parsed, n);
    c->parsed += n;
    c->left -= n;
    if (!c->left) c->framing = COMPLETE;
}

static void read_chunk_size(struct client *c) {
    char *line = c->raw.data + c->parsed, *end = strstr(line, "\r\n");
    if (!end) return;
    c->left = strtoull(line, NULL, 16);
    if (!c->left) { /* the last chunk: an empty line follows (nobody sends trailers here) */
        if (strncmp(end, "\r\n\r\n", 4)) return;
        end += 2;
        c->framing = COMPLETE;
    } else
        c->framing = CHUNK_DATA;
    c->parsed = (size_t)(end - c->raw.data) + 2;
}

static void read_chunk_data(struct client *c) {
    if (c->raw.len - c->parsed < c->left + 2) return;
    append(&c->body, c->raw.data + c->parsed, c->left);
    c->parsed += c->left + 2;
    c->framing = CHUNK_SIZE;
}

/* Reads on as far as the bytes go. */
static void read_answer(struct client *c) {
    size_t before;
    enum framing was;
    do {
        before = c->parsed;
        was = c->framing;
        switch (c->framing) {
        case HEAD: read_head(c); break;
        case LENGTH: case UNTIL_CLOSED:
            if (c->framing == UNTIL_CLOSED) c->left = SIZE_MAX;
            read_length(c);
            break;
        case CHUNK_SIZE: read_chunk_size(c); break;
        case CHUNK_DATA: read_chunk_data(c); break;
        case COMPLETE: break;
        }
    } while (c->framing != COMPLETE && (c->parsed != before || c->framing != was));
    c->raw.len -= c->parsed;
    memmove(c->raw.data, c->raw.data + c->parsed, c->raw.len + 1);
    c->parsed = 0;
    if (chunks_expected && c->body.len) look_for_chunks(c);
}

/* ---- connections ---- */

static void drop(struct client *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->raw.len = 0;
}

static void dial(struct client *c) {
    int on = 1;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
    connect(c->fd, (void *)&to, sizeof to);
}

static void send_request(struct client *c) {
    size_t before = c->sent;
    while (c->sent < request.len) {
        ssize_t n = send(c->fd, request.data + c->sent, request.len - c->sent, MSG_NOSIGNAL);
        if (n < 0) break;
        c->sent += (size_t)n;
    }
    if (before && c->sent < request.len) return;
    struct epoll_event e = {.events = EPOLLIN | (c->sent < request.len ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

static void ask(struct client *c) {
    c->busy = 1;
    c->framing = HEAD;
    c->sent = c->body.len = c->scanned = 0;
    c->first = 0;
    c->seen = c->disorder = c->status = c->close_after = 0;
    sent_requests++;
    c->began = now_us();
    if (c->fd < 0) dial(c);
    send_request(c);
}

static int may_ask(void) {
    return sent_requests < max_requests && now_us() < deadline && mode != ONCE;
}

static void complain(struct client *c, const char *fault) {
    if (bad_requests++) return;
    snprintf(complaint, sizeof complaint, "%s (status %d, %d chunks, body %.160s)", fault, c->status,
             c->seen, c->body.len ? c->body.data : "none");
    for (char *p = complaint; *p; p++)
        if (*p == '"' || *p == '\\' || *p < ' ') *p = '\'';
}

static void finish(struct client *c, const char *fault) {
    uint64_t now = now_us();
    c->busy = 0;
    chunks_seen += c->seen;
    if (c->first) streaming_now--;
    if (fault) complain(c, fault);
    else {
        latency[ok_requests++] = (uint32_t)(now - c->began);
        if (c->first) first_token[first_tokens++] = (uint32_t)(c->first - c->began);
    }
    if (fault || c->close_after || mode == PROBE) {
        if (mode != PROBE) reconnects++;
        drop(c);
    }
    c->rest_until = mode == PROBE ? now + PROBE_REST_US : fault ? now + 10000 : 0;
    if (!c->rest_until && may_ask()) ask(c);
}

static void hear(struct client *c) {
    static char block[1 << 18];
    ssize_t n = recv(c->fd, block, sizeof block, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        if (!c->busy) drop(c);
        else finish(c, c->framing == UNTIL_CLOSED && n == 0 ? fault_of(c) : "closed before the end");
        return;
    }
    append(&c->raw, block, (size_t)n);
    if (!c->busy) return;
    read_answer(c);
    if (c->framing == COMPLETE) finish(c, fault_of(c));
}

/* Wakes the clients that have rested; returns how many are busy or will be. */
static int wake_rested(struct client *all, int count) {
    int alive = 0;
    uint64_t now = now_us();
    for (int i = 0; i < count; i++) {
        struct client *c = all + i;
        if (!c->busy && c->rest_until && now >= c->rest_until) {
            c->rest_until = 0;
            if (may_ask()) ask(c);
        }
        alive += c->busy || (c->rest_until && may_ask());
    }
    return alive;
}

static void give_up(struct client *all, int count) {
    for (int i = 0; i < count; i++)
        if (all[i].busy) finish(all + i, "not finished in time");
}

/* ---- report ---- */

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, uint32_t *v, int n) {
    if (n) qsort(v, (size_t)n, sizeof *v, ascending);
    printf(",\"%s\":{\"p50\":%u,\"p99\":%u,\"max\":%u}", name, n ? v[n / 2] : 0,
           n ? v[(int)((n - 1) * 0.99)] : 0, n ? v[n - 1] : 0);
}

int main(int argc, char **argv) {
    if (argc != 9) return 2;
    signal(SIGPIPE, SIG_IGN);
    port = atoi(argv[1]);
    slurp(argv[2], &request);
    slurp(argv[3], &text);
    int count = atoi(argv[4]);
    max_requests = atoi(argv[6]);
    chunks_expected = atoi(argv[7]);
    mode = !strcmp(argv[8], "once") ? ONCE : !strcmp(argv[8], "probe") ? PROBE : LOOP;
    latency = calloc((size_t)(max_requests + count), sizeof *latency);
    first_token = calloc((size_t)(max_requests + count), sizeof *first_token);
    struct client *all = calloc((size_t)count, sizeof *all);
    poller = epoll_create1(0);
    uint64_t began = now_us();
    deadline = began + (uint64_t)(atof(argv[5]) * 1e6);
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        ask(all + i);
    }
    struct epoll_event ready[512];
    while (wake_rested(all, count)) {
        if (now_us() > deadline + GRACE_US) {
            give_up(all, count);
            break;
        }
        int n = epoll_wait(poller, ready, 512, 10);
        for (int i = 0; i < n; i++) {
            struct client *c = ready[i].data.ptr;
            if (c->fd >= 0 && c->busy && c->sent < request.len) send_request(c);
            if (c->fd >= 0 && ready[i].events & ~EPOLLOUT) hear(c);
        }
    }
    printf("{\"requests\":%d,\"ok\":%d,\"bad\":%d,\"chunks\":%ld,\"reconnects\":%d,\"peak\":%d,"
           "\"seconds\":%.3f,\"complaint\":\"%s\"",
           sent_requests, ok_requests, bad_requests, chunks_seen, reconnects, streaming_peak,
           (double)(now_us() - began) / 1e6, complaint);
    print_times("latency_us", latency, ok_requests);
    print_times("first_us", first_token, first_tokens);
    printf("}\n");
    return 0;
}
