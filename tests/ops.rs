//! Every operation on the card against the host's, on random shapes. On machines without a card the emulator runs the
//! very same kernels.
//!
//! `OPS=N` draws N shapes of everything instead of 3.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};
use support::cuda::with_card;
use support::jobs::Chance;
use tidemill::device::cuda::card::Card;
use tidemill::device::cuda::workspace::Workspace;
use tidemill::device::cuda::{Cuda, Needs};
use tidemill::device::host::Host;
use tidemill::device::sampling::{Draw, SampleRule, Target as Wanted, TokenCount};
use tidemill::device::{
    AttentionSpan, Device, Frames, HeadNorms, Heads, KvViewMut, Matrix, NormParameters, Piece, Rotation, Target,
};
use tidemill::error::Tier;
use tidemill::kv::layout::{KvLayout, pages_for};
use tidemill::kv::pages::Segment;
use tidemill::kv::policy::{Kept, Spread, WHOLE_PROMPT};
use tidemill::memory::arena::{Arena, Region};
use tidemill::model::config::{Activation, Norm};
use tidemill::model::dtype::DType;
use tidemill::model::packed::panels::{PANEL_OUTPUTS, TILE_INPUTS, packed_bytes, panel_bytes, put_group, tile_bytes};
use tidemill::quant::groups::{GROUP, encode};

type CardBuffer = <Cuda as Device>::Buffer;

/// The same operations on both.
struct Pair {
    host: Host,
    card: Cuda,
}

/// The same bytes on both.
struct Both {
    host: Region,
    card: CardBuffer,
}

const VOCAB: usize = 300;
const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 2, head_dim: 128 };

impl Pair {
    fn new() -> Pair {
        let card = Card::open().unwrap_or_else(|problem| panic!("{problem}"));
        let workspace = Workspace::of(HEADS, VOCAB, 1 << 20);
        let device_bytes = workspace.bytes() + (320 << 20);
        let cache = support::scratch_root().join("cache");
        let needs = Needs { workspace, rows: 256, device_bytes, cache: &cache, compiling: &|| {} };
        let mut beside = Arena::new("test", Tier::Cpu, 32 << 20).unwrap();
        let card = Cuda::new(card, &needs, &mut beside).unwrap_or_else(|error| panic!("{error}"));
        Pair { host: Host::new(Arena::new("test", Tier::Cpu, 300 << 20).unwrap()), card }
    }

    fn bytes(&mut self, bytes: &[u8]) -> Both {
        let mut both = Both { host: self.host.allocate(bytes.len()), card: self.card.allocate(bytes.len()) };
        both.host.bytes_mut().copy_from_slice(bytes);
        self.card.copy_in(&[(bytes, 0)], &mut both.card).unwrap();
        both
    }

    fn floats(&mut self, floats: &[f32]) -> Both {
        self.bytes(bytemuck::cast_slice(floats))
    }

    fn zeros(&mut self, elements: usize) -> Both {
        self.floats(&vec![0.0; elements])
    }

    /// What both have in a buffer.
    fn read(&self, both: &Both) -> (Vec<u8>, Vec<u8>) {
        self.card.finish().unwrap_or_else(|error| panic!("{error}"));
        let mut bytes = vec![0u8; both.host.len()];
        self.card.copy_out(&both.card, &mut [(0, &mut bytes)]).unwrap();
        (both.host.bytes().to_vec(), bytes)
    }

    /// Compares f32 results.
    fn close(&self, both: &Both, bound: f64, what: &str) -> f64 {
        let (host, card) = self.read(both);
        let floats = |bytes: &[u8]| -> Vec<f32> { bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect() };
        let error = nmse(&floats(&host), &floats(&card));
        assert!(error <= bound, "{what}: NMSE {error:.2e}, bound {bound:.0e}");
        error
    }
}

/// The mean squared error over the mean square.
fn nmse(expected: &[f32], got: &[f32]) -> f64 {
    let sum = |of: &dyn Fn(f64, f64) -> f64| {
        expected.iter().zip(got).map(|(&a, &b)| of(f64::from(a), f64::from(b))).sum::<f64>()
    };
    let error = sum(&|a, b| (a - b) * (a - b));
    let error = if error.is_nan() { f64::INFINITY } else { error };
    error / sum(&|a, _| a * a).max(1e-30)
}

/// Sums of f32 in another order.
const SAME: f64 = 1e-10;

