/* SPDX-License-Identifier: Apache-2.0 */
/* Reports on stderr.  They are made outside the lock too, so bare system calls stand in for cancellation points. */
#define _GNU_SOURCE
#include "transport/preload/report.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* What identifies an open file and does not change by writing.  The birth time, if any, distinguishes files that had
   the same inode one after the other. */
struct identity {
	uint32_t device_major, device_minor, node_major, node_minor, birth_ns;
	uint64_t inode;
	int64_t birth;
	int mode; /* O_ACCMODE of its flags */
};

static struct identity stderr_at_start;
static bool has_stderr;

/* Only the thread that holds the lock stores its reports. */
static __thread bool is_kept __attribute__((tls_model("initial-exec")));
static char kept[400];

static bool identify(int fd, struct identity *identity_out)
{
	int flags = fcntl(fd, F_GETFL);
	struct statx status;

	if (flags < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &status) < 0)
		return false;
	memset(identity_out, 0, sizeof(*identity_out));
	identity_out->device_major = status.stx_dev_major;
	identity_out->device_minor = status.stx_dev_minor;
	identity_out->node_major = status.stx_rdev_major;
	identity_out->node_minor = status.stx_rdev_minor;
	identity_out->inode = status.stx_ino;
	if (status.stx_mask & STATX_BTIME) {
		identity_out->birth = status.stx_btime.tv_sec;
		identity_out->birth_ns = status.stx_btime.tv_nsec;
	}
	identity_out->mode = flags & O_ACCMODE;
	return true;
}

void report_begin(void)
{
	has_stderr = identify(STDERR_FILENO, &stderr_at_start);
}

static bool is_writable(int fd)
{
	struct pollfd ready = {.fd = fd, .events = POLLOUT};
	struct timespec now = {0};

	return syscall(SYS_ppoll, &ready, 1, &now, NULL, 0) == 1 && (ready.revents & POLLOUT);
}

static void write_without_sigpipe(int fd, const char *line, size_t length)
{
	struct timespec now = {0};
	sigset_t sigpipe, before, pending;

	sigemptyset(&sigpipe);
	sigaddset(&sigpipe, SIGPIPE);
	sigpending(&pending);
	pthread_sigmask(SIG_BLOCK, &sigpipe, &before);
	if (syscall(SYS_write, fd, line, length) < 0 && errno == EPIPE && !sigismember(&pending, SIGPIPE))
		syscall(SYS_rt_sigtimedwait, &sigpipe, NULL, &now, (size_t)_NSIG / 8);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void report(const char *format, ...)
{
	char line[1200] = "cowshed: attach: ";
	size_t length = strlen(line);
	struct identity stderr_now;
	int saved = errno, added;
	va_list arguments;

	va_start(arguments, format);
	added = vsnprintf(line + length, sizeof(line) - length - 1, format, arguments);
	va_end(arguments);
	if (is_kept) {
		snprintf(kept, sizeof(kept), "%s", line + length);
		errno = saved;
		return;
	}
	if (added > 0)
		length += (size_t)added;
	if (length > sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (has_stderr && identify(STDERR_FILENO, &stderr_now) &&
	    memcmp(&stderr_now, &stderr_at_start, sizeof(stderr_now)) == 0 && is_writable(STDERR_FILENO))
		write_without_sigpipe(STDERR_FILENO, line, length);
	errno = saved;
}

void report_keep(bool on)
{
	is_kept = on;
	if (on)
		kept[0] = '\0';
}

const char *report_kept(void)
{
	return kept;
}
