//! Faults on demand: short transfers and errors in the middle of a request, for tests.
//!
//! **Invariant:** a piece that passes is done by the real backend; one that fails never reaches it.

use std::io;

use super::{Backend, Completion, Direction, Piece};

/// What becomes of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens to it.
    None,
    /// No more than so many bytes are moved.
    Short(usize),
    /// The system answers with this error number.
    Error(i32),
}

/// Decides by direction, offset in the file and length.
pub type Plan = Box<dyn FnMut(Direction, u64, usize) -> Fault + Send>;

pub(super) struct Faulty {
    inner: Box<dyn Backend>,
    plan: Plan,
    failed: Vec<Completion>,
}

impl Faulty {
    pub(super) fn new(inner: Box<dyn Backend>, plan: Plan) -> Faulty {
        Faulty { inner, plan, failed: Vec::new() }
    }
}

impl Backend for Faulty {
    unsafe fn start(&mut self, token: usize, mut piece: Piece) {
        match (self.plan)(piece.direction, piece.offset, piece.len) {
            Fault::None => {}
            Fault::Short(0) => return self.failed.push((token, Ok(0))),
            Fault::Short(len) => piece.len = piece.len.min(len),
            Fault::Error(number) => {
                return self.failed.push((token, Err(io::Error::from_raw_os_error(number))));
            }
        }
        // SAFETY: the caller's promise for the whole piece holds for its first part.
        unsafe { self.inner.start(token, piece) };
    }

    fn wait(&mut self, done: &mut Vec<Completion>) {
        if self.failed.is_empty() {
            self.inner.wait(done);
        } else {
            done.append(&mut self.failed);
        }
    }
}