/// What rounding operands to the type that products take costs.
fn product_bound(dtype: DType, rows: usize) -> f64 {
    match dtype {
        _ if rows <= 8 => SAME,
        DType::F32 => SAME,
        DType::Bf16 => 3e-5,
        DType::F16 | DType::Int8 | DType::Int4 => 5e-7,
    }
}

fn normal(chance: &mut Chance) -> f32 {
    let unit = |chance: &mut Chance| (chance.below(1 << 20) as f32 + 0.5) / (1 << 20) as f32;
    let (a, b) = (unit(chance), unit(chance));
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

fn normals(chance: &mut Chance, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| scale * normal(chance)).collect()
}

/// A packed matrix of random weights.
fn packed(chance: &mut Chance, inputs: usize, outputs: usize, dtype: DType) -> Vec<u8> {
    let mut bytes = vec![0u8; packed_bytes(inputs, outputs, dtype)];
    let (panel, tile) = (panel_bytes(inputs, dtype), tile_bytes(dtype));
    for output in 0..outputs {
        let weights = normals(chance, inputs, 1.0 / (inputs as f32).sqrt());
        let lane = output % PANEL_OUTPUTS;
        let panel = &mut bytes[output / PANEL_OUTPUTS * panel..][..panel];
        for (tile, weights) in panel.chunks_exact_mut(tile).zip(weights.chunks(TILE_INPUTS)) {
            let element = |k: usize| k * PANEL_OUTPUTS + lane;
            match dtype {
                DType::F32 => {
                    let tile: &mut [f32] = bytemuck::cast_slice_mut(tile);
                    weights.iter().enumerate().for_each(|(k, &weight)| tile[element(k)] = weight);
                }
                DType::Bf16 => {
                    let tile: &mut [bf16] = bytemuck::cast_slice_mut(tile);
                    weights.iter().enumerate().for_each(|(k, &weight)| tile[element(k)] = bf16::from_f32(weight));
                }
                DType::F16 => {
                    let tile: &mut [f16] = bytemuck::cast_slice_mut(tile);
                    weights.iter().enumerate().for_each(|(k, &weight)| tile[element(k)] = f16::from_f32(weight));
                }
                DType::Int8 | DType::Int4 => {
                    let mut codes = [0u8; GROUP];
                    let most = if dtype == DType::Int4 { 15 } else { 255 };
                    let grid = encode(weights, most, &mut codes).unwrap();
                    put_group(tile, dtype, lane, &codes, grid);
                }
            }
        }
    }
    bytes
}

/// The matrix in two pieces, or one.
fn matrix<'a, B>(buffer: &'a B, inputs: usize, outputs: usize, dtype: DType, cut: usize) -> Matrix<'a, B> {
    let (panel, panels) = (panel_bytes(inputs, dtype), outputs.div_ceil(PANEL_OUTPUTS));
    let cut = cut.min(panels);
    let pieces = [0..cut * panel, cut * panel..panels * panel];
    let pieces = pieces.into_iter().filter(|bytes| !bytes.is_empty()).map(|bytes| Piece { buffer, bytes }).collect();
    Matrix { pieces, dtype, inputs, outputs }
}

fn draws() -> u64 {
    std::env::var("OPS").map_or(3, |count| count.parse().unwrap())
}

/// The greatest error of everything that was compared, by name.
#[derive(Default)]
struct Table(BTreeMap<String, f64>);

impl Table {
    fn note(&mut self, what: &str, error: f64) {
        let worst = self.0.entry(what.to_owned()).or_default();
        *worst = worst.max(error);
    }

    fn print(&self) {
        use std::io::Write;
        let text: String = self.0.iter().map(|(what, error)| format!("{what:24} NMSE {error:.1e}\n")).collect();
        write!(std::io::stderr(), "{text}").expect("standard error");
    }
}

#[test]
fn rows() {
    with_card("rows", || {
        let (mut pair, mut table) = (Pair::new(), Table::default());
        for seed in 0..draws() {
            let chance = &mut Chance::new(seed);
            element_wise(&mut pair, chance, &mut table);
            heads(&mut pair, chance, &mut table);
        }
        table.print();
    });
}

