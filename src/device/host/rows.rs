//! Everything that works on one row at a time: embeddings, norms, rotation, activations, sums.
//!
//! **Invariant:** a row's sums run in 16 lanes over ascending columns and are folded as a tree, whatever the
//! instruction set; rows never mix.
//!
//! Limit: these read and write each row once or twice; they are bound by memory and small beside the products.

use rayon::prelude::*;

use super::gemm::Panels;
use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold};
use super::math;
use crate::device::{Heads, Rotation};
use crate::model::config::{Activation, Norm};
use crate::model::packed::panels::panel_lane;

/// Elements below which a loop stays on the calling thread.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// Runs `f` on every row, in parallel where the rows are worth it.
fn for_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.len() < PARALLEL_ELEMENTS {
        out.chunks_exact_mut(width).enumerate().for_each(|(row, out)| f(row, out));
    } else {
        let rows = (PARALLEL_ELEMENTS / 4 / width).max(1);
        out.par_chunks_mut(rows * width).enumerate().for_each(|(group, out)| {
            out.chunks_exact_mut(width).enumerate().for_each(|(row, out)| f(group * rows + row, out));
        });
    }
}

/// `out[r] = table row tokens[r]`.
pub fn embed(table: &Panels<'_>, tokens: &[u32], out: &mut [f32]) {
    let width = table.inputs;
    for_rows(&mut out[..tokens.len() * width], width, |row, out| {
        let token = tokens[row] as usize;
        assert!(token < table.outputs, "token {token} of a vocabulary of {}", table.outputs);
        panel_lane(table.panel(token / LANES), table.dtype, token % LANES, out);
    });
}

/// `x[r] += table[indices[r]]`.
pub fn add_rows(table: &[f32], indices: &[u32], width: usize, x: &mut [f32]) {
    for_rows(&mut x[..indices.len() * width], width, |row, x| {
        let from = &table[indices[row] as usize * width..][..width];
        x.iter_mut().zip(from).for_each(|(x, from)| *x += from);
    });
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    if x.len() < PARALLEL_ELEMENTS {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    } else {
        let sum = |(x, y): (&mut [f32], &[f32])| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        x.par_chunks_mut(PARALLEL_ELEMENTS).zip(y.par_chunks(PARALLEL_ELEMENTS)).for_each(sum);
    }
}

/// Normalises rows as wide as `weight`.
pub fn norm(isa: Isa, norm: Norm, x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    let width = weight.len();
    for_rows(out, width, |row, out| {
        isa.run(NormRow { norm, x: &x[row * width..][..width], weight, bias, out });
    });
}

/// RMSNorm of every query and key head.
pub fn norm_heads(isa: Isa, qkv: &mut [f32], heads: Heads, eps: f32, query: &[f32], key: &[f32]) {
    let head_dim = heads.head_dim;
    for_rows(qkv, heads.qkv_width(), |_, row| {
        let mut x = vec![0f32; head_dim];
        for (head, out) in row.chunks_exact_mut(head_dim).take(heads.num_heads + heads.num_kv_heads).enumerate() {
            x.copy_from_slice(out);
            let weight = if head < heads.num_heads { query } else { key };
            isa.run(NormRow { norm: Norm::Rms { eps }, x: &x, weight: &weight[..head_dim], bias: None, out });
        }
    });
}

