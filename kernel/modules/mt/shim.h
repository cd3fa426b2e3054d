/* SPDX-License-Identifier: GPL-2.0 */
/* What the two halves of pageferry_copy_mt call of each other. */
#ifndef PAGEFERRY_MT_SHIM_H
#define PAGEFERRY_MT_SHIM_H

#include <linux/types.h>

struct completion;
struct folio;
struct list_head;
struct work_struct;
struct workqueue_struct;

/* Parameters, as of one moment. */
struct pf_settings {
	unsigned int helpers;
	unsigned int least_kib;
	unsigned int non_temporal;
	unsigned int side;	/* PF_AUTO, PF_SOURCE, PF_DESTINATION */
};

enum { PF_AUTO, PF_SOURCE, PF_DESTINATION };

/* For copy_mt.rs, in shim.c. */
void pf_settings(struct pf_settings *now);
void pf_count(bool helped, size_t bytes, size_t helped_bytes, u64 helper_ns,
	      size_t failed);
int pf_copy(struct folio *dst, struct folio *src, size_t first, size_t pages,
	    bool non_temporal);
int pf_node(const struct folio *folio);
bool pf_has_cpus(int node);
int pf_nearest(int node);
size_t pf_cpus(u32 *cpus, u32 *nodes, u32 *caches, size_t most);
bool pf_idle(unsigned int cpu);
void pf_init_work(struct work_struct *work, void (*call)(struct work_struct *));
void pf_init_completion(struct completion *completion);
struct workqueue_struct *pf_queue(void);
u64 pf_thread_ns(void);
int pf_register(void);
void pf_unregister(void);
int pf_watch_cpus(void);
void pf_ignore_cpus(void);
unsigned int pf_faster_side(void);

/* For shim.c, in copy_mt.rs. */
int pageferry_mt_copy(struct list_head *dsts, struct list_head *srcs,
		      unsigned int folios);
void pageferry_mt_cpus_changed(void);

#endif
