//! What a program feels while its memory goes to another node: moved by pageferry, and beside it
//! by `migrate_pages(2)`.
//!
//! `cargo run --release -p pageferry --example beside_migrate_pages [MIB] [ROUNDS]`: a child
//! process with `MIB` MiB (default 2048, or what fits) in equal parts of base pages, huge pages,
//! shared memory and a file's pages goes to a second node and back, `ROUNDS` times (default 2); the
//! two take turns in who has which way. In the child one thread reads pages at random, and another
//! maps and unmaps a small area. The file lies in the folder for temporary files; where that is a
//! tmpfs, its pages are shared memory too.
//!
//! What is printed of each move: bytes moved, what became of every page, the longest time between
//! two reads and that of an mmap(2) or munmap(2). Both threads rest often, so that with two CPUs
//! they are rarely kept from running; how long they wait with nothing moving is printed first.
//!
//! Fails if a page is unaccounted for. `present` is counted from `/proc/PID/smaps` while nothing is
//! mapped or unmapped; what was looked at beyond it must have been mapped during the move.

mod child;

use pageferry::Outcome;
use pageferry::process::{Destination, ProcessMove, Selection, Where};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::process::{LinuxProcesses, ProcessKernel as _};
use pageferry_sys::usage::migrate_pages;
use std::io::{BufRead, BufReader, Lines, Write, stdout};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

const MIB: u64 = 1 << 20;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, mib, node] = &arguments[..]
        && role == "child"
    {
        return child::run(mib.parse()?, node.parse()?);
    }
    let number = |index: usize, default| match arguments.get(index) {
        None => Ok(default),
        Some(text) => match text.parse::<u64>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!("{text:?} is no number above 0; wanted: [MIB] [ROUNDS]")),
        },
    };
    compare(number(0, 2048)?, number(1, 2)?)
}

/// The longest of what one move made the child wait for.
#[derive(Clone, Copy, Default)]
struct Felt {
    touch: Duration,
    map: Duration,
}

fn compare(wanted: u64, rounds: u64) -> Result<(), Failure> {
    let mut out = stdout();
    let machine = Machine::read()?;
    let nodes: Vec<NodeId> = machine.memory_nodes().map(|n| n.id).take(2).collect();
    let [first, second] = nodes[..] else {
        writeln!(out, "nothing to compare: memory is moved between nodes, and there is one")?;
        return Ok(());
    };
    let kernel = LinuxProcesses::default();
    let free = kernel.node_free(first.get())?.min(kernel.node_free(second.get())?) / MIB;
    // A quarter stays free: neither way is to meet a full node.
    let mib = wanted.min(free * 3 / 4) & !7;
    if mib == 0 {
        return Err(format!("{free} MiB free on one of nodes {first} and {second}: too few").into());
    }
    let emulated = std::env::var_os("PAGEFERRY_GUEST").is_some();
    let caution = if emulated { "; emulated: no speed claim" } else { "" };
    writeln!(out, "{mib} MiB between nodes {first} and {second}{caution}")?;
    let mut program = Program::start(mib, first)?;
    program.watch()?;
    std::thread::sleep(Duration::from_secs(3));
    let (idle, _) = program.tell(&mut out, "nothing moves")?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let ways = [(first, second), (second, first)];
        for (leg, (from, to)) in (0..).zip(ways) {
            if (round + leg) % 2 == 0 {
                ours.push(by_pageferry(&mut program, to, &mut out)?);
            } else {
                theirs.push(by_the_kernel(&mut program, from, to, &mut out)?);
            }
        }
    }
    let (ours, theirs) = (longest(&ours), longest(&theirs));
    let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64().max(1e-9);
    writeln!(
        out,
        "longest between reads: pageferry's {:.2} of migrate_pages's (wanted: at most 1); longest \
         mmap/munmap: {:.1} times shorter (wanted: at least 5){caution}",
        ratio(ours.touch, theirs.touch),
        ratio(theirs.map, ours.map),
    )?;
    if idle.touch * 2 > ours.touch.min(theirs.touch) || idle.map * 2 > ours.map.min(theirs.map) {
        writeln!(out, "with nothing moving it waits about as long: these ratios say nothing")?;
    }
    Ok(())
}

fn longest(moves: &[Felt]) -> Felt {
    let most = |of: fn(&Felt) -> Duration| moves.iter().map(of).max().unwrap_or_default();
    Felt { touch: most(|f| f.touch), map: most(|f| f.map) }
}

