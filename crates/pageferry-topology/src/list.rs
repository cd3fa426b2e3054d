//! The kernel's list format for sets of CPUs and nodes: `0-3,8,10-11`.
//!
//! That is what `%*pbl` prints (lib/vsprintf.c, `bitmap_list_string`): ascending,
//! disjoint, adjacent numbers joined, the empty set an empty line. Reading is a
//! little wider: order, overlap and blanks at the ends do not matter. The
//! stride form `0-31:1/2` that the kernel takes as input is never printed and
//! is refused.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

use crate::ids::{CpuId, Id, NodeId};

/// A set of CPUs.
pub type CpuList = IdList<CpuId>;
/// A set of NUMA nodes.
pub type NodeList = IdList<NodeId>;

/// The largest number a list may hold. Far above what a kernel can have
/// (`CONFIG_NR_CPUS` <= 8192, `CONFIG_NODES_SHIFT` <= 10), and low enough that a
/// garbled range cannot ask for gigabytes of list.
pub(crate) const MAX_NUMBER: u32 = (1 << 16) - 1;

/// A set of ids in ascending order, read and written in the kernel's list format.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdList<I> {
    /// Ascending, without duplicates.
    numbers: Vec<u32>,
    kind: PhantomData<I>,
}

/// Why a text is not a list.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ListError {
    /// A part between commas is neither a number nor a range.
    #[error("`{part}` is neither a number nor a range like 0-3")]
    NotANumber {
        /// The part as it was found.
        part: String,
    },
    /// A number begins with a 0, and means one thing to numactl and another to everybody else.
    #[error(
        "`{part}` begins with a 0, which numactl reads as octal (0x: hexadecimal): write it in decimal"
    )]
    LeadingZero {
        /// The part as it was found.
        part: String,
    },
    /// A part between commas is not a word of a mask.
    #[error("`{part}` is not a word of a mask: expected at most 8 hexadecimal digits")]
    NotAMask {
        /// The part as it was found.
        part: String,
    },
    /// A range ends before it begins.
    #[error("the range `{part}` ends before it begins")]
    Reversed {
        /// The part as it was found.
        part: String,
    },
    /// A number is beyond what any kernel has.
    #[error("`{part}` goes beyond 65535, the largest number accepted")]
    TooLarge {
        /// The part as it was found.
        part: String,
    },
    /// A node is not one of those that may be named.
    #[error("`{part}` names a node that is not there: choose from {allowed}")]
    NotThere {
        /// The part as it was found.
        part: String,
        /// The nodes that may be named.
        allowed: NodeList,
    },
    /// A relative number goes beyond the nodes that there are.
    #[error("`{part}` counts beyond the {count} nodes {allowed}: +0 is the first of them")]
    NotSoMany {
        /// The part as it was found.
        part: String,
        /// How many nodes there are to count.
        count: usize,
        /// These nodes.
        allowed: NodeList,
    },
    /// No node is left.
    #[error("`{text}` names no node: write for example 0,2-3, all, !1 or +0")]
    Empty {
        /// The whole text.
        text: String,
    },
}

impl<I: Id> IdList<I> {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { numbers: Vec::new(), kind: PhantomData }
    }

    /// How many ids there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Whether `id` is in the set.
    #[must_use]
    pub fn contains(&self, id: I) -> bool {
        self.numbers.binary_search(&id.to_u32()).is_ok()
    }

    /// The smallest id.
    #[must_use]
    pub fn first(&self) -> Option<I> {
        self.numbers.first().map(|&n| I::from_u32(n))
    }

    /// The ids, ascending.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = I> + '_ {
        self.numbers.iter().map(|&n| I::from_u32(n))
    }

    /// The ids that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.iter().filter(|&id| other.contains(id)).collect()
    }

    /// The ids of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.iter().filter(|&id| !other.contains(id)).collect()
    }
}

impl<I: Id> IdList<I> {
    /// Reads the kernel's mask format: words of 32 bits in hexadecimal, the highest first, the
    /// first of them perhaps shorter (`%*pb`; lib/vsprintf.c, `bitmap_string`).
    pub(crate) fn from_mask(text: &str) -> Result<Self, ListError> {
        let mut numbers = Vec::new();
        for (place, part) in text.trim().rsplit(',').enumerate() {
            let is_word =
                matches!(part.len(), 1..=8) && part.bytes().all(|b| b.is_ascii_hexdigit());
            let word = u32::from_str_radix(part, 16).ok().filter(|_| is_word);
            let word = word.ok_or_else(|| ListError::NotAMask { part: part.into() })?;
            let bits = (0..u32::BITS).filter(|bit| word >> bit & 1 == 1);
            for bit in bits {
                let number = u32::try_from(place).ok().and_then(|n| n.checked_mul(u32::BITS));
                match number.map(|n| n.saturating_add(bit)) {
                    Some(number) if number <= MAX_NUMBER => numbers.push(number),
                    _ => return Err(ListError::TooLarge { part: part.into() }),
                }
            }
        }
        Ok(numbers.into_iter().map(I::from_u32).collect())
    }
}

