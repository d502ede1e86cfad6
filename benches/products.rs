//! Matrix products beside the ceiling of the instructions that they are made of, measured in the same run.
//!
//! `cargo bench --bench products` prints, for weights of every dtype, operations per second of products with a square
//! matrix of 2048 and their share of the ceiling: multiply-adds of f32, or of bytes where activations are rounded. Those
//! come for every set that has an instruction for them.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::Instant;

use rayon::prelude::*;
use tidemill::device::host::dot::{self, IntegerRows};
use tidemill::device::host::gemm::{self, PackedRows, Panels};
use tidemill::device::host::isa::Isa;
use tidemill::device::host::{raw_fma_gflops, raw_int8_gops};
use tidemill::model::dtype::DType;
use tidemill::model::packed::panels::packed_bytes;

const SIDE: usize = 2048;

/// The best of a few samples, in 10^9 operations per second.
fn best(sample: impl Fn() -> f64) -> f64 {
    (0..7).map(|_| sample()).fold(0.0, f64::max)
}

fn product(isa: Isa, dtype: DType, rounded: bool, rows: usize) -> f64 {
    let x: Vec<f32> = (0..rows * SIDE).map(|index| (index % 97) as f32 - 48.0).collect();
    let data = vec![0u8; packed_bytes(SIDE, SIDE, dtype)];
    let (mut scratch, mut y) = (vec![0f32; rows * SIDE], vec![0f32; rows * SIDE]);
    let w = Panels { pieces: vec![&data], dtype, inputs: SIDE, outputs: SIDE };
    let repeat = (SIDE / rows).clamp(1, 64);
    let started = Instant::now();
    for _ in 0..repeat {
        if rounded {
            let x = IntegerRows::round(isa, &x, rows, SIDE, &mut scratch);
            dot::linear(isa, &x, &w, None, &mut y, SIDE);
        } else {
            let x = PackedRows::pack(isa, &x, rows, SIDE, &mut scratch);
            gemm::linear(isa, &x, &w, None, &mut y, SIDE);
        }
    }
    std::hint::black_box(&y);
    2.0 * (rows * repeat * SIDE * SIDE) as f64 / started.elapsed().as_secs_f64() / 1e9
}

fn main() {
    let threads = rayon::current_num_threads();
    let on_all = |one: &(dyn Fn() -> f64 + Sync)| best(|| (0..threads).into_par_iter().map(|_| one()).sum());
    println!("{threads} threads; Gop/s, share of the ceiling");
    println!("| set | weights | activations | 1 row | 8 rows | 64 rows | 128 rows | 512 rows | ceiling |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let plain = DType::ALL.into_iter().map(|dtype| (Isa::detect(), dtype, false));
    let sets = [Isa::Amx, Isa::Avx512, Isa::Avx2Vnni, Isa::Avx2].into_iter().filter(|isa| isa.is_available());
    let rounded = sets.flat_map(|isa| [(isa, DType::Int8, true), (isa, DType::Int4, true)]);
    for (isa, dtype, rounded) in plain.chain(rounded) {
        let ceiling = match rounded {
            true => on_all(&|| raw_int8_gops(isa).unwrap_or(f64::NAN)),
            false => on_all(&|| raw_fma_gflops(isa)),
        };
        let cells = [1, 8, 64, 128, 512].map(|rows| {
            let rate = best(|| product(isa, dtype, rounded, rows));
            format!("{rate:.0}, {:.0} %", 100.0 * rate / ceiling)
        });
        let activations = if rounded { "int8" } else { "f32" };
        println!("| {isa:?} | {dtype} | {activations} | {} | {ceiling:.0} |", cells.join(" | "));
    }
}
