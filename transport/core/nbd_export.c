/* SPDX-License-Identifier: Apache-2.0 */
/* Exports: an image and perhaps an overlay, the frames they are sent from, and what was done with them. */
#define _GNU_SOURCE
#include "transport/core/nbd_state.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Maps the frames for reading; never touched where the ledger does not say RESIDENT, and held. */
static struct nbd_frames *frames_take(struct nbd_server *server, struct image *image)
{
	struct nbd_frames *frames = server->frames;

	while (frames && frames->image != image)
		frames = frames->next;
	if (!frames) {
		frames = calloc(1, sizeof *frames);
		if (!frames)
			return NULL;
		void *base = mmap(NULL, image->shape.map_bytes, PROT_READ, MAP_SHARED, image->guest_fd, 0);
		if (base == MAP_FAILED) {
			free(frames);
			return NULL;
		}
		madvise(base, image->shape.map_bytes, MADV_DONTFORK);
		*frames = (struct nbd_frames){.next = server->frames, .image = image, .base = base};
		server->frames = frames;
	}
	frames->nr_exports++;
	return frames;
}

static void frames_return(struct nbd_server *server, struct nbd_frames *frames)
{
	if (--frames->nr_exports)
		return;
	struct nbd_frames **at = &server->frames;
	while (*at != frames)
		at = &(*at)->next;
	*at = frames->next;
	munmap((void *)(uintptr_t)frames->base, frames->image->shape.map_bytes);
	free(frames);
}

int nbd_export_init(struct nbd_server *server, struct image *image, struct overlay *overlay,
                    struct nbd_export **export_out)
{
	struct nbd_export *export = calloc(1, sizeof *export);

	if (!export)
		return -ENOMEM;
	export->server = server;
	export->image = image;
	export->overlay = overlay;
	export->size_bytes = image->shape.size_bytes;
	export->extent_bytes = (uint64_t)image->shape.extent_pages << 12;
	export->counts = overlay ? overlay->account->header->served : export->here;
	export->image_counts = image->served;
	pthread_mutex_lock(&server->lock);
	export->frames = frames_take(server, image);
	if (export->frames)
		server->nr_exports++;
	pthread_mutex_unlock(&server->lock);
	if (!export->frames) {
		free(export);
		return -ENOMEM;
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
		frames_return(server, export->frames);
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

void nbd_export_park(struct nbd_export *export)
{
	count_add(&export->nr_parked, 1);
	count_add(&export->frames->nr_parked, 1);
}

void nbd_export_unpark(struct nbd_export *export)
{
	atomic_fetch_sub_explicit(&export->nr_parked, 1, memory_order_relaxed);
	atomic_fetch_sub_explicit(&export->frames->nr_parked, 1, memory_order_relaxed);
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
	counters_out->parked = atomic_load_explicit(&export->nr_parked, memory_order_relaxed);
}

void nbd_image_count(struct nbd_server *server, const struct image *image, struct nbd_counters *counters_out)
{
	read_counts(image->served, counters_out);
	counters_out->parked = 0;
	pthread_mutex_lock(&server->lock);
	for (struct nbd_frames *frames = server->frames; frames; frames = frames->next)
		if (frames->image == image)
			counters_out->parked = atomic_load_explicit(&frames->nr_parked, memory_order_relaxed);
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
