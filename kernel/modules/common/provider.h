/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What both modules have as providers of copies: their registration, and the
 * parameters `enabled` and `reasons`.  Included once by the shim of each, which
 * defines provider_copy() and provider_min_bytes().
 */
#ifndef PAGEFERRY_PROVIDER_H
#define PAGEFERRY_PROVIDER_H

#include <linux/lockdep.h>
#include <linux/migrate.h>
#include <linux/migrate_copy_offload.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/string.h>
#include <linux/sysfs.h>

/* Copies a batch; see struct migrator. */
static int provider_copy(struct list_head *dsts, struct list_head *srcs,
			 unsigned int folios);
/* Smaller batches are not worth it. */
static unsigned long provider_min_bytes(void);

/*
 * Reclaim, which migrates too, may use the last memory there is (PF_MEMALLOC).
 * A copy that can be left to the kernel must not, nor what drivers allocate for
 * it: as __GFP_NOMEMALLOC would say.
 */
static int provider_offload(struct list_head *dsts, struct list_head *srcs,
			    unsigned int folios)
{
	unsigned int flags = current->flags;
	int ret;

	current->flags &= ~PF_MEMALLOC;
	ret = provider_copy(dsts, srcs, folios);
	current_restore_flags(flags, PF_MEMALLOC);
	return ret;
}

static const struct migrator provider = {
	.name = KBUILD_MODNAME,
	.offload_copy = provider_offload,
	.owner = THIS_MODULE,
};

/* Protects what follows, and the registration itself. */
static DEFINE_MUTEX(provider_mutex);
static unsigned long provider_reasons = MIGRATE_OFFLOAD_REASONS_ALLOWED;
static bool provider_enabled = true;
/* Between load and unload, when there is something to register. */
static bool provider_ready;
static bool provider_registered;

/* Says in the log why a value is not taken. */
static int refuse(const struct kernel_param *kp, const char *val,
		  const char *wanted)
{
	pr_err("%s: \"%.*s\" refused: it must be %s\n", kp->name,
	       (int)min_t(size_t, strcspn(val, "\n"), 64), val, wanted);
	return -EINVAL;
}

/* What the thresholds follow from has changed. */
static void provider_set_thresholds(void)
{
	mutex_lock(&provider_mutex);
	if (provider_registered)
		migrate_offload_set_thresholds(&provider, 1,
					       provider_min_bytes());
	mutex_unlock(&provider_mutex);
}

/* What `enabled` says is made so. */
static int provider_settle(void)
{
	int ret = 0;

	lockdep_assert_held(&provider_mutex);
	if (!provider_ready || provider_enabled == provider_registered)
		return 0;
	if (!provider_enabled) {
		provider_registered = false;
		return migrate_offload_unregister(&provider);
	}
	ret = migrate_offload_register(&provider, provider_reasons);
	if (ret == -EBUSY)
		pr_err("another module copies for page migration; see /sys/kernel/mm/migrate_offload/migrator\n");
	if (ret)
		return ret;
	provider_registered = true;
	return migrate_offload_set_thresholds(&provider, 1,
					      provider_min_bytes());
}

/* From now on `enabled` counts. */
static int provider_begin(void)
{
	int ret;

	mutex_lock(&provider_mutex);
	provider_ready = true;
	ret = provider_settle();
	provider_ready = !ret;
	mutex_unlock(&provider_mutex);
	return ret;
}

/* Waits for the batches under way; none comes afterwards. */
static void provider_end(void)
{
	mutex_lock(&provider_mutex);
	provider_enabled = false;
	provider_settle();
	provider_ready = false;
	mutex_unlock(&provider_mutex);
}

static int enabled_set(const char *val, const struct kernel_param *kp)
{
	bool on, before;
	int ret;

	if (kstrtobool(val, &on))
		return refuse(kp, val, "0 or 1");
	mutex_lock(&provider_mutex);
	before = provider_enabled;
	provider_enabled = on;
	ret = provider_settle();
	if (ret)
		provider_enabled = before;
	mutex_unlock(&provider_mutex);
	return ret;
}

static const struct kernel_param_ops enabled_ops = {
	.set = enabled_set,
	.get = param_get_bool,
};
module_param_cb(enabled, &enabled_ops, &provider_enabled, 0644);
MODULE_PARM_DESC(enabled, "Whether it copies (0 or 1); it can be unloaded while it does not");

static int reasons_set(const char *val, const struct kernel_param *kp)
{
	unsigned long mask;

	if (migrate_offload_reason_mask_parse(val, &mask))
		return refuse(kp, val,
			      "all, none, or names of migration reasons with commas between");
	mutex_lock(&provider_mutex);
	WRITE_ONCE(provider_reasons, mask);
	if (provider_registered)
		migrate_offload_set_reason_mask(&provider, mask);
	mutex_unlock(&provider_mutex);
	return 0;
}

static int reasons_get(char *buf, const struct kernel_param *kp)
{
	return migrate_offload_reason_mask_format(buf,
						  READ_ONCE(provider_reasons));
}

static const struct kernel_param_ops reasons_ops = {
	.set = reasons_set,
	.get = reasons_get,
};
module_param_cb(reasons, &reasons_ops, NULL, 0644);
MODULE_PARM_DESC(reasons, "Why pages are migrated that this copies: all, none, or names");

/* Sums since the module was loaded, read as parameters. */
static int sum_get(char *buf, const struct kernel_param *kp)
{
	return sysfs_emit(buf, "%lld\n", atomic64_read(kp->arg));
}

/* A sum at load would be called without a look at whether there is a setter. */
static int sum_set(const char *val, const struct kernel_param *kp)
{
	return refuse(kp, val, "nothing: it can only be read");
}

static const struct kernel_param_ops sum_ops = {
	.set = sum_set,
	.get = sum_get,
};

#define SUM(name, what)						\
	static atomic64_t name;					\
	module_param_cb(name, &sum_ops, &name, 0444);		\
	MODULE_PARM_DESC(name, what)

/* A number within bounds; `changed` is called when it has been set. */
struct pf_number {
	unsigned int *value, least, most;
	const char *wanted;
	void (*changed)(void);
};

static int number_set(const char *val, const struct kernel_param *kp)
{
	const struct pf_number *number = kp->arg;
	unsigned int n;

	if (kstrtouint(val, 0, &n) || n < number->least || n > number->most)
		return refuse(kp, val, number->wanted);
	WRITE_ONCE(*number->value, n);
	if (number->changed)
		number->changed();
	return 0;
}

static int number_get(char *buf, const struct kernel_param *kp)
{
	const struct pf_number *number = kp->arg;

	return sysfs_emit(buf, "%u\n", READ_ONCE(*number->value));
}

static const struct kernel_param_ops number_ops = {
	.set = number_set,
	.get = number_get,
};

/* The bounds are numbers as one reads them: they are part of what is said. */
#define NUMBER(name, initial, lowest, highest, on_change, what)		\
	static unsigned int name = initial;				\
	static const struct pf_number name##_number = {			\
		.value = &name, .least = lowest, .most = highest,	\
		.wanted = __stringify(lowest) " to " __stringify(highest), \
		.changed = on_change,					\
	};								\
	module_param_cb(name, &number_ops, (void *)&name##_number, 0644); \
	MODULE_PARM_DESC(name, what " (" __stringify(lowest) " to "	\
			 __stringify(highest) ")")

#endif
