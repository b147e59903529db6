/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose the table is, in a process that may share its memory or its descriptors with the one that filled it: a child of
 * vfork and posix_spawn has its parent's memory and descriptors of its own, and clone(2) makes every other kind.
 */
#ifndef COWSHED_PRELOAD_PROCESS_H
#define COWSHED_PRELOAD_PROCESS_H

enum process_kind {
	PROCESS_OWN,                  /* the table tells of this process, or this is a thread of its */
	PROCESS_IN_MEMORY_OF_ANOTHER, /* the table is another's: not to be changed, nor the mappings in it */
	PROCESS_WITH_FDS_OF_ANOTHER,  /* it has no mappings; the descriptors of the table are not to be moved or closed
	                               */
};

/* This process owns what is in its table from now on: at its start, and in a child of fork(3). */
void process_begin(void);

/* Costs a system call: for a hook that has found that it may concern the table.  A process that a bare clone(2) made
   has its copy of the table emptied here: the mappings do not come along. */
enum process_kind process_kind(void);

#endif
