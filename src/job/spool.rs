//! Input that can be read only once, copied beside the output.
//!
//! **Invariant:** a spool is whole: it gets its name after its last byte is durable.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::disk::{self, refuse, with_suffix};
use super::lines::hex;
use super::options::Input;
use super::paths::Paths;
use super::state::{RunResult, RunState};
use crate::error::{Error, Result};

/// Where a stream's content is.
pub(crate) enum Spooled {
    /// The whole input lies in the spool; it is to be called so in messages.
    At(PathBuf),
    /// Nobody needs it: the job is finished, and no input came.
    NotNeeded(Box<(RunState, RunResult)>),
}

/// Copies a stream beside the output so that a resumed job can read it again.
pub(crate) fn spool(input: &Input, paths: &Paths, state: Option<&RunState>, retry: bool) -> Result<Spooled> {
    let (named, mut source): (PathBuf, Box<dyn Read>) = match input {
        Input::File(path) => (path.clone(), Box::new(File::open(path).map_err(Error::io("open", path))?)),
        // Someone who resumes at a terminal has nothing to type in.
        Input::Stdin if state.is_some() && io::stdin().is_terminal() => {
            ("standard input".into(), Box::new(io::empty()))
        }
        Input::Stdin => ("standard input".into(), Box::new(io::stdin())),
    };
    let temporary = with_suffix(&paths.spool, ".tmp");
    let bytes = match copy(&mut source, &temporary) {
        Ok(bytes) => bytes,
        Err(error) => {
            disk::remove(&temporary)?;
            return Err(error);
        }
    };
    let known = state.is_some() && disk::length(&paths.spool)?.is_some();
    if known && bytes == 0 {
        disk::remove(&temporary)?;
        return Ok(Spooled::At(named));
    }
    if let Some((state, result)) = state.and_then(|state| Some((state, state.result.as_ref()?)))
        && bytes == 0
        && !(retry && result.failed > 0)
    {
        disk::remove(&temporary)?;
        return Ok(Spooled::NotNeeded(Box::new((state.clone(), result.clone()))));
    }
    if known && hash_file(&temporary)? != hash_file(&paths.spool)? {
        disk::remove(&temporary)?;
        let hint = "give it the same input or none, or choose another --output";
        return Err(refuse(&paths.output, "was started with another standard input", hint));
    }
    disk::rename(&temporary, &paths.spool)?;
    Ok(Spooled::At(named))
}

fn copy(source: &mut dyn Read, to: &Path) -> Result<u64> {
    let mut copy = File::create(to).map_err(Error::io("create", to))?;
    let bytes = io::copy(source, &mut copy).map_err(Error::io("write", to))?;
    copy.sync_all().map_err(Error::io("sync", to))?;
    Ok(bytes)
}

fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 18];
    loop {
        match file.read(&mut chunk).map_err(Error::io("read", path))? {
            0 => return Ok(hex(&hasher.finalize())),
            length => hasher.update(&chunk[..length]),
        }
    }
}
