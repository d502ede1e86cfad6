//! What the card itself can do, whatever our kernels reach: the ceilings that bounds are made from.
//!
//! **Invariant:** nothing of ours is measured: one product of cuBLAS, one copy of the driver.

use std::time::Instant;

use super::Cuda;
use super::cublas::{Element, Product};
use super::memory::DeviceBuffer;
use crate::device::Device;
use crate::error::Result;

/// Repetitions of what is timed.
const TIMES: usize = 10;

/// A product that takes so long tells what there is to be told.
const LONG_SECS: f64 = 1e-3;
/// Width of the first squares.
const NARROW: usize = 64;

/// Ceilings of a card.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// FLOP/s of products of 16-bit elements.
    pub flops: f64,
    /// Bytes/s of its memory.
    pub memory_bytes_per_s: f64,
}

/// Bytes of the device's memory that measuring takes, for square products of width `n`.
pub fn bytes(n: usize) -> usize {
    4096 + 8 * n * n
}

impl Cuda {
    /// Measures the ceilings with products of squares, wider and wider until one takes long or they are `most` wide.
    ///
    /// # Errors
    /// When the device fails.
    pub fn ceilings(&mut self, most: usize) -> Result<Ceilings> {
        let room = self.allocate(bytes(most));
        let mut n = NARROW.min(most);
        while 2 * n <= most && self.timed(1, |device| device.multiply(&room, n))? < LONG_SECS {
            n *= 2;
        }
        let square = 2 * n * n;
        let multiply_secs = self.timed(TIMES, |device| device.multiply(&room, n))?;
        let (from, to) = (room.at(0, 2 * square), room.at(2 * square, 2 * square));
        let copy_secs = self.timed(TIMES, |device| device.turn(|turn| turn.copy(from, to, 2 * square)))?;
        Ok(Ceilings {
            flops: 2.0 * (n as f64).powi(3) / multiply_secs,
            // A copy reads and writes.
            memory_bytes_per_s: 4.0 * square as f64 / copy_secs,
        })
    }

    /// A product of squares of width `n` within `room`.
    fn multiply(&self, room: &DeviceBuffer, n: usize) {
        let square = 2 * n * n;
        let product = Product {
            element: Element::F16,
            rows: n,
            inputs: n,
            outputs: n,
            x: room.at(0, square),
            w: room.at(square, square),
            y: room.at(2 * square, 2 * square),
            stride: n,
            beta: 0.0,
        };
        self.turn(|turn| turn.multiply(&product));
    }

    /// Seconds that something takes, once it has been done before.
    fn timed(&self, times: usize, work: impl Fn(&Cuda)) -> Result<f64> {
        work(self);
        self.finish()?;
        let began = Instant::now();
        (0..times).for_each(|_| work(self));
        self.finish()?;
        Ok(began.elapsed().as_secs_f64().max(1e-9) / times as f64)
    }
}
