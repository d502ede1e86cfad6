//! What work costs: bytes, arithmetic, core-seconds, bytes of main memory.
//!
//! Every formula is here once, generic over the scalar: with numbers it prices a step of a schedule, with linear
//! expressions of placement it makes a row of the linear program. `schedule::price` applies both.
//!
//! **Invariant:** a formula is linear in the bytes that placement decides; no formula asks where it is used.

use std::ops::{Add, Mul};

use crate::hardware::{Hardware, Keeping, Kernels, Link};
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;

/// Positions of a KV page.
pub const PAGE_POSITIONS: f64 = 64.0;

/// Main memory is read and written once by a copy within it.
const COPY_DRAM_BYTES: f64 = 2.0;

/// A number, or a linear expression.
pub trait Scalar: Clone + From<f64> + Add<Output = Self> + Mul<f64, Output = Self> {}

impl<S: Clone + From<f64> + Add<Output = S> + Mul<f64, Output = S>> Scalar for S {}

/// What a piece of work takes: the time of its own lane, and of what lanes share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work<S = f64> {
    /// Seconds of its lane, with everything shared to itself.
    pub lane_secs: S,
    /// Seconds of cores.
    pub core_secs: S,
    /// Bytes read from and written to main memory.
    pub dram_bytes: S,
    /// Seconds of the link between main memory and device, which its two directions share: of either direction, the
    /// part that it cannot give to the other.
    pub link_secs: S,
    /// Seconds of the disk, likewise.
    pub disk_secs: S,
}

impl<S: Scalar> Work<S> {
    /// Nothing.
    pub fn none() -> Self {
        let zero = || S::from(0.0);
        Work { lane_secs: zero(), core_secs: zero(), dram_bytes: zero(), link_secs: zero(), disk_secs: zero() }
    }

    /// A constant in another scalar.
    pub fn constant(work: Work) -> Self {
        Work {
            lane_secs: S::from(work.lane_secs),
            core_secs: S::from(work.core_secs),
            dram_bytes: S::from(work.dram_bytes),
            link_secs: S::from(work.link_secs),
            disk_secs: S::from(work.disk_secs),
        }
    }
}

impl<S: Scalar> Add for Work<S> {
    type Output = Work<S>;

    fn add(self, other: Work<S>) -> Work<S> {
        Work {
            lane_secs: self.lane_secs + other.lane_secs,
            core_secs: self.core_secs + other.core_secs,
            dram_bytes: self.dram_bytes + other.dram_bytes,
            link_secs: self.link_secs + other.link_secs,
            disk_secs: self.disk_secs + other.disk_secs,
        }
    }
}

impl<S: Scalar> Mul<f64> for Work<S> {
    type Output = Work<S>;

    fn mul(self, factor: f64) -> Work<S> {
        Work {
            lane_secs: self.lane_secs * factor,
            core_secs: self.core_secs * factor,
            dram_bytes: self.dram_bytes * factor,
            link_secs: self.link_secs * factor,
            disk_secs: self.disk_secs * factor,
        }
    }
}

/// Matrices of a layer that are multiplied with the same share of a block's rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Weights of all of them.
    pub weights: f64,
    /// Rows per row of the block: 1, or for experts the share that each of them gets.
    pub rows_share: f64,
}

/// A mixture of experts in the place of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub total: usize,
    /// How many a row goes through.
    pub active: usize,
}

/// A model in the numbers that cost goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// Decoder layers.
    pub num_layers: usize,
    /// The matrices of one layer.
    pub products: Vec<Product>,
    /// Stored dtype of the matrices.
    pub weights: DType,
    /// Whether their products round activations to 8 bits.
    pub integer_activations: bool,
    /// Stored dtype of keys and values.
    pub kv: DType,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the embedding table.
    pub embed_size: usize,
    /// Query heads times their width.
    pub query_width: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Key heads times their width.
    pub kv_width: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Bytes of one layer of a KV page, as it is moved: whole units of 4 KiB.
    pub frame_bytes: f64,
    /// Bytes of activations that a row of a layer reads and writes, element by element.
    pub pointwise_bytes: f64,
    /// Bytes of a row's hidden state.
    pub hidden_bytes: f64,
    /// Bytes on disk per byte of weights, where they are stored as compressed planes.
    pub compressed_ratio: f64,
}

