/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest in C: maps an image, reads it, writes a private copy of a page and discards it.
 *
 *     make install-guest-library
 *     cc -o guest examples/guest.c $(pkg-config --cflags --libs cowshed_guest)
 *     ./guest /run/cowshed/cowshed.sock debian
 */
#include <cowshed_guest.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(void)
{
	fprintf(stderr, "guest: %s\n", cowshed_error());
	exit(1);
}

/* A checksum that reads every byte through the mapping: each page is faulted in once. */
static unsigned long sum(const unsigned char *bytes, uint64_t nr_bytes)
{
	unsigned long total = 0;

	for (uint64_t i = 0; i < nr_bytes; i++)
		total = 31 * total + bytes[i];
	return total;
}

int main(int argc, char **argv)
{
	struct cowshed_options options = COWSHED_OPTIONS_INIT;
	cowshed_disk *disk;
	char mine[] = "mine", found[sizeof(mine)];

	if (argc != 3) {
		fprintf(stderr, "usage: %s SOCKET IMAGE\n", argv[0]);
		return 2;
	}
	options.quota_bytes = 16 << 20;
	if (cowshed_open(argv[1], argv[2], &options, &disk) < 0)
		die();
	const unsigned char *image = cowshed_address(disk);
	unsigned long before = sum(image, cowshed_size(disk));
	printf("guest %s: %llu bytes, sum %lx\n", cowshed_guest(disk), (unsigned long long)cowshed_size(disk), before);

	/* A plain store works too; this call returns an error where a store would raise SIGBUS. */
	if (cowshed_write(disk, 0, mine, sizeof(mine)) < 0 || cowshed_read(disk, 0, found, sizeof(found)) < 0)
		die();
	printf("private: %s; the mapping has %s\n", found,
	       memcmp(found, image, sizeof(found)) ? "other bytes" : "the same bytes");
	if (cowshed_discard(disk, 0, 4096) < 0)
		die();
	printf("discarded: %s\n", sum(image, cowshed_size(disk)) == before ? "the image again" : "something else");
	cowshed_close(disk);
	return 0;
}
