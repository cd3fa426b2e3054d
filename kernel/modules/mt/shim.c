// SPDX-License-Identifier: GPL-2.0
/*
 * What copy_mt.rs cannot say in Rust on 6.12: inline functions of the kernel,
 * module parameters, the CPU hotplug state, and the registration's structure.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/highmem.h>
#include <linux/ktime.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/topology.h>
#include <linux/sched/isolation.h>
#include <linux/workqueue.h>

#include "../common/items.h"
#include "../common/provider.h"
#include "shim.h"

#define MOST_HELPERS	31
#define MOST_KIB	1048576

static bool non_temporal;
static unsigned int side = PF_AUTO;
/* What was chosen at load for PF_AUTO. */
static unsigned int faster_side = PF_SOURCE;

static int provider_copy(struct list_head *dsts, struct list_head *srcs,
			 unsigned int folios)
{
	return pageferry_mt_copy(dsts, srcs, folios);
}

NUMBER(helpers, 7, 0, MOST_HELPERS, NULL,
	"Helpers a batch has at most, beside the caller");
NUMBER(least_kib, 128, 1, MOST_KIB, provider_set_thresholds,
	"KiB that are worth a helper");

/* Below two shares of `least_kib` no helper would be asked. */
static unsigned long provider_min_bytes(void)
{
	return 2UL * READ_ONCE(least_kib) << 10;
}

static int non_temporal_set(const char *val, const struct kernel_param *kp)
{
	bool on;

	if (kstrtobool(val, &on))
		return refuse(kp, val, "0 or 1");
	/* On arm64 they would copy as ever and then clean the caches. */
	if (on && !IS_ENABLED(CONFIG_X86_64))
		return refuse(kp, val, "0: no such copies on this architecture");
	WRITE_ONCE(non_temporal, on);
	return 0;
}

static const struct kernel_param_ops non_temporal_ops = {
	.set = non_temporal_set,
	.get = param_get_bool,
};
module_param_cb(non_temporal, &non_temporal_ops, &non_temporal, 0644);
MODULE_PARM_DESC(non_temporal,
		 "Copy past the caches (0 or 1); does not survive memory errors in a source page");

static const char * const sides[] = { "auto", "source", "destination" };

static int side_set(const char *val, const struct kernel_param *kp)
{
	/* As it is read, it can be written. */
	int which = strstarts(val, "auto (") ? PF_AUTO :
					       sysfs_match_string(sides, val);

	if (which < 0)
		return refuse(kp, val, "auto, source or destination");
	WRITE_ONCE(side, which);
	return 0;
}

static int side_get(char *buf, const struct kernel_param *kp)
{
	unsigned int which = READ_ONCE(side);

	if (which == PF_AUTO)
		return sysfs_emit(buf, "auto (%s)\n", sides[faster_side]);
	return sysfs_emit(buf, "%s\n", sides[which]);
}

static const struct kernel_param_ops side_ops = {
	.set = side_set,
	.get = side_get,
};
module_param_cb(node, &side_ops, NULL, 0644);
MODULE_PARM_DESC(node, "Whose CPUs copy: auto (measured at load), source, destination");

void pf_settings(struct pf_settings *now)
{
	now->helpers = READ_ONCE(helpers);
	now->least_kib = READ_ONCE(least_kib);
	now->non_temporal = READ_ONCE(non_temporal);
	now->side = READ_ONCE(side);
	if (now->side == PF_AUTO)
		now->side = faster_side;
}

SUM(batches, "Batches copied");
SUM(helped_batches, "Batches of which helpers copied a part");
SUM(bytes, "Bytes copied");
SUM(helped_bytes, "Bytes copied by helpers");
SUM(helper_ns, "Nanoseconds that helpers took for it");
SUM(failed_folios, "Folios that could not be copied (memory errors)");

void pf_count(bool helped, size_t all, size_t by_helpers, u64 ns, size_t failed)
{
	atomic64_inc(&batches);
	atomic64_add(all, &bytes);
	if (helped) {
		atomic64_inc(&helped_batches);
		atomic64_add(by_helpers, &helped_bytes);
		atomic64_add(ns, &helper_ns);
	}
	if (failed)
		atomic64_add(failed, &failed_folios);
}

/* Copies pages `first` on of a folio; -EHWPOISON: a source page has an error. */
int pf_copy(struct folio *dst, struct folio *src, size_t first, size_t pages,
	    bool nt)
{
	size_t i;

	for (i = first; i < first + pages; i++) {
		struct page *to = folio_page(dst, i), *from = folio_page(src, i);

		if (nt)
			memcpy_flushcache(page_address(to), page_address(from),
					  PAGE_SIZE);
		else if (copy_mc_highpage(to, from))
			return -EHWPOISON;
		cond_resched();
	}
	return 0;
}

int pf_node(const struct folio *folio)
{
	return folio_nid(folio);
}

bool pf_has_cpus(int node)
{
	return cpumask_intersects(cpumask_of_node(node), cpu_online_mask);
}

/* The nearest node that has CPUs. */
int pf_nearest(int node)
{
	int other, best = node, distance = INT_MAX;

	for_each_online_node(other) {
		if (pf_has_cpus(other) && node_distance(node, other) < distance) {
			distance = node_distance(node, other);
			best = other;
		}
	}
	return best;
}

