//! A policy in whole numbers: which chunk, page and block lives where, and what that takes.
//!
//! **Invariant:** this is the only place where shares become bytes; what the planner predicts, what is compared with
//! the budgets and what the executor allocates are the numbers made here.

use crate::error::Tier;
use crate::policy::Policy;

/// Slices of weights between disk and device that may be under way at once.
const STAGING_SLICES: usize = 4;
/// Bytes of such a slice, unless a chunk is larger.
const STAGING_BYTES: u64 = 32 << 20;
/// Bytes of pages that are brought to files, and back, at once, unless a layer of one is more.
const COPIED_BYTES: u64 = 4 << 20;
/// Logits of one block of rows stay below this where the head is resident.
const LOGIT_BYTES: u64 = 64 << 20;
/// Panels of an embedding table that are read from disk at once.
pub const EMBEDDING_PANELS: usize = 16;
/// Large things start on a boundary of this many bytes.
const LARGE: u64 = 4096;
/// Small things do on this.
const SMALL: u64 = 64;

/// What a placement needs to know about a model: bytes of everything that is placed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelBytes {
    /// Padded bytes of every chunk of every decoder layer.
    pub layers: Vec<Vec<u64>>,
    /// Padded bytes of every chunk of every part of the head (or of the table, where it serves).
    pub head: Vec<Vec<u64>>,
    /// Padded bytes of the embedding table.
    pub table: u64,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Bytes of what always stays with the device, each tensor padded to 64.
    pub small: u64,
    /// Bytes of one layer of one KV page, padded to 4 KiB.
    pub frame: u64,
    /// Bytes per row of every activation buffer of a block.
    pub activations: Vec<u64>,
    /// Bytes of a row's embedding.
    pub embedding_row: u64,
    /// Bytes of a row's hidden state.
    pub hidden_row: u64,
    /// Bytes of a row's logits.
    pub logit_row: u64,
    /// What the device works in, besides.
    pub workspace: Workspace,
}

/// What a device works in, besides what is placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// Bytes of its own memory.
    pub device: u64,
    /// Bytes of lists that it is handed: as many of its memory as of main memory beside it.
    pub lists: u64,
    /// The same for every row of a block.
    pub lists_row: u64,
}

impl Workspace {
    /// The workspace of blocks of `rows`, in bytes: of the device's memory alone, and of lists.
    pub fn bytes(&self, rows: usize) -> (u64, u64) {
        (large(self.device), large(self.lists + rows as u64 * self.lists_row))
    }
}

impl ModelBytes {
    /// Rows that meet a resident head together: few, so that their logits take little memory.
    pub fn logit_rows(&self) -> usize {
        (LOGIT_BYTES / self.logit_row.max(1)).clamp(1, 64) as usize
    }
}

/// How a stage's weights lie. Resident chunks come first, then those in main memory, then those on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePlacement {
    /// Chunks that stay with the device.
    pub resident: usize,
    /// Chunks in main memory; 0 where main memory is where things are computed.
    pub cpu: usize,
    /// Chunks on disk.
    pub disk: usize,
    /// Padded bytes of every chunk.
    pub chunks: Vec<u64>,
}

impl StagePlacement {
    /// Padded bytes of some chunks.
    pub fn bytes(&self, chunks: std::ops::Range<usize>) -> u64 {
        self.chunks[chunks].iter().sum()
    }

    /// The chunks that are brought in for a pass.
    pub fn streamed(&self) -> std::ops::Range<usize> {
        self.resident..self.chunks.len()
    }

    /// The streamed chunks that come from main memory.
    pub fn from_cpu(&self) -> std::ops::Range<usize> {
        self.resident..self.resident + self.cpu
    }

    /// The streamed chunks that come from the disk.
    pub fn from_disk(&self) -> std::ops::Range<usize> {
        self.resident + self.cpu..self.chunks.len()
    }
}

/// A few equal places that are used in turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// How many.
    pub count: usize,
    /// Bytes of each.
    pub bytes: u64,
}

impl Ring {
    fn new(count: usize, bytes: u64) -> Self {
        if bytes == 0 { Ring::default() } else { Ring { count, bytes: large(bytes) } }
    }

    fn total(&self) -> u64 {
        self.count as u64 * self.bytes
    }
}

/// The tier of a page, of a pool that has so many in each.
pub fn tier_of([gpu, cpu, _]: &[usize; 3], page: usize) -> Tier {
    if page < *gpu {
        Tier::Gpu
    } else if page < gpu + cpu {
        Tier::Cpu
    } else {
        Tier::Disk
    }
}

