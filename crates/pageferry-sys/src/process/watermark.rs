//! What a node keeps free, read from `/proc/zoneinfo`.
//!
//! Source: `Documentation/filesystems/proc.rst`, mm/vmstat.c (`zoneinfo_show_print`).

/// Pages of a node's high watermarks, in the text of `/proc/zoneinfo`.
pub(super) fn high_watermark(zoneinfo: &str, node: u32) -> u64 {
    let (mut ours, mut pages) = (false, 0u64);
    for line in zoneinfo.lines() {
        if let Some(rest) = line.strip_prefix("Node ") {
            ours = rest.split(',').next().and_then(|n| n.parse().ok()) == Some(node);
        } else if ours {
            let mut words = line.split_ascii_whitespace();
            if words.next() == Some("high") {
                // Lines of per-CPU lists say `high:`.
                pages += words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_watermark_is_the_sum_over_its_zones_alone() {
        let text = "Node 0, zone DMA\n  pages free 1\n        high     7\n  pagesets\n    cpu: 0\n\
            \x20             high:  99\nNode 1, zone Normal\n        high     5\n\
            Node 0, zone Normal\n        high     30\n";
        assert_eq!(high_watermark(text, 0), 37);
        assert_eq!(high_watermark(text, 1), 5);
        assert_eq!(high_watermark(text, 2), 0);
    }
}
