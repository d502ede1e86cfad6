//! Seeded weights in the shape of any configuration: real work for the machine without a download.
//!
//! Elements are Gaussian, quantised to the 65536 quantiles (i + 1/2) / 65536: one table look-up for 16 random bits.
//! The largest magnitude is 4.3 standard deviations. Scales of norms are 1, biases 0; a matrix with n inputs has the
//! standard deviation 1/sqrt(n), divided by sqrt(2 * layers) where it adds to the residual stream, so that activations
//! stay of order one at any depth; embeddings and heads have twice 1/sqrt(n), so that logits spread by about 2.
//!
//! **Invariant:** an element depends on (seed, tensor name, its index) alone, never on which rows were asked for.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::dtype::DType;
use super::names::{Part, WeightShape, weight_shapes};
use super::source::{TensorSource, TensorView};
use crate::error::Result;
use crate::rng::Philox;

/// Seeded weights of one configuration.
pub struct SyntheticWeights {
    weights: HashMap<String, WeightShape>,
    seed: u64,
    dtype: DType,
    num_layers: usize,
    origin: PathBuf,
    /// Encoded quantiles by the bits of their standard deviation.
    tables: Mutex<HashMap<u32, Arc<Vec<u8>>>>,
}

/// Elements that share one random word.
const GROUP: usize = 4;
/// Elements per unit of parallel work.
const CHUNK: usize = 1 << 16;
const QUANTILES: usize = 1 << 16;

impl SyntheticWeights {
    /// The weights of `config` for `seed`; `origin` is for messages. The dtype is the configuration's, else bf16.
    pub fn new(config: &ModelConfig, seed: u64, origin: PathBuf) -> Self {
        let weights = weight_shapes(config).into_iter().map(|weight| (weight.name.clone(), weight)).collect();
        let dtype = config.dtype.unwrap_or(DType::Bf16);
        SyntheticWeights { weights, seed, dtype, num_layers: config.num_layers, origin, tables: Mutex::default() }
    }

    /// The element type of all weights.
    pub fn element_type(&self) -> DType {
        self.dtype
    }

    /// Writes elements `elements` of the tensor called `name` to `out`, little-endian.
    ///
    /// # Panics
    /// If there is no such tensor or `out` is not as long as the elements.
    pub fn fill(&self, name: &str, elements: Range<usize>, out: &mut [u8]) {
        let weight = &self.weights[name];
        let size = self.dtype.size();
        assert_eq!(out.len(), elements.len() * size, "output for {name}");
        match self.deviation(weight) {
            None => {
                let value = self.encode(if weight.part == Part::Norm { 1.0 } else { 0.0 });
                out.chunks_exact_mut(size).for_each(|element| element.copy_from_slice(&value[..size]));
            }
            Some(deviation) => {
                let table = self.table(deviation);
                let stream = Stream::new(self.seed, name);
                out.par_chunks_mut(CHUNK * size).enumerate().for_each(|(chunk, out)| {
                    let first = elements.start + chunk * CHUNK;
                    match size {
                        2 => fill_chunk::<2>(&stream, &table, first, out),
                        _ => fill_chunk::<4>(&stream, &table, first, out),
                    }
                });
            }
        }
    }

    /// The standard deviation of a weight's elements; none for constant ones.
    fn deviation(&self, weight: &WeightShape) -> Option<f32> {
        let inputs = *weight.shape.last().expect("weights have dimensions") as f64;
        let unit = 1.0 / libm::sqrt(inputs);
        match weight.part {
            Part::Embedding => Some((2.0 * unit) as f32),
            Part::Position => Some(unit as f32),
            Part::Inner => Some(unit as f32),
            Part::Residual => Some((unit / libm::sqrt(2.0 * self.num_layers as f64)) as f32),
            Part::Norm | Part::Bias => None,
        }
    }

