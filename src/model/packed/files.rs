//! The files of a packed directory: which block lies where, and the safetensors header that says so.
//!
//! A file's data is one extent that begins on a 4 KiB boundary: the header is padded with spaces, and what lies between
//! two blocks is a tensor of its own.
//!
//! **Invariant:** a file's header and extents follow from the layout alone (and for compressed planes from their
//! lengths), so a reader can compare them.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Packed;
use super::layout::{CHUNK_ALIGNMENT, ChunkLayout, ModelLayout, Small, StageId, StageLayout};
use super::manifest::{damaged, damaged_planes};
use super::panels::{PANEL_OUTPUTS, TILE_INPUTS, panel_bytes};
use crate::error::{Error, Result};
use crate::model::dtype::DType;

/// Bytes of a part, unless a single block is larger.
const PART_BYTES: usize = 32 << 20;

/// A file to be written, or expected.
pub(super) struct FilePlan {
    /// Its name within the directory.
    pub name: String,
    /// What it holds.
    pub holds: Holds,
    /// Everything before the data.
    pub header: Vec<u8>,
    /// The blocks in order.
    pub blocks: Vec<Block>,
    /// Bytes of the data.
    pub data_bytes: usize,
}

/// What a file's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// The chunks of a stage.
    Stage(StageId),
    /// The small tensors.
    Small,
    /// The compressed planes of a stage's chunks.
    Planes(StageId),
}

impl Holds {
    /// Makes the error for a file that does not hold what it should, of directory, file and what is wrong.
    pub fn damaged(self) -> fn(&Path, &Path, String) -> Error {
        match self {
            Holds::Planes(_) => damaged_planes,
            Holds::Stage(_) | Holds::Small => damaged,
        }
    }
}

/// A tensor of the file.
pub(super) struct Block {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    /// Its place in the data.
    pub extent: Range<usize>,
}

/// Consecutive blocks that are written or read together.
pub(super) struct Part {
    /// Which.
    pub blocks: Range<usize>,
    /// Their extent in the file, holes included.
    pub bytes: Range<usize>,
}

impl FilePlan {
    /// The blocks in parts of some megabytes, or a block each where they are larger.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let start = self.header.len() + block.extent.start;
            let end = self.header.len() + block.extent.end.next_multiple_of(CHUNK_ALIGNMENT);
            match parts.last_mut() {
                Some(part) if end - part.bytes.start <= PART_BYTES => {
                    part.blocks.end = index + 1;
                    part.bytes.end = end;
                }
                _ => parts.push(Part { blocks: index..index + 1, bytes: start..end }),
            }
        }
        parts
    }

    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        (self.header.len() + self.data_bytes) as u64
    }

    /// Where block `index` begins in the file.
    pub fn file_offset(&self, index: usize) -> u64 {
        (self.header.len() + self.blocks[index].extent.start) as u64
    }

    /// Writes block `index` of `packed` to `out`.
    pub fn fill(&self, packed: &dyn Packed, index: usize, out: &mut [u8]) -> Result<()> {
        match self.holds {
            Holds::Stage(stage) => packed.chunk(stage, index, out),
            Holds::Small => packed.small(index, out),
            Holds::Planes(_) => unreachable!("planes are made of chunks that are there already"),
        }
    }

    fn new(name: String, holds: Holds, blocks: Vec<Block>, data_bytes: usize) -> FilePlan {
        let header = header(&blocks, data_bytes, 0);
        FilePlan { name, holds, header, blocks, data_bytes }
    }
}

/// Every file of a layout.
pub(super) fn plans(layout: &ModelLayout) -> Vec<FilePlan> {
    let stages = layout.stages().map(|(id, stage)| {
        let blocks = stage.chunks.iter().map(|chunk| chunk_block(id, stage, chunk)).collect();
        FilePlan::new(format!("{}.safetensors", stage_name(id)), Holds::Stage(id), blocks, stage.bytes)
    });
    let mut at = 0;
    let mut blocks = Vec::new();
    for tensor in &layout.small {
        let (dtype, shape) = match &tensor.what {
            Small::Vector(_) => ("F32".into(), vec![tensor.bytes / 4]),
            Small::Matrix(linear, dtype) => stored(*dtype, linear.outputs.div_ceil(PANEL_OUTPUTS), linear.inputs),
        };
        let name = tensor.key.clone();
        blocks.push(Block { name, dtype, shape, extent: at..at + tensor.bytes });
        at = (at + tensor.bytes).next_multiple_of(CHUNK_ALIGNMENT);
    }
    let small = FilePlan::new("small.safetensors".into(), Holds::Small, blocks, at);
    stages.chain([small]).collect()
}

