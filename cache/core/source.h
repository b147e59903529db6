/* SPDX-License-Identifier: Apache-2.0 */
/* Reads of an image's local source: a file or a block device. */
#ifndef COWSHED_SOURCE_H
#define COWSHED_SOURCE_H

#include <stdint.h>

struct loader;

/* Reads length bytes, and tries again after an error: 0, or -errno. `to` is aligned to a page, with room for whole
 * pages. */
int source_read_retrying(struct loader *loader, char *to, uint64_t length, uint64_t offset);

#endif
