//! Device trees in the form that kernels are given: flattened, version 17.
//!
//! Source: Devicetree Specification v0.4, chapter 5.

/// Tokens of the structure block.
const BEGIN: u32 = 1;
const END: u32 = 2;
const PROPERTY: u32 = 3;
const OVER: u32 = 9;
const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
/// The oldest version that a reader must know.
const COMPATIBLE: u32 = 16;
/// Ten words of the header, and a map of reserved memory with its end alone.
const HEADER: usize = 40;
const RESERVED: usize = 16;

/// A node under construction.
#[derive(Debug, Default)]
pub(super) struct Node {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Node {
    /// The tree that `fill` gives its root node, as a kernel reads it.
    pub(super) fn root(fill: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut tree = Self::default();
        tree.node("", fill);
        tree.word(OVER);
        let strings = HEADER + RESERVED + tree.structure.len();
        let sizes = [
            MAGIC as usize,
            strings + tree.strings.len(),
            HEADER + RESERVED,
            strings,
            HEADER,
            VERSION as usize,
            COMPATIBLE as usize,
            0, // the CPU that boots
            tree.strings.len(),
            tree.structure.len(),
        ];
        let mut blob = Vec::new();
        for size in sizes {
            blob.extend(narrow(size).to_be_bytes());
        }
        blob.extend([0; RESERVED]);
        blob.extend(tree.structure);
        blob.extend(tree.strings);
        blob
    }

    /// A node within; its properties come before its nodes.
    pub(super) fn node(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.word(BEGIN);
        self.bytes(name.as_bytes(), true);
        fill(self);
        self.word(END);
    }

    /// A property without a value.
    pub(super) fn flag(&mut self, name: &str) {
        self.property(name, &[]);
    }

    /// A property of 32-bit cells.
    pub(super) fn cells(&mut self, name: &str, cells: &[u32]) {
        let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.property(name, &value);
    }

    /// A property of one or more texts.
    pub(super) fn text(&mut self, name: &str, texts: &[&str]) {
        let value: Vec<u8> = texts.iter().flat_map(|t| t.bytes().chain([0])).collect();
        self.property(name, &value);
    }

    fn property(&mut self, name: &str, value: &[u8]) {
        self.word(PROPERTY);
        self.word(narrow(value.len()));
        // A name that is there already could be shared; the tree is small.
        self.word(narrow(self.strings.len()));
        self.strings.extend(name.bytes().chain([0]));
        self.bytes(value, false);
    }

    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }

    /// Bytes, with zeros up to a multiple of four, and at least one if they are `terminated`.
    fn bytes(&mut self, bytes: &[u8], terminated: bool) {
        self.structure.extend(bytes);
        let end = self.structure.len() + usize::from(terminated);
        self.structure.resize(end.next_multiple_of(4), 0);
    }
}

/// A size, which is far below 4 GiB: everything here is in memory, and made by this program.
fn narrow(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    fn tree() -> Vec<u8> {
        Node::root(|root| {
            root.text("compatible", &["one", "two"]);
            root.node("abc@1", |node| {
                node.cells("reg", &[1, 0xfd50_0000]);
                node.flag("here");
            });
        })
    }

    #[test]
    fn a_tree_says_where_its_parts_are() {
        let tree = tree();
        let word = |at: usize| {
            u32::from_be_bytes([tree[4 * at], tree[4 * at + 1], tree[4 * at + 2], tree[4 * at + 3]])
        };
        assert_eq!((word(0), word(1) as usize), (MAGIC, tree.len()));
        let structure = word(2) as usize / 4;
        assert_eq!((word(structure), word(structure + 1)), (BEGIN, 0));
        let end = structure + word(9) as usize / 4;
        assert_eq!((word(end - 1), end * 4), (OVER, word(3) as usize));
        let strings = &tree[word(3) as usize..];
        assert_eq!((strings, word(8)), (b"compatible\0reg\0here\0".as_slice(), 20));
    }

    #[test]
    fn the_device_tree_compiler_reads_what_was_written() {
        let dtc = Command::new("dtc")
            .args(["-q", "-I", "dtb", "-O", "dts"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut dtc) = dtc else {
            return eprintln!("skipped: there is no dtc program here");
        };
        dtc.stdin.take().expect("piped").write_all(&tree()).expect("dtc reads");
        let text = dtc.wait_with_output().expect("dtc ends").stdout;
        let text = String::from_utf8_lossy(&text);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        // Older ones write a list of strings as one.
        assert_eq!(
            text.replace("\\0", "\", \""),
            "/dts-v1/; / { compatible = \"one\", \"two\"; abc@1 { reg = <0x01 0xfd500000>; here; }; };"
        );
    }
}
