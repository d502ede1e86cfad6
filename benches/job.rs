//! The whole job against the best f32 matrix product known here.
//!
//! `cargo bench --bench job` runs a Llama shape of 1.1 B parameters (seeded bf16 weights), 64 prompts of 128
//! tokens, 32 generated each, and prints its arithmetic rate as a fraction of
//! - the better of the `gemm` crate's and our own 2048-cubed f32 product on the same threads, and
//! - the raw rate of fused multiply-adds,
//!
//! both measured right before and after, because shared machines drift. `-- --quick` takes a smaller job.
#![allow(missing_docs, clippy::print_stdout)]

use std::process::Command;
use std::time::Instant;

use rayon::prelude::*;
use tidemill::device::host::gemm::{PackedRows, Panels, linear};
use tidemill::device::host::isa::Isa;
use tidemill::device::host::raw_fma_gflops;
use tidemill::model::dtype::DType;
use tidemill::model::packed::panels::packed_bytes;

const SIDE: usize = 2048;

/// Best of some repetitions: the ceiling is what the machine can do, not what it did while disturbed.
fn best(repetitions: usize, mut run: impl FnMut() -> f64) -> f64 {
    (0..repetitions).map(|_| run()).fold(0.0, f64::max)
}

fn gemm_crate_gflops(threads: usize) -> f64 {
    let (a, b) = (vec![0.5f32; SIDE * SIDE], vec![0.25f32; SIDE * SIDE]);
    let mut c = vec![0f32; SIDE * SIDE];
    let side = SIDE as isize;
    best(5, || {
        let started = Instant::now();
        // SAFETY: three row-major square matrices of the sizes given.
        #[allow(unsafe_code)]
        unsafe {
            gemm::gemm(
                SIDE,
                SIDE,
                SIDE,
                c.as_mut_ptr(),
                1,
                side,
                false,
                a.as_ptr(),
                1,
                side,
                b.as_ptr(),
                1,
                side,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(threads),
            );
        }
        std::hint::black_box(&c);
        2.0 * (SIDE as f64).powi(3) / started.elapsed().as_secs_f64() / 1e9
    })
}

fn ours_gflops(dtype: DType, rows: usize) -> f64 {
    let isa = Isa::detect();
    let x = vec![0.5f32; rows * SIDE];
    let data = vec![0u8; packed_bytes(SIDE, SIDE, dtype)];
    let mut scratch = vec![0f32; rows * SIDE];
    let mut y = vec![0f32; rows * SIDE];
    let repeat = (SIDE / rows).max(1);
    best(5, || {
        let started = Instant::now();
        for _ in 0..repeat {
            let packed = PackedRows::pack(isa, &x, rows, SIDE, &mut scratch);
            linear(
                isa,
                &packed,
                &Panels { pieces: vec![&data], dtype, inputs: SIDE, outputs: SIDE },
                None,
                &mut y,
                SIDE,
            );
        }
        std::hint::black_box(&y);
        2.0 * (rows * repeat * SIDE * SIDE) as f64 / started.elapsed().as_secs_f64() / 1e9
    })
}

fn raw_gflops(threads: usize) -> f64 {
    best(5, || (0..threads).into_par_iter().map(|_| raw_fma_gflops(Isa::detect())).sum())
}

/// Rates now: the best product known, and raw multiply-adds.
fn ceilings(threads: usize) -> (f64, f64) {
    let raw = raw_gflops(threads);
    let crate_rate = gemm_crate_gflops(threads);
    let ours = ours_gflops(DType::F32, SIDE);
    println!("  raw FMA {raw:.1} GFLOP/s; 2048-cubed f32: gemm crate {crate_rate:.1}, ours {ours:.1}");
    (crate_rate.max(ours), raw)
}

struct Shape {
    layers: f64,
    hidden: f64,
    intermediate: f64,
    kv_width: f64,
    vocab: f64,
}

impl Shape {
    /// Multiply-adds of the products, without attention: that is the floor the rate is counted in.
    fn flops(&self, computed: f64, sampled: f64) -> f64 {
        let layer = self.hidden * (2.0 * self.hidden + 2.0 * self.kv_width + 3.0 * self.intermediate);
        2.0 * (computed * self.layers * layer + sampled * self.hidden * self.vocab)
    }
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (prompts, generated) = if quick { (16, 8) } else { (64, 32) };
    let threads = rayon::current_num_threads();
    println!("{threads} threads, {:?}", Isa::detect());
    for rows in [1, 8, 64, 512] {
        println!("  ours, bf16 weights, {rows} rows: {:.1} GFLOP/s", ours_gflops(DType::Bf16, rows));
    }
    println!("before:");
    let before = ceilings(threads);

    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name);
    let line = |i: u32| {
        let prompt: Vec<u32> = (0..128).map(|k| 3 + (i * 7919 + k * 104_729) % 31_990).collect();
        serde_json::json!({"prompt": prompt, "max_tokens": generated, "temperature": 0, "ignore_eos": true})
    };
    let text: String = (0..prompts).map(|i| format!("{}\n", line(i))).collect();
    std::fs::write(path("in.jsonl"), text).expect("write");
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/policies/models/llama-1.1b.json");
    let status = Command::new(env!("CARGO_BIN_EXE_tidemill"))
        .args(["generate", "--model", &format!("synth:{config}#1"), "--threads", &threads.to_string()])
        .args(["--progress", "none", "--input"])
        .arg(path("in.jsonl"))
        .arg("--output")
        .arg(path("out.jsonl"))
        .arg("--stats")
        .arg(path("stats.json"))
        .status()
        .expect("the binary runs");
    assert!(status.success());
    println!("after:");
    let after = ceilings(threads);

    let stats: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path("stats.json")).expect("stats")).expect("JSON");
    let number = |key: &str| stats[key].as_f64().expect(key);
    let shape = Shape { layers: 22.0, hidden: 2048.0, intermediate: 5632.0, kv_width: 256.0, vocab: 32_000.0 };
    let flops = shape.flops(number("computed_tokens"), number("generated_tokens"));
    let rate = flops / number("wall_s") / 1e9;
    // The higher reading: a disturbed one would flatter the job.
    let (product, raw) = (before.0.max(after.0), before.1.max(after.1));
    println!(
        "job: {:.1} s, {:.1} generated tokens/s, {:.1} tokens/s in all; {rate:.1} GFLOP/s in products = {:.1} % of \
         the best product, {:.1} % of raw FMA",
        number("wall_s"),
        number("generated_tokens_per_s"),
        number("total_tokens_per_s"),
        100.0 * rate / product,
        100.0 * rate / raw,
    );
}
