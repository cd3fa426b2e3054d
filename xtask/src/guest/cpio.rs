//! Archives in the "newc" form of cpio, which the kernel unpacks as its first file system.
//!
//! Only what an initramfs needs: folders, regular files and symbolic links, all of root, with no
//! times and numbered from 1, so that the same content gives the same bytes.
//!
//! Source: `Documentation/driver-api/early-userspace/buffer-format.rst` of Linux.

use std::io::{self, Write};

/// `S_IFDIR`, `S_IFREG` and `S_IFLNK` (inode(7)).
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive under construction; [`finish`](Self::finish) completes it.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// A folder, which must come before what is in it. Names have no slash in front.
    pub(crate) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, FOLDER | 0o755, &[])
    }

    /// A regular file with the given permissions.
    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, content)
    }

    /// A symbolic link to `target`.
    pub(crate) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, LINK | 0o777, target.as_bytes())
    }

    /// Writes the trailer.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entries = 0;
        self.entry(TRAILER, 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_big = |_| io::Error::other(format!("{name} does not fit into a cpio archive"));
        let size = u32::try_from(content.len()).map_err(too_big)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_big)?;
        let inode = if name == TRAILER { 0 } else { self.entries + 1 };
        self.entries = inode;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        // namesize, check (unused in this form).
        // One link each: the kernel takes two for a hard link.
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut head = b"070701".to_vec();
        for field in fields {
            head.extend(format!("{field:08x}").bytes());
        }
        head.extend(name.bytes());
        head.push(0);
        pad(&mut head);
        self.out.write_all(&head)?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; 3][..content.len().next_multiple_of(4) - content.len()])
    }
}

/// Head and name together, and the content, end at multiples of 4.
fn pad(head: &mut Vec<u8>) {
    head.resize(head.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn archive() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.folder("bin").expect("memory");
        archive.file("bin/a", 0o755, b"12345").expect("memory");
        archive.link("bin/b", "a").expect("memory");
        archive.finish().expect("memory")
    }

    #[test]
    fn an_archive_is_as_the_format_says_byte_for_byte() {
        let zeros = |n| "0".repeat(n);
        let wanted = format!(
            "070701{}000041ed{}00000001{}00000004{}bin\0\0\0\
             070701{}000081ed{}00000001{}00000005{}00000006{}bin/a\012345\0\0\0",
            "00000001",
            zeros(16),
            zeros(48),
            zeros(8),
            "00000002",
            zeros(16),
            zeros(8),
            zeros(32),
            zeros(8),
        );
        let got = archive();
        assert_eq!(String::from_utf8_lossy(&got[..wanted.len()]), wanted);
        assert_eq!(got.len() % 4, 0);
    }

    #[test]
    fn an_archive_ends_with_the_trailer() {
        let got = archive();
        let text = String::from_utf8_lossy(&got);
        assert!(text.trim_end_matches('\0').ends_with(TRAILER), "{text}");
    }

    #[test]
    fn cpio_reads_what_was_written() {
        let listing = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut cpio) = listing else {
            return eprintln!("skipped: there is no cpio program here");
        };
        cpio.stdin.take().expect("piped").write_all(&archive()).expect("cpio reads");
        let output = cpio.wait_with_output().expect("cpio ends");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "bin\nbin/a\nbin/b\n");
    }
}
