/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One mapping in the place of another, at the same address, without an instant at which there is none, or one that
 * nobody guards.
 *
 * - The new one is made elsewhere, guarded, and then moved: mremap onto an address unmaps what is there and moves
 *   under one lock, and takes the guard and MADV_DONTFORK along.
 * - Both halves are events, of the old userfaultfd and of the new one, and mremap returns once somebody has read them.
 *   Nobody else reads either: so a thread of its own does, while the call is made here.  Faults that are read on the
 * way are asked again by the wake at the end.
 * - Who waits for a fault of the old mapping is woken after that, and faults anew, in the new one.
 * - The old backend must have let go before: UFFDIO_CONTINUE by its userfaultfd would map whatever the new frames have
 *   there, since the kernel looks for a guard at that address, and not whose.
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
	/* A file without a byte: whoever touches a mapping of it gets SIGBUS. */
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
	/* It may have failed half-way: nobody else shall get these addresses, which programs hold. */
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
