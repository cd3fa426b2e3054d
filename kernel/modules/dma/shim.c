// SPDX-License-Identifier: GPL-2.0
/*
 * What copy_dma.rs cannot say in Rust on 6.12: dmaengine's and the DMA mapping's
 * inline functions, module parameters, and the registration's structure.
 *
 * A channel has room for the transfers of one batch from when it is opened: what
 * is allocated here while pages are migrated, which may be for reclaim, is only
 * what the DMA mapping and the drivers do, without waiting for memory.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/topology.h>
#include <linux/workqueue.h>

#define PF_BYTES_ONLY
#include "../common/items.h"
#include "../common/provider.h"
#include "shim.h"

#define MOST_CHANNELS	32
#define MOST_KIB	1048576
#define MOST_MS		600000
#define MOST_UNORDERED	512
/* Long for a driver's tasklet, short for who waits for the migration. */
#define FREEING_MS	20
/* From a status that says that all is done to the last callback: as above. */
#define TELLING_MS	20
/*
 * Parts of folios in a channel's share of a batch: as many as a batch has folios
 * at most (NR_MAX_BATCHED_MIGRATION and one more), one that is cut, and those
 * that are cut because a device takes no more at once (64 KiB unless it says so).
 */
#define MOST_PARTS	(HPAGE_PMD_NR + 2 + 2 * HPAGE_PMD_SIZE / SZ_64K)
/* Mapped, the two sides may be cut in different places. */
#define MOST_COPIES	(2 * MOST_PARTS)

static bool poll;
static bool verify;
static char *devices = "";

static int provider_copy(struct list_head *dsts, struct list_head *srcs,
			 unsigned int folios)
{
	return pageferry_dma_copy(dsts, srcs, folios);
}

NUMBER(channels, 4, 1, MOST_CHANNELS, NULL, "Channels a batch has at most");
NUMBER(least_kib, 64, 1, MOST_KIB, provider_set_thresholds,
	"KiB that are worth a channel");

static unsigned long provider_min_bytes(void)
{
	return (unsigned long)READ_ONCE(least_kib) << 10;
}

NUMBER(timeout_ms, 1000, 1, MOST_MS, NULL,
	"After so many ms a channel is given up, for good");

static int bool_set(const char *val, const struct kernel_param *kp)
{
	bool on;

	if (kstrtobool(val, &on))
		return refuse(kp, val, "0 or 1");
	WRITE_ONCE(*(bool *)kp->arg, on);
	return 0;
}

static const struct kernel_param_ops bool_ops = {
	.set = bool_set,
	.get = param_get_bool,
};
module_param_cb(poll, &bool_ops, &poll, 0644);
MODULE_PARM_DESC(poll, "Look for the end of a transfer instead of having an interrupt (0 or 1)");
module_param_cb(verify, &bool_ops, &verify, 0644);
MODULE_PARM_DESC(verify, "Compare each copy with its source, and report what differs (0 or 1)");

NUMBER(unordered, 16, 1, MOST_UNORDERED, NULL,
	"Copies asked for at once of a channel that ends them out of order; no more than its queue has room for");

module_param(devices, charp, 0444);
MODULE_PARM_DESC(devices,
		 "Only channels of these devices: names of devices or of drivers, with commas between (all)");

SUM(batches, "Batches copied");
SUM(bytes, "Bytes of those batches");
SUM(failed_folios, "Folios that the kernel had to copy instead");
SUM(timeouts, "Transfers that did not end in time");
SUM(retired_channels, "Channels given up");
SUM(kept_folios, "Folios kept for good because a device may still write to them");
SUM(lies, "Folios that a device said it had copied and had not (verify)");
/* Of those who asked, by part of a batch; ordered as `enum Part` of shim.rs. */
SUM(gather_ns, "Time spent on listing folios and taking channels");
SUM(map_ns, "Time spent on mapping for the device");
SUM(submit_ns, "Time spent on preparing and submitting descriptors");
SUM(wait_ns, "Time spent on waiting for the device");
SUM(unmap_ns, "Time spent on ending the mapping");
SUM(finish_ns, "Time spent on comparing (verify) and marking");

void pf_settings(struct pf_settings *now)
{
	now->channels = READ_ONCE(channels);
	now->least_kib = READ_ONCE(least_kib);
	now->timeout_ms = READ_ONCE(timeout_ms);
	now->poll = READ_ONCE(poll);
	now->verify = READ_ONCE(verify);
}

