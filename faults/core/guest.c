/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "faults/core/guest.h"

#include "accounting/core/open_regions.h"
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"
#include "faults/core/answer.h"
#include "faults/core/freeze.h"
#include "faults/core/preload.h"
#include "faults/core/remap.h"
#include "faults/core/uffd.h"
#include "faults/core/write.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define GUEST_STACK_BYTES (128u << 10)
#define STOPPED_RECHECK_NS 100000000u
#define LOOK_NS 2000000000u /* a lost kick costs at most that much */
uint64_t clock_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t guest_uffd_features(void)
{
	return COWSHED_UFFD_FEATURES;
}

void guest_put(struct guest *guest)
{
	if (atomic_fetch_sub(&guest->nr_users, 1) > 1)
		return;
	pthread_mutex_destroy(&guest->answer_lock);
	pthread_mutex_destroy(&guest->pause.lock);
	pthread_cond_destroy(&guest->pause.changed);
	free(guest->waiting);
	free(guest);
}

static void mapped_fault(struct guest *guest, uint64_t address, uint64_t flags, uint64_t read_ns)
{
	struct ledger_header *header = guest->account->header;
	uint64_t page;

	if (!account_page_at(guest->account, address, &page)) {
		answer_unknown_address(guest, address);
		return;
	}
	if (bits_test(guest->account->unmapped, page)) /* it mapped the image there again */
		bits_clear(guest->account->unmapped, page);
	if (account_is_open(guest->account, page)) {
		answer_in_open(guest, page, flags);
		return;
	}
	if (flags & UFFD_PAGEFAULT_FLAG_WP) {
		count_add(COUNTER(header, faults_write), 1);
		answer_write(guest, page, read_ns);
	} else {
		count_add(flags & UFFD_PAGEFAULT_FLAG_MINOR ? COUNTER(header, faults_minor)
		                                            : COUNTER(header, faults_missing),
		          1);
		answer_access(guest, page, flags, read_ns);
	}
}

static bool mapped_idle(struct guest *guest)
{
	return answer_ahead(guest) || preload_push(guest);
}

static void mapped_wake(struct guest *guest)
{
	answer_wake(guest, 0, guest->image->shape.nr_pages);
}

static const struct guest_kind mapped = {
	.fault = mapped_fault,
	.discard = answer_unmap,
	.move = answer_remap,
	.idle = mapped_idle,
	.wake = mapped_wake,
};

static void handle_message(struct guest *guest, const struct uffd_msg *message, uint64_t read_ns)
{
	const struct guest_kind *kind = guest->kind;

	switch (message->event) {
	case UFFD_EVENT_PAGEFAULT:
		kind->fault(guest, message->arg.pagefault.address, message->arg.pagefault.flags, read_ns);
		break;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		kind->discard(guest, message->arg.remove.start, message->arg.remove.end,
		              message->event == UFFD_EVENT_UNMAP);
		break;
	case UFFD_EVENT_REMAP:
		kind->move(guest, message->arg.remap.from, message->arg.remap.to, message->arg.remap.len);
		break;
	case UFFD_EVENT_FORK: /* not requested; the descriptor is ours to close all the same */
		close((int)message->arg.fork.ufd);
		break;
	default:
		break;
	}
}

_Static_assert(MESSAGES_MAX * sizeof(struct uffd_msg) <= LEDGER_INBOX_WORDS * sizeof(uint64_t), "the inbox has room");

/*
 * Messages are read into the ledger. A guest goes on with a discard as soon as its event was read: if we die then, our
 * successor still finds the event here. An earlier batch leaves only faults behind, which are reported again once they
 * are woken.
 */
static struct uffd_msg *inbox_of(const struct guest *guest)
{
	return (struct uffd_msg *)guest->account->header->inbox;
}

static void inbox_clear(struct uffd_msg *message)
{
	atomic_store_explicit((_Atomic uint8_t *)&message->event, 0, memory_order_release);
}

/* A move that was handled leaves no region at its old address. */
static bool is_moved(const struct guest *guest, const struct uffd_msg *message)
{
	struct region_table table;
	uint64_t from = message->arg.remap.from, first, nr;

	account_regions(guest->account, &table);
	for (uint64_t i = 0; i < table.nr; i++)
		if (region_clip(&table.regions[i], from, from + message->arg.remap.len, &first, &nr))
			return false;
	return true;
}

/* In the thread, before anything else: handles events that our predecessor read and may not have handled. */
static void inbox_go_on(struct guest *guest)
{
	struct uffd_msg *messages = inbox_of(guest);

	for (unsigned i = 0; i < MESSAGES_MAX; i++) {
		uint8_t event = messages[i].event;

		if (event == UFFD_EVENT_REMOVE || event == UFFD_EVENT_UNMAP ||
		    (event == UFFD_EVENT_REMAP && !is_moved(guest, &messages[i])))
			handle_message(guest, &messages[i], 0);
		inbox_clear(&messages[i]);
	}
}

