//! Devices and the kernel itself at the memory while it moves: pinned buffers, O_DIRECT, system
//! calls that read and write it.

mod support;

use io_uring::{IoUring, opcode, types};
use pageferry::{Busy, Engine, Folios, HUGE, Outcome, Region};
use pageferry_sys::page_size;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::siege::{ALL, Mover, StopOnDrop, Watchdog, account};
use support::{Racers, check, engine, fill, frames, next, nodes, value, word};

fn region(engine: &Engine, bytes: usize, huge: bool) -> Arc<Region> {
    let folios = if huge { Folios::Huge } else { Folios::Base };
    let region = engine.map(bytes).folios(folios).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

/// A file that is gone when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }
    fn open(&self, flags: i32) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
        options.open(&self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn pages_pinned_by_io_uring_stay_where_they_are_and_move_when_let_go() {
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("pinned pages");
    let (_, to) = nodes(&engine);
    let bytes = 4 * HUGE;
    for (huge, order) in ALL {
        let mut ring = match IoUring::new(8) {
            Ok(ring) => ring,
            Err(e) => return eprintln!("skipped: no io_uring here: {e}"),
        };
        let region = region(&engine, bytes, huge);
        // A buffer within one page, one over several, one across a block's end.
        let buffers = [0x3008..0x3208, 0x10000..0x15000, 2 * HUGE - 0x2000..2 * HUGE + 0x1000];
        let vectors: Vec<libc::iovec> = buffers
            .iter()
            .map(|b| libc::iovec {
                iov_base: region.as_ptr().wrapping_add(b.start).cast(),
                iov_len: b.len(),
            })
            .collect();
        // SAFETY: the buffers lie in the region, which lives until they are unregistered.
        if let Err(e) = unsafe { ring.submitter().register_buffers(&vectors) } {
            return eprintln!("skipped: io_uring registers no buffers here (ulimit -l?): {e}");
        }
        let size = if huge { HUGE } else { page_size() };
        let is_pinned = |at: usize| {
            let folio = at & !(size - 1);
            buffers.iter().any(|b| b.start < folio + size && folio < b.end)
        };
        let before = frames(&region);
        let quiet: Vec<_> = (0..bytes).step_by(page_size()).filter(|&p| !is_pinned(p)).collect();
        let parts: Vec<_> = quiet.iter().map(|&p| p..p + page_size()).collect();
        let racers = Racers::start_on(&region, &parts, 1, 1);
        let go = || engine.migrate(region.to(to)).even_if_there().order(order).run();
        for turn in 0..3u64 {
            let report = go().expect("a move");
            account(&region, &report);
            for (range, outcome) in &report.pages {
                for at in range.clone().step_by(page_size()) {
                    let pinned = is_pinned(at - region.addr());
                    let wanted = if pinned { Outcome::Busy(Busy::Pinned) } else { Outcome::Moved };
                    assert_eq!(*outcome, wanted, "{at:#x} huge: {huge} {order:?}");
                }
            }
            // The device writes to its buffers, and the program sees it.
            let words: Vec<u8> = (0..64).flat_map(|i| value(i, turn).to_ne_bytes()).collect();
            let file = Scratch::new("fixed");
            let source = file.open(0).expect("a file");
            source.write_all_at(&words, 0).expect("room");
            for (index, buffer) in (0u16..).zip(&buffers) {
                let at = region.as_ptr().wrapping_add(buffer.start);
                let fd = types::Fd(source.as_raw_fd());
                let read = opcode::ReadFixed::new(fd, at, 512, index).build();
                // SAFETY: the buffer is registered and 512 bytes long at least.
                unsafe { ring.submission().push(&read) }.expect("room in the queue");
                ring.submit_and_wait(1).expect("submitted");
                let done = ring.completion().next().map(|c| c.result());
                assert_eq!(done, Some(512), "buffer {index}");
                for i in 0..64 {
                    let found = word(&region, buffer.start / 8 + i).load(Ordering::Relaxed);
                    assert_eq!(found, value(i, turn), "word {i} of buffer {index}");
                }
            }
        }
        if let (Some(before), Some(after)) = (before, frames(&region)) {
            for (i, (b, a)) in before.iter().zip(&after).enumerate() {
                assert!(b == a || !is_pinned(i * page_size()), "pinned page {i} has moved");
            }
        }
        ring.submitter().unregister_buffers().expect("registered before");
        drop(ring);
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let report = go().expect("a move");
            if report.is_complete() || Instant::now() > until {
                let all = [(Outcome::Moved, bytes as u64)];
                assert_eq!(report.by_outcome(), all, "after the pins: huge: {huge} {order:?}");
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        racers.finish();
        for (i, buffer) in buffers.iter().flat_map(|b| (0..64).map(move |i| (i, b))) {
            assert_eq!(word(&region, buffer.start / 8 + i).load(Ordering::Relaxed), value(i, 2));
        }
    }
}

const BLOCK: usize = 16 << 10;

/// Reads random blocks of a file that holds `value(i, 5)` into `part` of the region, checking
/// each as it comes.
fn read_into(region: &Region, file: &File, part: std::ops::Range<usize>, stop: &AtomicBool) {
    let blocks = part.len() / BLOCK;
    let mut seed = 0x9E37_79B9_97F4_A7C1;
    let mut random = |below: usize| usize::try_from(next(&mut seed) % below as u64).expect("small");
    while !stop.load(Ordering::Relaxed) {
        let (to, from) = (part.start + random(blocks) * BLOCK, random(blocks) * BLOCK);
        let at = region.as_ptr().wrapping_add(to);
        let offset = libc::off_t::try_from(from).expect("small");
        // SAFETY: the kernel writes to words of the region that only this thread uses.
        let got = unsafe { libc::pread(file.as_raw_fd(), at.cast(), BLOCK, offset) };
        let error = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(got).ok(), Some(BLOCK), "pread: {error}");
        for i in 0..BLOCK / 8 {
            let found = word(region, to / 8 + i).load(Ordering::Relaxed);
            assert_eq!(found, value(from / 8 + i, 5), "word {i} read to {to:#x} from {from:#x}");
        }
    }
}

/// Writes blocks of `part`, each time with new words, and checks what the file holds then.
fn write_from(region: &Region, file: &File, part: std::ops::Range<usize>, stop: &AtomicBool) {
    let blocks = part.len() / BLOCK;
    let mut seed = 0xD1B5_4A32_D192_ED03;
    let mut back = vec![0u64; BLOCK / 8 + 512];
    let skip = back.as_ptr().align_offset(4096);
    for round in 1.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let block = usize::try_from(next(&mut seed) % blocks as u64).expect("small");
        let start = part.start + block * BLOCK;
        for i in start / 8..(start + BLOCK) / 8 {
            word(region, i).store(value(i, round), Ordering::Relaxed);
        }
        let at = region.as_ptr().wrapping_add(start);
        let offset = libc::off_t::try_from(block * BLOCK).expect("small");
        // SAFETY: the kernel reads words of the region.
        let put = unsafe { libc::pwrite(file.as_raw_fd(), at.cast(), BLOCK, offset) };
        let error = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(put).ok(), Some(BLOCK), "pwrite: {error}");
        let own = back[skip..].as_mut_ptr();
        // SAFETY: the buffer has room for a block from its aligned place on.
        let got = unsafe { libc::pread(file.as_raw_fd(), own.cast(), BLOCK, offset) };
        assert_eq!(usize::try_from(got).ok(), Some(BLOCK));
        for (i, found) in back[skip..skip + BLOCK / 8].iter().enumerate() {
            assert_eq!(*found, value(start / 8 + i, round), "word {i} written from {start:#x}");
        }
    }
}

