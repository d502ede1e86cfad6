//! Attention: what kernels are told of segments, and how their queries are cut into tasks.
//!
//! A task takes up to 16 rows (queries, head by head of a group) over all tiles of 64 keys that they see. Where there
//! are too few tasks for the card, the tiles of each are cut into parts, whose partial results are folded in order.
//! Prompts over pages of 16 bits go to the tensor cores, up to 64 rows a task.
//!
//! **Invariant:** a list names frames that segments touch and no others; segments go to the card as many together as
//! the lists have room for.

use bytemuck::{Pod, Zeroable};

use super::memory::DeviceBuffer;
use super::turn::{Turn, list_bytes};
use super::workspace::TASK_ROWS;
use super::{DType, dtype_code, words};
use crate::device::{AttentionSpan, Heads, KvViewMut};
use crate::kv::layout::{PAGE_POSITIONS, pages_for};
use crate::kv::pages::Segment;
use crate::kv::policy::Kept;

/// Tiles of a part, at least.
const PART_TILES: usize = 2;
/// Blocks that a multiprocessor works on at the same time, about.
const BLOCKS_PER_PROCESSOR: usize = 4;
/// Rows of a task on tensor cores.
const TENSOR_ROWS: usize = 64;
/// Rows that a segment has at least to go there.
const TENSOR_LEAST: usize = 32;
/// The number of a partial result where there is none.
const WHOLE: u32 = u32::MAX;

/// A segment, as kernels read it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ListedSegment {
    first_row: u32,
    len: u32,
    start: u32,
    first_page: u32,
    num_pages: u32,
    kept: u32,
    first: u32,
    recent: u32,
    prompt_len: u32,
    stretch: u32,
    unused: [u32; 2],
}

/// Some rows of a segment over some of their tiles, as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Task {
    segment: u32,
    first_row: u32,
    rows: u32,
    first_tile: u32,
    num_tiles: u32,
    partial: u32,
}

/// Partial results that make a result, as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Fold {
    segment: u32,
    first_row: u32,
    rows: u32,
    first_partial: u32,
    num_partials: u32,
}

/// Consecutive segments that go to the card together.
struct Group<'a> {
    segments: &'a [Segment],
    /// The first of their rows, from which rows are counted.
    first_row: usize,
    rows: usize,
}

impl Group<'_> {
    /// The segments and their pages, as kernels read them.
    fn lists(&self) -> (Vec<ListedSegment>, Vec<u32>) {
        let mut pages = Vec::new();
        let segments = self.segments.iter().map(|segment| {
            let first_page = pages.len() as u32;
            pages.extend_from_slice(&segment.pages);
            let (kept, first, recent, prompt_len, stretch) = match segment.kept {
                Kept::All => (0, 0, 0, 0, 0),
                Kept::Window { start, recent } => (1, start, recent, 0, 0),
                Kept::Heavy { heavy, recent, prompt_len, stretch, .. } => (2, heavy, recent, prompt_len, stretch),
            };
            ListedSegment {
                first_row: (segment.first_row - self.first_row) as u32,
                len: segment.len as u32,
                start: segment.start as u32,
                first_page,
                num_pages: segment.pages.len() as u32,
                kept,
                first: first as u32,
                recent: recent as u32,
                prompt_len: prompt_len as u32,
                stretch: stretch as u32,
                unused: [0; 2],
            }
        });
        (segments.collect(), pages)
    }
}

