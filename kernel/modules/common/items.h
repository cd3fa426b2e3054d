/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The folios of a batch side by side, for both modules: the C half of items.rs.
 * Included once by the shim of each.
 */
#ifndef PAGEFERRY_ITEMS_H
#define PAGEFERRY_ITEMS_H

#include <linux/kasan-enabled.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#ifdef CONFIG_ARM64_MTE
#include <asm/mte.h>
#endif

/* As `Item` in items.rs. */
struct pf_item {
	struct folio *dst;
	struct folio *src;
	size_t start;	/* of its bytes, counted through the batch */
	bool failed;
	bool kept;	/* by who copies with devices */
};

size_t pf_items(struct list_head *dsts, struct list_head *srcs,
		struct pf_item *out, size_t most, size_t *bytes);
void pf_mark(struct folio *dst);

/*
 * Whether it has more than bytes: allocation tags, which copy_highpage() copies
 * and a device does not (PF_BYTES_ONLY).
 */
static bool has_tags(struct folio *src)
{
#if defined(CONFIG_ARM64_MTE) && defined(PF_BYTES_ONLY)
	long i;

	/* The kernel's own tags, which copy_highpage() resets. */
	if (kasan_hw_tags_enabled())
		return true;

	for (i = 0; system_supports_mte() && i < folio_nr_pages(src); i++)
		if (page_mte_tagged(folio_page(src, i)))
			return true;
#endif
	return false;
}

/* The folios of two lists; how many there were. */
size_t pf_items(struct list_head *dsts, struct list_head *srcs,
		struct pf_item *out, size_t most, size_t *bytes)
{
	struct folio *src, *dst = list_first_entry(dsts, struct folio, lru);
	size_t n = 0, start = 0;

	list_for_each_entry(src, srcs, lru) {
		if (n == most || list_entry_is_head(dst, dsts, lru))
			break;
		out[n++] = (struct pf_item) {
			.dst = dst, .src = src, .start = start,
			.failed = has_tags(src),
		};
		start += folio_size(src);
		dst = list_next_entry(dst, lru);
	}
	*bytes = start;
	return n;
}

void pf_mark(struct folio *dst)
{
	folio_set_content_copied(dst);
}

#endif
