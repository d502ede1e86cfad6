//! Kernels at work as the executor calls them: through a device, on layers of a realistic shape.
//!
//! Weights and keys are walked through in memory that is much larger than the caches, so that a product of few rows
//! pays for reading its weights, as it does in a pass.
//!
//! **Invariant:** a rate is what the cost formulas have to be given so that they name the time that was measured; it is
//! found by turning those formulas around, not by counting anew.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use serde_json::json;

use super::measure::{median, repeated, rounds};
use crate::cost::{LayerLoad, ModelCost};
use crate::device::sampling::{Draw, SampleRule, Target as Wanted};
use crate::device::{AttentionSpan, Device, Frames, Heads, KvViewMut, Matrix, NormParameters, Piece};
use crate::device::{Rotation, Target};
use crate::error::Result;
use crate::hardware::{Curve, IntegerPages, Keeping, Kernels};
use crate::kv::layout::{KvLayout, PAGE_POSITIONS, pages_for};
use crate::kv::pages::Segment;
use crate::kv::policy::{Kept, Spread};
use crate::memory::arena::aligned;
use crate::model::config::{Activation, ModelConfig};
use crate::model::dtype::DType;
use crate::model::packed::panels::packed_bytes;
use crate::rng::Philox;

/// Rows of the points of a curve.
pub const ROWS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048];

/// Layers of the widest weights that the region holds.
const LAYERS: usize = 2;
/// Rows of element-wise work: a chunk of a prompt, whose activations leave the caches as they do in a pass.
const POINTWISE_ROWS: usize = 256;
/// Rows of products that keep the cores busy while something else is measured.
const BUSY_ROWS: usize = 64;
/// The vocabulary that is sampled from.
const VOCAB_SIZE: usize = 32_000;
/// Keys of so few that beginning counts.
const SHORT: usize = PAGE_POSITIONS;
/// Sequences that decode at once, of which each evicts.
const EVICTING: usize = 16;
/// Of a prompt that evicts, one part of so many is kept.
const THINNED: usize = 4;
/// First positions that are seen across a gap.
const FIRST: usize = 4;
/// How much narrower a layer is that tells what its calls cost: its products take little.
const NARROW_HALVINGS: u32 = 2;
/// Bytes of random numbers that everything is filled with.
const PATTERN_BYTES: usize = 1 << 20;
/// A sample takes at least this long, so that clocks and wake-ups do not count.
const SAMPLE_TIME: Duration = Duration::from_millis(8);

/// Widths of what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    hidden: usize,
    intermediate: usize,
    rows: usize,
    kv_bytes: usize,
    /// Queries of a prompt.
    prompt: usize,
    /// Keys that single queries attend to.
    context: usize,
    /// Rows that are sampled at once.
    sampled: usize,
}

impl Shape {
    /// The shape of a model with 1.1 B parameters, or of one with widths 2^`halvings` times less; products of up to
    /// `rows` rows.
    pub fn new(halvings: u32, rows: usize) -> Self {
        Shape {
            hidden: 2048 >> halvings,
            intermediate: 5632 >> halvings,
            rows,
            kv_bytes: (160 << 20) >> halvings,
            prompt: 512,
            context: 512,
            sampled: 32,
        }
    }

    /// The narrowest shape, with little of everything, for devices that take long: what is measured is then mostly what
    /// calls take.
    pub fn least() -> Self {
        Shape { rows: 16, kv_bytes: 1 << 20, prompt: 64, context: 128, sampled: 2, ..Shape::new(NARROW_HALVINGS, 16) }
    }

    /// The shape of a layer of a model with about 7 B parameters, for devices that need as much to be busy.
    pub fn wide(rows: usize) -> Self {
        Shape { hidden: 4096, intermediate: 11_264, kv_bytes: 320 << 20, ..Shape::new(0, rows) }
    }

    /// The hidden width.
    pub fn width(&self) -> usize {
        self.hidden
    }

    /// Rows of products, at most, and of prompts.
    pub fn rows(&self) -> usize {
        self.rows.max(self.prompt)
    }

    /// FLOPs of all products of a round, about.
    pub fn product_flops(&self) -> f64 {
        let rows: usize = ROWS.iter().filter(|&&rows| rows <= self.rows).sum();
        2.0 * (rows * self.weights() * DType::ALL.len()) as f64
    }

