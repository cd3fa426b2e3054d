/* SPDX-License-Identifier: GPL-2.0 */
/* What the two halves of pageferry_copy_dma call of each other. */
#ifndef PAGEFERRY_DMA_SHIM_H
#define PAGEFERRY_DMA_SHIM_H

#include <linux/types.h>

struct folio;
struct list_head;
struct pf_channel;

/* Parameters, as of one moment. */
struct pf_settings {
	unsigned int channels;
	unsigned int least_kib;
	unsigned int timeout_ms;
	bool poll;
	bool verify;
};

/* For copy_dma.rs, in shim.c. */
void pf_settings(struct pf_settings *now);
void pf_count(size_t bytes, size_t failed);
u64 pf_now(void);
u64 pf_lap(unsigned int part, u64 since);
void pf_count_lie(struct pf_channel *channel, struct folio *dst);
size_t pf_open(struct pf_channel **out, size_t most);
void pf_close(struct pf_channel *channel);
int pf_distance(struct pf_channel *channel, struct folio *src,
		struct folio *dst);
bool pf_take(struct pf_channel *channel);
void pf_give(struct pf_channel *channel);
int pf_add(struct pf_channel *channel, struct folio *dst, struct folio *src,
	   size_t offset, size_t len, size_t at);
int pf_map(struct pf_channel *channel);
size_t pf_submit(struct pf_channel *channel, bool poll);
int pf_wait(struct pf_channel *channel, bool poll, unsigned int timeout_ms);
bool pf_next_failed(struct pf_channel *channel, size_t *index, size_t *at,
		    size_t *end);
void pf_unmap(struct pf_channel *channel);
void pf_retire(struct pf_channel *channel);
void pf_keep(struct folio *dst, struct folio *src);
int pf_compare(struct pf_channel *channel, struct folio *dst, struct folio *src,
	       size_t offset, size_t len);
int pf_register(void);
void pf_unregister(void);
void pf_release_kept(void);

/* For shim.c, in copy_dma.rs. */
int pageferry_dma_copy(struct list_head *dsts, struct list_head *srcs,
		       unsigned int folios);

#endif
