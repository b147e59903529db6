/* SPDX-License-Identifier: Apache-2.0 */
/* runner PROGRAM WORD: runs PROGRAM with WORD in each way that the C library has; fails if one ends badly. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libgen.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char *program, *name, *word, **words;
static int folder;

static void by_execve(void)
{
	execve(program, words, environ);
}

static void by_execv(void)
{
	execv(program, words);
}

static void by_execvp(void)
{
	execvp(name, words);
}

static void by_execvp_in_current_folder(void)
{
	setenv("PATH", "/nowhere::/bin", 1);
	if (fchdir(folder) == 0)
		execvp(name, words);
}

static void by_execvpe(void)
{
	execvpe(name, words, environ);
}

static void by_execl(void)
{
	execl(program, program, word, NULL);
}

static void by_execlp(void)
{
	execlp(name, program, word, NULL);
}

static void by_execle(void)
{
	execle(program, program, word, NULL, environ);
}

static void by_execveat(void)
{
	execveat(folder, name, words, environ, 0);
}

static void by_execveat_of_a_descriptor(void)
{
	execveat(open(program, O_PATH), "", words, environ, AT_EMPTY_PATH);
}

static void by_fexecve(void)
{
	fexecve(open(program, O_RDONLY), words, environ);
}

static void by_shell(void)
{
	char line[9000];

	snprintf(line, sizeof(line), "exec %s %s", program, word);
	_exit(system(line) == 0 ? 0 : 1);
}

static void by_posix_spawn(void)
{
	pid_t child;
	int status = 1;

	if (posix_spawn(&child, program, NULL, NULL, words, environ) == 0)
		waitpid(child, &status, 0);
	_exit(status ? 1 : 0);
}

static void by_posix_spawnp(void)
{
	pid_t child;
	int status = 1;

	if (posix_spawnp(&child, name, NULL, NULL, words, environ) == 0)
		waitpid(child, &status, 0);
	_exit(status ? 1 : 0);
}

static void by_vfork(void)
{
	pid_t child = vfork();
	int status = 1;

	if (child == 0) {
		execve(program, words, environ);
		_exit(1);
	}
	waitpid(child, &status, 0);
	_exit(status ? 1 : 0);
}

#define WAY(name) {#name, name}
static const struct {
	const char *name;
	void (*run)(void);
} ways[] = {
	WAY(by_execve),      WAY(by_execv),
	WAY(by_execvp),      WAY(by_execvp_in_current_folder),
	WAY(by_execvpe),     WAY(by_execl),
	WAY(by_execlp),      WAY(by_execle),
	WAY(by_execveat),    WAY(by_execveat_of_a_descriptor),
	WAY(by_fexecve),     WAY(by_shell),
	WAY(by_posix_spawn), WAY(by_posix_spawnp),
	WAY(by_vfork),
};

int main(int nr_words, char **all)
{
	int nr_failed = 0;

	if (nr_words != 3)
		return 98;
	program = all[1];
	word = all[2];
	words = (char *[]){program, word, NULL};
	name = basename(strdup(program));
	folder = open(dirname(strdup(program)), O_PATH | O_DIRECTORY);
	setenv("PATH", dirname(strdup(program)), 1);
	for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
		pid_t child = fork();
		int status;

		if (child == 0) {
			ways[i].run();
			_exit(97);
		}
		if (waitpid(child, &status, 0) != child || status != 0) {
			printf("%s: status %#x\n", ways[i].name, (unsigned)status);
			nr_failed++;
		}
	}
	return nr_failed ? 1 : 0;
}
