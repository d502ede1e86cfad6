//! The alphabet of schedules: lanes, slots, steps.
//!
//! **Invariant:** a step is one unit of work on one lane, coarse (stage x block x lane, never a single kernel), and
//! names every slot that it reads and writes. Steps are plain values: they compare, and print as one line each.

use std::fmt;

use crate::error::Tier;

/// What works in order, beside the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Files to main memory.
    DiskRead,
    /// Main memory to files.
    DiskWrite,
    /// Main memory to the device.
    H2d,
    /// The device to main memory.
    D2h,
    /// Computation on the device (rehearsed by the CPU where there is none).
    Gpu,
    /// Computation on the CPU.
    Cpu,
}

impl Lane {
    /// All lanes.
    pub const ALL: [Lane; 6] = [Lane::DiskRead, Lane::DiskWrite, Lane::H2d, Lane::D2h, Lane::Gpu, Lane::Cpu];

    /// The lane's place in [`Lane::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The lane's name in traces, statistics and flags.
    pub fn name(self) -> &'static str {
        match self {
            Lane::DiskRead => "disk_read",
            Lane::DiskWrite => "disk_write",
            Lane::H2d => "h2d",
            Lane::D2h => "d2h",
            Lane::Gpu => "gpu",
            Lane::Cpu => "cpu",
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A place that steps read and write. Lanes meet only here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    /// Streamed weights of a stage, with the device.
    Weights(u32),
    /// A slice of weights in main memory, on its way from the disk to the device.
    WeightsStaging(u32),
    /// Compressed planes of a slice of weights in main memory, before they are decoded.
    Planes(u32),
    /// Streamed KV pages of a block, with the device.
    Kv(u32),
    /// Pages of a block in main memory, between disk and device.
    KvStaging(u32),
    /// The pages of a layer that live in a tier, as written by passes of one parity.
    KvHome(Tier, u32, u32),
    /// Hidden state of a block, with the device.
    Hidden(u32),
    /// Hidden state of a block in main memory, between disk and device.
    HiddenStaging(u32),
    /// Hidden state of a block where it lives between layers.
    HiddenHome(u32),
    /// Embeddings of a block's tokens, from a table that lies elsewhere.
    Embeddings,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Weights(i) => write!(f, "w{i}"),
            Slot::WeightsStaging(i) => write!(f, "ws{i}"),
            Slot::Planes(i) => write!(f, "wp{i}"),
            Slot::Kv(i) => write!(f, "kv{i}"),
            Slot::KvStaging(i) => write!(f, "ks{i}"),
            Slot::KvHome(tier, layer, parity) => write!(f, "kv@{tier}.{layer}.{parity}"),
            Slot::Hidden(i) => write!(f, "h{i}"),
            Slot::HiddenStaging(i) => write!(f, "hs{i}"),
            Slot::HiddenHome(block) => write!(f, "h@{block}"),
            Slot::Embeddings => f.write_str("emb"),
        }
    }
}

/// Up to six slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    slots: [Option<Slot>; 6],
}

impl Slots {
    /// No slots.
    pub fn none() -> Self {
        Slots::default()
    }

    /// One more slot.
    ///
    /// # Panics
    /// If there are six already.
    #[must_use]
    pub fn and(mut self, slot: Slot) -> Self {
        let free = self.slots.iter_mut().find(|place| place.is_none());
        *free.expect("a step names six slots at most") = Some(slot);
        self
    }

    /// The slots.
    pub fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.slots.iter().flatten().copied()
    }
}

impl From<Slot> for Slots {
    fn from(slot: Slot) -> Self {
        Slots::none().and(slot)
    }
}

impl fmt::Display for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, slot) in self.iter().enumerate() {
            write!(f, "{}{slot}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Weights from the disk: chunks `from..to` of a stage.
    ReadWeights {
        /// First chunk.
        from: u32,
        /// One past the last.
        to: u32,
    },
    /// Compressed planes of the last `ReadWeights` into weights.
    DecodeWeights {
        /// First chunk.
        from: u32,
        /// One past the last.
        to: u32,
    },
    /// Weights from main memory to the device: chunks `from..to` of a stage.
    LoadWeights {
        /// First chunk.
        from: u32,
        /// One past the last.
        to: u32,
    },
    /// Pages of a block from the disk.
    ReadKv,
    /// Pages of a block from main memory to the device.
    LoadKv,
    /// Pages that a block wrote, from the device to main memory.
    StoreKv,
    /// Pages that a block wrote, to the disk.
    WriteKv,
    /// Hidden state from the disk.
    ReadHidden,
    /// Hidden state from main memory to the device.
    LoadHidden,
    /// Hidden state from the device to main memory.
    StoreHidden,
    /// Hidden state to the disk.
    WriteHidden,
    /// Embeddings of a block's tokens to the device, from a table in main memory or on disk.
    LoadEmbeddings,
    /// A block's first hidden state.
    Embed,
    /// One decoder layer of a block.
    Layer,
    /// Rows of a block that are asked for logits.
    Gather,
    /// Logits of a part of the vocabulary, and after the last part the samples.
    Head,
}

impl Op {
    /// Its name in steps and traces.
    pub fn name(self) -> &'static str {
        match self {
            Op::ReadWeights { .. } => "read_weights",
            Op::DecodeWeights { .. } => "decode_weights",
            Op::LoadWeights { .. } => "load_weights",
            Op::ReadKv => "read_kv",
            Op::LoadKv => "load_kv",
            Op::StoreKv => "store_kv",
            Op::WriteKv => "write_kv",
            Op::ReadHidden => "read_hidden",
            Op::LoadHidden => "load_hidden",
            Op::StoreHidden => "store_hidden",
            Op::WriteHidden => "write_hidden",
            Op::LoadEmbeddings => "load_embeddings",
            Op::Embed => "embed",
            Op::Layer => "layer",
            Op::Gather => "gather",
            Op::Head => "head",
        }
    }
}

/// One unit of work on one lane. A lane runs in order; lanes meet only through slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it runs.
    pub lane: Lane,
    /// What it does.
    pub op: Op,
    /// The stage of the pass (layers, then parts of a streamed head) that it belongs to.
    pub stage: u32,
    /// The block that it belongs to.
    pub block: u32,
    /// Slots that it reads.
    pub reads: Slots,
    /// Slots that it writes.
    pub writes: Slots,
    /// Bytes that it moves; 0 for computation.
    pub bytes: u64,
}

impl fmt::Display for Step {
    /// `h2d load_weights 3..5 L12 b3 ws1 -> w0`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {}", self.lane.name(), self.op.name())?;
        if let Op::ReadWeights { from, to } | Op::DecodeWeights { from, to } | Op::LoadWeights { from, to } = self.op {
            write!(f, " {from}..{to}")?;
        }
        write!(f, " L{} b{}", self.stage, self.block)?;
        let shown = |slots: &Slots| if slots.iter().next().is_none() { "-".to_owned() } else { slots.to_string() };
        if self.reads != Slots::none() || self.writes != Slots::none() {
            write!(f, "  {} -> {}", shown(&self.reads), shown(&self.writes))?;
        }
        Ok(())
    }
}
