//! Pieces through io_uring.
//!
//! **Invariant:** the ring holds as many entries as the queue has pieces in flight, so that pushing never fails and
//! no completion is lost.

use std::io;

use io_uring::{IoUring, Probe, opcode, types};

use super::{Backend, Completion, Direction, Piece};

pub(super) struct Ring {
    ring: IoUring,
}

impl Ring {
    /// A ring that is known to read and write.
    pub(super) fn new(depth: usize) -> io::Result<Ring> {
        let ring = IoUring::new(depth.next_power_of_two() as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring without plain reads and writes"));
        }
        Ok(Ring { ring })
    }
}

impl Backend for Ring {
    unsafe fn start(&mut self, token: usize, piece: Piece) {
        let (fd, len) = (types::Fd(piece.fd), piece.len as u32);
        let entry = match piece.direction {
            Direction::Read => opcode::Read::new(fd, piece.start, len).offset(piece.offset).build(),
            Direction::Write => opcode::Write::new(fd, piece.start, len).offset(piece.offset).build(),
        };
        // SAFETY: the caller keeps file and memory valid until the completion has been given back.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(token as u64)) };
        // The kernel consumes all entries with each wait; were it not so, this would be a bug here.
        assert!(pushed.is_ok(), "more pieces than entries");
    }

    fn wait(&mut self, done: &mut Vec<Completion>) {
        loop {
            let submitted = self.ring.submit_and_wait(1);
            let before = done.len();
            done.extend(self.ring.completion().map(|entry| {
                let result = entry.result();
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) };
                (entry.user_data() as usize, result)
            }));
            if done.len() > before {
                return;
            }
            match submitted {
                Err(error) if !is_passing(&error) => {
                    // Without the ring nobody can tell when the kernel is done with the buffers.
                    std::process::abort();
                }
                Err(_) => std::thread::yield_now(),
                Ok(_) => {}
            }
        }
    }
}

/// Whether a refused call succeeds when repeated: a signal, or the kernel short of memory or completion space.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, ResourceBusy, WouldBlock};
    matches!(error.kind(), Interrupted | OutOfMemory | ResourceBusy | WouldBlock)
}
