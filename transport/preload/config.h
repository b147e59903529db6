/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `cowshed attach` passes to this process in the environment variable COWSHED_ATTACH.
 *
 * The variable's lines: "1 DEVICE INODE MAP_BYTES POPULATE READ_ONLY", the socket's path, the path given for {image},
 * the `describe` request, and the `open` request without the wanted part and the closing brace.
 */
#ifndef COWSHED_PRELOAD_CONFIG_H
#define COWSHED_PRELOAD_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "transport/preload/report.h"

struct config {
	bool active;  /* false: the library does nothing at all */
	bool is_lent; /* image_path is a descriptor that the backend lent: this user may not open the source */
	uint64_t device, inode; /* of the source; mappings of it come from the cache */
	uint64_t map_bytes;     /* of the whole image, whole pages */
	unsigned populate;      /* 1: populate every mapping, as with MAP_POPULATE */
	unsigned read_only;     /* 1: no mapping may be writable */
	dev_t block_device;     /* 0 if the source is a file */
	char socket_path[108];
	char image_path[4096]; /* its source, or /proc/self/fd/N if this user may not open that */
	char describe_request[4096];
	char open_request[4096];
};

extern struct config config;

/* Reads the variable; stays inactive without one, or with a malformed one (reported). */
void config_read(void);

/* Whether status is the image's source, under any name; of a block device, under any node. */
bool config_is_image(const struct stat *status);

#endif
