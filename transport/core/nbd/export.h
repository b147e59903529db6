/* SPDX-License-Identifier: Apache-2.0 */
/* An export: a device and its counters. */
#ifndef COWSHED_NBD_EXPORT_H
#define COWSHED_NBD_EXPORT_H

#include "transport/core/blocks/device.h"
#include "transport/core/nbd/nbd.h"

#include <stddef.h>

#define NBD_COUNT_NO(name) (offsetof(struct nbd_counters, name) / sizeof(uint64_t))
/* All but parked, which ends with the process. */
#define NBD_COUNTS_NR NBD_COUNT_NO(parked)
_Static_assert(NBD_COUNTS_NR == sizeof(struct nbd_counters) / sizeof(uint64_t) - 1, "parked is the last of them");
_Static_assert(NBD_COUNTS_NR <= IMAGE_SERVED_WORDS && NBD_COUNTS_NR <= LEDGER_SERVED_WORDS, "there is room for them");

struct nbd_export {
	struct blk_device device;
	struct nbd_server *server;
	uint32_t nr_connections; /* under server->lock */
	/* Counters, words in the order of struct nbd_counters: the export's (in its overlay's ledger, or else in
	 * `here`), and those of all exports of the image. */
	_Atomic uint64_t *counts, *image_counts;
	_Atomic uint64_t here[NBD_COUNTS_NR];
	_Atomic uint64_t latency_sum_ns[NBD_LATENCY_NR];
	_Atomic uint64_t latency[NBD_LATENCY_NR][LATENCY_BUCKETS];
};

void nbd_export_add(struct nbd_export *export, size_t count_no, uint64_t nr);
/* nr requests took that long each. */
void nbd_export_time(struct nbd_export *export, enum nbd_latency kind, uint64_t duration_ns, uint64_t nr);

#endif
