/* SPDX-License-Identifier: Apache-2.0 */
/* looker IMAGE COPY: asks all there is to ask of IMAGE's path, which this user may not open, and opens what it is told.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                                      \
	do {                                                                                             \
		if (!(what)) {                                                                           \
			fprintf(stderr, "line %d: not so: %s (%s)\n", __LINE__, #what, strerror(errno)); \
			_exit(99);                                                                       \
		}                                                                                        \
	} while (0)

/* What older programs call. */
int __xstat(int version, const char *path, struct stat *status);
int __lxstat(int version, const char *path, struct stat *status);
int __fxstatat(int version, int folder, const char *path, struct stat *status, int flags);
int __open_2(const char *path, int flags);
ssize_t __readlink_chk(const char *path, char *target, size_t length, size_t room);
char *__realpath_chk(const char *path, char *resolved, size_t room);

static const char *image, *number;
static char first[64]; /* the image's first bytes */
static off_t image_bytes;

static void *volatile nowhere; /* NULL, which the compiler does not know */

static int is_file(const struct stat *status)
{
	return S_ISREG(status->st_mode) && status->st_size == image_bytes;
}

/* Whether it is the image, which then is closed. */
static int reads(int fd)
{
	char bytes[sizeof(first)];
	int is_image =
		fd >= 0 && read(fd, bytes, sizeof(bytes)) == sizeof(bytes) && memcmp(bytes, first, sizeof(first)) == 0;

	close(fd);
	return is_image;
}

static int streams(FILE *file)
{
	char bytes[sizeof(first)];
	int is_image = file && fread(bytes, 1, sizeof(bytes), file) == sizeof(bytes) &&
	               memcmp(bytes, first, sizeof(first)) == 0;

	if (file)
		fclose(file);
	return is_image;
}

static int fails(long result, int wanted)
{
	return result < 0 && errno == wanted;
}

static void look_by(int folder, const char *path)
{
	char target[PATH_MAX];
	struct statx more;
	struct stat status;

	CHECK(fstatat(folder, path, &status, 0) == 0 && is_file(&status));
	CHECK(fstatat(folder, path, &status, AT_SYMLINK_NOFOLLOW) == 0 && is_file(&status));
	CHECK(__fxstatat(1, folder, path, &status, AT_SYMLINK_NOFOLLOW) == 0 && is_file(&status));
	CHECK(statx(folder, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS, &more) == 0);
	CHECK(S_ISREG(more.stx_mode) && (off_t)more.stx_size == image_bytes);
	CHECK(fails(readlinkat(folder, path, target, sizeof(target)), EINVAL));
	CHECK(faccessat(folder, path, R_OK, 0) == 0);
	CHECK(faccessat(folder, path, F_OK, AT_EACCESS) == 0);
	CHECK(fails(faccessat(folder, path, R_OK | W_OK, 0), EROFS));
	CHECK(fails(faccessat(folder, path, X_OK, 0), EACCES));
	CHECK(reads(openat(folder, path, O_RDONLY)));
	CHECK(reads(openat(folder, path, O_RDWR | O_NOFOLLOW | O_CLOEXEC)));
	CHECK(fails(openat(folder, path, O_WRONLY), EROFS));
	CHECK(fails(openat(folder, path, O_RDONLY | O_DIRECTORY), ENOTDIR));
}

static void look_at(const char *path)
{
	char target[PATH_MAX];
	struct stat status;

	look_by(AT_FDCWD, path);
	CHECK(stat(path, &status) == 0 && is_file(&status));
	CHECK(lstat(path, &status) == 0 && is_file(&status));
	CHECK(__xstat(1, path, &status) == 0 && is_file(&status));
	CHECK(__lxstat(1, path, &status) == 0 && is_file(&status));
	CHECK(fails(readlink(path, target, sizeof(target)), EINVAL));
	CHECK(fails(__readlink_chk(path, target, sizeof(target), sizeof(target)), EINVAL));
	CHECK(access(path, R_OK) == 0 && eaccess(path, R_OK) == 0 && euidaccess(path, R_OK) == 0);
	CHECK(fails(access(path, W_OK), EROFS));
	CHECK(realpath(path, target) == target && strcmp(target, image) == 0);
	CHECK(__realpath_chk(path, target, sizeof(target)) == target && strcmp(target, image) == 0);
	CHECK(strcmp(realpath(path, NULL), image) == 0);
	CHECK(strcmp(canonicalize_file_name(path), image) == 0);
	CHECK(reads(__open_2(path, O_RDONLY)));
	CHECK(streams(fopen(path, "r")));
	CHECK(streams(freopen(path, "r", fopen("/dev/null", "r"))));
	CHECK(streams(freopen(path, "re", fopen("/dev/null", "w"))));
}

