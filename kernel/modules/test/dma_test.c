// SPDX-License-Identifier: GPL-2.0
/*
 * A test part: a DMA engine that copies by the CPU and misbehaves as it is told
 * to, so that tests can see what becomes of the pages.  It is of no other use.
 *
 * What it writes to is always memory that it was asked to write to: it does
 * wrong to a batch, and to nobody else.  Its channels that were given up stay
 * taken, and so does the module.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-direct.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#define MOST_CHANNELS	32
/* What a device that is late writes: nothing that was there. */
#define RUBBISH		0xee
#define A_FEW		5

enum {
	HONEST,
	FAILS,		/* copies nothing, and says so */
	LIES,		/* copies nothing, and says that it did */
	MISDIRECTS,	/* copies to the destination of a neighbour */
	HANGS,		/* never ends */
	LATE,		/* ends after delay_ms, even when it is told to stop */
	QUIET,		/* copies, and does not call back */
	REFUSES,	/* has no descriptors */
	REJECTS,	/* has descriptors, and does not take them */
	TIRES,		/* takes a few, slowly, and no more */
	MODES
};

static unsigned int mode;
static unsigned int delay_ms = 500;
static unsigned int descriptors = 8;
static unsigned int mask_bits = 64;	/* set once it is loaded */

static unsigned int channels = MOST_CHANNELS;
module_param(channels, uint, 0444);
MODULE_PARM_DESC(channels, "Channels (1 to 32)");
static bool unordered;
module_param(descriptors, uint, 0644);
MODULE_PARM_DESC(descriptors, "Copies that a channel takes at once");
module_param(delay_ms, uint, 0644);
MODULE_PARM_DESC(delay_ms, "How late a late one is");

static atomic_t late_writes;

static int late_writes_get(char *buf, const struct kernel_param *kp)
{
	return sysfs_emit(buf, "%d\n", atomic_read(&late_writes));
}

static int read_only(const char *val, const struct kernel_param *kp)
{
	return -EINVAL;
}

static const struct kernel_param_ops late_writes_ops = {
	.set = read_only,
	.get = late_writes_get,
};
module_param_cb(late_writes, &late_writes_ops, NULL, 0444);
MODULE_PARM_DESC(late_writes, "Copies that ended after their channel was told to stop");

static int mode_set(const char *val, const struct kernel_param *kp)
{
	unsigned int n;

	if (kstrtouint(val, 0, &n) || n >= MODES) {
		pr_err("mode: refused: it must be 0 to %d\n", MODES - 1);
		return -EINVAL;
	}
	WRITE_ONCE(mode, n);
	return 0;
}

static const struct kernel_param_ops mode_ops = {
	.set = mode_set,
	.get = param_get_uint,
};
module_param_cb(mode, &mode_ops, &mode, 0644);
MODULE_PARM_DESC(mode,
		 "0 honest, 1 fails, 2 lies, 3 misdirects, 4 hangs, 5 late, 6 quiet, 7 refuses, 8 rejects, 9 tires");

struct channel {
	struct dma_chan chan;
	spinlock_t lock;	/* protects what follows */
	struct list_head submitted, issued;
	struct list_head ended;	/* and nobody told */
	unsigned int live;	/* descriptors in use */
	struct delayed_work work;
};

struct transfer {
	struct dma_async_tx_descriptor tx;
	struct list_head list;
	dma_addr_t dst, src;
	size_t len;
	struct dmaengine_result result;
	bool stopped;
};

static struct platform_device *pdev;
static struct dma_device engine;
static struct channel all[MOST_CHANNELS];
static struct workqueue_struct *queue;

static int mask_set(const char *val, const struct kernel_param *kp)
{
	unsigned int n;

	if (!pdev || kstrtouint(val, 0, &n) || n < 24 || n > 64)
		return -EINVAL;
	mask_bits = n;
	/* dma_set_mask() refuses what is of no use. */
	*pdev->dev.dma_mask = DMA_BIT_MASK(n);
	return 0;
}

static const struct kernel_param_ops mask_ops = {
	.set = mask_set,
	.get = param_get_uint,
};
module_param_cb(mask_bits, &mask_ops, &mask_bits, 0644);
MODULE_PARM_DESC(mask_bits, "Bits of an address that it has (24 to 64)");

static int unordered_set(const char *val, const struct kernel_param *kp)
{
	int ret = param_set_bool(val, kp);

	if (ret)
		return ret;
	if (unordered)
		dma_cap_set(DMA_COMPLETION_NO_ORDER, engine.cap_mask);
	else
		dma_cap_clear(DMA_COMPLETION_NO_ORDER, engine.cap_mask);
	return 0;
}

static const struct kernel_param_ops unordered_ops = {
	.set = unordered_set,
	.get = param_get_bool,
};
module_param_cb(unordered, &unordered_ops, &unordered, 0644);
MODULE_PARM_DESC(unordered,
		 "Copies end in another order than that in which they were asked for; while nobody has a channel");

