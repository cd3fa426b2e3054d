//! What memory programs have, in words.

use std::fmt::{self, Write as _};

use pageferry::process::{BigMapping, Note, Notes, ProcessResidency};
use pageferry_topology::NodeList;

use crate::output::{BOLD, DIM};
use crate::size::size;
use crate::table::{Table, bar, percent};

/// Processes named in a note that is the same for many.
const NAMED: usize = 4;

pub(super) fn text(found: &ProcessResidency, nodes: NodeList) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(found, &nodes, &mut out);
    out
}

fn write_text(found: &ProcessResidency, nodes: &NodeList, out: &mut String) -> fmt::Result {
    let total = found.bytes();
    writeln!(
        out,
        "{BOLD}{} present{BOLD:#} in {} of {}  {DIM}looked at in {:.0} ms{DIM:#}",
        size(total),
        counted(found.mappings, "mapping", "mappings"),
        counted(found.processes, "process", "processes"),
        found.elapsed.as_secs_f64() * 1e3,
    )?;
    if found.shared_anonymous > 0 {
        let bytes = size(found.shared_anonymous);
        writeln!(
            out,
            "  of it {bytes} that other processes map too, since a fork or merged by KSM"
        )?;
    }
    let by_node = found.by_node();
    let all: NodeList = nodes.iter().chain(by_node.keys().copied()).collect();
    let mut table = Table::new(&[">node", "kind", ">pages of", ">bytes", ">share", ""]);
    let mut row = |head: [String; 3], bytes| {
        let [node, kind, pages] = head;
        table.row([node, kind, pages, size(bytes), percent(bytes, total), bar(bytes, total)]);
    };
    for node in all.iter() {
        let bytes = by_node.get(&node).copied().unwrap_or(0);
        row([node.to_string(), "all".into(), String::new()], bytes);
        for holding in found.holdings.iter().filter(|h| h.node == node) {
            let head = [String::new(), holding.kind.to_string(), size(holding.page_bytes)];
            row(head, holding.bytes);
        }
    }
    if found.unknown > 0 {
        row(["?".into(), "could not be told".into(), String::new()], found.unknown);
    }
    write!(out, "\n{table}")?;
    if found.gone > 0 {
        writeln!(out, "\ngiven back meanwhile: {}", size(found.gone))?;
    }
    if !found.swapped.is_empty() {
        let kinds = found.swapped.iter().map(|(kind, bytes)| format!("{kind} {}", size(*bytes)));
        writeln!(out, "\nswapped out: {}", kinds.collect::<Vec<_>>().join(", "))?;
    }
    if found.markers > 0 {
        let bytes = size(found.markers);
        writeln!(
            out,
            "\nneither present nor swapped out: {bytes} (guard regions, markers of a userfaultfd, \
             pages that somebody is migrating)"
        )?;
    }
    top(&found.top, out)?;
    notes(&found.notes, &[], out)
}

fn top(mappings: &[BigMapping], out: &mut String) -> fmt::Result {
    if mappings.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&[">pid", "addresses", "kind", ">bytes", "on nodes", "name"]);
    for mapping in mappings {
        let nodes = mapping.nodes.iter();
        let nodes = nodes.map(|(node, bytes)| format!("{node}: {}", size(*bytes)));
        table.row([
            mapping.pid.to_string(),
            format!("{:x}-{:x}", mapping.range.start, mapping.range.end),
            mapping.kind.to_string(),
            size(mapping.bytes),
            nodes.collect::<Vec<_>>().join(", "),
            printable(&mapping.name),
        ]);
    }
    write!(out, "\n{BOLD}largest mappings{BOLD:#}\n{table}")
}

/// What else is worth knowing. What is said of many processes is said once.
pub(super) fn notes(notes: &Notes, remarks: &[String], out: &mut String) -> fmt::Result {
    if notes.list.is_empty() && remarks.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{BOLD}notes{BOLD:#}")?;
    // What, of whom, and of how many more.
    let mut alike: Vec<(&str, Vec<u32>, u64)> = Vec::new();
    for note in &notes.list {
        const ENDED: &str = "ended meanwhile";
        const JOINED: &str = "joined meanwhile, and looked at too";
        let (what, pid, more) = match note {
            Note::Exited { pid } => (ENDED, Some(*pid), 0),
            Note::MoreExited { processes } => (ENDED, None, *processes),
            Note::Joined { pid } => (JOINED, Some(*pid), 0),
            Note::MoreJoined { processes } => (JOINED, None, *processes),
            _ => {
                writeln!(out, "  {}", printable(&note.to_string()))?;
                continue;
            }
        };
        match alike.iter_mut().find(|(known, ..)| *known == what) {
            Some((_, pids, sum)) => {
                pids.extend(pid);
                *sum += more;
            }
            None => alike.push((what, pid.into_iter().collect(), more)),
        }
    }
    for (what, pids, more) in alike {
        let first: Vec<String> = pids.iter().take(NAMED).map(u32::to_string).collect();
        let more = match more + pids.len().saturating_sub(NAMED) as u64 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        writeln!(out, "  {what}: {}{more}", first.join(", "))?;
    }
    if notes.left_out > 0 {
        writeln!(out, "  and {} more", notes.left_out)?;
    }
    for remark in remarks {
        writeln!(out, "  {}", printable(remark))?;
    }
    Ok(())
}

/// A name may hold anything, also what a terminal would obey.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// `1 page`, `2 pages`.
pub(super) fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_command_the_terminal() {
        assert_eq!(printable("/tmp/\u{1b}[2Jx\n"), "/tmp/?[2Jx?");
    }

    #[test]
    fn what_is_shared_and_what_is_no_page_is_told_apart_from_what_is_present_and_swapped() {
        let mut found = ProcessResidency::default();
        let plain = |found: &ProcessResidency| {
            anstream::adapter::strip_str(&text(found, NodeList::default())).to_string()
        };
        assert!(!plain(&found).contains("map too") && !plain(&found).contains("swapped"));
        (found.shared_anonymous, found.markers) = (32 << 20, 12 << 10);
        let told = plain(&found);
        let shared = "of it 32 MiB that other processes map too, since a fork or merged by KSM\n";
        assert!(told.contains(shared), "{told}");
        assert!(told.contains("neither present nor swapped out: 12 KiB (guard regions,"), "{told}");
        assert!(!told.contains("\nswapped out"), "{told}");
    }

    #[test]
    fn what_is_said_of_many_processes_is_said_once() {
        let mut all = Notes::default();
        all.list.extend((2..9).map(|pid| Note::Exited { pid }));
        all.list.push(Note::MoreExited { processes: 100 });
        all.list.push(Note::Joined { pid: 40 });
        all.list.push(Note::StillJoining);
        let mut out = String::new();
        notes(&all, &["said in words".into()], &mut out).expect("a String takes all");
        let plain = anstream::adapter::strip_str(&out).to_string();
        let lines: Vec<&str> = plain.lines().skip(3).collect();
        assert_eq!(
            lines,
            [
                "  ended meanwhile: 2, 3, 4, 5 and 103 more",
                "  joined meanwhile, and looked at too: 40",
                "  said in words"
            ],
            "{plain}"
        );
    }

    #[test]
    fn what_is_one_is_not_many() {
        assert_eq!(counted(1, "page", "pages"), "1 page");
        assert_eq!(counted(0, "page", "pages"), "0 pages");
    }
}
