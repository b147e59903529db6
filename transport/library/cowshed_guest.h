/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest library: an image of a cowshed backend as memory of this process, shared until it is written to.
 *
 *     cowshed_disk *disk;
 *     if (cowshed_open("/run/cowshed/cowshed.sock", "debian", NULL, &disk) < 0)
 *             errx(1, "%s", cowshed_error());
 *     memcpy(buffer, (char *)cowshed_address(disk) + offset, length);
 *     cowshed_close(disk);
 *
 * For C, C++, Rust, Go and whatever calls C. `make guest-library` builds it, with a file for pkg-config. Linux 6.7 or
 * newer, on the backend's host.
 *
 * Functions return 0 (or what they count) or -errno; cowshed_error() then says in one line what happened, and the cure.
 * Any thread may use a disk, but must call cowshed_close and cowshed_forget only when no other uses it.
 *
 * An access to a page that is not there yet waits until the backend answers: through its restart, and for as long as a
 * quota stops this guest. Only SIGKILL ends such a wait. A page that cannot be loaded is EIO for cowshed_read and
 * cowshed_write, and SIGBUS for a direct access. When the backend is drained to another of this host, a thread of the
 * library moves the disk there, at the same address.
 */
#ifndef COWSHED_GUEST_LIBRARY_H
#define COWSHED_GUEST_LIBRARY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface: programs that were built with an older one go on working. */
#define COWSHED_GUEST_API 1

#define COWSHED_API __attribute__((visibility("default")))

typedef struct cowshed_disk cowshed_disk;

#define COWSHED_DEFAULT (-1) /* for a number: the backend's default */
#define COWSHED_READ_ONLY 2u /* flags: the address is not writable, cowshed_write is -EROFS; no quota is needed */
#define COWSHED_NO_FOLLOW 1u /* flags: stay when the backend is drained; pages that are not in memory are EIO then */

/* Begin with COWSHED_OPTIONS_INIT. */
struct cowshed_options {
	uint32_t struct_bytes; /* sizeof(struct cowshed_options): which version of it this is */
	uint32_t flags;
	const char *guest;    /* this guest's name; NULL: after this process */
	const char *token;    /* a secret by which further mappings join this guest, under one quota; or NULL */
	const char *on_quota; /* "stop" the writer, "kill" it, or "allow" and count; NULL: the backend's default */
	int64_t quota_bytes;  /* of private pages */
	int64_t window_bytes; /* mapped at a time for a read, and for a write; 0: adaptive */
	int64_t write_window_bytes;
};
#define COWSHED_OPTIONS_INIT \
	{sizeof(struct cowshed_options), 0, 0, 0, 0, COWSHED_DEFAULT, COWSHED_DEFAULT, COWSHED_DEFAULT}

/* COWSHED_GUEST_API of the library that is loaded. */
COWSHED_API int cowshed_api(void);

/* This thread's last failure in one line; "" if none since its last cowshed_open. Good until the thread's next call. */
COWSHED_API const char *cowshed_error(void);

/* Opens an image of the backend at a socket's path, as a guest. options NULL: all defaults. Waits for the backend for a
 * minute. -EACCES: refused; -ENOENT, -ECONNREFUSED: no backend there; -EPERM: this process may not use userfaultfd.
 * On failure nothing is left, and *disk_out is untouched. */
COWSHED_API int cowshed_open(const char *socket_path, const char *image, const struct cowshed_options *options,
                             cowshed_disk **disk_out);

/* The image as memory, to be read and written; written pages are private to this guest. Page-aligned; past
 * cowshed_size the last page is zeros. */
COWSHED_API void *cowshed_address(const cowshed_disk *disk);
COWSHED_API uint64_t cowshed_size(const cowshed_disk *disk); /* in bytes */
COWSHED_API const char *cowshed_guest(const cowshed_disk *disk);
COWSHED_API const char *cowshed_digest(
	const cowshed_disk *disk); /* of the image; "" if the backend did not know it yet */

/* Copies bytes out or in, without SIGBUS. Returns how many: fewer than length if a page cannot be loaded; -EIO if that
 * is the first; -EINVAL outside the image; -EXDEV: the guest moved to where nothing can be mapped. */
COWSHED_API int64_t cowshed_read(cowshed_disk *disk, uint64_t offset, void *to, uint64_t length);
COWSHED_API int64_t cowshed_write(cowshed_disk *disk, uint64_t offset, const void *from, uint64_t length);

/* Gives private pages back: the range is again what the image holds. -EINVAL unless offset is a multiple of 4096, and
 * the end is one, too, or the image's end. */
COWSHED_API int cowshed_discard(cowshed_disk *disk, uint64_t offset, uint64_t length);

/* 1 if the backend or a successor is there; 0: pages that are not in memory are errors from now on. */
COWSHED_API int cowshed_is_alive(const cowshed_disk *disk);

/* Unmaps the image; private pages are gone. Waits a few seconds at most for the backend. NULL does nothing. */
COWSHED_API void cowshed_close(cowshed_disk *disk);

/* For a forked child, which does not have the mapping: closes the copies of its descriptors and frees the disk. */
COWSHED_API void cowshed_forget(cowshed_disk *disk);

#ifdef __cplusplus
}
#endif

#endif