    fn encode(&self, value: f32) -> [u8; 4] {
        let mut bytes = [0; 4];
        match self.dtype {
            DType::F32 => bytes = value.to_le_bytes(),
            DType::Bf16 => bytes[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::F16 => bytes[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::Int8 | DType::Int4 => unreachable!("checkpoints are plain"),
        }
        bytes
    }

    fn table(&self, deviation: f32) -> Arc<Vec<u8>> {
        let mut tables = self.tables.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let table = tables.entry(deviation.to_bits()).or_insert_with(|| {
            let encoded = quantiles().iter().map(|quantile| self.encode(quantile * deviation));
            Arc::new(encoded.flat_map(|bytes| bytes.into_iter().take(self.dtype.size())).collect())
        });
        Arc::clone(table)
    }
}

/// The random words of one tensor: SplitMix64 (Steele et al., OOPSLA 2014) read as a function of a counter, from a
/// start that Philox draws for seed and name. Philox for every word would cost three times as much.
struct Stream(u64);

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        let digest = Sha256::digest(name.as_bytes());
        let stream = u64::from_le_bytes(std::array::from_fn(|i| digest[i]));
        let [low, high, ..] = Philox::new(seed, stream).words(0);
        Stream(u64::from(high) << 32 | u64::from(low))
    }

    fn word(&self, index: u64) -> u64 {
        let mut word = self.0.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    }
}

/// Elements `first..` of a stream, `SIZE` bytes each. Elements 4i to 4i+3 take the 16-bit parts of word i, low first.
fn fill_chunk<const SIZE: usize>(stream: &Stream, table: &[u8], first: usize, out: &mut [u8]) {
    let (table, _) = table.as_chunks::<SIZE>();
    let table: &[[u8; SIZE]; QUANTILES] = table.try_into().expect("one entry per quantile");
    let element = |index: usize| {
        let word = stream.word((index / GROUP) as u64);
        table[usize::from((word >> (16 * (index % GROUP))) as u16)]
    };
    let (out, _) = out.as_chunks_mut::<SIZE>();
    let head = first.next_multiple_of(GROUP).min(first + out.len()) - first;
    let (before, aligned) = out.split_at_mut(head);
    before.iter_mut().enumerate().for_each(|(i, out)| *out = element(first + i));
    let start = first + head;
    let (groups, after) = aligned.as_chunks_mut::<GROUP>();
    for (group, out) in groups.iter_mut().enumerate() {
        let word = stream.word((start / GROUP + group) as u64);
        *out = std::array::from_fn(|i| table[usize::from((word >> (16 * i)) as u16)]);
    }
    let start = start + groups.len() * GROUP;
    after.iter_mut().enumerate().for_each(|(i, out)| *out = element(start + i));
}

/// The standard normal quantiles at (i + 1/2) / 65536.
fn quantiles() -> &'static [f32] {
    static QUANTILE_TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    QUANTILE_TABLE
        .get_or_init(|| (0..QUANTILES).map(|i| normal_quantile((i as f64 + 0.5) / QUANTILES as f64) as f32).collect())
}

/// The inverse of the standard normal distribution function.
///
/// Source: Acklam's rational approximation (relative error below 1.2e-9), far finer than the table.
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.38357751867269e+02,
        -3.066479806614716e+01,
        2.506628277459239e+00,
    ];
    const B: [f64; 5] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838e+00,
        -2.549732539343734e+00,
        4.374664141464968e+00,
        2.938163982698783e+00,
    ];
    const D: [f64; 4] = [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00];
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -normal_quantile(1.0 - p);
    }
    if p < 0.02425 {
        let q = libm::sqrt(-2.0 * libm::log(p));
        return polynomial(&C, q) / (polynomial(&D, q) * q + 1.0);
    }
    let q = p - 0.5;
    let r = q * q;
    polynomial(&A, r) * q / (polynomial(&B, r) * r + 1.0)
}

