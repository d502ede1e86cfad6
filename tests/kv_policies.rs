//! Bounded caches against slow references that know nothing of pages, chunks or slots.
#![allow(missing_docs)]

use proptest::prelude::*;
use tidemill::device::host::Host;
use tidemill::device::{AttentionSpan, Device, Frames, Heads, KvViewMut, Rotation};
use tidemill::error::Tier;
use tidemill::kv::layout::{KvLayout, Owner, PAGE_POSITIONS, POSITION_BITS};
use tidemill::kv::pages::Segment;
use tidemill::kv::policy::{Kept, Spread, WHOLE_PROMPT};
use tidemill::memory::arena::{Arena, Region};
use tidemill::model::dtype::DType;
use tidemill::rng::Philox;

/// A sequence: rows of queries, keys and values, and what is kept of it.
struct Sequence {
    rows: Vec<Vec<f32>>,
    kept: Kept,
}

fn normals(seed: u64, count: usize) -> Vec<f32> {
    (0..count.div_ceil(4) as u64).flat_map(|i| Philox::new(seed, 1).normals(i)).take(count).collect()
}

impl Sequence {
    /// Rows whose keys differ in how much attention they draw.
    fn new(seed: u64, len: usize, heads: Heads, kept: Kept) -> Self {
        let width = heads.qkv_width();
        let rows = (0..len).map(|row| normals(seed << 20 | row as u64, width)).collect();
        Sequence { rows, kept }
    }

    fn query(&self, row: usize, head: usize, heads: Heads) -> &[f32] {
        &self.rows[row][head * heads.head_dim..][..heads.head_dim]
    }

    fn key(&self, row: usize, head: usize, heads: Heads) -> &[f32] {
        &self.rows[row][heads.query_width() + head * heads.head_dim..][..heads.head_dim]
    }

