//! What a single step does, on whatever lane.
//!
//! **Invariant:** a step touches the places that it names and nothing else; the locks notice if it does.

use std::collections::HashSet;
use std::sync::Mutex;

use rayon::prelude::*;

use super::compute::{Compute, Fixed};
use super::memory::{Shared, read, write};
use super::pass::PassData;
use crate::device::Device;
use crate::error::{Result, Tier};
use crate::memory::disk::{ALIGNMENT, DiskQueue, Read, Write};
use crate::model::packed::panels::{PANEL_OUTPUTS, panel_bytes, panel_lane};
use crate::model::packed::planes::Planes;
use crate::schedule::pass::Frame;
use crate::schedule::placement::EMBEDDING_PANELS;
use crate::schedule::step::{Lane, Op, Slot, Step};

/// Everything that steps work on.
pub struct Workshop<D: Device> {
    /// What does not change.
    pub fixed: Fixed<D>,
    /// What lanes share.
    pub shared: Shared<D::Buffer>,
    /// What the computing lane has for itself.
    pub compute: Mutex<Compute<D>>,
}

/// What a lane has for itself.
#[derive(Default)]
pub struct Tools {
    /// For lanes that use the disk.
    pub disk: Option<DiskQueue>,
    /// Chunks, by stage of the pass, that were compared with their checksums.
    pub checked: HashSet<(u32, usize)>,
}

impl Tools {
    fn disk(&mut self) -> &mut DiskQueue {
        self.disk.as_mut().expect("disk lanes have a queue")
    }
}

impl<D: Device> Workshop<D> {
    /// Runs one step, or hands it to the device; gives the bytes that it moves, which are fewer than the step's where
    /// they are compressed.
    ///
    /// # Errors
    /// What the disk or the device gives.
    pub fn run(&self, step: &Step, pass: &PassData, tools: &mut Tools) -> Result<u64> {
        match step.op {
            Op::ReadWeights { from, to } => return self.read_weights(step, from as usize..to as usize, tools),
            Op::DecodeWeights { from, to } => self.decode_weights(step, from as usize..to as usize)?,
            Op::LoadWeights { from, to } => self.load_weights(step, from as usize..to as usize)?,
            Op::ReadKv => self.read_kv(step, pass, tools)?,
            Op::LoadKv => self.load_kv(step, pass)?,
            Op::StoreKv => self.store_kv(step, pass)?,
            Op::WriteKv => self.write_kv(step, pass, tools)?,
            Op::ReadHidden | Op::LoadHidden => self.bring_hidden(step, tools)?,
            Op::StoreHidden | Op::WriteHidden => self.return_hidden(step, tools)?,
            Op::LoadEmbeddings => self.load_embeddings(step, pass, tools)?,
            Op::Embed => self.computing().embed(&self.fixed, &self.shared, pass, step),
            Op::Layer => self.computing().layer(&self.fixed, &self.shared, pass, step),
            Op::Gather => self.computing().gather(&self.fixed, &self.shared, pass, step),
            Op::Head => self.computing().head(&self.fixed, &self.shared, pass, step),
        }
        Ok(step.bytes)
    }

