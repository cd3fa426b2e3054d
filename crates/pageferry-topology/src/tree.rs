//! Reading small kernel files below a root, with errors that name the file.
//!
//! What a kernel may leave out is "not told" when it is absent, empty, or answers with an errno:
//! attributes without a value say ENODEV, ENXIO, EINVAL or EOPNOTSUPP, a sandbox that hides one
//! EACCES or EPERM. Only the caller's own want of files or memory is an error even there: it says
//! nothing of the machine.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{ReadError, is_callers_own};
use crate::ids::Id;
use crate::list::{CpuList, IdList, ListError, MAX_NUMBER};

/// How much of a malformed file an error quotes.
const QUOTE_CHARS: usize = 80;

/// Before 5.16 a list longer than a page was cut there, without the final line break
/// (`cpumap_print_to_pagebuf`, include/linux/cpumask.h). The smallest page, less the NUL.
const CUT_FROM: usize = 4095;

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
        match fs::read(&path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(source) => Err(ReadError::Io { path, source }),
        }
    }

    /// The content of a file that a kernel may do without; `None` if that tells nothing.
    pub(crate) fn optional_text(&self, path: &str) -> Result<Option<String>, ReadError> {
        let text = told(self.text(path))?;
        Ok(text.filter(|text| !text.trim().is_empty()))
    }

    /// The value of a file that may tell nothing; if it tells something it must make sense.
    pub(crate) fn optional<T: FromStr>(
        &self,
        path: &str,
        what: &str,
    ) -> Result<Option<T>, ReadError> {
        let Some(text) = self.optional_text(path)? else {
            return Ok(None);
        };
        let value = text.trim().parse();
        value.map(Some).map_err(|_| self.malformed(path, &text, format!("expected {what}")))
    }

    /// A list file that must be there.
    pub(crate) fn list<I: Id>(&self, path: &str) -> Result<IdList<I>, ReadError> {
        let text = self.text(path)?;
        self.parsed(path, &text, text.parse())
    }

    /// A list file that may tell nothing.
    pub(crate) fn optional_list<I: Id>(&self, path: &str) -> Result<Option<IdList<I>>, ReadError> {
        let text = self.optional_text(path)?;
        text.map(|text| self.parsed(path, &text, text.parse())).transpose()
    }

    /// A set of CPUs that the kernel gives in two files, as a list and as a mask. The mask serves
    /// where the list is not there, empty or cut off.
    pub(crate) fn cpus(&self, list: &str, mask: &str) -> Result<CpuList, ReadError> {
        let listed = self.text(list);
        if let Ok(text) = &listed
            && !text.trim().is_empty()
            && !is_cut(text)
        {
            return self.parsed(list, text, text.parse());
        }
        if let Some(text) = self.optional_text(mask)? {
            return self.parsed(mask, &text, CpuList::from_mask(&text));
        }
        let text = listed?;
        if is_cut(&text) {
            let reason = format!("it is cut off, and there is no mask in {mask}");
            return Err(self.malformed(list, &text, reason));
        }
        self.parsed(list, &text, text.parse())
    }

    /// Like [`cpus`](Self::cpus), for files that may tell nothing; never an empty set.
    pub(crate) fn optional_cpus(
        &self,
        list: &str,
        mask: &str,
    ) -> Result<Option<CpuList>, ReadError> {
        let cpus = told(self.cpus(list, mask))?;
        Ok(cpus.filter(|cpus| !cpus.is_empty()))
    }

    fn parsed<T>(
        &self,
        path: &str,
        text: &str,
        result: Result<T, ListError>,
    ) -> Result<T, ReadError> {
        result.map_err(|error| self.malformed(path, text, error.to_string()))
    }

    pub(crate) fn malformed(&self, path: &str, content: &str, reason: String) -> ReadError {
        ReadError::Malformed {
            path: self.root.join(path),
            content: content.trim_end().chars().take(QUOTE_CHARS).collect(),
            reason,
        }
    }

    /// Whether there is such a file or directory; what cannot be looked at counts as there.
    pub(crate) fn is_there(&self, path: &str) -> bool {
        let looked = fs::symlink_metadata(self.root.join(path));
        !looked.is_err_and(|error| error.kind() == ErrorKind::NotFound)
    }

    /// The numbers N of the entries `<prefix>N<suffix>` of a directory that may tell nothing,
    /// ascending. Other entries are not ours.
    pub(crate) fn numbered(
        &self,
        directory: &str,
        prefix: &str,
        suffix: &str,
    ) -> Result<Vec<u64>, ReadError> {
        let path = self.root.join(directory);
        let names = fs::read_dir(&path).and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()
        });
        let names = told(names.map_err(|source| ReadError::Io { path, source }))?;
        let number = |name: &std::ffi::OsString| {
            let name = name.to_str()?;
            name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse::<u64>().ok()
        };
        let mut numbers: Vec<u64> = names.iter().flatten().filter_map(number).collect();
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

/// `None` for an errno by which the kernel or a sandbox says: not told.
fn told<T>(result: Result<T, ReadError>) -> Result<Option<T>, ReadError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ReadError::Io { source, .. }) if !is_callers_own(&source) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_cut(text: &str) -> bool {
    text.len() >= CUT_FROM && !text.ends_with('\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(errno: i32) -> Result<Option<()>, ReadError> {
        told(Err(ReadError::Io { path: "a".into(), source: io::Error::from_raw_os_error(errno) }))
    }

    #[test]
    fn an_attribute_without_a_value_is_not_told_and_the_callers_own_want_is_an_error() {
        use libc::{
            EACCES, EINVAL, EMFILE, ENFILE, ENODEV, ENOENT, ENOMEM, ENXIO, EOPNOTSUPP, EPERM,
        };
        for errno in [ENOENT, ENODEV, ENXIO, EINVAL, EOPNOTSUPP, EACCES, EPERM] {
            assert!(matches!(answered(errno), Ok(None)), "{errno}");
        }
        for errno in [EMFILE, ENFILE, ENOMEM] {
            assert!(answered(errno).is_err(), "{errno}");
        }
    }
}