    /// Tokens that are sampled from.
    pub fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    /// The most heads of attention.
    pub fn wide_heads(&self) -> Heads {
        self.heads(WIDE_GROUP)
    }

    /// Bytes of the largest product's weights, as f32.
    pub fn product_bytes(&self) -> usize {
        self.products().iter().map(|&(inputs, outputs)| packed_bytes(inputs, outputs, DType::F32)).max().unwrap_or(0)
    }

    /// Heads of attention with `group` query heads to every key head.
    fn heads(&self, group: usize) -> Heads {
        let num_kv_heads = self.hidden / 256;
        Heads { num_heads: num_kv_heads * group, num_kv_heads, head_dim: 128 }
    }

    fn layout(&self) -> KvLayout {
        let Heads { num_kv_heads, head_dim, .. } = self.heads(1);
        KvLayout { num_layers: 1, num_kv_heads, head_dim, dtype: DType::Bf16, scored: false }
    }

    /// That of pages which note scores.
    fn scored_layout(&self) -> KvLayout {
        KvLayout { scored: true, ..self.layout() }
    }

    /// Pages of a sequence that evicts.
    fn evicting_pages(&self) -> usize {
        pages_for(self.context + PAGE_POSITIONS).max(pages_for(self.prompt))
    }

    fn num_frames(&self) -> usize {
        self.kv_bytes / self.layout().layer_bytes()
    }

    /// Heads of the layer whose products and element-wise work are measured.
    fn layer_heads(&self) -> Heads {
        Heads { num_heads: self.hidden / 64, num_kv_heads: self.hidden / 512, head_dim: 64 }
    }

