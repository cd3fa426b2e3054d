//! Unpacks `tests/machines/*.sysfs`, the kernel's files of other machines in a
//! short text form, to a temporary directory. They are written from published
//! descriptions of such machines, not dumped from one; quantities that no
//! description gives, such as free memory and bandwidths, are plausible values.
//!
//! A line is `path<TAB>content`; `\n` in the content is a line break, a line
//! that begins with `#` a comment, and a path that ends in `/` a directory; a
//! line that begins with `-` takes the path after it away. So
//! that a machine with 256 CPUs stays readable, one `{list}` in the path (the
//! kernel's list format) stands for a file per number, and `{+K}` or `{-K}` in
//! the content for that number plus or minus K.

use std::fs;
use std::path::{Path, PathBuf};

use pageferry_topology::{CpuList, Id};
use tempfile::TempDir;

/// The fixture `name`, unpacked; it is removed when the value is dropped.
pub(crate) fn unpack(name: &str) -> TempDir {
    // Thousands of small files: in memory where that is possible.
    let root = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory");
    lay(root.path(), &fs::read_to_string(file(name)).expect("the fixture exists"));
    root
}

/// Lays a tree in the text form over what is there.
pub(crate) fn lay(root: &Path, text: &str) {
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(path) = line.strip_prefix('-') {
            remove(root, path);
            continue;
        }
        let (path, content) = line.split_once('\t').expect("a tab in every line");
        let content = content.replace("\\n", "\n") + "\n";
        let Some((before, rest)) = path.split_once('{') else {
            write(root, path, &content);
            continue;
        };
        let (list, after) = rest.split_once('}').expect("braces are closed");
        for cpu in list.parse::<CpuList>().expect("a list in braces").iter() {
            let number = cpu.to_u32();
            let path = format!("{before}{number}{after}");
            write(root, &path, &shifted(&content, number));
        }
    }
}

fn remove(root: &Path, path: &str) {
    let path = root.join(path);
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.expect("what is taken away was there");
}

/// Replaces one file of an unpacked fixture.
pub(crate) fn write(root: &Path, path: &str, content: &str) {
    let file = root.join(path);
    if path.ends_with('/') {
        fs::create_dir_all(file).expect("a directory");
        return;
    }
    fs::create_dir_all(file.parent().expect("a parent")).expect("a directory");
    fs::write(file, content).expect("a file");
}

fn file(name: &str) -> PathBuf {
    // Relative to this source file, because other crates' tests use it too.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let machines = "pageferry-topology/tests/machines";
    let crates = manifest.parent().expect("a crate lies among others");
    crates.join(machines).join(format!("{name}.sysfs"))
}

fn shifted(content: &str, number: u32) -> String {
    let mut out = String::new();
    let mut rest = content;
    while let Some((before, after)) = rest.split_once('{') {
        let (shift, after) = after.split_once('}').expect("braces are closed");
        let shift: i32 = shift.parse().expect("a shift like +4");
        let shifted = number.checked_add_signed(shift).expect("a CPU number");
        out += before;
        out += &shifted.to_string();
        rest = after;
    }
    out + rest
}