/*
 * Handles other events before faults: once a discard has been read, its pages may be gone and mapped anew, and a write
 * window must not open one because of a charge that the discard is about to give back.
 */
static void handle_messages(struct guest *guest, struct uffd_msg *messages, ssize_t nr)
{
	uint64_t read_ns = clock_now_ns();

	for (ssize_t i = 0; i < nr; i++)
		if (messages[i].event != UFFD_EVENT_PAGEFAULT) {
			handle_message(guest, &messages[i], read_ns);
			inbox_clear(&messages[i]);
		}
	for (ssize_t i = 0; i < nr; i++)
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			handle_message(guest, &messages[i], read_ns);
}

/* Reads without waiting, even after the guest made the description blocking (Linux 6.10; before that, such a guest
 * blocks its own fault thread). */
ssize_t read_messages(const struct guest *guest, struct uffd_msg *messages, size_t nr_max)
{
	struct iovec room = {.iov_base = messages, .iov_len = nr_max * sizeof *messages};
	ssize_t got = preadv2(guest->uffd, &room, 1, -1, RWF_NOWAIT);

	if (got < 0 && errno == EOPNOTSUPP)
		got = read(guest->uffd, messages, room.iov_len);
	return got < 0 ? -errno : got / (ssize_t)sizeof *messages;
}

static ssize_t spin_for_messages(struct guest *guest, struct uffd_msg *messages)
{
	uint64_t spin_ns = atomic_load_explicit(&guest->spin_ns, memory_order_relaxed);
	ssize_t nr = -EAGAIN;

	if (!spin_ns || !spin_begin(&guest->spin))
		return nr;
	uint64_t end = clock_now_ns() + spin_ns;
	while (nr == -EAGAIN && clock_now_ns() < end)
		nr = read_messages(guest, messages, MESSAGES_MAX);
	spin_end(&guest->spin, nr > 0);
	return nr;
}

/* Whether it is time to wake blocked faults; if not, *room is the longest time that the thread may sleep. */
static bool retry_due(struct guest *guest, struct timespec *room)
{
	uint64_t now = clock_now_ns();

	if (!guest->retry_at_ns && atomic_load(&guest->account->header->stopped_since_ns))
		guest->retry_at_ns = now + STOPPED_RECHECK_NS;
	if (!guest->retry_at_ns)
		guest->retry_at_ns = guest->drop_at_ns;
	if (guest->retry_at_ns && guest->retry_at_ns <= now)
		return true;
	uint64_t until = guest->retry_at_ns;
	if (guest->idle_at_ns && (!until || guest->idle_at_ns < until))
		until = guest->idle_at_ns > now ? guest->idle_at_ns : now;
	guest->idle_at_ns = 0;
	if (!until || until > now + LOOK_NS)
		until = now + LOOK_NS;
	*room = (struct timespec){
		.tv_sec = (time_t)((until - now) / 1000000000u),
		.tv_nsec = (long)((until - now) % 1000000000u),
	};
	return false;
}

/* Wakes all blocked faults; those that still cannot be answered are reported again. */
void ask_again(struct guest *guest)
{
	guest->retry_at_ns = 0;
	account_end_stop(guest->account);
	guest->kind->wake(guest);
}

/* Charges for nothing in the quota's accounts are room too, and no other thread looks for them now. */
static bool has_room(const struct guest *guest)
{
	struct account *account = guest->account;

	if (!quota_has_room(account->quota, guest->wanted_pages)) {
		account_shrink(account);
		if (atomic_load(&account->quota->nr_accounts) > 1)
			account_settle_quota(account);
	}
	return quota_has_room(account->quota, guest->wanted_pages);
}

static void sleep_for_messages(struct guest *guest)
{
	struct pollfd fds[2] = {
		{.fd = guest->uffd, .events = POLLIN},
		{.fd = guest->kick_fd, .events = POLLIN},
	};
	struct timespec room;
	uint64_t kicks;

	if (guest->drop_at_ns && guest->drop_at_ns <= clock_now_ns())
		answer_drop(guest);
	if (retry_due(guest, &room)) {
		if (!atomic_load(&guest->account->header->stopped_since_ns) || has_room(guest))
			ask_again(guest);
		else
			guest->retry_at_ns = 0;
		return;
	}
	/* A descriptor that the guest made blocking polls as an error; the descriptor of a broken guest is not
	 * polled. */
	if (atomic_load(&guest->account->header->broken))
		fds[0].fd = -1;
	int nr = ppoll(fds, 2, &room, NULL);
	if (nr < 0)
		return;
	if (fds[0].revents & (POLLERR | POLLNVAL))
		answer_failed(guest, -EBADFD);
	bool kicked = fds[1].revents && read(guest->kick_fd, &kicks, sizeof kicks) > 0;
	if ((kicked || !nr) && atomic_exchange(&guest->wake_wanted, false))
		ask_again(guest);
}

