//! What a machine can do: memory, rates of links, disks and kernels.
//!
//! A profile is a TOML file; `tidemill calibrate` measures one, `policies/hardware/` has some of known machines. Rates
//! that planning goes by are those of our own kernels and copies. The raw ceilings of the hardware stand apart: they
//! make bounds, never predictions.
//!
//! **Invariant:** a profile that was read is complete: every rate is finite and positive, every curve has points in
//! ascending order of rows.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, Tier};
use crate::model::dtype::DType;

/// The version of the file format.
pub const VERSION: u32 = 1;

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Version of the file format: [`VERSION`].
    pub version: u32,
    /// What the machine is called.
    pub name: String,
    /// Where the numbers come from: measured when and how, or whose figures.
    pub source: String,
    /// The device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// The processor and main memory.
    pub cpu: Cpu,
    /// Copies between main memory and the device; there if the device is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub links: Option<Links>,
    /// The disk below the offload directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Ceilings of the hardware itself.
    pub raw: Raw,
}

/// A device with memory of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// What it is.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its "memory" is an arena in main memory, its computation and copies are the CPU's: a rehearsal.
    #[serde(default)]
    pub rehearsed: bool,
    /// What it computes.
    pub kernels: Kernels,
}

/// The processor and main memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// What it is.
    pub name: String,
    /// Bytes of main memory.
    pub memory_bytes: u64,
    /// Threads that compute, in cores' worth: what the kernel rates below were measured with.
    pub cores: f64,
    /// Bytes/s between main memory and all cores, reading mostly.
    pub dram_bytes_per_s: f64,
    /// Bytes/s that one core copies from main memory to main memory.
    pub copy_bytes_per_core_s: f64,
    /// Bytes/s that one core copies while another one does, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_together_bytes_per_core_s: Option<f64>,
    /// Seconds that a copy by a core takes beyond its bytes, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_step_secs: Option<f64>,
    /// Bytes/s of weights that one core makes out of compressed planes.
    pub decode_bytes_per_core_s: f64,
    /// What it computes, with all cores.
    pub kernels: Kernels,
}

/// Rates of computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// FLOP/s of matrix products (2 per weight and row) by the dtype of the weights, as a function of rows.
    pub matmul: BTreeMap<DType, Curve>,
    /// The same where activations are rounded to 8 bits, by the dtype of the weights: int8, int4.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub integer_matmul: BTreeMap<DType, Curve>,
    /// FLOP/s of attention (4 per query head, dimension and key) where a segment has many rows.
    pub attention_prefill_flops: f64,
    /// FLOP/s of attention where a segment has one row, besides reading keys and values.
    pub attention_decode_flops: f64,
    /// Bytes/s at which attention of one row reads keys and values.
    pub attention_bytes_per_s: f64,
    /// Seconds that a segment takes per key head, besides what its pages take.
    #[serde(default)]
    pub attention_segment_secs: f64,
    /// Pages of integers, by their dtype; what is missing is read like 16 bits and stored for nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub integer_pages: BTreeMap<DType, IntegerPages>,
    /// What keeping part of a sequence takes; nothing where it was not measured.
    #[serde(default)]
    pub keeping: Keeping,
    /// Bytes/s of norms, activations, residuals, embeddings: everything that goes element by element.
    pub pointwise_bytes_per_s: f64,
    /// Logits/s that sampling looks at.
    pub sampled_logits_per_s: f64,
    /// Seconds that any step takes at least: launches, wake-ups.
    pub step_secs: f64,
}

/// What pages of integers take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntegerPages {
    /// Bytes/s at which attention of one row reads them, each element counted as 16 bits.
    pub wide_bytes_per_s: f64,
    /// Seconds that storing an element of a key or value takes longer than one of 16 bits.
    pub store_secs: f64,
}

/// What KV policies take beside attention to the keys that they keep, in seconds of everything that computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keeping {
    /// Scoring a key that a query sees, per query head.
    pub score_secs: f64,
    /// Looking at a slot for an eviction, per key head.
    pub sift_secs: f64,
    /// Evicting a key and moving another to its place, per element of a row's queries, keys and values: what lies at
    /// odd places costs its queries too.
    pub evict_secs: f64,
    /// Seeing the first positions across a gap, per element of a row's queries.
    pub turn_secs: f64,
}

