/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/nbd/slice.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

void out_refer(struct nbd_slice *slice, const void *at, size_t nr_bytes, struct blk_wait *owner)
{
	struct nbd_out *out = &slice->out;
	struct iovec *last = out->nr_iov ? &out->iov[out->nr_iov - 1] : NULL;

	out->bytes += nr_bytes;
	if (last && (const char *)last->iov_base + last->iov_len == at && out->owner[out->nr_iov - 1] == owner) {
		last->iov_len += nr_bytes;
		return;
	}
	assert(out->nr_iov < OUT_IOVECS);
	out->iov[out->nr_iov] = (struct iovec){.iov_base = (void *)(uintptr_t)at, .iov_len = nr_bytes};
	out->owner[out->nr_iov++] = owner;
}

uint8_t *out_reserve(struct nbd_slice *slice, size_t nr_bytes)
{
	uint8_t *at = slice->out.arena + slice->out.arena_used;

	assert(slice->out.arena_used + nr_bytes <= ARENA_BYTES);
	slice->out.arena_used += nr_bytes;
	out_refer(slice, at, nr_bytes, NULL);
	return at;
}

static void out_release(struct nbd_slice *slice)
{
	struct nbd_out *out = &slice->out;

	for (uint32_t i = 0; i < out->nr_holds; i++)
		extent_release(out->holds[i]);
	for (struct blk_wait *wait; (wait = out->spent);) {
		out->spent = wait->next;
		blk_wait_free(wait);
	}
	out->nr_holds = out->nr_iov = 0;
	out->bytes = out->arena_used = 0;
}

static void backlog_push(struct nbd_connection *connection, struct nbd_segment *segment)
{
	*connection->backlog_tail = segment;
	connection->backlog_tail = &segment->next;
}

/* A wait that is in the backlog is freed with its segment, not with this send. */
static void spent_forget(struct nbd_out *out, const struct blk_wait *wait)
{
	for (struct blk_wait **at = &out->spent; *at; at = &(*at)->next)
		if (*at == wait) {
			*at = wait->next;
			return;
		}
	assert(false);
}

/* Puts iovecs [i, nr_iov) into the backlog. Neighbours without an owner are copied together. */
static int backlog_keep(struct nbd_slice *slice, uint32_t i)
{
	struct nbd_out *out = &slice->out;

	while (i < out->nr_iov) {
		struct blk_wait *owner = out->owner[i];
		size_t nr = out->iov[i].iov_len;
		uint32_t end = i + 1;

		for (; !owner && end < out->nr_iov && !out->owner[end]; end++)
			nr += out->iov[end].iov_len;
		struct nbd_segment *segment = malloc(sizeof *segment + (owner ? 0 : nr));
		if (!segment)
			return -ENOMEM;
		*segment = (struct nbd_segment){
			.at = owner ? out->iov[i].iov_base : segment + 1, .nr = nr, .owner = owner};
		if (owner)
			spent_forget(out, owner);
		uint8_t *to = (uint8_t *)(segment + 1);
		for (; i < end; i++)
			if (!owner)
				to = (uint8_t *)memcpy(to, out->iov[i].iov_base, out->iov[i].iov_len) +
				     out->iov[i].iov_len;
		backlog_push(slice->connection, segment);
	}
	return 0;
}

void out_send(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	struct nbd_out *out = &slice->out;
	uint32_t first = 0;

	while (first < out->nr_iov && !connection->queue.broken && !connection->backlog) {
		struct msghdr message = {.msg_iov = out->iov + first, .msg_iovlen = out->nr_iov - first};
		ssize_t sent = sendmsg(connection->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno != EAGAIN) {
			nbd_slice_break(slice, NBD_END_IO, -errno);
			break;
		}
		for (size_t left = sent < 0 ? 0 : (size_t)sent; left;) {
			struct iovec *iov = &out->iov[first];
			size_t nr = left < iov->iov_len ? left : iov->iov_len;

			iov->iov_base = (char *)iov->iov_base + nr;
			iov->iov_len -= nr;
			left -= nr;
			first += iov->iov_len == 0;
		}
		if (first < out->nr_iov && sent < 0 && backlog_keep(slice, first) < 0)
			nbd_slice_break(slice, NBD_END_MEMORY, 0);
	}
	out_release(slice);
}

bool out_send_backlog(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;

	for (struct nbd_segment *segment; (segment = connection->backlog) && !connection->queue.broken;) {
		ssize_t sent = send(connection->fd, segment->at, segment->nr, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN)
			return false;
		if (sent < 0) {
			nbd_slice_break(slice, NBD_END_IO, -errno);
			break;
		}
		segment->at += sent;
		segment->nr -= (size_t)sent;
		if (segment->nr)
			continue;
		connection->backlog = segment->next;
		if (!connection->backlog)
			connection->backlog_tail = &connection->backlog;
		if (segment->owner)
			blk_wait_free(segment->owner);
		free(segment);
	}
	return true;
}

void out_segments_free(struct nbd_connection *connection)
{
	for (struct nbd_segment *segment; (segment = connection->backlog);) {
		connection->backlog = segment->next;
		if (segment->owner)
			blk_wait_free(segment->owner);
		free(segment);
	}
	connection->backlog_tail = &connection->backlog;
}

void out_drop(struct nbd_slice *slice)
{
	out_segments_free(slice->connection);
	slice->out.nr_iov = 0;
	out_release(slice);
}

void reply_chunk(struct nbd_slice *slice, const struct nbd_request *request, uint16_t type, uint64_t length, bool done)
{
	bool extended = slice->connection->negotiated.extended;
	uint8_t *to = out_reserve(slice, extended ? NBD_EXTENDED_CHUNK_BYTES : NBD_CHUNK_BYTES);

	to = wire_put32(to, extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
	to = wire_put16(to, done ? NBD_REPLY_FLAG_DONE : 0);
	to = wire_put16(to, type);
	to = wire_put_raw64(to, request->cookie);
	if (extended)
		wire_put64(wire_put64(to, request->offset), length);
	else
		wire_put32(to, (uint32_t)length);
}

void reply_status(struct nbd_slice *slice, const struct nbd_request *request, int err)
{
	const struct nbd_negotiated *negotiated = &slice->connection->negotiated;

	if (slice->connection->queue.broken)
		return;
	slice->counts.errors += err != 0;
	if (err && (negotiated->structured || negotiated->extended)) {
		reply_chunk(slice, request, NBD_REPLY_TYPE_ERROR, 6, true);
		wire_put16(wire_put32(out_reserve(slice, 6), wire_error(err)), 0);
	} else if (negotiated->extended || (negotiated->structured && request->type == NBD_CMD_READ)) {
		reply_chunk(slice, request, NBD_REPLY_TYPE_NONE, 0, true);
	} else {
		uint8_t *to = out_reserve(slice, NBD_SIMPLE_REPLY_BYTES);

		to = wire_put32(to, NBD_SIMPLE_REPLY_MAGIC);
		wire_put_raw64(wire_put32(to, err ? wire_error(err) : 0), request->cookie);
	}
}

void reply_data(struct nbd_slice *slice, const struct nbd_request *request, uint64_t offset, uint32_t length, bool done)
{
	if (slice->connection->negotiated.structured || slice->connection->negotiated.extended) {
		reply_chunk(slice, request, NBD_REPLY_TYPE_OFFSET_DATA, (uint64_t)length + 8, done);
		wire_put64(out_reserve(slice, 8), offset);
	} else {
		reply_status(slice, request, 0);
	}
}
