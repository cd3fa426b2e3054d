//! What a guest tells the host: records among the output of its tests.
//!
//! A record stands on the rest of a line after an ASCII RS, wherever in the line that is: a test
//! may end in the middle of one. What comes before it belongs to the test. A test that prints an RS
//! itself would be misunderstood; none does, and its result would be missing, which is a failure.

/// ASCII record separator.
const SEPARATOR: char = '\u{1e}';

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// The machine is up; the kernel's release.
    Ready(String),
    /// A test begins.
    Begin(Test),
    /// It ended, with this exit status (a signal adds 128).
    End(Test, i32),
    /// All tests have run.
    Over,
    /// A line that nobody understands.
    Garbled(String),
}

/// A test by its binary and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Test {
    pub(crate) binary: String,
    pub(crate) name: String,
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.binary, self.name)
    }
}

/// Splits a line: text, and the record that follows.
pub(crate) fn split(line: &str) -> (&str, Option<Record>) {
    match line.split_once(SEPARATOR) {
        None => (line, None),
        Some((text, record)) => (text, Some(parse(record.trim_end()))),
    }
}

fn parse(record: &str) -> Record {
    let words: Vec<_> = record.split(' ').collect();
    let test = |binary: &str, name: &str| Test { binary: binary.into(), name: name.into() };
    match words[..] {
        ["ready", release] => Record::Ready(release.to_owned()),
        ["begin", binary, name] => Record::Begin(test(binary, name)),
        ["end", binary, name, status] => match status.parse() {
            Ok(status) => Record::End(test(binary, name), status),
            Err(_) => Record::Garbled(record.to_owned()),
        },
        ["over"] => Record::Over,
        _ => Record::Garbled(record.to_owned()),
    }
}

/// What an exit status means, as the guest's shell gives it.
pub(crate) fn meaning(status: i32) -> String {
    match status {
        101 => "panicked".into(),
        134 => "aborted, or ended because it took too long".into(),
        137 => "killed".into(),
        139 => "segmentation fault".into(),
        143 => "ended because it took too long".into(),
        _ if status > 128 => format!("signal {}", status - 128),
        _ => format!("exit status {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test() -> Test {
        Test { binary: "moves".into(), name: "a_test".into() }
    }

    #[test]
    fn records_are_told_from_output() {
        assert_eq!(split("running 1 test"), ("running 1 test", None));
        assert_eq!(split("\u{1e}ready 6.12\r"), ("", Some(Record::Ready("6.12".into()))));
        assert_eq!(split("\u{1e}begin moves a_test"), ("", Some(Record::Begin(test()))));
        assert_eq!(split("half\u{1e}end moves a_test 0"), ("half", Some(Record::End(test(), 0))));
        assert_eq!(split("\u{1e}over"), ("", Some(Record::Over)));
    }

    #[test]
    fn a_record_that_is_not_whole_is_garbled_not_guessed() {
        for text in ["", "end moves a_test", "end moves a_test x", "begin moves", "gone"] {
            let line = format!("\u{1e}{text}");
            assert_eq!(split(&line), ("", Some(Record::Garbled(text.into()))));
        }
    }

    #[test]
    fn a_status_above_128_is_a_signal() {
        assert_eq!(meaning(129), "signal 1");
        assert_eq!(meaning(3), "exit status 3");
    }
}
