//! Writing a packed directory.
//!
//! Chunks are packed into one buffer while the other is written. A file gets its name when it is whole and on the
//! disk; a journal notes it then, so that a run after a kill goes on with the next one. The manifest comes last.
//!
//! **Invariant:** a file under its final name that the journal or the manifest lists is complete.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, sync_channel};

use super::Packed;
use super::files::{FilePlan, Part, plans};
use super::journal::{Journal, Noted};
use super::manifest::{FileEntry, Identity, JOURNAL, MANIFEST, Manifest, checksum};
use super::read::is_intact;
use crate::durable::{self, Lock, with_suffix};
use crate::error::{Bytes, Error, Result, Tier};
use crate::memory::arena::{Arena, Region};
use crate::memory::disk::{self, DirectFile, DiskQueue, How, Write};
use crate::model::Model;
use crate::model::dtype::DType;
use crate::model::files::{Files, read_bounded};
use crate::model::fingerprint::small_files;

/// Left free on the disk, for journal, manifest and what the file system itself needs.
pub(super) const SLACK_BYTES: u64 = 64 << 20;
pub(super) const TEMPORARY: &str = ".tmp";

/// How far packing is, in bytes of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Bytes done, those of earlier runs included.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Waiting for another process that packs the same.
    Wait,
    /// Comparing files that are there with their checksums.
    Check,
    /// Writing.
    Write,
    /// Writing compressed planes.
    Planes,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was there and intact.
    Unchanged,
    /// So many files were written.
    Written(usize),
}