/// Reads and writes of files by system calls, continuously, during moves.
fn file_io(flags: i32) {
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("file I/O");
    let bytes = 4 * HUGE;
    let (input, output) =
        (Scratch::new(&format!("input-{flags}")), Scratch::new(&format!("output-{flags}")));
    let words: Vec<u8> = (0..HUGE / 8).flat_map(|i| value(i, 5).to_ne_bytes()).collect();
    input.open(0).and_then(|f| f.write_all_at(&words, 0)).expect("room for 2 MiB");
    output.open(0).and_then(|f| f.write_all_at(&words, 0)).expect("room for 2 MiB");
    let (from, to) = match (input.open(flags), output.open(flags)) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(e), _) | (_, Err(e)) => {
            return eprintln!("skipped: this file system has no O_DIRECT: {e}");
        }
    };
    for (huge, order) in ALL {
        let region = region(&engine, bytes, huge);
        // Not at the blocks' ends.
        let reads = HUGE / 2..HUGE / 2 + HUGE;
        let writes = 2 * HUGE..3 * HUGE;
        let racers = Racers::start_on(&region, &[0..reads.start, reads.end..writes.start], 1, 1);
        let stop = AtomicBool::new(false);
        let moved = std::thread::scope(|scope| {
            let work = [
                scope.spawn(|| read_into(&region, &from, reads.clone(), &stop)),
                scope.spawn(|| write_from(&region, &to, writes.clone(), &stop)),
            ];
            let _stop = StopOnDrop(&stop);
            let mover = Mover::start(&engine, &region, order);
            let until = Instant::now() + Duration::from_millis(700);
            while Instant::now() < until && work.iter().all(|w| !w.is_finished()) {
                mover.wait(1);
            }
            stop.store(true, Ordering::Relaxed);
            mover.finish()
        });
        assert!(moved.bytes(Outcome::Moved) > 0, "{moved:?}");
        racers.finish();
        check(&region, 3 * HUGE..bytes);
    }
}

#[test]
fn direct_reads_and_writes_of_files_are_right_during_moves() {
    file_io(libc::O_DIRECT);
}

#[test]
fn buffered_reads_and_writes_of_files_are_right_during_moves() {
    file_io(0);
}

#[test]
fn readers_with_a_plain_reference_see_the_right_words_during_moves() {
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("plain references");
    let memory = match File::open("/proc/self/mem") {
        Ok(memory) => memory,
        Err(e) => return eprintln!("skipped: /proc/self/mem: {e}"),
    };
    for (huge, order) in ALL {
        let region = region(&engine, 4 * HUGE, huge);
        let mover = Mover::start(&engine, &region, order);
        let mut buffer = vec![0u8; 64 << 10];
        let mut seed = 0xA076_1D64_78BD_642F;
        let until = Instant::now() + Duration::from_millis(400);
        let mut seen = 0;
        while Instant::now() < until || seen == 0 {
            let places = (region.len() / buffer.len()) as u64;
            let start = usize::try_from(next(&mut seed) % places).expect("small") * buffer.len();
            // This way into the kernel cannot wait for a page in the air, and says so.
            match memory.read_exact_at(&mut buffer, (region.addr() + start) as u64) {
                Err(e) if e.raw_os_error() == Some(libc::EIO) => continue,
                read => read.expect("mapped"),
            }
            seen += 1;
            for (i, bytes) in buffer.chunks_exact(8).enumerate() {
                let wanted = value(start / 8 + i, 0).to_ne_bytes();
                assert_eq!(bytes, wanted, "word {i} from {start:#x}");
            }
        }
        assert!(mover.finish().bytes(Outcome::Moved) > 0);
        check(&region, 0..region.len());
    }
}