/// Cuts segments into groups whose lists take at most `capacity` bytes, if those of a row take `row` and those of a
/// group `fixed`.
fn groups<'a>(segments: &'a [Segment], row: usize, fixed: usize, capacity: usize) -> Vec<Group<'a>> {
    let bytes = |segment: &Segment| {
        size_of::<ListedSegment>() + 4 * segment.pages.len() + row * segment.len + 4 * size_of::<Task>()
    };
    let mut groups: Vec<Group<'a>> = Vec::new();
    let (mut first, mut taken) = (0, fixed);
    for (index, segment) in segments.iter().enumerate() {
        if index > first {
            let before = &segments[index - 1];
            assert_eq!(segment.first_row, before.first_row + before.len, "segments follow one another");
            if taken + bytes(segment) > capacity {
                groups.push(group(&segments[first..index]));
                (first, taken) = (index, fixed);
            }
        }
        taken += bytes(segment);
    }
    if first < segments.len() {
        groups.push(group(&segments[first..]));
    }
    groups
}

fn group(segments: &[Segment]) -> Group<'_> {
    let (first, last) = (&segments[0], &segments[segments.len() - 1]);
    Group { segments, first_row: first.first_row, rows: last.first_row + last.len - first.first_row }
}

/// The arguments that every kernel takes for its view of the cache.
fn view(kv: &KvViewMut<'_, DeviceBuffer>) -> [u64; 5] {
    let resident = &kv.resident;
    let streamed = kv.streamed.as_ref().map_or(0, |frames| frames.memory.first(frames.count * frames.stride));
    [
        resident.memory.first(resident.count * resident.stride),
        resident.count as u64,
        streamed,
        resident.stride as u64,
        resident.layout.notes().len() as u64,
    ]
}