/// Copies between main memory and a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Bytes/s to the device, alone.
    pub h2d_bytes_per_s: f64,
    /// Bytes/s to main memory, alone.
    pub d2h_bytes_per_s: f64,
    /// Bytes/s to the device while the other direction is busy.
    pub h2d_together_bytes_per_s: f64,
    /// Bytes/s to main memory while the other direction is busy.
    pub d2h_together_bytes_per_s: f64,
    /// Seconds that a step takes beyond its bytes.
    pub step_secs: f64,
}

/// The disk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Bytes that may be used.
    pub capacity_bytes: u64,
    /// Bytes/s read, alone.
    pub read_bytes_per_s: f64,
    /// Bytes/s written, alone.
    pub write_bytes_per_s: f64,
    /// Bytes/s read while something is written.
    pub read_together_bytes_per_s: f64,
    /// Bytes/s written while something is read.
    pub write_together_bytes_per_s: f64,
    /// Seconds that a step takes beyond its bytes.
    pub step_secs: f64,
    /// Seconds of a core that a byte takes, read or written: the system's work, done beside the disk's.
    #[serde(default)]
    pub core_secs_per_byte: f64,
}

/// What the hardware itself can do, whatever our kernels reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// FLOP/s of the device, 16-bit products.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_flops: Option<f64>,
    /// Bytes/s of the device's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_bytes_per_s: Option<f64>,
    /// FLOP/s of all cores, f32 multiply-add.
    pub cpu_flops: f64,
    /// 8-bit multiply-add operations/s of all cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_int8_ops: Option<f64>,
    /// Bytes/s of main memory: STREAM.
    pub dram_bytes_per_s: f64,
    /// Bytes/s to the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub h2d_bytes_per_s: Option<f64>,
    /// Bytes/s to main memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d2h_bytes_per_s: Option<f64>,
    /// Bytes/s read with O_DIRECT, sequentially.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_read_bytes_per_s: Option<f64>,
    /// Bytes/s written with O_DIRECT, sequentially.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_write_bytes_per_s: Option<f64>,
}

/// FLOP/s as a function of rows: points (rows, FLOP/s) in ascending order of rows.
///
/// Between points, the seconds per weight are interpolated linearly; fewer rows than the first point's take its time
/// (the weights must be read or widened anyway), more than the last point's run at its rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Curve(pub Vec<(f64, f64)>);

impl Curve {
    /// Seconds per weight for a product with `rows` rows.
    pub fn secs_per_weight(&self, rows: f64) -> f64 {
        let secs = |(rows, flops): (f64, f64)| 2.0 * rows / flops;
        let next = self.0.partition_point(|point| point.0 < rows);
        match (next.checked_sub(1).map(|last| self.0[last]), self.0.get(next).copied()) {
            (None, Some(first)) => secs(first),
            (Some(last), None) => 2.0 * rows / last.1,
            (Some(below), Some(above)) => {
                let share = (rows - below.0) / (above.0 - below.0);
                secs(below) + share * (secs(above) - secs(below))
            }
            (None, None) => 0.0,
        }
    }

    /// The best rate at any number of rows.
    pub fn best_flops(&self) -> f64 {
        self.0.iter().map(|point| point.1).fold(0.0, f64::max)
    }
}

/// What a throttle can hold back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Link {
    /// Files to main memory.
    DiskRead,
    /// Main memory to files.
    DiskWrite,
    /// Main memory to the device.
    H2d,
    /// The device to main memory.
    D2h,
}

impl Link {
    /// All links.
    pub const ALL: [Link; 4] = [Link::DiskRead, Link::DiskWrite, Link::H2d, Link::D2h];

    /// Its name in flags, as that of the lane.
    pub fn name(self) -> &'static str {
        match self {
            Link::DiskRead => "disk_read",
            Link::DiskWrite => "disk_write",
            Link::H2d => "h2d",
            Link::D2h => "d2h",
        }
    }
}