fn element_wise(pair: &mut Pair, chance: &mut Chance, table: &mut Table) {
    let (rows, width) = (1 + chance.below(9) as usize, 1 + chance.below(400) as usize);
    let x = pair.floats(&normals(chance, rows * width, 2.0));
    for (norm, name) in [(Norm::Rms { eps: 1e-5 }, "norm rms"), (Norm::Layer { eps: 1e-5 }, "norm layer")] {
        for has_bias in [false, true] {
            let weight = pair.floats(&normals(chance, width, 1.0));
            let bias = has_bias.then(|| pair.floats(&normals(chance, width, 1.0)));
            let (host_bias, card_bias) = bias.map_or((None, None), |both| (Some(both.host), Some(both.card)));
            let mut out = pair.zeros(rows * width);
            let host = NormParameters { norm, weight: weight.host, bias: host_bias };
            pair.host.norm(&x.host, rows, width, &host, &mut out.host);
            let card = NormParameters { norm, weight: weight.card, bias: card_bias };
            pair.card.norm(&x.card, rows, width, &card, &mut out.card);
            table.note(name, pair.close(&out, SAME, name));
            let mut sum = pair.floats(&normals(chance, rows * width, 1.0));
            pair.host.add_norm(&mut sum.host, &x.host, rows, width, &host, &mut out.host);
            pair.card.add_norm(&mut sum.card, &x.card, rows, width, &card, &mut out.card);
            table.note("add and norm", pair.close(&sum, 0.0, "the sum of add_norm").max(pair.close(&out, SAME, name)));
        }
    }
    let activations = [Activation::Relu, Activation::Silu, Activation::Gelu, Activation::GeluTanh];
    for (activation, gated) in activations.into_iter().flat_map(|a| [(a, false), (a, true)]) {
        let up = pair.floats(&normals(chance, rows * width * if gated { 2 } else { 1 }, 2.0));
        let mut out = pair.zeros(rows * width);
        pair.host.activate(activation, gated, &up.host, rows, width, &mut out.host);
        pair.card.activate(activation, gated, &up.card, rows, width, &mut out.card);
        table.note("activate", pair.close(&out, SAME, "activate"));
    }
    let mut sum = pair.floats(&normals(chance, rows * width, 1.0));
    pair.host.add(&mut sum.host, &x.host, rows * width);
    pair.card.add(&mut sum.card, &x.card, rows * width);
    table.note("add", pair.close(&sum, 0.0, "add"));
    let indices: Vec<usize> = (0..rows).map(|_| chance.below(rows as u64) as usize).collect();
    let mut out = pair.zeros((rows + 2) * width);
    pair.host.gather(&x.host, &indices, width, &mut out.host, 2);
    pair.card.gather(&x.card, &indices, width, &mut out.card, 2);
    table.note("gather", pair.close(&out, 0.0, "gather"));
    let positions = pair.floats(&normals(chance, 20 * width, 1.0));
    let indices: Vec<u32> = (0..rows).map(|_| chance.below(20) as u32).collect();
    pair.host.add_rows(&positions.host, &indices, width, &mut sum.host);
    pair.card.add_rows(&positions.card, &indices, width, &mut sum.card);
    table.note("add_rows", pair.close(&sum, 0.0, "add_rows"));
}

fn rotation(chance: &mut Chance, rows: usize, half: usize) -> (Vec<f32>, Vec<f32>) {
    let angles: Vec<f32> = (0..rows * half).map(|_| chance.below(1000) as f32 / 100.0).collect();
    (angles.iter().map(|angle| angle.cos()).collect(), angles.iter().map(|angle| angle.sin()).collect())
}

fn heads(pair: &mut Pair, chance: &mut Chance, table: &mut Table) {
    let heads = random_heads(chance);
    let rows = 1 + chance.below(9) as usize;
    let mut qkv = pair.floats(&normals(chance, rows * heads.qkv_width(), 1.0));
    let [query, key] = [(); 2].map(|()| pair.floats(&normals(chance, heads.head_dim, 1.0)));
    let norms = HeadNorms { eps: 1e-6, query: query.host, key: key.host };
    pair.host.norm_heads(&mut qkv.host, rows, heads, &norms);
    let norms = HeadNorms { eps: 1e-6, query: query.card, key: key.card };
    pair.card.norm_heads(&mut qkv.card, rows, heads, &norms);
    table.note("norm_heads", pair.close(&qkv, SAME, "norm_heads"));
    let rotary_dim = 2 * (1 + chance.below(heads.head_dim as u64 / 2) as usize);
    let (cos, sin) = rotation(chance, rows, rotary_dim / 2);
    let rotation = Rotation { cos: &cos, sin: &sin, rotary_dim };
    pair.host.rotate(&mut qkv.host, rows, heads, &rotation);
    pair.card.rotate(&mut qkv.card, rows, heads, &rotation);
    table.note("rotate", pair.close(&qkv, SAME, "rotate"));
}

