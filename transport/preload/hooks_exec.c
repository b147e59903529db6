/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for running other programs.  They inherit this library by LD_PRELOAD, and some would end because of it: those
 * of another C library, whose linker honours the variable and does not find what the library needs, and those that
 * must load another library first.  For these the hooks take it out of the variable, whose other libraries stay; the
 * programs run as without us, and read the image's source.
 *
 * A hook may run in a child of vfork(2), in the parent's memory: it allocates nothing, and writes to the stack only.
 */
#define _GNU_SOURCE
#include "transport/preload/hooks_exec.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "transport/preload/programs.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"

#define VARIABLE "LD_PRELOAD="

#define RUNS(X)        \
	X(execve)      \
	X(execvpe)     \
	X(execveat)    \
	X(fexecve)     \
	X(posix_spawn) \
	X(posix_spawnp)
#define FOUND(name) static void *found_##name;
RUNS(FOUND)
#define NEXT(name) ((__typeof__(name) *)real_next(&found_##name, #name))

static const char *library; /* its name in LD_PRELOAD */

/* One of the calls that run a program, without the environment. */
struct run {
	enum { EXECVE, EXECVPE, EXECVEAT, FEXECVE, SPAWN, SPAWNP } call;
	int fd, flags;
	const char *path;
	char *const *words;
	pid_t *child_out;
	const posix_spawn_file_actions_t *actions;
	const posix_spawnattr_t *attributes;
};

static int go(const struct run *run, char *const *environment)
{
	switch (run->call) {
	case EXECVE:
		return NEXT(execve)(run->path, run->words, environment);
	case EXECVPE:
		return NEXT(execvpe)(run->path, run->words, environment);
	case EXECVEAT:
		return NEXT(execveat)(run->fd, run->path, run->words, environment, run->flags);
	case FEXECVE:
		return NEXT(fexecve)(run->fd, run->words, environment);
	case SPAWN:
		return NEXT(posix_spawn)(run->child_out, run->path, run->actions, run->attributes, run->words,
		                         environment);
	default:
		return NEXT(posix_spawnp)(run->child_out, run->path, run->actions, run->attributes, run->words,
		                          environment);
	}
}

/* Searches PATH as execvp(3) does. Returns a path in room (PATH_MAX bytes), or word itself if none is found. */
static const char *find_in_path(const char *word, char *room)
{
	const char *folder = getenv("PATH"), *end;
	struct stat status;

	if (strchr(word, '/'))
		return word;
	for (folder = folder ? folder : "/bin:/usr/bin";; folder = end + 1) {
		end = strchrnul(folder, ':');
		/* An empty entry is the current folder. */
		if ((size_t)(end - folder) + strlen(word) + 3 <= PATH_MAX) {
			snprintf(room, PATH_MAX, "%.*s/%s", end > folder ? (int)(end - folder) : 1,
			         end > folder ? folder : ".", word);
			if (real_fstatat(AT_FDCWD, room, &status, 0) == 0 && S_ISREG(status.st_mode) &&
			    (status.st_mode & 0111))
				return room;
		}
		if (!*end)
			return word;
	}
}

static bool takes_us(const struct run *run)
{
	char room[PATH_MAX];
	bool is_word = run->call == EXECVPE || run->call == SPAWNP;

	if (run->call == FEXECVE)
		return program_takes_us(run->fd, "", AT_EMPTY_PATH);
	return program_takes_us(run->fd, is_word ? find_in_path(run->path, room) : run->path, run->flags);
}

static bool has_us(const char *text)
{
	return strncmp(text, VARIABLE, strlen(VARIABLE)) == 0 && strstr(text, library);
}

/* Copies the variable without this library to room, as large as text; false if no other library is left. */
static bool take_us_out(const char *text, char *room)
{
	size_t length, own_length = strlen(library);
	char *end = stpcpy(room, VARIABLE);

	for (text += strlen(VARIABLE); *text; text += length) {
		text += strspn(text, " :");
		length = strcspn(text, " :");
		if (length == 0 || (length == own_length && strncmp(text, library, length) == 0))
			continue;
		if (end > room + strlen(VARIABLE))
			*end++ = ':';
		end = mempcpy(end, text, length);
	}
	*end = '\0';
	return end > room + strlen(VARIABLE);
}

