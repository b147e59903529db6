/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which process owns the table.  A process may share memory or descriptors with the owner: a child of vfork or
 * posix_spawn has its parent's memory and its own descriptors, and clone(2) makes every other kind.
 */
#ifndef COWSHED_PRELOAD_PROCESS_H
#define COWSHED_PRELOAD_PROCESS_H

enum process_kind {
	PROCESS_OWN,                  /* this process owns the table, or is as good as a thread of the owner */
	PROCESS_IN_MEMORY_OF_ANOTHER, /* another owns the table: change neither it nor the mappings in it */
	PROCESS_WITH_FDS_OF_ANOTHER,  /* there are no mappings; do not move or close the table's descriptors */
};

/* Makes this process the owner of its table: at its start, and in a child of fork(3). */
void process_begin(void);

/* Costs a system call, so hooks must first check whether they may concern the table.  In a process that a bare clone(2)
   made, which has no mappings, this empties the copy of the table. */
enum process_kind process_kind(void);

#endif
