//! Operations one after the other: their lists on the way to the card, their launches, and the first failure.
//!
//! Lists are put into main memory that kernels see, and brought to the card by a kernel: a copy would wait for the
//! link's other copies, which are large.
//!
//! **Invariant:** one operation at a time has its turn. A list stays as it is until the stream has passed it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::MutexGuard;

use cudarc::driver::result::{self, DriverError};

use super::Cuda;
use super::card::text;
use super::cublas::Product;
use super::kernels::{Shape, words};
use super::streams::Mark;
use crate::error::{Error, Result};
use crate::memory::arena::Region;

/// Lists begin on this boundary.
const ALIGNMENT: usize = 16;
/// Threads of a block that brings lists.
const LIST_THREADS: usize = 64;

/// What operations change.
pub struct State {
    /// Main memory that lists come from, used in turn; the same place on the card is where they go.
    lists: Region,
    /// Its address, for kernels.
    mapped: u64,
    used: usize,
    /// Lists on their way, oldest first.
    flying: VecDeque<Flying>,
    failure: Option<String>,
}

/// A list that the stream may not have passed.
struct Flying {
    range: Range<usize>,
    /// The first mark behind it; none yet for the newest.
    mark: Option<Mark>,
}

impl State {
    /// Nothing listed, nothing failed. `mapped` is how kernels know `lists`.
    pub fn new(lists: Region, mapped: u64) -> State {
        State { lists, mapped, used: 0, flying: VecDeque::new(), failure: None }
    }
}

/// An operation's turn.
pub struct Turn<'a> {
    device: &'a Cuda,
    state: MutexGuard<'a, State>,
}

impl Cuda {
    /// The state; a thread that panicked while it had it left nothing half done that matters.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Does an operation, unless something has failed before.
    pub(super) fn turn(&self, operation: impl FnOnce(&mut Turn<'_>) -> Result<(), String>) {
        let mut turn = Turn { device: self, state: self.state() };
        if turn.state.failure.is_some() {
            return;
        }
        let bound = self.context.bind_to_thread().map_err(|error| doing("taking the context", error));
        if let Err(what) = bound.and_then(|()| operation(&mut turn)) {
            turn.state.failure = Some(what);
        }
    }
}

fn doing(what: &str, error: DriverError) -> String {
    format!("{what}: {}", text(error))
}

/// Bytes that lists take, gaps included.
pub fn list_bytes(parts: &[usize]) -> usize {
    parts.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum()
}

impl<'a> Turn<'a> {
    /// The device.
    pub fn device(&self) -> &'a Cuda {
        self.device
    }

    /// Bytes that lists of one operation may take.
    pub fn capacity(&self) -> usize {
        self.state.lists.len()
    }

    /// Takes room for lists of so many bytes, one after the other; waits for lists of before that lie there. Gives
    /// where it begins.
    fn take(&mut self, bytes: usize) -> Result<usize, String> {
        assert!(bytes <= self.capacity(), "lists of {bytes} bytes, there is room for {}", self.capacity());
        if self.state.used + bytes > self.capacity() {
            self.state.used = 0;
        }
        let range = self.state.used..self.state.used + bytes;
        let overlaps = |flying: &Flying| flying.range.start < range.end && range.start < flying.range.end;
        if let Some(last) = self.state.flying.iter().rposition(overlaps) {
            match &self.state.flying[last].mark {
                Some(mark) => mark.wait(),
                None => self.device.compute.wait(),
            }
            .map_err(|error| doing("computing", error))?;
            self.state.flying.drain(..=last);
        }
        self.state.used = range.end;
        self.state.flying.push_back(Flying { range: range.clone(), mark: None });
        Ok(range.start)
    }

    /// Puts lists on the card, behind everything that was handed over; gives their addresses there.
    pub fn upload<const N: usize>(&mut self, parts: [&[u8]; N]) -> Result<[u64; N], String> {
        self.exchange(parts, []).map(|(addresses, [])| addresses)
    }

