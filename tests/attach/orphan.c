/* SPDX-License-Identifier: Apache-2.0 */
/* orphan touch|exit IMAGE: maps it, says so, reads a line; then touches all, or ends by its threads' ends alone. */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096

static volatile char sum;

int main(int argc, char **argv)
{
	struct stat status;
	char line[16];
	volatile char *at;
	int fd;

	if (argc != 3 || (fd = open(argv[2], O_RDONLY)) < 0 || fstat(fd, &status) < 0)
		return 2;
	at = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (at == MAP_FAILED)
		return 3;
	sum = at[0];
	puts("mapped");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 4;
	if (strcmp(argv[1], "exit") == 0)
		pthread_exit(NULL);
	for (off_t page = 0; page * PAGE < status.st_size; page++)
		sum = at[page * PAGE];
	puts("all");
	return 0;
}
