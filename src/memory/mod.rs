//! Memory that is allocated once and handed out by the byte.
//!
//! **Invariant:** every [`arena::Region`] of an arena is disjoint from the others, so safe code that owns a
//! region can neither read nor overwrite another's bytes.

pub mod arena;
pub mod disk;
pub mod limits;
pub mod mapped_file;
