/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/core/nbd/server.h"

#include <errno.h>
#include <stdlib.h>

int nbd_export_init(struct nbd_server *server, struct image *image, struct overlay *overlay,
                    struct nbd_export **export_out)
{
	struct nbd_export *export = calloc(1, sizeof *export);

	if (!export)
		return -ENOMEM;
	export->server = server;
	export->counts = overlay ? overlay->account->header->served : export->here;
	export->image_counts = image->served;
	pthread_mutex_lock(&server->lock);
	int err = blk_device_init(&export->device, &server->frames, image, overlay);
	if (!err)
		server->nr_exports++;
	pthread_mutex_unlock(&server->lock);
	if (err) {
		free(export);
		return err;
	}
	*export_out = export;
	return 0;
}

int nbd_export_deinit(struct nbd_export *export)
{
	struct nbd_server *server = export->server;

	pthread_mutex_lock(&server->lock);
	bool busy = export->nr_connections != 0;
	if (!busy) {
		blk_device_deinit(&export->device, &server->frames);
		server->nr_exports--;
	}
	pthread_mutex_unlock(&server->lock);
	if (busy)
		return -EBUSY;
	free(export);
	return 0;
}

void nbd_export_add(struct nbd_export *export, size_t count_no, uint64_t nr)
{
	count_add(&export->counts[count_no], nr);
	count_add(&export->image_counts[count_no], nr);
}

void nbd_export_time(struct nbd_export *export, enum nbd_latency kind, uint64_t duration_ns, uint64_t nr)
{
	count_add(&export->latency[kind][bucket_of(duration_ns)], nr);
	count_add(&export->latency_sum_ns[kind], duration_ns * nr);
}

static void read_counts(const _Atomic uint64_t *counts, struct nbd_counters *counters_out)
{
	uint64_t *out = (uint64_t *)counters_out;

	for (size_t i = 0; i < NBD_COUNTS_NR; i++)
		out[i] = atomic_load_explicit(&counts[i], memory_order_relaxed);
}

void nbd_export_count(const struct nbd_export *export, struct nbd_counters *counters_out)
{
	read_counts(export->counts, counters_out);
	counters_out->parked = atomic_load_explicit(&export->device.nr_waiting, memory_order_relaxed);
}

void nbd_image_count(struct nbd_server *server, const struct image *image, struct nbd_counters *counters_out)
{
	read_counts(image->served, counters_out);
	counters_out->parked = 0;
	pthread_mutex_lock(&server->lock);
	for (struct blk_frames *frames = server->frames; frames; frames = frames->next)
		if (frames->image == image)
			counters_out->parked = atomic_load_explicit(&frames->nr_waiting, memory_order_relaxed);
	pthread_mutex_unlock(&server->lock);
}

int nbd_export_latency(const struct nbd_export *export, int kind, uint64_t *counts_out, uint64_t *sum_ns_out)
{
	if (kind < 0 || kind >= NBD_LATENCY_NR)
		return -EINVAL;
	for (int i = 0; i < LATENCY_BUCKETS; i++)
		counts_out[i] += atomic_load_explicit(&export->latency[kind][i], memory_order_relaxed);
	*sum_ns_out += atomic_load_explicit(&export->latency_sum_ns[kind], memory_order_relaxed);
	return 0;
}