static void *at(dma_addr_t addr)
{
	return phys_to_virt(dma_to_phys(&pdev->dev, addr));
}

static dma_cookie_t tx_submit(struct dma_async_tx_descriptor *tx)
{
	struct transfer *t = container_of(tx, struct transfer, tx);
	struct channel *c = container_of(tx->chan, struct channel, chan);
	unsigned long flags;

	spin_lock_irqsave(&c->lock, flags);
	if (READ_ONCE(mode) == REJECTS ||
	    (READ_ONCE(mode) == TIRES && c->live > A_FEW)) {
		c->live--;
		spin_unlock_irqrestore(&c->lock, flags);
		kfree(t);
		return -ENOSPC;
	}
	if (++c->chan.cookie < DMA_MIN_COOKIE)
		c->chan.cookie = DMA_MIN_COOKIE;
	tx->cookie = c->chan.cookie;
	if (unordered)
		list_add(&t->list, &c->submitted);
	else
		list_add_tail(&t->list, &c->submitted);
	spin_unlock_irqrestore(&c->lock, flags);
	return tx->cookie;
}

static struct dma_async_tx_descriptor *prep(struct dma_chan *chan,
					    dma_addr_t dst, dma_addr_t src,
					    size_t len, unsigned long how)
{
	struct channel *c = container_of(chan, struct channel, chan);
	struct transfer *t;
	unsigned long flags;

	if (READ_ONCE(mode) == REFUSES)
		return NULL;
	t = kzalloc(sizeof(*t), GFP_NOWAIT | __GFP_NOWARN);
	if (!t)
		return NULL;
	spin_lock_irqsave(&c->lock, flags);
	if (c->live >= READ_ONCE(descriptors)) {
		spin_unlock_irqrestore(&c->lock, flags);
		kfree(t);
		return NULL;
	}
	c->live++;
	spin_unlock_irqrestore(&c->lock, flags);
	dma_async_tx_descriptor_init(&t->tx, chan);
	t->tx.flags = how;
	t->tx.tx_submit = tx_submit;
	t->dst = dst;
	t->src = src;
	t->len = len;
	return &t->tx;
}

/* Gives each of a pair of equal length the other's destination. */
static void misdirect(struct list_head *issued)
{
	struct transfer *t, *before = NULL;

	list_for_each_entry(t, issued, list) {
		if (before && before->len == t->len) {
			swap(before->dst, t->dst);
			before = NULL;
		} else {
			before = t;
		}
	}
}

static void issue_pending(struct dma_chan *chan)
{
	struct channel *c = container_of(chan, struct channel, chan);
	unsigned int now = READ_ONCE(mode);
	unsigned long flags;

	spin_lock_irqsave(&c->lock, flags);
	if (now == MISDIRECTS)
		misdirect(&c->submitted);
	list_splice_tail_init(&c->submitted, &c->issued);
	spin_unlock_irqrestore(&c->lock, flags);
	if (now != HANGS)
		queue_delayed_work(queue, &c->work,
				   now == LATE || now == TIRES ?
				   msecs_to_jiffies(delay_ms) : 0);
}

/* Says what became of the copies that have ended and of which nobody knows. */
static void tell(struct channel *c)
{
	struct transfer *t, *next;
	LIST_HEAD(all);
	unsigned long flags;

	spin_lock_irqsave(&c->lock, flags);
	list_splice_init(&c->ended, &all);
	spin_unlock_irqrestore(&c->lock, flags);
	list_for_each_entry_safe(t, next, &all, list) {
		if (t->tx.callback_result)
			t->tx.callback_result(t->tx.callback_param, &t->result);
		kfree(t);
	}
}

static void end_transfer(struct channel *c, struct transfer *t, unsigned int now)
{
	unsigned long flags;

	t->result.result = now == FAILS ? DMA_TRANS_WRITE_FAILED :
					  DMA_TRANS_NOERROR;

	if (t->stopped) {
		memset(at(t->dst), RUBBISH, t->len);
		atomic_inc(&late_writes);
	} else if (now != FAILS && now != LIES) {
		memcpy(at(t->dst), at(t->src), t->len);
	}
	spin_lock_irqsave(&c->lock, flags);
	c->live--;
	if (!t->stopped)
		c->chan.completed_cookie = t->tx.cookie;
	spin_unlock_irqrestore(&c->lock, flags);
	/*
	 * An interrupt tells of all that has ended until then; one that keeps no
	 * order, of its own copy alone.
	 */
	if (t->stopped || now == QUIET || unordered || !t->tx.callback_result) {
		if (!t->stopped && now != QUIET && t->tx.callback_result &&
		    (t->tx.flags & DMA_PREP_INTERRUPT))
			t->tx.callback_result(t->tx.callback_param, &t->result);
		kfree(t);
		return;
	}
	spin_lock_irqsave(&c->lock, flags);
	list_add_tail(&t->list, &c->ended);
	spin_unlock_irqrestore(&c->lock, flags);
	if (t->tx.flags & DMA_PREP_INTERRUPT)
		tell(c);
}

