/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One slice of a connection: collect ready waits, send replies, receive, parse, submit.
 *
 * Bytes that were received and not used (part of a header, part of a page, requests beyond a limit) are carried to the
 * next slice in a buffer that exists only while it has bytes: an idle connection costs only its struct.
 */
#define _GNU_SOURCE
#include "transport/core/nbd/server.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define ROUNDS_MAX 64
#define SPIN_NS 30000 /* longer than the client takes to wake up, and to ask */

void nbd_slice_break(struct nbd_slice *slice, enum nbd_end reason, int err)
{
	struct nbd_connection *connection = slice->connection;

	if (connection->queue.broken)
		return;
	connection->queue.broken = connection->closing = true;
	connection->reason = reason;
	connection->err = err;
}

/* The client is gone: ends all that can end, and drops all that would be sent. */
static void abandon(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	struct nbd_submitted *payload = connection->payload;

	connection->payload = NULL;
	if (payload)
		blk_write_cancel(&connection->queue, &payload->block);
	out_drop(slice);
	blk_queue_abandon(&connection->queue);
	out_drop(slice);
	slice->in_at = slice->in_end = 0;
}

static void carry_out(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	size_t nr = slice->in_end - slice->in_at;

	assert(!connection->carry);
	if (!nr)
		return;
	connection->carry = malloc(nr);
	if (!connection->carry) {
		nbd_slice_break(slice, NBD_END_MEMORY, 0);
		abandon(slice);
		return;
	}
	memcpy(connection->carry, slice->in + slice->in_at, nr);
	connection->nr_carry = nr;
}

static void carry_in(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;

	slice->in_at = 0;
	slice->in_end = connection->nr_carry;
	if (connection->nr_carry)
		memcpy(slice->in, connection->carry, connection->nr_carry);
	free(connection->carry);
	connection->carry = NULL;
	connection->nr_carry = 0;
}

/* Receives what there is; returns how many bytes, 0 for none now. Notes the end and errors.  how: MSG_DONTWAIT, or 0
 * to wait LINGER_US at most. */
static size_t receive(struct nbd_slice *slice, int how)
{
	struct nbd_connection *connection = slice->connection;

	if (slice->in_at) {
		memmove(slice->in, slice->in + slice->in_at, slice->in_end - slice->in_at);
		slice->in_end -= slice->in_at;
		slice->in_at = 0;
	}
	ssize_t nr = recv(connection->fd, slice->in + slice->in_end, IN_BYTES - slice->in_end, how);
	if (nr > 0) {
		slice->in_end += (size_t)nr;
		slice->now_ns = clock_ns();
		return (size_t)nr;
	}
	if (nr < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (nr < 0) {
		nbd_slice_break(slice, NBD_END_IO, -errno);
	} else if (slice->in_end || connection->payload) {
		nbd_slice_break(slice, NBD_END_EOF, 0); /* in the middle of a request */
	} else {
		connection->closing = true;
		connection->reason = NBD_END_EOF;
	}
	return 0;
}

/* Looks for bytes without sleeping. Not while other threads serve: they, and their clients, need the CPU. */
static bool spin_receive(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	uint64_t end = clock_ns() + SPIN_NS;
	bool found;

	if (atomic_load_explicit(&slice->server->nr_serving, memory_order_relaxed) > 1 ||
	    !spin_begin(&connection->spin))
		return false;
	do {
		found = receive(slice, MSG_DONTWAIT) || connection->closing;
	} while (!found && clock_ns() < end);
	spin_end(&connection->spin, found);
	return found;
}

/*
 * A client that was just answered mostly asks for more at once, so a thread stays with its connection for a moment
 * before it goes the longer way through epoll.  Only while there are fewer connections than threads, and not while
 * a request waits, whose end this thread would not notice.
 */
static bool linger(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	struct nbd_server *server = slice->server;

	if (connection->queue.nr_requests || connection->closing || connection->queue.broken)
		return false;
	if (atomic_load_explicit(&server->nr_connections, memory_order_relaxed) >= server->nr_workers)
		return false;
	return spin_receive(slice) || receive(slice, 0) || connection->closing;
}

static void count_slice(struct nbd_slice *slice)
{
	struct blk_queue *queue = &slice->connection->queue;
	struct nbd_export *export = slice->connection->export;
	const uint64_t *counts = (const uint64_t *)&slice->counts;

	slice->counts.hits = queue->nr_hits;
	slice->counts.misses = queue->nr_misses;
	queue->nr_hits = queue->nr_misses = 0;
	for (size_t i = 0; i < NBD_COUNTS_NR; i++)
		if (counts[i])
			nbd_export_add(export, i, counts[i]);
	slice->counts = (struct nbd_counters){0};
	for (int kind = 0; kind < NBD_LATENCY_NR; kind++) {
		if (slice->nr_prompt[kind])
			nbd_export_time(export, kind, clock_ns() - slice->now_ns, slice->nr_prompt[kind]);
		slice->nr_prompt[kind] = 0;
	}
}

/* Runs one round of answering; returns the events to wait for, or SLICE_AGAIN to go on receiving. */
static uint32_t slice_round(struct nbd_slice *slice, bool *more_out)
{
	struct nbd_connection *connection = slice->connection;

	pthread_mutex_lock(&connection->lock);
	bool detached = connection->detached;
	pthread_mutex_unlock(&connection->lock);
	if (detached)
		nbd_slice_break(slice, NBD_END_DETACHED, 0);
	blk_queue_collect(&connection->queue);
	*more_out = false;
	if (!connection->queue.broken && out_send_backlog(slice) && !connection->queue.broken) {
		blk_queue_give(&connection->queue);
		bool starved = nbd_parse(slice);
		if (!connection->backlog)
			*more_out = blk_queue_step(&connection->queue);
		out_send(slice);
		count_slice(slice);
		if (!connection->queue.broken && !connection->backlog && !connection->queue.finished && starved &&
		    !connection->closing)
			return SLICE_AGAIN;
		if (!connection->queue.broken && !connection->backlog && connection->queue.finished)
			*more_out = true;
	}
	if (connection->queue.broken)
		abandon(slice);
	if (connection->queue.broken && connection->queue.frozen) { /* do not wait for the thaw: the client is gone */
		*more_out = true;
		return 0;
	}
	count_slice(slice);
	if (connection->closing && !connection->queue.nr_requests && !connection->queue.nr_waits &&
	    !connection->backlog)
		return SLICE_ENDED;
	return connection->backlog ? EPOLLOUT : 0;
}

uint32_t nbd_slice_run(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	uint32_t wanted = SLICE_AGAIN;
	bool more = false;

	carry_in(slice);
	slice->now_ns = clock_ns();
	for (int rounds = 0; rounds < ROUNDS_MAX; rounds++) {
		wanted = slice_round(slice, &more);
		if (wanted != SLICE_AGAIN) {
			if (!wanted && more)
				wanted = SLICE_AGAIN;
			break;
		}
		if (receive(slice, MSG_DONTWAIT) || connection->closing)
			continue;
		if (!more && linger(slice))
			continue;
		wanted = more ? SLICE_AGAIN : EPOLLIN;
		break;
	}
	if (wanted != SLICE_ENDED)
		carry_out(slice);
	return wanted;
}
