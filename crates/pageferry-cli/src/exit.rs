//! Exit codes: one table, from which `--help`, the man page and the code agree.

use std::process::ExitCode;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// It was tried and failed.
    Failed,
    /// The command line or an input is wrong; nothing was tried. clap's own code.
    Usage,
    /// `doctor` found that something needed is missing.
    Missing,
    /// `move` left pages behind that were to go.
    Partial,
    /// Cancelled, by whichever signal: 128 + SIGINT, as shells report it.
    Cancelled,
}

impl Exit {
    /// Every code with its meaning, for `--help` and the man page.
    pub(crate) const ALL: [(Self, &'static str); 6] = [
        (Self::Ok, "success"),
        (Self::Failed, "the operation was tried and failed"),
        (Self::Usage, "wrong usage or bad input; nothing was tried"),
        (Self::Missing, "doctor found that something needed is missing"),
        (Self::Partial, "move left pages where they were; its report says why"),
        (Self::Cancelled, "cancelled by SIGINT, SIGTERM or SIGHUP"),
    ];

    /// The number a shell sees.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Missing => 3,
            Self::Partial => 4,
            Self::Cancelled => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}
