/* A switch between network namespaces in user space: every port has a rate in both directions, and a delay lies between them.
 *
 *     relay PORTS BITS_PER_SECOND MICROSECONDS PREFIX
 *
 * Namespaces PREFIX0, PREFIX1, … get an interface link0 with the address 10.99.0.1, 10.99.0.2, …, which exist inside them alone.
 * It prints "up" and forwards packets until it is ended. A rate of 0 is none. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define PORTS 32
#define MTU 16000
#define SECOND 1000000000ull

typedef struct Packet {
    struct Packet *next;
    uint64_t due;
    int length;
    unsigned char data[];
} Packet;

static struct {
    int file;
    uint64_t sent, received; /* when the port has sent, and received, all packets so far */
    Packet *first, *last;    /* on their way to this port */
} ports[PORTS];

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static int open_port(int i, const char *prefix, int home) {
    char command[300];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI, .ifr_name = "link0"};
    snprintf(command, sizeof command, "/run/netns/%s%d", prefix, i);
    int namespace = open(command, O_RDONLY);
    if (namespace < 0 || setns(namespace, CLONE_NEWNET)) return -1;
    int file = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (file < 0 || ioctl(file, TUNSETIFF, &request)) return -1;
    snprintf(command, sizeof command,
             "ip addr add 10.99.0.%d/24 dev link0 && ip link set link0 mtu %d txqueuelen 2000 up && ip link set lo up", i + 1,
             MTU);
    if (system(command)) return -1;
    close(namespace);
    return setns(home, CLONE_NEWNET) ? -1 : file;
}

int main(int count, char **arguments) {
    if (count != 5) return 2;
    int n = atoi(arguments[1]), home = open("/proc/self/ns/net", O_RDONLY);
    double rate = atof(arguments[2]);
    uint64_t delay = (uint64_t)(atof(arguments[3]) * 1000);
    struct pollfd polled[PORTS];
    unsigned char packet[MTU + 100];
    if (n < 1 || n > PORTS) return 2;
    for (int i = 0; i < n; i++) {
        if ((ports[i].file = open_port(i, arguments[4], home)) < 0) return perror("relay"), 1;
        polled[i] = (struct pollfd){.fd = ports[i].file, .events = POLLIN};
    }
    puts("up");
    fflush(stdout);
    for (;;) {
        uint64_t time = now(), next = time + SECOND / 10;
        for (int i = 0; i < n; i++) {
            Packet *p;
            while ((p = ports[i].first) && p->due <= time) {
                if (write(ports[i].file, p->data, p->length) < 0 && errno == EAGAIN) break;
                ports[i].first = p->next;
                free(p);
            }
            if (p && p->due < next) next = p->due;
        }
        time = now();
        struct timespec pause = {0, next > time ? (long)(next - time) : 0};
        ppoll(polled, n, &pause, NULL);
        for (int i = 0; i < n; i++) {
            for (int k = 0; polled[i].revents & POLLIN && k < 64; k++) {
                int length = read(ports[i].file, packet, sizeof packet);
                if (length <= 0) break;
                int to = packet[19] - 1; /* the last byte of the destination's IPv4 address */
                if (packet[0] >> 4 != 4 || packet[16] != 10 || to < 0 || to >= n) continue;
                uint64_t taken = rate > 0 ? (uint64_t)(length * 8 / rate * SECOND) : 0;
                time = now();
                ports[i].sent = (ports[i].sent > time ? ports[i].sent : time) + taken;
                uint64_t arrival = ports[i].sent + delay, queued = ports[to].received + taken;
                ports[to].received = arrival > queued ? arrival : queued;
                Packet *p = malloc(sizeof *p + length);
                if (!p) return 1;
                *p = (Packet){.due = ports[to].received, .length = length};
                memcpy(p->data, packet, length);
                if (ports[to].first) ports[to].last->next = p;
                else ports[to].first = p;
                ports[to].last = p;
            }
        }
    }
}