void pf_count(size_t all, size_t failed)
{
	atomic64_inc(&batches);
	atomic64_add(all, &bytes);
	if (failed)
		atomic64_add(failed, &failed_folios);
}

u64 pf_now(void)
{
	return ktime_get_ns();
}

/* The time since @since goes to a part; the time now. */
u64 pf_lap(unsigned int part, u64 since)
{
	static atomic64_t *const parts[] = {
		&gather_ns, &map_ns, &submit_ns, &wait_ns, &unmap_ns, &finish_ns,
	};
	u64 now = ktime_get_ns();

	atomic64_add(now - since, parts[part]);
	return now;
}

/* One copy that a device was asked for. */
struct copy {
	struct pf_channel *channel;
	size_t at, end;		/* bytes of the batch */
	bool done;
	bool failed;
};

struct pf_channel {
	struct dma_chan *chan;
	atomic_t taken;
	bool retired;
	/*
	 * It may end a later transfer before an earlier one: the last one's end says
	 * nothing about the others, and each has to interrupt.
	 */
	bool unordered;

	/* The share of a batch: parts of folios, side by side. */
	unsigned int parts;
	size_t starts[MOST_PARTS];	/* of each, in bytes of the batch */
	size_t end;
	struct scatterlist src[MOST_PARTS], dst[MOST_PARTS];
	struct sg_table srcs, dsts;
	bool mapped;

	/* What was asked for, from `first` on the last time, and is to be. */
	unsigned int copies, first;
	struct copy copy[MOST_COPIES];
	struct scatterlist *next_src, *next_dst;
	unsigned int src_used, dst_used;	/* bytes of the next of each */
	size_t at;

	/* Descriptors that it is known to take at once. */
	unsigned int takes;
	/* What a source has, for pf_compare(). */
	struct page *seen;
	atomic_t under_way;
	dma_cookie_t last;
	/* The last one submitted was not meant to be: nothing will interrupt. */
	bool quiet;
	struct completion all_done;
};

static void transfer_done(void *arg, const struct dmaengine_result *result)
{
	struct copy *copy = arg;
	struct pf_channel *c = copy->channel;

	copy->failed = result && result->result != DMA_TRANS_NOERROR;
	/* Pairs with the acquire in pf_next_failed(). */
	smp_store_release(&copy->done, true);
	if (atomic_dec_and_test(&c->under_way))
		complete(&c->all_done);
}

static bool is_listed(const char *list, const char *name)
{
	size_t len = strlen(name);

	for (;;) {
		size_t next = strcspn(list, ",");

		if (next == len && !strncmp(list, name, len))
			return true;
		if (!list[next])
			return false;
		list += next + 1;
	}
}

/* Whole pages of what it takes at once: no part is cut at an odd address. */
static size_t most_at_once(struct dma_chan *chan)
{
	return round_down(dma_get_max_seg_size(dmaengine_get_dma_device(chan)),
			  PAGE_SIZE);
}

static bool is_wanted(struct dma_chan *chan, void *unused)
{
	struct device *dev = chan->device->dev;

	if (!most_at_once(chan) ||
	    chan->device->copy_align > PAGE_SHIFT)
		return false;
	return !*devices || is_listed(devices, dev_name(dev)) ||
	       is_listed(devices, dev_driver_string(dev));
}

/* All memory-to-memory channels that there are, nobody has, and are wanted. */
size_t pf_open(struct pf_channel **out, size_t most)
{
	dma_cap_mask_t mask;
	size_t n;

	dma_cap_zero(mask);
	dma_cap_set(DMA_MEMCPY, mask);
	for (n = 0; n < most; n++) {
		struct dma_chan *chan = dma_request_channel(mask, is_wanted, NULL);
		struct pf_channel *c;

		if (!chan)
			break;
		c = kvzalloc(sizeof(*c), GFP_KERNEL);
		if (c)
			c->seen = alloc_page(GFP_KERNEL);
		if (!c || !c->seen) {
			kvfree(c);
			dma_release_channel(chan);
			break;
		}
		c->chan = chan;
		c->unordered = dma_has_cap(DMA_COMPLETION_NO_ORDER,
					   chan->device->cap_mask);
		init_completion(&c->all_done);
		pr_info("%s of node %d\n", dma_chan_name(chan),
			dev_to_node(chan->device->dev));
		out[n] = c;
	}
	return n;
}

/*
 * A retired channel is neither given back nor its memory freed: its device may
 * still be at work.  But its callbacks end, which are this module's.
 */
