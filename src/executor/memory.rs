//! Everything that a placement asks for, allocated and filled before the first token.
//!
//! **Invariant:** what is carved from each arena is what [`Placement::bytes`] says, to the byte. A place that two lanes
//! use lies behind a lock that is only ever tried: schedules order the lanes, so finding it taken is a bug.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::device::{Device, Frames};
use crate::error::{Error, Result, Tier};
use crate::kv::layout::KvLayout;
use crate::memory::arena::{Arena, Region};
use crate::memory::disk::DirectFile;
use crate::model::config::ModelConfig;
use crate::model::packed::layout::{ModelLayout, StageId};
use crate::model::packed::planes::Planes;
use crate::model::packed::{Extent, Packed};
use crate::schedule::placement::{EMBEDDING_PANELS, Placement, Ring};

use super::size::Widths;

/// What only the lane that computes touches.
pub struct Own<B> {
    /// Resident chunks of every stage of a pass.
    pub stages: Vec<B>,
    /// Parts of the head, where it stays with the device.
    pub head: Vec<B>,
    /// Parts of the embedding table, where it stays with the device and is not the head.
    pub table: Vec<B>,
    /// Small tensors by key.
    pub small: HashMap<String, B>,
    /// Pages that stay with the device.
    pub kv: Frames<B>,
    /// Hidden states of the blocks that stay with the device.
    pub hidden: Vec<B>,
    /// Activations of a block.
    pub activations: Activations<B>,
    /// Rows that are asked for logits: as gathered, and normalised.
    pub outputs: [B; 2],
    /// Their scratch.
    pub output_scratch: B,
    /// Logits.
    pub logits: B,
}

/// Activations of one block; widths in [`Widths`].
pub struct Activations<B> {
    /// Normalised rows.
    pub normed: B,
    /// Fused q, k, v.
    pub qkv: B,
    /// Attention outputs.
    pub attended: B,
    /// Gate and up.
    pub up: B,
    /// The MLP's inner rows.
    pub activated: B,
    /// What is added to the residual stream.
    pub update: B,
    /// Packed rows.
    pub scratch: B,
}

/// What lanes share.
pub struct Shared<B> {
    /// Streamed weights with the device.
    pub weights: Vec<RwLock<B>>,
    /// Slices of weights in main memory.
    pub weight_staging: Vec<RwLock<Region>>,
    /// Slices of compressed planes.
    pub planes: Vec<RwLock<Region>>,
    /// Where the compressed planes of every stage lie on disk.
    pub plane_files: Vec<Option<Planes>>,
    /// Chunks of every stage that live in main memory beside a device.
    pub cpu_stages: Vec<Region>,
    /// Where every stage lies on disk.
    pub extents: Vec<Option<Extent>>,
    /// Streamed pages with the device.
    pub kv: Vec<RwLock<Frames<B>>>,
    /// Pages between disk and device.
    pub kv_staging: Vec<RwLock<Region>>,
    /// Frames in main memory beside a device: layer by layer, page by page.
    pub kv_cpu: Vec<RwLock<Region>>,
    /// Frames on disk, likewise; after them those of sequences that are paused, page by page.
    pub kv_disk: Option<DirectFile>,
    /// Streamed hidden states with the device.
    pub hidden: Vec<RwLock<B>>,
    /// Hidden states between disk and device.
    pub hidden_staging: Vec<RwLock<Region>>,
    /// Hidden states in main memory beside a device, by block.
    pub hidden_cpu: HashMap<usize, RwLock<Region>>,
    /// Hidden states on disk, and each block's place there.
    pub hidden_disk: Option<DirectFile>,
    /// Embeddings that were looked up elsewhere.
    pub embeddings: Option<RwLock<B>>,
    /// The embedding table in main memory beside a device, where it is not the head.
    pub table_cpu: Vec<Region>,
    /// Where the parts of the embedding table lie on disk.
    pub table_extents: Vec<Option<Extent>>,
    /// Panels of the table on their way from the disk.
    pub table_panels: Option<RwLock<Region>>,
    /// A few frames, for copies from page to page.
    pub frames: Option<RwLock<Region>>,
}

