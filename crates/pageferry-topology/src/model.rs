//! The CPU's name, from `/proc/cpuinfo`.
//!
//! Every architecture writes that file in its own way (`show_cpuinfo` in arch/*). Where it names the
//! CPU, that is taken; where it only gives numbers, those.

use crate::error::ReadError;
use crate::tree::Tree;

/// Keys of a name, in this order: x86 and (as `Model Name`) LoongArch; MIPS and Alpha; POWER,
/// SPARC, m68k and PA-RISC; RISC-V.
const NAMES: [&str; 4] = ["model name", "cpu model", "cpu", "uarch"];

/// `None` where the file is hidden or names nothing.
pub(crate) fn read(tree: &Tree) -> Result<Option<String>, ReadError> {
    Ok(tree.optional_text("proc/cpuinfo")?.and_then(|text| named(&text)))
}

fn named(text: &str) -> Option<String> {
    let field = |key: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let is_it = name.trim().eq_ignore_ascii_case(key) && !value.trim().is_empty();
            is_it.then(|| value.trim().to_owned())
        })
    };
    let arm = || Some((field("CPU implementer")?, field("CPU part")?));
    // `processor 0: version = 00,  identification = 2F9F28,  machine = 3931`
    let s390 = || {
        field("vendor_id").filter(|vendor| vendor == "IBM/S390")?;
        let (_, machine) = text.lines().find_map(|line| line.split_once("machine = "))?;
        Some(machine.trim().to_owned())
    };
    let riscv = || {
        // `rv64imafdc_zicsr_...`: the names of the many extensions come after the first `_`.
        let isa = field("isa")?;
        isa.split('_').next().map(str::to_owned)
    };
    NAMES
        .into_iter()
        .find_map(field)
        .or_else(|| arm().map(|(by, part)| format!("Arm implementer {by} part {part}")))
        .or_else(|| s390().map(|machine| format!("IBM/S390 machine {machine}")))
        .or_else(|| riscv().map(|isa| format!("RISC-V {isa}")))
}
