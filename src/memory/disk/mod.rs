//! Files read and written past the page cache, many pieces in flight.
//!
//! A request is cut into pieces of [`PIECE_BYTES`]; up to `depth` of them are with the kernel at a time, through
//! io_uring or, where that is refused, a pool of threads.
//!
//! **Invariant:** no operation outlives the call that started it: buffers are borrowed for the call alone.
#![allow(unsafe_code)]

pub mod faults;
mod file;
mod pool;
mod probe;
mod ring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

pub use file::{DirectFile, free_space};
pub use probe::{DiskSupport, probe, raw_read_rate};

use crate::error::{Error, Result};
use faults::{Faulty, Plan};
use pool::Pool;
use ring::Ring;

/// Offsets, lengths and addresses of direct transfers are multiples of this.
pub const ALIGNMENT: usize = 4096;

/// Bytes of a piece. Smaller ones cost more calls, larger ones keep fewer commands at the device.
pub const PIECE_BYTES: usize = 1 << 20;

/// Pieces in flight that keep an NVMe drive busy.
pub const DEPTH: usize = 8;

/// How pieces reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// io_uring where it works, else threads.
    Auto,
    /// io_uring.
    IoUring,
    /// A pool of threads that call pread and pwrite.
    Threads,
}

/// Bytes to be read.
pub struct Read<'a> {
    /// Where from.
    pub file: &'a DirectFile,
    /// The first byte's place in the file.
    pub offset: u64,
    /// Where to; filled entirely.
    pub buffer: &'a mut [u8],
}

/// Bytes to be written.
pub struct Write<'a> {
    /// Where to.
    pub file: &'a DirectFile,
    /// The first byte's place in the file.
    pub offset: u64,
    /// What; written entirely.
    pub buffer: &'a [u8],
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// One operation for the kernel.
struct Piece {
    direction: Direction,
    fd: RawFd,
    offset: u64,
    start: *mut u8,
    len: usize,
}

/// A piece's token and what became of it.
type Completion = (usize, io::Result<usize>);

/// Takes pieces to the kernel and back.
trait Backend: Send {
    /// Starts a piece, at the latest with the next [`Backend::wait`].
    ///
    /// # Safety
    /// Until `wait` has given `token` back, the file stays open and the piece's memory valid; memory that is read
    /// into is accessed by nobody else, memory that is written from is not changed.
    unsafe fn start(&mut self, token: usize, piece: Piece);

    /// Appends at least one completion to `done`; at least one piece must be in flight.
    fn wait(&mut self, done: &mut Vec<Completion>);
}

/// Reads and writes for one thread.
pub struct DiskQueue {
    backend: Box<dyn Backend>,
    how: How,
    depth: usize,
    piece_bytes: usize,
}

/// A request, read or written.
struct Span<'a> {
    file: &'a DirectFile,
    offset: u64,
    start: *mut u8,
    len: usize,
}

/// A piece of a span and how far it is.
#[derive(Clone, Copy)]
struct Transfer<'a> {
    span: &'a Span<'a>,
    from: usize,
    to: usize,
}

/// What follows from a completion.
enum Next<'a> {
    Done,
    Again(Transfer<'a>),
    Failed(Failure),
}

/// The end of a request.
struct Failure {
    /// Place among all bytes of the call; the lowest one is reported.
    offset: u64,
    error: Error,
}

impl DiskQueue {
    /// A queue of up to `depth` pieces in flight.
    ///
    /// # Errors
    /// `Error::Io` when `how` is not to be had here; [`How::Auto`] falls back to threads first.
    pub fn new(depth: usize, how: How) -> Result<DiskQueue> {
        let depth = depth.clamp(1, 1024);
        let ring = || Ring::new(depth).map(|ring| Box::new(ring) as Box<dyn Backend>);
        let threads = || Pool::new(depth).map(|pool| Box::new(pool) as Box<dyn Backend>);
        let (backend, how) = match how {
            How::IoUring => (ring(), How::IoUring),
            How::Threads => (threads(), How::Threads),
            How::Auto => match ring() {
                Ok(ring) => (Ok(ring), How::IoUring),
                Err(_) => (threads(), How::Threads),
            },
        };
        let backend = backend.map_err(Error::io("set up", "disk queue"))?;
        Ok(DiskQueue { backend, how, depth, piece_bytes: PIECE_BYTES })
    }

