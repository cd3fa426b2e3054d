//! The arm64 machine: QEMU's `xlnx-zcu102`, which has a DMA engine with sixteen channels, and a
//! driver in Linux that nobody here wrote.
//!
//! Linux is given a device tree of ours: two banks of memory that are two nodes with a CPU each (of
//! the second, a part is a third one without, which is added later), two serial ports (the console,
//! and the port for results: there is no virtio), and the channels.
//! What always holds: QEMU's own way to boot Linux (`-kernel`) is not used, because it puts one
//! bank in place of ours, over devices; so this loads what is needed where [`Placed`] says.
//!
//! The engine's model copies while the register that starts it is written: no transfer overlaps
//! with anything, and none is late. It also says that it copied where there is no memory.

use super::dtb::Node;
use super::machine::{Clock, Machine, Node as Memory};
use super::qemu::Boot;
use anyhow::Context as _;
use std::fs;
use std::path::Path;
use std::process::Command;

/// QEMU for it.
pub(crate) const QEMU: &str = "qemu-system-aarch64";

/// What Linux is told of it. The banks of memory are the board's, in size and place.
pub(crate) const ZCU102: Machine = Machine {
    name: "zcu102",
    nodes: &[Memory { mib: 2048, cpus: 1 }, Memory { mib: 1536, cpus: 1 }],
    distances: &[(0, 1, 20)],
    suites: &["kernel_"],
    hugetlb: 8,
    clock: Clock::Time,
};

/// The same, whose clock counts instructions.
pub(crate) const COUNTED: Machine =
    Machine { name: "zcu102-counted", clock: Clock::Instructions, ..ZCU102 };

/// Where things are put in the first bank, before Linux runs.
struct Placed;
impl Placed {
    const STUB: u32 = 0x10_0000;
    /// A multiple of 2 MiB (Documentation/arch/arm64/booting.rst).
    const KERNEL: u32 = 0x20_0000;
    const TREE: u32 = 0x800_0000;
    const INITRAMFS: u32 = 0x820_0000;
}

/// What runs first, on CPU 0: the state in which arm64's Linux is entered (booting.rst), x0 being
/// the address of the device tree and x1 to x3 zero.
const STUB: [u32; 6] = [
    0xd2a0_0000 | (Placed::TREE >> 16) << 5, // movz x0, #.., lsl #16
    0xd280_0001,                             // movz x1, #0
    0xd280_0002,                             // movz x2, #0
    0xd280_0003,                             // movz x3, #0
    0xd2a0_0004 | (Placed::KERNEL >> 16) << 5, // movz x4, #.., lsl #16
    0xd61f_0080,                             // br x4
];
const _: () = assert!(Placed::TREE.trailing_zeros() >= 16 && Placed::KERNEL.trailing_zeros() >= 16);

/// Bytes of a bank of memory; where in the second one the memory begins that is added later, to a
/// node without CPUs.
const BANK: u32 = 0x8000_0000;
const LATER: u32 = 0x6000_0000;

/// Registers of the serial ports, and their interrupts (UG1085, table 13-1; less 32).
const UARTS: [(u32, u32); 2] = [(0xff00_0000, 21), (0xff01_0000, 22)];
/// Channels of the engine in the full-power domain (GDMA), and in the low-power domain (ADMA):
/// registers of the first, its interrupt, bits of its bus.
const ENGINES: [(u32, u32, u32); 2] = [(0xfd50_0000, 124, 128), (0xffa8_0000, 77, 64)];
/// Channels of each, and from one's registers to the next one's.
const CHANNELS: u32 = 8;
const STRIDE: u32 = 0x1_0000;
/// Second cell of an interrupt, the third being level-triggered (bindings of arm,gic).
const LEVEL: u32 = 4;

/// Nodes that others name.
const GIC: u32 = 1;
const CLOCK_100: u32 = 2;
const CLOCK_600: u32 = 3;

