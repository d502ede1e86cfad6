//! Pieces through threads that call pread and pwrite.
//!
//! **Invariant:** every started piece is answered exactly once; the threads end with the pool.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{Backend, Completion, Direction, Piece};

/// More threads than this gain nothing: each keeps a whole piece at the device.
const MAX_THREADS: usize = 16;

pub(super) struct Pool {
    work: Arc<Work>,
    done: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Work {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(usize, Piece)>,
    closed: bool,
}

// SAFETY: the pointer is used by the one thread that takes the piece, while the starter keeps the memory valid.
unsafe impl Send for Piece {}

impl Pool {
    pub(super) fn new(depth: usize) -> io::Result<Pool> {
        let (sender, done) = channel();
        let mut pool = Pool { work: Arc::default(), done, threads: Vec::new() };
        for number in 0..depth.min(MAX_THREADS) {
            let (work, sender) = (pool.work.clone(), sender.clone());
            let thread = std::thread::Builder::new().name(format!("disk-{number}"));
            pool.threads.push(thread.spawn(move || work.serve(&sender))?);
        }
        Ok(pool)
    }
}

impl Work {
    fn serve(&self, done: &Sender<Completion>) {
        while let Some((token, piece)) = self.take() {
            if done.send((token, perform(&piece))).is_err() {
                return;
            }
        }
    }

    fn take(&self) -> Option<(usize, Piece)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(work) = queue.waiting.pop_front() {
                return Some(work);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn perform(piece: &Piece) -> io::Result<usize> {
    // SAFETY: the starter keeps the file open until this piece is answered.
    let fd = unsafe { BorrowedFd::borrow_raw(piece.fd) };
    let moved = match piece.direction {
        Direction::Read => {
            // SAFETY: the starter keeps the memory valid, and accesses it no more, until this piece is answered.
            let buffer = unsafe { std::slice::from_raw_parts_mut(piece.start, piece.len) };
            rustix::io::pread(fd, buffer, piece.offset)
        }
        Direction::Write => {
            // SAFETY: the starter keeps the memory valid and unchanged until this piece is answered.
            let buffer = unsafe { std::slice::from_raw_parts(piece.start, piece.len) };
            rustix::io::pwrite(fd, buffer, piece.offset)
        }
    };
    Ok(moved?)
}

impl Backend for Pool {
    unsafe fn start(&mut self, token: usize, piece: Piece) {
        let mut queue = self.work.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.waiting.push_back((token, piece));
        self.work.changed.notify_one();
    }

    fn wait(&mut self, done: &mut Vec<Completion>) {
        // Threads end only when the pool is dropped.
        done.push(self.done.recv().expect("the threads are there"));
        done.extend(self.done.try_iter());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.work.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.work.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
