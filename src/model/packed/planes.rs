//! Compressed planes beside the packed files: the same chunks, shorter, for placements that read them from disk.
//!
//! A stage has a file of planes where all its matrices are bf16. They are made of packed files that are there, and are
//! listed in a file of their own, so that a pack is whole with or without them, and while they are being written.
//!
//! **Invariant:** a file that the list names is complete, and each of its codes has been decoded and compared.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::files::planes_plan;
use super::journal::{Journal, Noted};
use super::layout::{CHUNK_ALIGNMENT, ModelLayout, StageId, StageLayout};
use super::manifest::{FileEntry, Identity, PLANES, checksum};
use super::read::{PackedFile, PackedModel, is_intact};
use super::write::{Outcome, Progress, SLACK_BYTES, Step, TEMPORARY, refuse};
use crate::durable::{self, Lock, with_suffix};
use crate::error::{Bytes, Error, Result, Tier};
use crate::memory::arena::Arena;
use crate::memory::disk::{self, DirectFile, DiskQueue, How, Write};
use crate::model::dtype::DType;
use crate::quant::planes;

/// Bytes that are written together, or one code where that is longer.
const BATCH_BYTES: usize = 32 << 20;

/// A finished file of planes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanesEntry {
    file: FileEntry,
    /// Bytes of each chunk's code.
    lengths: Vec<usize>,
}

/// How thoroughly files that are there already are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Every code is compared with its checksum.
    Verify,
    /// Names and lengths will do.
    Lengths,
}

/// The compressed planes of a stage, in a file.
pub struct Planes {
    packed: Arc<PackedFile>,
}

impl Planes {
    /// The file.
    pub fn file(&self) -> &DirectFile {
        self.packed.direct()
    }

    /// Where the code of a chunk lies in the file. It begins on a multiple of the chunks' alignment.
    pub fn code(&self, chunk: usize) -> Range<u64> {
        self.packed.place(chunk)
    }

    /// What is read for some chunks: whole pages, never longer than the chunks themselves.
    pub fn extent(&self, chunks: &Range<usize>) -> Range<u64> {
        self.code(chunks.start).start..self.code(chunks.end - 1).end.next_multiple_of(CHUNK_ALIGNMENT as u64)
    }

    /// Compares the code that was read of a chunk with what was written.
    ///
    /// # Errors
    /// `Error::Model` naming file and offset.
    pub fn check(&self, chunk: usize, code: &[u8]) -> Result<()> {
        self.packed.check(chunk, code)
    }

    /// Turns the code of a chunk into its weights, on the current pool.
    ///
    /// # Errors
    /// `Error::Model` naming file and offset when it is damaged.
    pub fn decode(&self, chunk: usize, code: &[u8], out: &mut [u8]) -> Result<()> {
        planes::decode(code, out).map_err(|damage| {
            self.packed.damaged(format!("{damage}, in the {} bytes at offset {}", code.len(), self.code(chunk).start))
        })
    }
}

/// Whether a stage can have planes.
pub fn is_compressible(stage: &StageLayout) -> bool {
    stage.matrices.iter().all(|matrix| matrix.dtype == DType::Bf16)
}

/// What the list of a directory names; nothing where it is of another pack or cannot be read.
pub(super) fn listed(
    directory: &Path,
    identity: &Identity,
    layout: &ModelLayout,
) -> Result<HashMap<StageId, PlanesEntry>> {
    let Noted::Entries(entries) = Journal::read::<PlanesEntry>(&directory.join(PLANES), identity)? else {
        return Ok(HashMap::new());
    };
    let mut by_name: HashMap<String, PlanesEntry> =
        entries.into_iter().map(|entry| (entry.file.name.clone(), entry)).collect();
    let stages = layout.stages().filter(|(_, stage)| is_compressible(stage));
    let found = stages.filter_map(|(id, stage)| {
        let entry = by_name.remove(&planes_plan(id, stage, &[]).name)?;
        let fits = stage.chunks.iter().zip(&entry.lengths).all(|(chunk, &len)| len > 0 && len <= chunk.bytes);
        (fits && entry.lengths.len() == stage.chunks.len()).then_some((id, entry))
    });
    Ok(found.collect())
}

/// Opens the planes of a stage.
pub(super) fn open(directory: &Path, id: StageId, stage: &StageLayout, entry: &PlanesEntry) -> Result<Planes> {
    let plan = planes_plan(id, stage, &entry.lengths);
    Ok(Planes { packed: Arc::new(PackedFile::open(directory, plan, &entry.file)?) })
}

