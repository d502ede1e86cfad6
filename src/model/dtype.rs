//! Element types of stored tensors.
//!
//! **Invariant:** the names and sizes are those of the safetensors format.

use std::fmt;

/// An element type that weights or KV caches are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// The upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

impl std::str::FromStr for DType {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        [DType::F32, DType::Bf16, DType::F16].into_iter().find(|dtype| dtype.to_string() == name).ok_or(())
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        })
    }
}
