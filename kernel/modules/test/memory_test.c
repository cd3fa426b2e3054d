// SPDX-License-Identifier: GPL-2.0
/*
 * A test part: memory that is added to a node while the machine runs, and so
 * can be taken away again, of a tier below DRAM's.  For machines whose firmware
 * tells of no such memory.  There is no way to unload it, as it does not know
 * who still has pages there.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/memory.h>
#include <linux/memory-tiers.h>
#include <linux/memory_hotplug.h>
#include <linux/module.h>

static unsigned long start;
module_param(start, ulong, 0444);
MODULE_PARM_DESC(start, "Physical address of memory that Linux does not use yet, in bytes");

static unsigned long size;
module_param(size, ulong, 0444);
MODULE_PARM_DESC(size, "How much it is, in bytes: a multiple of a block of memory");

static int node = NUMA_NO_NODE;
module_param(node, int, 0444);
MODULE_PARM_DESC(node, "The node that it is added to, which has had no memory");

static int __init memory_test_init(void)
{
	unsigned long block = memory_block_size_bytes();
	struct memory_dev_type *slow;
	int error;

	if (!size || start % block || size % block) {
		pr_err("refused: start and size must be multiples of %lu\n", block);
		return -EINVAL;
	}
	if (node < 0 || node >= MAX_NUMNODES || !node_possible(node) ||
	    node_state(node, N_MEMORY)) {
		pr_err("refused: node %d is none without memory\n", node);
		return -EINVAL;
	}
	slow = alloc_memory_type(5 * MEMTIER_ADISTANCE_DRAM);
	if (IS_ERR(slow))
		return PTR_ERR(slow);
	init_node_memory_type(node, slow);
	error = add_memory_driver_managed(node, start, size,
					  "System RAM (pageferry_memory_test)",
					  MHP_NONE);
	if (error) {
		pr_err("%lu bytes at %#lx could not be added: %d\n", size, start, error);
		clear_node_memory_type(node, slow);
		put_memory_type(slow);
	}
	return error;
}
module_init(memory_test_init);

MODULE_DESCRIPTION("Test part: memory that is added while the machine runs");
MODULE_LICENSE("GPL");
