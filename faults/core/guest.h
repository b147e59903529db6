/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest's fault thread: reads what the kernel reports and answers what it can by itself.
 *
 * One thread per guest.  A guest holds its own copy of its userfaultfd and may steal events from it or make
 * it blocking; a thread that waited for several guests could be stuck by one of them.  And a thread that
 * sleeps in the kernel is woken on a CPU near the guest that woke it, which is where its answer is cheapest.
 *
 * Whoever faults waits in the kernel, not here: what cannot be answered now (the quota is used up, the
 * memory is changing) is dropped, and the guest's range is woken when it is worth asking again.  The only
 * thing remembered per fault is who waits for a load, once per extent.
 */
#ifndef COWSHED_GUEST_H
#define COWSHED_GUEST_H

#include "accounting/core/ledger.h"
#include "faults/core/window.h"

#include <sys/types.h>

/* cdef-begin */
struct guest;

struct fault_options {
	uint32_t window_pages;       /* 0: adaptive; else a power of two: mapped per fault */
	uint32_t write_window_pages; /* 0: adaptive; else opened per write fault */
	uint32_t spin_ns;            /* look for the next fault this long before sleeping, while it pays */
};

/* Starts answering the faults of uffd, which covers the regions where the account has been placed.  pidfd (or -1) is
 * who gets SIGBUS under QUOTA_KILL.  Descriptors are borrowed until guest_stop. */
int guest_start(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                struct guest **guest_out);
/* Stops and joins the thread; afterwards nobody uses the descriptors or the account on its behalf. */
int guest_stop(struct guest *guest);
/* Poisons every page that the guest does not have, for good: for a guest that is to be left without any userfaultfd.
 * -errno if its memory cannot be looked at; pages poisoned until then stay so. */
int guest_poison_absent(struct guest *guest);
/* Asks again everybody who waits: after its quota was changed. */
void guest_resume(struct guest *guest);
/* From its return until guest_thaw nothing is written to a private page: writes are not answered, and a discard waits
 * in its guest.  Reads are answered, but while a discard waits those only that need no answer.  -EOPNOTSUPP: the memory
 * is populated; -ETIMEDOUT: the guest's fault thread, or a change to its memory, does not come to an end.  Cost: as
 * account_freeze, and a thread's wake-up. */
int guest_freeze(struct guest *guest);
/* Ends the freeze and wakes blocked faults. */
void guest_thaw(struct guest *guest);
/* The features a guest's userfaultfd must have been made with. */
uint64_t guest_uffd_features(void);
/* cdef-end */

/*
 * What a guest's memory is decides how it is answered: mapped (of the frames) or populated (populate.h).  All are
 * called by the guest's thread, but end: after that has been joined and no loader answers any more.
 */
struct guest_kind {
	void (*fault)(struct guest *guest, uint64_t address, uint64_t flags, uint64_t read_ns);
	void (*discard)(struct guest *guest, uint64_t start, uint64_t end, bool unmapped);
	void (*move)(struct guest *guest, uint64_t from, uint64_t to, uint64_t length);
	bool (*idle)(struct guest *guest); /* no fault waits: does a bit of other work; whether there was any */
	void (*wake)(struct guest *guest); /* whoever waits for an answer asks again */
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
	uint64_t idle_at_ns;   /* 0: else there may be idle work then */
	uint64_t drop_at_ns;   /* 0: served; else it is dropped then, see remap.c */
	uint64_t drop_address;
	uint64_t preload_page; /* where to go on copying preloaded pages that nobody asked for */
	struct guest_pause {   /* freeze.c */
		_Atomic bool wanted;
		bool on;          /* under lock: the thread has left no event half answered, and reads none */
		bool events_wait; /* the thread's: nothing but an event is there to be read */
		pthread_mutex_t lock;
		pthread_cond_t changed;
	} pause;
	int32_t spin_credit;
	uint32_t nr_sleeps;
};

uint64_t clock_now_ns(void);

/* guest_start for a kind. */
int guest_start_kind(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                     const struct guest_kind *kind, struct populate *populate, struct guest **guest_out);

/* write.c.  Under write_lock: takes up to nr_wanted pages from the quota, having looked for charges to return first. */
uint64_t account_take_pages(struct account *account, uint64_t nr_wanted);
/* With no lock held: whether charges of the quota's other accounts turned out to be for nothing. */
bool quota_settle_others(struct account *account);
/* The guest's writer stops at the quota, or its process gets SIGBUS. */
void quota_refuse(struct guest *guest);

/* Answers a missing or minor fault (answer.c; flags are UFFD_PAGEFAULT_FLAG_*) or a write fault (write.c) on page. */
void answer_access(struct guest *guest, uint64_t page, uint64_t flags, uint64_t read_ns);
void answer_write(struct guest *guest, uint64_t page, uint64_t read_ns);
/* Charges and opens the write window of a page that is mapped: 0, -EDQUOT if the guest is at its quota, or another
 * error that was seen to. */
int answer_open(struct guest *guest, uint64_t page);
/* The guest gave pages back (madvise) or unmapped them. */
void answer_discard(struct guest *guest, uint64_t first, uint64_t nr, bool unmapped);
/* A first write to a page nobody mapped yet; the extent is held.  0: answered; -ENOTSUP: the page is to be mapped and
 * opened; -EDQUOT: the guest is at its quota. */
int write_first(struct guest *guest, uint64_t page);
/* Whoever waits for one of the pages asks again. */
void answer_wake(struct guest *guest, uint64_t first, uint64_t nr);
/* Under the account's write_lock: SIGBUS for who touches the page, which nobody mapped. */
int answer_poison(struct guest *guest, uint64_t page);
/* Maps a part of ahead_*; whether there was anything to do. */
bool answer_ahead(struct guest *guest);
/* The guest moved some of its memory; unmapped some; faulted at an address where it has nothing of ours (remap.c). */
void answer_remap(struct guest *guest, uint64_t from, uint64_t to, uint64_t length);
void answer_unmap(struct guest *guest, uint64_t start, uint64_t end, bool unmapped);
void answer_unknown_address(struct guest *guest, uint64_t address);
/* It is time to drop a guest that moved its memory in too many pieces. */
void answer_drop(struct guest *guest);
/* preload.c.  A fault on a page; true if it was a preloaded one's, and is seen to. */
bool answer_preloaded(struct guest *guest, uint64_t page, uint64_t read_ns);
/* Copies some preloaded pages that nobody asked for yet; whether there were any. */
bool preload_push(struct guest *guest);

/* freeze.c, the thread's part.  Between two batches of messages: whether discards are held back. */
bool pause_turn(struct guest *guest);
/* One fault, and never an event; -EAGAIN if there is none. */
ssize_t pause_read(struct guest *guest, struct uffd_msg *message);
void pause_sleep(struct guest *guest);

/* image->repair: a failed extent was loaded after all. */
void answer_repair(struct image *image, uint64_t extent);
/* Sorts out an ioctl's error: retry later, broken guest, or nothing. */
void answer_failed(struct guest *guest, int err);
/* guest.c: everybody who waits for an answer tries again. */
void ask_again(struct guest *guest);
/* guest.c: up to nr_max messages; how many, or -errno. */
ssize_t read_messages(const struct guest *guest, struct uffd_msg *messages, size_t nr_max);
void guest_put(struct guest *guest);

#endif
