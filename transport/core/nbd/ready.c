/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The list of connections that are ready for a slice: they were woken, or their last slice left work for the next, to
 * be fair to others. Its eventfd is in the workers' epoll.
 */
#include "cache/core/points.h"
#include "transport/core/nbd/server.h"

void nbd_ready_push(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;

	pthread_mutex_lock(&server->ready_lock);
	bool fresh = !connection->queued;
	if (fresh) {
		connection->queued = true;
		connection->next_ready = NULL;
		*server->ready_tail = connection;
		server->ready_tail = &connection->next_ready;
	}
	pthread_mutex_unlock(&server->ready_lock);
	if (fresh)
		store_raise_at(POINT_WAKE_NBD, server->ready_fd);
}

uint64_t nbd_ready_pop(struct nbd_server *server)
{
	uint64_t connection_no = 0;

	pthread_mutex_lock(&server->ready_lock);
	struct nbd_connection *connection = server->ready;
	if (connection) {
		connection_no = connection->connection_no;
		connection->queued = false;
		server->ready = connection->next_ready;
		if (!server->ready)
			server->ready_tail = &server->ready;
	}
	pthread_mutex_unlock(&server->ready_lock);
	return connection_no;
}

void nbd_ready_forget(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;

	pthread_mutex_lock(&server->ready_lock);
	if (connection->queued) {
		struct nbd_connection **at = &server->ready;
		while (*at != connection)
			at = &(*at)->next_ready;
		*at = connection->next_ready;
		if (!*at)
			server->ready_tail = at;
	}
	pthread_mutex_unlock(&server->ready_lock);
}
