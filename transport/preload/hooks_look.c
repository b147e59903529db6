/* SPDX-License-Identifier: Apache-2.0 */
/* What the program asks about a path before it opens it. To all the image's source is a file that only can be read. */
#define _GNU_SOURCE
#include "transport/preload/hooks_look.h"

#include <errno.h>
#include <unistd.h>

#include "transport/preload/real.h"
#include "transport/preload/terms.h"

static void *found_faccessat;

/* Whether a path leads to the image's source. Keeps errno. */
static bool leads_to_image(int folder, const char *path, int flags)
{
	struct stat status;
	int saved = errno;
	bool is_image;

	is_image = real_fstatat(folder, path, &status, flags & (AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)) == 0 &&
		   terms_is_image(&status);
	errno = saved;
	return is_image;
}

/* As a read-only file system answers. */
EXPORTED int faccessat(int folder, const char *path, int mode, int flags)
{
	__typeof__(faccessat) *next = (__typeof__(faccessat) *)real_next(&found_faccessat, "faccessat");

	if (terms.active && !lock_is_inside() && (mode & W_OK) && leads_to_image(folder, path, flags)) {
		errno = EROFS;
		return -1;
	}
	return next(folder, path, mode, flags);
}

EXPORTED int access(const char *path, int mode)
{
	return faccessat(AT_FDCWD, path, mode, 0);
}

EXPORTED int euidaccess(const char *path, int mode)
{
	return faccessat(AT_FDCWD, path, mode, AT_EACCESS);
}

EXPORTED int eaccess(const char *path, int mode) __attribute__((alias("euidaccess"), nonnull(1)));

void look_find(void)
{
	real_next(&found_faccessat, "faccessat");
}