/// What a block computes in a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerLoad {
    /// New positions.
    pub rows: f64,
    /// Sequences that they belong to.
    pub segments: f64,
    /// Keys that they attend to, summed over them.
    pub keys: f64,
    /// KV pages that its segments read, summed over the segments.
    pub pages: f64,
    /// Keys that are seen and scored, summed over the rows.
    pub scored: f64,
    /// Slots of a head that evictions look through, summed over them.
    pub sifted: f64,
    /// Keys of a head that are evicted.
    pub evicted: f64,
    /// Rows that see the first positions across a gap.
    pub turned: f64,
}

impl ModelCost {
    /// The costs of a model whose weights and cache are stored so. `experts` puts a mixture in the place of the MLP.
    pub fn new(config: &ModelConfig, experts: Option<Experts>, weights: DType, kv: DType) -> Self {
        let (hidden, intermediate) = (config.hidden_size as f64, config.intermediate_size as f64);
        let (query_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let qkv = (query_width + 2 * kv_width) as f64;
        let attention = hidden * qkv + query_width as f64 * hidden;
        let up = if config.gated_mlp { 2.0 } else { 1.0 } * intermediate;
        let mlp = (up + intermediate) * hidden;
        let (products, mlp_rows) = match experts {
            None => (vec![Product { weights: attention + mlp, rows_share: 1.0 }], 1.0),
            Some(Experts { total, active }) => {
                let router = Product { weights: attention + hidden * total as f64, rows_share: 1.0 };
                let (total, active) = (total as f64, active as f64);
                (vec![router, Product { weights: mlp * total, rows_share: active / total }], active)
            }
        };
        // f32, each read or written once per pass over it: two norms, two residual additions, the rotation, and what
        // products take and give.
        let elements = 4.0 * hidden + 6.0 * hidden + 3.0 * qkv + 2.0 * query_width as f64;
        let pointwise_bytes = 4.0 * (elements + mlp_rows * (2.0 * up + 2.0 * intermediate));
        let kv_bytes = match kv {
            // A scale and an offset of 16 bits for the key and for the value of every position and head.
            DType::Int8 => kv_width as f64 + 4.0 * config.num_kv_heads as f64,
            DType::Int4 => kv_width as f64 / 2.0 + 4.0 * config.num_kv_heads as f64,
            plain => kv_width as f64 * plain.size() as f64,
        };
        let frame = PAGE_POSITIONS * 2.0 * kv_bytes;
        ModelCost {
            num_layers: config.num_layers,
            products,
            weights,
            integer_activations: false,
            kv,
            hidden_size: config.hidden_size,
            embed_size: config.embed_size,
            query_width,
            num_kv_heads: config.num_kv_heads,
            kv_width,
            vocab_size: config.vocab_size,
            frame_bytes: (frame / 4096.0).ceil() * 4096.0,
            pointwise_bytes,
            hidden_bytes: 4.0 * hidden,
            compressed_ratio: match weights {
                // What `quant::planes` makes of Gaussian weights.
                DType::Bf16 => 0.704,
                _ => 1.0,
            },
        }
    }

    /// Weights of a layer.
    pub fn layer_weights(&self) -> f64 {
        self.products.iter().map(|product| product.weights).sum()
    }

    /// Bytes of a layer's matrices.
    pub fn layer_bytes(&self) -> f64 {
        self.layer_weights() * self.weights.bytes()
    }

    /// FLOPs of the products of one row of a layer.
    pub fn row_flops(&self) -> f64 {
        self.products.iter().map(|product| 2.0 * product.weights * product.rows_share).sum()
    }

    /// FLOPs of attention for one key of one row of a layer: a product with the key, one with the value.
    pub fn key_flops(&self) -> f64 {
        4.0 * self.query_width as f64
    }

    /// Elements of a key and a value of all heads.
    fn kv_elements(&self) -> f64 {
        2.0 * self.kv_width as f64
    }

    /// Seconds that attention of one row takes to read a layer of a page. Integers are widened, on cores or on a card;
    /// where that was not measured, cores take as long as for 16 bits, and a card reads what there is.
    pub fn page_secs(&self, kernels: &Kernels, on_cpu: bool) -> f64 {
        let wide = 2.0 * PAGE_POSITIONS * self.kv_elements();
        let integers = matches!(self.kv, DType::Int8 | DType::Int4);
        match kernels.integer_pages.get(&self.kv).filter(|_| integers) {
            Some(pages) => wide / pages.wide_bytes_per_s,
            None if integers && on_cpu => wide / kernels.attention_bytes_per_s,
            None => self.frame_bytes / kernels.attention_bytes_per_s,
        }
    }

    /// Seconds of attention: beginning a segment, reading each page once, arithmetic, what keeping part of a sequence
    /// takes. Many rows of a segment share what the arithmetic of one row alone loses.
    pub fn attention_secs(&self, kernels: &Kernels, page_secs: f64, load: &LayerLoad) -> f64 {
        let flops = self.key_flops();
        let key = flops / kernels.attention_prefill_flops;
        let alone = (PAGE_POSITIONS * (flops / kernels.attention_decode_flops - key)).max(0.0);
        let segment = self.num_kv_heads as f64 * kernels.attention_segment_secs;
        let attention = load.keys * key + load.pages * (alone + page_secs) + load.segments * segment;
        attention + self.keeping_secs(&kernels.keeping, load)
    }

    /// Seconds that keeping part of sequences takes.
    fn keeping_secs(&self, keeping: &Keeping, load: &LayerLoad) -> f64 {
        let query_width = self.query_width as f64;
        let num_heads = query_width * self.num_kv_heads as f64 / self.kv_width as f64;
        load.scored * num_heads * keeping.score_secs
            + load.sifted * self.num_kv_heads as f64 * keeping.sift_secs
            + load.evicted * (query_width + self.kv_elements()) * keeping.evict_secs
            + load.turned * query_width * keeping.turn_secs
    }

    /// Seconds that storing keys and values of a row takes beyond what the rate of element-wise work has of it.
    fn store_secs(&self, kernels: &Kernels) -> f64 {
        let element = kernels.integer_pages.get(&self.kv).map_or(0.0, |pages| pages.store_secs);
        self.kv_elements() * element
    }

    /// Weights of the head.
    pub fn head_weights(&self) -> f64 {
        self.vocab_size as f64 * self.embed_size as f64
    }
}

/// Prices work on a machine.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    /// The model.
    pub model: &'a ModelCost,
    /// The machine.
    pub hardware: &'a Hardware,
    /// Steps that make the logits of a pass: 1, or the parts of a head that is streamed.
    pub head_parts: usize,
    /// Rows that meet the head at once.
    pub logit_rows: usize,
}

