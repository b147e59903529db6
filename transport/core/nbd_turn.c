/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One turn of a connection: complete what came, send what is owed, receive, parse, dispatch.
 *
 * What was received and not used (part of a header, part of a page, requests beyond a limit) is carried to the next
 * turn in a buffer that exists only while there is something in it: an idle connection costs its struct.
 */
#define _GNU_SOURCE
#include "transport/core/nbd_state.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#define ROUNDS_MAX 64

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void nbd_turn_break(struct nbd_turn *turn, enum nbd_end reason, int err)
{
	struct nbd_connection *connection = turn->connection;

	if (connection->broken)
		return;
	connection->broken = connection->closing = true;
	connection->reason = reason;
	connection->err = err;
}

static void note_latency(struct nbd_export *export, enum nbd_latency kind, uint64_t duration_ns, uint64_t nr)
{
	count_add(&export->latency[kind][bucket_of(duration_ns)], nr);
	count_add(&export->latency_sum_ns[kind], duration_ns * nr);
}

struct nbd_op *nbd_op_new(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_op *op = malloc(sizeof *op);

	if (!op) {
		nbd_turn_break(turn, NBD_END_MEMORY, 0);
		return NULL;
	}
	*op = (struct nbd_op){
		.request = *request,
		.at = request->offset,
		.end = request->offset + request->length,
		.start_ns = turn->now_ns,
	};
	turn->connection->nr_ops++;
	return op;
}

void nbd_op_queue(struct nbd_turn *turn, struct nbd_op *op)
{
	struct nbd_connection *connection = turn->connection;

	*connection->longs_tail = op;
	connection->longs_tail = &op->next;
}

static void count_op(struct nbd_turn *turn, const struct nbd_op *op)
{
	struct nbd_counters *counts = &turn->counts;
	enum nbd_latency kind = NBD_LATENCY_WRITE;

	switch (op->request.type) {
	case NBD_CMD_READ:
		counts->reads++;
		counts->read_bytes += op->err ? 0 : op->request.length;
		kind = op->missed ? NBD_LATENCY_MISS : NBD_LATENCY_HIT;
		break;
	case NBD_CMD_WRITE:
		counts->writes++;
		counts->write_bytes += op->err ? 0 : op->request.length;
		break;
	case NBD_CMD_TRIM:
		counts->trims++;
		return;
	case NBD_CMD_WRITE_ZEROES:
		counts->zeroes++;
		return;
	case NBD_CMD_CACHE:
		counts->caches++;
		return;
	case NBD_CMD_FLUSH:
		counts->flushes++;
		kind = NBD_LATENCY_FLUSH;
		break;
	default:
		return;
	}
	note_latency(turn->connection->export, kind, clock_ns() - op->start_ns, 1);
}

void nbd_op_end(struct nbd_turn *turn, struct nbd_op *op)
{
	struct overlay *overlay = turn->connection->export->overlay;

	if (op->reserved)
		overlay_give(overlay, op->reserved);
	op->reserved = 0;
	if (!op->err && op->request.flags & NBD_CMD_FLAG_FUA && !op->synced && op_sync(turn, op))
		return;
	count_op(turn, op);
	if (!op->replied)
		reply_status(turn, &op->request, op->err);
	turn->connection->nr_ops--;
	free(op);
}

static bool is_write(const struct nbd_request *request)
{
	return request->type == NBD_CMD_WRITE || request->type == NBD_CMD_TRIM || request->type == NBD_CMD_WRITE_ZEROES;
}