static void work(struct work_struct *work)
{
	struct channel *c = container_of(to_delayed_work(work), struct channel, work);
	unsigned int now = READ_ONCE(mode);

	for (;;) {
		struct transfer *t;

		spin_lock_irq(&c->lock);
		t = list_first_entry_or_null(&c->issued, struct transfer, list);
		if (t)
			list_del(&t->list);
		spin_unlock_irq(&c->lock);
		if (!t)
			return;
		end_transfer(c, t, now);
	}
}

static enum dma_status tx_status(struct dma_chan *chan, dma_cookie_t cookie,
				 struct dma_tx_state *state)
{
	if (unordered)
		return DMA_OUT_OF_ORDER;
	if (dma_async_is_complete(cookie, READ_ONCE(chan->completed_cookie),
				  READ_ONCE(chan->cookie)) != DMA_COMPLETE)
		return DMA_IN_PROGRESS;
	/* As ioatdma: who asks has the callbacks called, which alone know. */
	tell(container_of(chan, struct channel, chan));
	return DMA_COMPLETE;
}

static int terminate_all(struct dma_chan *chan)
{
	struct channel *c = container_of(chan, struct channel, chan);
	struct transfer *t, *next;
	unsigned long flags;

	spin_lock_irqsave(&c->lock, flags);
	list_for_each_entry_safe(t, next, &c->ended, list) {
		list_del(&t->list);
		kfree(t);
	}
	list_splice_tail_init(&c->submitted, &c->issued);
	list_for_each_entry_safe(t, next, &c->issued, list) {
		t->stopped = true;
		if (READ_ONCE(mode) == LATE)
			continue;
		list_del(&t->list);
		c->live--;
		kfree(t);
	}
	spin_unlock_irqrestore(&c->lock, flags);
	return 0;
}

/* Callbacks that have begun end; what comes late calls nobody back. */
static void synchronize(struct dma_chan *chan)
{
	struct channel *c = container_of(chan, struct channel, chan);

	if (work_busy(&c->work.work) & WORK_BUSY_RUNNING)
		flush_work(&c->work.work);
}

/* dmaengine pins the module of a device's driver, so there has to be one. */
static int probe(struct platform_device *dev)
{
	return 0;
}

static struct platform_driver driver = {
	.driver.name = KBUILD_MODNAME,
	.probe = probe,
};

static int __init dma_test_init(void)
{
	struct platform_device *dev;
	unsigned int i;
	int ret;

	if (channels < 1 || channels > MOST_CHANNELS)
		return -EINVAL;
	queue = alloc_workqueue(KBUILD_MODNAME, WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!queue)
		return -ENOMEM;
	ret = platform_driver_register(&driver);
	if (ret)
		goto no_driver;
	dev = platform_device_register_simple(KBUILD_MODNAME, -1, NULL, 0);
	if (IS_ERR(dev)) {
		ret = PTR_ERR(dev);
		goto no_device;
	}
	pdev = dev;
	if (!pdev->dev.driver) {
		ret = -ENXIO;
		goto no_engine;
	}
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (ret)
		goto no_engine;
	/* It copies any length: bounce buffers are what limits it. */
	dma_set_max_seg_size(&pdev->dev, SZ_2M);
#ifdef CONFIG_ARCH_HAS_SYNC_DMA_FOR_DEVICE
	/* It sees what the CPUs see, being one. */
	pdev->dev.dma_coherent = true;
#endif
	engine.dev = &pdev->dev;
	dma_cap_set(DMA_MEMCPY, engine.cap_mask);
	engine.device_prep_dma_memcpy = prep;
	engine.device_issue_pending = issue_pending;
	engine.device_tx_status = tx_status;
	engine.device_terminate_all = terminate_all;
	engine.device_synchronize = synchronize;
	INIT_LIST_HEAD(&engine.channels);
	for (i = 0; i < channels; i++) {
		struct channel *c = &all[i];

		spin_lock_init(&c->lock);
		INIT_LIST_HEAD(&c->submitted);
		INIT_LIST_HEAD(&c->ended);
		INIT_LIST_HEAD(&c->issued);
		INIT_DELAYED_WORK(&c->work, work);
		c->chan.device = &engine;
		c->chan.cookie = DMA_MIN_COOKIE;
		c->chan.completed_cookie = DMA_MIN_COOKIE;
		list_add_tail(&c->chan.device_node, &engine.channels);
	}
	ret = dma_async_device_register(&engine);
	if (ret)
		goto no_engine;
	pr_warn("a test part is loaded: it may be told to lose data\n");
	return 0;

no_engine:
	platform_device_unregister(pdev);
no_device:
	platform_driver_unregister(&driver);
no_driver:
	destroy_workqueue(queue);
	return ret;
}
module_init(dma_test_init);

static void __exit dma_test_exit(void)
{
	dma_async_device_unregister(&engine);
	destroy_workqueue(queue);
	platform_device_unregister(pdev);
	platform_driver_unregister(&driver);
}
module_exit(dma_test_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A misbehaving DMA engine, for tests");