static int run_plainly(const struct run *run, char *const *environment, size_t nr_variables, size_t nr_bytes)
{
	char *own[nr_variables + 1], room[nr_bytes];
	size_t nr_own = 0;

	for (; *environment; environment++) {
		if (!has_us(*environment))
			own[nr_own++] = *environment;
		else if (take_us_out(*environment, room))
			own[nr_own++] = room;
	}
	own[nr_own] = NULL;
	return go(run, own);
}

static int run_any(const struct run *run, char *const *environment)
{
	size_t nr_variables = 0, nr_bytes = 0, nr_ours = 0;

	if (!library || !environment || !run->path)
		return go(run, environment);
	for (; environment[nr_variables]; nr_variables++) {
		if (!has_us(environment[nr_variables]))
			continue;
		nr_bytes = strlen(environment[nr_variables]) + 1;
		nr_ours++;
	}
	/* The C library never sets a variable twice: let the linker decide. */
	if (nr_ours != 1 || takes_us(run))
		return go(run, environment);
	return run_plainly(run, environment, nr_variables, nr_bytes);
}

EXPORTED int execve(const char *path, char *const words[], char *const environment[])
{
	struct run run = {.call = EXECVE, .fd = AT_FDCWD, .path = path, .words = words};

	return run_any(&run, environment);
}

EXPORTED int execv(const char *path, char *const words[])
{
	return execve(path, words, environ);
}

EXPORTED int execvpe(const char *word, char *const words[], char *const environment[])
{
	struct run run = {.call = EXECVPE, .fd = AT_FDCWD, .path = word, .words = words};

	return run_any(&run, environment);
}

EXPORTED int execvp(const char *word, char *const words[])
{
	return execvpe(word, words, environ);
}

EXPORTED int execveat(int folder, const char *path, char *const words[], char *const environment[], int flags)
{
	struct run run = {.call = EXECVEAT, .fd = folder, .flags = flags, .path = path, .words = words};

	return run_any(&run, environment);
}

EXPORTED int fexecve(int fd, char *const words[], char *const environment[])
{
	struct run run = {.call = FEXECVE, .fd = fd, .path = "", .words = words};

	return run_any(&run, environment);
}

EXPORTED int posix_spawn(pid_t *child, const char *path, const posix_spawn_file_actions_t *actions,
                         const posix_spawnattr_t *attributes, char *const words[], char *const environment[])
{
	struct run run = {.call = SPAWN,
	                  .fd = AT_FDCWD,
	                  .path = path,
	                  .words = words,
	                  .child_out = child,
	                  .actions = actions,
	                  .attributes = attributes};

	return run_any(&run, environment);
}

EXPORTED int posix_spawnp(pid_t *child, const char *word, const posix_spawn_file_actions_t *actions,
                          const posix_spawnattr_t *attributes, char *const words[], char *const environment[])
{
	struct run run = {.call = SPAWNP,
	                  .fd = AT_FDCWD,
	                  .path = word,
	                  .words = words,
	                  .child_out = child,
	                  .actions = actions,
	                  .attributes = attributes};

	return run_any(&run, environment);
}

/* Collects the words of execl and its variants in an array; arguments goes on behind them. */
#define TAKE_WORDS(words, arguments, first)                                        \
	size_t nr_words = 0;                                                       \
	va_list arguments, counted;                                                \
                                                                                   \
	va_start(arguments, first);                                                \
	va_copy(counted, arguments);                                               \
	for (const char *word = first; word; word = va_arg(counted, const char *)) \
		nr_words++;                                                        \
	va_end(counted);                                                           \
	char *words[nr_words + 1];                                                 \
	words[0] = (char *)first;                                                  \
	for (size_t i = 1; i <= nr_words; i++)                                     \
	words[i] = va_arg(arguments, char *)

EXPORTED int execl(const char *path, const char *first, ...)
{
	TAKE_WORDS(words, arguments, first);
	va_end(arguments);
	return execve(path, words, environ);
}

EXPORTED int execlp(const char *word, const char *first, ...)
{
	TAKE_WORDS(words, arguments, first);
	va_end(arguments);
	return execvpe(word, words, environ);
}

EXPORTED int execle(const char *path, const char *first, ...)
{
	char *const *environment;

	TAKE_WORDS(words, arguments, first);
	environment = va_arg(arguments, char *const *);
	va_end(arguments);
	return execve(path, words, environment);
}

void exec_find(void)
{
	Dl_info found;

#define FIND(name) real_next(&found_##name, #name);
	RUNS(FIND)
	programs_learn();
	if (dladdr((void *)exec_find, &found))
		library = found.dli_fname;
}
