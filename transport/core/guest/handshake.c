/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/guest/handshake.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cache/core/abi.h"

_Static_assert(EPIPE == 32 && ECONNRESET == 104, "as handshake_is_gone has them");

/* Waits until the socket is worth trying again; 0, or -errno. */
static int keep_waiting(struct handshake *h, short events)
{
	int ready = h->wait(h, events);

	return ready > 0 ? 0 : ready == 0 ? -ETIMEDOUT : ready;
}

static int send_request(struct handshake *h, uint32_t tag, const char *request, const int *fds, unsigned nr_fds)
{
	int err;

	while ((err = packet_send(h->fd, tag, request, fds, nr_fds)) == -EAGAIN) {
		err = keep_waiting(h, POLLOUT);
		if (err < 0)
			return err;
	}
	/* A backend that is gone may have sent the reason before it hung up. */
	return handshake_is_gone(err) ? 0 : err;
}

/* A refusal without a tag answers any request: the backend could not read it (no descriptors left, for instance). */
static bool is_reply(const struct packet *packet, uint32_t tag)
{
	struct json error;

	return packet->tag == tag || (packet->tag == 0 && json_object(packet->json, "error", &error));
}

static int receive_reply(struct handshake *h, uint32_t tag, struct packet *reply)
{
	for (;;) {
		int err = packet_receive(h->fd, h->room, h->room_bytes, reply);

		if (err == 0 && is_reply(reply, tag))
			return 0;
		if (err == 0) {
			packet_close_fds(reply);
			if (reply->tag == 0 && h->hear)
				h->hear(h->of, reply->json);
			/* Events have no tag. A successor cannot know which replies arrived, and repeats the last. */
			if (reply->tag > tag)
				return -EPROTO;
			continue;
		}
		if (err == -EAGAIN)
			err = keep_waiting(h, POLLIN);
		if (err < 0)
			return err;
	}
}

/* Notes what a refusal says. */
static int refused(struct handshake *h)
{
	struct json error;

	if (!json_object(h->reply, "error", &error) || !json_text(error, "message", h->message, sizeof(h->message)))
		return -EPROTO;
	json_text(error, "kind", h->kind, sizeof(h->kind));
	if (strcmp(h->kind, "moved") == 0 && json_text(error, "uri", h->moved_to, sizeof(h->moved_to)) &&
	    h->moved_to[0])
		return -EREMCHG;
	return -EACCES;
}

int handshake_ask(struct handshake *h, uint32_t tag, const char *request, const int *fds, unsigned nr_fds,
                  struct packet *reply_out)
{
	int err = 0;

	if (h->asked != tag) {
		err = send_request(h, tag, request, fds, nr_fds);
		if (err < 0)
			return err;
		h->asked = tag;
	}
	err = receive_reply(h, tag, reply_out);
	if (err == -EINTR)
		return err;
	h->asked = 0;
	if (err < 0)
		return err;
	h->reply = reply_out->json;
	if (json_is_true(h->reply, "ok"))
		return 0;
	packet_close_fds(reply_out);
	return refused(h);
}

static int ask_for_no_fds(struct handshake *h, uint32_t tag, const char *request, const int *fds, unsigned nr_fds)
{
	struct packet reply;
	int err = handshake_ask(h, tag, request, fds, nr_fds, &reply);

	if (err == 0)
		packet_close_fds(&reply);
	return err;
}

int handshake_hello(struct handshake *h)
{
	return ask_for_no_fds(h, HANDSHAKE_HELLO, "{\"op\":\"hello\",\"version\":1,\"features\":[]}", NULL, 0);
}

static bool read_image(const struct packet *reply, struct guest_image *image)
{
	struct json json = reply->json;
	struct stat status;

	if (!json_number(json, "size_bytes", &image->size_bytes) ||
	    !json_number(json, "map_bytes", &image->map_bytes) ||
	    !json_number(json, "extent_bytes", &image->extent_bytes) ||
	    !json_number(json, "uffd_features", &image->uffd_features))
		return false;
	json_text(json, "digest", image->digest, sizeof(image->digest));
	json_text(json, "generation", image->generation, sizeof(image->generation));
	if (!json_text(json, "guest", image->guest, sizeof(image->guest)) || image->size_bytes == 0 ||
	    image->map_bytes % PAGE_BYTES != 0 || image->map_bytes - image->size_bytes >= PAGE_BYTES ||
	    image->extent_bytes < PAGE_BYTES || reply->nr_fds < 1 || reply->nr_fds > 2)
		return false;
	/* A mapping past the file's end would be SIGBUS. */
	return fstat(reply->fds[0], &status) == 0 && S_ISREG(status.st_mode) &&
	       (uint64_t)status.st_size >= image->map_bytes;
}

int handshake_open(struct handshake *h, const char *request, struct guest_image *image_out)
{
	struct guest_image image;
	struct packet reply;
	int err = handshake_ask(h, HANDSHAKE_OPEN, request, NULL, 0, &reply);

	if (err < 0)
		return err;
	if (!read_image(&reply, &image)) {
		packet_close_fds(&reply);
		return -EPROTO;
	}
	image.memfd = reply.fds[0];
	image.uffd_device = reply.nr_fds > 1 ? reply.fds[1] : -1;
	*image_out = image;
	return 0;
}

void handshake_close_image(struct guest_image *image)
{
	if (image->memfd >= 0)
		close(image->memfd);
	if (image->uffd_device >= 0)
		close(image->uffd_device);
	image->memfd = image->uffd_device = -1;
}

int handshake_region(struct handshake *h, const void *address, uint64_t nr_bytes, const int fds[3], const char *more)
{
	char request[200];

	snprintf(request, sizeof(request), "{\"op\":\"region\",\"address\":%" PRIuPTR ",\"length\":%" PRIu64 "%s}",
	         (uintptr_t)address, nr_bytes, more);
	return ask_for_no_fds(h, HANDSHAKE_REGION, request, fds, 3);
}

int handshake_close(struct handshake *h)
{
	int err = ask_for_no_fds(h, HANDSHAKE_CLOSE, "{\"op\":\"close\"}", NULL, 0);

	return handshake_is_gone(err) ? 0 : err;
}
