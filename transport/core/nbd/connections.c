/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections: how they come, are found, and end.
 *
 * A connection is found by its number, never by a pointer: an event of epoll may be read after it has ended.
 */
#define _GNU_SOURCE
#include "cache/core/points.h"
#include "transport/core/nbd/server.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define SLOTS_MAX 65536u
#define LINGER_US 2000 /* a worker waits with its connection (slice.c) */

struct nbd_connection *nbd_server_find(struct nbd_server *server, uint64_t connection_no)
{
	uint32_t slot = (uint32_t)connection_no;

	if (slot >= server->nr_slots || !server->slots[slot] || server->slots[slot]->connection_no != connection_no)
		return NULL;
	return server->slots[slot];
}

static void wake(struct nbd_connection *connection)
{
	if (connection->running)
		connection->again = true;
	else
		nbd_ready_push(connection);
}

void nbd_connection_wake(struct nbd_connection *connection)
{
	pthread_mutex_lock(&connection->lock);
	wake(connection);
	pthread_mutex_unlock(&connection->lock);
}

void nbd_connection_detach(struct nbd_connection *connection)
{
	pthread_mutex_lock(&connection->lock);
	connection->detached = true;
	shutdown(connection->fd, SHUT_RDWR); /* wakes a thread that waits on it; the next slice ends it */
	wake(connection);
	pthread_mutex_unlock(&connection->lock);
}

void nbd_connection_free(struct nbd_connection *connection)
{
	out_segments_free(connection);
	free(connection->carry);
	pthread_mutex_destroy(&connection->lock);
	free(connection);
}

void nbd_connection_end(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;
	struct nbd_ended ended = {
		.connection_no = connection->connection_no,
		.err = connection->err,
		.reason = connection->reason,
	};

	blk_queue_deinit(&connection->queue);
	epoll_ctl(server->epoll_fd, EPOLL_CTL_DEL, connection->fd, NULL);
	pthread_mutex_lock(&server->lock);
	close(connection->fd); /* under the lock: nbd_detach must not shut down a descriptor that is used again */
	server->slots[(uint32_t)connection->connection_no] = NULL;
	connection->export->nr_connections--;
	server->ended[server->nr_ended++] = ended;
	if (--server->nr_connections == 0)
		pthread_cond_broadcast(&server->idle);
	pthread_mutex_unlock(&server->lock);
	pthread_mutex_lock(&connection->lock); /* wait for a thread that found it in the table */
	pthread_mutex_unlock(&connection->lock);
	nbd_ready_forget(connection);
	nbd_connection_free(connection);
	store_raise_at(POINT_WAKE_NBD_ENDED, server->event_fd);
}

/* Finds room for one connection more, and for the report of its end. The caller must hold server->lock. */
static int slot_take(struct nbd_server *server, uint32_t *slot_out)
{
	uint32_t slot = 0;

	while (slot < server->nr_slots && server->slots[slot])
		slot++;
	if (slot == server->nr_slots) {
		uint32_t nr = server->nr_slots ? 2 * server->nr_slots : 64;
		if (server->nr_slots >= SLOTS_MAX)
			return -EMFILE;
		struct nbd_connection **slots = realloc(server->slots, nr * sizeof *slots);
		if (!slots)
			return -ENOMEM;
		memset(slots + server->nr_slots, 0, (nr - server->nr_slots) * sizeof *slots);
		server->slots = slots;
		server->nr_slots = nr;
	}
	uint64_t room = server->nr_ended + server->nr_connections + 1;
	if (room > server->ended_room) {
		struct nbd_ended *ended = realloc(server->ended, 2 * room * sizeof *ended);
		if (!ended)
			return -ENOMEM;
		server->ended = ended;
		server->ended_room = 2 * room;
	}
	*slot_out = slot;
	return 0;
}

static void socket_prepare(int fd)
{
	struct timeval linger = {.tv_usec = LINGER_US};
	int one = 1, room = 4 << 20;

	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK); /* to linger; all other calls pass MSG_DONTWAIT */
	/* All but the timeout are optional, and may fail on sockets of another kind. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &linger, sizeof linger);
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) < 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
}

static bool negotiated_ok(const struct nbd_negotiated *negotiated)
{
	const uint32_t *ids = negotiated->context_ids;

	return negotiated->max_payload_bytes >= 4096 && negotiated->max_payload_bytes <= NBD_PAYLOAD_MAX &&
	       (!(ids[0] | ids[1] | ids[2]) || negotiated->structured || negotiated->extended);
}

int nbd_attach(struct nbd_server *server, struct nbd_export *export, int fd, const struct nbd_negotiated *negotiated,
               const uint8_t *early, uint64_t nr_early, uint64_t *connection_no_out)
{
	struct epoll_event event = {.events = EPOLLONESHOT};
	uint32_t slot;

	if (!negotiated_ok(negotiated) || nr_early > IN_BYTES / 2)
		return -EINVAL;
	struct nbd_connection *connection = calloc(1, sizeof *connection);
	if (!connection)
		return -ENOMEM;
	pthread_mutex_init(&connection->lock, NULL);
	connection->server = server;
	connection->export = export;
	connection->negotiated = *negotiated;
	connection->negotiated.read_only |= !export->device.overlay;
	connection->fd = fd;
	connection->backlog_tail = &connection->backlog;
	spin_init(&connection->spin);
	if (nr_early && !(connection->carry = malloc(nr_early))) {
		nbd_connection_free(connection);
		return -ENOMEM;
	}
	if (nr_early)
		memcpy(connection->carry, early, nr_early);
	connection->nr_carry = nr_early;
	socket_prepare(fd);

	pthread_mutex_lock(&server->lock);
	int err = slot_take(server, &slot);
	if (!err) {
		connection->connection_no = (uint64_t)++server->next_generation << 32 | slot;
		event.data.u64 = connection->connection_no;
		if (epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
			err = -errno;
	}
	if (err) {
		pthread_mutex_unlock(&server->lock);
		nbd_connection_free(connection);
		return err;
	}
	blk_queue_init(&connection->queue, &export->device, &nbd_sink);
	server->slots[slot] = connection;
	server->nr_connections++;
	export->nr_connections++;
	nbd_export_add(export, NBD_COUNT_NO(connections), 1);
	*connection_no_out = connection->connection_no;
	pthread_mutex_lock(&connection->lock);
	nbd_ready_push(connection);
	pthread_mutex_unlock(&connection->lock);
	pthread_mutex_unlock(&server->lock);
	return 0;
}

int nbd_detach(struct nbd_server *server, uint64_t connection_no)
{
	pthread_mutex_lock(&server->lock);
	struct nbd_connection *connection = nbd_server_find(server, connection_no);
	if (connection)
		nbd_connection_detach(connection);
	pthread_mutex_unlock(&server->lock);
	return connection ? 0 : -ENOENT;
}

int nbd_event_fd(const struct nbd_server *server)
{
	return server->event_fd;
}

int64_t nbd_take_ended(struct nbd_server *server, struct nbd_ended *ended_out, uint64_t nr_max)
{
	pthread_mutex_lock(&server->lock);
	uint64_t nr = server->nr_ended < nr_max ? server->nr_ended : nr_max;
	if (nr) {
		memcpy(ended_out, server->ended, nr * sizeof *ended_out);
		server->nr_ended -= nr;
		memmove(server->ended, server->ended + nr, server->nr_ended * sizeof *ended_out);
	}
	pthread_mutex_unlock(&server->lock);
	return (int64_t)nr;
}