impl<I: Id> Default for IdList<I> {
    fn default() -> Self {
        Self::new()
    }
}

impl<I: Id> FromIterator<I> for IdList<I> {
    fn from_iter<T: IntoIterator<Item = I>>(ids: T) -> Self {
        let mut numbers: Vec<u32> = ids.into_iter().map(Id::to_u32).collect();
        numbers.sort_unstable();
        numbers.dedup();
        Self { numbers, kind: PhantomData }
    }
}

impl<I: Id> FromStr for IdList<I> {
    type Err = ListError;

    fn from_str(text: &str) -> Result<Self, ListError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::new());
        }
        let mut ids = Vec::new();
        for part in text.split(',') {
            let (from, to) = match part.split_once('-') {
                Some((from, to)) => (number(from, part)?, number(to, part)?),
                None => {
                    let single = number(part, part)?;
                    (single, single)
                }
            };
            if to < from {
                return Err(ListError::Reversed { part: part.into() });
            }
            ids.extend((from..=to).map(I::from_u32));
        }
        Ok(ids.into_iter().collect())
    }
}

impl NodeList {
    /// Reads a list of nodes as `numactl` writes it (`numa_parse_nodestring(3)`): `0,2-3`; `all`;
    /// `!1`, all but node 1; `+0`, the first of `allowed`, `+0-1,3` the first, second and fourth;
    /// `!+0`, all but the first. Where a range spans nodes that are not there, those are left out.
    ///
    /// Numbers are decimal. One like `010` is refused: libnuma's `strtoul(3)` takes it for 8.
    ///
    /// `allowed` are the nodes that may be named, in numactl those of the caller's cpuset.
    ///
    /// # Errors
    /// [`ListError`]: the text is no such list, names a node that is not allowed, or none.
    pub fn parse(text: &str, allowed: &Self) -> Result<Self, ListError> {
        let trimmed = text.trim();
        let (inverted, rest) = trimmed.strip_prefix('!').map_or((false, trimmed), |r| (true, r));
        let (relative, rest) = rest.strip_prefix('+').map_or((false, rest), |r| (true, r));
        let empty = || ListError::Empty { text: trimmed.into() };
        if rest.is_empty() {
            return Err(empty());
        }
        let mut named = Self::new();
        for part in rest.split(',') {
            if part == "all" && !relative {
                named = allowed.clone();
                continue;
            }
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            if [from, to].iter().any(|digits| digits.len() > 1 && digits.starts_with('0')) {
                return Err(ListError::LeadingZero { part: part.into() });
            }
            let (from, to) = (number(from, part)?, number(to, part)?);
            if to < from {
                return Err(ListError::Reversed { part: part.into() });
            }
            let nodes = if relative { allowed.counted(from, to) } else { allowed.within(from, to) };
            // Both ends are there; what lies between need not be.
            let ends = if relative {
                (to as usize) < allowed.len()
            } else {
                allowed.contains(NodeId::new(from)) && allowed.contains(NodeId::new(to))
            };
            match (ends, relative) {
                (true, _) => named = named.iter().chain(nodes.iter()).collect(),
                (false, false) => {
                    return Err(ListError::NotThere {
                        part: part.into(),
                        allowed: allowed.clone(),
                    });
                }
                (false, true) => {
                    let (part, count) = (format!("+{part}"), allowed.len());
                    return Err(ListError::NotSoMany { part, count, allowed: allowed.clone() });
                }
            }
        }
        let nodes = if inverted { allowed.difference(&named) } else { named };
        if nodes.is_empty() { Err(empty()) } else { Ok(nodes) }
    }

    /// Its ids from one number to another.
    fn within(&self, from: u32, to: u32) -> Self {
        self.iter().filter(|id| (from..=to).contains(&id.get())).collect()
    }

    /// Its ids from one place to another, counted from 0.
    fn counted(&self, from: u32, to: u32) -> Self {
        self.iter()
            .zip(0..)
            .filter(|(_, place)| (from..=to).contains(place))
            .map(|(id, _)| id)
            .collect()
    }
}

/// One number of `part`: digits only, so that `+1`, which Rust would take, is refused.
fn number(digits: &str, part: &str) -> Result<u32, ListError> {
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ListError::NotANumber { part: part.into() });
    }
    match digits.parse() {
        Ok(n) if n <= MAX_NUMBER => Ok(n),
        _ => Err(ListError::TooLarge { part: part.into() }),
    }
}

impl<I: Id> fmt::Display for IdList<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.numbers.as_slice();
        while let [from, ..] = *rest {
            let run = rest.iter().zip(from..).take_while(|&(&n, expected)| n == expected).count();
            if rest.len() < self.numbers.len() {
                f.write_str(",")?;
            }
            write!(f, "{from}")?;
            if run > 1 {
                write!(f, "-{}", rest[run - 1])?;
            }
            rest = &rest[run..];
        }
        Ok(())
    }
}

impl<I: Id> fmt::Debug for IdList<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

impl<I: Id> Serialize for IdList<I> {
    /// As an array of numbers: programs should not have to parse the list format.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.numbers.serialize(serializer)
    }
}