/// Rates that links are held back to: `h2d=2GB/s,disk_read=300MB/s`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Throttles(pub BTreeMap<Link, f64>);

impl Throttles {
    /// The throttle of a link in bytes/s, if it has one.
    pub fn rate(&self, link: Link) -> Option<f64> {
        self.0.get(&link).copied()
    }
}

impl FromStr for Throttles {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut throttles = BTreeMap::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, rate) = part.split_once('=').ok_or(format!("`{part}` is not LINK=RATE such as h2d=2GB/s"))?;
            let link = Link::ALL
                .into_iter()
                .find(|link| link.name() == name.trim())
                .ok_or(format!("`{name}` is no link; there are disk_read, disk_write, h2d and d2h"))?;
            if throttles.insert(link, parse_rate(rate)?).is_some() {
                return Err(format!("`{name}` is throttled twice"));
            }
        }
        Ok(Throttles(throttles))
    }
}

impl fmt::Display for Throttles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (link, rate)) in self.0.iter().enumerate() {
            write!(f, "{}{}={rate}B/s", if index == 0 { "" } else { "," }, link.name())?;
        }
        Ok(())
    }
}

/// `2GB/s`, `300 MiB/s`: bytes per second.
fn parse_rate(text: &str) -> Result<f64, String> {
    let wrong = || format!("`{text}` is no rate; write one such as 2GB/s or 300MB/s");
    let body = text.trim().strip_suffix("/s").ok_or_else(wrong)?.trim_end();
    let split = body.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(body.len());
    let (number, unit) = body.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let rate = number.parse::<f64>().map_err(|_| wrong())? * factor;
    if rate.is_finite() && rate >= 1e3 { Ok(rate) } else { Err(wrong()) }
}

