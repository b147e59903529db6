/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest's fault thread: reads what the kernel reports and answers what it can by itself.
 *
 * One thread per guest.  A guest holds its own copy of its userfaultfd and may steal events from it or make
 * it blocking; a thread that waited for several guests could be stuck by one of them.  And a thread that
 * sleeps in the kernel is woken on a CPU near the guest that woke it, which is where its answer is cheapest.
 *
 * A faulting thread waits in the kernel, not here: a fault that cannot be answered now (the quota is used up, the
 * memory is changing) is dropped, and the guest's range is woken when a retry may succeed. Only waits for loads are
 * remembered, once per extent.
 */
#ifndef COWSHED_GUEST_H
#define COWSHED_GUEST_H

#include "accounting/core/ledger.h"
#include "cache/core/spin.h"
#include "faults/core/window.h"

#include <sys/types.h>

/* cdef-begin */
struct guest;

struct fault_options {
	uint32_t window_pages;       /* 0: adaptive; else a power of two: mapped per fault */
	uint32_t write_window_pages; /* 0: adaptive; else opened per write fault */
	uint32_t spin_ns;            /* look for the next fault this long before sleeping, while it pays */
};

/* Starts answering the faults of uffd, which covers the regions where the account has been placed. pidfd (or -1) is the
 * process that gets SIGBUS under QUOTA_KILL. Descriptors are borrowed until guest_stop. */
int guest_start(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                struct guest **guest_out);
/* Stops and joins the thread; afterwards nothing uses the descriptors or the account on its behalf. */
int guest_stop(struct guest *guest);
/* Poisons every page that is not in the guest's memory, for good: for a guest that will be left without any
 * userfaultfd. -errno if its page tables cannot be read; pages poisoned until then stay so. */
int guest_poison_absent(struct guest *guest);
/* Wakes all blocked faults, so that they are tried again: after its quota was changed. */
void guest_resume(struct guest *guest);
/* From its return until guest_thaw no private page is written: writes are not answered, and a discard waits in its
 * guest. Reads are answered, but while a discard waits only reads of mapped pages go on. -EOPNOTSUPP: the memory is
 * populated; -ETIMEDOUT: the guest's fault thread, or a change to its memory, does not end within a second. Cost: as
 * account_freeze, and a thread's wake-up. */
int guest_freeze(struct guest *guest);
/* Ends the freeze and wakes blocked faults. */
void guest_thaw(struct guest *guest);
/* The features a guest's userfaultfd must have been made with. */
uint64_t guest_uffd_features(void);
/* cdef-end */

/*
 * How a guest's faults are answered depends on its memory: mapped (of the frames) or populated (populate.h). The
 * guest's thread calls all but end, which is called after the thread was joined and no loader answers any more.
 */
struct guest_kind {
	void (*fault)(struct guest *guest, uint64_t address, uint64_t flags, uint64_t read_ns);
	void (*discard)(struct guest *guest, uint64_t start, uint64_t end, bool unmapped);
	void (*move)(struct guest *guest, uint64_t from, uint64_t to, uint64_t length);
	bool (*idle)(struct guest *guest); /* no fault waits: does some other work; returns whether there was any */
	void (*wake)(struct guest *guest); /* wakes all blocked faults */
	void (*end)(struct guest *guest);  /* NULL: nothing is to be done */
};

struct populate;
struct uffd_msg;

#define MESSAGES_MAX 16 /* answered in one pass: a flood cannot starve the idle work */

/*
 * waiting[e] is set while exactly one struct miss of this guest waits for extent e. nr_users is 1 for the owner plus 1
 * for each such miss. windows and ahead_* belong to the thread.
 */
struct guest {
	const struct guest_kind *kind;
	struct populate *populate; /* of a populated guest */
	struct account *account;
	struct image *image;
	int uffd, pidfd, kick_fd;
	pthread_t thread;
	_Atomic bool stop;
	_Atomic bool wake_wanted;
	_Atomic uint32_t window_pages, write_window_pages, spin_ns;

	pthread_mutex_t answer_lock; /* loaders against guest_stop; outside write_lock */
	bool stopped;                /* under answer_lock: descriptors and account are gone */
	_Atomic uint32_t nr_users;
	bits_word *waiting; /* by extent */

	struct window_state windows;
	uint64_t ahead_extent, nr_ahead;
	uint64_t retry_at_ns;  /* 0: nothing to retry */
	uint64_t wanted_pages; /* what a fault at the quota needs */
	uint64_t idle_at_ns;   /* if not 0: there may be idle work then */
	uint64_t drop_at_ns;   /* if not 0: the guest is dropped then, see remap.c */
	uint64_t drop_address;
	uint64_t preload_page;  /* the next preloaded page to copy ahead */
	uint64_t preload_at_ns; /* when that begins; 0: not known yet */
	struct guest_pause {    /* freeze.c */
		_Atomic bool wanted;
		bool on;          /* under lock: the thread has handled all events it read, and reads no more */
		bool events_wait; /* the thread's: only events wait to be read */
		pthread_mutex_t lock;
		pthread_cond_t changed;
	} pause;
	struct spin spin;
};

uint64_t clock_now_ns(void);

/* guest_start for a kind. */
int guest_start_kind(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                     const struct guest_kind *kind, struct populate *populate, struct guest **guest_out);

/* Wakes all blocked faults. */
void ask_again(struct guest *guest);
/* Reads up to nr_max messages; returns how many, or -errno. */
ssize_t read_messages(const struct guest *guest, struct uffd_msg *messages, size_t nr_max);
void guest_put(struct guest *guest);

#endif
