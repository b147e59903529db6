/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one line on stderr in which the library says what it cannot do.
 *
 * It goes to the stderr that the program was started with, while that is its descriptor 2.  The library keeps no
 * duplicate, which would hold a pipe open that the program closes.
 */
#ifndef COWSHED_PRELOAD_REPORT_H
#define COWSHED_PRELOAD_REPORT_H

#include <stdbool.h>

/* Remembers what stderr is now. Before this nothing is said. */
void report_begin(void);

/* One line, "cowshed: attach: ...", without locks and without memory.  It is dropped if descriptor 2 is something else,
   or takes nothing just now; it never waits, and raises no SIGPIPE.  Keeps errno. */
__attribute__((format(printf, 1, 2))) void report(const char *format, ...);

/* While this is on, what this thread says is kept and not shown: for who tries again and again. report_kept gives the
   last of it, "" if there was none since. */
void report_keep(bool on);
const char *report_kept(void);

#endif
