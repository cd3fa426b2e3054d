// SPDX-License-Identifier: GPL-2.0
/*
 * A test part: a provider of copies that misbehaves as it is told to, so that
 * tests can see what migration makes of it.  It is of no other use.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/migrate.h>
#include <linux/migrate_copy_offload.h>
#include <linux/mm.h>
#include <linux/module.h>

enum { HONEST, FAILS, LIES, SLOW, HALF, DECLINES, MODES };

static unsigned int mode;

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
		 "0 honest, 1 fails, 2 says that it copied and did not, 3 slow, 4 copies every other folio, 5 declines");

static unsigned int min_folios;
module_param(min_folios, uint, 0444);
MODULE_PARM_DESC(min_folios, "Batches of fewer folios are not offered");

static atomic_t under_way, most_folios;

static int under_way_get(char *buf, const struct kernel_param *kp)
{
	return sysfs_emit(buf, "%d\n", atomic_read(kp->arg));
}

static int read_only(const char *val, const struct kernel_param *kp)
{
	return -EINVAL;
}

static const struct kernel_param_ops count_ops = {
	.set = read_only,
	.get = under_way_get,
};
module_param_cb(under_way, &count_ops, &under_way, 0444);
MODULE_PARM_DESC(under_way, "Batches being copied now");
module_param_cb(most_folios, &count_ops, &most_folios, 0444);
MODULE_PARM_DESC(most_folios, "Folios of the largest batch so far");

static bool can_batch(int reason, unsigned int folios, unsigned long bytes)
{
	return READ_ONCE(mode) != DECLINES;
}

static int offload_copy(struct list_head *dsts, struct list_head *srcs,
			unsigned int folios)
{
	struct folio *src, *dst = list_first_entry(dsts, struct folio, lru);
	unsigned int now = READ_ONCE(mode), i = 0;
	int largest = atomic_read(&most_folios);

	while (largest < (int)folios &&
	       !atomic_try_cmpxchg(&most_folios, &largest, folios))
		;
	atomic_inc(&under_way);
	if (now == SLOW)
		msleep(300);
	if (now != FAILS) {
		list_for_each_entry(src, srcs, lru) {
			bool skip = now == HALF && i++ % 2;

			if (now == LIES ||
			    (!skip && !folio_mc_copy(dst, src)))
				folio_set_content_copied(dst);
			dst = list_next_entry(dst, lru);
		}
	}
	atomic_dec(&under_way);
	return now == FAILS ? -EIO : 0;
}

static const struct migrator migrator = {
	.name = KBUILD_MODNAME,
	.can_batch = can_batch,
	.offload_copy = offload_copy,
	.owner = THIS_MODULE,
};

/*
 * Registered by a parameter, since a registered provider's module cannot be
 * unloaded: the tests end the registration while batches are being copied.
 */
static bool on;

static int registered_set(const char *val, const struct kernel_param *kp)
{
	bool wanted;
	int ret;

	ret = kstrtobool(val, &wanted);
	if (ret || wanted == on)
		return ret;
	ret = wanted ? migrate_offload_register(&migrator,
						MIGRATE_OFFLOAD_REASONS_ALLOWED)
		     : migrate_offload_unregister(&migrator);
	if (!ret)
		on = wanted;
	if (!ret && on)
		migrate_offload_set_thresholds(&migrator, min_folios, 0);
	return ret;
}

static const struct kernel_param_ops registered_ops = {
	.set = registered_set,
	.get = param_get_bool,
};
module_param_cb(registered, &registered_ops, &on, 0644);
MODULE_PARM_DESC(registered, "Whether it is asked for copies");

static int __init copy_test_init(void)
{
	pr_warn("a test part is loaded: it may be told to lose data\n");
	return 0;
}
module_init(copy_test_init);

static void __exit copy_test_exit(void)
{
}
module_exit(copy_test_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A misbehaving provider of copies, for tests");
