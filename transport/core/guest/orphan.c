/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Answers orphans' faults one by one, as they are raised, through the guest's own copy of the userfaultfd.  So no table
 * of addresses is needed, whatever the program has moved or unmapped; the events that such calls wait for are read too.
 *
 * The backend may have read a fault and not answered it: a wake of the whole address space makes the kernel raise it
 * again.
 */
#define _GNU_SOURCE
#include "transport/core/guest/orphan.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "cache/core/abi.h"

#define BATCH 64
/* Above any vm.mmap_min_addr, and up to the end of every process's addresses. */
#define LOWEST_ADDRESS ((uint64_t)1 << 20)
#define END_ADDRESS (((uint64_t)1 << 47) - PAGE_BYTES)

bool orphan_is(int connection_fd)
{
	struct pollfd look = {.fd = connection_fd};

	return poll(&look, 1, 0) == 1 && (look.revents & (POLLHUP | POLLNVAL)) == POLLHUP;
}

static void wake(int uffd, uint64_t start, uint64_t nr_bytes)
{
	struct uffdio_range range = {.start = start, .len = nr_bytes};

	ioctl(uffd, UFFDIO_WAKE, &range);
}

void orphan_wake(int uffd)
{
	wake(uffd, LOWEST_ADDRESS, END_ADDRESS - LOWEST_ADDRESS);
}

static void answer_fault(int uffd, uint64_t flags, uint64_t address)
{
	struct uffdio_range page = {.start = address & ~(uint64_t)(PAGE_BYTES - 1), .len = PAGE_BYTES};
	struct uffdio_writeprotect opened = {.range = page, .mode = 0};
	struct uffdio_poison poison = {.range = page, .mode = 0};
	int done;

	if (flags & UFFD_PAGEFAULT_FLAG_WP)
		done = ioctl(uffd, UFFDIO_WRITEPROTECT, &opened);
	else
		done = ioctl(uffd, UFFDIO_POISON, &poison);
	if (done == 0)
		return;
	/* The marker of a page that was protected and punched is in the way: without it the page is absent. */
	if (!(flags & UFFD_PAGEFAULT_FLAG_WP) && errno == EEXIST)
		ioctl(uffd, UFFDIO_WRITEPROTECT, &opened);
	/* The page is present, unmapped, or changing: the faulting thread retries. */
	wake(uffd, page.start, page.len);
}

int orphan_answer(int uffd)
{
	struct uffd_msg messages[BATCH];
	ssize_t nr_bytes;

	while ((nr_bytes = read(uffd, messages, sizeof(messages))) > 0) {
		for (size_t i = 0; i < (size_t)nr_bytes / sizeof(messages[0]); i++)
			if (messages[i].event == UFFD_EVENT_PAGEFAULT)
				answer_fault(uffd, messages[i].arg.pagefault.flags, messages[i].arg.pagefault.address);
	}
	return nr_bytes < 0 && errno != EAGAIN && errno != EINTR ? -errno : 0;
}

void orphan_report(const char *format, ...)
{
	char line[700] = "cowshed: ";
	size_t length = strlen(line);
	struct iovec piece = {.iov_base = line};
	va_list arguments;
	int nr;

	va_start(arguments, format);
	nr = vsnprintf(line + length, sizeof(line) - length - 1, format, arguments);
	va_end(arguments);
	if (nr < 0)
		return;
	length += (size_t)nr < sizeof(line) - length - 1 ? (size_t)nr : sizeof(line) - length - 2;
	line[length++] = '\n';
	piece.iov_len = length;
	/* RWF_NOWAIT, unless the kernel lacks it for this kind of file; a full pipe loses the line. */
	if (pwritev2(STDERR_FILENO, &piece, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP) {
		ssize_t written = write(STDERR_FILENO, line, length);

		(void)written;
	}
}