void pf_close(struct pf_channel *c)
{
	if (c->retired) {
		dmaengine_synchronize(c->chan);
		return;
	}
	dma_release_channel(c->chan);
	__free_page(c->seen);
	kvfree(c);
}

/* How far a copy goes by this channel, in units of node_distance(). */
int pf_distance(struct pf_channel *c, struct folio *src, struct folio *dst)
{
	int node = dev_to_node(c->chan->device->dev);

	if (node == NUMA_NO_NODE)
		return 2 * LOCAL_DISTANCE;
	return node_distance(node, folio_nid(src)) +
	       node_distance(node, folio_nid(dst));
}

/* Takes a channel for a batch; false: another batch has it, or it is retired. */
bool pf_take(struct pf_channel *c)
{
	if (atomic_cmpxchg_acquire(&c->taken, 0, 1))
		return false;
	/* For good: whoever retired it gave it back afterwards. */
	if (c->retired)
		return false;
	c->parts = 0;
	c->copies = 0;
	c->first = 0;
	c->at = 0;
	c->end = 0;
	c->mapped = false;
	return true;
}

void pf_give(struct pf_channel *c)
{
	atomic_set_release(&c->taken, 0);
}

/* Adds a part of a folio, whose first byte is byte @at of the batch. */
int pf_add(struct pf_channel *c, struct folio *dst, struct folio *src,
	   size_t offset, size_t len, size_t at)
{
	size_t most = most_at_once(c->chan), part;

	for (; len; offset += part, at += part, len -= part) {
		if (c->parts == MOST_PARTS)
			return -ENOSPC;
		part = min(len, most);
		/* As new, one by one: a batch need not fill the room there is. */
		sg_init_table(&c->src[c->parts], 1);
		sg_init_table(&c->dst[c->parts], 1);
		sg_unmark_end(&c->src[c->parts]);
		sg_unmark_end(&c->dst[c->parts]);
		sg_set_folio(&c->src[c->parts], src, part, offset);
		sg_set_folio(&c->dst[c->parts], dst, part, offset);
		c->starts[c->parts++] = at;
		c->end = at + part;
	}
	return 0;
}

/* Maps all that was added for the device. */
int pf_map(struct pf_channel *c)
{
	struct device *dev = dmaengine_get_dma_device(c->chan);
	int ret;

	sg_mark_end(&c->src[c->parts - 1]);
	sg_mark_end(&c->dst[c->parts - 1]);
	c->srcs = (struct sg_table) { .sgl = c->src, .orig_nents = c->parts };
	c->dsts = (struct sg_table) { .sgl = c->dst, .orig_nents = c->parts };
	ret = dma_map_sgtable(dev, &c->srcs, DMA_TO_DEVICE, 0);
	if (ret)
		return ret;
	ret = dma_map_sgtable(dev, &c->dsts, DMA_FROM_DEVICE, 0);
	if (ret) {
		dma_unmap_sgtable(dev, &c->srcs, DMA_TO_DEVICE, 0);
		return ret;
	}
	c->mapped = true;
	c->next_src = c->src;
	c->next_dst = c->dst;
	c->src_used = 0;
	c->dst_used = 0;
	c->at = c->starts[0];
	return 0;
}

static void used_up(struct scatterlist **next, unsigned int *used,
		    unsigned int len)
{
	*used += len;
	if (*used == sg_dma_len(*next)) {
		*next = sg_next(*next);
		*used = 0;
	}
}

/*
 * A descriptor for the next @len bytes.  Drivers free theirs a moment after they
 * say that a copy is done: a channel that has taken copies before, and has none
 * under way now, is given time for that.
 */
static struct dma_async_tx_descriptor *prepare(struct pf_channel *c, size_t len,
					       unsigned long flags, bool wait)
{
	ktime_t until = ktime_add_ms(ktime_get(), FREEING_MS);

	for (;;) {
		struct dma_async_tx_descriptor *tx;

		tx = dmaengine_prep_dma_memcpy(c->chan,
				sg_dma_address(c->next_dst) + c->dst_used,
				sg_dma_address(c->next_src) + c->src_used,
				len, flags);
		if (tx || !wait || ktime_after(ktime_get(), until))
			return tx;
		usleep_range(20, 100);
	}
}

/*
 * Asks the device for as many copies as it takes, with one interrupt for all of
 * them if it keeps their order, or none if the end is polled for; the bytes that
 * are left.  To be waited for whatever it returns.
 */
