//! Memory outside the heap: mapped files.
//!
//! **Invariant:** `unsafe` for memory stays in this module and in `device`.

pub mod mapped_file;
