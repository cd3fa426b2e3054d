//! The text that is indexed: the text files below a folder, cut into documents.
//!
//! What is there decides nothing about whether it works: binaries, unreadable files, loops of
//! links, huge files and special files are passed over or cut, and counted. Links are not
//! followed.

use super::text::{Vocabulary, words};
use crate::cancel;
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Bytes of a file that are read at most; the rest is left.
const FILE_LIMIT: usize = 4 << 20;
/// Bytes of text in a document, about: a longer file becomes several documents, so that taking in
/// or out a document is an update and not a batch job.
const DOCUMENT_BYTES: usize = 32 << 10;
/// Bytes at the start of a file in which a NUL says that it is not text.
const PROBE: usize = 8 << 10;

/// One document as the numbers of its words.
pub(super) type Document = Box<[u32]>;

/// Everything that was read.
#[derive(Debug, Default)]
pub(super) struct Corpus {
    pub(super) documents: Vec<Document>,
    pub(super) vocabulary: Vocabulary,
    pub(super) taken: Taken,
}

/// What was read, for the report.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Taken {
    /// Folders from which text was taken.
    pub(super) folders: Vec<Folder>,
    /// Text files read.
    pub(super) files: u64,
    /// Bytes of text read.
    pub(super) bytes: u64,
    /// Documents made of it.
    pub(super) documents: u64,
    /// Words in it.
    pub(super) words: u64,
    /// Different words in it.
    pub(super) different_words: u64,
    /// Files passed over because they are not text.
    pub(super) not_text: u64,
    /// Files and folders that could not be read.
    pub(super) unreadable: u64,
    /// Files of which only the first part was read.
    pub(super) cut: u64,
    /// There was more than was asked for.
    pub(super) more: bool,
}

/// A folder with what was taken from below it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Folder {
    /// Where.
    pub(super) path: PathBuf,
    /// Text files read.
    pub(super) files: u64,
    /// Bytes of text read.
    pub(super) bytes: u64,
}

impl Corpus {
    /// Reads text below `folders` until there are `limit` bytes of it, or the user cancels.
    /// `progress` is told the bytes so far.
    pub(super) fn read(
        folders: impl IntoIterator<Item = PathBuf>,
        limit: u64,
        progress: impl Fn(u64),
    ) -> Self {
        let mut corpus = Self::default();
        for folder in folders {
            if corpus.taken.bytes >= limit {
                corpus.taken.more = true;
                break;
            }
            corpus.read_folder(folder, limit, &progress);
        }
        corpus.taken.documents = corpus.documents.len() as u64;
        corpus.taken.different_words = corpus.vocabulary.len() as u64;
        corpus
    }

    fn read_folder(&mut self, path: PathBuf, limit: u64, progress: &impl Fn(u64)) {
        let (files, bytes) = (self.taken.files, self.taken.bytes);
        let mut buffer = Vec::new();
        for entry in WalkDir::new(&path).sort_by_file_name() {
            if self.taken.bytes >= limit || cancel::requested() {
                self.taken.more = true;
                break;
            }
            match entry {
                Ok(entry) if entry.file_type().is_file() => {
                    self.read_file(entry.path(), &mut buffer);
                    progress(self.taken.bytes);
                }
                Ok(_) => {}
                Err(_) => self.taken.unreadable += 1,
            }
        }
        let (files, bytes) = (self.taken.files - files, self.taken.bytes - bytes);
        if files > 0 {
            self.taken.folders.push(Folder { path, files, bytes });
        }
    }

    fn read_file(&mut self, path: &Path, buffer: &mut Vec<u8>) {
        match read_start(path, buffer) {
            Err(_) => self.taken.unreadable += 1,
            Ok(Start::Empty) => {}
            Ok(Start::NotText) => self.taken.not_text += 1,
            Ok(Start::Text { cut }) => match text_of(buffer, cut) {
                None => self.taken.not_text += 1,
                Some(text) => {
                    self.taken.files += 1;
                    self.taken.bytes += text.len() as u64;
                    self.taken.cut += u64::from(cut);
                    self.add(text);
                }
            },
        }
    }

    /// Takes in a text as one document or more.
    pub(super) fn add(&mut self, text: &str) {
        let mut rest = text;
        while !rest.is_empty() {
            let (document, after) = split(rest, DOCUMENT_BYTES);
            rest = after;
            let mut numbers = Vec::with_capacity(document.len() / 6);
            // A corpus is far smaller than 2^32 different words, for each takes more than a byte.
            words(document, |word| numbers.extend(self.vocabulary.number(word)));
            self.taken.words += numbers.len() as u64;
            if !numbers.is_empty() {
                self.documents.push(numbers.into());
            }
        }
    }
}

enum Start {
    Empty,
    NotText,
    Text { cut: bool },
}

