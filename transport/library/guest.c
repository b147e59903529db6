/* SPDX-License-Identifier: Apache-2.0 */
/* The guest library (cowshed_guest.h): a connection, the mapping that lives as long as it, and its follower. */
#define _GNU_SOURCE
#include "transport/library/cowshed_guest.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/attach.h"
#include "transport/core/guest/follow.h"

#define REPLY_MS 60000
#define CLOSE_MS 5000
#define PAUSE_MS 10
#define TRIES 5 /* if the backend dies meanwhile: its successor is at the same path */
#define MOVES_MAX 4
#define REQUEST_BYTES (4u << 10)

struct cowshed_disk {
	int fd;
	struct region region;
	struct guest_image image;
	struct follower *follower;
};

static __thread char last_error[1024];

int cowshed_api(void)
{
	return COWSHED_GUEST_API;
}

const char *cowshed_error(void)
{
	return last_error;
}

static int fail(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int fail(int err, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(last_error, sizeof(last_error), format, arguments);
	va_end(arguments);
	return err;
}

/* JSON that is being written; it did not fit if length is beyond the room. */
struct text {
	char bytes[REQUEST_BYTES];
	size_t length;
};

static void put(struct text *text, const char *bytes)
{
	size_t nr = strlen(bytes);

	if (text->length + nr < sizeof(text->bytes))
		memcpy(text->bytes + text->length, bytes, nr + 1);
	text->length += nr;
}

static void put_string(struct text *text, const char *name, const char *value)
{
	char escaped[8] = {0};

	if (!value)
		return;
	put(text, ",\"");
	put(text, name);
	put(text, "\":\"");
	for (; *value; value++) {
		if ((unsigned char)*value < 0x20 || *value == '"' || *value == '\\')
			snprintf(escaped, sizeof(escaped), "\\u%04x", (unsigned char)*value);
		else
			snprintf(escaped, sizeof(escaped), "%c", *value);
		put(text, escaped);
	}
	put(text, "\"");
}

static void put_number(struct text *text, const char *name, int64_t value)
{
	char number[64];

	if (value < 0)
		return;
	snprintf(number, sizeof(number), ",\"%s\":%" PRId64, name, value);
	put(text, number);
}

/* Begins an open request with the fields that are the same at every backend. */
static void put_open(struct text *text, const char *image, const char *guest, const struct cowshed_options *options)
{
	*text = (struct text){.length = 0};
	put(text, "{\"op\":\"open\"");
	put_string(text, "image", image);
	put_string(text, "guest", guest);
	put_number(text, "window_bytes", options->window_bytes);
	put_number(text, "write_window_bytes", options->write_window_bytes);
	if (options->flags & COWSHED_READ_ONLY)
		put(text, ",\"read_only\":true");
}

static int nap(void)
{
	nanosleep(&(struct timespec){.tv_nsec = PAUSE_MS * 1000000}, NULL);
	return PAUSE_MS;
}

/* Connects; a socket whose queue is full is tried again. */
static int dial(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd, err = 0;

	if (strlen(path) >= sizeof(address.sun_path))
		return fail(-ENAMETOOLONG, "the path of the backend's socket is over %zu bytes: %s",
		            sizeof(address.sun_path) - 1, path);
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return fail(-errno, "cannot create a socket: %s", strerror(errno));
	for (int waited_ms = 0; connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0;) {
		err = -errno;
		if (err == -EINTR || (err == -EAGAIN && waited_ms < REPLY_MS)) {
			waited_ms += nap();
			err = 0;
			continue;
		}
		close(fd);
		return fail(err, "no backend answers at %s (%s); is it running?", path, strerror(-err));
	}
	return fd;
}

/* Sets the error line of a handshake that failed. */
static int failed(const struct handshake *handshake, const char *path, const char *image, int err)
{
	if (err == -EACCES || err == -EREMCHG)
		return fail(err, "%s", handshake->message);
	if (err == -EPROTO)
		return fail(err, "the backend at %s sent a malformed reply; is it another version?", path);
	return fail(err, "the backend at %s did not open %s: %s; see 'cowshed status' and its log", path, image,
	            strerror(-err));
}

/* Attaches over a fresh connection, which is the disk's on success. */
static int attach_once(const char *path, const char *image, const char *request, struct cowshed_disk *disk,
                       char *moved_to, size_t moved_to_bytes)
{
	int fd = dial(path), stage = 0, err;

	if (fd < 0)
		return fd;
	struct handshake *handshake = handshake_new(fd, REPLY_MS);
	if (!handshake) {
		close(fd);
		return fail(-ENOMEM, "no memory to open %s", image);
	}
	while ((err = handshake_hello(handshake)) == -EINTR)
		;
	if (err == 0)
		while ((err = guest_attach(handshake, request, "", &disk->region, &disk->image, &stage)) == -EINTR)
			;
	if (err < 0 && stage)
		fail(err, "image %s: %s (%s); %s", image, region_failure(stage), strerror(-err), region_cure(stage));
	else if (err < 0)
		failed(handshake, path, image, err);
	if (err == -EREMCHG)
		snprintf(moved_to, moved_to_bytes, "%s", handshake->moved_to);
	handshake_free(handshake);
	if (err < 0)
		close(fd);
	else
		disk->fd = fd;
	return err;
}

/* Attaches at the backend where the guest is, or at the successor of one that dies meanwhile. */
static int attach(const char *path, const char *image, const char *request, bool follows, struct cowshed_disk *disk)
{
	const char *scheme = "unix://";
	char there[512];
	int err = -EPIPE, nr_moves = 0;

	for (int i = 0; i < TRIES && (handshake_is_gone(err) || err == -EREMCHG); i++) {
		err = attach_once(path, image, request, disk, there, sizeof(there));
		if (err != -EREMCHG)
			continue;
		if (!follows || strncmp(there, scheme, strlen(scheme)) != 0 || nr_moves++ == MOVES_MAX)
			return fail(-EACCES, "%s is served at %s now: open it there", image, there);
		path = there + strlen(scheme);
		i = 0;
	}
	return err;
}

static int start_following(struct cowshed_disk *disk, const char *image, const struct cowshed_options *options)
{
	struct text opening;
	int err;

	put_open(&opening, image, disk->image.guest, options);
	put(&opening, ",\"moved\":true"); /* refuse the guest if its pages are not there */
	err = follower_start(&disk->region, disk->fd, !(options->flags & COWSHED_NO_FOLLOW), disk->image.guest,
	                     opening.bytes, disk->image.digest, &disk->follower);
	if (err < 0)
		fail(err, "cannot start a thread to listen to the backend (%s); allow more (ulimit -u)",
		     strerror(-err));
	return err;
}

/* Makes the backend, if it is there, release the mapping, and unmaps. */
static void detach(struct cowshed_disk *disk)
{
	/* The backend first: a late answer of it must not hit another mapping at this address. */
	struct handshake *handshake = handshake_new(disk->fd, CLOSE_MS);

	if (handshake)
		while (handshake_close(handshake) == -EINTR)
			;
	handshake_free(handshake);
	region_deinit(&disk->region);
	close(disk->fd);
	free(disk);
}

int cowshed_open(const char *socket_path, const char *image, const struct cowshed_options *given,
                 cowshed_disk **disk_out)
{
	struct cowshed_options options = COWSHED_OPTIONS_INIT;
	struct text request;
	int err;

	last_error[0] = '\0';
	if (given && given->struct_bytes > sizeof(options))
		return fail(-EINVAL, "options of %u bytes are of a newer version than this library, which knows %zu",
		            given->struct_bytes, sizeof(options));
	if (given)
		memcpy(&options, given, given->struct_bytes);
	put_open(&request, image, options.guest, &options);
	put_string(&request, "token", options.token);
	put_string(&request, "on_quota", options.on_quota);
	put_number(&request, "quota_bytes", options.quota_bytes);
	put(&request, "}");
	if (request.length >= sizeof(request.bytes))
		return fail(-EMSGSIZE, "the names of image, guest and token take more than %u bytes", REQUEST_BYTES);
	struct cowshed_disk *disk = calloc(1, sizeof(*disk));
	if (!disk)
		return fail(-ENOMEM, "no memory to open %s", image);
	disk->region = (struct region){
		.uffd = -1,
		.pagemap_fd = -1,
		.mem_fd = -1,
		.read_only = (options.flags & COWSHED_READ_ONLY) != 0,
	};
	err = attach(socket_path, image, request.bytes, !(options.flags & COWSHED_NO_FOLLOW), disk);
	if (err < 0) {
		free(disk);
		return err;
	}
	err = start_following(disk, image, &options);
	if (err < 0) {
		detach(disk);
		return err;
	}
	*disk_out = disk;
	return 0;
}

void *cowshed_address(const cowshed_disk *disk)
{
	return disk->region.address;
}

uint64_t cowshed_size(const cowshed_disk *disk)
{
	return disk->image.size_bytes;
}

const char *cowshed_guest(const cowshed_disk *disk)
{
	return disk->image.guest;
}

const char *cowshed_digest(const cowshed_disk *disk)
{
	return disk->image.digest;
}

/* Fails if a range is outside the image, or if its memory was given up. */
static int check_range(const struct cowshed_disk *disk, const char *what, uint64_t offset, uint64_t length)
{
	uint64_t size = disk->image.size_bytes;

	if (offset > size || length > size - offset)
		return fail(-EINVAL, "%s of %" PRIu64 " bytes at %" PRIu64 " is outside the image of %" PRIu64 " bytes",
		            what, length, offset, size);
	if (follower_state(disk->follower) == FOLLOW_BYTES)
		return fail(-EXDEV, "guest %s moved to where nothing can be mapped; open the image there",
		            disk->image.guest);
	return 0;
}

static int64_t copied(const struct cowshed_disk *disk, const char *what, uint64_t offset, int64_t nr)
{
	if (nr >= 0)
		return nr;
	/* The memory may have been given up meanwhile. */
	int err = check_range(disk, what, offset, 0);
	return err < 0 ? err
	               : fail((int)nr, "%s at %" PRIu64 ": no page there (%s); see the backend's log", what, offset,
	                      strerror((int)-nr));
}

int64_t cowshed_read(cowshed_disk *disk, uint64_t offset, void *to, uint64_t length)
{
	int err = check_range(disk, "read", offset, length);

	return err < 0 || !length ? err : copied(disk, "read", offset, region_read(&disk->region, offset, to, length));
}

int64_t cowshed_write(cowshed_disk *disk, uint64_t offset, const void *from, uint64_t length)
{
	if (disk->region.read_only)
		return fail(-EROFS, "the image was opened with COWSHED_READ_ONLY; open it without to write");
	int err = check_range(disk, "write", offset, length);

	return err < 0 || !length ? err
	                          : copied(disk, "write", offset, region_write(&disk->region, offset, from, length));
}

int cowshed_discard(cowshed_disk *disk, uint64_t offset, uint64_t length)
{
	int err = check_range(disk, "discard", offset, length);
	uint64_t end = offset + length;

	if (err < 0)
		return err;
	if (offset % PAGE_BYTES != 0 || (end % PAGE_BYTES != 0 && end != disk->image.size_bytes))
		return fail(-EINVAL, "discard of %" PRIu64 " bytes at %" PRIu64 " is not of whole pages of %lu bytes",
		            length, offset, (unsigned long)PAGE_BYTES);
	length = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	return (int)copied(disk, "discard", offset, region_discard(&disk->region, offset, length));
}

int cowshed_is_alive(const cowshed_disk *disk)
{
	struct pollfd look = {.fd = disk->fd};

	return !(poll(&look, 1, 0) == 1 && look.revents & (POLLHUP | POLLERR | POLLNVAL));
}

void cowshed_close(cowshed_disk *disk)
{
	if (!disk)
		return;
	follower_stop(disk->follower);
	detach(disk);
}

void cowshed_forget(cowshed_disk *disk)
{
	if (!disk)
		return;
	region_forget(&disk->region);
	follower_forget(disk->follower);
	close(disk->fd);
	free(disk);
}
