//! Measures this machine: the profile that plans are made with.
//!
//! Rates of kernels and copies are those of the very functions that a pass runs, on shapes like those of real layers;
//! the ceilings of the hardware are measured without them.
//!
//! **Invariant:** the profile says what the machine is and can do, nothing of when or where it was measured: measured
//! again, only numbers differ. Rates are medians, ceilings the best that was seen.

mod card;
mod disk;
mod handover;
mod kernels;
mod main_memory;
mod measure;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::device::host::isa::Isa;
use crate::device::host::{Host, raw_fma_gflops, raw_int8_gops};
use crate::error::{Bytes, Error, Result, Tier};
use crate::hardware::{Cpu, Hardware, Raw, VERSION};
use crate::memory::arena::Arena;
use crate::memory::limits;
pub use card::{CardOptions, with_card};
use kernels::{Bench, Shape};
use main_memory::{MainMemory, Planes};
use measure::{median, rounds};

/// What a measured profile gives as its source.
pub const SOURCE: &str = "measured by tidemill calibrate";

/// Which way of measuring this is: profiles made in another way are not kept.
pub const METHOD: u32 = 8;

/// What is measured, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Fewer repetitions and no products of very many rows: about 3 s rather than 10 s.
    pub quick: bool,
    /// Where the disk is measured; made if it is not there. None measures none.
    pub disk: Option<PathBuf>,
    /// Main memory that may be used meanwhile: about 700 MB is best, more is not taken, less makes layers narrower;
    /// about 100 MB are taken at least.
    pub memory_bytes: u64,
}

/// How often widths are halved at most: narrower layers would stay in the caches.
const MOST_HALVINGS: u32 = 2;

/// Seconds for computing, for main memory and for the disk.
struct Budgets {
    kernels: Duration,
    memory: Duration,
    disk: Duration,
}

/// What is measured of processor and main memory in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Fma,
    Int8,
    Read,
    Triad,
    Copy,
    CopyTogether,
    Decode,
    Step,
}

impl Probe {
    const ALL: [Probe; 8] = [
        Probe::Fma,
        Probe::Int8,
        Probe::Read,
        Probe::Triad,
        Probe::Copy,
        Probe::CopyTogether,
        Probe::Decode,
        Probe::Step,
    ];
}

