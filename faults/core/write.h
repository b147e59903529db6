/* SPDX-License-Identifier: Apache-2.0 */
/* Answers to writes, and the quota that they are charged to (write.c). */
#ifndef COWSHED_WRITE_H
#define COWSHED_WRITE_H

#include "faults/core/guest.h"

/* A write fault on a page. */
void answer_write(struct guest *guest, uint64_t page, uint64_t read_ns);
/* Charges and opens the write window of a page that is mapped: 0, -EDQUOT if the guest is at its quota, or another
 * error that was handled. */
int answer_open(struct guest *guest, uint64_t page);
/* Answers a first write to a page that is not mapped; the extent is held. 0: answered; -ENOTSUP: the caller must map
 * and open the page; -EDQUOT: the guest is at its quota. */
int write_first(struct guest *guest, uint64_t page);
/* Under write_lock: takes up to nr_wanted pages from the quota; if none are left, settles the account and
 * tries again. */
uint64_t account_take_pages(struct account *account, uint64_t nr_wanted);
/* With no lock held: settles the quota's other accounts; returns whether charges were given back. */
bool quota_settle_others(struct account *account);
/* At the quota: stops the guest, and sends its process SIGBUS if the policy is kill. */
void quota_refuse(struct guest *guest);

#endif
