//! `tidemill doctor`: what this machine offers.
//!
//! **Invariant:** nothing is changed, and what is not there is said, not an error.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::device::cuda::report;
use crate::device::host::isa::Isa;
use crate::error::{Bytes, Error, Result};
use crate::memory::{disk, limits};
use crate::model::packed::cache;

/// The arguments of `doctor`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Where packs, calibration and kernels are kept.
    #[arg(long, env = "TIDEMILL_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// `Error::Io` when standard output cannot be written.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let mut lines = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    lines.extend(processor().into_iter().map(|text| ("cpu", text)));
    lines.extend(memory().into_iter().map(|text| ("memory", text)));
    lines.extend(disk_lines(arguments.cache_dir.as_deref()).into_iter().map(|text| ("disk", text)));
    lines.extend(report::lines().into_iter().map(|text| ("gpu", text)));
    let text: String = lines.iter().map(|(name, text)| format!("{name:8} {text}\n")).collect();
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("write", "standard output"))?;
    Ok(0)
}

fn processor() -> Vec<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let kernels = match Isa::detect() {
        Isa::Portable => "portable",
        Isa::Avx2 => "AVX2",
        Isa::Avx2Vnni => "AVX2 and AVX-VNNI",
        Isa::Avx512 => "AVX-512",
        Isa::Amx => "AVX-512 and AMX",
    };
    let features = features();
    let features = if features.is_empty() { "none known".to_owned() } else { features.join(" ") };
    vec![format!("{name}, {threads} threads"), format!("features: {features}"), format!("kernels: {kernels}")]
}

/// The features that kernels use or may use.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let all = [
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avxvnni", has!("avxvnni")),
        ("avx512f", has!("avx512f")),
        ("avx512bw", has!("avx512bw")),
        ("avx512vnni", has!("avx512vnni")),
        ("avx512bf16", has!("avx512bf16")),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

/// The features that kernels use or may use.
#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

fn memory() -> Vec<String> {
    let total = limits::total_memory().map_or("unknown".into(), |bytes| Bytes(bytes).to_string());
    // Version 1 writes no limit as a number beyond all memory.
    let room = limits::control_group_room().filter(|&room| limits::total_memory().is_none_or(|total| room < total));
    let group = room.map_or("no limit".into(), |room| format!("{} left", Bytes(room)));
    vec![
        format!("{total}, {} available", Bytes(limits::available_memory())),
        format!("control group: {group}"),
        format!("default --cpu-memory: {}", Bytes(limits::default_cpu_memory())),
    ]
}

fn disk_lines(given: Option<&Path>) -> Vec<String> {
    let cache = match cache::directory(given) {
        Ok(cache) => cache,
        Err(error) => return vec![error.to_string()],
    };
    let mut lines = vec![format!("cache directory: {}", cache.display())];
    // It is made when it is needed; until then its parent tells as much.
    let there = std::path::absolute(&cache).unwrap_or(cache);
    let Some(there) = there.ancestors().find(|path| path.is_dir()) else { return lines };
    match disk::free_space(there) {
        Ok(free) => lines.push(format!("{} free", Bytes(free))),
        Err(error) => lines.push(error.to_string()),
    }
    let yes_no = |works| if works { "yes" } else { "no" };
    match disk::probe(there) {
        Ok(support) => {
            lines.push(format!("O_DIRECT: {}, io_uring: {}", yes_no(support.direct), yes_no(support.io_uring)));
            lines.extend(support.why);
        }
        Err(error) => lines.push(error.to_string()),
    }
    lines
}