    /// The same queue with pieces of another size, a multiple of [`ALIGNMENT`].
    pub fn with_piece_bytes(mut self, bytes: usize) -> DiskQueue {
        assert!(bytes > 0 && bytes.is_multiple_of(ALIGNMENT), "pieces of {bytes} bytes");
        self.piece_bytes = bytes;
        self
    }

    /// The same queue with faults as `plan` says; for tests.
    pub fn with_faults(self, plan: Plan) -> DiskQueue {
        DiskQueue { backend: Box::new(Faulty::new(self.backend, plan)), ..self }
    }

    /// How pieces reach the kernel; never [`How::Auto`].
    pub fn how(&self) -> How {
        self.how
    }

    /// Fills every buffer.
    ///
    /// # Errors
    /// [`Error::IoAt`] with file and offset when the system refuses, or the file ends too early. The buffers then
    /// hold unspecified bytes.
    ///
    /// # Panics
    /// If a transfer from a direct file is not aligned to [`ALIGNMENT`].
    pub fn read(&mut self, requests: &mut [Read<'_>]) -> Result<()> {
        let spans: Vec<Span<'_>> = requests
            .iter_mut()
            .map(|request| Span {
                file: request.file,
                offset: request.offset,
                start: request.buffer.as_mut_ptr(),
                len: request.buffer.len(),
            })
            .collect();
        // SAFETY: the spans are the buffers that `requests` borrows mutably, and thus disjoint.
        unsafe { self.transfer(Direction::Read, &spans) }
    }

    /// Writes every buffer.
    ///
    /// # Errors
    /// [`Error::IoAt`] with file and offset when the system refuses; how much was written is unspecified.
    ///
    /// # Panics
    /// If a transfer to a direct file is not aligned to [`ALIGNMENT`].
    pub fn write(&mut self, requests: &[Write<'_>]) -> Result<()> {
        let spans: Vec<Span<'_>> = requests
            .iter()
            .map(|request| Span {
                file: request.file,
                offset: request.offset,
                start: request.buffer.as_ptr().cast_mut(),
                len: request.buffer.len(),
            })
            .collect();
        // SAFETY: the spans are the buffers that `requests` borrows; a write only reads them.
        unsafe { self.transfer(Direction::Write, &spans) }
    }

    /// # Safety
    /// The spans' memory is valid for the call: exclusively when reading, shared when writing.
    unsafe fn transfer(&mut self, direction: Direction, spans: &[Span<'_>]) -> Result<()> {
        spans.iter().for_each(Span::check);
        let piece_bytes = self.piece_bytes;
        let mut pieces = spans.iter().flat_map(|span| {
            let starts = (0..span.len).step_by(piece_bytes);
            starts.map(move |from| Transfer { span, from, to: span.len.min(from + piece_bytes) })
        });
        let mut flight = Flight::new(self.backend.as_mut(), direction, self.depth);
        let mut failure: Option<Failure> = None;
        loop {
            while failure.is_none() && !flight.is_full() {
                let Some(piece) = pieces.next() else { break };
                // SAFETY: the caller's promise covers the span that the piece lies in, and no two pieces overlap.
                unsafe { flight.start(piece) };
            }
            if flight.is_empty() {
                return failure.map_or(Ok(()), |failure| Err(failure.error));
            }
            for (transfer, result) in flight.wait() {
                match transfer.after(direction, result) {
                    Next::Done => {}
                    // SAFETY: as above; the piece's earlier operation has completed.
                    Next::Again(rest) => unsafe { flight.start(rest) },
                    Next::Failed(new) => {
                        // Completions come in any order; the first bad place is the one to name.
                        if failure.as_ref().is_none_or(|old| new.offset < old.offset) {
                            failure = Some(new);
                        }
                    }
                }
            }
        }
    }
}

impl Span<'_> {
    fn check(&self) {
        let places = [self.offset, self.start as u64, self.len as u64];
        let aligned = places.iter().all(|place| place.is_multiple_of(ALIGNMENT as u64));
        assert!(
            aligned || self.len == 0 || !self.file.is_direct(),
            "direct transfer of {} bytes at {}",
            self.len,
            self.offset
        );
    }
}

impl<'a> Transfer<'a> {
    fn piece(&self, direction: Direction) -> Piece {
        Piece {
            direction,
            fd: self.span.file.file().as_raw_fd(),
            offset: self.span.offset + self.from as u64,
            // In bounds: `from` is less than the span's length.
            start: self.span.start.wrapping_add(self.from),
            len: self.to - self.from,
        }
    }

    fn after(self, direction: Direction, result: io::Result<usize>) -> Next<'a> {
        let moved = match result {
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return Next::Again(self);
            }
            Err(error) => return Next::Failed(self.failure(direction, error)),
            Ok(moved) => moved,
        };
        if moved == self.to - self.from {
            return Next::Done;
        }
        // A direct transfer goes on at a block's start; less than a block is what a file's end gives.
        let kept = if self.span.file.is_direct() { moved - moved % ALIGNMENT } else { moved };
        if kept > 0 {
            return Next::Again(Transfer { from: self.from + kept, ..self });
        }
        let error = match direction {
            Direction::Read => {
                let what = format!("the file ends after {} of {} bytes", self.from + moved, self.span.len);
                io::Error::new(io::ErrorKind::UnexpectedEof, what)
            }
            Direction::Write => io::ErrorKind::WriteZero.into(),
        };
        Next::Failed(self.failure(direction, error))
    }