/// Everything's place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Where things are computed: `Gpu` (real or rehearsed) or `Cpu`.
    pub compute: Tier,
    /// The policy that was rounded.
    pub policy: Policy,
    /// Stages of a pass in order: decoder layers, then parts of the head if it is streamed.
    pub stages: Vec<StagePlacement>,
    /// How many of them are decoder layers.
    pub num_layers: usize,
    /// Whether the head stays with the device.
    pub head_resident: bool,
    /// Where the embedding table lies.
    pub embed: Tier,
    /// Pages by tier: gpu, cpu, disk.
    pub pages: [usize; 3],
    /// Where the hidden state of each block lives between layers.
    pub hidden: Vec<Tier>,
    /// Rows that may be asked for logits in a pass.
    pub output_rows: usize,
    /// Rows whose logits are computed together.
    pub logit_rows: usize,
    /// Bytes of one layer of one KV page.
    pub frame: u64,
    /// Bytes of the hidden state of a row.
    pub hidden_row: u64,
    /// Bytes of a row's embedding.
    pub embedding_row: u64,
    /// Bytes that a panel of the embedding table takes when it is read on its own.
    pub panel_room: u64,
    /// Streamed weights with the device.
    pub weight_slots: Ring,
    /// Slices of weights in main memory between disk and device.
    pub weight_staging: Ring,
    /// Slices of compressed planes in main memory.
    pub planes: Ring,
    /// Streamed pages with the device.
    pub kv_slots: Ring,
    /// Pages in main memory between disk and device.
    pub kv_staging: Ring,
    /// Streamed hidden states with the device.
    pub hidden_slots: Ring,
    /// Hidden states in main memory between disk and device.
    pub hidden_staging: Ring,
    /// Bytes that the device works in: of its memory alone, and of lists, of which main memory has as many.
    pub workspace: (u64, u64),
    /// What it takes, by tier: gpu, cpu, disk (scratch alone; packed weights are not counted).
    pub bytes: [u64; 3],
}

impl Placement {
    /// Rounds `policy` for `model`, computed in `compute`.
    ///
    /// Shares of the gpu count as shares of the cpu where the cpu computes.
    pub fn new(model: &ModelBytes, policy: &Policy, compute: Tier) -> Self {
        let share = |split: &crate::policy::Split| match compute {
            Tier::Cpu => crate::policy::Split { gpu: 0.0, cpu: split.gpu + split.cpu, disk: split.disk },
            _ => *split,
        };
        let here = |tier: Tier| if compute == Tier::Cpu && tier == Tier::Gpu { Tier::Cpu } else { tier };
        let (mut embed, head) = (here(policy.embed), here(policy.head));
        let head_resident = head == compute || (model.tied && embed == compute);
        if model.tied {
            embed = if head_resident { compute } else { head };
        }
        let mut stages = split_layers(&model.layers, &share(&policy.weights), compute);
        if !head_resident {
            stages.extend(model.head.iter().map(|chunks| {
                let count = chunks.len();
                let (cpu, disk) = if head == Tier::Cpu { (count, 0) } else { (0, count) };
                StagePlacement { resident: 0, cpu, disk, chunks: chunks.clone() }
            }));
        }
        let pages = share(&policy.kv).round(policy.pages);
        let hidden = split_blocks(share(&policy.hidden).round(policy.blocks));
        let rows = policy.blocks * policy.block_rows;
        let output_rows = rows.min(policy.sequences.max(64));
        let logit_rows = if head_resident { output_rows.min(model.logit_rows()) } else { output_rows };
        let mut placement = Placement {
            compute,
            policy: policy.clone(),
            stages,
            num_layers: model.layers.len(),
            head_resident,
            embed,
            pages,
            hidden,
            output_rows,
            logit_rows,
            frame: model.frame,
            hidden_row: model.hidden_row,
            embedding_row: model.embedding_row,
            // A panel has 16 rows of four bytes an element at most; alignment may add a page at either end.
            panel_room: large(16 * model.embedding_row) + 2 * LARGE,
            weight_slots: Ring::default(),
            weight_staging: Ring::default(),
            planes: Ring::default(),
            kv_slots: Ring::default(),
            kv_staging: Ring::default(),
            hidden_slots: Ring::default(),
            hidden_staging: Ring::default(),
            workspace: model.workspace.bytes(policy.block_rows),
            bytes: [0; 3],
        };
        placement.make_rings(model);
        placement.bytes = Tier::ALL.map(|tier| placement.sum(model, tier));
        placement
    }