    /// As [`Turn::upload`], with room on the card for answers of so many bytes each, one after the other.
    pub fn exchange<const N: usize, const M: usize>(
        &mut self,
        parts: [&[u8]; N],
        answers: [usize; M],
    ) -> Result<([u64; N], [u64; M]), String> {
        let listed = list_bytes(&parts.map(<[u8]>::len));
        let start = self.take(listed + list_bytes(&answers))?;
        let device = self.device;
        let mut at = start;
        let mut place = |bytes: usize| {
            let place = at;
            at += bytes.next_multiple_of(ALIGNMENT);
            place
        };
        let parts = parts.map(|part| {
            let at = place(part.len());
            self.state.lists.bytes_mut()[at..at + part.len()].copy_from_slice(part);
            device.lists.at(at, part.len())
        });
        let answers = answers.map(|bytes| device.lists.at(place(bytes), bytes));
        self.bring(self.state.mapped + start as u64, device.lists.at(start, listed), listed)?;
        Ok((parts, answers))
    }

    /// Copies lists by a kernel.
    fn bring(&self, from: u64, to: u64, bytes: usize) -> Result<(), String> {
        let count = bytes.div_ceil(ALIGNMENT);
        let grid = (count.div_ceil(LIST_THREADS), 1);
        self.launch("copy_lists", grid, LIST_THREADS as u32, 0, &mut words![from, to, count])
    }

    /// Fetches answers that were computed; waits for them.
    pub fn fetch(&mut self, address: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let at = (address - self.device.lists.at(0, 0)) as usize;
        self.bring(self.device.lists.at(at, bytes), self.state.mapped + at as u64, bytes)?;
        self.device.compute.wait().map_err(|error| doing("computing", error))?;
        self.state.flying.clear();
        Ok(self.state.lists.bytes()[at..at + bytes].to_vec())
    }

    /// Launches a kernel.
    pub fn launch(
        &self,
        name: &str,
        grid: (usize, usize),
        block: u32,
        shared: u32,
        arguments: &mut [u64],
    ) -> Result<(), String> {
        let shape = Shape { grid, block, shared };
        // SAFETY: the context was bound when the turn began. All addresses that operations pass are of buffers on the
        // card, as long as the kernel's contract says (`DeviceBuffer::at` asserts it), and live until the device goes;
        // so a kernel reaches the card's memory alone, never this process's, but for the lists, which nobody touches
        // before the stream has passed them.
        unsafe { self.device.kernels.launch(name, shape, self.device.compute.raw(), arguments) }
            .map_err(|error| doing(name, error))
    }

    /// Multiplies.
    pub fn multiply(&self, product: &Product) -> Result<(), String> {
        // SAFETY: as in `launch`.
        unsafe { self.device.products.multiply(product) }
    }

    /// Copies bytes on the card.
    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: as in `launch`; frames do not overlap.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.device.compute.raw()) }
            .map_err(|error| doing("copying on the card", error))
    }

    /// Notes a mark behind all operations so far; tells the first failure.
    pub(super) fn marked(device: &'a Cuda, mark: &Mark) -> Result<()> {
        let mut state = device.state();
        for flying in state.flying.iter_mut().rev().take_while(|flying| flying.mark.is_none()) {
            flying.mark = Some(mark.clone());
        }
        told(&state)
    }

    /// Waits for everything; tells the first failure.
    pub(super) fn finish(device: &'a Cuda) -> Result<()> {
        device.turn(|turn| {
            let queues = [&device.compute, &device.h2d, &device.d2h];
            let waited = queues.iter().try_for_each(|queue| queue.wait());
            turn.state.flying.clear();
            waited.map_err(|error| doing("computing", error))
        });
        told(&device.state())
    }
}

fn told(state: &State) -> Result<()> {
    match &state.failure {
        None => Ok(()),
        Some(what) => Err(Error::Device { what: what.clone() }),
    }
}
