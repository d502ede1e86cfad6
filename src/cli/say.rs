//! Words to the user, on standard error.
//!
//! **Invariant:** the only place that prints; a closed standard error never stops a job.

use std::io::Write;

use crate::error::{Error, Result};

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

/// What a command was asked for, on standard output.
///
/// # Errors
/// When standard output cannot be written to.
pub fn data(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))
}
