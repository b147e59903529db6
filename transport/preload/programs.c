/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/programs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "transport/core/elf.h"
#include "transport/preload/real.h"

#define MAX_INTERPRETERS 5 /* the kernel's own limit for scripts run by scripts */
#define MAX_LINE_BYTES 256

static struct elf own; /* bits is 0 while unknown */

static const char *last_word(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

/* The file name of the program's dynamic linker; "" if it has none. */
static const char *linker_of(const struct elf *elf)
{
	return last_word(elf->is_loader ? elf->soname : elf->linker);
}

void programs_learn(void)
{
	int fd = real_openat(AT_FDCWD, "/proc/self/exe", O_RDONLY | O_CLOEXEC, 0);

	if (fd < 0)
		return;
	if (elf_read(fd, &own) != 1)
		own.bits = 0;
	real_close(fd);
}

static int open_program(int folder, const char *path, int flags)
{
	char by_number[40];
	struct stat status;
	int fd;

	if ((flags & AT_EMPTY_PATH) && path[0] == '\0') {
		snprintf(by_number, sizeof(by_number), "/proc/self/fd/%d", folder);
		path = by_number;
	}
	fd = real_openat(folder, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0);
	if (fd >= 0 && (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode))) {
		real_close(fd);
		return -1;
	}
	return fd;
}

/* If the file is a script, stores the path of its interpreter. */
static bool is_script(int fd, char interpreter[MAX_LINE_BYTES])
{
	char line[MAX_LINE_BYTES];
	ssize_t got = pread(fd, line, sizeof(line) - 1, 0);
	char *start = line + 2;

	if (got < 2 || line[0] != '#' || line[1] != '!')
		return false;
	line[got] = '\0';
	line[strcspn(line, "\n")] = '\0';
	start += strspn(start, " \t");
	start[strcspn(start, " \t")] = '\0';
	memcpy(interpreter, start, strlen(start) + 1);
	return true;
}

static bool takes_us(const struct elf *elf)
{
	if (elf->bits != own.bits || elf->machine != own.machine || elf->is_big_endian != own.is_big_endian)
		return false;
	if (elf->needs_first)
		return false;
	return (!elf->is_loader && !elf->linker[0]) || strcmp(linker_of(elf), linker_of(&own)) == 0;
}

bool program_takes_us(int folder, const char *path, int flags)
{
	char interpreter[MAX_LINE_BYTES];
	int saved = errno;
	bool takes = true;

	for (int i = 0; own.bits && i <= MAX_INTERPRETERS; i++) {
		int fd = open_program(folder, path, flags);
		struct elf elf;
		bool again;

		if (fd < 0)
			break;
		again = is_script(fd, interpreter);
		if (!again && elf_read(fd, &elf) == 1)
			takes = takes_us(&elf);
		real_close(fd);
		if (!again)
			break;
		folder = AT_FDCWD;
		path = interpreter;
		flags = 0;
	}
	errno = saved;
	return takes;
}
