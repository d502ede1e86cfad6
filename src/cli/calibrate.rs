//! `tidemill calibrate`: measures this machine.
//!
//! **Invariant:** a profile is written whole or not at all; the table that people read goes to standard error, the
//! profile to its file or to standard output.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::flags::DeviceChoice;
use super::{devices, resources, say};
use crate::calibrate::{CardOptions, Options, calibrate, with_card};
use crate::durable;
use crate::error::Result;
use crate::hardware::{Curve, Hardware, Kernels};
use crate::memory::limits;
use crate::model::dtype::DType;
use crate::model::packed::cache;

/// The arguments of `calibrate`.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Write the profile to a file instead of standard output.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Take about 3 s instead of 10.
    #[arg(long)]
    quick: bool,
    /// Measure the first GPU too, if there is one that can be used, or must be [default: auto].
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Threads that compute [default: one per core].
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Where files for what does not fit into memory are made: the disk that is measured [default: the cache
    /// directory].
    #[arg(long, env = "TIDEMILL_OFFLOAD_DIR", value_name = "DIR")]
    offload_dir: Option<PathBuf>,
    /// Where packed models and offloaded files are kept [default: tidemill in the user's cache directory].
    #[arg(long, env = "TIDEMILL_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// A disk or file that cannot be used; too little memory.
pub fn run(arguments: &Arguments) -> Result<u8> {
    resources::use_threads(arguments.threads)?;
    let disk = resources::offload_directory(arguments.offload_dir.as_deref(), arguments.cache_dir.as_deref())?;
    let options = Options { quick: arguments.quick, disk: Some(disk), memory_bytes: limits::default_cpu_memory() };
    let mut hardware = calibrate(&options, &mut |what| say::line(what))?;
    // The card's memory that may be used is what is free.
    if let Some(card) = devices::choose(arguments.device)? {
        say::line(&format!("measuring {}", card.facts.name));
        let memory_bytes = devices::budget(&card, None)?;
        drop(card);
        let cache = cache::directory(arguments.cache_dir.as_deref())?;
        hardware = with_card(&hardware, &CardOptions { quick: arguments.quick, memory_bytes, cache: &cache })?;
    }
    say::line(table(&hardware).trim_end());
    match &arguments.save {
        Some(file) => durable::replace(file, hardware.to_toml().as_bytes())?,
        None => say::data(&hardware.to_toml())?,
    }
    Ok(0)
}

/// The profile for people.
fn table(hardware: &Hardware) -> String {
    let Hardware { cpu, raw, .. } = hardware;
    let mut text = format!("\n{}\n", hardware.name);
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:32} {value:>14}");
    };
    let giga = |rate: f64, unit: &str| format!("{:.2} {unit}", rate / 1e9);
    row("ceiling: f32 multiply-adds", giga(raw.cpu_flops, "GFLOP/s"));
    if let Some(ops) = raw.cpu_int8_ops {
        row("ceiling: 8-bit multiply-adds", giga(ops, "Gop/s"));
    }
    row("ceiling: main memory", giga(raw.dram_bytes_per_s, "GB/s"));
    row("main memory, read", giga(cpu.dram_bytes_per_s, "GB/s"));
    row("copies, a core", giga(cpu.copy_bytes_per_core_s, "GB/s"));
    if let Some(rate) = cpu.copy_together_bytes_per_core_s {
        row("copies, each of two cores", giga(rate, "GB/s"));
    }
    row("compressed weights, a core", giga(cpu.decode_bytes_per_core_s, "GB/s"));
    if let Some(disk) = &hardware.disk {
        row("disk, read", giga(disk.read_bytes_per_s, "GB/s"));
        row("disk, written", giga(disk.write_bytes_per_s, "GB/s"));
        row("disk, read while written", giga(disk.read_together_bytes_per_s, "GB/s"));
        row("disk, written while read", giga(disk.write_together_bytes_per_s, "GB/s"));
        row("disk, a step", format!("{:.0} us", 1e6 * disk.step_secs));
        row("disk, of a core", format!("{:.0} ms/GB", 1e12 * disk.core_secs_per_byte));
    }
    if let (Some(flops), Some(rate)) = (raw.gpu_flops, raw.gpu_memory_bytes_per_s) {
        row("ceiling: gpu, 16-bit products", giga(flops, "GFLOP/s"));
        row("ceiling: gpu memory", giga(rate, "GB/s"));
    }
    if let Some(links) = &hardware.links {
        row("to the gpu", giga(links.h2d_bytes_per_s, "GB/s"));
        row("from the gpu", giga(links.d2h_bytes_per_s, "GB/s"));
        row("to the gpu, both ways", giga(links.h2d_together_bytes_per_s, "GB/s"));
        row("from the gpu, both ways", giga(links.d2h_together_bytes_per_s, "GB/s"));
    }
    let text = kernels_table(text, &cpu.kernels);
    match &hardware.gpu {
        Some(gpu) => kernels_table(format!("{text}\n{}\n", gpu.name), &gpu.kernels),
        None => text,
    }
}

/// What a processor or a card computes.
fn kernels_table(mut text: String, kernels: &Kernels) -> String {
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:32} {value:>14}");
    };
    let giga = |rate: f64, unit: &str| format!("{:.2} {unit}", rate / 1e9);
    row("attention, many rows", giga(kernels.attention_prefill_flops, "GFLOP/s"));
    row("attention, single rows", giga(kernels.attention_decode_flops, "GFLOP/s"));
    row("attention, single rows", giga(kernels.attention_bytes_per_s, "GB/s"));
    for (element, pages) in &kernels.integer_pages {
        let name = format!("attention, pages of {element}");
        row(&name, giga(pages.wide_bytes_per_s, "GB/s"));
        row(&format!("storing {element}, an element"), format!("{:.2} ns", 1e9 * pages.store_secs));
    }
    let keeping = &kernels.keeping;
    for (name, secs) in [
        ("scoring a key, a head", keeping.score_secs),
        ("a slot looked at, a head", keeping.sift_secs),
        ("evicting a key, an element", keeping.evict_secs),
        ("turning a query, an element", keeping.turn_secs),
    ] {
        row(name, format!("{:.2} ns", 1e9 * secs));
    }
    row("element by element", giga(kernels.pointwise_bytes_per_s, "GB/s"));
    row("sampling", giga(kernels.sampled_logits_per_s, "Glogit/s"));
    row("a step", format!("{:.1} us", 1e6 * kernels.step_secs));
    text + &curves(kernels)
}

/// Products by rows and dtype, in GFLOP/s.
fn curves(kernels: &Kernels) -> String {
    let elements: Vec<(&DType, &Curve)> = kernels.matmul.iter().collect();
    let mut text = format!("  {:32}", "products, GFLOP/s: rows");
    for (element, _) in &elements {
        let _ = write!(text, "{:>10}", element.name());
    }
    text.push('\n');
    let rows = elements.iter().map(|(_, curve)| &curve.0).max_by_key(|points| points.len());
    for (index, (rows, _)) in rows.into_iter().flatten().enumerate() {
        let _ = write!(text, "  {rows:>32}");
        for (_, curve) in &elements {
            let rate = curve.0.get(index).map_or(String::new(), |point| format!("{:.1}", point.1 / 1e9));
            let _ = write!(text, "{rate:>10}");
        }
        text.push('\n');
    }
    text
}