fn by_dtype(dtype: DType, names: [&'static str; 5]) -> &'static str {
    names[dtype_code(dtype) as usize]
}

/// Stores the keys and values of segments, but of those that evict by attention.
pub fn append(
    turn: &mut Turn<'_>,
    kv: &KvViewMut<'_, DeviceBuffer>,
    segments: &[Segment],
    qkv: &DeviceBuffer,
    heads: Heads,
) -> Result<(), String> {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    for group in groups(segments, 4, 256, turn.capacity()) {
        let (listed, pages) = group.lists();
        let row_segment = |(index, segment): (usize, &Segment)| std::iter::repeat_n(index as u32, segment.len);
        let row_segments: Vec<u32> = group.segments.iter().enumerate().flat_map(row_segment).collect();
        let [listed, pages, row_segments] = turn.upload([
            bytemuck::cast_slice(&listed),
            bytemuck::cast_slice(&pages),
            bytemuck::cast_slice(&row_segments),
        ])?;
        let width = heads.qkv_width();
        let qkv = qkv.at(4 * group.first_row * width, 4 * group.rows * width);
        let [resident, num_resident, streamed, stride, notes] = view(kv);
        let dtype = dtype_code(kv.resident.layout.dtype);
        turn.launch(
            "append_kv",
            (group.rows, num_kv_heads),
            64,
            0,
            &mut words![
                resident,
                num_resident,
                streamed,
                stride,
                notes,
                dtype,
                listed,
                pages,
                row_segments,
                qkv,
                num_heads,
                num_kv_heads,
                head_dim
            ],
        )?;
    }
    Ok(())
}

/// What all segments of a call share.
pub struct Call<'a> {
    /// Keys and values.
    pub kv: &'a KvViewMut<'a, DeviceBuffer>,
    /// Which keys a query sees.
    pub span: AttentionSpan<'a>,
    /// Rows of queries, keys and values.
    pub qkv: &'a DeviceBuffer,
    /// Their heads.
    pub heads: Heads,
    /// Where results go, (rows, num_heads * head_dim).
    pub out: &'a DeviceBuffer,
}

/// Attention of every segment's queries.
pub fn attend(turn: &mut Turn<'_>, call: &Call<'_>, segments: &[Segment]) -> Result<(), String> {
    let Heads { num_heads, num_kv_heads, .. } = call.heads;
    let sinks = call.span.sinks.map_or(0, |sinks| 8 * (sinks.rotary_dim / 2));
    let tasks = (num_heads / num_kv_heads).div_ceil(TASK_ROWS) * size_of::<Task>();
    let parts = turn.device().workspace.num_partials * (size_of::<Task>() + size_of::<Fold>());
    for group in groups(segments, sinks + tasks, parts + 256, turn.capacity()) {
        call.attend_group(turn, &group)?;
    }
    Ok(())
}

impl Call<'_> {
    fn attend_group(&self, turn: &mut Turn<'_>, group: &Group<'_>) -> Result<(), String> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let (width, out_width) = (self.heads.qkv_width(), self.heads.query_width());
        let workspace = &turn.device().workspace;
        let blocks = BLOCKS_PER_PROCESSOR * turn.device().facts().processors;
        let wanted = blocks.div_ceil(num_kv_heads);
        let on_tensors = self.tensor_kernel(turn.device().facts().has_bf16());
        let prompts = |segment: &Segment| on_tensors.is_some() && self.is_prompt(segment);
        let tensor_tasks = self.tasks(group, TENSOR_ROWS, &prompts);
        let (tasks, folds) = cut(self.tasks(group, TASK_ROWS, &|s| !prompts(s)), wanted, workspace.num_partials);
        let is_heavy = |segment: &Segment| matches!(segment.kept, Kept::Heavy { .. });
        let heavy = group.segments.iter().enumerate().filter(|(_, segment)| is_heavy(segment));
        let heavy: Vec<u32> = heavy.map(|(index, _)| index as u32).collect();
        let (listed, pages) = group.lists();
        let rotated = self.span.sinks.filter(|_| group.segments.iter().any(|segment| self.sinks(segment) > 0));
        let angles = |angles: &[f32], rotary_dim: usize| {
            let half = rotary_dim / 2;
            angles[group.first_row * half..(group.first_row + group.rows) * half].to_vec()
        };
        let cos = rotated.map_or(Vec::new(), |rotation| angles(rotation.cos, rotation.rotary_dim));
        let sin = rotated.map_or(Vec::new(), |rotation| angles(rotation.sin, rotation.rotary_dim));
        let parts: [&[u8]; 8] = [
            bytemuck::cast_slice(&listed),
            bytemuck::cast_slice(&pages),
            bytemuck::cast_slice(&tasks),
            bytemuck::cast_slice(&tensor_tasks),
            bytemuck::cast_slice(&folds),
            bytemuck::cast_slice(&heavy),
            bytemuck::cast_slice(&cos),
            bytemuck::cast_slice(&sin),
        ];
        assert!(list_bytes(&parts.map(<[u8]>::len)) <= turn.capacity());
        let [listed_at, pages_at, tasks_at, tensor_tasks_at, folds_at, heavy_at, cos_at, sin_at] =
            turn.upload(parts)?;
        let (cos_at, sin_at) = if rotated.is_some() { (cos_at, sin_at) } else { (0, 0) };
        let qkv = self.qkv.at(4 * group.first_row * width, 4 * group.rows * width);
        let out = self.out.at(4 * group.first_row * out_width, 4 * group.rows * out_width);
        let [resident, num_resident, streamed, stride, notes] = view(self.kv);
        let partials = turn.device().partials.first(workspace.num_partials * workspace.partial);
        let dtype = self.kv.resident.layout.dtype;
        let shared = 4 * TASK_ROWS * head_dim;
        let name = by_dtype(dtype, ["attend_f32", "attend_bf16", "attend_f16", "attend_int8", "attend_int4"]);
        turn.launch(
            name,
            (tasks.len(), num_kv_heads),
            128,
            (shared * if rotated.is_some() { 2 } else { 1 }) as u32,
            &mut words![
                resident,
                num_resident,
                streamed,
                stride,
                notes,
                listed_at,
                pages_at,
                tasks_at,
                qkv,
                num_heads,
                num_kv_heads,
                head_dim,
                self.span.window.unwrap_or(0),
                self.span.scale,
                cos_at,
                sin_at,
                rotated.map_or(0, |rotation| rotation.rotary_dim),
                partials,
                out,
            ],
        )?;
        turn.launch(
            "fold_partials",
            (folds.len(), num_kv_heads),
            128,
            0,
            &mut words![listed_at, folds_at, num_heads, num_kv_heads, head_dim, partials, out],
        )?;
        turn.launch(
            on_tensors.unwrap_or(name),
            (tensor_tasks.len(), num_kv_heads),
            128,
            0,
            &mut words![
                resident,
                num_resident,
                streamed,
                stride,
                notes,
                listed_at,
                pages_at,
                tensor_tasks_at,
                qkv,
                num_heads,
                num_kv_heads,
                self.span.window.unwrap_or(0),
                self.span.scale,
                out,
            ],
        )?;
        let names =
            ["attend_heavy_f32", "attend_heavy_bf16", "attend_heavy_f16", "attend_heavy_int8", "attend_heavy_int4"];
        turn.launch(
            by_dtype(dtype, names),
            (heavy.len(), num_kv_heads),
            128,
            shared as u32,
            &mut words![
                resident,
                num_resident,
                streamed,
                stride,
                notes,
                listed_at,
                pages_at,
                heavy_at,
                qkv,
                num_heads,
                num_kv_heads,
                head_dim,
                self.span.scale,
                out
            ],
        )
    }

    /// The narrower of the layer's window and the segment's; none where neither has one.
    fn window(&self, segment: &Segment) -> Option<usize> {
        match segment.kept {
            Kept::Window { recent, .. } => Some(self.span.window.map_or(recent, |window| window.min(recent))),
            Kept::All | Kept::Heavy { .. } => self.span.window,
        }
    }

    /// Positions at the beginning that are seen wherever the window is.
    fn sinks(&self, segment: &Segment) -> usize {
        match segment.kept {
            Kept::Window { start, recent } if self.span.window.is_none_or(|window| window >= start + recent) => start,
            _ => 0,
        }
    }

    /// Tiles that the queries `first..=last` of a segment see.
    fn tiles(&self, segment: &Segment, first: usize, last: usize) -> usize {
        let (first, last) = (segment.start + first, segment.start + last);
        let oldest = self.window(segment).map_or(0, |window| (first + 1).saturating_sub(window)) / PAGE_POSITIONS;
        pages_for(self.sinks(segment)).min(oldest) + last / PAGE_POSITIONS + 1 - oldest
    }

    /// The kernel that takes prompts to the tensor cores, if there is one for these pages and heads.
    fn tensor_kernel(&self, has_bf16: bool) -> Option<&'static str> {
        match (self.kv.resident.layout.dtype, self.heads.head_dim) {
            (DType::F16, 64) => Some("attend_tensor_f16_64"),
            (DType::F16, 96) => Some("attend_tensor_f16_96"),
            (DType::F16, 128) => Some("attend_tensor_f16_128"),
            (DType::Bf16, 64) if has_bf16 => Some("attend_tensor_bf16_64"),
            (DType::Bf16, 96) if has_bf16 => Some("attend_tensor_bf16_96"),
            (DType::Bf16, 128) if has_bf16 => Some("attend_tensor_bf16_128"),
            _ => None,
        }
    }

    /// Whether a segment has rows enough for tensor cores, and nothing that they do not do.
    fn is_prompt(&self, segment: &Segment) -> bool {
        segment.len >= TENSOR_LEAST && self.sinks(segment) == 0
    }

    /// The tasks, of up to `task_rows`, of the segments that `takes` wants and that evict nothing by attention.
    fn tasks(&self, group: &Group<'_>, task_rows: usize, takes: &dyn Fn(&Segment) -> bool) -> Vec<Task> {
        let per_query = self.heads.num_heads / self.heads.num_kv_heads;
        let mut whole: Vec<Task> = Vec::new();
        for (index, segment) in group.segments.iter().enumerate() {
            if matches!(segment.kept, Kept::Heavy { .. }) || !takes(segment) {
                continue;
            }
            let rows = segment.len * per_query;
            for first_row in (0..rows).step_by(task_rows) {
                let count = task_rows.min(rows - first_row);
                let (first, last) = (first_row / per_query, (first_row + count - 1) / per_query);
                whole.push(Task {
                    segment: index as u32,
                    first_row: first_row as u32,
                    rows: count as u32,
                    first_tile: 0,
                    num_tiles: self.tiles(segment, first, last) as u32,
                    partial: WHOLE,
                });
            }
        }
        whole
    }
}