/// QEMU with the machine, and what it boots; `serial` and `results` as for [`Boot`].
pub(super) fn command(boot: &Boot<'_>, serial: &str, results: &str) -> anyhow::Result<Command> {
    let size = |path: &Path| fs::metadata(path).map(|m| m.len());
    let size = size(boot.initramfs).context("no initramfs")?;
    let end = u32::try_from(size).ok().and_then(|size| Placed::INITRAMFS.checked_add(size));
    let end = end.filter(|end| *end < BANK).context("the initramfs is too big")?;
    // Pages stay where they were put; an oops ends the machine at once, and QEMU with it.
    let words = format!(
        "console=ttyPS0,115200 quiet oops=panic panic=-1 numa_balancing=disable \
         guest={} guest.hugetlb={} guest.seconds={}",
        boot.mode, boot.machine.hugetlb, boot.seconds
    );
    let (tree, stub) =
        (boot.initramfs.with_extension("dtb"), boot.initramfs.with_extension("stub"));
    write(&tree, &device_tree(&words, end))?;
    write(&stub, &STUB.map(u32::to_le_bytes).concat())?;

    let mut command = Command::new(QEMU);
    command.args(["-M", "xlnx-zcu102", "-m", "4G", "-smp", "2"]);
    match boot.machine.clock {
        Clock::Time => command.args(["-accel", "tcg,thread=multi"]),
        Clock::Instructions => {
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"])
        }
    };
    command.args(["-display", "none", "-monitor", "none", "-no-reboot"]);
    for (file, at) in [
        (boot.kit.kernel().as_path(), Placed::KERNEL),
        (&tree, Placed::TREE),
        (boot.initramfs, Placed::INITRAMFS),
        (&stub, Placed::STUB),
    ] {
        let file = file.display();
        command.args(["-device", &format!("loader,file={file},addr={at:#x},force-raw=on")]);
    }
    command.args(["-device", &format!("loader,addr={:#x},cpu-num=0", Placed::STUB)]);
    command.args(["-serial", serial, "-chardev", &format!("{results},id=results")]);
    command.args(["-serial", "chardev:results"]);
    Ok(command)
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Linux's view of the machine, with its command line and the end of its initramfs.
fn device_tree(words: &str, initramfs_end: u32) -> Vec<u8> {
    Node::root(|root| {
        root.text("compatible", &["xlnx,zynqmp-zcu102", "xlnx,zynqmp"]);
        root.text("model", &["ZCU102 of QEMU, with two nodes"]);
        root.cells("#address-cells", &[2]);
        root.cells("#size-cells", &[2]);
        root.cells("interrupt-parent", &[GIC]);
        root.node("aliases", |node| {
            for (index, (at, _)) in UARTS.iter().enumerate() {
                node.text(&format!("serial{index}"), &[&format!("/axi/serial@{at:x}")]);
            }
        });
        root.node("chosen", |node| {
            node.text("stdout-path", &["serial0:115200n8"]);
            node.text("bootargs", &[words]);
            node.cells("linux,initrd-start", &[0, Placed::INITRAMFS]);
            node.cells("linux,initrd-end", &[0, initramfs_end]);
        });
        processors(root);
        memory(root, 0, [0, 0], BANK, |_| ());
        memory(root, 1, [8, 0], LATER, |_| ());
        // It is there, and not used until a module adds it.
        memory(root, 2, [8, LATER], BANK - LATER, |node| node.text("status", &["disabled"]));
        root.node("distance-map", |node| {
            node.text("compatible", &["numa-distance-map-v1"]);
            let distances = |from| (0..3).flat_map(move |to| [from, to, distance(from, to)]);
            let matrix: Vec<u32> = (0..3).flat_map(distances).collect();
            node.cells("distance-matrix", &matrix);
        });
        clock(root, CLOCK_100, 100_000_000);
        clock(root, CLOCK_600, 600_000_000);
        root.node("axi", |axi| {
            axi.text("compatible", &["simple-bus"]);
            axi.cells("#address-cells", &[2]);
            axi.cells("#size-cells", &[2]);
            axi.flag("ranges");
            interrupts(axi);
            for (at, interrupt) in UARTS {
                serial(axi, at, interrupt);
            }
            for (first, interrupt, bits) in ENGINES {
                for index in 0..CHANNELS {
                    channel(axi, first + index * STRIDE, interrupt + index, bits, index);
                }
            }
        });
    })
}

fn processors(root: &mut Node) {
    root.node("cpus", |cpus| {
        cpus.cells("#address-cells", &[1]);
        cpus.cells("#size-cells", &[0]);
        for cpu in 0..2 {
            cpus.node(&format!("cpu@{cpu}"), |node| {
                node.text("compatible", &["arm,cortex-a53"]);
                node.text("device_type", &["cpu"]);
                node.text("enable-method", &["psci"]);
                node.cells("reg", &[cpu]);
                node.cells("numa-node-id", &[cpu]);
            });
        }
    });
    root.node("psci", |node| {
        node.text("compatible", &["arm,psci-0.2"]);
        node.text("method", &["smc"]);
    });
    root.node("timer", |node| {
        node.text("compatible", &["arm,armv8-timer"]);
        // Of each CPU: secure, not secure, virtual, of the hypervisor.
        let each = [13, 14, 11, 10].map(|interrupt| [1, interrupt, 0xf08]);
        node.cells("interrupts", &each.concat());
    });
}

/// From one node to another, as ACPI's SLIT says it.
fn distance(from: u32, to: u32) -> u32 {
    if from == to { 10 } else { 20 }
}

/// A bank of memory, or a part of one, with what else is said of it.
fn memory(root: &mut Node, node_id: u32, at: [u32; 2], size: u32, more: impl FnOnce(&mut Node)) {
    let name =
        if at[0] == 0 { format!("{:x}", at[1]) } else { format!("{:x}{:08x}", at[0], at[1]) };
    root.node(&format!("memory@{name}"), |node| {
        node.text("device_type", &["memory"]);
        node.cells("reg", &[at[0], at[1], 0, size]);
        node.cells("numa-node-id", &[node_id]);
        more(node);
    });
}

fn clock(root: &mut Node, phandle: u32, hertz: u32) {
    root.node(&format!("clock-{hertz}"), |node| {
        node.text("compatible", &["fixed-clock"]);
        node.cells("#clock-cells", &[0]);
        node.cells("clock-frequency", &[hertz]);
        node.cells("phandle", &[phandle]);
    });
}

/// The interrupt controller.
fn interrupts(axi: &mut Node) {
    axi.node("interrupt-controller@f9010000", |node| {
        node.text("compatible", &["arm,gic-400"]);
        node.cells("#interrupt-cells", &[3]);
        // Of the distributor, the CPUs' interface, the hypervisor's, the guests'.
        let parts = [(0xf901_0000, 0x1_0000), (0xf902_0000, 0x2_0000)];
        let parts = parts.into_iter().chain([(0xf904_0000, 0x2_0000), (0xf906_0000, 0x2_0000)]);
        let cells: Vec<u32> = parts.flat_map(|(at, size)| [0, at, 0, size]).collect();
        node.cells("reg", &cells);
        node.flag("interrupt-controller");
        node.cells("interrupts", &[1, 9, 0xf04]);
        node.cells("phandle", &[GIC]);
    });
}

fn serial(axi: &mut Node, at: u32, interrupt: u32) {
    axi.node(&format!("serial@{at:x}"), |node| {
        node.text("compatible", &["xlnx,zynqmp-uart", "cdns,uart-r1p12"]);
        node.cells("reg", &[0, at, 0, 0x1000]);
        node.cells("interrupts", &[0, interrupt, LEVEL]);
        node.text("clock-names", &["uart_clk", "pclk"]);
        node.cells("clocks", &[CLOCK_100, CLOCK_100]);
    });
}

/// A channel of the DMA engine; the first half of each engine's are said to be node 0's.
fn channel(axi: &mut Node, at: u32, interrupt: u32, bits: u32, index: u32) {
    axi.node(&format!("dma-controller@{at:x}"), |node| {
        node.text("compatible", &["xlnx,zynqmp-dma-1.0"]);
        node.cells("reg", &[0, at, 0, 0x1000]);
        node.cells("interrupts", &[0, interrupt, LEVEL]);
        node.text("clock-names", &["clk_main", "clk_apb"]);
        node.cells("clocks", &[CLOCK_600, CLOCK_100]);
        node.cells("#dma-cells", &[1]);
        node.cells("xlnx,bus-width", &[bits]);
        node.cells("numa-node-id", &[index / (CHANNELS / 2)]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_instructions_load_the_addresses() {
        // As an assembler writes `movz x0, #0x800, lsl #16` and `movz x4, #0x20, lsl #16`.
        assert_eq!((STUB[0], STUB[4]), (0xd2a1_0000, 0xd2a0_0404));
    }

    #[test]
    fn the_tree_has_all_channels_on_two_nodes() {
        let tree = device_tree("quiet", 0x900_0000);
        let text = String::from_utf8_lossy(&tree).into_owned();
        assert_eq!(text.matches("dma-controller@").count(), 16);
        assert_eq!(text.matches("memory@").count(), 3);
        assert!(text.contains("memory@800000000\0") && text.contains("quiet\0"));
    }
}