    fn failure(&self, direction: Direction, source: io::Error) -> Failure {
        let ended = source.kind() == io::ErrorKind::UnexpectedEof;
        let offset = self.span.offset + self.from as u64;
        let action = match direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        let error = Error::IoAt {
            action,
            path: self.span.file.path().to_owned(),
            // What a file lacks is told of the whole request.
            offset: if ended { self.span.offset } else { offset },
            source,
        };
        Failure { offset, error }
    }
}

/// The pieces in flight. Dropping it with some left ends the process: their memory cannot be given back.
struct Flight<'a> {
    backend: &'a mut dyn Backend,
    direction: Direction,
    slots: Vec<Option<Transfer<'a>>>,
    free: Vec<usize>,
    done: Vec<Completion>,
}

impl<'a> Flight<'a> {
    fn new(backend: &'a mut dyn Backend, direction: Direction, depth: usize) -> Flight<'a> {
        let slots = (0..depth).map(|_| None).collect();
        Flight { backend, direction, slots, free: (0..depth).collect(), done: Vec::with_capacity(depth) }
    }

    fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// # Safety
    /// The piece's memory is valid until the flight is empty, and no other piece in flight overlaps it.
    unsafe fn start(&mut self, transfer: Transfer<'a>) {
        let slot = self.free.pop().expect("a free slot");
        self.slots[slot] = Some(transfer);
        // SAFETY: the caller's promise; the file is borrowed by the span for longer than the flight.
        unsafe { self.backend.start(slot, transfer.piece(self.direction)) };
    }

    /// At least one piece and what became of it.
    fn wait(&mut self) -> Vec<(Transfer<'a>, io::Result<usize>)> {
        self.backend.wait(&mut self.done);
        let (slots, free) = (&mut self.slots, &mut self.free);
        let finish = |(slot, result): Completion| {
            let transfer = slots[slot].take().expect("a slot in flight");
            free.push(slot);
            (transfer, result)
        };
        self.done.drain(..).map(finish).collect()
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if !self.is_empty() {
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests;