/// The file of a stage's compressed planes, whose codes have `lengths`.
///
/// Its header takes as many bytes whatever they are, so that it can be written last.
pub(super) fn planes_plan(id: StageId, stage: &StageLayout, lengths: &[usize]) -> FilePlan {
    let largest: Vec<usize> = stage.chunks.iter().map(|chunk| chunk.bytes).collect();
    let (blocks, data_bytes) = planes_blocks(id, stage, &largest);
    // The longest name, number and punctuation of a hole, for every block.
    let room = header(&blocks, data_bytes, 0).len() + 128 * blocks.len();
    let (blocks, data_bytes) = planes_blocks(id, stage, lengths);
    let header = header(&blocks, data_bytes, room.next_multiple_of(CHUNK_ALIGNMENT));
    let name = format!("{}.planes.safetensors", stage_name(id));
    FilePlan { name, holds: Holds::Planes(id), header, blocks, data_bytes }
}

/// The codes of a stage's chunks, one after the other, and the bytes of all.
fn planes_blocks(id: StageId, stage: &StageLayout, lengths: &[usize]) -> (Vec<Block>, usize) {
    let mut at = 0;
    let blocks = stage.chunks.iter().zip(lengths).map(|(chunk, &len)| {
        let name = format!("{}.planes", chunk_name(id, chunk));
        let extent = at..at + len;
        at = extent.end.next_multiple_of(CHUNK_ALIGNMENT);
        Block { name, dtype: "U8".into(), shape: vec![len], extent }
    });
    let blocks = blocks.collect();
    (blocks, at)
}

fn stage_name(id: StageId) -> String {
    match id {
        StageId::Table(part) => format!("table-{part:03}"),
        StageId::Layer(layer) => format!("layer-{layer:03}"),
        StageId::Head(part) => format!("head-{part:03}"),
    }
}

/// How panels are declared: dtype and shape. The format knows no groups, so of integers these are bytes.
fn stored(dtype: DType, panels: usize, inputs: usize) -> (String, Vec<usize>) {
    match dtype {
        DType::Int8 | DType::Int4 => ("U8".into(), vec![panels, panel_bytes(inputs, dtype)]),
        plain => (plain.to_string().to_uppercase(), vec![panels, inputs.next_multiple_of(TILE_INPUTS), PANEL_OUTPUTS]),
    }
}

fn chunk_name(id: StageId, chunk: &ChunkLayout) -> String {
    let name = match id {
        StageId::Table(_) => "table",
        StageId::Layer(_) => ["qkv", "o", "up", "down"][chunk.matrix],
        StageId::Head(_) => "head",
    };
    format!("{name}.panels.{}", chunk.panels.start)
}

fn chunk_block(id: StageId, stage: &StageLayout, chunk: &ChunkLayout) -> Block {
    let matrix = &stage.matrices[chunk.matrix];
    let (dtype, shape) = stored(matrix.dtype, chunk.panels.len(), matrix.source.inputs);
    Block { name: chunk_name(id, chunk), dtype, shape, extent: chunk.offset..chunk.offset + chunk.bytes }
}

/// The header, of at least `room` bytes, a multiple of the alignment.
fn header(blocks: &[Block], data_bytes: usize, room: usize) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "tidemill"}));
    let hole = |map: &mut Map<String, Value>, extent: Range<usize>| {
        if !extent.is_empty() {
            let entry = json!({"dtype": "U8", "shape": [extent.len()], "data_offsets": [extent.start, extent.end]});
            map.insert(format!("hole.{}", extent.start), entry);
        }
    };
    let mut at = 0;
    for Block { name, dtype, shape, extent } in blocks {
        hole(&mut map, at..extent.start);
        map.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [extent.start, extent.end]}));
        at = extent.end;
    }
    hole(&mut map, at..data_bytes);
    let json = Value::Object(map).to_string();
    let len = (8 + json.len()).next_multiple_of(CHUNK_ALIGNMENT).max(room);
    let mut header = ((len - 8) as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header.resize(len, b' ');
    header
}
