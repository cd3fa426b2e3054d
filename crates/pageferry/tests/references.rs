//! Who holds a plain reference to a page that moves away (`vmsplice`, `MSG_ZEROCOPY`) goes on
//! reading what was there, whatever moves meanwhile.

mod support;

use pageferry::{Engine, Folios, Order, Region};
use pageferry_sys::inject::Faulty;
use pageferry_sys::mm::Advice;
use pageferry_sys::{SysOp, page_size};
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use support::{check, engine, fill, first_node, frames, promised, value};

/// Moves a region often enough that every recycled frame would have been used, past the grace
/// period.
fn move_about(engine: &Engine, region: &Region, order: Order) {
    for _ in 0..6 {
        let to = region.to(first_node(engine));
        let report = engine.migrate(to).even_if_there().order(order).run().expect("a move");
        assert!(report.bytes_moved > 0, "{report:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn as_filled(region: &Region) -> Vec<u8> {
    (0..region.len() / 8).flat_map(|i| value(i, 0).to_ne_bytes()).collect()
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: pipe2 writes two descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

#[test]
fn what_vmsplice_gave_to_a_pipe_comes_out_as_it_went_in() {
    let Some(engine) = engine() else { return };
    for folios in [Folios::Base, Folios::Huge] {
        for order in [Order::Frozen, Order::Live] {
            let region = engine.map(8 << 20).folios(folios).build().expect("memory");
            fill(&region, 0..region.len());
            let (out, into) = pipe();
            let len = 16 * page_size();
            let iov = libc::iovec { iov_base: region.as_ptr().cast(), iov_len: len };
            // SAFETY: the vector describes memory of the region, which outlives the pipe.
            let given = unsafe { libc::vmsplice(into.as_raw_fd(), &iov, 1, 0) };
            assert_eq!(given, isize::try_from(len).expect("small"));
            drop(into);
            move_about(&engine, &region, order);
            let mut read = Vec::new();
            std::fs::File::from(out).read_to_end(&mut read).expect("a pipe");
            assert!(read == as_filled(&region)[..len], "{folios:?} {order:?}: pages were replaced");
            check(&region, 0..region.len());
        }
    }
}

/// Sends without copying until the socket takes no more.
fn send_all(socket: RawFd, region: &Region) -> usize {
    const MSG_ZEROCOPY: libc::c_int = 0x400_0000;
    let mut sent = 0;
    while sent < region.len() {
        let len = (region.len() - sent).min(256 << 10);
        // SAFETY: the buffer is memory of the region, which outlives the connection.
        let done = unsafe {
            let buffer = region.as_ptr().add(sent).cast_const().cast();
            libc::send(socket, buffer, len, MSG_ZEROCOPY | libc::MSG_DONTWAIT)
        };
        match usize::try_from(done) {
            Ok(done) if done > 0 => sent += done,
            _ => break,
        }
    }
    sent
}

fn option(socket: RawFd, name: libc::c_int, value: libc::c_int) -> libc::c_int {
    let len = libc::socklen_t::try_from(size_of_val(&value)).expect("four");
    // SAFETY: the option is an int.
    unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, name, (&raw const value).cast(), len) }
}

#[test]
fn what_was_sent_without_copying_arrives_as_it_was_sent() {
    let Some(engine) = engine() else { return };
    let region = engine.map(8 << 20).folios(Folios::Base).build().expect("memory");
    fill(&region, 0..region.len());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    option(listener.as_raw_fd(), libc::SO_RCVBUF, 4096);
    let sender = TcpStream::connect(listener.local_addr().expect("bound")).expect("loopback");
    let (mut peer, _) = listener.accept().expect("connected");
    option(sender.as_raw_fd(), libc::SO_SNDBUF, 4 << 20);
    if option(sender.as_raw_fd(), libc::SO_ZEROCOPY, 1) != 0 {
        eprintln!("skipped: no SO_ZEROCOPY here");
        return;
    }
    let sent = send_all(sender.as_raw_fd(), &region);
    assert!(sent > 0, "nothing could be sent");
    move_about(&engine, &region, Order::Frozen);
    drop(sender);
    let mut read = Vec::new();
    peer.read_to_end(&mut read).expect("the peer reads");
    assert!(read == as_filled(&region)[..sent], "pages were replaced on their way");
}

#[test]
fn a_region_that_promises_gets_its_own_old_pages_again() {
    let Some(engine) = engine() else { return };
    let region = promised(engine.map(4 << 20).folios(Folios::Base)).build().expect("memory");
    fill(&region, 0..region.len());
    let Some(mut had) = frames(&region) else {
        eprintln!("skipped: this user does not see physical addresses");
        return;
    };
    let mut again = 0;
    for _ in 0..8 {
        move_about(&engine, &region, Order::Frozen);
        let now = frames(&region).expect("as before");
        again += now.iter().filter(|frame| had.contains(frame)).count();
        had.extend(now);
    }
    assert!(again > 0, "no old page was used again");
    check(&region, 0..region.len());
}

#[test]
fn frames_that_another_region_left_at_rest_make_room() {
    const BUDGET: usize = 8 << 20;
    const GRACE: Duration = Duration::from_secs(1);
    let counting = Arc::new(Faulty::new());
    // So long that a move uses none of the frames that it leaves, and so leaves all that may rest.
    let builder = Engine::builder().frame_budget(BUDGET).frame_grace(GRACE);
    let builder = builder.idle_release(Duration::from_secs(3600)).sys(counting.clone());
    let Some(engine) = support::build(builder) else { return };
    if engine.machine().memory_nodes().count() > 1 {
        // Old pages are frames of the node that they were on: of another one than they are moved to,
        // or of the same, as the CPU was that touched them first.
        return eprintln!("skipped: several nodes, and frames at rest on each of them");
    }
    let regions = [(); 2].map(|()| {
        let region = promised(engine.map(BUDGET).folios(Folios::Base)).build().expect("memory");
        fill(&region, 0..region.len());
        region
    });
    let move_it = |region: &Region| {
        let wish = engine.migrate(region.to(first_node(&engine))).even_if_there().threads(1);
        let wish = wish.order(Order::Frozen).stall_budget(Duration::from_secs(1));
        let report = wish.run().expect("a move");
        report.batches_frozen + report.batches_live
    };
    // What the engine has to allocate: by the kernel's copies, and ahead of a move.
    let allocated = || {
        let populate = SysOp::Advise(Advice::PopulateWrite);
        counting.calls(SysOp::CopyIn) + counting.calls(populate)
    };
    for region in &regions {
        move_it(region);
        std::thread::sleep(GRACE + Duration::from_millis(100));
        let before = allocated();
        let batches = move_it(region);
        // Without room it would be each batch. The housekeeper adds frames at its own time.
        let times = allocated() - before;
        assert!(times * 2 < batches, "{times} allocations for {batches} batches");
        let held = engine.stats().frame_bytes;
        assert!(held > 0 && held <= BUDGET, "{held} bytes at rest");
    }
    for region in &regions {
        check(region, 0..region.len());
    }
}
