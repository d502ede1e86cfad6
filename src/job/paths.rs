//! The files of a job and who may use them.
//!
//! **Invariant:** no two roles share a file, whatever names, links or symbolic links lead to it; every side file's
//! name begins with the output's.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::options::Input;
use crate::durable::{Lock, with_suffix};
use crate::error::{Error, Result};

/// Where everything of a job with an output file lies.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    /// The output.
    pub output: PathBuf,
    /// Failed lines, if they are split off.
    pub errors: Option<PathBuf>,
    /// The journal, there while the job is not finished.
    pub journal: PathBuf,
    /// Fingerprint and, in the end, the result; it stays.
    pub state: PathBuf,
    /// A retry's new output until it is whole.
    pub partial: PathBuf,
    /// A copy of standard input until the job is finished.
    pub spool: PathBuf,
    lock: PathBuf,
}

impl Paths {
    /// Finds the files' places and refuses those that cannot work.
    pub fn of(input: &Input, output: &Path, errors: Option<&Path>) -> Result<Paths> {
        let output = resolve(output)?;
        let errors = errors.map(resolve).transpose()?;
        if errors.as_ref().is_some_and(|errors| same_file(errors, &output)) {
            return Err(Error::usage("the error file is the output", "choose another --error-file"));
        }
        if let Input::File(input) = input {
            refuse_input(input, "output", &output)?;
            if let Some(errors) = &errors {
                refuse_input(input, "error file", errors)?;
            }
        }
        Ok(Paths {
            journal: with_suffix(&output, ".journal"),
            state: with_suffix(&output, ".run.json"),
            partial: with_suffix(&output, ".partial"),
            spool: with_suffix(&output, ".input"),
            lock: with_suffix(&output, ".lock"),
            output,
            errors,
        })
    }

    /// Keeps other processes off the output.
    pub fn lock(&self) -> Result<Lock> {
        Lock::take(&self.lock)
    }
}

/// The real place of an output file, which need not exist yet.
fn resolve(path: &Path) -> Result<PathBuf> {
    let refuse = |what: &str, hint: &str| {
        Err(Error::Output { path: path.to_owned(), what: what.into(), hint: Some(hint.into()) })
    };
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => refuse("is a directory", "name a file in it"),
        Ok(metadata) if !metadata.is_file() => refuse("is not a regular file", "use `-` to stream the results"),
        Ok(_) => fs::canonicalize(path).map_err(Error::io("open", path)),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("open", path)(error)),
        Err(_) if fs::symlink_metadata(path).is_ok() => refuse("is a broken symbolic link", "remove it"),
        Err(_) => {
            let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
            match (fs::canonicalize(parent), path.file_name()) {
                (Ok(parent), Some(name)) if parent.is_dir() => Ok(parent.join(name)),
                _ => refuse("its directory does not exist", "create the directory first"),
            }
        }
    }
}

fn refuse_input(input: &Path, role: &str, path: &Path) -> Result<()> {
    if !same_file(input, path) {
        return Ok(());
    }
    Err(Error::usage(format!("the {role} {} is the input", path.display()), format!("choose another {role}")))
}

/// Whether two names lead to one file.
fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => a == b,
    }
}

/// Whether the input must be copied before it can be read twice.
pub(crate) fn is_stream(path: &Path) -> Result<bool> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_dir() {
        let hint = Some("name a file of JSON lines".into());
        return Err(Error::Input { path: path.to_owned(), what: "is a directory".into(), hint });
    }
    let kind = metadata.file_type();
    Ok(kind.is_fifo() || kind.is_char_device() || kind.is_socket())
}