fn random_heads(chance: &mut Chance) -> Heads {
    let num_kv_heads = 1 + chance.below(2) as usize;
    let group = [1, 2, 3, 4][chance.below(4) as usize];
    let head_dim = [8, 16, 20, 64, 96, 128][chance.below(6) as usize];
    Heads { num_heads: num_kv_heads * group, num_kv_heads, head_dim }
}

#[test]
fn products() {
    with_card("products", || {
        let (mut pair, mut table) = (Pair::new(), Table::default());
        for seed in 0..draws() {
            for dtype in DType::ALL {
                for rows in [1, 3, 8, 9, 21, 65] {
                    let chance = &mut Chance::new(1000 * seed + rows as u64);
                    product(&mut pair, chance, &mut table, dtype, rows);
                }
            }
        }
        table.print();
    });
}

fn product(pair: &mut Pair, chance: &mut Chance, table: &mut Table, dtype: DType, rows: usize) {
    let (inputs, outputs) = (1 + chance.below(200) as usize, 1 + chance.below(100) as usize);
    let x = pair.floats(&normals(chance, rows * inputs, 1.0));
    let w = pair.bytes(&packed(chance, inputs, outputs, dtype));
    let cut = chance.below(4) as usize;
    let (host_w, card_w) = (matrix(&w.host, inputs, outputs, dtype, cut), matrix(&w.card, inputs, outputs, dtype, cut));
    let bias = (chance.below(2) == 0).then(|| pair.floats(&normals(chance, outputs, 1.0)));
    let column = chance.below(5) as usize;
    let stride = outputs + column + chance.below(5) as usize;
    let mut y = pair.floats(&normals(chance, rows * stride, 1.0));
    let mut scratch = pair.zeros(rows * inputs.next_multiple_of(64) + 1024);
    let target = Target { buffer: &mut y.host, stride, column };
    pair.host.linear(&x.host, rows, &host_w, bias.as_ref().map(|b| &b.host), &mut scratch.host, target);
    let target = Target { buffer: &mut y.card, stride, column };
    pair.card.linear(&x.card, rows, &card_w, bias.as_ref().map(|b| &b.card), &mut scratch.card, target);
    let what = format!("linear {dtype} {}", if rows <= 8 { "few rows" } else { "many rows" });
    let error = pair.close(&y, product_bound(dtype, rows), &format!("{what}: {rows} x {inputs} x {outputs}"));
    table.note(&what, error);
    if matches!(dtype, DType::Int8 | DType::Int4) {
        let what = format!("{what}, rounded");
        pair.host.round_activations(true);
        pair.card.round_activations(true);
        let target = Target { buffer: &mut y.host, stride, column };
        pair.host.linear(&x.host, rows, &host_w, bias.as_ref().map(|b| &b.host), &mut scratch.host, target);
        let target = Target { buffer: &mut y.card, stride, column };
        pair.card.linear(&x.card, rows, &card_w, bias.as_ref().map(|b| &b.card), &mut scratch.card, target);
        pair.host.round_activations(false);
        pair.card.round_activations(false);
        table.note(&what, pair.close(&y, product_bound(dtype, rows), &what));
    }
    let tokens: Vec<u32> = (0..rows).map(|_| chance.below(outputs as u64) as u32).collect();
    let mut out = pair.zeros(rows * inputs);
    pair.host.embed(&host_w, &tokens, &mut out.host);
    pair.card.embed(&card_w, &tokens, &mut out.card);
    table.note(&format!("embed {dtype}"), pair.close(&out, 0.0, "embed"));
}

#[test]
fn attention() {
    with_card("attention", || {
        let (mut pair, mut table) = (Pair::new(), Table::default());
        for seed in 0..draws() {
            for dtype in DType::ALL {
                for kind in 0..3 {
                    sequences(&mut pair, &mut Chance::new(7 * seed + kind), &mut table, dtype, kind);
                }
            }
        }
        table.print();
    });
}

