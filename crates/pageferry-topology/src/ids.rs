//! Newtypes for the kernel's numbers, so that a CPU is never taken for a node.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::Serialize;

/// A number by which the kernel names something, usable in an [`IdList`](crate::IdList).
pub trait Id: Copy + Ord + fmt::Display + fmt::Debug {
    /// The id with this number.
    fn from_u32(number: u32) -> Self;
    /// The number.
    fn to_u32(self) -> u32;
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(u32);

        impl $name {
            /// The id with this number. Whether it exists, a [`Machine`](crate::Machine) knows.
            #[must_use]
            pub const fn new(number: u32) -> Self {
                Self(number)
            }

            /// The number.
            #[must_use]
            pub const fn get(self) -> u32 {
                self.0
            }
        }

        impl Id for $name {
            fn from_u32(number: u32) -> Self {
                Self(number)
            }

            fn to_u32(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<u32> for $name {
            fn from(number: u32) -> Self {
                Self(number)
            }
        }

        impl From<$name> for u32 {
            fn from(id: $name) -> u32 {
                id.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIntError;

            fn from_str(text: &str) -> Result<Self, ParseIntError> {
                text.trim().parse().map(Self)
            }
        }
    };
}

id! {
    /// A NUMA node, as in `/sys/devices/system/node/node<N>`.
    NodeId
}
id! {
    /// A logical CPU (a hardware thread), as in `/sys/devices/system/cpu/cpu<N>`.
    CpuId
}
id! {
    /// A memory tier, as in `/sys/devices/virtual/memory_tiering/memory_tier<N>`.
    /// A smaller number is a faster tier; DRAM of a CPU is usually 4.
    TierId
}