/* As SQLite does: each folder in turn, links taken out. */
static void walk(const char *path)
{
	char walked[PATH_MAX] = "", rest[PATH_MAX], target[PATH_MAX];
	struct stat status;

	strcpy(rest, path);
	for (char *word = strtok(rest, "/"); word; word = strtok(NULL, "/")) {
		size_t length = strlen(walked);
		ssize_t got;

		snprintf(walked + length, sizeof(walked) - length, "/%s", word);
		CHECK(lstat(walked, &status) == 0);
		if (!S_ISLNK(status.st_mode))
			continue;
		got = readlink(walked, target, sizeof(target));
		CHECK(got > 0 && target[0] != '/');
		snprintf(walked + length, sizeof(walked) - length, "/%.*s", (int)got, target);
	}
	CHECK(reads(open(walked, O_RDONLY | O_NOFOLLOW)));
	strcat(walked, "-journal");
	CHECK(fails(open(walked, O_RDONLY), ENOENT));
	CHECK(fails(access(walked, F_OK), ENOENT));
}

static void look_through_others(void)
{
	int path_fd = open(image, O_PATH | O_NOFOLLOW), fd = open(image, O_RDONLY);
	char path[PATH_MAX], target[PATH_MAX] = "";
	struct stat status;

	CHECK(fstat(path_fd, &status) == 0 && is_file(&status));
	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", i ? fd : path_fd);
		CHECK(reads(open(path, O_RDONLY)));
		CHECK(readlink(path, target, sizeof(target)) == (ssize_t)strlen(image));
		CHECK(strcmp(target, image) == 0);
	}
	CHECK(readlink(path, target, 3) == 3);
}

/* By a link of the program's own, and what is none of the image's. */
static void look_at_links(const char *folder)
{
	char path[PATH_MAX], target[PATH_MAX] = "";
	struct stat status;

	snprintf(path, sizeof(path), "%s/%s", folder, number);
	CHECK(symlink(image, path) == 0);
	CHECK(lstat(path, &status) == 0 && S_ISLNK(status.st_mode));
	CHECK(readlink(path, target, sizeof(target)) > 0 && strcmp(target, image) == 0);
	CHECK(realpath(path, target) && strcmp(target, image) == 0);
	CHECK(stat(path, &status) == 0 && is_file(&status));
	CHECK(access(path, R_OK) == 0 && reads(open(path, O_RDONLY)));
	CHECK(fails(open(path, O_RDONLY | O_NOFOLLOW), ELOOP));
	CHECK(unlink(path) == 0);
	CHECK(fails(readlink(folder, target, sizeof(target)), EINVAL));
	CHECK(readlink("/proc/self/exe", target, sizeof(target)) > 0 && strstr(target, "looker"));
	CHECK(lstat("/proc/self/fd/0", &status) == 0 && S_ISLNK(status.st_mode));
	/* Some ask so whether there is a statx. */
	CHECK(fails(statx(AT_FDCWD, nowhere, 0, 0, nowhere), EFAULT));
}

static void look_around(void)
{
	struct dirent *entry;
	struct statvfs system;
	int found = 0;
	DIR *folder = opendir("/proc/self/fd");

	CHECK(folder);
	while ((entry = readdir(folder)))
		found |= strcmp(entry->d_name, number) == 0;
	CHECK(found);
	closedir(folder);
	CHECK(statvfs(image, &system) == 0);
}

int main(int nr_words, char **words)
{
	char path[PATH_MAX];
	struct stat status;
	int folder, copy;

	CHECK(nr_words == 4);
	image = words[1];
	number = strrchr(image, '/') + 1;
	copy = open(words[2], O_RDONLY);
	CHECK(fstat(copy, &status) == 0 && read(copy, first, sizeof(first)) == sizeof(first));
	image_bytes = status.st_size;
	look_at(image);
	snprintf(path, sizeof(path), "/proc/%d/fd/%s", getpid(), number);
	look_at(path);
	snprintf(path, sizeof(path), "/dev/fd/%s", number);
	look_at(path);
	walk(image);
	look_through_others();
	look_around();
	look_at_links(words[3]);
	folder = open("/proc/self/fd", O_RDONLY | O_DIRECTORY);
	look_by(folder, number);
	CHECK(fchdir(folder) == 0);
	look_at(number);
	/* A child that closed it, and one to which the number is another file. */
	for (int i = 0; i < 2; i++) {
		pid_t child = fork();

		if (child == 0) {
			close(atoi(number));
			if (i)
				CHECK(dup2(copy, atoi(number)) >= 0);
			look_at(image);
			_exit(0);
		}
		CHECK(waitpid(child, &copy, 0) == child && copy == 0);
		copy = open(words[2], O_RDONLY);
	}
	return 0;
}
