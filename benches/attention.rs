//! Attention beside its limit, measured in the same run: reading memory, or computing.
//!
//! `cargo bench --bench attention` prints, for pages of every dtype, the share of the limit that single queries with
//! 1024 keys reach (32 query heads on 4 key heads, and on 32), and that a prompt of 512 reaches, also where every key
//! adds up what it receives; and how many times as fast single queries of 64 sequences are whose pages but the last are
//! the same. The limit is what reading the pages once would take, or widening their elements to f32
//! once and then 4 * head_dim operations per query head and key, whichever is longer. Exponentials are not part of it.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::{Duration, Instant};

use tidemill::device::host::isa::Isa;
use tidemill::device::host::{Host, raw_fma_gflops, raw_widen_rate};
use tidemill::device::{AttentionSpan, Device as _, Frames, Heads, KvViewMut};
use tidemill::error::Tier;
use tidemill::kv::layout::{KvLayout, PAGE_POSITIONS, pages_for};
use tidemill::kv::pages::Segment;
use tidemill::kv::policy::{Kept, Spread};
use tidemill::memory::arena::Arena;
use tidemill::model::dtype::DType;

const HEAD_DIM: usize = 64;
const NUM_HEADS: usize = 32;
const CONTEXT: usize = 1024;
const SEQUENCES: usize = 64;
const PROMPT: usize = 512;
/// Bytes that are read to see how fast memory is: more than the caches of a core hold.
const READ_BYTES: usize = 256 << 20;
const SAMPLE: Duration = Duration::from_millis(60);

/// The least seconds of a repetition.
fn best(mut work: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..5 {
        let began = Instant::now();
        while began.elapsed() < SAMPLE {
            let started = Instant::now();
            work();
            best = best.min(started.elapsed().as_secs_f64());
        }
    }
    best
}

/// Bytes/s that all threads read.
fn read_rate() -> f64 {
    let array = vec![1u64; READ_BYTES / 8];
    let secs = best(|| {
        let sums = rayon::broadcast(|thread| {
            let part = array.chunks(array.len().div_ceil(thread.num_threads())).nth(thread.index());
            part.unwrap_or_default().iter().fold(0u64, |sum, word| sum.wrapping_add(*word))
        });
        std::hint::black_box(sums);
    });
    READ_BYTES as f64 / secs
}

/// The machine's limits: bytes and operations per second, and elements of a dtype that it widens.
struct Limits {
    bytes: f64,
    flops: f64,
    widened: [f64; DType::ALL.len()],
}

/// What some attention takes at least.
struct Demand {
    bytes: f64,
    flops: f64,
    elements: f64,
    dtype: DType,
}

impl Limits {
    fn measure() -> Self {
        let all = |one: &(dyn Fn() -> f64 + Sync)| {
            1e9 * (0..5).map(|_| rayon::broadcast(|_| one()).iter().sum()).fold(0.0, f64::max)
        };
        let isa = Isa::detect();
        let widened = DType::ALL.map(|dtype| all(&|| raw_widen_rate(isa, dtype)));
        Limits { bytes: read_rate(), flops: all(&|| raw_fma_gflops(isa)), widened }
    }

    /// What binds, and the share of it that `secs` are.
    fn share(&self, demand: &Demand, secs: f64) -> String {
        let at = DType::ALL.iter().position(|dtype| *dtype == demand.dtype).expect("one of all");
        let (reading, multiplying) = (demand.bytes / self.bytes, demand.flops / self.flops);
        let widening = demand.elements / self.widened[at];
        let name = match reading > multiplying + widening {
            true => "read",
            false if widening > multiplying => "widening, fma",
            false if widening > 0.1 * multiplying => "fma, widening",
            false => "fma",
        };
        format!("{:.0} % of {name}", 100.0 * reading.max(multiplying + widening) / secs)
    }
}

/// Attention over pages of a dtype that hold random keys and values.
struct Bench {
    device: Host,
    frames: Frames<tidemill::memory::arena::Region>,
    qkv: tidemill::memory::arena::Region,
    out: tidemill::memory::arena::Region,
    heads: Heads,
}

