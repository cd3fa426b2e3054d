//! The postings of one word: the documents it stands in, and where in each.
//!
//! Documents are in ascending order, their positions one after another in one array. Taking a
//! document out marks its entry as dead (a count of zero) and leaves the rest in place; when half
//! of the entries are dead the list is packed where it lies. So taking out never allocates, and
//! only adding can run out of memory, which is an error here and not the end of the program.

use allocator_api2::alloc::Allocator;
use allocator_api2::vec::Vec;

/// The memory in which the index lives has no room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// A list that would have to grow is packed instead if one entry in this many is dead: a list that
/// keeps its size then needs no more memory, and packing costs a few steps for each entry added.
const PACK: usize = 8;

/// One document in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The document.
    pub(super) doc: u32,
    start: u32,
    /// How often the word stands in it; 0: the document has been taken out.
    pub(super) count: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Postings<A: Allocator> {
    entries: Vec<Entry, A>,
    positions: Vec<u32, A>,
    dead: usize,
}

impl<A: Allocator + Clone> Postings<A> {
    pub(super) fn new_in(alloc: A) -> Self {
        Self { entries: Vec::new_in(alloc.clone()), positions: Vec::new_in(alloc), dead: 0 }
    }

    /// Adds `doc`, which is greater than all documents in the list, with its `positions` in
    /// ascending order.
    pub(super) fn add(&mut self, doc: u32, positions: &[u32]) -> Result<(), Full> {
        debug_assert!(self.entries.last().is_none_or(|last| last.doc < doc));
        let grows = self.entries.len() == self.entries.capacity()
            || self.positions.len() + positions.len() > self.positions.capacity();
        if grows && self.dead * PACK >= self.entries.len() {
            self.pack();
        }
        let start = u32::try_from(self.positions.len()).map_err(|_| Full)?;
        let count = u32::try_from(positions.len()).map_err(|_| Full)?;
        self.entries.try_reserve(1).map_err(|_| Full)?;
        self.positions.try_reserve(positions.len()).map_err(|_| Full)?;
        self.positions.extend_from_slice(positions);
        self.entries.push(Entry { doc, start, count });
        Ok(())
    }
}

impl<A: Allocator> Postings<A> {
    /// Takes `doc` out; whether it was there.
    pub(super) fn remove(&mut self, doc: u32) -> bool {
        let Ok(at) = self.entries.binary_search_by_key(&doc, |e| e.doc) else { return false };
        if self.entries[at].count == 0 {
            return false;
        }
        self.entries[at].count = 0;
        self.dead += 1;
        if self.dead * 2 > self.entries.len() {
            self.pack();
        }
        true
    }

    fn pack(&mut self) {
        let (mut entries, mut positions) = (0, 0u32);
        for at in 0..self.entries.len() {
            let entry = self.entries[at];
            if entry.count == 0 {
                continue;
            }
            let from = entry.start as usize;
            self.positions.copy_within(from..from + entry.count as usize, positions as usize);
            self.entries[entries] = Entry { start: positions, ..entry };
            entries += 1;
            positions += entry.count;
        }
        self.entries.truncate(entries);
        self.positions.truncate(positions as usize);
        self.dead = 0;
    }

    /// How many documents are in the list.
    pub(super) fn documents(&self) -> usize {
        self.entries.len() - self.dead
    }

    /// The documents, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|e| e.count > 0)
    }

    /// Where the word stands in the document of `entry`, an entry of this list.
    pub(super) fn positions(&self, entry: &Entry) -> &[u32] {
        let start = entry.start as usize;
        &self.positions[start..start + entry.count as usize]
    }

    /// A reader that goes forward through the list.
    pub(super) fn cursor(&self) -> Cursor<'_> {
        Cursor { rest: &self.entries }
    }
}

/// Goes forward through a list and skips what is not asked for.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    rest: &'a [Entry],
}