/*
 * The CPUs that are online and meant for works, with their nodes, and of each the
 * place of the first that it shares its last-level cache with.
 */
size_t pf_cpus(u32 *cpus, u32 *nodes, u32 *caches, size_t most)
{
	size_t n = 0, first;
	unsigned int cpu;

	for_each_online_cpu(cpu) {
		if (n == most)
			break;
		/* As wq_unbound_cpumask begins: isolated CPUs do not help. */
		if (!housekeeping_test_cpu(cpu, HK_TYPE_WQ) ||
		    !housekeeping_test_cpu(cpu, HK_TYPE_DOMAIN))
			continue;
		cpus[n] = cpu;
		nodes[n] = cpu_to_node(cpu);
		for (first = 0; first < n; first++) {
			if (migrate_offload_cpus_share_cache(cpus[first], cpu))
				break;
		}
		caches[n++] = first;
	}
	return n;
}

bool pf_idle(unsigned int cpu)
{
	return migrate_offload_cpu_idle(cpu);
}

void pf_init_work(struct work_struct *work, void (*call)(struct work_struct *))
{
	INIT_WORK(work, call);
}

void pf_init_completion(struct completion *completion)
{
	init_completion(completion);
}

/*
 * Unbound: one pool a last-level cache (its affinity scope), on whichever CPU of
 * it.  Reclaim may wait for a batch, hence WQ_MEM_RECLAIM.
 */
struct workqueue_struct *pf_queue(void)
{
	return alloc_workqueue(KBUILD_MODNAME,
			       WQ_UNBOUND | WQ_HIGHPRI | WQ_MEM_RECLAIM | WQ_SYSFS,
			       WQ_MAX_ACTIVE);
}

u64 pf_thread_ns(void)
{
	return migrate_offload_thread_ns();
}

int pf_register(void)
{
	return provider_begin();
}

void pf_unregister(void)
{
	provider_end();
}

static int hotplug_state;

/* When the change is over: only then is known which caches a CPU shares. */
static void read_cpus(struct work_struct *unused)
{
	cpus_read_lock();
	pageferry_mt_cpus_changed();
	cpus_read_unlock();
}

static DECLARE_WORK(cpus_work, read_cpus);

static int cpu_changed(unsigned int cpu)
{
	schedule_work(&cpus_work);
	return 0;
}

int pf_watch_cpus(void)
{
	hotplug_state = cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN,
						  KBUILD_MODNAME, cpu_changed,
						  cpu_changed);
	if (hotplug_state < 0)
		return hotplug_state;
	/* Once, for those that came or went before. */
	schedule_work(&cpus_work);
	return 0;
}

void pf_ignore_cpus(void)
{
	cpuhp_remove_state_nocalls(hotplug_state);
	cancel_work_sync(&cpus_work);
}

/* Measuring which side copies faster. */
#define SAMPLE_ORDER	9
#define SAMPLES		5

struct sample {
	struct work_struct work;
	struct page *to, *from;
	u64 ns;
};

static void take_sample(struct work_struct *work)
{
	struct sample *s = container_of(work, struct sample, work);
	size_t pages = 1UL << SAMPLE_ORDER;
	u64 began = ktime_get_ns();

	pf_copy(page_folio(s->to), page_folio(s->from), 0, pages, false);
	s->ns = min(s->ns, ktime_get_ns() - began);
}

/* The best of a few copies by a CPU of this node. */
static u64 sample_on(int node, struct sample *s)
{
	int i;

	s->ns = U64_MAX;
	for (i = 0; i < SAMPLES; i++) {
		INIT_WORK_ONSTACK(&s->work, take_sample);
		queue_work_node(node, system_unbound_wq, &s->work);
		flush_work(&s->work);
		destroy_work_on_stack(&s->work);
	}
	return s->ns;
}

/*
 * Copies 2 MiB from the first node with CPUs to the second, by CPUs of either.
 * The source, where there are not two or their memory is short.
 */
unsigned int pf_faster_side(void)
{
	gfp_t gfp = GFP_KERNEL | __GFP_THISNODE | __GFP_COMP | __GFP_NORETRY |
		    __GFP_NOWARN;
	int node, first = NUMA_NO_NODE, second = NUMA_NO_NODE;
	struct sample s = {};
	u64 there, here;

	faster_side = PF_SOURCE;
	for_each_node_state(node, N_CPU) {
		if (!node_state(node, N_MEMORY))
			continue;
		if (first == NUMA_NO_NODE) {
			first = node;
		} else {
			second = node;
			break;
		}
	}
	if (second == NUMA_NO_NODE)
		return faster_side;

	s.from = alloc_pages_node(first, gfp, SAMPLE_ORDER);
	s.to = alloc_pages_node(second, gfp, SAMPLE_ORDER);
	if (s.from && s.to) {
		here = sample_on(first, &s);
		there = sample_on(second, &s);
		if (there < here)
			faster_side = PF_DESTINATION;
		pr_info("2 MiB from node %d to node %d: %llu us by the source's CPUs, %llu us by the destination's\n",
			first, second, div_u64(here, 1000), div_u64(there, 1000));
	}
	if (s.from)
		__free_pages(s.from, SAMPLE_ORDER);
	if (s.to)
		__free_pages(s.to, SAMPLE_ORDER);
	return faster_side;
}