size_t pf_submit(struct pf_channel *c, bool polled)
{
	unsigned int most = c->unordered ? READ_ONCE(unordered) : MOST_COPIES;
	unsigned int first = c->copies;

	polled &= !c->unordered;
	c->quiet = false;
	reinit_completion(&c->all_done);
	/* One is ours, so that nothing completes before all is submitted. */
	atomic_set(&c->under_way, 1);
	while (c->at < c->end && c->copies < MOST_COPIES &&
	       c->copies - first < most) {
		unsigned int len = min(sg_dma_len(c->next_src) - c->src_used,
				       sg_dma_len(c->next_dst) - c->dst_used);
		bool is_last = c->unordered || c->at + len == c->end ||
			       c->copies - first + 1 >= c->takes;
		struct dma_async_tx_descriptor *tx;
		dma_cookie_t cookie;
		struct copy *copy;

		tx = prepare(c, len, DMA_CTRL_ACK |
			     (is_last && !polled ? DMA_PREP_INTERRUPT : 0),
			     c->copies == first && c->takes);
		if (!tx)
			break;
		copy = &c->copy[c->copies];
		*copy = (struct copy) {
			.channel = c, .at = c->at, .end = c->at + len,
		};
		/* Polled or not: some drivers tell nowhere else what failed. */
		tx->callback_result = transfer_done;
		tx->callback_param = copy;
		atomic_inc(&c->under_way);
		cookie = dmaengine_submit(tx);
		if (dma_submit_error(cookie)) {
			atomic_dec(&c->under_way);
			break;
		}
		c->last = cookie;
		c->quiet = !polled && !is_last;
		c->copies++;
		c->at += len;
		used_up(&c->next_src, &c->src_used, len);
		used_up(&c->next_dst, &c->dst_used, len);
	}
	c->first = first;
	/* As many as it is known to take: beyond it each may be the last. */
	if (c->at < c->end)
		c->takes = c->copies - first;
	else
		c->takes = max(c->copies - first, c->takes);
	dma_async_issue_pending(c->chan);
	if (atomic_dec_and_test(&c->under_way))
		complete(&c->all_done);
	/* A channel that takes nothing at all would be asked for ever. */
	return c->copies == first ? 0 : c->end - c->at;
}

/*
 * The copies submitted last are done, as a status of all of them says; what was
 * told of each of them counts.
 */
static void all_told(struct pf_channel *c, bool failed)
{
	unsigned int i;

	for (i = c->first; i < c->copies; i++) {
		if (c->copy[i].done)
			continue;
		c->copy[i].done = true;
		c->copy[i].failed = failed;
	}
}

/*
 * Waits for what was submitted.  -ETIMEDOUT: the channel is to be given up; its
 * device may still be at work on all that is not done.
 */
int pf_wait(struct pf_channel *c, bool polled, unsigned int ms)
{
	ktime_t now, until = ktime_add_ms(ktime_get(), ms);
	struct dma_device *device = c->chan->device;
	enum dma_status status;
	bool over = false;
	/* Whether it can be made sure that no callback comes any more. */
	bool can_end = device->device_terminate_all &&
		       device->device_synchronize;

	polled &= !c->unordered;
	if (c->copies == c->first)
		return 0;
	for (;;) {
		unsigned long turn = msecs_to_jiffies(c->quiet ? 1 : 20);

		if (polled ? try_wait_for_completion(&c->all_done) :
			     wait_for_completion_timeout(&c->all_done, turn))
			return 0;
		status = dma_async_is_tx_complete(c->chan, c->last, NULL, NULL);
		now = ktime_get();
		if (!over && (polled || c->quiet) &&
		    (status == DMA_COMPLETE || status == DMA_ERROR)) {
			/* A moment for the callbacks, which say which failed. */
			over = true;
			if (can_end)
				until = ktime_add_ms(now, TELLING_MS);
		}
		if (ktime_after(now, until))
			break;
		if (polled)
			cond_resched();
	}
	if (!over || !can_end)
		atomic64_inc(&timeouts);
	/*
	 * Interrupts were lost, or the driver calls nobody without one.  No
	 * callback may come after this, which would be taken for one of the next
	 * round's.
	 */
	if ((over || status == DMA_COMPLETE) && can_end &&
	    !dmaengine_terminate_sync(c->chan)) {
		all_told(c, status != DMA_COMPLETE);
		return 0;
	}
	return -ETIMEDOUT;
}