impl Hardware {
    /// Reads a profile; `origin` names the file in messages.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the key that is unknown, missing or out of range.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self> {
        let wrong = |what: String| {
            Error::usage(
                format!("{origin}: {what}"),
                "`tidemill calibrate --save FILE` writes a profile of this machine",
            )
        };
        let hardware: Hardware = toml::from_str(text).map_err(|error| wrong(error.message().to_owned()))?;
        hardware.validate().map_err(wrong)?;
        Ok(hardware)
    }

    /// The profile as a file.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a profile is plain data")
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    /// What is wrong, naming the key.
    pub fn validate(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("`version` is {}, this program reads {VERSION}", self.version));
        }
        if self.gpu.is_some() != self.links.is_some() {
            return Err("`gpu` and `links` come together or not at all".into());
        }
        let cpu = &self.cpu;
        let mut rates = vec![
            ("cpu.cores", cpu.cores),
            ("cpu.dram_bytes_per_s", cpu.dram_bytes_per_s),
            ("cpu.copy_bytes_per_core_s", cpu.copy_bytes_per_core_s),
            ("cpu.decode_bytes_per_core_s", cpu.decode_bytes_per_core_s),
            ("raw.cpu_flops", self.raw.cpu_flops),
            ("raw.dram_bytes_per_s", self.raw.dram_bytes_per_s),
        ];
        if let Some(links) = &self.links {
            rates.extend([
                ("links.h2d_bytes_per_s", links.h2d_bytes_per_s),
                ("links.d2h_bytes_per_s", links.d2h_bytes_per_s),
                ("links.h2d_together_bytes_per_s", links.h2d_together_bytes_per_s),
                ("links.d2h_together_bytes_per_s", links.d2h_together_bytes_per_s),
            ]);
        }
        if let Some(disk) = &self.disk {
            rates.extend([
                ("disk.read_bytes_per_s", disk.read_bytes_per_s),
                ("disk.write_bytes_per_s", disk.write_bytes_per_s),
                ("disk.read_together_bytes_per_s", disk.read_together_bytes_per_s),
                ("disk.write_together_bytes_per_s", disk.write_together_bytes_per_s),
            ]);
        }
        let raw = &self.raw;
        let optional = [
            ("raw.gpu_flops", raw.gpu_flops),
            ("raw.gpu_memory_bytes_per_s", raw.gpu_memory_bytes_per_s),
            ("cpu.copy_together_bytes_per_core_s", cpu.copy_together_bytes_per_core_s),
            ("raw.cpu_int8_ops", raw.cpu_int8_ops),
            ("raw.h2d_bytes_per_s", raw.h2d_bytes_per_s),
            ("raw.d2h_bytes_per_s", raw.d2h_bytes_per_s),
            ("raw.disk_read_bytes_per_s", raw.disk_read_bytes_per_s),
            ("raw.disk_write_bytes_per_s", raw.disk_write_bytes_per_s),
        ];
        rates.extend(optional.into_iter().filter_map(|(key, rate)| rate.map(|rate| (key, rate))));
        if let Some((key, rate)) = rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0)) {
            return Err(format!("`{key}` is {rate}, it must be positive"));
        }
        let latencies =
            [self.links.map(|links| links.step_secs), self.disk.map(|disk| disk.step_secs), cpu.copy_step_secs];
        if latencies.into_iter().flatten().any(|secs| !(0.0..1.0).contains(&secs)) {
            return Err("`step_secs` of a link, disk or copy must be at least 0 and less than 1".into());
        }
        if self.disk.is_some_and(|disk| !(0.0..1e-6).contains(&disk.core_secs_per_byte)) {
            return Err("`disk.core_secs_per_byte` must be at least 0 and less than 1e-6".into());
        }
        cpu.kernels.validate("cpu.kernels")?;
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.kernels.validate("gpu.kernels"))
    }

    /// The tier where things are computed.
    pub fn compute_tier(&self) -> Tier {
        if self.gpu.is_some() { Tier::Gpu } else { Tier::Cpu }
    }

    /// Rates of what computes.
    pub fn kernels(&self) -> &Kernels {
        self.gpu.as_ref().map_or(&self.cpu.kernels, |gpu| &gpu.kernels)
    }

    /// Whether computing takes the CPU's cores.
    pub fn computes_on_cpu(&self) -> bool {
        self.gpu.as_ref().is_none_or(|gpu| gpu.rehearsed)
    }

    /// Bytes that a tier has; 0 without it.
    pub fn capacity_bytes(&self, tier: Tier) -> u64 {
        match tier {
            Tier::Gpu => self.gpu.as_ref().map_or(0, |gpu| gpu.memory_bytes),
            Tier::Cpu => self.cpu.memory_bytes,
            Tier::Disk => self.disk.map_or(0, |disk| disk.capacity_bytes),
        }
    }

    /// Bytes/s of a link, alone; 0 without it.
    pub fn rate(&self, link: Link) -> f64 {
        match link {
            Link::DiskRead => self.disk.map_or(0.0, |disk| disk.read_bytes_per_s),
            Link::DiskWrite => self.disk.map_or(0.0, |disk| disk.write_bytes_per_s),
            Link::H2d => self.links.map_or(0.0, |links| links.h2d_bytes_per_s),
            Link::D2h => self.links.map_or(0.0, |links| links.d2h_bytes_per_s),
        }
    }

    /// The rate of a link while the others are in use too, in bytes/s.
    pub fn link_together_bytes_per_s(&self, link: Link) -> Option<f64> {
        let (disk, links) = (self.disk.as_ref(), self.links.as_ref());
        match link {
            Link::DiskRead => disk.map(|disk| disk.read_together_bytes_per_s),
            Link::DiskWrite => disk.map(|disk| disk.write_together_bytes_per_s),
            Link::H2d => links.map(|links| links.h2d_together_bytes_per_s),
            Link::D2h => links.map(|links| links.d2h_together_bytes_per_s),
        }
    }

    /// The same machine with links that are held back; faster than it is they never get.
    #[must_use]
    pub fn throttled(&self, throttles: &Throttles) -> Self {
        let mut hardware = self.clone();
        let hold = |rates: [&mut f64; 2], link: Link| {
            if let Some(limit) = throttles.rate(link) {
                rates.into_iter().for_each(|rate| *rate = rate.min(limit));
            }
        };
        let hold_raw = |rate: &mut Option<f64>, link: Link| {
            if let (Some(rate), Some(limit)) = (rate.as_mut(), throttles.rate(link)) {
                *rate = rate.min(limit);
            }
        };
        if let Some(disk) = &mut hardware.disk {
            hold([&mut disk.read_bytes_per_s, &mut disk.read_together_bytes_per_s], Link::DiskRead);
            hold([&mut disk.write_bytes_per_s, &mut disk.write_together_bytes_per_s], Link::DiskWrite);
        }
        if let Some(links) = &mut hardware.links {
            hold([&mut links.h2d_bytes_per_s, &mut links.h2d_together_bytes_per_s], Link::H2d);
            hold([&mut links.d2h_bytes_per_s, &mut links.d2h_together_bytes_per_s], Link::D2h);
        }
        hold_raw(&mut hardware.raw.disk_read_bytes_per_s, Link::DiskRead);
        hold_raw(&mut hardware.raw.disk_write_bytes_per_s, Link::DiskWrite);
        hold_raw(&mut hardware.raw.h2d_bytes_per_s, Link::H2d);
        hold_raw(&mut hardware.raw.d2h_bytes_per_s, Link::D2h);
        hardware
    }

    /// The machine with a rehearsed device: `memory_bytes` of main memory as an arena of its own, computation by the
    /// CPU, copies by one core per direction.
    #[must_use]
    pub fn rehearsed(&self, memory_bytes: u64) -> Self {
        let mut hardware = self.clone();
        let copy = self.cpu.copy_bytes_per_core_s;
        let together = self.cpu.copy_together_bytes_per_core_s.map_or(copy, |together| together.min(copy));
        hardware.gpu = Some(Gpu {
            name: format!("rehearsed by {}", self.cpu.name),
            memory_bytes,
            rehearsed: true,
            kernels: self.cpu.kernels.clone(),
        });
        hardware.links = Some(Links {
            h2d_bytes_per_s: copy,
            d2h_bytes_per_s: copy,
            h2d_together_bytes_per_s: together,
            d2h_together_bytes_per_s: together,
            step_secs: self.cpu.copy_step_secs.unwrap_or(self.cpu.kernels.step_secs),
        });
        (hardware.raw.h2d_bytes_per_s, hardware.raw.d2h_bytes_per_s) = (Some(copy), Some(copy));
        (hardware.raw.gpu_flops, hardware.raw.gpu_memory_bytes_per_s) = (None, None);
        hardware
    }

    /// The machine without its device.
    #[must_use]
    pub fn without_gpu(&self) -> Self {
        Hardware { gpu: None, links: None, ..self.clone() }
    }

    /// The machine at its raw ceilings: kernels that lose nothing, links without latency. What no program can beat.
    #[must_use]
    pub fn ideal(&self) -> Self {
        let mut hardware = self.clone();
        let raw = self.raw;
        hardware.cpu.dram_bytes_per_s = raw.dram_bytes_per_s.max(self.cpu.dram_bytes_per_s);
        let dram = hardware.cpu.dram_bytes_per_s;
        hardware.cpu.kernels = self.cpu.kernels.ideal(raw.cpu_flops, raw.cpu_int8_ops, dram);
        if let Some(gpu) = &mut hardware.gpu {
            let flops = raw.gpu_flops.unwrap_or(raw.cpu_flops);
            gpu.kernels = gpu.kernels.ideal(flops, None, raw.gpu_memory_bytes_per_s.unwrap_or(dram));
        }
        let best = |rate: f64, raw: Option<f64>| raw.map_or(rate, |raw| raw.max(rate));
        if let Some(links) = &mut hardware.links {
            links.h2d_bytes_per_s = best(links.h2d_bytes_per_s, raw.h2d_bytes_per_s);
            links.d2h_bytes_per_s = best(links.d2h_bytes_per_s, raw.d2h_bytes_per_s);
            links.h2d_together_bytes_per_s = links.h2d_bytes_per_s;
            links.d2h_together_bytes_per_s = links.d2h_bytes_per_s;
            links.step_secs = 0.0;
        }
        if let Some(disk) = &mut hardware.disk {
            disk.read_bytes_per_s = best(disk.read_bytes_per_s, raw.disk_read_bytes_per_s);
            disk.write_bytes_per_s = best(disk.write_bytes_per_s, raw.disk_write_bytes_per_s);
            disk.read_together_bytes_per_s = disk.read_bytes_per_s;
            disk.write_together_bytes_per_s = disk.write_bytes_per_s;
            disk.step_secs = 0.0;
            disk.core_secs_per_byte = 0.0;
        }
        hardware
    }
}

