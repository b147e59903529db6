/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/leave.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"
#include "transport/preload/wire.h"

#define PAUSE_NS 50000000
#define MAX_SENT_ON 8
#define WAIT_SECONDS 60 /* for the end of a drain; as REPLY_SECONDS of wire.c */

char leave_digest[136];
atomic_bool leave_is_nowhere;

void leave_close(struct leave *leave)
{
	const int fds[3] = {leave->connection_fd, leave->memfd, leave->uffd};

	for (unsigned i = 0; i < 3; i++)
		if (fds[i] >= 0)
			real_close(fds[i]);
}

/* Checks the image, opens a userfaultfd, and takes over the frames; the rest of image stays the caller's. */
static int leave_take(struct leave *leave, struct guest_image *image)
{
	struct stat status;
	int err;

	if (image->digest[0] && leave_digest[0] && strcmp(image->digest, leave_digest) != 0) {
		report("no mapping of the image: the backend at %s serves another image under that name",
		       config.socket_path);
		return -EACCES;
	}
	if (image->map_bytes != config.map_bytes || fstat(image->memfd, &status) < 0) {
		report("no mapping of the image: the backend's reply is malformed; is it another version?");
		return -EPROTO;
	}
	leave->uffd = guard_open(image->uffd_device);
	if (leave->uffd < 0) {
		report("no mapping of the image: cannot get a userfaultfd that handles faults in system calls (%s); "
		       "run the backend as root so that it can lend /dev/userfaultfd, or give this user access "
		       "to that device, or set sysctl vm.unprivileged_userfaultfd=1",
		       strerrordesc_np(-leave->uffd));
		return leave->uffd;
	}
	err = guard_agree(leave->uffd, image->uffd_features);
	if (err < 0) {
		report("no mapping of the image: the kernel's userfaultfd lacks features; use Linux 6.7 or newer");
		return err;
	}
	leave->features = image->uffd_features;
	leave->frames = (struct frames){status.st_dev, status.st_ino};
	leave->memfd = image->memfd;
	image->memfd = -1;
	return 0;
}

int leave_ask(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool read_only, const char *more)
{
	static char request[sizeof(config.open_request) + 150]; /* threads may have small stacks */
	struct leave leave = {.connection_fd = -1, .memfd = -1, .uffd = -1};
	struct guest_image image;
	int err = wire_connect();

	if (err < 0)
		return err;
	leave.connection_fd = err;
	/* "carries": in a move this library brings the private pages along (moves.c). */
	snprintf(request, sizeof(request),
	         "%s,\"offset_bytes\":%" PRIu64 ",\"length_bytes\":%" PRIu64 ",\"carries\":true%s%s}",
	         config.open_request, offset_bytes, length_bytes, read_only ? ",\"read_only\":true" : "", more);
	err = wire_open(leave.connection_fd, request, &image);
	if (err == 0) {
		err = leave_take(&leave, &image);
		handshake_close_image(&image);
	}
	if (err < 0) {
		leave_close(&leave);
		return err;
	}
	*leave_out = leave;
	return 0;
}

/* Asks the backend at wire_moved_to, which accepts a guest that moved there, but no new one.  On success this program
   asks there from then on. */
static int ask_there(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool read_only)
{
	char before[sizeof(config.socket_path)];
	int err = -EREMCHG;

	_Static_assert(sizeof(config.socket_path) == sizeof(wire_moved_to), "one is copied to the other");
	memcpy(before, config.socket_path, sizeof(before));
	report_keep(true);
	for (int i = 0; i < MAX_SENT_ON && err == -EREMCHG; i++) {
		memcpy(config.socket_path, wire_moved_to, sizeof(wire_moved_to));
		err = leave_ask(leave_out, offset_bytes, length_bytes, read_only, ",\"moved\":true");
	}
	report_keep(false);
	if (err < 0)
		memcpy(config.socket_path, before, sizeof(before));
	return err;
}

int leave_find(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool read_only, bool waits)
{
	int err, waited;

	for (;;) {
		err = leave_ask(leave_out, offset_bytes, length_bytes, read_only, "");
		if (err != -EREMCHG)
			return err;
		err = ask_there(leave_out, offset_bytes, length_bytes, read_only);
		if (err == 0 || err == -EINTR)
			return err;
		waited = !waits || atomic_load(&leave_is_nowhere) || err == -EMFILE ? -ETIMEDOUT
		                                                                    : lock_wait(WAIT_SECONDS);
		if (waited == -ETIMEDOUT)
			report("no mapping of the image: this program's guest moved to %s, which refuses it: %s",
			       wire_moved_to, report_kept());
		if (waited < 0)
			return waited == -ETIMEDOUT ? -EACCES : waited;
		nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
	}
}

int leave_use(const struct leave *leave, uintptr_t address, uint64_t nr_bytes, bool inherited)
{
	int fds[3] = {leave->uffd, -1, -1};
	int err = 0;

	fds[1] = real_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
	fds[2] = real_openat(AT_FDCWD, "/proc/self/mem", O_RDONLY | O_CLOEXEC, 0);
	if (fds[1] < 0 || fds[2] < 0) {
		err = -errno;
		report("no mapping of the image: cannot open /proc/self/pagemap and /proc/self/mem (%s); mount "
		       "/proc, and exec after changing user ids",
		       strerrordesc_np(-err));
	} else {
		err = wire_region(leave->connection_fd, address, nr_bytes, fds, inherited);
	}
	for (unsigned i = 1; i < 3; i++)
		if (fds[i] >= 0)
			real_close(fds[i]);
	return err;
}