impl<'a> Costs<'a> {
    /// Prices `model` on `hardware`, with a head that is there as a whole and meets all rows at once.
    pub fn new(model: &'a ModelCost, hardware: &'a Hardware) -> Self {
        Costs { model, hardware, head_parts: 1, logit_rows: usize::MAX }
    }

    /// `bytes` over a link in `steps` steps.
    ///
    /// A copy of a rehearsal takes a core and reads and writes main memory, however slow a throttle makes it; what goes
    /// to and from a disk takes the system's work.
    pub fn transfer<S: Scalar>(&self, link: Link, bytes: S, steps: f64) -> Work<S> {
        let hardware = self.hardware;
        let rate = hardware.rate(link);
        if rate == 0.0 {
            return Work::none();
        }
        let lane_secs = bytes.clone() * (1.0 / rate);
        let shared = lane_secs.clone() * self.duplex(link);
        let disk = matches!(link, Link::DiskRead | Link::DiskWrite);
        let copied = !disk && hardware.computes_on_cpu();
        let latency = match disk {
            true => hardware.disk.map_or(0.0, |disk| disk.step_secs),
            false => hardware.links.map_or(0.0, |links| links.step_secs),
        };
        let core_secs_per_byte = match disk {
            true => hardware.disk.map_or(0.0, |disk| disk.core_secs_per_byte),
            false if copied => 1.0 / hardware.cpu.copy_bytes_per_core_s,
            false => 0.0,
        };
        let when = |condition: bool, value: S| if condition { value } else { S::from(0.0) };
        Work {
            lane_secs: lane_secs + S::from(latency * steps),
            core_secs: bytes.clone() * core_secs_per_byte,
            dram_bytes: bytes * if copied { COPY_DRAM_BYTES } else { 1.0 },
            link_secs: when(!disk, shared.clone()),
            disk_secs: when(disk, shared),
        }
    }

