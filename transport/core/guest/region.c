/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guarded mapping of an image.  Reading a hole of the shared memfd through an unguarded mapping gives
 * zeros, silently.  So this file never lets such a mapping exist:
 *
 * - init publishes the address only after UFFDIO_REGISTER; nothing touches the range before.
 * - Until then it is PROT_NONE: in a process that did mlockall(MCL_FUTURE), mmap itself would touch every
 *   page of it.
 * - The guest keeps its own copy of the userfaultfd for as long as the mapping lives: with the
 *   backend dead, a fault then waits for the backend's successor instead of finding no handler.
 * - MADV_DONTFORK: a forked child would inherit the mapping without the guard.
 * - deinit makes the range PROT_NONE before it takes the guard off.  It unregisters before munmap
 *   because munmap of a range with UFFD_FEATURE_EVENT_UNMAP waits until somebody reads the event, for
 *   ever if the backend is dead (our own copy of the userfaultfd keeps it from being released).
 *
 * Reading and writing go through process_vm_readv/writev on ourselves, not memcpy: a poisoned page is
 * then EFAULT at a known place and not SIGBUS.  It costs one copy, as memcpy would.  The kernel waits
 * for such faults killably, not interruptibly, so a waiting call ends by an answer or by SIGKILL.  It
 * raises them in kernel mode, hence the demand for a userfaultfd that is not UFFD_USER_MODE_ONLY.
 *
 * The kernel pins all pages of a write before it copies.  A page that is protected meanwhile, for dirty tracking or a
 * freeze (accounting/core/track.h), is written without a fault.  So each chunk is touched for writing afterwards: that
 * changes nothing, and faults on such pages, which thus count as written once their bytes are there.
 */
#define _GNU_SOURCE
#include "transport/core/guest/region.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"

#define HUGE_BYTES ((uint64_t)2 << 20)
/* Copied by one system call: bounds how long the kernel does not look at a fatal signal. */
#define CHUNK_BYTES ((uint64_t)8 << 20)

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Seccomp filters of some containers forbid process_vm_readv: fail at attach, not at the first read. */
static int probe_copy(void)
{
	char from = 1, to = 0;
	struct iovec remote = {&from, 1}, local = {&to, 1};

	if (process_vm_readv(getpid(), &local, 1, &remote, 1, 0) != 1)
		return -errno;
	return 0;
}

/*
 * Maps at an address congruent to the image's offset 0 modulo 2 MiB, where the kernel can map an open region with one
 * page-table entry. NORESERVE: only what the guest writes costs it memory, and the quota bounds that.
 */
static void *map_aligned(int memfd, uint64_t map_bytes)
{
	const uint64_t reserved_bytes = map_bytes + HUGE_BYTES;
	char *reserved = mmap(NULL, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (reserved == MAP_FAILED)
		return MAP_FAILED;
	uint64_t before = -(uintptr_t)reserved % HUGE_BYTES;
	char *at = mmap(reserved + before, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, memfd, 0);
	int err = errno;

	if (at == MAP_FAILED) {
		munmap(reserved, reserved_bytes);
		errno = err;
		return MAP_FAILED;
	}
	if (before)
		munmap(reserved, before);
	munmap(at + map_bytes, reserved_bytes - before - map_bytes);
	return at;
}

static int open_proc(const char *path, int *fd_out)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	*fd_out = fd;
	return 0;
}

int region_init(struct region *r, int memfd, uint64_t map_bytes, int uffd_device, uint64_t features, int *stage_out)
{
	struct region new = {
		.map_bytes = map_bytes,
		.uffd = -1,
		.pagemap_fd = -1,
		.mem_fd = -1,
		.read_only = r->read_only,
	};
	const int prot = r->read_only ? PROT_READ : PROT_READ | PROT_WRITE;
	int stage, err;

	stage = REGION_STAGE_COPY;
	err = probe_copy();
	if (err < 0)
		goto fail;

	stage = REGION_STAGE_MAP;
	if (map_bytes == 0 || map_bytes % PAGE_BYTES != 0) {
		err = -EINVAL;
		goto fail;
	}
	new.address = map_aligned(memfd, map_bytes);
	if (new.address == MAP_FAILED) {
		err = -errno;
		new.address = NULL;
		goto fail;
	}
	if (madvise(new.address, map_bytes, MADV_DONTFORK) < 0) {
		err = -errno;
		goto fail;
	}

	stage = REGION_STAGE_UFFD;
	err = guard_open(uffd_device);
	if (err < 0)
		goto fail;
	new.uffd = err;

	stage = REGION_STAGE_API;
	err = guard_agree(new.uffd, features);
	if (err < 0)
		goto fail;

	stage = REGION_STAGE_REGISTER;
	err = guard_range(new.uffd, new.address, map_bytes);
	if (err == 0 && mprotect(new.address, map_bytes, prot) < 0)
		err = -errno;
	if (err < 0)
		goto fail;

	stage = REGION_STAGE_PROC;
	err = open_proc("/proc/self/pagemap", &new.pagemap_fd);
	if (err == 0)
		err = open_proc("/proc/self/mem", &new.mem_fd);
	if (err < 0)
		goto fail;

	*r = new;
	*stage_out = REGION_STAGE_NONE;
	return 0;
fail:
	region_deinit(&new);
	*stage_out = stage;
	return err;
}

