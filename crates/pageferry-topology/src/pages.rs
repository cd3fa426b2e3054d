//! Page sizes of the running system.

use serde::Serialize;

use crate::error::ReadError;
use crate::tree::Tree;

const HUGETLB: &str = "sys/kernel/mm/hugepages";
const PMD_SIZE: &str = "sys/kernel/mm/transparent_hugepage/hpage_pmd_size";

/// The sizes in which memory can be mapped, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PageSizes {
    /// The base page.
    pub base_bytes: u64,
    /// A transparent huge page mapped by one PMD; `None` without that support.
    pub thp_bytes: Option<u64>,
    /// The sizes for which hugetlb pools exist, ascending.
    pub hugetlb_bytes: Vec<u64>,
}

pub(crate) fn read(tree: &Tree) -> Result<PageSizes, ReadError> {
    let thp_bytes = tree.optional::<u64>(PMD_SIZE, "a number of bytes")?.filter(|&n| n > 0);
    let hugetlb_bytes = tree
        .numbered(HUGETLB, "hugepages-", "kB")?
        .into_iter()
        .map(|kib| kib.saturating_mul(1024))
        .collect();
    let told = if tree.is_this_machine() { None } else { thp_bytes };
    Ok(PageSizes { base_bytes: told.map_or_else(page_size, base_of_pmd), thp_bytes, hugetlb_bytes })
}

/// Another machine's tree does not say its base page, but a PMD tells: a page
/// table is one base page of 8-byte entries (x86-64, arm64, riscv64), so a PMD
/// maps `base * base / 8`. 2 MiB is of 4 KiB pages, 32 MiB of 16, 512 MiB of 64.
/// A page table of s390 is half a page, so its 1 MiB is rounded up to 4 KiB. POWER's
/// PMDs, 2 MiB or 16 MiB of pages of 64 KiB, do not tell.
fn base_of_pmd(pmd_bytes: u64) -> u64 {
    pmd_bytes.saturating_mul(8).isqrt().next_power_of_two()
}

fn page_size() -> u64 {
    // SAFETY: sysconf(3) takes no pointer and has no precondition.
    let answer = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX has no machine without a page size; 4096 is the smallest that Linux uses.
    u64::try_from(answer).unwrap_or(4096)
}
