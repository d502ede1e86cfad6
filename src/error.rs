//! What can go wrong, in words for the person who runs the job.
//!
//! **Invariant:** a variant carries everything its message needs; `Display` is the text after `error:`,
//! [`Error::hint`] the text after `hint:`. Bugs are assertions, never an `Error`.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything that can fail for a reason outside the program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Which memory a number of bytes belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Device memory.
    Gpu,
    /// Main memory.
    Cpu,
    /// Files below the offload directory.
    Disk,
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Tier; 3] = [Tier::Gpu, Tier::Cpu, Tier::Disk];
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Gpu => "gpu",
            Tier::Cpu => "cpu",
            Tier::Disk => "disk",
        })
    }
}

/// A number of bytes, shown in binary units with one decimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

/// Everything that ends a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, environment variable, configuration or policy file that cannot be used.
    #[error("{what}")]
    Usage {
        /// What is wrong, naming the flag or key and its value.
        what: String,
        /// What to type instead.
        hint: Option<String>,
    },
    /// The operating system refused a file operation.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was attempted, such as `read` or `create`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A part of a file could not be read or written.
    #[error("{action} {path} at offset {offset}: {source}", path = path.display())]
    IoAt {
        /// What was attempted: `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The first byte's place in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A model directory, or a file in it, that cannot be used.
    #[error("{path}: {what}", path = path.display())]
    Model {
        /// The offending file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The input file cannot be processed as a whole (single bad lines become error records instead).
    #[error("{path}: {what}", path = path.display())]
    Input {
        /// The input file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The output or one of its side files cannot be continued.
    #[error("{path}: {what}", path = path.display())]
    Output {
        /// The output file or side file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The job needs more memory than the user granted.
    #[error("{what} needs {need} on {tier}, budget is {have}")]
    OverBudget {
        /// Whose need it is.
        what: String,
        /// The memory.
        tier: Tier,
        /// Bytes needed.
        need: Bytes,
        /// Bytes granted.
        have: Bytes,
        /// What to do.
        hint: Option<String>,
    },
    /// A device that was asked for cannot be used.
    #[error("{what}")]
    NoDevice {
        /// What is missing.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A device failed while it computed.
    #[error("the device failed: {what}")]
    Device {
        /// What it was about, and what the driver says.
        what: String,
    },
    /// A signal asked the process to stop; everything finished is saved.
    #[error("stopped by {signal}")]
    Stopped {
        /// The signal's name.
        signal: &'static str,
    },
}

impl Error {
    /// An [`Error::Usage`].
    pub fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Error::Usage { what: what.into(), hint: Some(hint.into()) }
    }

    /// An [`Error::Model`] without a hint.
    pub fn model(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::Model { path: path.as_ref().to_owned(), what: what.into(), hint: None }
    }

    /// Turns an [`io::Error`] into an [`Error::Io`]; for `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Usage { hint, .. }
            | Error::Model { hint, .. }
            | Error::Input { hint, .. }
            | Error::Output { hint, .. }
            | Error::OverBudget { hint, .. } => hint.clone(),
            Error::Io { source, .. } | Error::IoAt { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Some("free some space and run the same command again: finished work is kept".into())
                }
                io::ErrorKind::PermissionDenied => Some("check the permissions of the file and its directory".into()),
                io::ErrorKind::UnexpectedEof => {
                    Some("something cut the file short: make it again (a packed model with `tidemill pack`)".into())
                }
                _ => None,
            },
            Error::NoDevice { hint, .. } => Some(hint.clone()),
            Error::Device { .. } => Some(
                "run the same command again to go on: finished work is kept (if it fails again, `tidemill doctor` and \
                 the system's log may tell why)"
                    .into(),
            ),
            Error::Stopped { .. } => Some("run the same command again to go on".into()),
        }
    }

    /// The process's exit code (design, section 8): 2 for usage and validation, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } => 2,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_like_the_flags_are_written() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(14 << 30).to_string(), "14.0 GiB");
        assert_eq!(Bytes((18.2 * (1u64 << 30) as f64) as u64).to_string(), "18.2 GiB");
    }

    #[test]
    fn over_budget_names_both_numbers() {
        let error = Error::OverBudget {
            what: "policy".into(),
            tier: Tier::Gpu,
            need: Bytes(20 << 30),
            have: Bytes(14 << 30),
            hint: None,
        };
        assert_eq!(error.to_string(), "policy needs 20.0 GiB on gpu, budget is 14.0 GiB");
    }
}