int region_deinit(struct region *r)
{
	int err = 0;

	if (r->address) {
		/* A thread that still reads dies of SIGSEGV, instead of reading zeros. */
		mprotect(r->address, r->map_bytes, PROT_NONE);
		if (r->uffd >= 0)
			guard_lift(r->uffd, r->address, r->map_bytes);
		if (munmap(r->address, r->map_bytes) < 0)
			err = -errno;
		r->address = NULL;
	}
	close_fd(&r->uffd);
	close_fd(&r->pagemap_fd);
	close_fd(&r->mem_fd);
	return err;
}

void region_forget(struct region *r)
{
	r->address = NULL;
	close_fd(&r->uffd);
	close_fd(&r->pagemap_fd);
	close_fd(&r->mem_fd);
}

static bool is_inside(const struct region *r, uint64_t offset, uint64_t length)
{
	return r->address && offset <= r->map_bytes && length <= r->map_bytes - offset;
}

/* Faults on protected pages, and returns once they may be written. An error means that a page is gone again. */
static void touch_written(const struct region *r, uint64_t offset, uint64_t length)
{
	uint64_t first = offset / PAGE_BYTES * PAGE_BYTES;
	uint64_t end = (offset + length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;

	while (madvise((char *)r->address + first, end - first, MADV_POPULATE_WRITE) < 0)
		if (errno != EINTR && errno != EAGAIN)
			return;
}

/* Waits until no other mapping is taking this one's place. */
static uint32_t stable_epoch(const struct region *r)
{
	uint32_t epoch;

	while ((epoch = __atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE)) & 1)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return epoch;
}

/* process_vm_writev that loses nothing: dirty tracking sees every page, and if another mapping takes this one's place
 * during the copy, the copy is repeated there. */
static ssize_t write_heard(const struct region *r, uint64_t offset, const struct iovec *local,
                           const struct iovec *remote)
{
	ssize_t copied;
	uint32_t epoch;

	do {
		epoch = stable_epoch(r);
		copied = process_vm_writev(getpid(), local, 1, remote, 1, 0);
		if (copied > 0)
			touch_written(r, offset, (uint64_t)copied);
	} while (copied > 0 && __atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE) != epoch);
	return copied;
}

static int64_t copy_range(bool write, const struct region *r, uint64_t offset, char *ours, uint64_t length)
{
	pid_t self = getpid();
	uint64_t done = 0;

	if (!is_inside(r, offset, length))
		return -EINVAL;
	while (done < length) {
		uint64_t left = length - done;
		uint64_t chunk_bytes = left < CHUNK_BYTES ? left : CHUNK_BYTES;
		struct iovec local = {ours + done, chunk_bytes};
		struct iovec remote = {(char *)r->address + offset + done, chunk_bytes};
		ssize_t copied = write ? write_heard(r, offset + done, &local, &remote)
		                       : process_vm_readv(self, &local, 1, &remote, 1, 0);

		if (copied > 0) {
			done += (uint64_t)copied;
			continue;
		}
		if (copied < 0 && errno == EINTR)
			continue;
		/* A short copy before, and now nothing: the page at done cannot be loaded. */
		if (done > 0)
			break;
		return copied == 0 || errno == EFAULT ? -EIO : -errno;
	}
	return (int64_t)done;
}

int64_t region_read(const struct region *r, uint64_t offset, void *to, uint64_t length)
{
	return copy_range(false, r, offset, to, length);
}

int64_t region_write(struct region *r, uint64_t offset, const void *from, uint64_t length)
{
	/* An iovec has no const; writev only reads it. */
	return copy_range(true, r, offset, (char *)(uintptr_t)from, length);
}

/*
 * A discard waits until its event is read, and drops the pages after that.  If another mapping took this one's place
 * meanwhile, the discard may have hit neither, or both, or raised no event for the new backend: so it is repeated.
 */
int region_discard(struct region *r, uint64_t offset, uint64_t length)
{
	uint32_t epoch;

	if (!is_inside(r, offset, length) || (offset | length) % PAGE_BYTES != 0)
		return -EINVAL;
	if (length == 0)
		return 0;
	do {
		epoch = stable_epoch(r);
		if (madvise((char *)r->address + offset, length, MADV_DONTNEED) < 0)
			return -errno;
	} while (__atomic_load_n(&r->epoch, __ATOMIC_ACQUIRE) != epoch);
	return 0;
}