impl<'a> Cursor<'a> {
    /// The entry of `doc` if it is in the list and was not passed already.
    pub(super) fn seek(&mut self, doc: u32) -> Option<&'a Entry> {
        // Gallop, then search: near targets are found in few steps, far ones in log(distance).
        let mut step = 1;
        while step < self.rest.len() && self.rest[step].doc < doc {
            step *= 2;
        }
        let end = self.rest.len().min(step + 1);
        let at = step / 2 + self.rest[(step / 2).min(end)..end].partition_point(|e| e.doc < doc);
        self.rest = &self.rest[at.min(self.rest.len())..];
        self.rest.first().filter(|e| e.doc == doc && e.count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use allocator_api2::alloc::{AllocError, Global};
    use std::alloc::Layout;
    use std::ptr::NonNull;

    fn list(docs: impl IntoIterator<Item = u32>) -> Postings<Global> {
        let mut list = Postings::new_in(Global);
        for doc in docs {
            assert_eq!(list.add(doc, &[doc, doc + 1]), Ok(()));
        }
        list
    }

    fn contents(list: &Postings<Global>) -> std::vec::Vec<(u32, std::vec::Vec<u32>)> {
        list.iter().map(|e| (e.doc, list.positions(e).to_vec())).collect()
    }

    #[test]
    fn what_is_taken_out_is_gone_and_the_rest_stays_through_packing() {
        let mut list = list(0..100);
        for doc in (0..100).filter(|d| d % 10 != 3) {
            assert!(list.remove(doc));
            assert!(!list.remove(doc), "taken out once only");
        }
        let expected: std::vec::Vec<_> =
            (0..10).map(|i| (i * 10 + 3, vec![i * 10 + 3, i * 10 + 4])).collect();
        assert_eq!(contents(&list), expected);
        assert_eq!(list.documents(), 10);
        assert!(list.entries.len() <= 20, "packed");
        assert_eq!(list.add(500, &[9]), Ok(()));
        assert_eq!(contents(&list).last(), Some(&(500, vec![9])));
    }

    #[test]
    fn a_cursor_finds_every_document_and_no_other() {
        for step in [1u32, 2, 3, 7] {
            let list = list((0..200).step_by(step as usize));
            let mut cursor = list.cursor();
            for doc in 0u32..220 {
                let is_there = doc < 200 && doc.is_multiple_of(step);
                assert_eq!(cursor.seek(doc).map(|e| e.doc), is_there.then_some(doc));
            }
            let mut far = list.cursor();
            assert_eq!(far.seek(step * 20).map(|e| e.doc), Some(step * 20));
            assert_eq!(far.seek(0), None, "passed already");
        }
        assert_eq!(list([]).cursor().seek(1), None);
    }

    #[test]
    fn a_list_that_keeps_its_size_needs_no_more_memory() {
        let mut list = list(0..1000);
        let room = |l: &Postings<Global>| (l.entries.capacity(), l.positions.capacity());
        let before = room(&list);
        for doc in 1000..20_000 {
            assert!(list.remove(doc - 700));
            assert_eq!(list.add(doc, &[1, 2]), Ok(()));
        }
        assert!(room(&list).0 <= before.0 * 2 && room(&list).1 <= before.1 * 2);
        assert_eq!(list.documents(), 1000);
    }

    #[derive(Clone)]
    struct Nothing;
    // SAFETY: it never gives out memory.
    unsafe impl Allocator for Nothing {
        fn allocate(&self, _: Layout) -> Result<NonNull<[u8]>, AllocError> {
            Err(AllocError)
        }
        unsafe fn deallocate(&self, _: NonNull<u8>, _: Layout) {}
    }

    #[test]
    fn memory_that_runs_out_is_an_error() {
        let mut list = Postings::new_in(Nothing);
        assert_eq!(list.add(1, &[1]), Err(Full));
        assert_eq!(list.documents(), 0);
    }
}
