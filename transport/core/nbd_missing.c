/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests for pages that are missing: still with the backend that the guest came from
 * (accounting/core/overlay/missing.h).
 *
 * A read waits, as one piece, until nothing of its range is missing, and then goes on as any other: pages are never
 * late again. A write of a part of a page waits as it does for the image's page.  Whole pages that are written, zeroed
 * or trimmed wait for nothing.
 */
#include "transport/core/nbd_state.h"

#include <errno.h>

static void piece_go(struct overlay_wait *wait, int status)
{
	struct nbd_piece *piece = (struct nbd_piece *)((char *)wait - offsetof(struct nbd_piece, missing));

	if (status)
		atomic_store(&piece->status, status);
	if (atomic_fetch_sub(&piece->nr_missing, 1) == 1)
		nbd_piece_ready(piece);
}

void piece_want_missing(struct nbd_piece *piece)
{
	piece->missing = (struct overlay_wait){
		.first = piece->offset >> 12,
		.end = (piece->offset + piece->length + 4095) >> 12,
		.owner = piece->connection,
		.go = piece_go,
	};
	atomic_fetch_add(&piece->nr_missing, 1);
	int state = overlay_await(piece->connection->export->overlay, &piece->missing);
	if (state != -EINPROGRESS)
		piece_go(&piece->missing, state);
}

int missing_look(const struct nbd_connection *connection, uint64_t offset, uint64_t length)
{
	struct overlay *overlay = connection->export->overlay;

	if (!overlay || !overlay_has_missing(overlay))
		return 0;
	return overlay_look_missing(overlay, offset >> 12, ((offset + length + 4095) >> 12) - (offset >> 12));
}

void missing_park(struct nbd_turn *turn, struct nbd_op *op, uint64_t offset, uint64_t length)
{
	struct nbd_piece *piece = piece_new(turn, op, PIECE_LATE, offset, (uint32_t)length, 0);

	if (!piece) {
		op->err = -ENOMEM;
		return;
	}
	op->missing = op->missed = true;
	piece_want_missing(piece);
	piece_wanted_all(piece);
}

void missing_abandon(struct nbd_connection *connection)
{
	if (connection->export->overlay)
		overlay_cancel_waits(connection->export->overlay, connection);
}