impl Bench {
    fn new(dtype: DType, num_kv_heads: usize, scored: bool) -> Self {
        let layout = KvLayout { num_layers: 1, num_kv_heads, head_dim: HEAD_DIM, dtype, scored };
        let heads = Heads { num_heads: NUM_HEADS, num_kv_heads, head_dim: HEAD_DIM };
        let (stride, count) = (layout.layer_bytes(), SEQUENCES * pages_for(CONTEXT));
        let bytes = [count * stride, PROMPT * heads.qkv_width() * 4, PROMPT * heads.query_width() * 4];
        let mut device =
            Host::new(Arena::new("bench", Tier::Cpu, bytes.iter().sum::<usize>() + (1 << 20)).expect("memory"));
        let [memory, mut qkv, out] = bytes.map(|bytes| device.allocate(bytes));
        for (index, value) in qkv.as_mut_slice::<f32>().iter_mut().enumerate() {
            *value = (index * 7919 % 1009) as f32 / 504.5 - 1.0;
        }
        let mut bench = Bench { device, frames: Frames { memory, layout, stride, count }, qkv, out, heads };
        for start in (0..CONTEXT).step_by(PROMPT) {
            let segments: Vec<Segment> =
                (0..SEQUENCES).map(|sequence| Bench::segment(sequence, start, PROMPT, 0, Kept::All)).collect();
            let kv = KvViewMut { resident: &mut bench.frames, streamed: None };
            bench.device.append_kv(kv, &segments, &bench.qkv, heads);
        }
        bench
    }

    fn segment(sequence: usize, start: usize, len: usize, first_row: usize, kept: Kept) -> Segment {
        let first = sequence * pages_for(CONTEXT);
        let pages = (first..first + pages_for(start + len)).map(|page| page as u32).collect();
        Segment { first_row, len, start, pages, kept }
    }

    fn secs(&mut self, segments: &[Segment]) -> f64 {
        best(|| {
            let kv = KvViewMut { resident: &mut self.frames, streamed: None };
            let span = AttentionSpan { window: None, scale: 0.125, sinks: None };
            self.device.attend(kv, span, segments, &self.qkv, self.heads, &mut self.out);
        })
    }

    /// Of so many pages and pairs of query and key.
    fn demand(&self, pages: usize, pairs: usize) -> Demand {
        let layout = &self.frames.layout;
        Demand {
            bytes: (pages * layout.layer_bytes()) as f64,
            flops: (4 * HEAD_DIM * NUM_HEADS * pairs) as f64,
            elements: (pages * PAGE_POSITIONS * layout.num_kv_heads * 2 * HEAD_DIM) as f64,
            dtype: layout.dtype,
        }
    }

    /// One query of every sequence.
    fn decode(&mut self, limits: &Limits) -> String {
        let segments: Vec<Segment> =
            (0..SEQUENCES).map(|sequence| Bench::segment(sequence, CONTEXT - 1, 1, sequence, Kept::All)).collect();
        let secs = self.secs(&segments);
        limits.share(&self.demand(SEQUENCES * pages_for(CONTEXT), SEQUENCES * CONTEXT), secs)
    }

    /// How many times as fast one query of every sequence is where they have all pages but the last in common.
    fn sharing(&mut self) -> String {
        let own: Vec<Segment> =
            (0..SEQUENCES).map(|sequence| Bench::segment(sequence, CONTEXT - 1, 1, sequence, Kept::All)).collect();
        let mut shared = own.clone();
        let whole = pages_for(CONTEXT) - 1;
        shared.iter_mut().for_each(|segment| segment.pages[..whole].copy_from_slice(&own[0].pages[..whole]));
        format!("{:.1} x", self.secs(&own) / self.secs(&shared))
    }

    /// A whole prompt of one sequence.
    fn prompt(&mut self, limits: &Limits, kept: Kept) -> String {
        let secs = self.secs(&[Bench::segment(0, 0, PROMPT, 0, kept)]);
        limits.share(&self.demand(pages_for(PROMPT), PROMPT * (PROMPT + 1) / 2), secs)
    }
}

fn main() {
    let limits = Limits::measure();
    println!(
        "{} threads, {:?}: reading {:.1} GB/s, {:.0} GFLOP/s of multiply-adds; shares of the one that binds",
        rayon::current_num_threads(),
        Isa::detect(),
        limits.bytes / 1e9,
        limits.flops / 1e9
    );
    println!(
        "| kv | decode, 8 queries a key | decode, 1 query a key | prompt | prompt, keys scored | decode, shared beginning |"
    );
    println!("|---|---|---|---|---|---|");
    // Nothing is evicted: the whole prompt fits, what would come after it does not.
    let (half, stretch) = (PROMPT / 2, PAGE_POSITIONS);
    let scored = Kept::Heavy { heavy: half, recent: half, prompt_len: PROMPT, stretch, spread: Spread::Even };
    for dtype in DType::ALL {
        let mut grouped = Bench::new(dtype, NUM_HEADS / 8, false);
        let (decode, prompt, sharing) =
            (grouped.decode(&limits), grouped.prompt(&limits, Kept::All), grouped.sharing());
        let single = Bench::new(dtype, NUM_HEADS, false).decode(&limits);
        let heavy = Bench::new(dtype, NUM_HEADS / 8, true).prompt(&limits, scored);
        println!("| {dtype} | {decode} | {single} | {prompt} | {heavy} | {sharing} |");
    }
}
