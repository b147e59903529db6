/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Puts one mapping in the place of another, at the same address; a guarded mapping is there at every instant.
 *
 * - The new mapping is made elsewhere, guarded, and then moved: mremap onto an address unmaps the old one and moves
 *   under one lock, and takes the guard and MADV_DONTFORK along.
 * - The unmap is an event of the old userfaultfd, the move one of the new, and mremap returns once both are read.
 *   Nobody else reads them, so a helper thread does during the call.  The wake at the end makes the kernel raise
 *   the faults again that it has read.
 * - Threads that wait for a fault of the old mapping are woken after that, and fault anew in the new one.
 * - The old backend must have released the mapping before: UFFDIO_CONTINUE by its userfaultfd would map the new frames,
 *   since the kernel checks only that a userfaultfd guards the address, not which one.
 */
#define _GNU_SOURCE
#include "transport/core/guest/region.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define STACK_BYTES (64u << 10)

struct reading {
	int old_uffd, new_uffd; /* new_uffd may be -1 */
	int done_fd;
};

static int map_nothing(const struct region *r)
{
	/* An empty file: touching a mapping of it is SIGBUS. */
	int file = memfd_create("cowshed-moved", MFD_CLOEXEC);
	void *mapped;
	int err = 0;

	if (file < 0)
		return -errno;
	mapped = mmap(r->address, r->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, file,
	              0);
	if (mapped == MAP_FAILED)
		err = -errno;
	close(file);
	return err;
}

static int move_onto(const struct region *r, const struct region *with)
{
	void *moved =
		mremap(with->address, with->map_bytes, with->map_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, r->address);

	if (moved != MAP_FAILED)
		return 0;
	int err = -errno;
	/* It may have failed half-way: reserve the addresses, which the program still uses. */
	mmap(r->address, r->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
	     0);
	return err;
}

static void *read_events(void *argument)
{
	const struct reading *reading = argument;
	struct pollfd fds[3] = {
		{.fd = reading->done_fd, .events = POLLIN},
		{.fd = reading->old_uffd, .events = POLLIN},
		{.fd = reading->new_uffd, .events = POLLIN},
	};
	struct uffd_msg messages[8];

	do {
		poll(fds, 3, -1);
		for (int i = 1; i < 3; i++)
			if (fds[i].revents && read(fds[i].fd, messages, sizeof(messages)) < 0 && errno != EAGAIN)
				fds[i].fd = -1;
	} while (!fds[0].revents);
	return NULL;
}

static int swap_heard(const struct region *r, const struct region *with, struct reading *reading)
{
	pthread_attr_t attributes;
	pthread_t thread;
	int err;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	err = pthread_create(&thread, &attributes, read_events, reading);
	pthread_attr_destroy(&attributes);
	if (err)
		return -err;
	err = with ? move_onto(r, with) : map_nothing(r);
	eventfd_write(reading->done_fd, 1);
	pthread_join(thread, NULL);
	return err;
}

static void wake(int uffd, const struct region *r)
{
	struct uffdio_range range = {.start = (uintptr_t)r->address, .len = r->map_bytes};

	if (uffd >= 0)
		ioctl(uffd, UFFDIO_WAKE, &range);
}

int region_swap(const struct region *r, const struct region *with)
{
	struct reading reading = {r->uffd, with ? with->uffd : -1, eventfd(0, EFD_CLOEXEC)};
	int err;

	if (reading.done_fd < 0)
		return -errno;
	err = swap_heard(r, with, &reading);
	close(reading.done_fd);
	if (with)
		wake(with->uffd, r);
	wake(r->uffd, r);
	return err;
}

int region_replace(struct region *r, struct region *with)
{
	int err = r->map_bytes == with->map_bytes ? region_swap(r, with) : -EINVAL;

	if (err < 0)
		return err;
	close(r->uffd);
	close(r->pagemap_fd);
	close(r->mem_fd);
	r->uffd = with->uffd;
	r->pagemap_fd = with->pagemap_fd;
	r->mem_fd = with->mem_fd;
	*with = (struct region){.uffd = -1, .pagemap_fd = -1, .mem_fd = -1};
	return 0;
}

int region_revoke(struct region *r)
{
	int err = region_swap(r, NULL);

	if (err < 0)
		return err;
	close(r->uffd);
	r->uffd = -1;
	return 0;
}