    /// (inputs, outputs) of the products of a layer: q k v, o, gate and up, down.
    fn products(&self) -> [(usize, usize); 4] {
        let Shape { hidden, intermediate, .. } = *self;
        let qkv = self.layer_heads().qkv_width();
        [(hidden, qkv), (hidden, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
    }

    fn weights(&self) -> usize {
        self.products().iter().map(|(inputs, outputs)| inputs * outputs).sum()
    }

    /// Bytes of every buffer: weights, keys and values, those of sequences that evict, those that are only put away,
    /// hidden, normed, qkv, queries, attended, up, activated, update, scratch, logits, scale of norms.
    fn buffers(&self) -> [usize; 15] {
        let Shape { hidden, intermediate, rows, .. } = *self;
        let layer: usize = self.products().iter().map(|&(i, o)| packed_bytes(i, o, DType::F32)).sum();
        let attended = hidden.max(self.heads(WIDE_GROUP).query_width());
        let row = |width: usize| 4 * rows.max(self.prompt) * width;
        [
            LAYERS * layer,
            self.num_frames() * self.layout().layer_bytes(),
            (EVICTING + 1) * self.evicting_pages() * self.scored_layout().layer_bytes(),
            pages_for(POINTWISE_ROWS) * self.layout().layer_bytes(),
            row(hidden),
            row(hidden),
            row(self.layer_heads().qkv_width()),
            row(self.heads(WIDE_GROUP).qkv_width()),
            row(attended),
            row(2 * intermediate),
            row(intermediate),
            row(hidden),
            row(intermediate),
            4 * self.sampled * VOCAB_SIZE,
            4 * hidden,
        ]
    }

    /// Bytes of an arena for all of it.
    pub fn bytes(&self) -> usize {
        self.buffers().into_iter().map(aligned).sum()
    }

    /// The configuration of a model of that shape.
    fn config(&self, heads: Heads) -> ModelConfig {
        let json = json!({
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": 1, "num_attention_heads": heads.num_heads, "head_dim": heads.head_dim,
            "num_key_value_heads": heads.num_kv_heads, "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        });
        ModelConfig::from_json(&json, std::path::Path::new("calibration")).expect("a configuration of ours")
    }
}

/// Query heads to a key head in grouped attention: arithmetic counts, not bytes alone.
const WIDE_GROUP: usize = 8;

/// What is measured in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    /// Products of a layer with weights of a dtype and so many rows; with activations rounded to integers or not.
    Products(DType, bool, usize),
    /// Attention of a prompt.
    Prompt,
    /// Attention of single queries, with so many query heads to a key head and so many keys.
    Single(usize, usize),
    /// The same with one query head to a key head and most keys, over pages of integers.
    Integers(DType),
    /// Keys and values put away as a dtype.
    Storing(DType),
    /// A prompt whose keys add up what they receive.
    Scoring,
    /// Such a prompt of which a quarter is kept.
    Thinning,
    /// Single queries with most keys, of which one is evicted; and those of sequences that keep everything in such
    /// pages.
    Evicting,
    Keeping,
    /// A page's queries that see the first positions across a gap.
    Turning,
    /// Norms, rotation, keys put away, activation, sums.
    Pointwise,
    /// A narrow layer of one row, whole: what calls cost beyond their work.
    WholeLayer,
    /// The products of such a layer.
    NarrowProducts,
    /// Tokens drawn.
    Sampling,
}

/// Products that are measured: dtype of the weights, and whether activations are rounded to integers.
fn curves() -> impl Iterator<Item = (DType, bool)> {
    let plain = DType::ALL.into_iter().map(|dtype| (dtype, false));
    plain.chain([(DType::Int8, true), (DType::Int4, true)])
}

/// Dtypes of pages of integers.
const INTEGERS: [DType; 2] = [DType::Int8, DType::Int4];

/// A device, and buffers for a layer's work.
pub struct Bench<D: Device> {
    device: D,
    shape: Shape,
    weights: D::Buffer,
    weights_at: usize,
    frames: Frames<D::Buffer>,
    frames_at: usize,
    /// Sequences that evict, and where they are; the last place is that of prompts.
    evicting: Frames<D::Buffer>,
    evicting_at: usize,
    /// What is put away and never read.
    stored: Frames<D::Buffer>,
    hidden: D::Buffer,
    normed: D::Buffer,
    qkv: D::Buffer,
    /// Queries of attention that is measured alone: random, where a product of random numbers leaves so large ones that
    /// every query sees one key alone.
    queries: D::Buffer,
    attended: D::Buffer,
    up: D::Buffer,
    activated: D::Buffer,
    update: D::Buffer,
    scratch: D::Buffer,
    logits: D::Buffer,
    norm: NormParameters<D::Buffer>,
    draws: Vec<Draw>,
    /// Whether products that round activations to integers are measured.
    integers: bool,
}

impl<D: Device> Bench<D> {
    /// Allocates [`Shape::bytes`] of `device` and fills them with random numbers.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(mut device: D, shape: Shape) -> Result<Self> {
        let pattern = pattern();
        let buffers = shape.buffers().into_iter().map(|bytes| {
            let mut buffer = device.allocate(bytes);
            for at in (0..bytes).step_by(PATTERN_BYTES) {
                device.copy_in(&[(&pattern[..PATTERN_BYTES.min(bytes - at)], at)], &mut buffer)?;
            }
            Ok(buffer)
        });
        let mut buffers = buffers.collect::<Result<Vec<D::Buffer>>>()?.into_iter();
        let mut next = || buffers.next().expect("as many buffers as sizes");
        let (weights, memory, evicting, stored) = (next(), next(), next(), next());
        let (hidden, normed, qkv, queries, attended, up) = (next(), next(), next(), next(), next(), next());
        let (activated, update, scratch, logits, scale) = (next(), next(), next(), next(), next());
        drop(buffers);
        let layout = shape.layout();
        let frames = |memory: D::Buffer, layout: KvLayout, count: usize| {
            let stride = layout.layer_bytes();
            Frames { memory, layout, stride, count }
        };
        let evicting = frames(evicting, shape.scored_layout(), (EVICTING + 1) * shape.evicting_pages());
        let stored = frames(stored, layout, pages_for(POINTWISE_ROWS));
        let frames = frames(memory, layout, shape.num_frames());
        let norm = NormParameters { norm: shape.config(shape.layer_heads()).norm, weight: scale, bias: None };
        let rule = SampleRule {
            allowed: None,
            banned: [].into(),
            bias: [].into(),
            counts: [].into(),
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            temperature: 1.0,
            min_p: 0.0,
            top_k: 0,
            top_p: 1.0,
            uniform: 0.5,
        };
        let draws = (0..shape.sampled).map(|row| Draw { row, target: Wanted::Sample(rule.clone()), top: 0 }).collect();
        Ok(Bench {
            device,
            shape,
            weights,
            weights_at: 0,
            frames,
            frames_at: 0,
            evicting,
            evicting_at: shape.context,
            stored,
            hidden,
            normed,
            qkv,
            queries,
            attended,
            up,
            activated,
            update,
            scratch,
            logits,
            norm,
            draws,
            integers: true,
        })
    }

    /// The same, of a device that does not round activations to integers.
    ///
    /// # Errors
    /// When the device fails.
    pub fn on_card(device: D, shape: Shape) -> Result<Self> {
        Ok(Bench { integers: false, ..Bench::new(device, shape)? })
    }

    /// Measures everything within `budget`; what beginning and ending a step takes is known from elsewhere.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(&mut self, budget: Duration, handover_secs: f64) -> Result<Kernels> {
        self.fill();
        let all = curves().filter(|(_, integers)| self.integers || !integers);
        let curves = all.flat_map(|(dtype, integers)| {
            let rows = ROWS.into_iter().filter(|&rows| rows <= self.shape.rows);
            rows.map(move |rows| Probe::Products(dtype, integers, rows))
        });
        let others = [
            Probe::Prompt,
            Probe::Scoring,
            Probe::Thinning,
            Probe::Turning,
            Probe::Single(1, SHORT),
            Probe::Single(1, self.shape.context),
            Probe::Integers(DType::Int8),
            Probe::Integers(DType::Int4),
            Probe::Single(WIDE_GROUP, self.shape.context),
            Probe::Keeping,
            Probe::Evicting,
            Probe::Storing(DType::Bf16),
            Probe::Storing(DType::Int8),
            Probe::Storing(DType::Int4),
            Probe::Pointwise,
            Probe::WholeLayer,
            Probe::NarrowProducts,
            Probe::Sampling,
        ];
        // Products take most of a round: the others are measured twice in it.
        let probes: Vec<Probe> = others.into_iter().chain(curves).chain(others).collect();
        let patience = (budget / 12).as_secs_f64();
        // Rows of which products took longer the last time; more rows would take longer still.
        let mut too_slow: BTreeMap<(DType, bool), usize> = BTreeMap::new();
        let samples = rounds(&probes, budget, |probe| {
            if let Probe::Products(dtype, integers, rows) = probe
                && too_slow.get(&(dtype, integers)).is_some_and(|&slow| rows > slow)
            {
                return Ok(None);
            }
            let mut secs = 0.0;
            rayon::scope(|_| secs = self.sample(probe));
            if let Probe::Products(dtype, integers, rows) = probe {
                if secs > patience {
                    too_slow.insert((dtype, integers), rows);
                } else if too_slow.get(&(dtype, integers)) == Some(&rows) {
                    too_slow.remove(&(dtype, integers));
                }
            }
            Ok(Some(secs))
        })?;
        self.device.finish()?;
        Ok(self.rates(&Samples { probes, samples }, handover_secs))
    }

    /// Keeps all cores busy with a layer's products; gives the seconds of one repetition.
    pub fn busy(&mut self) -> f64 {
        let mut secs = 0.0;
        rayon::scope(|_| secs = self.sample(Probe::Products(DType::Bf16, false, BUSY_ROWS)));
        secs
    }

    /// Turns the cost formulas around.
    fn rates(&self, samples: &Samples, handover_secs: f64) -> Kernels {
        let shape = self.shape;
        let always = |probe: Probe| samples.median(probe).expect("only products can be left out");
        let flops = |rows: usize| 2.0 * rows as f64 * shape.weights() as f64;
        let [mut matmul, mut integer_matmul] = [BTreeMap::new(), BTreeMap::new()];
        for (dtype, integers) in curves().filter(|(_, integers)| self.integers || !integers) {
            let points = ROWS.into_iter().filter_map(|rows| {
                let secs = samples.median(Probe::Products(dtype, integers, rows))?;
                Some((rows as f64, flops(rows) / secs))
            });
            let curves = if integers { &mut integer_matmul } else { &mut matmul };
            curves.insert(dtype, Curve(points.collect()));
        }
        let cost = |heads: Heads| ModelCost::new(&shape.config(heads), None, DType::Bf16, DType::Bf16);
        let (narrow, wide) = (cost(shape.heads(1)), cost(shape.heads(WIDE_GROUP)));
        let segment = |group: usize, context: usize| {
            always(Probe::Single(group, context)) / self.single_segments(1, context).len() as f64
        };
        let (short, long, pages) = (segment(1, SHORT), segment(1, shape.context), pages_for(shape.context) as f64);
        let page_narrow = (long - short).max(0.0) / (pages - pages_for(SHORT) as f64);
        let segment_secs = (short - page_narrow).max(0.0);
        let page_wide = ((segment(WIDE_GROUP, shape.context) - segment_secs) / pages).max(page_narrow);
        // Reading a page takes the same for every group; arithmetic goes by the queries.
        let positions = PAGE_POSITIONS as f64;
        // It is no faster than the best product, whatever noise says.
        let best = matmul.values().map(Curve::best_flops).fold(0.0, f64::max);
        let arithmetic = ((page_wide - page_narrow) / (wide.key_flops() - narrow.key_flops())).max(positions / best);
        let reading = (page_narrow - arithmetic * narrow.key_flops()).max(0.05 * page_narrow);
        // A prompt's pages are read and widened once besides what its keys take.
        let prompt_keys = (shape.prompt * (shape.prompt + 1) / 2) as f64;
        let prompt_pages = pages_for(shape.prompt) as f64;
        let key_secs =
            (always(Probe::Prompt) - prompt_pages * page_wide).max(0.0) / (prompt_keys - prompt_pages * positions);
        let layer = cost(shape.layer_heads());
        // Element-wise work and attention of one row are next to nothing; what a layer takes beyond its products
        // is threads that are woken for each of its loops.
        let calls_secs = (always(Probe::WholeLayer) - always(Probe::NarrowProducts)).max(0.0);
        let pointwise_rows = POINTWISE_ROWS.min(shape.rows) as f64;
        let integer_pages = INTEGERS.map(|dtype| {
            let all = samples.beside(Probe::Integers(dtype), Probe::Single(1, shape.context));
            let page = (all / self.single_segments(1, shape.context).len() as f64 - segment_secs) / pages;
            let reading = (page - arithmetic * narrow.key_flops()).max(0.05 * page_narrow);
            let elements = pointwise_rows * 2.0 * wide.kv_width as f64;
            let plain = Probe::Storing(DType::Bf16);
            let store_secs = (samples.beside(Probe::Storing(dtype), plain) - always(plain)).max(0.0) / elements;
            (dtype, IntegerPages { wide_bytes_per_s: narrow.frame_bytes / reading, store_secs })
        });
        let mut kernels = Kernels {
            matmul,
            integer_matmul,
            attention_prefill_flops: wide.key_flops() / key_secs,
            attention_decode_flops: positions / arithmetic,
            attention_bytes_per_s: narrow.frame_bytes / reading,
            attention_segment_secs: segment_secs / shape.heads(1).num_kv_heads as f64,
            integer_pages: integer_pages.into(),
            keeping: Keeping::default(),
            pointwise_bytes_per_s: pointwise_rows * layer.pointwise_bytes / always(Probe::Pointwise),
            sampled_logits_per_s: (shape.sampled * VOCAB_SIZE) as f64 / always(Probe::Sampling),
            step_secs: handover_secs + calls_secs,
        };
        self.add_keeping(samples, &wide, &mut kernels);
        kernels
    }

    /// What keeping part of a sequence takes, beyond attention as `kernels` has it.
    fn add_keeping(&self, samples: &Samples, model: &ModelCost, kernels: &mut Kernels) {
        let num_heads = self.shape.wide_heads().num_heads as f64;
        let (query_width, kv_width) = (model.query_width as f64, model.kv_width as f64);
        let beyond = |kernels: &Kernels, probe: Probe, load: &LayerLoad| {
            let attention = model.attention_secs(kernels, model.page_secs(kernels, true), load);
            (samples.beside(probe, Probe::Prompt) - attention).max(0.0)
        };
        let turning = load(&self.turning());
        kernels.keeping.turn_secs = beyond(kernels, Probe::Turning, &turning) / (turning.rows * query_width);
        let (scoring, thinning) = (load(&self.scoring(1)), load(&self.scoring(THINNED)));
        kernels.keeping.score_secs = beyond(kernels, Probe::Scoring, &scoring) / (scoring.scored * num_heads);
        // A token looks through all slots to evict one: all that it takes more is put down to looking, what a prompt
        // takes beyond that to evicting. Two equations for two unknowns would turn noise into one of them.
        let prompt = beyond(kernels, Probe::Thinning, &thinning);
        let keys = self.shape.context as f64;
        let scored = keys * num_heads * kernels.keeping.score_secs;
        let (evicts, keeps) = (samples.beside(Probe::Evicting, Probe::Keeping), samples.median(Probe::Keeping));
        let token = ((evicts - keeps.unwrap_or(evicts)) / EVICTING as f64 - scored).max(0.0);
        let sifting = token / keys;
        let evicting = ((prompt - thinning.sifted * sifting) / thinning.evicted).max(0.0);
        kernels.keeping.evict_secs = evicting / (query_width + 2.0 * kv_width);
        kernels.keeping.sift_secs = sifting / model.num_kv_heads as f64;
    }

    /// Seconds of a probe's work.
    fn sample(&mut self, probe: Probe) -> f64 {
        let (shape, narrow) = (self.shape, Shape::new(NARROW_HALVINGS, 1));
        repeated(SAMPLE_TIME, || match probe {
            Probe::Products(dtype, integers, rows) => {
                self.device.round_activations(integers);
                self.layer(shape, rows, Some(dtype), false);
                self.device.round_activations(false);
            }
            Probe::Integers(dtype) => {
                let layout = KvLayout { dtype, ..self.frames.layout };
                let stored = std::mem::replace(&mut self.frames.layout, layout);
                self.attend(&self.single_segments(self.frames_at, shape.context), 1);
                self.frames.layout = stored;
            }
            Probe::Storing(dtype) => {
                let segment = self.segment(0, POINTWISE_ROWS.min(shape.rows), 0);
                self.stored.layout.dtype = dtype;
                let kv = KvViewMut { resident: &mut self.stored, streamed: None };
                self.device.append_kv(kv, &[segment], &self.queries, shape.wide_heads());
                settle(&self.device);
            }
            Probe::Scoring => self.evict(&[self.scoring(1)]),
            Probe::Thinning => self.evict(&[self.scoring(THINNED)]),
            Probe::Evicting => {
                self.evict(&self.evicting(self.evicting_at..self.evicting_at + 1));
                self.evicting_at += 1;
            }
            Probe::Keeping => {
                let mut segments = self.evicting(shape.context - 1..shape.context);
                segments.iter_mut().for_each(|segment| segment.kept = Kept::All);
                self.evict(&segments);
            }
            Probe::Turning => {
                let Heads { head_dim, .. } = shape.wide_heads();
                let segment = self.turning();
                let angles = vec![0.7f32; segment.len * head_dim / 2];
                let rotation = Rotation { cos: &angles, sin: &angles, rotary_dim: head_dim };
                let kv = KvViewMut { resident: &mut self.frames, streamed: None };
                let span = AttentionSpan { sinks: Some(&rotation), ..span(head_dim) };
                let heads = shape.wide_heads();
                self.device.attend(kv, span, &[segment], &self.queries, heads, &mut self.attended);
                settle(&self.device);
            }
            Probe::Prompt => self.attend(&[self.segment(0, shape.prompt, 0)], WIDE_GROUP),
            Probe::Single(group, context) => self.attend(&self.single_segments(self.frames_at, context), group),
            Probe::Pointwise => self.layer(shape, POINTWISE_ROWS.min(shape.rows), None, true),
            Probe::WholeLayer => self.layer(narrow, 1, Some(DType::Bf16), true),
            Probe::NarrowProducts => self.layer(narrow, 1, Some(DType::Bf16), false),
            Probe::Sampling => {
                let draws: Vec<(usize, &Draw)> = self.draws.iter().map(|draw| (draw.row, draw)).collect();
                std::hint::black_box(self.device.sample(&self.logits, VOCAB_SIZE, &draws));
            }
        })
    }

    /// A layer in the executor's order: its products with weights of `products`, and its element-wise work, or one of
    /// the two. With both, a single row attends to two pages.
    fn layer(&mut self, shape: Shape, rows: usize, products: Option<DType>, pointwise: bool) {
        let (width, heads) = (shape.hidden, shape.layer_heads());
        let half = heads.head_dim / 2;
        let angles = vec![0.7f32; if pointwise { rows * half } else { 0 }];
        let rotation = Rotation { cos: &angles, sin: &angles, rotary_dim: heads.head_dim };
        // Stored keys have the layer's own, smaller layout.
        let layout = KvLayout { num_kv_heads: heads.num_kv_heads, head_dim: heads.head_dim, ..self.frames.layout };
        let stored = std::mem::replace(&mut self.frames.layout, layout);
        let segments = [self.segment(if rows == 1 { 2 * PAGE_POSITIONS - 1 } else { 0 }, rows, 0)];
        if pointwise {
            self.device.norm(&self.hidden, rows, width, &self.norm, &mut self.normed);
        }
        self.product(shape, 0, rows, products);
        if pointwise {
            self.device.rotate(&mut self.qkv, rows, heads, &rotation);
            let view = KvViewMut { resident: &mut self.frames, streamed: None };
            self.device.append_kv(view, &segments, &self.qkv, heads);
        }
        if pointwise && products.is_some() {
            let kv = KvViewMut { resident: &mut self.frames, streamed: None };
            let span = AttentionSpan { window: None, scale: 0.125, sinks: None };
            self.device.attend(kv, span, &segments, &self.qkv, heads, &mut self.attended);
        }
        self.product(shape, 1, rows, products);
        if pointwise {
            self.device.add(&mut self.hidden, &self.update, rows * width);
            self.device.norm(&self.hidden, rows, width, &self.norm, &mut self.normed);
        }
        self.product(shape, 2, rows, products);
        if pointwise {
            let Bench { up, activated, .. } = self;
            self.device.activate(Activation::Silu, true, up, rows, shape.intermediate, activated);
        }
        self.product(shape, 3, rows, products);
        if pointwise {
            self.device.add(&mut self.hidden, &self.update, rows * width);
        }
        settle(&self.device);
        self.frames.layout = stored;
    }

    /// One product of a layer, with weights that have not been used for long.
    fn product(&mut self, shape: Shape, index: usize, rows: usize, dtype: Option<DType>) {
        let Some(dtype) = dtype else { return };
        let (inputs, outputs) = shape.products()[index];
        let bytes = packed_bytes(inputs, outputs, dtype);
        if self.weights_at + bytes > self.shape.buffers()[0] {
            self.weights_at = 0;
        }
        let pieces = vec![Piece { buffer: &self.weights, bytes: self.weights_at..self.weights_at + bytes }];
        self.weights_at += bytes;
        let matrix = Matrix { pieces, dtype, inputs, outputs };
        let (from, to) = match index {
            0 => (&self.normed, &mut self.qkv),
            1 => (&self.attended, &mut self.update),
            2 => (&self.normed, &mut self.up),
            _ => (&self.activated, &mut self.update),
        };
        let to = Target { buffer: to, stride: outputs, column: 0 };
        self.device.linear(from, rows, &matrix, None, &mut self.scratch, to);
    }

    /// A sequence whose frames begin with `first`, in turn.
    fn segment(&self, start: usize, len: usize, first: usize) -> Segment {
        let count = self.shape.num_frames();
        let pages = (0..pages_for(start + len)).map(|page| ((first + page) % count) as u32).collect();
        Segment { first_row: 0, len, start, pages, kept: Kept::All }
    }

    /// Single queries, each with frames of its own, of as many sequences as there are frames for.
    fn single_segments(&self, first: usize, context: usize) -> Vec<Segment> {
        let pages = pages_for(context);
        let count = (self.shape.num_frames() / pages).clamp(1, self.shape.rows());
        let segment = |row: usize| Segment { first_row: row, ..self.segment(context - 1, 1, first + row * pages) };
        (0..count).map(segment).collect()
    }

    /// A page's queries behind a window.
    fn turning(&self) -> Segment {
        let Shape { context, .. } = self.shape;
        let kept = Kept::Window { start: FIRST, recent: context / 2 };
        let len = PAGE_POSITIONS.min(self.shape.rows());
        let pages = (0..kept.pages(context + len) as u32).collect();
        Segment { first_row: 0, len, start: context, pages, kept }
    }

    /// A prompt of which one part of `parts` is kept.
    fn scoring(&self, parts: usize) -> Segment {
        let Shape { prompt, .. } = self.shape;
        self.evicting_segment(EVICTING, prompt / parts, prompt, 0..prompt)
    }

    /// Some positions of the sequences that evict, of which all attend to as many keys as there are.
    fn evicting(&self, range: Range<usize>) -> Vec<Segment> {
        let Shape { context, .. } = self.shape;
        let segment = |index: usize| Segment {
            first_row: index,
            ..self.evicting_segment(index, context - 1, context, range.clone())
        };
        (0..EVICTING).map(segment).collect()
    }

    /// Positions of sequence `index`, of which `capacity` are kept.
    fn evicting_segment(&self, index: usize, capacity: usize, prompt_len: usize, range: Range<usize>) -> Segment {
        let (heavy, recent) = (capacity / 2, capacity - capacity / 2);
        let kept = Kept::Heavy { heavy, recent, prompt_len, stretch: PAGE_POSITIONS, spread: Spread::Even };
        let first = index * self.shape.evicting_pages();
        let pages = (first..first + kept.pages(range.end)).map(|page| page as u32).collect();
        Segment { first_row: 0, len: range.len(), start: range.start, pages, kept }
    }

    /// Computes the prompts of sequences that evict.
    fn fill(&mut self) {
        let Shape { prompt, context, .. } = self.shape;
        for start in (0..context).step_by(prompt) {
            for segment in self.evicting(start..context.min(start + prompt)) {
                self.evict(&[Segment { first_row: 0, ..segment }]);
            }
        }
    }

    fn evict(&mut self, segments: &[Segment]) {
        let heads = self.shape.wide_heads();
        let kv = KvViewMut { resident: &mut self.evicting, streamed: None };
        self.device.attend(kv, span(heads.head_dim), segments, &self.queries, heads, &mut self.attended);
        settle(&self.device);
    }

    fn attend(&mut self, segments: &[Segment], group: usize) {
        let heads = self.shape.heads(group);
        let kv = KvViewMut { resident: &mut self.frames, streamed: None };
        self.device.attend(kv, span(heads.head_dim), segments, &self.queries, heads, &mut self.attended);
        self.frames_at += 1;
        settle(&self.device);
    }
}

/// Seconds of every probe, one round after the other; a probe may be there twice.
struct Samples {
    probes: Vec<Probe>,
    samples: Vec<Vec<f64>>,
}

impl Samples {
    fn of(&self, wanted: Probe) -> impl Iterator<Item = f64> {
        let all = self.probes.iter().zip(&self.samples).filter(move |(probe, _)| **probe == wanted);
        all.flat_map(|(_, samples)| samples.iter().copied())
    }