impl Kernels {
    /// The curve of products with weights of `element`, of activations that are rounded to `integers` if that was
    /// measured, or the nearest one that was: 16 bits stand for 16 bits, then whatever is wider.
    pub fn curve(&self, element: DType, integers: bool) -> &Curve {
        let integer = self.integer_matmul.get(&element).filter(|_| integers);
        if let Some(curve) = integer {
            return curve;
        }
        let near: &[DType] = match element {
            DType::F32 => &[DType::F32, DType::Bf16, DType::F16],
            DType::Bf16 => &[DType::Bf16, DType::F16, DType::F32],
            DType::F16 => &[DType::F16, DType::Bf16, DType::F32],
            DType::Int8 => &[DType::Int8, DType::Int4, DType::Bf16, DType::F16, DType::F32],
            DType::Int4 => &[DType::Int4, DType::Int8, DType::Bf16, DType::F16, DType::F32],
        };
        let found = near.iter().chain(&DType::ALL).find_map(|element| self.matmul.get(element));
        found.expect("a profile has at least one curve")
    }

    fn validate(&self, place: &str) -> Result<(), String> {
        let rates = [
            ("attention_prefill_flops", self.attention_prefill_flops),
            ("attention_decode_flops", self.attention_decode_flops),
            ("attention_bytes_per_s", self.attention_bytes_per_s),
            ("pointwise_bytes_per_s", self.pointwise_bytes_per_s),
            ("sampled_logits_per_s", self.sampled_logits_per_s),
        ];
        if let Some((key, rate)) = rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0)) {
            return Err(format!("`{place}.{key}` is {rate}, it must be positive"));
        }
        let Keeping { score_secs, sift_secs, evict_secs, turn_secs } = self.keeping;
        let mut latencies = vec![
            ("step_secs", self.step_secs),
            ("attention_segment_secs", self.attention_segment_secs),
            ("keeping.score_secs", score_secs),
            ("keeping.sift_secs", sift_secs),
            ("keeping.evict_secs", evict_secs),
            ("keeping.turn_secs", turn_secs),
        ];
        for (element, pages) in &self.integer_pages {
            latencies.push(("integer_pages.store_secs", pages.store_secs));
            let rate = pages.wide_bytes_per_s;
            if !(rate.is_finite() && rate > 0.0) {
                let key = format!("{place}.integer_pages.{element}.wide_bytes_per_s");
                return Err(format!("`{key}` is {rate}, it must be positive"));
            }
        }
        for (key, secs) in latencies {
            if !(0.0..1.0).contains(&secs) {
                return Err(format!("`{place}.{key}` is {secs}, it must be at least 0 and less than 1"));
            }
        }
        if self.matmul.is_empty() {
            return Err(format!("`{place}.matmul` has no curve"));
        }
        for (element, Curve(points)) in self.matmul.iter().chain(&self.integer_matmul) {
            let positive = points.iter().all(|(rows, flops)| *rows > 0.0 && *flops > 0.0 && (rows * flops).is_finite());
            let ascending = points.windows(2).all(|pair| pair[0].0 < pair[1].0);
            if points.is_empty() || !positive || !ascending {
                let what = "must have points (rows, FLOP/s), positive, in ascending order of rows";
                return Err(format!("`{place}.matmul.{element}` {what}"));
            }
        }
        Ok(())
    }

    /// The same kernels at the ceilings of the hardware: products bound by `flops` or by reading the weights once.
    fn ideal(&self, flops: f64, int8_ops: Option<f64>, bytes_per_s: f64) -> Self {
        let curve = |element: DType| {
            let rows = flops * element.bytes() / (2.0 * bytes_per_s);
            Curve(vec![(rows, flops.max(self.curve(element, false).best_flops()))])
        };
        let integer = |(&element, measured): (&DType, &Curve)| {
            // Bytes multiply at four times the rate of f32 where nothing better is known.
            let ops = int8_ops.unwrap_or(4.0 * flops).max(measured.best_flops());
            (element, Curve(vec![(ops * element.bytes() / (2.0 * bytes_per_s), ops)]))
        };
        // They are read as they are stored, however wide they count.
        let pages = |element: DType| {
            let measured = self.integer_pages.get(&element).map_or(0.0, |pages| pages.wide_bytes_per_s);
            let wide_bytes_per_s = (bytes_per_s * 2.0 / element.bytes()).max(measured);
            IntegerPages { wide_bytes_per_s, store_secs: 0.0 }
        };
        Kernels {
            matmul: DType::ALL.into_iter().map(|element| (element, curve(element))).collect(),
            integer_matmul: self.integer_matmul.iter().map(integer).collect(),
            attention_prefill_flops: flops.max(self.attention_prefill_flops),
            attention_decode_flops: flops.max(self.attention_decode_flops),
            attention_bytes_per_s: bytes_per_s.max(self.attention_bytes_per_s),
            attention_segment_secs: 0.0,
            integer_pages: [DType::Int8, DType::Int4].into_iter().map(|element| (element, pages(element))).collect(),
            keeping: Keeping::default(),
            pointwise_bytes_per_s: bytes_per_s.max(self.pointwise_bytes_per_s),
            sampled_logits_per_s: bytes_per_s.max(self.sampled_logits_per_s),
            step_secs: 0.0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine with round numbers, for tests here and above.
    pub fn example() -> Hardware {
        let kernels = |scale: f64| Kernels {
            matmul: BTreeMap::from([(DType::Bf16, Curve(vec![(1.0, 1e9 * scale), (64.0, 3.2e10 * scale)]))]),
            integer_matmul: BTreeMap::new(),
            attention_prefill_flops: 2e10 * scale,
            attention_decode_flops: 5e9 * scale,
            attention_bytes_per_s: 5e9 * scale,
            attention_segment_secs: 0.0,
            integer_pages: BTreeMap::new(),
            keeping: Keeping { score_secs: 1e-10, sift_secs: 5e-9, evict_secs: 2e-9, turn_secs: 2e-9 },
            pointwise_bytes_per_s: 1e10 * scale,
            sampled_logits_per_s: 1e8 * scale,
            step_secs: 1e-5,
        };
        Hardware {
            version: VERSION,
            name: "example".into(),
            source: "made up".into(),
            gpu: Some(Gpu { name: "gpu".into(), memory_bytes: 1 << 30, rehearsed: false, kernels: kernels(10.0) }),
            cpu: Cpu {
                name: "cpu".into(),
                memory_bytes: 8 << 30,
                cores: 4.0,
                dram_bytes_per_s: 2e10,
                copy_bytes_per_core_s: 5e9,
                copy_together_bytes_per_core_s: None,
                copy_step_secs: None,
                decode_bytes_per_core_s: 7e8,
                kernels: kernels(1.0),
            },
            links: Some(Links {
                h2d_bytes_per_s: 1e10,
                d2h_bytes_per_s: 1e10,
                h2d_together_bytes_per_s: 8e9,
                d2h_together_bytes_per_s: 8e9,
                step_secs: 1e-5,
            }),
            disk: Some(Disk {
                capacity_bytes: 100 << 30,
                read_bytes_per_s: 2e9,
                write_bytes_per_s: 1e9,
                read_together_bytes_per_s: 1e9,
                write_together_bytes_per_s: 5e8,
                step_secs: 1e-4,
                core_secs_per_byte: 1e-10,
            }),
            raw: Raw {
                gpu_flops: Some(1e12),
                gpu_memory_bytes_per_s: Some(2e11),
                cpu_flops: 1e11,
                cpu_int8_ops: None,
                dram_bytes_per_s: 2.5e10,
                h2d_bytes_per_s: Some(1.2e10),
                d2h_bytes_per_s: Some(1.2e10),
                disk_read_bytes_per_s: Some(2.2e9),
                disk_write_bytes_per_s: Some(1.1e9),
            },
        }
    }

    #[test]
    fn a_profile_survives_its_file() {
        let hardware = example();
        assert_eq!(Hardware::from_toml(&hardware.to_toml(), "x").unwrap(), hardware);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |change: &dyn Fn(&mut Hardware)| {
            let mut hardware = example();
            change(&mut hardware);
            Hardware::from_toml(&hardware.to_toml(), "file.toml").unwrap_err().to_string()
        };
        assert!(refused(&|hardware| hardware.version = 9).contains("`version` is 9"));
        assert!(refused(&|hardware| hardware.links = None).contains("come together"));
        assert!(refused(&|hardware| hardware.cpu.cores = 0.0).contains("`cpu.cores`"));
        assert!(refused(&|hardware| hardware.raw.gpu_flops = Some(-1.0)).contains("`raw.gpu_flops`"));
        assert!(refused(&|hardware| hardware.cpu.kernels.matmul.clear()).contains("no curve"));
        let backwards = Curve(vec![(8.0, 1.0), (2.0, 1.0)]);
        let text = refused(&|hardware| {
            hardware.cpu.kernels.matmul.insert(DType::F32, backwards.clone());
        });
        assert!(text.contains("cpu.kernels.matmul.f32"), "{text}");
        let unknown = example().to_toml().replace("cores =", "coers =");
        assert!(Hardware::from_toml(&unknown, "file.toml").unwrap_err().to_string().contains("coers"));
    }

    #[test]
    fn curves_are_bound_by_memory_below_and_by_arithmetic_above() {
        let curve = Curve(vec![(4.0, 8e9), (16.0, 16e9)]);
        assert_eq!(curve.secs_per_weight(1.0), 1e-9);
        assert_eq!(curve.secs_per_weight(4.0), 1e-9);
        assert!((curve.secs_per_weight(10.0) - 1.5e-9).abs() < 1e-20);
        assert_eq!(curve.secs_per_weight(16.0), 2e-9);
        assert_eq!(curve.secs_per_weight(32.0), 4e-9);
    }

    #[test]
    fn throttles_hold_back_and_never_push() {
        let throttles: Throttles = "h2d=2GB/s, disk_read=300MB/s".parse().unwrap();
        let hardware = example().throttled(&throttles);
        assert_eq!((hardware.rate(Link::H2d), hardware.rate(Link::DiskRead)), (2e9, 3e8));
        assert_eq!(hardware.rate(Link::D2h), 1e10);
        assert_eq!(hardware.raw.disk_read_bytes_per_s, Some(3e8));
        assert_eq!(example().throttled(&"h2d=90GB/s".parse().unwrap()), example());
        assert_eq!(throttles.to_string().parse(), Ok(throttles));
        for wrong in ["h2d", "h2d=2GB", "usb=2GB/s", "h2d=1GB/s,h2d=2GB/s", "h2d=-1GB/s", "h2d=0GB/s"] {
            assert!(wrong.parse::<Throttles>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_rehearsal_computes_and_copies_with_the_cpu() {
        let hardware = example().without_gpu().rehearsed(1 << 20);
        assert!(hardware.computes_on_cpu() && hardware.compute_tier() == Tier::Gpu);
        assert_eq!(hardware.rate(Link::H2d), 5e9);
        assert_eq!(hardware.capacity_bytes(Tier::Gpu), 1 << 20);
        hardware.validate().unwrap();
        assert!(!example().computes_on_cpu());
        let mut measured = example().without_gpu();
        measured.cpu.copy_together_bytes_per_core_s = Some(3e9);
        let links = measured.rehearsed(1 << 20).links.unwrap();
        assert_eq!((links.h2d_bytes_per_s, links.h2d_together_bytes_per_s), (5e9, 3e9));
    }

    #[test]
    fn the_ideal_is_never_slower() {
        let (real, ideal) = (example(), example().ideal());
        for link in Link::ALL {
            assert!(ideal.rate(link) >= real.rate(link));
        }
        for rows in [1.0, 3.0, 64.0, 1000.0] {
            let secs = |hardware: &Hardware| hardware.kernels().curve(DType::Bf16, false).secs_per_weight(rows);
            assert!(secs(&ideal) <= secs(&real) * (1.0 + 1e-9), "{rows}");
        }
    }
}
