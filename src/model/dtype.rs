//! Element types of stored tensors.
//!
//! **Invariant:** the names and sizes of plain types are those of the safetensors format.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An element type that weights or KV caches are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// The upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
    /// 8 bits, and 32 more for every group of 64; see [`crate::quant::groups`].
    Int8,
    /// 4 bits, and 32 more for every group of 64.
    Int4,
}

impl DType {
    /// All of them.
    pub const ALL: [DType; 5] = [DType::F32, DType::Bf16, DType::F16, DType::Int8, DType::Int4];

    /// Bytes of an element.
    ///
    /// # Panics
    /// Of integers: they come in groups.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Int8 | DType::Int4 => panic!("{self} is stored in groups"),
        }
    }

    /// Bytes of an element, its share of what its group needs included.
    pub fn bytes(self) -> f64 {
        match self {
            DType::Int8 => 8.5 / 8.0,
            DType::Int4 => 4.5 / 8.0,
            plain => plain.size() as f64,
        }
    }

    /// Its name in flags and files.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::Int8 => "int8",
            DType::Int4 => "int4",
        }
    }
}

impl std::str::FromStr for DType {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or(())
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