/* The next bytes, from copy @index on, that were not copied. */
bool pf_next_failed(struct pf_channel *c, size_t *index, size_t *at, size_t *end)
{
	for (; *index < c->copies; ++*index) {
		struct copy *copy = &c->copy[*index];
		/* Pairs with the release in transfer_done(). */
		bool done = smp_load_acquire(&copy->done);

		if (done && !copy->failed)
			continue;
		*at = copy->at;
		*end = copy->end;
		++*index;
		return true;
	}
	if (*index == c->copies && c->at < c->end) {
		/* It took no more. */
		++*index;
		*at = c->at;
		*end = c->end;
		return true;
	}
	return false;
}

void pf_unmap(struct pf_channel *c)
{
	struct device *dev = dmaengine_get_dma_device(c->chan);

	if (!c->mapped)
		return;
	dma_unmap_sgtable(dev, &c->dsts, DMA_FROM_DEVICE, 0);
	dma_unmap_sgtable(dev, &c->srcs, DMA_TO_DEVICE, 0);
	c->mapped = false;
}

/*
 * Gives a channel up whose device may still write: for good, its mappings
 * included.  It is told to stop, which some drivers do not pass on.  Where the
 * driver cannot even end its callbacks, this module stays for them.
 */
void pf_retire(struct pf_channel *c)
{
	c->retired = true;
	atomic64_inc(&retired_channels);
	pr_err("%s did not answer in time and is given up\n",
	       dma_chan_name(c->chan));
	if (dmaengine_terminate_async(c->chan))
		__module_get(THIS_MODULE);
}

/*
 * Folios that stay mapped for a device.  The destination is kept for good.  The
 * reference on the source makes its migration fail, so that the destination is
 * not used; it is given back when the migration has ended, which holds the folio
 * lock.
 */
struct kept {
	struct list_head list;
	struct folio *src;
};

static LIST_HEAD(kept_list);
static DEFINE_SPINLOCK(kept_lock);

static void release_kept(struct work_struct *work);
static DECLARE_DELAYED_WORK(release_work, release_kept);

static void release_kept(struct work_struct *work)
{
	struct kept *kept, *next;
	LIST_HEAD(mine);

	spin_lock(&kept_lock);
	list_splice_init(&kept_list, &mine);
	spin_unlock(&kept_lock);
	list_for_each_entry_safe(kept, next, &mine, list) {
		if (!folio_trylock(kept->src))
			continue;
		folio_unlock(kept->src);
		folio_put(kept->src);
		list_del(&kept->list);
		kfree(kept);
	}
	if (!list_empty(&mine)) {
		spin_lock(&kept_lock);
		list_splice(&mine, &kept_list);
		spin_unlock(&kept_lock);
		schedule_delayed_work(&release_work, HZ / 10);
	}
}

void pf_keep(struct folio *dst, struct folio *src)
{
	struct kept *kept = kmalloc(sizeof(*kept), GFP_NOWAIT |
				     __GFP_NOMEMALLOC | __GFP_NOWARN);

	folio_get(dst);
	folio_get(src);
	atomic64_inc(&kept_folios);
	/* Without memory the source keeps its reference, too, and its place. */
	if (!kept)
		return;
	kept->src = src;
	spin_lock(&kept_lock);
	list_add(&kept->list, &kept_list);
	spin_unlock(&kept_lock);
	schedule_delayed_work(&release_work, HZ / 10);
}

/* Before the module goes: all sources are given back. */
void pf_release_kept(void)
{
	for (;;) {
		/* Then nobody but us has the list. */
		cancel_delayed_work_sync(&release_work);
		if (list_empty(&kept_list))
			return;
		schedule_delayed_work(&release_work, 0);
		msleep(20);
	}
}

/*
 * Compares whole pages of two folios: 0 same, 1 not.  -EHWPOISON: the source
 * cannot be read; it is looked at through a copy for which that is no disaster.
 */
int pf_compare(struct pf_channel *c, struct folio *dst, struct folio *src,
	       size_t offset, size_t len)
{
	size_t at;

	for (at = offset; at < offset + len; at += PAGE_SIZE) {
		if (copy_mc_highpage(c->seen, folio_page(src, at / PAGE_SIZE)))
			return -EHWPOISON;
		if (memcmp(page_address(c->seen), folio_address(dst) + at,
			   PAGE_SIZE))
			return 1;
	}
	return 0;
}

void pf_count_lie(struct pf_channel *c, struct folio *dst)
{
	atomic64_inc(&lies);
	pr_err_ratelimited("%s says that it copied to page frame %#lx and has not\n",
			   dma_chan_name(c->chan), folio_pfn(dst));
}

int pf_register(void)
{
	return provider_begin();
}

void pf_unregister(void)
{
	provider_end();
}
