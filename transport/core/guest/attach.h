/* SPDX-License-Identifier: Apache-2.0 */
/* A guarded mapping of an image, and a backend that answers its faults: what every guest of the library begins with. */
#ifndef COWSHED_ATTACH_H
#define COWSHED_ATTACH_H

#include "transport/core/guest/handshake.h"
#include "transport/core/guest/region.h"

/* cdef-begin */
/* A handshake that waits by poll, limit_ms at most for each sign of the peer. The socket is borrowed, and does not
 * block. NULL without memory. */
struct handshake *handshake_new(int fd, int limit_ms);
void handshake_free(struct handshake *handshake);
/* The reply that was a refusal, as JSON; nr_bytes_out: its length. Good until the next call. */
const char *handshake_reply(const struct handshake *handshake, uint64_t *nr_bytes_out);

/* Opens an image (request is a JSON object with "op": "open"), maps it guarded, and has the backend answer for it. more
 * is "" or further fields of `region`, after a comma. region->address is NULL at first. 0, or -errno as handshake.h has
 * it, and nothing is left mapped; *stage_out is the step of region_init that failed, or 0. After -EINTR it is to be
 * called again, or region_deinit()ed. image_out has no descriptors afterwards. */
int guest_attach(struct handshake *handshake, const char *request, const char *more, struct region *region,
                 struct guest_image *image_out, int *stage_out);
/* What a step of region_init does not get, and the cure, for people; "" for no step. */
const char *region_failure(int stage);
const char *region_cure(int stage);
/* cdef-end */

#endif
