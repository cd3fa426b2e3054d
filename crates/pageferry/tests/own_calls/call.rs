//! One call, and what it is to answer.

use super::stage::Spot;
use crate::support::siege::errno;

/// What a call answers about pages in the air, or protected.
#[derive(Clone, Copy)]
pub(crate) struct Verdict {
    /// Not before the pages are there.
    pub(crate) waits: bool,
    /// It answers, and does, what this would if nothing moved; `None`: as ever.
    pub(crate) instead: Option<fn(&Spot) -> Vec<i64>>,
}

pub(crate) const AS_EVER: Verdict = Verdict { waits: false, instead: None };
pub(crate) const WAITS: Verdict = Verdict { waits: true, instead: None };

/// At once, but something else.
pub(crate) const fn differs(instead: fn(&Spot) -> Vec<i64>) -> Verdict {
    Verdict { waits: false, instead: Some(instead) }
}

/// A call (or a few in a row) and its verdicts.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    /// Before the pages move.
    pub(crate) prepare: fn(&Spot),
    /// The call: values, and errnos as negative numbers.
    pub(crate) act: fn(&Spot) -> Vec<i64>,
    /// Afterwards: what else there is to see.
    pub(crate) after: fn(&Spot) -> Vec<i64>,
    /// About pages in the air.
    pub(crate) air: Verdict,
    /// About protected pages.
    pub(crate) protected: Verdict,
    /// Its pages' content is another each time.
    pub(crate) blind: bool,
    /// It is fit to be made again and again beside moves.
    pub(crate) again: bool,
}

impl Call {
    pub(crate) const fn new(name: &'static str, air: Verdict, act: fn(&Spot) -> Vec<i64>) -> Self {
        Self {
            name,
            prepare: |_| (),
            act,
            after: |_| Vec::new(),
            air,
            protected: AS_EVER,
            blind: false,
            again: true,
        }
    }
    pub(crate) const fn ever(name: &'static str, act: fn(&Spot) -> Vec<i64>) -> Self {
        Self::new(name, AS_EVER, act)
    }
    pub(crate) const fn waits(name: &'static str, act: fn(&Spot) -> Vec<i64>) -> Self {
        Self::new(name, WAITS, act)
    }
    pub(crate) const fn prepared(self, prepare: fn(&Spot)) -> Self {
        Self { prepare, ..self }
    }
    pub(crate) const fn then(self, after: fn(&Spot) -> Vec<i64>) -> Self {
        Self { after, ..self }
    }
    pub(crate) const fn protected(self, protected: Verdict) -> Self {
        Self { protected, ..self }
    }
    pub(crate) const fn blind(self) -> Self {
        Self { blind: true, ..self }
    }
    /// Only while a move is held: what it answers beside moves depends on the moment.
    pub(crate) const fn once(self) -> Self {
        Self { again: false, ..self }
    }
}

/// What a call returned; -1 becomes the errno.
pub(crate) fn said(returned: impl TryInto<i64>) -> i64 {
    match returned.try_into().unwrap_or(i64::MAX) {
        -1 => -i64::from(errno()),
        other => other,
    }
}

/// An argument of a system call: a whole register, whatever its type.
pub(crate) trait Argument {
    fn word(self) -> usize;
}

impl Argument for usize {
    fn word(self) -> usize {
        self
    }
}

impl Argument for i32 {
    fn word(self) -> usize {
        (self as isize).cast_unsigned()
    }
}

impl Argument for u32 {
    fn word(self) -> usize {
        self as usize
    }
}

impl Argument for i64 {
    fn word(self) -> usize {
        usize::try_from(self).unwrap_or(usize::MAX)
    }
}

impl<T> Argument for *const T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

impl<T> Argument for *mut T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

/// A system call by its number, with up to six arguments.
macro_rules! sys {
    ($number:expr $(, $arg:expr)*) => {{
        // SAFETY: the arguments name memory of the test's own, or none.
        $crate::call::said(unsafe {
            libc::syscall($number $(, $crate::call::Argument::word($arg))*)
        })
    }};
}
pub(crate) use sys;