/// Frames on both, resident ones and others.
struct BothFrames {
    host: [Frames<Region>; 2],
    card: [Frames<CardBuffer>; 2],
}

impl BothFrames {
    fn new(pair: &mut Pair, layout: KvLayout, counts: [usize; 2]) -> BothFrames {
        let stride = layout.layer_bytes().next_multiple_of(4096);
        BothFrames {
            host: counts.map(|count| Frames { memory: pair.host.allocate(count * stride), layout, stride, count }),
            card: counts.map(|count| Frames { memory: pair.card.allocate(count * stride), layout, stride, count }),
        }
    }
}

fn view<B>([resident, streamed]: &mut [Frames<B>; 2]) -> KvViewMut<'_, B> {
    KvViewMut { resident, streamed: Some(streamed) }
}

/// A few sequences of one kind, in passes that bring some rows of each.
fn sequences(pair: &mut Pair, chance: &mut Chance, table: &mut Table, dtype: DType, kind: u64) {
    let heads = random_heads(chance);
    let layout = KvLayout {
        num_layers: 1,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
        dtype,
        scored: kind == 2,
    };
    let lengths: Vec<usize> = (0..3).map(|_| 1 + chance.below(200) as usize).collect();
    let kept: Vec<Kept> = lengths
        .iter()
        .map(|&len| match kind {
            1 => Kept::Window { start: chance.below(70) as usize, recent: 1 + chance.below(90) as usize },
            2 => {
                let prompt_len = (1 + chance.below(len as u64)) as usize;
                let stretch = [64, 64, 128, WHOLE_PROMPT][chance.below(4) as usize];
                let (heavy, recent) = (1 + chance.below(40) as usize, 1 + chance.below(40) as usize);
                Kept::Heavy { heavy, recent, prompt_len, stretch, spread: Spread::Even }
            }
            _ => Kept::All,
        })
        .collect();
    // Every page has a frame of its own, in any order over both memories.
    let per_sequence: Vec<usize> = lengths.iter().zip(&kept).map(|(&len, kept)| kept.most_held(len).max(1)).collect();
    let count: usize = per_sequence.iter().sum::<usize>() + 3;
    let resident = count / 2;
    let mut frames = BothFrames::new(pair, layout, [resident, count - resident]);
    let mut free: Vec<u32> = (0..count as u32).collect();
    chance.shuffle(&mut free);
    let pages: Vec<Vec<u32>> = per_sequence.iter().map(|&count| free.split_off(free.len() - count)).collect();
    let window = (kind != 2 && chance.below(3) == 0).then(|| 1 + chance.below(100) as usize);
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let mut done = vec![0usize; lengths.len()];
    let name = format!("attend {dtype} {}", ["all", "window", "heavy"][kind as usize]);
    while done.iter().zip(&lengths).any(|(done, len)| done < len) {
        let (mut segments, mut rows) = (Vec::new(), 0);
        for (index, &len) in lengths.iter().enumerate() {
            let end = (done[index] + [1, 2, 33, 80][chance.below(4) as usize]).min(len);
            let end = kept[index].reach(&(done[index]..end));
            if end > done[index] {
                let (start, pages) = (done[index], pages[index].clone());
                segments.push(Segment { first_row: rows, len: end - start, start, pages, kept: kept[index] });
                rows += end - start;
                done[index] = end;
            }
        }
        let qkv = pair.floats(&normals(chance, rows * heads.qkv_width(), 1.0));
        let mut out = pair.zeros(rows * heads.query_width());
        let rotary_dim = 2 * (heads.head_dim / 2);
        let (cos, sin) = rotation(chance, rows, rotary_dim / 2);
        let rotation = Rotation { cos: &cos, sin: &sin, rotary_dim };
        let sinks = (kind == 1).then_some(&rotation);
        let span = AttentionSpan { window, scale, sinks };
        pair.host.append_kv(view(&mut frames.host), &segments, &qkv.host, heads);
        pair.card.append_kv(view(&mut frames.card), &segments, &qkv.card, heads);
        pair.host.attend(view(&mut frames.host), span, &segments, &qkv.host, heads, &mut out.host);
        pair.card.attend(view(&mut frames.card), span, &segments, &qkv.card, heads, &mut out.card);
        // Prompts on tensor cores round queries and probabilities to the pages' dtype.
        let tensors = heads.head_dim >= 64 && segments.iter().any(|segment| segment.len >= 32);
        let bound = match dtype {
            DType::Bf16 if tensors => 1e-4,
            DType::F16 if tensors => 1e-6,
            _ => 1e-8,
        };
        table.note(&name, pair.close(&out, bound, &name));
    }
    let [resident, _] = &mut frames.card;
    if resident.count >= 2 {
        pair.card.copy_frame(resident, 0, 1);
        pair.card.finish().unwrap();
        let mut both = [vec![0u8; resident.stride], vec![0u8; resident.stride]];
        let [from, to] = &mut both;
        pair.card.copy_out(&resident.memory, &mut [(0, from), (resident.stride, to)]).unwrap();
        assert!(both[0] == both[1], "a frame that was copied differs");
    }
    assert!(lengths.iter().zip(&pages).all(|(&len, pages)| pages.len() <= pages_for(len)));
}