    fn median(&self, probe: Probe) -> Option<f64> {
        median(&self.of(probe).collect::<Vec<f64>>())
    }

    /// A probe that is compared with one that was measured just before it: how many times as long it took, round by
    /// round, so that what others do on the machine meanwhile counts for both.
    fn beside(&self, probe: Probe, other: Probe) -> f64 {
        let times: Vec<f64> = self.of(probe).zip(self.of(other)).map(|(probe, other)| probe / other).collect();
        let secs = median(&times).zip(self.median(other)).map(|(times, other)| times * other);
        secs.expect("both are always measured")
    }
}

/// What queries of a plain layer see.
fn span(head_dim: usize) -> AttentionSpan<'static> {
    AttentionSpan { window: None, scale: 1.0 / (head_dim as f32).sqrt(), sinks: None }
}

/// What a segment's attention is priced by.
fn load(segment: &Segment) -> LayerLoad {
    let (kept, range) = (segment.kept, segment.start..segment.start + segment.len);
    let upkeep = kept.upkeep(&range);
    LayerLoad {
        rows: segment.len as f64,
        segments: 1.0,
        keys: range.clone().map(|position| kept.keys(position) as f64).sum(),
        pages: kept.touches(&range).count() as f64,
        scored: upkeep.scored as f64,
        sifted: upkeep.sifted as f64,
        evicted: upkeep.evicted as f64,
        turned: upkeep.turned as f64,
    }
}

/// Waits for a device; a failure is told again when all is measured.
fn settle<D: Device>(device: &D) {
    let _ = device.finish();
}

/// Random bits that are numbers of a moderate size in every dtype: sign and mantissa vary.
fn pattern() -> Vec<u8> {
    let random = Philox::new(7, 0);
    let halves = |word: u32| [word as u16, (word >> 16) as u16].map(|bits| 0x3c00 | bits & 0x83ff);
    let words = (0..PATTERN_BYTES as u64 / 16).flat_map(|index| random.words(index));
    words.flat_map(halves).flat_map(u16::to_le_bytes).collect()
}
