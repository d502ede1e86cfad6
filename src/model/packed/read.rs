//! Reading a packed directory.
//!
//! **Invariant:** an opened directory's files have the lengths and headers that the layout gives; every chunk that is
//! handed out has its checksum.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::files::{FilePlan, Holds, plans};
use super::layout::{ModelLayout, StageId};
use super::manifest::{FileEntry, Identity, Manifest, checksum, damaged};
use super::planes::{self, Planes, PlanesEntry};
use super::{Extent, Packed};
use crate::error::{Error, Result, Tier};
use crate::memory::arena::Arena;
use crate::memory::disk::{self, DirectFile, DiskQueue, How, Read};
use crate::model::dtype::DType;

/// A packed directory.
pub struct PackedModel {
    directory: PathBuf,
    identity: Identity,
    weights: Option<DType>,
    layout: ModelLayout,
    planes: HashMap<StageId, PlanesEntry>,
    stages: HashMap<StageId, Arc<PackedFile>>,
    small: PackedFile,
    queue: Mutex<DiskQueue>,
}

/// A file, its plan and the checksum of each block.
pub(super) struct PackedFile {
    /// The packed directory, for hints.
    directory: PathBuf,
    path: PathBuf,
    file: File,
    direct: DirectFile,
    plan: FilePlan,
    checksums: Vec<String>,
}

impl PackedModel {
    /// Opens `directory`, whose manifest and layout are known.
    ///
    /// # Errors
    /// `Error::Model` when a file is missing, too short or has another header, naming file and offset.
    pub fn open(directory: &Path, manifest: &Manifest, layout: ModelLayout) -> Result<PackedModel> {
        let entries: HashMap<&str, &FileEntry> =
            manifest.files.iter().map(|entry| (entry.name.as_str(), entry)).collect();
        let mut stages = HashMap::new();
        let mut small = None;
        for plan in plans(&layout) {
            let path = directory.join(&plan.name);
            let entry = entries.get(plan.name.as_str());
            let entry = entry.ok_or_else(|| damaged(directory, &path, "is not in the manifest".into()))?;
            let file = PackedFile::open(directory, plan, entry)?;
            match file.plan.holds {
                Holds::Stage(stage) => drop(stages.insert(stage, Arc::new(file))),
                Holds::Small => small = Some(file),
                Holds::Planes(_) => unreachable!("a layout has no planes"),
            }
        }
        let small = small.expect("every layout has a file of small tensors");
        let queue = Mutex::new(DiskQueue::new(disk::DEPTH, How::Auto)?);
        let identity = manifest.identity.clone();
        let weights = identity.weights(directory)?;
        let planes = planes::listed(directory, &identity, &layout)?;
        Ok(PackedModel { directory: directory.to_owned(), identity, weights, layout, planes, stages, small, queue })
    }

    /// Looks again which stages have compressed planes.
    ///
    /// # Errors
    /// `Error::Io` when their list cannot be read.
    pub fn refresh_planes(&mut self) -> Result<()> {
        self.planes = planes::listed(&self.directory, &self.identity, &self.layout)?;
        Ok(())
    }

    /// Which model, and how it is packed.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How matrices are cut.
    pub fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    /// Whether a stage has compressed planes.
    pub fn has_planes(&self, stage: StageId) -> bool {
        self.planes.contains_key(&stage)
    }

    /// Writes chunk `chunk` of `stage` to `out`, which is exactly as long.
    ///
    /// # Errors
    /// `Error::Model` naming file and offset, or `Error::IoAt`.
    pub fn chunk(&self, stage: StageId, chunk: usize, out: &mut [u8]) -> Result<()> {
        self.read(&self.stages[&stage], chunk, out)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The dtype that matrices were asked in when they were packed; none for the checkpoint's.
    pub fn weights(&self) -> Option<DType> {
        self.weights
    }

    /// Reads every block and compares it with what was packed; `progress` gets the bytes of each.
    ///
    /// # Errors
    /// As [`Extent::check`], or `Error::IoAt`.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let stages = self.stages.values().map(|file| &**file);
        let mut files: Vec<&PackedFile> = stages.chain([&self.small]).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.iter().try_for_each(|file| file.verify(progress))
    }

    /// The weights, if matrices are stored in `weights`; none asks for whatever they are stored in.
    ///
    /// # Errors
    /// `Error::Usage` when they are stored in another dtype.
    pub fn in_dtype(&self, weights: Option<DType>) -> Result<&PackedModel> {
        let Some(wanted) = weights else { return Ok(self) };
        let mut matrices = self.layout.stages().flat_map(|(_, stage)| &stage.matrices);
        match matrices.find(|matrix| matrix.dtype != wanted) {
            None => Ok(self),
            Some(matrix) => Err(Error::usage(
                format!("{} is packed in {}, not in {wanted}", self.directory.display(), matrix.dtype),
                "leave --weights out, or pack the original with it",
            )),
        }
    }
}

