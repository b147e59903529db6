/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One-line reports on stderr of what the library cannot do.
 *
 * They go to the stderr that the program was started with, while that is its descriptor 2.  The library keeps no
 * duplicate, which would hold a pipe open that the program closes.
 */
#ifndef COWSHED_PRELOAD_REPORT_H
#define COWSHED_PRELOAD_REPORT_H

#include <stdbool.h>

/* Remembers what stderr is now. Reports before this are dropped. */
void report_begin(void);

/* Writes one line, "cowshed: attach: ...", without locks or allocation.  Drops it if descriptor 2 is another file or
   would block; never waits, raises no SIGPIPE, keeps errno. */
__attribute__((format(printf, 1, 2))) void report(const char *format, ...);

/* While on, stores this thread's reports instead of writing them, for callers that retry. report_kept returns the last
   one, or "". Turn it on only with the lock held. */
void report_keep(bool on);
const char *report_kept(void);

#endif
