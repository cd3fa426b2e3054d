//! Free memory on the destination nodes: a move stops at a reserve rather than push a node into
//! reclaim, where every program on it would pay.
//!
//! The kernel's count of free memory is read again after a while and whenever it seems spent. In
//! between, what is granted is subtracted; what is under way when it is read is subtracted too,
//! so that several workers never promise themselves the same memory.

use super::Reserve;
use crate::sync::Mutex;
use pageferry_sys::process::ProcessKernel;
use pageferry_topology::NodeId;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// A reading is believed this long.
const FRESH: Duration = Duration::from_millis(100);
/// A node that seems full is not asked again before this long.
const FULL: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct NodeRoom {
    node: NodeId,
    reserve: u64,
    left: u64,
    /// Granted, and not yet given back.
    under_way: u64,
    read: Option<Duration>,
}

/// The destination nodes' free memory.
#[derive(Debug)]
pub(super) struct Room {
    kernel: Arc<dyn ProcessKernel>,
    nodes: Vec<Mutex<NodeRoom>>,
    /// Hugetlb pages that a dry run counts on, in bytes by node and page size.
    promised: Mutex<HashMap<(usize, usize), u64>>,
}

impl Room {
    pub(super) fn new(kernel: Arc<dyn ProcessKernel>, nodes: &[NodeId], reserve: Reserve) -> Self {
        let of = |&node: &NodeId| {
            let reserve = match reserve {
                // Where the kernel does not tell, there is nothing to keep to.
                Reserve::Watermark => kernel.node_watermark(node.get()).unwrap_or(0),
                Reserve::Bytes(bytes) => bytes,
            };
            Mutex::new(NodeRoom { node, reserve, left: 0, under_way: 0, read: None })
        };
        let nodes = nodes.iter().map(of).collect();
        Self { kernel, nodes, promised: Mutex::default() }
    }

    /// Bytes in free hugetlb pages of this size that are set aside on the node of this index.
    pub(super) fn set_aside(&self, index: usize, page_bytes: usize) -> u64 {
        let node = self.nodes[index].lock().node.get();
        let free = self.kernel.hugetlb_free(node, page_bytes).unwrap_or(0);
        let promised = self.promised.lock().get(&(index, page_bytes)).copied().unwrap_or(0);
        free.saturating_sub(promised)
    }

    /// A dry run counts on so many bytes of them.
    pub(super) fn promise(&self, index: usize, page_bytes: usize, bytes: u64) {
        *self.promised.lock().entry((index, page_bytes)).or_insert(0) += bytes;
    }

    /// Grants up to `want` bytes on the node of this index; less where there is less.
    pub(super) fn take(&self, index: usize, want: u64) -> u64 {
        let mut room = self.nodes[index].lock();
        let now = self.kernel.now();
        let stale = match room.read {
            None => true,
            Some(read) => {
                let age = now.saturating_sub(read);
                age >= FRESH || (room.left < want && age >= FULL)
            }
        };
        if stale {
            // Where the kernel does not tell, it will say itself when there is no more.
            let free = self.kernel.node_free(room.node.get()).unwrap_or(u64::MAX);
            room.left = free.saturating_sub(room.reserve).saturating_sub(room.under_way);
            room.read = Some(now);
        }
        let granted = want.min(room.left);
        room.left -= granted;
        room.under_way += granted;
        granted
    }

    /// The call that had been granted `bytes` is over; `used` of them are taken.
    pub(super) fn settle(&self, index: usize, granted: u64, used: u64) {
        let mut room = self.nodes[index].lock();
        room.under_way = room.under_way.saturating_sub(granted);
        room.left = room.left.saturating_add(granted.saturating_sub(used));
    }

    /// The kernel had no memory there: nothing is granted until it is asked again.
    pub(super) fn exhausted(&self, index: usize) {
        let mut room = self.nodes[index].lock();
        room.left = 0;
        room.read = Some(self.kernel.now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_sys::process::fake::{Event, FakeKernel, FakeProcess, ProcessOp};

    #[test]
    fn never_more_is_granted_than_lies_above_the_reserve_whoever_asks() {
        let kernel = FakeKernel::new(&[0, 1000]);
        kernel.watermark(1, 300);
        let shared: Arc<dyn ProcessKernel> = Arc::new(kernel.clone());
        let room = Room::new(Arc::clone(&shared), &[NodeId::new(1)], Reserve::Watermark);
        assert_eq!(room.take(0, 500), 500);
        assert_eq!(room.take(0, 500), 200);
        // Nothing was used of the first grant: it is there again, but not what is under way.
        room.settle(0, 500, 0);
        shared.sleep(FRESH);
        assert_eq!(room.take(0, 800), 500);
        room.exhausted(0);
        assert_eq!(room.take(0, 1), 0);
        shared.sleep(FRESH);
        kernel.add(FakeProcess::new(1, Vec::new()));
        kernel.before_move(0, Event::Free(1, 5000));
        let view = shared.open(1).expect("it is there");
        view.move_pages(&[], &[], &mut [], true).expect("nothing to do");
        assert_eq!(room.take(0, 100), 100);
        assert!(kernel.calls(ProcessOp::NodeFree) <= 4);
    }
}