/// All memory of an executor.
pub struct Memory<B> {
    /// The computing lane's.
    pub own: Own<B>,
    /// What lanes share.
    pub shared: Shared<B>,
}

/// A lock that must be free.
pub fn read<T>(place: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    place.try_read().expect("the schedule keeps a reader from a place that is written")
}

/// A lock that must be free, for writing.
pub fn write<T>(place: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    place.try_write().expect("the schedule keeps a writer from a place that is in use")
}

/// What memory is made from.
pub struct Source<'a> {
    /// The weights.
    pub packed: &'a dyn Packed,
    /// The model.
    pub config: &'a ModelConfig,
    /// Where things go.
    pub placement: &'a Placement,
    /// How pages are laid out.
    pub kv: KvLayout,
    /// Where files for pages and hidden states are made.
    pub offload: Option<&'a Path>,
}

/// Stages of a pass by name.
pub fn stage_ids(layout: &ModelLayout, placement: &Placement) -> Vec<StageId> {
    let head = if placement.head_resident { Vec::new() } else { layout.head_stages() };
    (0..placement.num_layers).map(StageId::Layer).chain(head).collect()
}

/// Allocates and fills everything. `host` is main memory beside the device's; see [`Placement::arenas`].
///
/// # Errors
/// Whatever reading the weights or making the files gives.
pub fn allocate<D: Device>(device: &mut D, host: &mut Arena, source: &Source<'_>) -> Result<Memory<D::Buffer>> {
    let placement = source.placement;
    let mut large = Large { device, host };
    let ids = stage_ids(source.packed.layout(), placement);
    // Everything that begins on a page comes first: sizes are multiples of it, so no gaps arise.
    let mut shared = Shared {
        weights: large.ring(placement.weight_slots),
        weight_staging: large.host_ring(placement.weight_staging),
        planes: large.host_ring(placement.planes),
        plane_files: Vec::new(),
        cpu_stages: Vec::new(),
        extents: Vec::new(),
        kv: Vec::new(),
        kv_staging: large.host_ring(placement.kv_staging),
        kv_cpu: Vec::new(),
        kv_disk: None,
        hidden: large.ring(placement.hidden_slots),
        hidden_staging: large.host_ring(placement.hidden_staging),
        hidden_cpu: HashMap::new(),
        hidden_disk: None,
        embeddings: None,
        table_cpu: Vec::new(),
        table_extents: Vec::new(),
        table_panels: None,
        frames: None,
    };
    let stride = placement.frame as usize;
    for memory in large.ring(placement.kv_slots) {
        let count = placement.policy.block_pages;
        let memory = memory.into_inner().expect("nobody has used it yet");
        shared.kv.push(RwLock::new(Frames { memory, layout: source.kv, stride, count }));
    }
    if placement.copied_frames() > 0 {
        shared.frames = Some(RwLock::new(large.host(placement.copied_frames() * stride)));
    }
    let mut stages = Vec::new();
    for (&id, stage) in ids.iter().zip(&placement.stages) {
        stages.push(large.device.allocate(stage.bytes(0..stage.resident) as usize));
        let bytes = stage.bytes(stage.from_cpu()) as usize;
        shared.cpu_stages.push(large.host(bytes));
        shared.extents.push(source.extent(id, stage.disk > 0)?);
        shared.plane_files.push(source.planes(id, stage.disk > 0 && placement.policy.compressed)?);
    }
    let layout = source.packed.layout();
    let tied = layout.head.is_empty();
    let mut whole = |ids: &[StageId]| -> Vec<D::Buffer> {
        ids.iter().map(|&id| large.device.allocate(layout.stage(id).bytes)).collect()
    };
    let head_ids = if placement.head_resident { layout.head_stages() } else { Vec::new() };
    let head = whole(&head_ids);
    let table_ids: Vec<StageId> = (0..layout.table.len()).map(StageId::Table).collect();
    let own_table = placement.embed == placement.compute && !tied;
    let table = whole(if own_table { &table_ids } else { &[] });
    if placement.embed == Tier::Cpu && placement.compute == Tier::Gpu && !tied {
        shared.table_cpu = table_ids.iter().map(|&id| large.host(layout.stage(id).bytes)).collect();
    }
    if placement.embed == Tier::Disk {
        let extents = table_ids.iter().map(|&id| source.extent(id, true));
        shared.table_extents = extents.collect::<Result<_>>()?;
        shared.table_panels = Some(RwLock::new(large.host(EMBEDDING_PANELS * placement.panel_room as usize)));
    }
    let layers = placement.num_layers;
    let [_, cpu_pages, disk_pages] = placement.pages;
    let resident = placement.pages[placement.compute as usize] * layers;
    let kv = Frames { memory: large.device.allocate(resident * stride), layout: source.kv, stride, count: resident };
    if placement.compute == Tier::Gpu {
        shared.kv_cpu = (0..cpu_pages * layers).map(|_| RwLock::new(large.host(stride))).collect();
    }
    let hidden_bytes = placement.hidden_block_bytes() as usize;
    let mut hidden = Vec::new();
    for (block, &tier) in placement.hidden.iter().enumerate() {
        if tier == placement.compute {
            hidden.push(large.device.allocate(hidden_bytes));
        } else if tier == Tier::Cpu {
            shared.hidden_cpu.insert(block, RwLock::new(large.host(hidden_bytes)));
        }
    }
    let scratch = |name: &str, bytes: u64| -> Result<Option<DirectFile>> {
        let directory = source.offload.ok_or_else(|| {
            Error::usage(
                format!("the placement keeps {name} on disk, but there is no place for them"),
                "name a directory with --offload-dir",
            )
        });
        if bytes == 0 { Ok(None) } else { scratch_file(directory?, name, bytes).map(Some) }
    };
    shared.kv_disk = scratch("pages", ((disk_pages + placement.policy.paused_pages) * layers * stride) as u64)?;
    let on_disk = placement.hidden.iter().filter(|&&tier| tier == Tier::Disk).count();
    shared.hidden_disk = scratch("hidden", (on_disk * hidden_bytes) as u64)?;
    let (own, embeddings) = small(device, source, Big { stages, head, table, kv, hidden });
    shared.embeddings = embeddings;
    let mut memory = Memory { own, shared };
    load(device, source, &ids, &head_ids, &table_ids, &mut memory)?;
    Ok(memory)
}