fn by_pageferry(program: &mut Program, to: NodeId, out: &mut impl Write) -> Result<Felt, Failure> {
    program.ask("quiet")?;
    let present = program.present()?;
    program.watch()?;
    let program_memory = Selection::new().pid(program.pid());
    let report = ProcessMove::new(program_memory, Destination::node(to)).run()?;
    let seconds = report.elapsed.as_secs_f64();
    let (felt, mapped) = program
        .tell(out, &format!("pageferry to {to}: {seconds:.1} s, {}", size(report.bytes_moved())))?;
    let others = report.by_outcome().into_iter().filter(|(o, _)| *o != Outcome::Moved);
    let others: String = others.map(|(o, bytes)| format!(", {o} {}", size(bytes))).collect();
    let looked_at = report.bytes_looked_at();
    let (appeared, missing) =
        (looked_at.saturating_sub(present), present.saturating_sub(looked_at));
    writeln!(
        out,
        "    present {} + appeared {} = moved {}{others}; unaccounted {missing}; {} calls, \
         longest {:.1} ms, at most {} at once",
        size(present),
        size(appeared),
        size(report.bytes_moved()),
        report.calls.count(),
        report.calls.longest.as_secs_f64() * 1e3,
        report.workers,
    )?;
    if missing > 0 || appeared > mapped {
        return Err(format!(
            "{missing} bytes were present and are in no line; {appeared} bytes appeared, and the \
             program mapped {mapped} meanwhile"
        )
        .into());
    }
    Ok(felt)
}

fn by_the_kernel(
    program: &mut Program,
    from: NodeId,
    to: NodeId,
    out: &mut impl Write,
) -> Result<Felt, Failure> {
    program.ask("quiet")?;
    let before = program.on(to)?;
    program.watch()?;
    let began = Instant::now();
    let left = migrate_pages(program.pid(), from.get(), to.get())?;
    let seconds = began.elapsed().as_secs_f64();
    program.ask("quiet")?;
    let moved = program.on(to)?.saturating_sub(before);
    let (felt, _) =
        program.tell(out, &format!("migrate_pages to {to}: {seconds:.1} s, {}", size(moved)))?;
    if left > 0 {
        writeln!(out, "    {left} pages not moved, and it does not say why")?;
    }
    Ok(felt)
}

fn size(bytes: u64) -> String {
    if bytes >= MIB {
        format!("{:.1} MiB", bytes as f64 / MIB as f64)
    } else {
        format!("{bytes} B")
    }
}

/// The child, as the parent has it. It ends when its standard input does.
struct Program {
    child: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

impl Program {
    fn start(mib: u64, node: NodeId) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["child", &mib.to_string(), &node.get().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (to, from) = pipes.ok_or("the child has no pipes")?;
        let mut program = Self { child, to, from: BufReader::new(from).lines() };
        program.answer()?;
        Ok(program)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn answer(&mut self) -> Result<String, Failure> {
        Ok(self.from.next().ok_or("the child has ended")??)
    }

    fn ask(&mut self, what: &str) -> Result<String, Failure> {
        writeln!(self.to, "{what}")?;
        self.answer()
    }

    /// From now on it maps and unmaps, and what it waits for counts.
    fn watch(&mut self) -> Result<(), Failure> {
        self.ask("watch").map(drop)
    }

    /// Prints what it waited for since [`Program::watch`]. Returns the longest of each, and how
    /// many bytes it mapped.
    fn tell(&mut self, out: &mut impl Write, of: &str) -> Result<(Felt, u64), Failure> {
        let answer = self.ask("tell")?;
        let numbers: Result<Vec<u64>, _> = answer.split(' ').map(str::parse).collect();
        let [reads, read_most, read_long, maps, map_most, map_long, mapped] = numbers?[..] else {
            return Err(format!("the child said {answer:?}").into());
        };
        let ms = |ns: u64| ns as f64 / 1e6;
        writeln!(
            out,
            "{of}: longest between {reads} reads {:.2} ms (p99.9 {:.3}), of {maps} mmap/munmap \
             {:.2} ms (p99.9 {:.3})",
            ms(read_long),
            ms(read_most),
            ms(map_long),
            ms(map_most),
        )?;
        out.flush()?;
        let felt =
            Felt { touch: Duration::from_nanos(read_long), map: Duration::from_nanos(map_long) };
        Ok((felt, mapped))
    }

    /// Bytes present, as the kernel counts them mapping by mapping; without the kernel's own
    /// (`[vdso]`, `[vvar]`, `[vsyscall]`), which are not the process's to move.
    fn present(&self) -> Result<u64, Failure> {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?;
        let (mut sum, mut counts) = (0, true);
        for line in smaps.lines() {
            if let Some(kib) = line.strip_prefix("Rss:") {
                let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
                sum += if counts { kib << 10 } else { 0 };
            } else if line.split(' ').next().is_some_and(|range| range.contains('-')) {
                counts = !line.contains("[v");
            }
        }
        Ok(sum)
    }

    /// Its bytes on a node, by asking the kernel for the node of each page.
    fn on(&self, node: NodeId) -> Result<u64, Failure> {
        let found = Where::new(Selection::new().pid(self.pid())).look()?;
        Ok(found.by_node().get(&node).copied().unwrap_or(0))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
