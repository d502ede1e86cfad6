//! Measures a graphics card, and the link to it.
//!
//! **Invariant:** kernels and copies are those that a pass runs; ceilings are measured without our kernels.

use std::path::Path;
use std::time::{Duration, Instant};

use super::kernels::{Bench, Shape};
use super::measure::median;
use crate::device::cuda::card::Card;
use crate::device::cuda::workspace::Workspace;
use crate::device::cuda::{Cuda, Needs, raw};
use crate::device::{Device, Stream};
use crate::error::{Result, Tier};
use crate::hardware::{Gpu, Hardware, Links};
use crate::memory::arena::{Arena, Region};

/// Bytes of a copy that tells the link's rate.
const COPY_BYTES: usize = 32 << 20;
/// Bytes of a copy that tells what a step takes.
const SHORT_BYTES: usize = 4096;
/// How often a copy is timed.
const COPIES: usize = 12;
/// Rows of products, at most.
const ROWS: usize = 2048;
/// Width of the squares of the ceiling's product.
const SQUARE: usize = 4096;

/// How a card is measured.
#[derive(Clone, Copy, Debug)]
pub struct CardOptions<'a> {
    /// Fewer repetitions and rows.
    pub quick: bool,
    /// Device memory that may be used.
    pub memory_bytes: u64,
    /// Where compiled kernels are kept.
    pub cache: &'a Path,
}

/// Shapes, the widest first.
fn shapes(options: &CardOptions<'_>) -> [Shape; 5] {
    let rows = if options.quick { 256 } else { ROWS };
    [Shape::wide(rows), Shape::new(0, rows), Shape::new(1, rows), Shape::new(2, 256), Shape::least()]
}

/// The widest of the shapes up to `most` whose products a card that reaches a tenth of `flops` computes within
/// `budget`.
fn in_time(options: &CardOptions<'_>, most: Shape, flops: f64, budget: Duration) -> Shape {
    let all = shapes(options);
    let secs = |shape: &Shape| 10.0 * shape.product_flops() / flops;
    let narrower = all.iter().skip_while(|&&shape| shape != most);
    let mut fast = narrower.filter(|shape| secs(shape) <= budget.as_secs_f64());
    *fast.next().unwrap_or(&all[all.len() - 1])
}

/// What is measured on: as wide as there is memory for.
#[derive(Clone, Copy)]
struct Sizes {
    shape: Shape,
    square: usize,
}

impl Sizes {
    fn fitting(options: &CardOptions<'_>) -> Sizes {
        let sizes = shapes(options).map(|shape| Sizes { shape, square: SQUARE.min(2 * shape.width()) });
        let fits = |sizes: &&Sizes| sizes.bytes() as u64 <= options.memory_bytes;
        *sizes.iter().find(fits).unwrap_or(&sizes[sizes.len() - 1])
    }

    fn workspace(&self) -> Workspace {
        Workspace::of(self.shape.wide_heads(), self.shape.vocab_size(), self.shape.product_bytes())
    }

    /// Bytes of the device's memory.
    fn bytes(&self) -> usize {
        let workspace = self.workspace();
        let lists = workspace.lists + self.shape.rows() * workspace.lists_row + 4096;
        workspace.bytes() + lists + self.shape.bytes() + raw::bytes(self.square) + 2 * COPY_BYTES
    }
}

/// Measures the first card; gives `machine` with it and the link to it.
///
/// # Errors
/// When there is no card that can be used, or it fails.
pub fn with_card(machine: &Hardware, options: &CardOptions<'_>) -> Result<Hardware> {
    let card = Card::open().map_err(crate::device::cuda::card::Problem::into_error)?;
    let facts = card.facts.clone();
    let sizes = Sizes::fitting(options);
    let workspace = sizes.workspace();
    let lists = workspace.lists + sizes.shape.rows() * workspace.lists_row + 4096;
    let mut host = Arena::new("calibration", Tier::Cpu, 2 * COPY_BYTES + lists + (1 << 20))?;
    let needs = Needs {
        workspace,
        rows: sizes.shape.rows(),
        device_bytes: sizes.bytes(),
        cache: options.cache,
        compiling: &|| {},
    };
    let mut device = Cuda::new(card, &needs, &mut host)?;
    let (mut out, mut back) = (host.carve(COPY_BYTES), host.carve(COPY_BYTES));
    let ceilings = device.ceilings(sizes.square)?;
    let links = links(&mut device, &mut out, &mut back)?;
    let budget = Duration::from_secs_f64(if options.quick { 2.0 } else { 8.0 });
    let shape = in_time(options, sizes.shape, ceilings.flops, budget);
    let mut bench = Bench::on_card(device, shape)?;
    let kernels = bench.measure(budget, links.step_secs)?;
    let mut hardware = machine.clone();
    let (name, memory_bytes) = (facts.name, facts.memory_bytes);
    hardware.gpu = Some(Gpu { name, memory_bytes, rehearsed: false, kernels });
    hardware.links = Some(links);
    hardware.raw.gpu_flops = Some(ceilings.flops);
    hardware.raw.gpu_memory_bytes_per_s = Some(ceilings.memory_bytes_per_s);
    hardware.raw.h2d_bytes_per_s = Some(links.h2d_bytes_per_s);
    hardware.raw.d2h_bytes_per_s = Some(links.d2h_bytes_per_s);
    Ok(super::rounded(&hardware))
}

/// Copies in both directions, alone and together.
fn links(device: &mut Cuda, out: &mut Region, back: &mut Region) -> Result<Links> {
    let (mut to, from) = (device.allocate(COPY_BYTES), device.allocate(COPY_BYTES));
    let device = &*device;
    let bytes = COPY_BYTES as f64;
    let timed = |copy: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        let mut samples = Vec::with_capacity(COPIES);
        for _ in 0..COPIES {
            let began = Instant::now();
            copy()?;
            samples.push(began.elapsed().as_secs_f64().max(1e-9));
        }
        Ok(median(&samples).expect("it was timed"))
    };
    let mut copy_in = |bytes: &[u8]| {
        device.copy_in(&[(bytes, 0)], &mut to)?;
        device.wait(&device.mark(Stream::In)?)
    };
    let mut copy_out = || {
        device.copy_out(&from, &mut [(0, back.bytes_mut())])?;
        device.wait(&device.mark(Stream::Out)?)
    };
    let h2d = timed(&mut || copy_in(out.bytes()))?;
    let d2h = timed(&mut copy_out)?;
    let short = timed(&mut || copy_in(&out.bytes()[..SHORT_BYTES]))?;
    let both: (Result<f64>, Result<f64>) = std::thread::scope(|scope| {
        let other = scope.spawn(|| timed(&mut copy_out));
        let this = timed(&mut || copy_in(out.bytes()));
        (this, other.join().expect("copies do not panic"))
    });
    Ok(Links {
        h2d_bytes_per_s: bytes / h2d,
        d2h_bytes_per_s: bytes / d2h,
        h2d_together_bytes_per_s: (bytes / both.0?).min(bytes / h2d),
        d2h_together_bytes_per_s: (bytes / both.1?).min(bytes / d2h),
        step_secs: short,
    })
}