static void *guest_main(void *arg)
{
	struct guest *guest = arg;
	struct uffd_msg *messages = inbox_of(guest);

	prctl(PR_SET_NAME, "cow-faults");
	prctl(PR_SET_TIMERSLACK, 1ul);
	inbox_go_on(guest);
	while (!atomic_load_explicit(&guest->stop, memory_order_acquire)) {
		bool paused = pause_turn(guest);
		ssize_t nr = -EAGAIN;

		if (!atomic_load_explicit(&guest->account->header->broken, memory_order_relaxed))
			nr = paused ? pause_read(guest, messages) : read_messages(guest, messages, MESSAGES_MAX);
		if (nr == -EAGAIN && guest->kind->idle(guest))
			continue;
		if (paused && (nr == -EAGAIN || nr == -EINTR)) {
			pause_sleep(guest);
			continue;
		}
		if (nr == -EAGAIN)
			nr = spin_for_messages(guest, messages);
		if (nr == -EAGAIN || nr == -EINTR) {
			sleep_for_messages(guest);
			continue;
		}
		if (nr <= 0) {
			answer_failed(guest, nr ? (int)nr : -EPIPE);
			continue;
		}
		point_reach(POINT_FAULT_READ);
		handle_messages(guest, messages, nr);
	}
	return NULL;
}

static int set_options(struct guest *guest, const struct fault_options *options)
{
	if (options->window_pages & (options->window_pages - 1) || options->window_pages > WINDOW_MAX_PAGES)
		return -EINVAL;
	if (options->write_window_pages > WINDOW_WRITE_MAX_PAGES)
		return -EINVAL;
	atomic_store(&guest->window_pages, options->window_pages);
	atomic_store(&guest->write_window_pages, options->write_window_pages);
	atomic_store(&guest->spin_ns, options->spin_ns);
	return 0;
}

static int thread_start(struct guest *guest)
{
	pthread_attr_t attr;
	int err = point_reach(POINT_GUEST_THREAD);

	if (err < 0)
		return err;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, GUEST_STACK_BYTES);
	err = pthread_create(&guest->thread, &attr, guest_main, guest);
	pthread_attr_destroy(&attr);
	return -err;
}

int guest_start(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                struct guest **guest_out)
{
	return guest_start_kind(account, uffd, pidfd, options, &mapped, NULL, guest_out);
}

int guest_start_kind(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                     const struct guest_kind *kind, struct populate *populate, struct guest **guest_out)
{
	struct guest *guest = calloc(1, sizeof *guest);
	int flags = fcntl(uffd, F_GETFL);

	if (!guest)
		return -ENOMEM;
	guest->wanted_pages = 1;
	guest->kind = kind;
	guest->populate = populate;
	guest->account = account;
	guest->image = account->image;
	guest->uffd = uffd;
	guest->pidfd = pidfd;
	spin_init(&guest->spin);
	guest->kick_fd = -1;
	atomic_store(&guest->nr_users, 1);
	pthread_mutex_init(&guest->answer_lock, NULL);
	pthread_mutex_init(&guest->pause.lock, NULL);
	pthread_cond_init(&guest->pause.changed, NULL);
	atomic_store(&guest->pause.wanted, account_is_frozen(account)); /* an adopted account may be frozen */
	guest->waiting = calloc(1, bits_bytes(guest->image->shape.nr_extents));
	int err = guest->waiting ? set_options(guest, options) : -ENOMEM;
	if (!err && (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK) < 0))
		err = -errno;
	if (!err && (guest->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0)
		err = -errno;
	if (!err) {
		atomic_store(&guest->image->repair, answer_repair);
		err = thread_start(guest);
	}
	if (err) {
		if (guest->kick_fd >= 0)
			close(guest->kick_fd);
		guest_put(guest);
		return err;
	}
	*guest_out = guest;
	return 0;
}

int guest_stop(struct guest *guest)
{
	atomic_store_explicit(&guest->stop, true, memory_order_release);
	store_raise_at(POINT_WAKE_GUEST, guest->kick_fd);
	pthread_join(guest->thread, NULL);
	pthread_mutex_lock(&guest->answer_lock);
	guest->stopped = true;
	pthread_mutex_unlock(&guest->answer_lock);
	close(guest->kick_fd);
	if (guest->kind->end)
		guest->kind->end(guest);
	guest_put(guest);
	return 0;
}

void guest_resume(struct guest *guest)
{
	atomic_store(&guest->wake_wanted, true);
	store_raise_at(POINT_WAKE_GUEST, guest->kick_fd);
}