impl TensorSource for SyntheticWeights {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let Some(weight) = self.weights.get(name) else { return Ok(None) };
        let rows = 0..weight.shape[0];
        self.rows(name, rows)
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.weights.get(name).map(|_| self.dtype)
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(self.weights.get(name).map(|weight| weight.shape.clone()))
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Option<TensorView<'_>>> {
        let Some(weight) = self.weights.get(name) else { return Ok(None) };
        assert!(rows.start <= rows.end && rows.end <= weight.shape[0], "rows {rows:?} of `{name}`");
        let row: usize = weight.shape[1..].iter().product();
        let mut data = vec![0; rows.len() * row * self.dtype.size()];
        self.fill(name, rows.start * row..rows.end * row, &mut data);
        let mut shape = weight.shape.clone();
        shape[0] = rows.len();
        Ok(Some(TensorView { dtype: self.dtype, shape, data: Cow::Owned(data) }))
    }

    fn origin(&self, _: &str) -> PathBuf {
        self.origin.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn weights(dtype: &str, seed: u64) -> SyntheticWeights {
        let value = serde_json::json!({"model_type": "llama", "vocab_size": 300, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": dtype});
        let config = ModelConfig::from_json(&value, Path::new("config.json")).unwrap();
        SyntheticWeights::new(&config, seed, "config.json".into())
    }

    fn bytes(weights: &SyntheticWeights, name: &str) -> Vec<u8> {
        weights.tensor(name).unwrap().unwrap().data.into_owned()
    }

    #[test]
    fn quantiles_are_normal() {
        assert!((normal_quantile(0.975) - 1.959963985).abs() < 1e-8 && normal_quantile(0.5).abs() < 1e-12);
        let mean_square = quantiles().iter().map(|q| f64::from(*q).powi(2)).sum::<f64>() / QUANTILES as f64;
        assert!((mean_square - 1.0).abs() < 1e-3, "{mean_square}");
    }

    #[test]
    fn elements_depend_on_seed_name_and_index_alone() {
        let name = "model.layers.1.mlp.down_proj.weight";
        for dtype in ["float32", "bfloat16", "float16"] {
            let source = weights(dtype, 7);
            let all = bytes(&source, name);
            let row = 96 * source.element_type().size();
            for rows in [0..1, 3..5, 63..64] {
                let some = source.rows(name, rows.clone()).unwrap().unwrap();
                assert_eq!(some.data[..], all[rows.start * row..rows.end * row]);
            }
            let size = source.element_type().size();
            let mut odd = vec![0; 11 * size];
            source.fill(name, 13..24, &mut odd);
            assert_eq!(odd, all[13 * size..24 * size]);
            source.fill(name, 13..14, &mut odd[..size]);
            assert_eq!(odd[..size], all[13 * size..14 * size]);
            assert_ne!(all, bytes(&weights(dtype, 8), name));
            assert_ne!(all, bytes(&source, "model.layers.0.mlp.down_proj.weight"));
        }
    }

    #[test]
    fn elements_have_the_documented_deviation() {
        let source = weights("float32", 1);
        let values: Vec<f32> = bytes(&source, "lm_head.weight")
            .chunks_exact(4)
            .map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap()))
            .collect();
        let mean_square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!((mean_square.sqrt() * 4.0 - 1.0).abs() < 0.03, "{mean_square}");
        assert!(bytes(&source, "model.norm.weight").chunks_exact(4).all(|one| one == 1.0f32.to_le_bytes()));
    }

    #[test]
    #[ignore = "measures speed: run with --ignored --nocapture"]
    fn speed() {
        let value = serde_json::json!({"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32});
        let config = ModelConfig::from_json(&value, Path::new("config.json")).unwrap();
        let source = SyntheticWeights::new(&config, 1, "config.json".into());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let name = "lm_head.weight";
        source.rows(name, 0..1).unwrap();
        let mut out = vec![0u8; 4000 * 4096 * 2];
        let start = std::time::Instant::now();
        pool.install(|| source.fill(name, 0..4000 * 4096, &mut out));
        let rate = out.len() as f64 / start.elapsed().as_secs_f64() / 1e6;
        assert!(rate > 300.0, "{rate:.0} MB/s on one core");
        std::io::Write::write_all(&mut std::io::stderr(), format!("{rate:.0} MB/s\n").as_bytes()).unwrap();
    }
}