    fn value(&self, row: usize, head: usize, heads: Heads) -> &[f32] {
        &self.rows[row][heads.query_width() + (heads.num_kv_heads + head) * heads.head_dim..][..heads.head_dim]
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// What one KV head gives: results by row and query head, and the positions that are left after every row.
#[derive(Default)]
struct Expected {
    results: Vec<Vec<Vec<f64>>>,
    left: Vec<Vec<usize>>,
}

/// What H2O does, for all KV heads: each evicts on its own, or all together.
fn heavy_hitters(sequence: &Sequence, heads: Heads, scale: f64) -> Vec<Expected> {
    let Kept::Heavy { heavy, recent, prompt_len, stretch, spread } = sequence.kept else { panic!("another policy") };
    let group = heads.num_heads / heads.num_kv_heads;
    let mut caches: Vec<Vec<(usize, f32)>> = vec![Vec::new(); heads.num_kv_heads];
    let mut expected: Vec<Expected> = caches.iter().map(|_| Expected::default()).collect();
    for row in 0..sequence.rows.len() {
        for (kv_head, (cache, expected)) in caches.iter_mut().zip(&mut expected).enumerate() {
            cache.push((row, 0.0));
            let mut received = vec![0f32; cache.len()];
            let mut of_row = Vec::new();
            for head in kv_head * group..(kv_head + 1) * group {
                let query = sequence.query(row, head, heads);
                let key = |&(position, _): &(usize, f32)| scale * dot(query, sequence.key(position, kv_head, heads));
                let weights = softmax(&cache.iter().map(key).collect::<Vec<_>>());
                let mut result = vec![0f64; heads.head_dim];
                for ((weight, &(position, _)), received) in weights.iter().zip(cache.iter()).zip(&mut received) {
                    *received += *weight as f32;
                    let value = sequence.value(position, kv_head, heads);
                    result.iter_mut().zip(value).for_each(|(sum, &value)| *sum += weight * f64::from(value));
                }
                of_row.push(result);
            }
            expected.results.push(of_row);
            cache.iter_mut().zip(received).for_each(|((_, score), received)| *score += received);
        }
        let next = row + 1;
        if next >= prompt_len || next % stretch == 0 {
            match spread {
                Spread::Heads { least } => {
                    evict_together(&mut caches, heavy + recent, least, next.saturating_sub(recent))
                }
                _ => caches.iter_mut().for_each(|cache| evict(cache, heavy + recent, next.saturating_sub(recent))),
            }
        }
        for (cache, expected) in caches.iter().zip(&mut expected) {
            expected.left.push(cache.iter().map(|&(position, _)| position).collect());
        }
    }
    expected
}

/// The least of the positions before `latest` goes, until no more than `capacity` are left.
fn evict(cache: &mut Vec<(usize, f32)>, capacity: usize, latest: usize) {
    while cache.len() > capacity {
        let older = cache.iter().enumerate().filter(|(_, (position, _))| *position < latest);
        let least = older.min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(index, _)| index);
        cache.remove(least.expect("there are more than the recent ones"));
    }
}

/// As [`evict`], over all heads, as long as a head has more than `least` of those positions.
fn evict_together(caches: &mut [Vec<(usize, f32)>], capacity: usize, least: usize, latest: usize) {
    while caches.iter().map(Vec::len).sum::<usize>() > capacity * caches.len() {
        let mut worst: Option<(f32, usize, usize, usize)> = None;
        for (head, cache) in caches.iter().enumerate() {
            let older: Vec<_> = cache.iter().enumerate().filter(|(_, (position, _))| *position < latest).collect();
            if older.len() <= least {
                continue;
            }
            for (index, &(position, score)) in older {
                let this = (score, position, head, index);
                if worst.is_none_or(|worst| {
                    this.0.total_cmp(&worst.0).then((this.1, this.2).cmp(&(worst.1, worst.2))).is_lt()
                }) {
                    worst = Some(this);
                }
            }
        }
        let (_, _, head, index) = worst.expect("some head has more than it must keep");
        caches[head].remove(index);
    }
}

/// Pages of several sequences in a device's memory.
struct Cache {
    device: Host,
    frames: Frames<Region>,
    heads: Heads,
}

impl Cache {
    fn new(heads: Heads, dtype: DType, scored: bool, pages: usize) -> Self {
        let Heads { num_kv_heads, head_dim, .. } = heads;
        let layout = KvLayout { num_layers: 1, num_kv_heads, head_dim, dtype, scored };
        let bytes = pages * layout.layer_bytes().next_multiple_of(4096);
        let arena = Arena::new("test", Tier::Cpu, bytes + (16 << 20)).unwrap();
        let mut device = Host::new(arena);
        let stride = bytes / pages;
        let memory = device.allocate(bytes);
        Cache { device, frames: Frames { memory, layout, stride, count: pages }, heads }
    }

    /// Rows of some segments, one after the other, as a pass has them; gives what attention makes of each row.
    fn run(&mut self, sequences: &[Sequence], pages: &[Vec<u32>], ranges: &[std::ops::Range<usize>]) -> Vec<Vec<f32>> {
        let (heads, width) = (self.heads, self.heads.qkv_width());
        let mut rows: Vec<f32> = Vec::new();
        let mut segments = Vec::new();
        for ((sequence, pages), range) in sequences.iter().zip(pages).zip(ranges).filter(|(_, range)| !range.is_empty())
        {
            let (first_row, start) = (rows.len() / width, range.start);
            rows.extend(sequence.rows[range.clone()].iter().flatten());
            let (pages, kept) = (pages.clone(), sequence.kept);
            segments.push(Segment { first_row, len: range.len(), start, pages, kept });
        }
        let count = rows.len() / width;
        let mut arena = Arena::new("rows", Tier::Cpu, 8 * rows.len() + 4096).unwrap();
        let (mut qkv, mut out) = (arena.carve(4 * rows.len()), arena.carve(4 * count * heads.query_width()));
        qkv.as_mut_slice::<f32>()[..rows.len()].copy_from_slice(&rows);
        let span = AttentionSpan { window: None, scale: 1.0 / (heads.head_dim as f32).sqrt(), sinks: None };
        let view = KvViewMut { resident: &mut self.frames, streamed: None };
        self.device.append_kv(view, &segments, &qkv, heads);
        let view = KvViewMut { resident: &mut self.frames, streamed: None };
        self.device.attend(view, span, &segments, &qkv, heads, &mut out);
        out.as_slice::<f32>()[..count * heads.query_width()].chunks(heads.query_width()).map(<[f32]>::to_vec).collect()
    }

