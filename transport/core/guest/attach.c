/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/guest/attach.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>

#define ROOM_BYTES (64u << 10)

struct polled {
	struct handshake handshake;
	int limit_ms;
	char room[ROOM_BYTES];
};

static int wait_by_poll(struct handshake *handshake, short events)
{
	const struct polled *polled = (const struct polled *)handshake;
	struct pollfd fd = {.fd = handshake->fd, .events = events};
	int nr = poll(&fd, 1, polled->limit_ms);

	return nr < 0 ? -errno : nr;
}

struct handshake *handshake_new(int fd, int limit_ms)
{
	struct polled *polled = malloc(sizeof(*polled));

	if (!polled)
		return NULL;
	polled->handshake = (struct handshake){
		.fd = fd, .room = polled->room, .room_bytes = sizeof(polled->room), .wait = wait_by_poll};
	polled->limit_ms = limit_ms;
	return &polled->handshake;
}

void handshake_free(struct handshake *handshake)
{
	free(handshake);
}

const char *handshake_reply(const struct handshake *handshake, uint64_t *nr_bytes_out)
{
	*nr_bytes_out = handshake->reply.length;
	return handshake->reply.text;
}

int guest_attach(struct handshake *handshake, const char *request, const char *more, struct region *region,
                 struct guest_image *image_out, int *stage_out)
{
	int err;

	*stage_out = REGION_STAGE_NONE;
	if (!region->address) {
		err = handshake_open(handshake, request, image_out);
		if (err < 0)
			return err;
		err = region_init(region, image_out->memfd, image_out->map_bytes, image_out->uffd_device,
		                  image_out->uffd_features, stage_out);
		handshake_close_image(image_out);
		if (err < 0)
			return err;
	}
	const int fds[3] = {region->uffd, region->pagemap_fd, region->mem_fd};
	err = handshake_region(handshake, region->address, region->map_bytes, fds, more);
	if (err < 0 && err != -EINTR)
		region_deinit(region);
	return err;
}

/* By enum region_stage. */
static const struct {
	const char *failure, *cure;
} STAGES[] = {
	[REGION_STAGE_NONE] = {"", ""},
	[REGION_STAGE_COPY] = {"cannot copy its own memory by process_vm_readv",
	                       "allow that call in this process's seccomp profile"},
	[REGION_STAGE_MAP] = {"cannot map it", "allow this process more address space (ulimit -v)"},
	[REGION_STAGE_UFFD] = {"cannot get a userfaultfd that handles faults in system calls",
	                       "run the backend as root so that it can lend /dev/userfaultfd, or give this user access "
	                       "to that device (chmod), or set sysctl vm.unprivileged_userfaultfd=1"},
	[REGION_STAGE_API] = {"the kernel's userfaultfd lacks features the backend needs", "use Linux 6.7 or newer"},
	[REGION_STAGE_REGISTER] = {"the kernel does not guard it by userfaultfd", "use Linux 6.7 or newer"},
	[REGION_STAGE_PROC] = {"cannot open /proc/self/pagemap and /proc/self/mem",
	                       "mount /proc, and exec after changing user ids"},
};

static int known(int stage)
{
	return stage >= 0 && stage < (int)(sizeof(STAGES) / sizeof(STAGES[0])) ? stage : REGION_STAGE_NONE;
}

const char *region_failure(int stage)
{
	return STAGES[known(stage)].failure;
}

const char *region_cure(int stage)
{
	return STAGES[known(stage)].cure;
}