/// What begins on a page and only the computing lane touches.
struct Big<B> {
    stages: Vec<B>,
    head: Vec<B>,
    table: Vec<B>,
    kv: Frames<B>,
    hidden: Vec<B>,
}

/// Allocates what need not begin on a page.
fn small<D: Device>(
    device: &mut D,
    source: &Source<'_>,
    big: Big<D::Buffer>,
) -> (Own<D::Buffer>, Option<RwLock<D::Buffer>>) {
    let placement = source.placement;
    let widths = Widths::new(source.config, source.packed.layout());
    let rows = placement.policy.block_rows;
    let [normed, qkv, attended, up, activated, update, scratch] =
        widths.row_bytes().map(|bytes| device.allocate(rows * bytes));
    let activations = Activations { normed, qkv, attended, up, activated, update, scratch };
    let outputs = [(); 2].map(|()| device.allocate(placement.output_rows * placement.hidden_row as usize));
    let output_scratch = device.allocate(placement.output_rows * placement.hidden_row as usize);
    let logits = device.allocate(placement.logit_rows * 4 * source.config.vocab_size);
    let tensors = &source.packed.layout().small;
    let small = tensors.iter().map(|tensor| (tensor.key.clone(), device.allocate(tensor.bytes))).collect();
    let elsewhere = placement.embed != placement.compute;
    let embeddings = elsewhere.then(|| RwLock::new(device.allocate(rows * placement.embedding_row as usize)));
    let Big { stages, head, table, kv, hidden } = big;
    (Own { stages, head, table, small, kv, hidden, activations, outputs, output_scratch, logits }, embeddings)
}

impl Source<'_> {
    fn extent(&self, id: StageId, needed: bool) -> Result<Option<Extent>> {
        let extent = if needed { self.packed.extent(id)? } else { None };
        assert!(extent.is_some() || !needed, "weights stream from packed files only");
        Ok(extent)
    }

    fn planes(&self, id: StageId, needed: bool) -> Result<Option<Planes>> {
        let planes = if needed { self.packed.planes(id)? } else { None };
        assert!(planes.is_some() || !needed, "weights that stream as planes have been packed so");
        Ok(planes)
    }
}

