/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/config.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cache/core/abi.h"
#include "transport/preload/real.h"

struct config config;

/* Copies a line without its newline; returns where the next starts, NULL if it is empty, too long or unterminated. */
static const char *take_line(const char *text, char *to, size_t capacity_bytes, bool is_last)
{
	size_t length = is_last ? strlen(text) : strcspn(text, "\n");

	if (length == 0 || length >= capacity_bytes || (!is_last && text[length] != '\n'))
		return NULL;
	memcpy(to, text, length);
	to[length] = '\0';
	return text + length + !is_last;
}

void config_read(void)
{
	static struct config new;
	const char *text = getenv("COWSHED_ATTACH");
	char numbers[100];
	struct stat status;

	if (!text)
		return;
	text = take_line(text, numbers, sizeof(numbers), false);
	if (text && sscanf(numbers, "1 %" SCNu64 " %" SCNu64 " %" SCNu64 " %u %u", &new.device, &new.inode,
	                   &new.map_bytes, &new.populate, &new.read_only) != 5)
		text = NULL;
	if (text && (new.map_bytes == 0 || new.map_bytes % PAGE_BYTES != 0))
		text = NULL;
	if (text)
		text = take_line(text, new.socket_path, sizeof(new.socket_path), false);
	if (text)
		text = take_line(text, new.image_path, sizeof(new.image_path), false);
	if (text)
		text = take_line(text, new.describe_request, sizeof(new.describe_request), false);
	if (text)
		text = take_line(text, new.open_request, sizeof(new.open_request), true);
	if (!text) {
		report("COWSHED_ATTACH is malformed, so nothing is mapped from the cache; "
		       "start the program by 'cowshed attach'");
		return;
	}
	if (real_fstatat(AT_FDCWD, new.image_path, &status, 0) == 0 && S_ISBLK(status.st_mode))
		new.block_device = status.st_rdev;
	new.is_lent = strncmp(new.image_path, "/proc/self/fd/", 14) == 0;
	new.active = true;
	config = new;
}

bool config_is_image(const struct stat *status)
{
	if (!config.active)
		return false;
	if (config.block_device && S_ISBLK(status->st_mode))
		return status->st_rdev == config.block_device;
	return status->st_ino == config.inode && status->st_dev == config.device;
}
