//! Operations one after the other: their lists on the way to the card, their launches, and the first failure.
//!
//! **Invariant:** one operation at a time has its turn. A list stays as it is until the stream has been waited for.

use std::sync::MutexGuard;

use cudarc::driver::result::{self, DriverError};

use super::Cuda;
use super::card::text;
use super::cublas::Product;
use super::kernels::Shape;
use crate::error::{Error, Result};
use crate::memory::arena::Region;

/// Lists begin on this boundary.
const ALIGNMENT: usize = 16;

/// What operations change.
pub struct State {
    /// Main memory that lists are copied from; the same place on the card is what they are copied to.
    lists: Region,
    used: usize,
    failure: Option<String>,
}

impl State {
    /// Nothing listed, nothing failed.
    pub fn new(lists: Region) -> State {
        State { lists, used: 0, failure: None }
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

    /// Makes room for lists of so many bytes.
    fn reserve(&mut self, bytes: usize) -> Result<(), String> {
        assert!(bytes <= self.capacity(), "lists of {bytes} bytes, there is room for {}", self.capacity());
        if self.state.used + bytes > self.capacity() {
            self.wait()?;
        }
        Ok(())
    }

    /// Waits for everything that was handed over; lists are used up.
    pub fn wait(&mut self) -> Result<(), String> {
        self.device.compute.wait().map_err(|error| doing("computing", error))?;
        self.state.used = 0;
        Ok(())
    }

    /// Puts lists on the card, behind everything that was handed over; gives their addresses there.
    pub fn upload<const N: usize>(&mut self, parts: [&[u8]; N]) -> Result<[u64; N], String> {
        self.reserve(list_bytes(&parts.map(<[u8]>::len)))?;
        let start = self.state.used;
        let addresses = parts.map(|part| {
            let at = self.state.used;
            self.state.lists.bytes_mut()[at..at + part.len()].copy_from_slice(part);
            self.state.used += part.len().next_multiple_of(ALIGNMENT);
            self.device.lists.at(at, part.len())
        });
        let end = self.state.used;
        if end > start {
            let to = self.device.lists.at(start, end - start);
            // SAFETY: the target is the lists' place on the card; the source lives as long as the device, and these
            // bytes of it do not change until the stream has been waited for.
            unsafe { result::memcpy_htod_async(to, &self.state.lists.bytes()[start..end], self.device.compute.raw()) }
                .map_err(|error| doing("handing over lists", error))?;
        }
        Ok(addresses)
    }

    /// Room on the card for answers of so many bytes each; together with lists of `beside` bytes, for which room stays.
    pub fn answers<const N: usize>(&mut self, parts: [usize; N], beside: usize) -> Result<[u64; N], String> {
        self.reserve(list_bytes(&parts) + beside)?;
        Ok(parts.map(|bytes| {
            let at = self.state.used;
            self.state.used += bytes.next_multiple_of(ALIGNMENT);
            self.device.lists.at(at, bytes)
        }))
    }

    /// Fetches answers that were computed; waits for them.
    pub fn fetch(&mut self, address: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let at = (address - self.device.lists.at(0, 0)) as usize;
        let from = self.device.lists.at(at, bytes);
        let stream = self.device.compute.raw();
        let to = &mut self.state.lists.bytes_mut()[at..at + bytes];
        // SAFETY: the source is the lists' place on the card; the target lives as long as the device, and is waited for
        // before it is read.
        unsafe { result::memcpy_dtoh_async(to, from, stream) }.map_err(|error| doing("fetching answers", error))?;
        self.device.compute.wait().map_err(|error| doing("computing", error))?;
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
        // so a kernel reaches the card's memory alone, never this process's.
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

    /// Waits for everything; tells the first failure.
    pub(super) fn finish(device: &'a Cuda) -> Result<()> {
        device.turn(|turn| turn.wait());
        match &device.state().failure {
            None => Ok(()),
            Some(what) => Err(Error::Device { what: what.clone() }),
        }
    }
}
