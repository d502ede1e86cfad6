//! Other forms of weights: smaller, and turned back where they are used.
//!
//! **Invariant:** nothing here knows where weights come from or go to: bytes in, bytes out.

pub mod groups;
pub mod planes;
