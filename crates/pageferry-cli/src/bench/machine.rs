//! The facts about the machine that figures cannot be understood without.

use std::fs;

use pageferry::Engine;
use pageferry_sys::affinity;

use super::schema::MachineInfo;
use crate::host::chosen;

/// Describes the machine.
pub(super) fn describe(engine: &Engine) -> MachineInfo {
    let machine = engine.machine();
    MachineInfo {
        cpu_model: machine.cpu_model().unwrap_or("unknown").to_owned(),
        cpus: affinity::allowed_cpus().len(),
        nodes: machine.memory_nodes().count(),
        kernel: line("/proc/sys/kernel/osrelease"),
        memory_bytes: machine.memory_nodes().map(|node| node.memory_bytes).sum(),
        thp: thp(),
        rights: format!("{:?}", engine.rights()),
        clocksource: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
    }
}

/// The system's setting of transparent huge pages; `none` for a kernel without them.
pub(super) fn thp() -> String {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    text.ok().and_then(|text| chosen(&text).map(str::to_owned)).unwrap_or_else(|| "none".to_owned())
}

fn line(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_choice_in_force_is_the_one_in_brackets() {
        assert_eq!(super::chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(super::chosen("always madvise never"), None);
    }
}
