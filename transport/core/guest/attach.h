/* SPDX-License-Identifier: Apache-2.0 */
/* Makes a guarded mapping of an image, whose faults a backend answers: the first step of every guest of the library. */
#ifndef COWSHED_ATTACH_H
#define COWSHED_ATTACH_H

#include "transport/core/guest/handshake.h"
#include "transport/core/guest/region.h"

/* cdef-begin */
/* Returns a handshake that waits by poll, for limit_ms at most each time, or NULL without memory. The socket is
 * borrowed, and must not block. */
struct handshake *handshake_new(int fd, int limit_ms);
void handshake_free(struct handshake *handshake);
/* The last reply, such as a refusal, as JSON; nr_bytes_out: its length. Good until the next call. */
const char *handshake_reply(const struct handshake *handshake, uint64_t *nr_bytes_out);

/* Opens an image (request is a JSON object with "op": "open"), maps it guarded, and makes the backend answer its
 * faults. more is "" or further fields of `region`, after a comma. region->address must be NULL at first. 0, or -errno
 * as in handshake.h, and nothing is left mapped; *stage_out is the step of region_init that failed, or 0. After -EINTR
 * the caller must call it again, or region_deinit. image_out has no descriptors afterwards. */
int guest_attach(struct handshake *handshake, const char *request, const char *more, struct region *region,
                 struct guest_image *image_out, int *stage_out);
/* Why a step of region_init failed, and the cure, as text for people; "" for no step. */
const char *region_failure(int stage);
const char *region_cure(int stage);
/* cdef-end */

#endif