/// One row of a normalisation.
struct NormRow<'a> {
    norm: Norm,
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        let count = self.x.len() as f32;
        // SAFETY: the instruction set is the caller's.
        let (mean, scale) = unsafe {
            match self.norm {
                Norm::Rms { eps } => (0.0, 1.0 / (sum_squares::<V>(self.x, 0.0) / count + eps).sqrt()),
                Norm::Layer { eps } => {
                    let mean = sum::<V>(self.x) / count;
                    (mean, 1.0 / (sum_squares::<V>(self.x, mean) / count + eps).sqrt())
                }
            }
        };
        match self.bias {
            None => {
                for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
                    *out = (x - mean) * scale * weight;
                }
            }
            Some(bias) => {
                for (((out, x), weight), bias) in self.out.iter_mut().zip(self.x).zip(self.weight).zip(bias) {
                    *out = ((x - mean) * scale).mul_add(*weight, *bias);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn sum<V: Lanes>(x: &[f32]) -> f32 {
    // SAFETY: the instruction set is the caller's; `load_padded` stays inside `x`.
    unsafe {
        let mut total = V::splat(0.0);
        for chunk in x.chunks(LANES) {
            total = total.add(load_padded(chunk, 0.0));
        }
        fold(total.to_array())
    }
}

/// Sum of (x - mean)^2.
#[inline(always)]
unsafe fn sum_squares<V: Lanes>(x: &[f32], mean: f32) -> f32 {
    // SAFETY: as in `sum`; the padding equals the mean, so it adds nothing.
    unsafe {
        let mut total = V::splat(0.0);
        for chunk in x.chunks(LANES) {
            let d = load_padded::<V>(chunk, mean).sub(V::splat(mean));
            total = d.fma(d, total);
        }
        fold(total.to_array())
    }
}

/// Up to 16 values, the rest `padding`.
#[inline(always)]
pub unsafe fn load_padded<V: Lanes>(chunk: &[f32], padding: f32) -> V {
    // SAFETY: full chunks are read in place, others through a full buffer; the set is the caller's.
    unsafe {
        if chunk.len() >= LANES {
            V::load(chunk.as_ptr())
        } else {
            let mut buffer = [padding; LANES];
            buffer[..chunk.len()].copy_from_slice(chunk);
            V::load(buffer.as_ptr())
        }
    }
}

/// Rotates the leading dimensions of query and key heads: pairs (i, i + rotary_dim / 2).
pub fn rotate(qkv: &mut [f32], heads: Heads, rotation: &Rotation<'_>) {
    for_rows(qkv, heads.qkv_width(), |row, qkv| {
        for head in qkv.chunks_exact_mut(heads.head_dim).take(heads.num_heads + heads.num_kv_heads) {
            rotate_head(head, row, rotation);
        }
    });
}

/// Rotates one head of a row.
pub fn rotate_head(head: &mut [f32], row: usize, rotation: &Rotation<'_>) {
    let half = rotation.rotary_dim / 2;
    let (cos, sin) = (&rotation.cos[row * half..][..half], &rotation.sin[row * half..][..half]);
    let (low, high) = head[..2 * half].split_at_mut(half);
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// `out = act(up)` or `act(gate) * up`.
pub fn activate(isa: Isa, activation: Activation, gated: bool, up: &[f32], width: usize, out: &mut [f32]) {
    for_rows(out, width, |row, out| {
        let (gate, up) = if gated {
            let (gate, up) = up[row * 2 * width..][..2 * width].split_at(width);
            (gate, Some(up))
        } else {
            (&up[row * width..][..width], None)
        };
        isa.run(ActivateRow { activation, gate, up, out });
    });
}

struct ActivateRow<'a> {
    activation: Activation,
    gate: &'a [f32],
    up: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for ActivateRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        for (index, out) in self.out.chunks_mut(LANES).enumerate() {
            let range = index * LANES..index * LANES + out.len();
            // SAFETY: the instruction set is the caller's; partial chunks go through full buffers.
            unsafe {
                let x = load_padded::<V>(&self.gate[range.clone()], 0.0);
                let mut y = match self.activation {
                    Activation::Relu => x.max(V::splat(0.0)),
                    Activation::Silu => math::silu(x),
                    Activation::Gelu => math::gelu(x),
                    Activation::GeluTanh => math::gelu_tanh(x),
                };
                if let Some(up) = self.up {
                    y = y.mul(load_padded::<V>(&up[range], 0.0));
                }
                if out.len() == LANES {
                    y.store(out.as_mut_ptr());
                } else {
                    out.copy_from_slice(&y.to_array()[..out.len()]);
                }
            }
        }
    }
}