    /// The part of a link's time that its other direction loses: 1/2 if both run at full speed together, 1 if they
    /// take turns.
    fn duplex(&self, link: Link) -> f64 {
        let (links, disk) = (self.hardware.links, self.hardware.disk);
        let slow_down = match link {
            Link::H2d | Link::D2h => links.map_or(1.0, |links| {
                let (h2d, d2h) = (links.h2d_together_bytes_per_s, links.d2h_together_bytes_per_s);
                (h2d / links.h2d_bytes_per_s + d2h / links.d2h_bytes_per_s) / 2.0
            }),
            Link::DiskRead | Link::DiskWrite => disk.map_or(1.0, |disk| {
                let (read, write) = (disk.read_together_bytes_per_s, disk.write_together_bytes_per_s);
                (read / disk.read_bytes_per_s + write / disk.write_bytes_per_s) / 2.0
            }),
        };
        0.5 / slow_down.clamp(0.5, 1.0)
    }

    /// Weights out of compressed planes, `bytes` of them when decoded, by all cores.
    pub fn decode<S: Scalar>(&self, bytes: S, steps: f64) -> Work<S> {
        let cpu = &self.hardware.cpu;
        let core_secs = bytes.clone() * (1.0 / cpu.decode_bytes_per_core_s);
        Work {
            lane_secs: core_secs.clone() * (1.0 / cpu.cores) + S::from(cpu.kernels.step_secs * steps),
            core_secs,
            dram_bytes: bytes * (1.0 + self.model.compressed_ratio),
            ..Work::none()
        }
    }

    /// Computation of `secs` on the compute tier's lane, moving `bytes` through its memory.
    fn compute(&self, secs: f64, bytes: f64) -> Work {
        let on_cpu = self.hardware.computes_on_cpu();
        let cores = if on_cpu { self.hardware.cpu.cores } else { 0.0 };
        let latency = self.hardware.kernels().step_secs;
        let dram_bytes = if on_cpu { bytes.min(secs * self.hardware.cpu.dram_bytes_per_s) } else { 0.0 };
        Work { lane_secs: secs + latency, core_secs: secs * cores, dram_bytes, ..Work::default() }
    }

    /// One layer of a block, attention included.
    pub fn layer(&self, load: &LayerLoad) -> Work {
        if load.rows == 0.0 {
            return Work::none();
        }
        let (model, kernels) = (self.model, self.hardware.kernels());
        let curve = kernels.curve(model.weights, model.integer_activations);
        let products: f64 = model
            .products
            .iter()
            .map(|product| product.weights * curve.secs_per_weight(load.rows * product.rows_share))
            .sum();
        let pointwise = load.rows * model.pointwise_bytes;
        let on_cpu = self.hardware.computes_on_cpu();
        let attention = model.attention_secs(kernels, model.page_secs(kernels, on_cpu), load);
        let stored = load.rows * model.store_secs(kernels);
        let secs = products + attention + stored + pointwise / kernels.pointwise_bytes_per_s;
        self.compute(secs, model.layer_bytes() + load.pages * model.frame_bytes + pointwise)
    }

    /// Attention of a layer by the CPU, over pages in main memory, for a device that computes the rest; queries and
    /// results cross the link as f16.
    pub fn cpu_attention(&self, load: &LayerLoad) -> Work {
        let cpu = &self.hardware.cpu;
        let page_secs = self.model.page_secs(&cpu.kernels, true);
        let secs = self.model.attention_secs(&cpu.kernels, page_secs, load);
        Work {
            lane_secs: secs + cpu.kernels.step_secs,
            core_secs: secs * cpu.cores,
            dram_bytes: load.pages * self.model.frame_bytes,
            ..Work::default()
        }
    }

    /// Embeddings of `rows` tokens.
    pub fn embed(&self, rows: f64) -> Work {
        let row = self.model.embed_size as f64 * self.model.weights.bytes() + self.model.hidden_bytes;
        let bytes = rows * row;
        self.compute(bytes / self.hardware.kernels().pointwise_bytes_per_s, bytes)
    }