/// Cuts the tiles of tasks into parts, so that there are about `wanted` tasks, with `num_partials` partial results at
/// most.
fn cut(whole: Vec<Task>, wanted: usize, num_partials: usize) -> (Vec<Task>, Vec<Fold>) {
    let parts = wanted.div_ceil(whole.len().max(1));
    if parts < 2 {
        return (whole, Vec::new());
    }
    let (mut tasks, mut folds, mut used) = (Vec::new(), Vec::new(), 0);
    for task in whole {
        let tiles = (task.num_tiles as usize).div_ceil(parts).max(PART_TILES);
        let count = (task.num_tiles as usize).div_ceil(tiles);
        if count < 2 || used + count > num_partials {
            tasks.push(task);
            continue;
        }
        folds.push(Fold {
            segment: task.segment,
            first_row: task.first_row,
            rows: task.rows,
            first_partial: used as u32,
            num_partials: count as u32,
        });
        for first in (0..task.num_tiles).step_by(tiles) {
            let num_tiles = (tiles as u32).min(task.num_tiles - first);
            tasks.push(Task { first_tile: first, num_tiles, partial: used as u32, ..task });
            used += 1;
        }
    }
    (tasks, folds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(num_tiles: u32) -> Task {
        Task { segment: 3, first_row: 16, rows: 5, first_tile: 0, num_tiles, partial: WHOLE }
    }

    #[test]
    fn enough_tasks_stay_whole() {
        let (tasks, folds) = cut(vec![task(9); 4], 4, 100);
        assert_eq!((tasks, folds), (vec![task(9); 4], vec![]));
    }

    #[test]
    fn parts_cover_all_tiles_in_order() {
        let (tasks, folds) = cut(vec![task(9), task(1)], 8, 100);
        let ranges: Vec<(u32, u32, u32)> = tasks.iter().map(|t| (t.first_tile, t.num_tiles, t.partial)).collect();
        assert_eq!(ranges, [(0, 3, 0), (3, 3, 1), (6, 3, 2), (0, 1, WHOLE)]);
        assert_eq!(folds, [Fold { segment: 3, first_row: 16, rows: 5, first_partial: 0, num_partials: 3 }]);
    }

    #[test]
    fn partial_results_stay_within_their_room() {
        let (tasks, folds) = cut(vec![task(40); 8], 1000, 32);
        let partials = tasks.iter().filter(|task| task.partial != WHOLE).count();
        assert!(partials <= 32 && folds.len() < 8);
    }

    #[test]
    fn groups_keep_within_the_lists() {
        let segment =
            |index: usize| Segment { first_row: 3 * index, len: 3, start: 0, pages: vec![7; 10], kept: Kept::All };
        let segments: Vec<Segment> = (0..10).map(segment).collect();
        let groups = groups(&segments, 4, 100, 700);
        assert!(groups.len() > 1);
        assert_eq!(groups.iter().map(|group| group.segments.len()).sum::<usize>(), 10);
        assert!(groups.iter().all(|group| group.rows == 3 * group.segments.len()));
        let (listed, pages) = groups[1].lists();
        assert_eq!((listed[0].first_row, listed[1].first_page, pages.len()), (0, 10, 10 * listed.len()));
    }
}