    fn computing(&self) -> std::sync::MutexGuard<'_, Compute<D>> {
        self.compute.try_lock().expect("one lane computes")
    }

    fn device(&self) -> &D {
        &self.fixed.device
    }

    // Weights

    /// Where a chunk lies in a slot or a staging place that begins with chunk `first`, counted from it.
    fn span(&self, step: &Step, first: usize, chunks: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        let stage = &self.fixed.placement.stages[step.stage as usize];
        let start = stage.bytes(first..chunks.start) as usize;
        start..start + stage.bytes(chunks.clone()) as usize
    }

    /// The first streamed chunk: slots begin with it.
    fn slot_base(&self, step: &Step) -> usize {
        self.fixed.placement.stages[step.stage as usize].resident
    }

    fn read_weights(&self, step: &Step, chunks: std::ops::Range<usize>, tools: &mut Tools) -> Result<u64> {
        if let Slot::Planes(place) = written(step) {
            return self.read_planes(step, chunks, place as usize, tools);
        }
        let extent = self.shared.extents[step.stage as usize].as_ref().expect("stages on disk have an extent");
        let in_file = self.span(step, 0, &chunks);
        let offset = extent.offset + in_file.start as u64;
        let file = extent.file();
        match written(step) {
            Slot::Weights(slot) => {
                let span = self.span(step, self.slot_base(step), &chunks);
                let mut slot = write(&self.shared.weights[slot as usize]);
                let bytes = self.device().bytes_mut(&mut slot).expect("the disk reads into main memory");
                tools.disk().read(&mut [Read { file, offset, buffer: &mut bytes[span.clone()] }])?;
                self.check(step, chunks, &bytes[span], tools)?;
            }
            Slot::WeightsStaging(place) => {
                let mut place = write(&self.shared.weight_staging[place as usize]);
                let buffer = &mut place.bytes_mut()[..in_file.len()];
                tools.disk().read(&mut [Read { file, offset, buffer }])?;
                self.check(step, chunks, &place.bytes()[..in_file.len()], tools)?;
            }
            other => unreachable!("weights are not read into {other}"),
        }
        Ok(step.bytes)
    }

    fn planes(&self, step: &Step) -> &Planes {
        self.shared.plane_files[step.stage as usize].as_ref().expect("stages that stream as planes have their file")
    }

    /// Reads the codes of some chunks; those that come for the first time are compared with what was packed, so what
    /// they decode to is, too.
    fn read_planes(&self, step: &Step, chunks: std::ops::Range<usize>, place: usize, tools: &mut Tools) -> Result<u64> {
        let planes = self.planes(step);
        let extent = planes.extent(&chunks);
        let (offset, len) = (extent.start, (extent.end - extent.start) as usize);
        let mut place = write(&self.shared.planes[place]);
        tools.disk().read(&mut [Read { file: planes.file(), offset, buffer: &mut place.bytes_mut()[..len] }])?;
        for chunk in chunks.filter(|&chunk| tools.checked.insert((step.stage, chunk))) {
            planes.check(chunk, &place.bytes()[within(planes.code(chunk), offset)])?;
        }
        Ok(len as u64)
    }

    fn decode_weights(&self, step: &Step, chunks: std::ops::Range<usize>) -> Result<()> {
        let Some(Slot::Planes(place)) = step.reads.iter().next() else {
            unreachable!("planes are decoded from theirs")
        };
        let place = read(&self.shared.planes[place as usize]);
        match written(step) {
            Slot::Weights(slot) => {
                let span = self.span(step, self.slot_base(step), &chunks);
                let mut slot = write(&self.shared.weights[slot as usize]);
                let bytes = self.device().bytes_mut(&mut slot).expect("the CPU decodes into main memory");
                self.decode(step, chunks, place.bytes(), &mut bytes[span])
            }
            Slot::WeightsStaging(target) => {
                let mut target = write(&self.shared.weight_staging[target as usize]);
                self.decode(step, chunks, place.bytes(), target.bytes_mut())
            }
            other => unreachable!("weights are not decoded into {other}"),
        }
    }

    /// Decodes chunks whose codes begin `codes` into weights that begin `out`, all of them in parallel.
    fn decode(&self, step: &Step, chunks: std::ops::Range<usize>, codes: &[u8], out: &mut [u8]) -> Result<()> {
        let (planes, stage) = (self.planes(step), self.fixed.layout.stage(self.fixed.stages[step.stage as usize]));
        let offset = planes.extent(&chunks).start;
        let (mut rest, mut work) = (out, Vec::with_capacity(chunks.len()));
        for chunk in chunks {
            let layout = &stage.chunks[chunk];
            let (out, after) = rest.split_at_mut(layout.padded_bytes());
            work.push((chunk, &codes[within(planes.code(chunk), offset)], &mut out[..layout.bytes]));
            rest = after;
        }
        work.into_par_iter().try_for_each(|(chunk, code, out)| planes.decode(chunk, code, out))
    }

    /// Compares chunks that come for the first time with what was packed.
    fn check(&self, step: &Step, chunks: std::ops::Range<usize>, bytes: &[u8], tools: &mut Tools) -> Result<()> {
        let stage = self.fixed.layout.stage(self.fixed.stages[step.stage as usize]);
        let extent = self.shared.extents[step.stage as usize].as_ref().expect("stages on disk have an extent");
        let first = stage.chunks[chunks.start].offset;
        for chunk in chunks.filter(|&chunk| tools.checked.insert((step.stage, chunk))) {
            let layout = &stage.chunks[chunk];
            extent.check(chunk, &bytes[layout.offset - first..][..layout.bytes])?;
        }
        Ok(())
    }

    fn load_weights(&self, step: &Step, chunks: std::ops::Range<usize>) -> Result<()> {
        let Slot::Weights(slot) = written(step) else { unreachable!("weights are loaded into their slots") };
        let to = self.span(step, self.slot_base(step), &chunks);
        let mut slot = write(&self.shared.weights[slot as usize]);
        match step.reads.iter().next() {
            Some(Slot::WeightsStaging(place)) => {
                let place = read(&self.shared.weight_staging[place as usize]);
                self.device().copy_in(&[(&place.bytes()[..to.len()], to.start)], &mut slot)
            }
            _ => {
                let from = self.span(step, self.slot_base(step), &chunks);
                let home = &self.shared.cpu_stages[step.stage as usize];
                self.device().copy_in(&[(&home.bytes()[from], to.start)], &mut slot)
            }
        }
    }

    // Pages

    /// A frame's number in its tier.
    fn home(&self, step: &Step, frame: Frame) -> usize {
        let placement = &self.fixed.placement;
        placement.frame_of(frame.layer(step.stage as usize, placement.num_layers), frame.page as usize)
    }

    fn frame(&self) -> usize {
        self.fixed.placement.frame as usize
    }

    /// Consecutive frames both in memory and on disk, as (first place in memory, page, count). `indices` are places of
    /// streamed pages; `packed` memory holds just these pages, one after the other.
    fn runs(&self, step: &Step, streamed: &[Frame], indices: &[usize], packed: bool) -> Vec<(usize, usize, usize)> {
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        for (order, &index) in indices.iter().enumerate() {
            let place = if packed { order } else { index };
            let home = self.home(step, streamed[index]);
            match runs.last_mut() {
                Some((first, start, count)) if *first + *count == place && *start + *count == home => *count += 1,
                _ => runs.push((place, home, 1)),
            }
        }
        runs
    }

    fn read_kv(&self, step: &Step, pass: &PassData, tools: &mut Tools) -> Result<()> {
        let block = pass.blocks[step.block as usize].streamed(step.stage as usize);
        let packed = matches!(written(step), Slot::KvStaging(_));
        let runs = self.runs(step, &block.frames, &block.loads[1], packed);
        let file = self.shared.kv_disk.as_ref().expect("pages on disk have a file");
        let read_into = |bytes: &mut [u8], tools: &mut Tools| {
            let mut requests = Vec::with_capacity(runs.len());
            let (mut rest, mut at) = (bytes, 0);
            for &(place, home, count) in &runs {
                let (_, tail) = rest.split_at_mut((place - at) * self.frame());
                let (buffer, tail) = tail.split_at_mut(count * self.frame());
                requests.push(Read { file, offset: (home * self.frame()) as u64, buffer });
                (rest, at) = (tail, place + count);
            }
            tools.disk().read(&mut requests)
        };
        match written(step) {
            Slot::KvStaging(place) => read_into(write(&self.shared.kv_staging[place as usize]).bytes_mut(), tools),
            Slot::Kv(slot) => {
                let mut slot = write(&self.shared.kv[slot as usize]);
                let bytes = self.device().bytes_mut(&mut slot.memory).expect("the disk reads into main memory");
                read_into(bytes, tools)
            }
            other => unreachable!("pages are not read into {other}"),
        }
    }

    fn write_kv(&self, step: &Step, pass: &PassData, tools: &mut Tools) -> Result<()> {
        let block = pass.blocks[step.block as usize].streamed(step.stage as usize);
        let source = step.reads.iter().next().expect("pages are written from somewhere");
        let runs = self.runs(step, &block.frames, &block.stores[1], matches!(source, Slot::KvStaging(_)));
        let file = self.shared.kv_disk.as_ref().expect("pages on disk have a file");
        let write_from = |bytes: &[u8], tools: &mut Tools| {
            let frame = self.frame();
            let request = |&(place, home, count): &(usize, usize, usize)| Write {
                file,
                offset: (home * frame) as u64,
                buffer: &bytes[place * frame..(place + count) * frame],
            };
            tools.disk().write(&runs.iter().map(request).collect::<Vec<_>>())
        };
        match source {
            Slot::KvStaging(place) => write_from(read(&self.shared.kv_staging[place as usize]).bytes(), tools),
            Slot::Kv(slot) => {
                let slot = read(&self.shared.kv[slot as usize]);
                write_from(self.device().bytes(&slot.memory).expect("the disk writes from main memory"), tools)
            }
            other => unreachable!("pages are not written from {other}"),
        }
    }

    fn load_kv(&self, step: &Step, pass: &PassData) -> Result<()> {
        let block = pass.blocks[step.block as usize].streamed(step.stage as usize);
        let Slot::Kv(slot) = written(step) else { unreachable!("pages are loaded into their slots") };
        let mut slot = write(&self.shared.kv[slot as usize]);
        let frame = self.frame();
        match step.reads.iter().next() {
            Some(Slot::KvStaging(place)) => {
                let place = read(&self.shared.kv_staging[place as usize]);
                let part = |(order, &index): (usize, &usize)| {
                    (&place.bytes()[order * frame..(order + 1) * frame], index * frame)
                };
                let parts: Vec<_> = block.loads[1].iter().enumerate().map(part).collect();
                self.device().copy_in(&parts, &mut slot.memory)
            }
            _ => {
                let home = |&index: &usize| read(&self.shared.kv_cpu[self.home(step, block.frames[index])]);
                let homes: Vec<_> = block.loads[0].iter().map(home).collect();
                let parts =
                    homes.iter().zip(&block.loads[0]).map(|(home, &index)| (&home.bytes()[..frame], index * frame));
                self.device().copy_in(&parts.collect::<Vec<_>>(), &mut slot.memory)
            }
        }
    }

    fn store_kv(&self, step: &Step, pass: &PassData) -> Result<()> {
        let block = pass.blocks[step.block as usize].streamed(step.stage as usize);
        let Some(Slot::Kv(slot)) = step.reads.iter().next() else { unreachable!("pages are stored from their slots") };
        let slot = read(&self.shared.kv[slot as usize]);
        let frame = self.frame();
        match written(step) {
            Slot::KvStaging(place) => {
                let mut place = write(&self.shared.kv_staging[place as usize]);
                let parts =
                    block.stores[1].iter().map(|&index| index * frame).zip(place.bytes_mut().chunks_exact_mut(frame));
                self.device().copy_out(&slot.memory, &mut parts.collect::<Vec<_>>())
            }
            _ => {
                let home = |&index: &usize| write(&self.shared.kv_cpu[self.home(step, block.frames[index])]);
                let mut homes: Vec<_> = block.stores[0].iter().map(home).collect();
                let parts = block.stores[0].iter().zip(&mut homes);
                let parts = parts.map(|(&index, home)| (index * frame, &mut home.bytes_mut()[..frame]));
                self.device().copy_out(&slot.memory, &mut parts.collect::<Vec<_>>())
            }
        }
    }

    // Hidden states

    /// Bytes of a block's hidden state that are moved, in whole pages.
    fn hidden_bytes(&self, step: &Step) -> usize {
        (step.bytes as usize).next_multiple_of(ALIGNMENT)
    }

    /// A block's place in the file of hidden states.
    fn hidden_offset(&self, step: &Step) -> u64 {
        let before = &self.fixed.placement.hidden[..step.block as usize];
        let count = before.iter().filter(|&&tier| tier == Tier::Disk).count();
        count as u64 * self.fixed.placement.hidden_block_bytes()
    }

    fn bring_hidden(&self, step: &Step, tools: &mut Tools) -> Result<()> {
        let (len, device) = (self.hidden_bytes(step), self.device());
        let source = step.reads.iter().next().expect("hidden states come from somewhere");
        if step.op == Op::ReadHidden {
            let file = self.shared.hidden_disk.as_ref().expect("hidden states on disk have a file");
            let offset = self.hidden_offset(step);
            return match written(step) {
                Slot::HiddenStaging(place) => {
                    let mut place = write(&self.shared.hidden_staging[place as usize]);
                    tools.disk().read(&mut [Read { file, offset, buffer: &mut place.bytes_mut()[..len] }])
                }
                Slot::Hidden(slot) => {
                    let mut slot = write(&self.shared.hidden[slot as usize]);
                    let bytes = device.bytes_mut(&mut slot).expect("the disk reads into main memory");
                    tools.disk().read(&mut [Read { file, offset, buffer: &mut bytes[..len] }])
                }
                other => unreachable!("hidden states are not read into {other}"),
            };
        }
        let Slot::Hidden(slot) = written(step) else { unreachable!("hidden states are loaded into their slots") };
        let mut slot = write(&self.shared.hidden[slot as usize]);
        match source {
            Slot::HiddenStaging(place) => {
                let place = read(&self.shared.hidden_staging[place as usize]);
                device.copy_in(&[(&place.bytes()[..len], 0)], &mut slot)
            }
            _ => {
                let home = read(&self.shared.hidden_cpu[&(step.block as usize)]);
                device.copy_in(&[(&home.bytes()[..len], 0)], &mut slot)
            }
        }
    }

    fn return_hidden(&self, step: &Step, tools: &mut Tools) -> Result<()> {
        let (len, device) = (self.hidden_bytes(step), self.device());
        let source = step.reads.iter().next().expect("hidden states come from somewhere");
        if step.op == Op::WriteHidden {
            let file = self.shared.hidden_disk.as_ref().expect("hidden states on disk have a file");
            let offset = self.hidden_offset(step);
            return match source {
                Slot::HiddenStaging(place) => {
                    let place = read(&self.shared.hidden_staging[place as usize]);
                    tools.disk().write(&[Write { file, offset, buffer: &place.bytes()[..len] }])
                }
                Slot::Hidden(slot) => {
                    let slot = read(&self.shared.hidden[slot as usize]);
                    let bytes = device.bytes(&slot).expect("the disk writes from main memory");
                    tools.disk().write(&[Write { file, offset, buffer: &bytes[..len] }])
                }
                other => unreachable!("hidden states are not written from {other}"),
            };
        }
        let Slot::Hidden(slot) = source else { unreachable!("hidden states are stored from their slots") };
        let slot = read(&self.shared.hidden[slot as usize]);
        match written(step) {
            Slot::HiddenStaging(place) => {
                let mut place = write(&self.shared.hidden_staging[place as usize]);
                device.copy_out(&slot, &mut [(0, &mut place.bytes_mut()[..len])])
            }
            _ => {
                let mut home = write(&self.shared.hidden_cpu[&(step.block as usize)]);
                device.copy_out(&slot, &mut [(0, &mut home.bytes_mut()[..len])])
            }
        }
    }

    // Embeddings

    /// Looks a block's embeddings up where the table lies, some panels at a time.
    fn load_embeddings(&self, step: &Step, pass: &PassData, tools: &mut Tools) -> Result<()> {
        let config = &self.fixed.config;
        let tokens = &pass.tokens[pass.blocks[step.block as usize].rows.clone()];
        let dtype = self.fixed.layout.table[0].matrices[0].dtype;
        let size = panel_bytes(config.embed_size, dtype);
        let place = self.shared.embeddings.as_ref().expect("a table that lies elsewhere has a place for its rows");
        let mut place = write(place);
        let mut rows = vec![0f32; EMBEDDING_PANELS * config.embed_size];
        for (group, tokens) in tokens.chunks(EMBEDDING_PANELS).enumerate() {
            let panels: Vec<(usize, usize, usize)> = tokens.iter().map(|&token| self.panel(token as usize)).collect();
            let mut panel_region = None;
            if step.lane == Lane::DiskRead {
                let region = self.shared.table_panels.as_ref().expect("a table on disk has room for its panels");
                let mut region = write(region);
                self.read_panels(&panels, size, region.bytes_mut(), tools)?;
                panel_region = Some(region);
            }
            let room = self.fixed.placement.panel_room as usize;
            for (order, (&token, &(part, _, at))) in tokens.iter().zip(&panels).enumerate() {
                let panel = match &panel_region {
                    Some(region) => {
                        let extent = self.shared.table_extents[part].as_ref().expect("parts on disk have an extent");
                        let within = (extent.offset as usize + at) % ALIGNMENT;
                        &region.bytes()[order * room + within..][..size]
                    }
                    None => &self.table_part(part)[at..at + size],
                };
                let row = &mut rows[order * config.embed_size..][..config.embed_size];
                panel_lane(panel, dtype, token as usize % PANEL_OUTPUTS, row);
            }
            let bytes: &[u8] = bytemuck::cast_slice(&rows[..tokens.len() * config.embed_size]);
            self.device().copy_in(&[(bytes, group * EMBEDDING_PANELS * 4 * config.embed_size)], &mut place)?;
        }
        Ok(())
    }

    /// A part of the table in main memory beside a device.
    fn table_part(&self, part: usize) -> &[u8] {
        match self.shared.table_cpu.get(part) {
            Some(region) => region.bytes(),
            // The head is the table, and streams from there.
            None => self.shared.cpu_stages[self.fixed.placement.num_layers + part].bytes(),
        }
    }

    /// The part of the table, the chunk and the place within the part of a token's panel.
    fn panel(&self, token: usize) -> (usize, usize, usize) {
        let table = &self.fixed.layout.table;
        let mut panel = token / PANEL_OUTPUTS;
        for (index, part) in table.iter().enumerate() {
            let chunk = part.chunks.iter().position(|chunk| chunk.panels.contains(&panel));
            if let Some(chunk) = chunk {
                let layout = &part.chunks[chunk];
                let size = layout.bytes / layout.panels.len();
                return (index, chunk, layout.offset + (panel - layout.panels.start) * size);
            }
            panel -= part.chunks.last().map_or(0, |chunk| chunk.panels.end);
        }
        panic!("token {token} of a vocabulary of {}", self.fixed.config.vocab_size)
    }

    fn read_panels(
        &self,
        panels: &[(usize, usize, usize)],
        size: usize,
        region: &mut [u8],
        tools: &mut Tools,
    ) -> Result<()> {
        let room = self.fixed.placement.panel_room as usize;
        let mut requests = Vec::with_capacity(panels.len());
        for (&(part, _, at), room) in panels.iter().zip(region.chunks_exact_mut(room)) {
            let extent = self.shared.table_extents[part].as_ref().expect("parts on disk have an extent");
            let start = extent.offset as usize + at;
            let aligned = start / ALIGNMENT * ALIGNMENT;
            let len = (start + size).next_multiple_of(ALIGNMENT) - aligned;
            requests.push(Read { file: extent.file(), offset: aligned as u64, buffer: &mut room[..len] });
        }
        tools.disk().read(&mut requests)
    }
}

/// A range of a file within what was read from `offset` on.
fn within(range: std::ops::Range<u64>, offset: u64) -> std::ops::Range<usize> {
    (range.start - offset) as usize..(range.end - offset) as usize
}

fn written(step: &Step) -> Slot {
    step.writes.iter().next().expect("the step writes something")
}
