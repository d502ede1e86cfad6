//! A worker's job: lines from standard input answered on standard output as they finish, for as long as there are any.
//!
//! **Invariant:** waiting for input never keeps the process from ending: reading stops when a signal came or when
//! nobody takes answers any more.

use std::collections::BTreeMap;
use std::io::{self, Read, Stdin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ids::{Ids, InFlight};
use super::open::Job;
use super::options::{JobOptions, Shard};
use super::reader::{Reader, Reading};
use super::render::Names;
use super::runs::Runs;
use super::state::now_secs;
use super::writer::Writer;

/// How long a wait for input may last before it is looked at whether to go on.
const WAIT_NANOS: i64 = 100_000_000;

/// The job of a worker; input and output of `options` are not looked at. It ends with its input, or when `signal`
/// becomes non-zero.
pub fn worker(options: &JobOptions, signal: Arc<AtomicUsize>) -> Job {
    let lines = InFlight::default();
    let hung_up = Arc::new(AtomicBool::new(false));
    let source = Input { input: io::stdin(), signal, hung_up: hung_up.clone() };
    let reading = Reading {
        path: "standard input".into(),
        shard: Shard::WHOLE,
        defaults: options.defaults.clone(),
        limits: options.limits,
        done: Runs::default(),
        partial: BTreeMap::new(),
        sha256: None,
        ids: Ids::InFlight(lines.clone()),
        control: true,
    };
    let names = Names::new(&options.fingerprint, &options.model_name);
    Job {
        reader: Reader::new(Box::new(source), reading),
        writer: Writer::to_client(names, Box::new(io::stdout()), lines, hung_up),
        total: None,
        resumed: 0,
        started_secs: now_secs(),
    }
}

/// Standard input, which ends early when there is no use in reading on.
struct Input {
    input: Stdin,
    signal: Arc<AtomicUsize>,
    hung_up: Arc<AtomicBool>,
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wait = Timespec { tv_sec: 0, tv_nsec: WAIT_NANOS };
        loop {
            if self.signal.load(Ordering::Relaxed) != 0 {
                // The end of the input would be a reason to finish with success.
                return Err(io::Error::other("stopped by a signal"));
            }
            if self.hung_up.load(Ordering::Relaxed) {
                return Ok(0);
            }
            let ready = match poll(&mut [PollFd::new(&self.input, PollFlags::IN)], Some(&wait)) {
                Err(rustix::io::Errno::INTR) => 0,
                ready => ready?,
            };
            if ready > 0 {
                return self.input.read(buffer);
            }
        }
    }
}