    fn make_rings(&mut self, model: &ModelBytes) {
        let device = self.compute == Tier::Gpu;
        let most = |bytes: &dyn Fn(&StagePlacement) -> u64| self.stages.iter().map(bytes).max().unwrap_or(0);
        let streamed = most(&|stage| stage.bytes(stage.streamed()));
        let from_disk = most(&|stage| stage.bytes(stage.from_disk()));
        let chunk = most(&|stage| stage.chunks[stage.from_disk()].iter().copied().max().unwrap_or(0));
        self.weight_slots = Ring::new(self.policy.weight_slots, streamed);
        let slice = from_disk.min(STAGING_BYTES).max(chunk);
        if device {
            self.weight_staging = Ring::new(STAGING_SLICES, slice);
        }
        if self.policy.compressed {
            // A layer and a half: the disk goes on while the CPU computes a layer and decodes nothing.
            let slices = (3 * from_disk).div_ceil(2 * slice.max(1)) as usize + 1;
            self.planes = Ring::new(slices, slice);
        }
        let elsewhere = |tier: Tier| self.pages[tier as usize] > 0 && tier != self.compute;
        let block = self.policy.block_pages as u64 * self.frame;
        if elsewhere(Tier::Cpu) || elsewhere(Tier::Disk) {
            self.kv_slots = Ring::new(self.policy.kv_slots, block);
        }
        if device && elsewhere(Tier::Disk) {
            self.kv_staging = Ring::new(self.policy.kv_slots, block);
        }
        let hidden = self.policy.block_rows as u64 * model.hidden_row;
        if self.hidden.iter().any(|&tier| tier != self.compute) {
            self.hidden_slots = Ring::new(self.policy.kv_slots, hidden);
        }
        if device && self.hidden.contains(&Tier::Disk) {
            self.hidden_staging = Ring::new(self.policy.kv_slots, hidden);
        }
    }

    /// Bytes that everything in `tier` takes.
    fn sum(&self, model: &ModelBytes, tier: Tier) -> u64 {
        let mut bytes = 0;
        let paused = if tier == Tier::Disk { self.policy.paused_pages } else { 0 };
        let pages = self.pages[tier as usize] + paused;
        bytes += large(pages as u64 * self.num_layers as u64 * self.frame);
        let hidden = self.hidden_block_bytes();
        bytes += self.hidden.iter().filter(|&&place| place == tier).count() as u64 * hidden;
        if tier != Tier::Disk {
            let weights = |stage: &StagePlacement| match tier {
                tier if tier == self.compute => stage.bytes(0..stage.resident),
                _ => stage.bytes(stage.from_cpu()),
            };
            bytes += self.stages.iter().map(weights).sum::<u64>();
            // A tied table that streams as the head has been counted with the stages.
            let table_counted = model.tied && !self.head_resident;
            if self.embed == tier && !table_counted {
                bytes += model.table;
            }
        }
        if tier == self.compute {
            if self.head_resident && !model.tied {
                bytes += model.head.iter().flatten().sum::<u64>();
            }
            bytes += self.weight_slots.total() + self.kv_slots.total() + self.hidden_slots.total();
            bytes += model.small + self.activation_bytes(model);
            let (workspace, lists) = self.workspace;
            bytes += workspace + lists;
        }
        if tier == Tier::Cpu {
            bytes += self.transit();
        }
        bytes
    }

    /// Bytes of main memory that things pass through.
    fn transit(&self) -> u64 {
        let staging = self.weight_staging.total() + self.kv_staging.total() + self.hidden_staging.total();
        let frames = self.copied_frames() as u64 * self.frame;
        let panels = if self.embed == Tier::Disk { EMBEDDING_PANELS as u64 * self.panel_room } else { 0 };
        let lists = if self.compute == Tier::Gpu { self.workspace.1 } else { 0 };
        lists + staging + self.planes.total() + frames + panels
    }

    /// Bytes of the arena of the device, and of main memory beside it. Where the CPU computes both are main memory.
    pub fn arenas(&self) -> (u64, u64) {
        match self.compute {
            Tier::Cpu => (self.bytes[1] - self.transit(), self.transit()),
            _ => (self.bytes[0], self.bytes[1]),
        }
    }

    /// Bytes of the hidden state of a block.
    pub fn hidden_block_bytes(&self) -> u64 {
        large(self.policy.block_rows as u64 * self.hidden_row)
    }