/// Packs `model` into the directory `output`, with matrices in `weights` or in the checkpoint's dtype.
///
/// An interrupted run is continued; a finished one is checked and, where damaged, mended.
///
/// # Errors
/// `Error::Output` when `output` holds something else, is in use, or the disk is too small; whatever reading the model
/// and writing the files gives.
pub fn pack(
    model: &Model,
    weights: Option<DType>,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome> {
    pack_under(model, weights, output, progress, &mut |lock, _| Lock::take(lock))
}

/// As [`pack`], but waits for another process that is packing: shards that start together need the same pack.
pub(super) fn pack_or_wait(
    model: &Model,
    weights: Option<DType>,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome> {
    pack_under(model, weights, output, progress, &mut |lock, progress| {
        Lock::wait(lock, &mut || progress(Progress { step: Step::Wait, done: 0, total: 0 }))
    })
}

/// Takes the lock of a pack, reporting what it waits for.
type TakeLock<'a> = &'a mut dyn FnMut(&Path, &mut dyn FnMut(Progress)) -> Result<Lock>;

fn pack_under(
    model: &Model,
    weights: Option<DType>,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
    lock: TakeLock<'_>,
) -> Result<Outcome> {
    // Without a slash at the end, which would put the lock inside.
    let output: PathBuf = output.components().collect();
    if output.file_name().is_none() {
        return Err(refuse(&output, "is not a name for a directory", "give a path that ends with a name"));
    }
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    let lock = lock(&with_suffix(&output, ".lock"), progress)?;
    let packed = model.packed(weights)?;
    let mut writer = Writer { model, weights, output, packed: &*packed, progress, done: 0, total: 0 };
    let outcome = writer.run();
    lock.release()?;
    outcome
}

struct Writer<'a> {
    model: &'a Model,
    weights: Option<DType>,
    output: PathBuf,
    packed: &'a dyn Packed,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
}

impl Writer<'_> {
    fn run(&mut self) -> Result<Outcome> {
        let identity = Identity::new(self.model, self.weights);
        let plans = plans(self.packed.layout());
        self.total = plans.iter().map(FilePlan::bytes).sum();
        let finished = self.finished(&identity)?;
        let (mut entries, mut missing) = (Vec::new(), Vec::new());
        for plan in plans {
            durable::remove(&with_suffix(&self.output.join(&plan.name), TEMPORARY))?;
            match finished.get(&plan.name) {
                Some(entry) => entries.push(entry.clone()),
                None => missing.push(plan),
            }
        }
        self.done = self.total - missing.iter().map(FilePlan::bytes).sum::<u64>();
        let copies = self.copies()?;
        let copies_are_there = copies.iter().all(|(name, bytes)| {
            let path = self.output.join(name);
            read_bounded(&path, bytes.len() as u64).is_ok_and(|found| found == *bytes)
        });
        if missing.is_empty() && copies_are_there && self.output.join(MANIFEST).exists() {
            return Ok(Outcome::Unchanged);
        }
        fs::create_dir_all(&self.output).map_err(Error::io("create", &self.output))?;
        self.check_space(&missing, &copies)?;
        let mut journal = Journal::begin(&self.output.join(JOURNAL), &identity, &entries)?;
        durable::remove(&self.output.join(MANIFEST))?;
        self.report(Step::Write);
        let written = missing.len();
        for plan in missing {
            let entry = self.write(&plan)?;
            journal.append(&entry)?;
            entries.push(entry);
        }
        let copies = copies.iter().map(|(name, bytes)| self.copy(name, bytes)).collect::<Result<_>>()?;
        let manifest = Manifest::new(self.model, self.weights, entries, copies)?;
        let manifest = serde_json::to_string_pretty(&manifest).expect("a manifest is JSON");
        durable::replace(&self.output.join(MANIFEST), manifest.as_bytes())?;
        durable::remove(&self.output.join(JOURNAL))?;
        durable::sync_directory(&self.output.join(MANIFEST))?;
        Ok(Outcome::Written(written))
    }

    /// The files of an earlier run that are whole, by name.
    fn finished(&mut self, identity: &Identity) -> Result<HashMap<String, FileEntry>> {
        if !is_taken(&self.output)? {
            return Ok(HashMap::new());
        }
        let whole = |entry: &FileEntry| {
            fs::metadata(self.output.join(&entry.name)).is_ok_and(|found| found.len() == entry.bytes)
        };
        if !self.output.join(MANIFEST).exists() {
            let refuse = |what: &str| Err(refuse(&self.output, what, "give another --output, or remove it"));
            let entries = match Journal::read(&self.output.join(JOURNAL), identity)? {
                Noted::Nothing => return refuse("holds something else"),
                Noted::OfAnother => {
                    return refuse("holds the beginning of another pack (another model or --weights)");
                }
                Noted::Entries(entries) => entries.into_iter().filter(whole),
            };
            return Ok(entries.map(|entry| (entry.name.clone(), entry)).collect());
        }
        let manifest = match Manifest::parse(&self.output) {
            Ok(manifest) => manifest,
            // It is damaged, so nothing is known of the files.
            Err(Error::Model { .. }) => return Ok(HashMap::new()),
            Err(error) => return Err(error),
        };
        if manifest.identity != *identity {
            let what = "holds another pack (another model, --weights or layout)";
            return Err(refuse(&self.output, what, "give another --output, or remove it"));
        }
        let mut intact = HashMap::new();
        let entries: HashMap<String, FileEntry> =
            manifest.files.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let (total, report) = (self.total, &mut *self.progress);
        let mut done = 0;
        report(Progress { step: Step::Check, done, total });
        for plan in plans(self.packed.layout()) {
            let Some(entry) = entries.get(&plan.name) else { continue };
            let mut advance = |bytes| {
                done += bytes;
                report(Progress { step: Step::Check, done, total });
            };
            if is_intact(&self.output, plan, entry, &mut advance)? {
                intact.insert(entry.name.clone(), entry.clone());
            }
        }
        Ok(intact)
    }

    /// Refuses a disk that is too small, before anything is written.
    fn check_space(&self, missing: &[FilePlan], copies: &[(String, Vec<u8>)]) -> Result<()> {
        for plan in missing {
            durable::remove(&self.output.join(&plan.name))?;
        }
        let weights: u64 = missing.iter().map(FilePlan::bytes).sum();
        let need = weights + copies.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>() + SLACK_BYTES;
        let free = disk::free_space(&self.output)?;
        if free < need {
            // Gone again if it was made for this.
            let _ = fs::remove_dir(&self.output);
            let what = format!("packing needs {} of disk space, {} are free", Bytes(need), Bytes(free));
            return Err(refuse(&self.output, &what, "free some space, or give an --output on another disk"));
        }
        Ok(())
    }

    /// Configuration, tokenizer and templates.
    fn copies(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let files: &Files = &self.model.files;
        let mut copies = Vec::new();
        for name in small_files(files) {
            if let Some(bytes) = files.read(&name)? {
                copies.push((name, bytes));
            }
        }
        Ok(copies)
    }

    fn copy(&self, name: &str, bytes: &[u8]) -> Result<FileEntry> {
        let path = self.output.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        durable::replace(&path, bytes)?;
        Ok(FileEntry { name: name.into(), bytes: bytes.len() as u64, checksums: vec![checksum(bytes)] })
    }

    fn report(&mut self, step: Step) {
        (self.progress)(Progress { step, done: self.done, total: self.total });
    }

    /// Writes one file under a temporary name, syncs and renames it.
    fn write(&mut self, plan: &FilePlan) -> Result<FileEntry> {
        let path = self.output.join(&plan.name);
        let temporary = with_suffix(&path, TEMPORARY);
        let file = DirectFile::create(&temporary, plan.bytes())?;
        let checksums = self.write_blocks(plan, &file)?;
        file.sync()?;
        durable::rename(&temporary, &path)?;
        Ok(FileEntry { name: plan.name.clone(), bytes: plan.bytes(), checksums })
    }

    /// Fills one buffer while a thread writes the other; gives the checksum of each block.
    fn write_blocks(&mut self, plan: &FilePlan, file: &DirectFile) -> Result<Vec<String>> {
        let parts = plan.parts();
        let buffer_bytes = parts.iter().map(|part| part.bytes.len()).max().unwrap_or(0);
        let mut queue = DiskQueue::new(disk::DEPTH, How::Auto)?;
        let mut arena = Arena::new("packing", Tier::Cpu, 2 * buffer_bytes + plan.header.len())?;
        let mut header = arena.carve_aligned(plan.header.len(), disk::ALIGNMENT);
        header.bytes_mut().copy_from_slice(&plan.header);
        queue.write(&[Write { file, offset: 0, buffer: header.bytes() }])?;
        let (give_back, empty) = channel::<Region>();
        for _ in 0..2 {
            let buffer = arena.carve_aligned(buffer_bytes, disk::ALIGNMENT);
            give_back.send(buffer).expect("the receiver is here");
        }
        let mut checksums = Vec::with_capacity(plan.blocks.len());
        std::thread::scope(|scope| {
            let (hand_over, full) = sync_channel::<(Region, Range<u64>)>(1);
            let writer = scope.spawn(move || -> Result<()> {
                for (buffer, extent) in full {
                    let bytes = &buffer.bytes()[..(extent.end - extent.start) as usize];
                    queue.write(&[Write { file, offset: extent.start, buffer: bytes }])?;
                    // The other side may be done already.
                    let _ = give_back.send(buffer);
                }
                Ok(())
            });
            let mut filled = Ok(());
            for part in parts {
                // A writer that has failed takes no more and gives nothing back.
                let Ok(mut buffer) = empty.recv() else { break };
                filled = self.fill(plan, &part, buffer.bytes_mut(), &mut checksums);
                let extent = part.bytes.start as u64..part.bytes.end as u64;
                if filled.is_err() || hand_over.send((buffer, extent.clone())).is_err() {
                    break;
                }
                self.done += extent.end - extent.start;
                self.report(Step::Write);
            }
            drop(hand_over);
            let written = writer.join().expect("the writer does not panic");
            filled.and(written)
        })?;
        self.done += plan.header.len() as u64;
        Ok(checksums)
    }

    fn fill(&self, plan: &FilePlan, part: &Part, buffer: &mut [u8], checksums: &mut Vec<String>) -> Result<()> {
        let data_start = part.bytes.start - plan.header.len();
        let mut at = 0;
        for index in part.blocks.clone() {
            let extent = &plan.blocks[index].extent;
            let (start, end) = (extent.start - data_start, extent.end - data_start);
            // The buffer holds what was written before.
            buffer[at..start].fill(0);
            plan.fill(self.packed, index, &mut buffer[start..end])?;
            checksums.push(checksum(&buffer[start..end]));
            at = end;
        }
        buffer[at..part.bytes.len()].fill(0);
        Ok(())
    }
}

/// Whether a directory has anything in it but a journal that a kill kept from its name.
fn is_taken(directory: &Path) -> Result<bool> {
    let unborn = with_suffix(Path::new(JOURNAL), TEMPORARY);
    match fs::read_dir(directory) {
        Ok(mut entries) => Ok(entries.any(|entry| entry.map_or(true, |entry| entry.file_name() != unborn.as_os_str()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("inspect", directory)(error)),
    }
}

/// The error for a directory that cannot be packed into.
pub(super) fn refuse(path: &Path, what: &str, hint: &str) -> Error {
    Error::Output { path: path.to_owned(), what: what.into(), hint: Some(hint.into()) }
}
