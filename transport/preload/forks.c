/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fork handlers.  Mappings are MADV_DONTFORK except during a fork that these handlers see.  A child of any other call
 * (clone(2), _Fork) has nothing mapped there, and gets SIGSEGV instead of zeros.  A child of vfork or posix_spawn
 * shares the parent's memory with its guard, see process.h.
 *
 * The lock is held, and the program's signal handlers wait, from before the fork until the parent's mappings are back
 * to DONTFORK and the child's are guarded.  Nothing else runs in the child before: it has one thread, and our fork
 * handler, registered when the program was loaded, is the first.
 */
#define _GNU_SOURCE
#include "transport/preload/forks.h"

#include <pthread.h>
#include <string.h>

#include "transport/preload/mapping.h"
#include "transport/preload/orphans.h"
#include "transport/preload/process.h"
#include "transport/preload/real.h"
#include "transport/preload/table.h"

/* Those of the thread that forks; guarded by the lock. */
static sigset_t signals_before;

/* False in another process's memory, where the suspended thread of that process shares this variable. */
static __thread bool is_own __attribute__((tls_model("initial-exec")));

static void advise_ranges(int advice)
{
	for (unsigned i = 0; i < table_nr_ranges; i++) {
		const struct range *range = &table_ranges[i];

		if (!range->no_fork && range->link_no != TABLE_NO_LINK)
			real_madvise((void *)range->start, range->end - range->start, advice);
	}
}

static void prepare(void)
{
	sigset_t before;

	is_own = process_kind() == PROCESS_OWN;
	if (!is_own)
		return;
	lock_take(&before);
	signals_before = before;
	advise_ranges(MADV_DOFORK);
}

static void go_on_in_parent(void)
{
	sigset_t before = signals_before;

	if (!is_own)
		return;
	advise_ranges(MADV_DONTFORK);
	lock_release(&before);
}

static void go_on_in_child(void)
{
	static struct range inherited[TABLE_MAX_RANGES];
	unsigned nr_inherited = table_nr_ranges;
	sigset_t before = signals_before;

	memcpy(inherited, table_ranges, nr_inherited * sizeof(inherited[0]));
	orphans_forget();
	table_forget_ranges();
	table_drop_links();
	process_begin();
	if (!is_own) {
		lock_renew();
		return;
	}
	lock_insist();
	for (unsigned i = 0; i < nr_inherited; i++) {
		if (inherited[i].no_fork)
			continue;
		if (inherited[i].link_no == TABLE_NO_LINK)
			table_add(inherited[i]);
		else
			mapping_inherit(inherited[i]);
	}
	lock_release(&before);
}

void forks_watch(void)
{
	pthread_atfork(prepare, go_on_in_parent, go_on_in_child);
}