    /// Hidden states of `outputs` rows, put aside.
    pub fn gather(&self, outputs: f64) -> Work {
        let bytes = 2.0 * outputs * self.model.hidden_bytes;
        self.compute(bytes / self.hardware.kernels().pointwise_bytes_per_s, bytes)
    }

    /// One of the steps that make logits of `outputs` rows and draw from them.
    pub fn head(&self, outputs: f64) -> Work {
        if outputs == 0.0 {
            return Work::none();
        }
        let (model, kernels) = (self.model, self.hardware.kernels());
        let together = self.logit_rows as f64;
        let (whole, rest) = ((outputs / together).floor(), outputs % together);
        let curve = kernels.curve(model.weights, model.integer_activations);
        let rest = if rest > 0.0 { curve.secs_per_weight(rest) } else { 0.0 };
        let rounds = if whole > 0.0 { whole * curve.secs_per_weight(together) } else { 0.0 };
        let product = model.head_weights() * (rounds + rest);
        let logits = outputs * model.vocab_size as f64;
        let secs = product + logits / kernels.sampled_logits_per_s;
        let share = 1.0 / self.head_parts as f64;
        self.compute(secs * share, share * (model.head_weights() * model.weights.bytes() + 8.0 * logits))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::hardware::IntegerPages;
    use crate::hardware::tests::example;
    use std::path::Path;

    /// The configuration of a small model with grouped queries.
    pub fn config() -> ModelConfig {
        let json = serde_json::json!({
            "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        });
        ModelConfig::from_json(&json, Path::new("config.json")).unwrap()
    }

    #[test]
    fn a_layers_numbers_are_those_of_its_matrices() {
        let model = ModelCost::new(&config(), None, DType::Bf16, DType::F16);
        let weights = 256.0 * (256.0 + 2.0 * 128.0) + 256.0 * 256.0 + 3.0 * 256.0 * 512.0;
        assert_eq!(model.layer_weights(), weights);
        assert_eq!(model.row_flops(), 2.0 * weights);
        assert_eq!(model.frame_bytes, 64.0 * 2.0 * 128.0 * 2.0);
        let mixture = ModelCost::new(&config(), Some(Experts { total: 8, active: 2 }), DType::Int4, DType::F16);
        assert!(mixture.layer_weights() > 7.0 * 3.0 * 256.0 * 512.0);
        assert_eq!(mixture.row_flops() - model.row_flops(), 2.0 * (3.0 * 256.0 * 512.0 + 256.0 * 8.0));
    }

    #[test]
    fn links_cost_their_bytes_and_a_latency() {
        let (model, hardware) = (ModelCost::new(&config(), None, DType::Bf16, DType::F16), example());
        let costs = Costs::new(&model, &hardware);
        let work = costs.transfer(Link::H2d, 1e9, 2.0);
        assert!((work.lane_secs - (0.1 + 2e-5)).abs() < 1e-12);
        assert_eq!((work.core_secs, work.dram_bytes), (0.0, 1e9));
        // Together they reach 8 of 10 GB/s each: their sum takes 1.25 times as long as one alone.
        assert!((work.link_secs - 0.1 / 1.6).abs() < 1e-12 && work.disk_secs == 0.0);
        let slow = hardware.without_gpu().rehearsed(1 << 30).throttled(&"h2d=1GB/s".parse().unwrap());
        let work = Costs::new(&model, &slow).transfer(Link::H2d, 1e9, 0.0);
        assert_eq!((work.lane_secs, work.core_secs, work.dram_bytes), (1.0, 0.2, 2e9));
    }

    #[test]
    fn attention_of_one_row_costs_its_page_and_of_many_their_arithmetic() {
        let (model, hardware) = (ModelCost::new(&config(), None, DType::Bf16, DType::F16), example().without_gpu());
        let mut kernels = hardware.kernels().clone();
        let load = LayerLoad { rows: 1.0, segments: 1.0, keys: 640.0, pages: 10.0, ..LayerLoad::default() };
        let page_secs = model.page_secs(&kernels, true);
        let decode = model.attention_secs(&kernels, page_secs, &load);
        let sum = 640.0 * 1024.0 / 5e9_f64 + 10.0 * model.frame_bytes / 5e9;
        assert!((decode - sum).abs() < 1e-12, "{decode} {sum}");
        // Beginning a segment costs once per key head, of which there are two.
        kernels.attention_segment_secs = 1e-6;
        assert!((model.attention_secs(&kernels, page_secs, &load) - decode - 2e-6).abs() < 1e-12);
        let many = LayerLoad { rows: 640.0, keys: 204_800.0, ..load };
        let prefill = model.attention_secs(hardware.kernels(), page_secs, &many);
        assert!((prefill / (204_800.0 * 1024.0 / 2e10) - 1.0).abs() < 0.02);
    }

    #[test]
    fn keeping_part_of_a_sequence_costs_what_was_measured() {
        let (model, mut hardware) = (ModelCost::new(&config(), None, DType::Bf16, DType::F16), example().without_gpu());
        let keeping = Keeping { score_secs: 1e-9, sift_secs: 1e-8, evict_secs: 3e-9, turn_secs: 5e-9 };
        hardware.cpu.kernels.keeping = keeping;
        let all = LayerLoad { rows: 1.0, segments: 1.0, keys: 101.0, pages: 2.0, ..LayerLoad::default() };
        let more = |hardware: &Hardware, load: &LayerLoad| {
            let costs = Costs::new(&model, hardware);
            costs.layer(load).lane_secs - costs.layer(&all).lane_secs
        };
        // Four heads of queries and two of keys, 64 wide.
        let heavy = LayerLoad { scored: 101.0, sifted: 101.0, evicted: 1.0, ..all };
        let wanted = 101.0 * 4.0 * 1e-9 + 101.0 * 2.0 * 1e-8 + (256.0 + 2.0 * 128.0) * 3e-9;
        assert!((more(&hardware, &heavy) - wanted).abs() < 1e-12);
        let window = LayerLoad { turned: 1.0, ..all };
        assert!((more(&hardware, &window) - 256.0 * 5e-9).abs() < 1e-12);
        // It is our kernels', not the hardware's.
        assert_eq!([more(&hardware.ideal(), &heavy), more(&hardware.ideal(), &window)], [0.0, 0.0]);
    }

    #[test]
    fn pages_of_integers_cost_what_was_measured_or_what_16_bits_do() {
        let mut hardware = example().without_gpu();
        let load = LayerLoad { rows: 3.0, segments: 3.0, keys: 192.0, pages: 3.0, ..LayerLoad::default() };
        let secs = |hardware: &Hardware, kv: DType| {
            let model = ModelCost::new(&config(), None, DType::Bf16, kv);
            Costs::new(&model, hardware).layer(&load).lane_secs
        };
        let plain = secs(&hardware, DType::F16);
        assert!((secs(&hardware, DType::Int4) - plain).abs() < 1e-12);
        let pages = IntegerPages { wide_bytes_per_s: 1e10, store_secs: 2e-9 };
        hardware.cpu.kernels.integer_pages.insert(DType::Int4, pages);
        // Read twice as fast as 16 bits, but stored in more time.
        let (read, stored) = (3.0 * 64.0 * 256.0 * 2.0 / 1e10, 3.0 * 256.0 * 2e-9);
        assert!((secs(&hardware, DType::Int4) - (plain - read + stored)).abs() < 1e-12);
        assert!((secs(&hardware, DType::Int8) - plain).abs() < 1e-12);
        assert!(secs(&hardware.ideal(), DType::Int4) < secs(&hardware.ideal(), DType::F16));
    }

    #[test]
    fn computing_on_the_cpu_takes_its_cores() {
        let (model, hardware) = (ModelCost::new(&config(), None, DType::Bf16, DType::F16), example());
        let load = LayerLoad { rows: 64.0, segments: 64.0, keys: 6400.0, pages: 128.0, ..LayerLoad::default() };
        let device = Costs::new(&model, &hardware).layer(&load);
        assert_eq!((device.core_secs, device.dram_bytes), (0.0, 0.0));
        let host = hardware.without_gpu();
        let work = Costs::new(&model, &host).layer(&load);
        assert!((work.core_secs - 4.0 * (work.lane_secs - 1e-5)).abs() < 1e-12);
        assert!(work.lane_secs > device.lane_secs && work.dram_bytes > 0.0);
    }
}