/// Writes the planes of every stage of `packed` that can have them and has not.
///
/// # Errors
/// `Error::Usage` when no stage can; whatever reading and writing the files gives.
pub fn ensure(packed: &PackedModel, trust: Trust, progress: &mut dyn FnMut(Progress)) -> Result<Outcome> {
    let (directory, layout) = (packed.directory(), packed.layout());
    let stages: Vec<(StageId, &StageLayout)> = layout.stages().filter(|(_, stage)| is_compressible(stage)).collect();
    if stages.is_empty() {
        let what = format!("{} has no matrices in bf16, the only dtype with compressed planes", directory.display());
        return Err(Error::usage(what, "leave --planes out, or pack with --weights bf16 (which rounds)"));
    }
    let missing = |known: &HashMap<StageId, PlanesEntry>| -> Result<Vec<(StageId, &StageLayout)>> {
        let mut missing = Vec::new();
        for &(id, stage) in &stages {
            let there = match known.get(&id) {
                None => false,
                Some(entry) if trust == Trust::Verify => {
                    is_intact(directory, planes_plan(id, stage, &entry.lengths), &entry.file, &mut |_| {})?
                }
                Some(entry) => {
                    let found = std::fs::metadata(directory.join(&entry.file.name));
                    found.is_ok_and(|found| found.len() == entry.file.bytes)
                }
            };
            if !there {
                missing.push((id, stage));
            }
        }
        Ok(missing)
    };
    if missing(&listed(directory, packed.identity(), layout)?)?.is_empty() {
        return Ok(Outcome::Unchanged);
    }
    let waiting = Progress { step: Step::Wait, done: 0, total: 0 };
    let lock = with_suffix(directory, ".lock");
    let lock = match trust {
        Trust::Lengths => Lock::wait(&lock, &mut || progress(waiting))?,
        Trust::Verify => Lock::take(&lock)?,
    };
    // Another process may have been here in between.
    let mut known = listed(directory, packed.identity(), layout)?;
    let missing = missing(&known)?;
    missing.iter().for_each(|(id, _)| drop(known.remove(id)));
    let bytes = |stages: &[(StageId, &StageLayout)]| stages.iter().map(|(_, stage)| stage.bytes as u64).sum::<u64>();
    let total = bytes(&stages);
    let mut writer = Writer { packed, progress, done: total - bytes(&missing), total };
    writer.check_space(bytes(&missing))?;
    let kept: Vec<&PlanesEntry> = stages.iter().filter_map(|(id, _)| known.get(id)).collect();
    let mut journal = Journal::begin(&directory.join(PLANES), packed.identity(), &kept)?;
    writer.report();
    for &(id, stage) in &missing {
        journal.append(&writer.write(id, stage)?)?;
    }
    lock.release()?;
    Ok(Outcome::Written(missing.len()))
}

struct Writer<'a> {
    packed: &'a PackedModel,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
}

impl Writer<'_> {
    fn report(&mut self) {
        (self.progress)(Progress { step: Step::Planes, done: self.done, total: self.total });
    }

    /// Refuses a disk that is too small for planes as they usually are; where they are not, writing says so.
    fn check_space(&self, bytes: u64) -> Result<()> {
        let directory = self.packed.directory();
        let (need, free) = (bytes / 4 * 3 + SLACK_BYTES, disk::free_space(directory)?);
        if free < need {
            let what = format!("compressed planes need about {} of disk space, {} are free", Bytes(need), Bytes(free));
            return Err(refuse(directory, &what, "free some space, or leave compressed planes out"));
        }
        Ok(())
    }

    /// Writes one file under a temporary name, syncs and renames it.
    fn write(&mut self, id: StageId, stage: &StageLayout) -> Result<PlanesEntry> {
        let path = self.packed.directory().join(planes_plan(id, stage, &[]).name);
        let temporary = with_suffix(&path, TEMPORARY);
        let written = self.write_codes(id, stage, &temporary);
        if written.is_err() {
            durable::remove(&temporary)?;
        }
        let entry = written?;
        durable::rename(&temporary, &path)?;
        Ok(entry)
    }

    fn write_codes(&mut self, id: StageId, stage: &StageLayout, path: &Path) -> Result<PlanesEntry> {
        // How long it becomes is not known yet.
        let file = DirectFile::create(path, 0)?;
        let longest = stage.chunks.iter().map(|chunk| chunk.padded_bytes()).max().unwrap_or(0);
        let header_bytes = planes_plan(id, stage, &[]).header.len();
        let batch_bytes = BATCH_BYTES.max(longest);
        let mut arena = Arena::new("compressing", Tier::Cpu, 2 * longest + batch_bytes + header_bytes)?;
        let [mut chunk_room, mut decoded_room] = [(); 2].map(|()| arena.carve_aligned(longest, disk::ALIGNMENT));
        let mut batch = arena.carve_aligned(batch_bytes, disk::ALIGNMENT);
        let mut queue = DiskQueue::new(disk::DEPTH, How::Auto)?;
        let (mut lengths, mut checksums) = (Vec::new(), Vec::new());
        let (mut offset, mut filled) = (header_bytes as u64, 0);
        for (index, layout) in stage.chunks.iter().enumerate() {
            let chunk = &mut chunk_room.bytes_mut()[..layout.bytes];
            self.packed.chunk(id, index, chunk)?;
            let code = planes::encode(chunk);
            let decoded = &mut decoded_room.bytes_mut()[..layout.bytes];
            let intact = planes::decode(&code, decoded).is_ok() && decoded == chunk;
            assert!(intact, "chunk {index} of {id:?} does not come back from its planes");
            let room = code.len().next_multiple_of(CHUNK_ALIGNMENT);
            if filled + room > batch_bytes {
                queue.write(&[Write { file: &file, offset, buffer: &batch.bytes()[..filled] }])?;
                (offset, filled) = (offset + filled as u64, 0);
            }
            let place = &mut batch.bytes_mut()[filled..filled + room];
            place[..code.len()].copy_from_slice(&code);
            place[code.len()..].fill(0);
            filled += room;
            lengths.push(code.len());
            checksums.push(checksum(&code));
            self.done += layout.padded_bytes() as u64;
            self.report();
        }
        queue.write(&[Write { file: &file, offset, buffer: &batch.bytes()[..filled] }])?;
        let plan = planes_plan(id, stage, &lengths);
        let mut header = arena.carve_aligned(header_bytes, disk::ALIGNMENT);
        header.bytes_mut().copy_from_slice(&plan.header);
        queue.write(&[Write { file: &file, offset: 0, buffer: header.bytes() }])?;
        file.sync()?;
        let file = FileEntry { name: plan.name.clone(), bytes: plan.bytes(), checksums };
        Ok(PlanesEntry { file, lengths })
    }
}