/// Measures this machine with the threads of the pool that computes. `progress` is told what comes next.
///
/// # Errors
/// When the system refuses the memory; what the disk gives.
pub fn calibrate(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Hardware> {
    let budgets = Budgets::of(options);
    let rows = if options.quick { 256 } else { 512 };
    let (shape, array_bytes) = sizes(rows, options.memory_bytes);
    progress("measuring arithmetic and main memory");
    let basics = Basics::measure(array_bytes, budgets.memory)?;
    progress("measuring kernels");
    let began = Instant::now();
    let arena = Arena::new("calibration", Tier::Cpu, shape.bytes())?;
    let mut bench = Bench::new(Host::new(arena), shape)?;
    let kernels = bench.measure(budgets.kernels.saturating_sub(began.elapsed()), basics.median(Probe::Step))?;
    let disk = match &options.disk {
        Some(directory) => {
            progress("measuring the disk");
            Some(disk::measure(directory, budgets.disk, &mut || bench.busy())?)
        }
        None => None,
    };
    drop(bench);
    let name = processor_name();
    let threads = rayon::current_num_threads();
    let cores = std::thread::available_parallelism().map_or(threads, |cores| cores.get().min(threads));
    let memory_bytes = limits::total_memory().unwrap_or(options.memory_bytes);
    let hardware = Hardware {
        version: VERSION,
        name: format!("{name}, {cores} cores, {}", Bytes(memory_bytes)),
        source: SOURCE.into(),
        gpu: None,
        cpu: Cpu {
            name,
            memory_bytes,
            cores: cores as f64,
            dram_bytes_per_s: basics.median(Probe::Read),
            copy_bytes_per_core_s: basics.median(Probe::Copy),
            copy_together_bytes_per_core_s: Some(basics.median(Probe::CopyTogether)),
            copy_step_secs: Some(basics.median(Probe::Step)),
            decode_bytes_per_core_s: basics.median(Probe::Decode),
            kernels,
        },
        links: None,
        disk: disk.as_ref().map(|measured| measured.disk),
        raw: Raw {
            gpu_flops: None,
            gpu_memory_bytes_per_s: None,
            cpu_flops: basics.best(Probe::Fma).expect("every processor multiplies"),
            cpu_int8_ops: basics.best(Probe::Int8),
            dram_bytes_per_s: [Probe::Read, Probe::Triad]
                .into_iter()
                .filter_map(|p| basics.best(p))
                .fold(0.0, f64::max),
            h2d_bytes_per_s: None,
            d2h_bytes_per_s: None,
            disk_read_bytes_per_s: disk.as_ref().map(|measured| measured.raw_read),
            disk_write_bytes_per_s: disk.as_ref().map(|measured| measured.raw_write),
        },
    };
    let hardware = rounded(&hardware);
    hardware.validate().unwrap_or_else(|what| panic!("measured a profile that is not one: {what}"));
    Ok(hardware)
}

/// The profile with four digits of every number that was measured: more would be noise.
fn rounded(hardware: &Hardware) -> Hardware {
    fn round(value: &mut toml::Value) {
        match value {
            toml::Value::Float(number) => {
                *number = format!("{number:.3e}").parse().expect("it was written as a number")
            }
            toml::Value::Array(values) => values.iter_mut().for_each(round),
            toml::Value::Table(table) => table.iter_mut().for_each(|(_, value)| round(value)),
            _ => {}
        }
    }
    let mut value = toml::Value::try_from(hardware).expect("a profile is plain data");
    round(&mut value);
    value.try_into().expect("only digits have changed")
}

impl Budgets {
    fn of(options: &Options) -> Self {
        let secs = if options.quick { [1.8, 0.3, 0.7] } else { [6.2, 0.9, 2.2] };
        let [kernels, memory, disk] = secs.map(Duration::from_secs_f64);
        Budgets { kernels, memory, disk }
    }
}

/// The widest layers, and the largest arrays of main memory, that fit; the smallest ones, if need be.
fn sizes(rows: usize, memory_bytes: u64) -> (Shape, usize) {
    let sizes = |halvings: u32| (Shape::new(halvings, rows), (384 << 20) >> halvings);
    // They are not there at the same time.
    let fits = |(shape, arrays): &(Shape, usize)| shape.bytes().max(*arrays) as u64 <= memory_bytes;
    (0..=MOST_HALVINGS).map(sizes).find(fits).unwrap_or_else(|| sizes(MOST_HALVINGS))
}

/// Samples of what needs no kernels.
struct Basics {
    samples: Vec<Vec<f64>>,
}

impl Basics {
    fn measure(array_bytes: usize, budget: Duration) -> Result<Self> {
        let began = Instant::now();
        let mut memory = MainMemory::new(array_bytes)?;
        let mut planes = Planes::new();
        let isa = Isa::detect();
        // Wakes the threads and the clocks.
        rayon::broadcast(|_| raw_fma_gflops(isa));
        let samples = rounds(&Probe::ALL, budget.saturating_sub(began.elapsed()), |probe| {
            Ok::<_, Error>(match probe {
                Probe::Fma => Some(1e9 * rayon::broadcast(|_| raw_fma_gflops(isa)).iter().sum::<f64>()),
                Probe::Int8 => {
                    let all = rayon::broadcast(|_| raw_int8_gops(isa));
                    all.into_iter().sum::<Option<f64>>().map(|gops| 1e9 * gops)
                }
                Probe::Read => Some(memory.read()),
                Probe::Triad => Some(memory.triad()),
                Probe::Copy => Some(memory.copy()),
                Probe::CopyTogether => Some(memory.copy_together()),
                Probe::Decode => Some(planes.decode()),
                Probe::Step => Some(handover::step_secs()),
            })
        })?;
        Ok(Basics { samples })
    }

    fn of(&self, probe: Probe) -> &[f64] {
        let index = Probe::ALL.iter().position(|&other| other == probe).expect("all probes are measured");
        &self.samples[index]
    }

    fn median(&self, probe: Probe) -> f64 {
        median(self.of(probe)).expect("measured at least once")
    }

    fn best(&self, probe: Probe) -> Option<f64> {
        self.of(probe).iter().copied().reduce(f64::max)
    }
}

/// What the processor calls itself.
fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::Kernels;
    use crate::model::dtype::DType;

    #[test]
    fn measures_a_profile_that_survives_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options { quick: true, disk: Some(directory.path().to_owned()), memory_bytes: 400 << 20 };
        let mut stages = 0;
        let hardware = calibrate(&options, &mut |_| stages += 1).unwrap();
        assert_eq!(stages, 3);
        assert_eq!(hardware.validate(), Ok(()));
        assert_eq!(Hardware::from_toml(&hardware.to_toml(), "x").unwrap(), hardware);
        assert!(hardware.disk.is_some() && hardware.gpu.is_none());
        // `validate` has seen that everything is finite and not negative.
        let Kernels { integer_pages, .. } = &hardware.cpu.kernels;
        assert!(integer_pages.keys().eq([DType::Int8, DType::Int4].iter()), "{integer_pages:?}");
        assert!(!hardware.to_toml().contains(&*directory.path().to_string_lossy()));
    }

    #[test]
    fn little_memory_makes_layers_narrower() {
        let bytes = |memory_bytes: u64| {
            let (shape, arrays) = sizes(512, memory_bytes);
            shape.bytes().max(arrays) as u64
        };
        for memory_bytes in [u64::MAX, 1 << 30, 512 << 20, 200 << 20, 128 << 20] {
            assert!(bytes(memory_bytes) <= memory_bytes, "{memory_bytes}: {}", bytes(memory_bytes));
        }
        assert!(bytes(0) <= 128 << 20);
        assert!(bytes(u64::MAX) <= 1 << 30);
    }
}
