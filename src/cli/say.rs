//! Words to the user, on standard error.
//!
//! **Invariant:** the only place that prints; a closed standard error never stops a job.

use std::io::Write;

use crate::error::Error;

/// One line.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// `error: ...`, then `hint: ...`.
pub fn error(error: &Error) {
    line(&format!("error: {error}"));
    if let Some(hint) = error.hint() {
        line(&format!("hint: {hint}"));
    }
}
