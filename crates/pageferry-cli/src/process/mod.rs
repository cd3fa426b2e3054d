//! `pageferry where`, `move` and `migratepages`: memory of programs that run, looked at and moved
//! from outside.
//!
//! What always holds:
//! - Whatever can be wrong with an input is found, and said with its reason and remedy
//!   ([`trouble`]), before a page is touched.
//! - What a report says adds up: every page looked at is in one line of it, and each line of
//!   pages that stayed says why and what can be done.
//! - The first SIGINT, SIGTERM or SIGHUP stops a move after the calls under way; it still reports.
//!
//! A program that uses the library and listens is asked to move its regions itself ([`ask`]), with
//! the library's own copies; the rest goes the kernel's way ([`pageferry::process`]).
//!
//! What can go wrong: processes end, execute, fork and map while they are looked at. That is a
//! note in the report, not an error.

mod args;
mod ask;
mod bar;
mod estimate;
mod migratepages;
mod moving;
mod report;
mod report_text;
mod residency;
mod residency_text;
mod trouble;

pub(crate) use self::migratepages::{MigratepagesArgs, run as migratepages};
pub(crate) use self::moving::{MoveArgs, run as moving};
pub(crate) use self::residency::{WhereArgs, run as residency};