    /// Positions that a head keeps where heads share their slots: those that the pages' notes call its own.
    fn shared_positions(&self, pages: &[u32], head: usize) -> Vec<usize> {
        let Frames { memory, layout, stride, .. } = &self.frames;
        let mut positions: Vec<usize> = Vec::new();
        for &page in pages {
            let page = &memory.bytes()[page as usize * stride..][..layout.layer_bytes()];
            for part in 0..layout.num_kv_heads {
                let notes: Vec<u32> = page[layout.head(part)][layout.notes()]
                    .chunks(4)
                    .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
                    .collect();
                let owner = Owner::read(&notes);
                if usize::from(owner.head) == head + 1 {
                    let taken = &notes[..usize::from(owner.taken)];
                    positions.extend(taken.iter().map(|&note| (note & POSITION_BITS) as usize));
                }
            }
        }
        positions.sort_unstable();
        positions
    }

    /// Positions in the first `count` slots of a head.
    fn positions(&self, pages: &[u32], head: usize, count: usize) -> Vec<usize> {
        let Frames { memory, layout, stride, .. } = &self.frames;
        let slot = |slot: usize| {
            let page = &memory.bytes()[pages[slot / PAGE_POSITIONS] as usize * stride..][..layout.layer_bytes()];
            let notes = &page[layout.head(head)][layout.notes()];
            let at = 4 * (slot % PAGE_POSITIONS);
            u32::from_le_bytes(notes[at..at + 4].try_into().unwrap()) as usize
        };
        let mut positions: Vec<usize> = (0..count).map(slot).collect();
        positions.sort_unstable();
        positions
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whole pages that sequences share, in whatever nesting, give everybody who decodes the bits that pages of its own
    /// give.
    #[test]
    fn queries_that_share_pages_get_what_they_get_alone(
        seed in 0u64..1000,
        groups in 1usize..10,
        kv_heads in 1usize..3,
        dtype in prop::sample::select(DType::ALL.to_vec()),
        // Whom a sequence begins like, for how many pages, and its rows.
        shapes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4, 1usize..270), 2..24),
    ) {
        let heads = Heads { num_heads: groups * kv_heads, num_kv_heads: kv_heads, head_dim: 20 };
        let (mut sequences, mut pages): (Vec<Sequence>, Vec<Vec<u32>>) = (Vec::new(), Vec::new());
        let (mut free, mut new_rows) = (0u32.., Vec::new());
        for (index, (parent, shared, len)) in shapes.iter().enumerate() {
            let mut sequence = Sequence::new(seed * 32 + index as u64, *len, heads, Kept::All);
            let mut own = Vec::new();
            if index > 0 {
                let parent = parent.index(index);
                let most = (sequences[parent].rows.len() - 1).min(len - 1) / PAGE_POSITIONS;
                let shared = (*shared).min(most);
                own.extend(&pages[parent][..shared]);
                let rows = shared * PAGE_POSITIONS;
                sequence.rows.splice(..rows, sequences[parent].rows[..rows].iter().cloned());
            }
            new_rows.push(own.len() * PAGE_POSITIONS..len - 1);
            own.extend(free.by_ref().take(Kept::All.pages(*len) - own.len()));
            sequences.push(sequence);
            pages.push(own);
        }
        let mut cache = Cache::new(heads, dtype, false, free.next().unwrap() as usize);
        for (index, rows) in new_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            cache.run(&sequences[index..=index], &pages[index..=index], std::slice::from_ref(rows));
        }
        let last: Vec<_> = new_rows.iter().map(|rows| rows.end..rows.end + 1).collect();
        let together = cache.run(&sequences, &pages, &last);
        for (index, result) in together.iter().enumerate() {
            let sequence = &sequences[index..=index];
            let own: Vec<u32> = (0..pages[index].len() as u32).collect();
            let mut cache = Cache::new(heads, dtype, false, own.len());
            let alone = cache.run(sequence, &[own], std::slice::from_ref(&(0..last[index].end)));
            prop_assert_eq!(Some(result), alone.last(), "sequence {} of {:?}", index, pages);
        }
    }

    /// Ragged sequences in any chunks keep what the reference keeps after every pass, and see what it sees.
    #[test]
    fn heavy_hitters_are_those_of_the_reference(
        seed in 0u64..1000,
        groups in 1usize..4,
        kv_heads in 1usize..3,
        shapes in prop::collection::vec((0usize..90, 1usize..60, 1usize..200, 0usize..30, 1usize..6), 1..4),
        chunks in prop::collection::vec(1usize..150, 1..6),
        together in any::<bool>(),
    ) {
        let heads = Heads { num_heads: groups * kv_heads, num_kv_heads: kv_heads, head_dim: 20 };
        let sequences: Vec<Sequence> = shapes.iter().enumerate().map(|(index, shape)| {
            let &(heavy, recent, prompt_len, generated, stretch) = shape;
            let (spread, stretch) = match together {
                true => (Spread::Heads { least: heavy / 4 }, 64),
                false => (Spread::Even, if stretch == 5 { WHOLE_PROMPT } else { 64 * stretch }),
            };
            let kept = Kept::Heavy { heavy, recent, prompt_len, stretch, spread };
            Sequence::new(seed * 8 + index as u64, prompt_len + generated, heads, kept)
        }).collect();
        let mut free = 0u32..;
        let pages: Vec<Vec<u32>> = sequences.iter().map(|sequence| {
            free.by_ref().take(sequence.kept.most_held(sequence.rows.len())).collect()
        }).collect();
        let mut cache = Cache::new(heads, DType::F32, true, pages.iter().map(Vec::len).sum());
        let scale = 1.0 / f64::from(heads.head_dim as u32).sqrt();
        let expected: Vec<Vec<Expected>> =
            sequences.iter().map(|sequence| heavy_hitters(sequence, heads, scale)).collect();
        let (mut done, mut turn) = (vec![0; sequences.len()], 0);
        while sequences.iter().zip(&done).any(|(sequence, &done)| done < sequence.rows.len()) {
            let ranges: Vec<_> = sequences.iter().zip(&done).map(|(sequence, &done)| {
                turn += 1;
                let to = sequence.rows.len().min(done + chunks[turn % chunks.len()]);
                done..sequence.kept.reach(&(done..to))
            }).collect();
            let mut results = cache.run(&sequences, &pages, &ranges).into_iter();
            for (index, range) in ranges.into_iter().enumerate() {
                for row in range.clone() {
                    let result = results.next().unwrap();
                    for (head, result) in result.chunks(heads.head_dim).enumerate() {
                        let expected = &expected[index][head / groups].results[row][head % groups];
                        for (a, b) in result.iter().zip(expected) {
                            let off = (f64::from(*a) - b).abs();
                            prop_assert!(off < 1e-4, "sequence {}, row {}: {} {}", index, row, a, b);
                        }
                    }
                }
                if let Some(last) = range.clone().last() {
                    let kept = sequences[index].kept;
                    for (head, Expected { left, .. }) in expected[index].iter().enumerate() {
                        let left = &left[last];
                        let ours = match together {
                            true => cache.shared_positions(&pages[index][..kept.pages(last + 1)], head),
                            false => cache.positions(&pages[index], head, left.len()),
                        };
                        prop_assert_eq!(&ours, left, "sequence {}, head {}, after row {}", index, head, last);
                    }
                    let left: usize = expected[index].iter().map(|expected| expected.left[last].len()).sum();
                    prop_assert_eq!(kept.slots(last + 1) * kv_heads, left);
                }
                done[index] = range.end;
            }
        }
    }

    /// The beginning and the latest positions, all keys rotated anew by their places in the cache for every query, as
    /// StreamingLLM does it.
    #[test]
    fn windows_with_sinks_are_those_of_the_reference(
        seed in 0u64..1000, start in 0usize..80, recent in 1usize..100, len in 1usize..400, chunk in 1usize..150,
    ) {
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 16 };
        let (dim, half) = (heads.head_dim, heads.head_dim / 2);
        let plain = Sequence::new(seed, len, heads, Kept::Window { start, recent });
        let angles = |place: f64| (0..half).map(move |i| place / 100f64.powf(i as f64 / half as f64));
        let turned = |x: &[f32], place: f64| -> Vec<f32> {
            let mut y = x.to_vec();
            for (i, angle) in angles(place).enumerate() {
                let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
                (y[i], y[i + half]) =
                    ((a * angle.cos() - b * angle.sin()) as f32, (b * angle.cos() + a * angle.sin()) as f32);
            }
            y
        };
        let rotated = |row: &Vec<f32>, place: usize| -> Vec<f32> {
            let turn = |(head, x): (usize, &[f32])| if head < 3 { turned(x, place as f64) } else { x.to_vec() };
            row.chunks(dim).enumerate().flat_map(turn).collect()
        };
        let rows = plain.rows.iter().enumerate().map(|(place, row)| rotated(row, place)).collect();
        let sequence = Sequence { rows, kept: plain.kept };
        let pages: Vec<u32> = (0..sequence.kept.pages(len) as u32).rev().collect();
        let mut cache = Cache::new(heads, DType::F32, false, pages.len());
        let mut at = 0;
        while at < len {
            let range = at..sequence.kept.reach(&(at..len.min(at + chunk)));
            let results = run_with_sinks(&mut cache, &sequence, &pages, range.clone(), start + recent, &angles);
            for (row, result) in range.clone().zip(results) {
                let seen: Vec<usize> = (0..=row).filter(|&key| key < start || row - key < recent).collect();
                for head in 0..2 {
                    let query = turned(plain.query(row, head, heads), (seen.len() - 1) as f64);
                    let score = |(place, &key): (usize, &usize)| {
                        dot(&query, &turned(plain.key(key, 0, heads), place as f64)) / (dim as f64).sqrt()
                    };
                    let weights = softmax(&seen.iter().enumerate().map(score).collect::<Vec<_>>());
                    for d in 0..dim {
                        let value = |key: usize| f64::from(plain.value(key, 0, heads)[d]);
                        let expected: f64 = weights.iter().zip(&seen).map(|(weight, &key)| weight * value(key)).sum();
                        let got = f64::from(result[head * dim + d]);
                        prop_assert!((got - expected).abs() < 1e-3, "row {}: {} {}", row, got, expected);
                    }
                }
            }
            at = range.end;
        }
    }
}