    fn activation_bytes(&self, model: &ModelBytes) -> u64 {
        let small = |bytes: u64| bytes.next_multiple_of(SMALL);
        let rows = self.policy.block_rows as u64;
        let block: u64 = model.activations.iter().map(|row| small(rows * row)).sum();
        let outputs = 3 * small(self.output_rows as u64 * model.hidden_row);
        let logits = small(self.logit_rows as u64 * model.logit_row);
        let embeddings = if self.embed == self.compute { 0 } else { small(rows * model.embedding_row) };
        block + outputs + logits + embeddings
    }

    /// Rows of a pass, at most.
    pub fn rows(&self) -> usize {
        self.policy.blocks * self.policy.block_rows
    }

    /// Pages of the cache, over all tiers.
    pub fn total_pages(&self) -> usize {
        self.pages.iter().sum()
    }

    /// Pages that a block can have brought in for a layer; no limit where all are there.
    pub fn most_block_pages(&self) -> usize {
        if self.pages[self.compute as usize] == self.total_pages() { usize::MAX } else { self.policy.block_pages }
    }

    /// Layers of pages that are copied together where pages are copied through main memory.
    pub fn copied_frames(&self) -> usize {
        match (self.policy.paused_pages, self.kv_slots.count) {
            (0, 0) => 0,
            (0, _) => 1,
            (pages, _) => ((COPIED_BYTES / self.frame.max(1)) as usize).clamp(1, pages * self.num_layers),
        }
    }

    /// The tier that a page lives in: the first pages with the device, then those in main memory, then on disk; there
    /// also lie the pages after them, of those who are paused.
    pub fn page_tier(&self, page: usize) -> Tier {
        tier_of(&self.pages, page)
    }

    /// The number, within its tier, of the frame that holds a layer of a page: layer by layer, but page by page of
    /// those who are paused, which are copied whole.
    pub fn frame_of(&self, layer: usize, page: usize) -> usize {
        let [gpu, cpu, disk] = self.pages;
        match page.checked_sub(gpu + cpu + disk) {
            Some(paused) => (disk + paused) * self.num_layers + layer,
            None if page < gpu => layer * gpu + page,
            None if page < gpu + cpu => layer * cpu + page - gpu,
            None => layer * disk + page - gpu - cpu,
        }
    }

    /// Whether anything is on disk while passes run.
    pub fn uses_disk(&self) -> bool {
        self.reads_weights() || self.pages[Tier::Disk as usize] > 0 || self.hidden.contains(&Tier::Disk)
    }

    /// Whether weights come from packed files while passes run.
    pub fn reads_weights(&self) -> bool {
        self.embed == Tier::Disk || self.stages.iter().any(|stage| stage.disk > 0)
    }

    /// Whether some of them are read as compressed planes.
    pub fn reads_planes(&self) -> bool {
        self.policy.compressed && self.stages.iter().any(|stage| stage.disk > 0)
    }

    /// Bytes of weights that come from main memory and from disk for every pass.
    pub fn streamed_bytes(&self) -> (u64, u64) {
        let cpu = self.stages.iter().map(|stage| stage.bytes(stage.from_cpu())).sum();
        let disk = self.stages.iter().map(|stage| stage.bytes(stage.from_disk())).sum();
        (cpu, disk)
    }
}

fn large(bytes: u64) -> u64 {
    bytes.next_multiple_of(LARGE)
}

/// Layers in shares, the rounding spread so that every layer streams about as much as the others.
fn split_layers(layers: &[Vec<u64>], share: &crate::policy::Split, compute: Tier) -> Vec<StagePlacement> {
    let cpu_share = if compute == Tier::Cpu { 0.0 } else { share.cpu };
    // Chunks of a share among the first `chunks`; what is left over by shares of exactly one stays with the device.
    let upto = |share: f64, chunks: usize| (share * chunks as f64 + 0.5).floor() as usize;
    let (mut before, mut taken) = (0, [0, 0]);
    let stages = layers.iter().map(|chunks| {
        before += chunks.len();
        let streamed = upto(cpu_share + share.disk, before).saturating_sub(taken[0] + taken[1]).min(chunks.len());
        let disk = upto(share.disk, before).saturating_sub(taken[1]).min(streamed);
        let cpu = if cpu_share > 0.0 { streamed - disk } else { 0 };
        taken = [taken[0] + cpu, taken[1] + disk];
        StagePlacement { resident: chunks.len() - cpu - disk, cpu, disk, chunks: chunks.clone() }
    });
    stages.collect()
}

/// The tiers of blocks, given how many live in each.
fn split_blocks(counts: [usize; 3]) -> Vec<Tier> {
    Tier::ALL.into_iter().zip(counts).flat_map(|(tier, count)| std::iter::repeat_n(tier, count)).collect()
}