impl PackedModel {
    /// Whole pages go past the page cache where the destination allows it.
    fn read(&self, file: &PackedFile, block: usize, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), file.plan.blocks[block].extent.len());
        let offset = file.plan.file_offset(block);
        let aligned = (out.as_ptr() as usize).is_multiple_of(disk::ALIGNMENT);
        let pages = if aligned { out.len() - out.len() % disk::ALIGNMENT } else { 0 };
        let (whole, rest) = out.split_at_mut(pages);
        if !whole.is_empty() {
            // A queue whose user has panicked is as good as new: no operation outlives a call.
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.read(&mut [Read { file: &file.direct, offset, buffer: whole }])?;
        }
        if !rest.is_empty() {
            file.read_buffered(offset + pages as u64, rest)?;
        }
        file.check(block, out)
    }
}

impl Packed for &PackedModel {
    fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    fn chunk(&self, stage: StageId, chunk: usize, out: &mut [u8]) -> Result<()> {
        PackedModel::chunk(self, stage, chunk, out)
    }

    fn small(&self, index: usize, out: &mut [u8]) -> Result<()> {
        self.read(&self.small, index, out)
    }

    fn extent(&self, stage: StageId) -> Result<Option<Extent>> {
        let packed = self.stages[&stage].clone();
        Ok(Some(Extent { offset: packed.plan.header.len() as u64, packed }))
    }

    fn planes(&self, stage: StageId) -> Result<Option<Planes>> {
        let open = |entry| planes::open(&self.directory, stage, self.layout.stage(stage), entry);
        self.planes.get(&stage).map(open).transpose()
    }
}

impl PackedFile {
    pub(super) fn open(directory: &Path, plan: FilePlan, entry: &FileEntry) -> Result<PackedFile> {
        let path = directory.join(&plan.name);
        let damaged = plan.holds.damaged();
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(damaged(directory, &path, "is missing".into()));
            }
            file => file.map_err(Error::io("open", &path))?,
        };
        let found = file.metadata().map_err(Error::io("inspect", &path))?.len();
        if found != plan.bytes() {
            let what = format!("has {found} bytes instead of {}", plan.bytes());
            return Err(damaged(directory, &path, what));
        }
        let mut header = vec![0; plan.header.len()];
        file.read_exact_at(&mut header, 0).map_err(at(&path, 0))?;
        if let Some(offset) = header.iter().zip(&plan.header).position(|(found, expected)| found != expected) {
            return Err(damaged(directory, &path, format!("has another header than expected from offset {offset}")));
        }
        if entry.checksums.len() != plan.blocks.len() {
            return Err(damaged(directory, &path, "has another number of checksums than of chunks".into()));
        }
        let direct = DirectFile::open(&path)?;
        let (directory, checksums) = (directory.to_owned(), entry.checksums.clone());
        Ok(PackedFile { directory, path, file, direct, plan, checksums })
    }

    /// The file, for reads past the page cache.
    pub(super) fn direct(&self) -> &DirectFile {
        &self.direct
    }

    /// Through the page cache, and out of it again: what is placed in memory is read once.
    fn read_buffered(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(at(&self.path, offset))?;
        let len = std::num::NonZeroU64::new(out.len() as u64);
        let _ = rustix::fs::fadvise(&self.file, offset, len, rustix::fs::Advice::DontNeed);
        Ok(())
    }

    /// Compares a block's bytes with what was packed.
    pub(super) fn check(&self, block: usize, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), self.plan.blocks[block].extent.len());
        if checksum(bytes) == self.checksums[block] {
            return Ok(());
        }
        let offset = self.plan.file_offset(block);
        Err(self.damaged(format!("the {} bytes at offset {offset} are not those that were packed", bytes.len())))
    }

    /// The error for this file.
    pub(super) fn damaged(&self, what: String) -> Error {
        self.plan.holds.damaged()(&self.directory, &self.path, what)
    }

    /// Where a block lies in the file.
    pub(super) fn place(&self, block: usize) -> std::ops::Range<u64> {
        let start = self.plan.file_offset(block);
        start..start + self.plan.blocks[block].extent.len() as u64
    }

    fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let parts = self.plan.parts();
        let bytes = parts.iter().map(|part| part.bytes.len()).max().unwrap_or(0);
        let mut buffer = Arena::new("checking", Tier::Cpu, bytes)?.carve_aligned(bytes, disk::ALIGNMENT);
        let mut queue = DiskQueue::new(disk::DEPTH, How::Auto)?;
        for part in parts {
            let bytes = &mut buffer.bytes_mut()[..part.bytes.len()];
            queue.read(&mut [Read { file: &self.direct, offset: part.bytes.start as u64, buffer: bytes }])?;
            for block in part.blocks {
                let start = self.plan.file_offset(block) as usize - part.bytes.start;
                let len = self.plan.blocks[block].extent.len();
                self.check(block, &buffer.bytes()[start..start + len])?;
                progress(len as u64);
            }
        }
        Ok(())
    }
}

/// Whether the file of `plan` in `directory` holds what `entry` says.
pub(super) fn is_intact(
    directory: &Path,
    plan: FilePlan,
    entry: &FileEntry,
    progress: &mut dyn FnMut(u64),
) -> Result<bool> {
    let checked = PackedFile::open(directory, plan, entry).and_then(|file| file.verify(progress));
    match checked {
        Ok(()) => Ok(true),
        Err(Error::Model { .. }) => Ok(false),
        // A bad sector: the file must be written anew as well.
        Err(Error::IoAt { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn at(path: &Path, offset: u64) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::IoAt { action: "read", path, offset, source }
}