/// One segment of a sequence whose queries meet the first positions as if nothing were missing.
fn run_with_sinks<I: Iterator<Item = f64>>(
    cache: &mut Cache,
    sequence: &Sequence,
    pages: &[u32],
    range: std::ops::Range<usize>,
    capacity: usize,
    angles: &dyn Fn(f64) -> I,
) -> Vec<Vec<f32>> {
    let (heads, width) = (cache.heads, cache.heads.qkv_width());
    let rows: Vec<f32> = sequence.rows[range.clone()].iter().flatten().copied().collect();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for position in range.clone() {
        for angle in angles(-((position + 1).saturating_sub(capacity) as f64)) {
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    let rotation = Rotation { cos: &cos, sin: &sin, rotary_dim: heads.head_dim };
    let mut arena = Arena::new("rows", Tier::Cpu, 8 * rows.len() + 4096).unwrap();
    let (mut qkv, mut out) = (arena.carve(4 * rows.len()), arena.carve(4 * range.len() * heads.query_width()));
    qkv.as_mut_slice::<f32>()[..rows.len()].copy_from_slice(&rows);
    let (pages, kept) = (pages.to_vec(), sequence.kept);
    let segments = [Segment { first_row: 0, len: rows.len() / width, start: range.start, pages, kept }];
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let span = AttentionSpan { window: None, scale, sinks: Some(&rotation) };
    let view = KvViewMut { resident: &mut cache.frames, streamed: None };
    cache.device.append_kv(view, &segments, &qkv, heads);
    let view = KvViewMut { resident: &mut cache.frames, streamed: None };
    cache.device.attend(view, span, &segments, &qkv, heads, &mut out);
    let count = range.len() * heads.query_width();
    out.as_slice::<f32>()[..count].chunks(heads.query_width()).map(<[f32]>::to_vec).collect()
}