fn rule(chance: &mut Chance) -> SampleRule {
    let tokens = |chance: &mut Chance, count: u64| -> Arc<[u32]> {
        (0..chance.below(count)).map(|_| chance.below(VOCAB as u64) as u32).collect()
    };
    let mut counted: Vec<u32> = tokens(chance, 20).to_vec();
    counted.sort_unstable();
    counted.dedup();
    let counts: Vec<TokenCount> =
        counted.into_iter().map(|token| TokenCount { token, output: chance.below(4) as u32 }).collect();
    let one_in = |chance: &mut Chance, count: u64| chance.below(count) == 0;
    SampleRule {
        allowed: one_in(chance, 4).then(|| (0..VOCAB as u32).step_by(3).collect()),
        banned: tokens(chance, 10),
        bias: tokens(chance, 6).iter().map(|&token| (token, 1.5)).collect(),
        counts: counts.into(),
        repetition_penalty: if one_in(chance, 2) { 1.0 } else { 1.3 },
        frequency_penalty: if one_in(chance, 2) { 0.0 } else { 0.4 },
        presence_penalty: if one_in(chance, 2) { 0.0 } else { -0.3 },
        temperature: [0.0, 0.7, 1.0, 1.6][chance.below(4) as usize],
        min_p: if one_in(chance, 2) { 0.0 } else { 0.05 },
        top_k: [0, 1, 7, 50][chance.below(4) as usize],
        top_p: if one_in(chance, 2) { 1.0 } else { 0.8 },
        uniform: chance.below(1 << 30) as f64 / (1u64 << 30) as f64,
    }
}

#[test]
fn sampling() {
    with_card("sampling", || {
        let mut pair = Pair::new();
        for seed in 0..draws() {
            let chance = &mut Chance::new(seed);
            let rows = 7;
            let mut logits = normals(chance, rows * VOCAB, 3.0);
            logits[6 * VOCAB + 5] = f32::NAN;
            let logits = pair.floats(&logits);
            let draws: Vec<Draw> = (0..40)
                .map(|index| {
                    let target = match index % 4 {
                        0 => Wanted::Score(chance.below(VOCAB as u64) as u32),
                        _ => Wanted::Sample(rule(chance)),
                    };
                    Draw { row: index, target, top: [0, 1, 5, VOCAB][chance.below(4) as usize] }
                })
                .collect();
            let draws: Vec<(usize, &Draw)> = draws.iter().enumerate().map(|(index, d)| (index % rows, d)).collect();
            let host = pair.host.sample(&logits.host, VOCAB, &draws);
            let card = pair.card.sample(&logits.card, VOCAB, &draws);
            pair.card.finish().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(host.len(), card.len());
            for ((host, card), (row, draw)) in host.iter().zip(&card).zip(&draws) {
                let what = format!("seed {seed}, row {row}: {draw:?}\nhost {host:?}\ncard {card:?}");
                assert_eq!(host.problem, card.problem, "{what}");
                if host.problem.is_some() {
                    continue;
                }
                assert_eq!(host.token, card.token, "{what}");
                assert!((host.logprob - card.logprob).abs() < 1e-5, "{what}");
                assert_eq!(host.top.len(), card.top.len(), "{what}");
                let close =
                    |(host, card): (&(u32, f32), &(u32, f32))| host.0 == card.0 && (host.1 - card.1).abs() < 1e-5;
                assert!(host.top.iter().zip(&card.top).all(close), "{what}");
            }
        }
    });
}