/// Reads the first [`FILE_LIMIT`] bytes into `buffer`.
fn read_start(path: &Path, buffer: &mut Vec<u8>) -> std::io::Result<Start> {
    buffer.clear();
    let mut file = File::open(path)?;
    file.by_ref().take(PROBE as u64).read_to_end(buffer)?;
    if buffer.is_empty() {
        return Ok(Start::Empty);
    }
    if buffer.contains(&0) {
        return Ok(Start::NotText);
    }
    // One byte more than is taken tells whether there is more.
    file.take((FILE_LIMIT - PROBE + 1) as u64).read_to_end(buffer)?;
    let cut = buffer.len() > FILE_LIMIT;
    buffer.truncate(FILE_LIMIT);
    Ok(if buffer.contains(&0) { Start::NotText } else { Start::Text { cut } })
}

/// The text in `bytes` if they are UTF-8. At a cut the last character may be incomplete.
fn text_of(bytes: &[u8], cut: bool) -> Option<&str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Some(text),
        Err(e) if cut && e.error_len().is_none() => {
            std::str::from_utf8(&bytes[..e.valid_up_to()]).ok()
        }
        Err(_) => None,
    }
}

/// Splits `text` behind about `bytes` bytes, between words where it has any space there.
fn split(text: &str, bytes: usize) -> (&str, &str) {
    if text.len() <= bytes {
        return (text, "");
    }
    let mut at = bytes;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let at = text[..at].rfind(char::is_whitespace).filter(|&space| space > 0).unwrap_or(at);
    text.split_at(at)
}

/// Where machines have documentation, and then other text: the folders that exist. Manual pages
/// are left out, for they are compressed almost everywhere.
pub(super) fn usual_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        ["/usr/share/common-licenses", "/usr/share/doc"].map(Into::into).into();
    folders.extend(rust_documentation());
    folders.extend(beginning_with("/usr/share", "perl"));
    folders.extend(beginning_with("/usr/lib", "python3"));
    folders.push("/usr/include".into());
    folders.retain(|folder| folder.is_dir());
    folders
}

fn beginning_with(folder: &str, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(start));
    let mut paths: Vec<_> = names.map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// The documentation that comes with a Rust toolchain.
fn rust_documentation() -> Option<PathBuf> {
    let output = std::process::Command::new("rustc").args(["--print", "sysroot"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| Path::new(path.trim()).join("share/doc"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, limit: u64) -> Corpus {
        Corpus::read([folder.to_owned()], limit, |_| {})
    }

    #[test]
    fn only_text_is_taken_and_the_rest_is_counted() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes);
        file("a.txt", b"one two three")?;
        file("b.bin", b"one\0two")?;
        file("c.latin1", b"caf\xe9 au lait")?;
        file("d.empty", b"")?;
        std::fs::create_dir(folder.path().join("deep"))?;
        file("deep/e.txt", b"four four")?;
        std::os::unix::fs::symlink(folder.path(), folder.path().join("loop"))?;
        let corpus = read(folder.path(), u64::MAX);
        let taken = &corpus.taken;
        assert_eq!((taken.files, taken.not_text, taken.unreadable), (2, 2, 0));
        assert_eq!((taken.bytes, taken.words, taken.different_words), (22, 5, 4));
        assert_eq!(corpus.documents.iter().map(|d| d.len()).collect::<Vec<_>>(), [3, 2]);
        assert!(!taken.more);
        Ok(())
    }

    #[test]
    fn reading_stops_at_the_limit_and_says_that_there_is_more() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        for i in 0..10 {
            std::fs::write(folder.path().join(i.to_string()), "word ".repeat(20))?;
        }
        let taken = read(folder.path(), 250).taken;
        assert_eq!((taken.files, taken.bytes, taken.more), (3, 300, true));
        Ok(())
    }

    #[test]
    fn a_long_file_becomes_several_documents_and_a_very_long_one_is_cut() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let text = "größer ".repeat(FILE_LIMIT / 8);
        std::fs::write(folder.path().join("long"), format!("{text}{text}"))?;
        let corpus = read(folder.path(), u64::MAX);
        assert_eq!(corpus.taken.cut, 1);
        assert!(corpus.taken.bytes <= FILE_LIMIT as u64);
        assert!(corpus.documents.len() >= FILE_LIMIT / DOCUMENT_BYTES);
        // Cut between words: there is one word, whole, but for the very end of the file.
        assert!(corpus.taken.different_words <= 2);
        Ok(())
    }

    #[test]
    fn text_without_spaces_is_split_between_characters() {
        let text = "é".repeat(100);
        let (head, tail) = split(&text, 31);
        assert_eq!((head.len(), tail.len()), (30, 170));
        assert_eq!(split("ab cd", 4), ("ab", " cd"));
        assert_eq!(split("short", 9), ("short", ""));
    }
}