struct Large<'a, D> {
    device: &'a mut D,
    host: &'a mut Arena,
}

impl<D: Device> Large<'_, D> {
    fn ring(&mut self, ring: Ring) -> Vec<RwLock<D::Buffer>> {
        (0..ring.count).map(|_| RwLock::new(self.device.allocate(ring.bytes as usize))).collect()
    }

    fn host_ring(&mut self, ring: Ring) -> Vec<RwLock<Region>> {
        (0..ring.count).map(|_| RwLock::new(self.host(ring.bytes as usize))).collect()
    }

    /// Main memory on a page's boundary.
    fn host(&mut self, bytes: usize) -> Region {
        self.host.carve_aligned(bytes.next_multiple_of(4096), 4096)
    }
}

/// A file without a name: it vanishes with the process.
fn scratch_file(directory: &Path, name: &str, bytes: u64) -> Result<DirectFile> {
    std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    let path = directory.join(format!("tidemill-{name}-{}.scratch", std::process::id()));
    let file = DirectFile::create(&path, bytes)?;
    std::fs::remove_file(&path).map_err(Error::io("unlink", &path))?;
    Ok(file)
}

/// Fills everything that holds weights.
fn load<D: Device>(
    device: &D,
    source: &Source<'_>,
    ids: &[StageId],
    head_ids: &[StageId],
    table_ids: &[StageId],
    memory: &mut Memory<D::Buffer>,
) -> Result<()> {
    let Memory { own, shared } = memory;
    let placement = source.placement;
    let mut bounce = Vec::new();
    let stages = ids.iter().zip(&placement.stages).zip(own.stages.iter_mut().zip(&mut shared.cpu_stages));
    for ((&id, stage), (resident, cpu)) in stages {
        fill(device, source.packed, id, 0..stage.resident, resident, &mut bounce)?;
        fill_host(source.packed, id, stage.from_cpu(), cpu)?;
    }
    for (ids, buffers) in [(head_ids, &mut own.head), (table_ids, &mut own.table)] {
        for (&id, buffer) in ids.iter().zip(buffers.iter_mut()) {
            fill(device, source.packed, id, 0..source.packed.layout().stage(id).chunks.len(), buffer, &mut bounce)?;
        }
    }
    for (&id, region) in table_ids.iter().zip(&mut shared.table_cpu) {
        fill_host(source.packed, id, 0..source.packed.layout().stage(id).chunks.len(), region)?;
    }
    for (index, tensor) in source.packed.layout().small.iter().enumerate() {
        bounce.resize(tensor.bytes, 0);
        source.packed.small(index, &mut bounce)?;
        device.copy_in(&[(&bounce, 0)], own.small.get_mut(&tensor.key).expect("allocated from this list"))?;
    }
    Ok(())
}

/// Chunks of a stage to a device, each where its extent has it, counted from the first.
fn fill<D: Device>(
    device: &D,
    packed: &dyn Packed,
    id: StageId,
    chunks: std::ops::Range<usize>,
    to: &mut D::Buffer,
    bounce: &mut Vec<u8>,
) -> Result<()> {
    let stage = packed.layout().stage(id);
    for chunk in chunks.clone() {
        let (offset, len) = (stage.chunks[chunk].offset - stage.chunks[chunks.start].offset, stage.chunks[chunk].bytes);
        match device.bytes_mut(to) {
            Some(bytes) => packed.chunk(id, chunk, &mut bytes[offset..offset + len])?,
            None => {
                bounce.resize(len, 0);
                packed.chunk(id, chunk, bounce)?;
                device.copy_in(&[(bounce, offset)], to)?;
            }
        }
    }
    Ok(())
}

fn fill_host(packed: &dyn Packed, id: StageId, chunks: std::ops::Range<usize>, to: &mut Region) -> Result<()> {
    let stage = packed.layout().stage(id);
    for chunk in chunks.clone() {
        let (offset, len) = (stage.chunks[chunk].offset - stage.chunks[chunks.start].offset, stage.chunks[chunk].bytes);
        packed.chunk(id, chunk, &mut to.bytes_mut()[offset..offset + len])?;
    }
    Ok(())
}