/* What the protocol says to answer a request with; 0: do it. */
static int request_check(const struct nbd_connection *connection, const struct nbd_request *request)
{
	const struct nbd_negotiated *negotiated = &connection->negotiated;
	uint64_t size_bytes = connection->export->size_bytes;
	uint32_t flags = NBD_CMD_FLAG_FUA;

	switch (request->type) {
	case NBD_CMD_READ:
		flags |= negotiated->structured || negotiated->extended ? NBD_CMD_FLAG_DF : 0;
		break;
	case NBD_CMD_WRITE:
		flags |= negotiated->extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
		if (negotiated->extended && !(request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
			return -EINVAL;
		break;
	case NBD_CMD_WRITE_ZEROES:
		flags |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
		break;
	case NBD_CMD_BLOCK_STATUS:
		flags |= NBD_CMD_FLAG_REQ_ONE;
		if (!(negotiated->context_ids[0] | negotiated->context_ids[1] | negotiated->context_ids[2]))
			return -EINVAL;
		break;
	case NBD_CMD_FLUSH:
		return request->flags & ~flags || request->offset || request->length ? -EINVAL : 0;
	case NBD_CMD_TRIM:
	case NBD_CMD_CACHE:
		break;
	default:
		return -EINVAL;
	}
	if (request->flags & ~flags)
		return -EINVAL;
	if (is_write(request) && negotiated->read_only)
		return -EPERM;
	if (request->offset > size_bytes || request->length > size_bytes - request->offset)
		return is_write(request) && request->type != NBD_CMD_TRIM ? -ENOSPC : -EINVAL;
	if (request->length > negotiated->max_payload_bytes) {
		if (request->type == NBD_CMD_READ)
			return negotiated->structured || negotiated->extended ? -EOVERFLOW : -EINVAL;
		if (request->type == NBD_CMD_WRITE)
			return -EINVAL;
	}
	return 0;
}

static void dispatch(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_connection *connection = turn->connection;
	const struct nbd_negotiated *negotiated = &connection->negotiated;
	bool has_payload =
		negotiated->extended ? request->flags & NBD_CMD_FLAG_PAYLOAD_LEN : request->type == NBD_CMD_WRITE;

	if (request->type == NBD_CMD_DISC) {
		connection->closing = true;
		connection->reason = NBD_END_DISC;
		return;
	}
	if (has_payload && request->length > NBD_PAYLOAD_MAX) {
		nbd_turn_break(turn, NBD_END_PROTOCOL, 0);
		return;
	}
	int err = request_check(connection, request);
	if (has_payload) {
		write_begin(turn, request, err);
		return;
	}
	if (err || !(request->length || request->type == NBD_CMD_FLUSH)) { /* zero-length requests succeed */
		reply_status(turn, request, err);
		return;
	}
	switch (request->type) {
	case NBD_CMD_READ:
		read_begin(turn, request);
		break;
	case NBD_CMD_FLUSH:
		flush_begin(turn, request);
		break;
	case NBD_CMD_CACHE:
		cache_begin(turn, request);
		break;
	case NBD_CMD_BLOCK_STATUS:
		status_begin(turn, request);
		break;
	default:
		clear_begin(turn, request);
	}
}

static bool may_parse(const struct nbd_connection *connection)
{
	return !connection->closing && !connection->backlog && !connection->held &&
	       connection->nr_ops < OUTSTANDING_MAX && connection->buffered_bytes < BUFFERED_MAX;
}

/* Uses what was received, as far as it goes; true if it stopped for want of more. */
static bool parse(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	uint32_t nr_extents = PIECE_BYTES / (uint32_t)connection->export->extent_bytes + 2;
	size_t header_bytes = connection->negotiated.extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
	struct nbd_request request;

	while (may_parse(connection)) {
		if (!out_has_room(turn, PIECE_BYTES, nr_extents)) {
			out_send(turn);
			continue;
		}
		if (connection->payload) {
			size_t nr = write_take(turn, turn->in + turn->in_at, turn->in_end - turn->in_at);

			turn->in_at += nr;
			if (!nr)
				return !connection->held;
			continue;
		}
		if (turn->in_end - turn->in_at < header_bytes)
			return true;
		if (!wire_get_request(turn->in + turn->in_at, connection->negotiated.extended != 0, &request)) {
			nbd_turn_break(turn, NBD_END_PROTOCOL, 0);
			return false;
		}
		turn->in_at += header_bytes;
		dispatch(turn, &request);
	}
	return false;
}

/* Takes each long op a step on; whether one of them could go further at once. */
static bool step_longs(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	uint32_t nr_extents = PIECE_BYTES / (uint32_t)connection->export->extent_bytes + 2;
	bool more = false;

	for (struct nbd_op **at = &connection->longs, *op; (op = *at);) {
		enum nbd_step step = STEP_DONE;

		if (connection->backlog)
			return false; /* its end brings us back */
		if (!out_has_room(turn, PIECE_BYTES, nr_extents)) {
			out_send(turn);
			more = true;
			continue;
		}
		if (connection->broken)
			op->err = -ESHUTDOWN;
		else if (op->request.type == NBD_CMD_READ)
			step = read_step(turn, op);
		else if (op->request.type == NBD_CMD_CACHE)
			step = cache_step(turn, op);
		else
			step = clear_step(turn, op);
		more |= step == STEP_MORE;
		if (step != STEP_DONE) {
			at = &op->next;
			continue;
		}
		*at = op->next;
		if (!*at)
			connection->longs_tail = at;
		op->next = NULL;
		op->begun = true;
		if (!op->nr_pieces)
			nbd_op_end(turn, op);
	}
	return more;
}

/* Ends what can't be ended in the ordinary way, because the client is gone. */
static void abandon(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;

	if (connection->payload)
		write_cancel(turn);
	missing_abandon(connection);
	for (struct nbd_segment *segment; (segment = connection->backlog);) {
		connection->backlog = segment->next;
		if (segment->owner) {
			segment->owner->next = turn->out.spent;
			turn->out.spent = segment->owner;
		}
		free(segment);
	}
	connection->backlog_tail = &connection->backlog;
	pieces_finish(turn);
	step_longs(turn);
	turn->out.nr_iov = 0;
	out_release(turn);
	turn->in_at = turn->in_end = 0;
}

static void carry_out(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	size_t nr = turn->in_end - turn->in_at;

	assert(!connection->carry);
	if (!nr)
		return;
	connection->carry = malloc(nr);
	if (!connection->carry) {
		nbd_turn_break(turn, NBD_END_MEMORY, 0);
		abandon(turn);
		return;
	}
	memcpy(connection->carry, turn->in + turn->in_at, nr);
	connection->nr_carry = nr;
}

static void carry_in(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;

	turn->in_at = 0;
	turn->in_end = connection->nr_carry;
	if (connection->nr_carry)
		memcpy(turn->in, connection->carry, connection->nr_carry);
	free(connection->carry);
	connection->carry = NULL;
	connection->nr_carry = 0;
}

/* Receives what there is: how many bytes, 0 for none now; the end and errors are noted.  how: MSG_DONTWAIT, or 0 to
 * wait LINGER_US at most. */
static size_t receive(struct nbd_turn *turn, int how)
{
	struct nbd_connection *connection = turn->connection;

	if (turn->in_at) {
		memmove(turn->in, turn->in + turn->in_at, turn->in_end - turn->in_at);
		turn->in_end -= turn->in_at;
		turn->in_at = 0;
	}
	ssize_t nr = recv(connection->fd, turn->in + turn->in_end, IN_BYTES - turn->in_end, how);
	if (nr > 0) {
		turn->in_end += (size_t)nr;
		turn->now_ns = clock_ns();
		return (size_t)nr;
	}
	if (nr < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (nr < 0) {
		nbd_turn_break(turn, NBD_END_IO, -errno);
	} else if (turn->in_end || connection->payload) {
		nbd_turn_break(turn, NBD_END_EOF, 0); /* in the middle of a request */
	} else {
		connection->closing = true;
		connection->reason = NBD_END_EOF;
	}
	return 0;
}

/*
 * A client that was just answered mostly asks for more at once, so a thread stays with its connection for a moment
 * before it goes the longer way through epoll.  Only while there are fewer connections than threads, and not while
 * something is parked, whose end this thread would not hear of.
 */
static bool linger(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	struct nbd_server *server = turn->server;

	if (connection->nr_ops || connection->closing || connection->broken)
		return false;
	if (atomic_load_explicit(&server->nr_connections, memory_order_relaxed) >= server->nr_workers)
		return false;
	return receive(turn, 0) || connection->closing;
}

static void count_turn(struct nbd_turn *turn)
{
	struct nbd_export *export = turn->connection->export;
	const uint64_t *counts = (const uint64_t *)&turn->counts;

	for (size_t i = 0; i < NBD_COUNTS_NR; i++)
		if (counts[i])
			nbd_export_add(export, i, counts[i]);
	turn->counts = (struct nbd_counters){0};
	for (int kind = 0; kind < 2; kind++)
		if (turn->nr_hits[kind])
			note_latency(export, kind ? NBD_LATENCY_WRITE : NBD_LATENCY_HIT, clock_ns() - turn->now_ns,
			             turn->nr_hits[kind]);
	turn->nr_hits[0] = turn->nr_hits[1] = 0;
}

/* One round of answering; the events to wait for, or TURN_AGAIN to go on receiving. */
static uint32_t turn_round(struct nbd_turn *turn, bool *more_out)
{
	struct nbd_connection *connection = turn->connection;

	pthread_mutex_lock(&connection->lock);
	bool detached = connection->detached;
	pthread_mutex_unlock(&connection->lock);
	if (detached)
		nbd_turn_break(turn, NBD_END_DETACHED, 0);
	connection->held = false;
	pieces_complete(turn);
	*more_out = false;
	if (!connection->broken && out_send_backlog(turn) && !connection->broken) {
		pieces_finish(turn);
		bool starved = parse(turn);
		if (!connection->backlog)
			*more_out = step_longs(turn);
		out_send(turn);
		count_turn(turn);
		if (!connection->broken && !connection->backlog && !connection->completed && starved &&
		    !connection->closing)
			return TURN_AGAIN;
		if (!connection->broken && !connection->backlog && connection->completed)
			*more_out = true;
	}
	if (connection->broken)
		abandon(turn);
	if (connection->broken && connection->held) { /* what it holds back is not wanted any more */
		*more_out = true;
		return 0;
	}
	count_turn(turn);
	if (connection->closing && !connection->nr_ops && !connection->nr_pieces && !connection->backlog)
		return TURN_ENDED;
	return connection->backlog ? EPOLLOUT : 0;
}

uint32_t nbd_turn_run(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	uint32_t wanted = TURN_AGAIN;
	bool more = false;

	carry_in(turn);
	turn->now_ns = clock_ns();
	for (int rounds = 0; rounds < ROUNDS_MAX; rounds++) {
		wanted = turn_round(turn, &more);
		if (wanted != TURN_AGAIN) {
			if (!wanted && more)
				wanted = TURN_AGAIN;
			break;
		}
		if (receive(turn, MSG_DONTWAIT) || connection->closing)
			continue;
		if (!more && linger(turn))
			continue;
		wanted = more ? TURN_AGAIN : EPOLLIN;
		break;
	}
	if (wanted != TURN_ENDED)
		carry_out(turn);
	return wanted;
}
