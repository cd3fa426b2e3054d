//! Reading small kernel files below a root, with errors that name the file.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::ReadError;
use crate::ids::Id;
use crate::list::{IdList, MAX_NUMBER};

/// How much of a malformed file an error quotes.
const QUOTE_CHARS: usize = 80;

/// A directory that holds `sys/` and `proc/`.
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn is_this_machine(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The content of a file that must be there.
    pub(crate) fn text(&self, path: &str) -> Result<String, ReadError> {
        let path = self.root.join(path);
        fs::read_to_string(&path).map_err(|source| ReadError::Io { path, source })
    }

    /// The content of a file that a kernel may do without. Attributes that
    /// exist but have no value answer with ENODEV, ENXIO, EINVAL or EOPNOTSUPP; a
    /// sandbox that hides one answers EACCES or EPERM. All mean "not told".
    pub(crate) fn optional_text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    /// The value of a file that must be there.
    pub(crate) fn value<T: FromStr>(&self, path: &str, what: &str) -> Result<T, ReadError> {
        let text = self.text(path)?;
        self.parse(path, &text, what)
    }

    /// The value of a file that may be absent; if it is there it must make sense.
    pub(crate) fn optional<T: FromStr>(
        &self,
        path: &str,
        what: &str,
    ) -> Result<Option<T>, ReadError> {
        self.optional_text(path).map(|text| self.parse(path, &text, what)).transpose()
    }

    /// A list file that must be there.
    pub(crate) fn list<I: Id>(&self, path: &str) -> Result<IdList<I>, ReadError> {
        let text = self.text(path)?;
        self.parse_list(path, &text)
    }

    /// A list file that may be absent.
    pub(crate) fn optional_list<I: Id>(&self, path: &str) -> Result<Option<IdList<I>>, ReadError> {
        self.optional_text(path).map(|text| self.parse_list(path, &text)).transpose()
    }

    fn parse<T: FromStr>(&self, path: &str, text: &str, what: &str) -> Result<T, ReadError> {
        text.trim().parse().map_err(|_| self.malformed(path, text, format!("expected {what}")))
    }

    fn parse_list<I: Id>(&self, path: &str, text: &str) -> Result<IdList<I>, ReadError> {
        text.parse::<IdList<I>>().map_err(|error| self.malformed(path, text, error.to_string()))
    }

    pub(crate) fn malformed(&self, path: &str, content: &str, reason: String) -> ReadError {
        ReadError::Malformed {
            path: self.root.join(path),
            content: content.trim_end().chars().take(QUOTE_CHARS).collect(),
            reason,
        }
    }

    /// The numbers N of the entries `<prefix>N<suffix>` of a directory, ascending;
    /// empty if there is no such directory. Other entries are not ours.
    pub(crate) fn numbered(
        &self,
        directory: &str,
        prefix: &str,
        suffix: &str,
    ) -> Result<Vec<u64>, ReadError> {
        let path = self.root.join(directory);
        let failed = |source: io::Error| ReadError::Io { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound) => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(prefix)?.strip_suffix(suffix))
                .and_then(|digits| digits.parse::<u64>().ok());
            numbers.extend(number);
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Like [`numbered`](Self::numbered) with no suffix, for ids.
    pub(crate) fn ids<I: Id>(&self, directory: &str, prefix: &str) -> Result<Vec<I>, ReadError> {
        let numbers = self.numbered(directory, prefix, "")?;
        Ok(numbers
            .into_iter()
            .filter_map(|n| u32::try_from(n).ok().filter(|&n| n <= MAX_NUMBER))
            .map(I::from_u32)
            .collect())
    }
}
