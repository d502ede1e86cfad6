//! Why a plan is as fast as it is, and what would make it faster.
//!
//! **Invariant:** every figure comes from the same program and the same search as the plan; nothing is guessed.

use super::lp::{Budgets, Capabilities};
use super::model::Numerics;
use super::search::{Plan, Question};
use crate::hardware::{Hardware, Keeping, Link};
use crate::model::dtype::DType;
use crate::schedule::price::Bottleneck;
use crate::schedule::step::Lane;

/// A change that would help.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What is changed.
    pub what: String,
    /// How many times as fast the job would be, by the linear program.
    pub gain: f64,
    /// Whether it changes tokens.
    pub lossy: bool,
}

/// What is known about a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// What takes the time of a pass.
    pub binding: Bottleneck,
    /// Prompt and generated tokens per second that the hardware allows, whatever the program.
    pub bound_tokens_per_s: f64,
    /// What sets that bound.
    pub bound_by: Bottleneck,
    /// Changes that help, the best first.
    pub changes: Vec<Change>,
}

/// What a bottleneck is, in words.
pub fn words(bottleneck: Bottleneck) -> &'static str {
    match bottleneck {
        Bottleneck::Lane(Lane::DiskRead) => "reading from the disk",
        Bottleneck::Lane(Lane::DiskWrite) => "writing to the disk",
        Bottleneck::Lane(Lane::H2d) => "copies to the device",
        Bottleneck::Lane(Lane::D2h) => "copies from the device",
        Bottleneck::Lane(Lane::Gpu) => "computation on the device",
        Bottleneck::Lane(Lane::Cpu) => "computation on the CPU",
        Bottleneck::Cores => "the CPU's cores, which copies and computation share",
        Bottleneck::Dram => "main memory's bandwidth",
        Bottleneck::Link => "the link to the device, both directions together",
        Bottleneck::Disk => "the disk, reading and writing together",
    }
}

/// Explains `plan`, an answer to `question`.
pub fn explain(question: &Question<'_>, plan: &Plan) -> Explanation {
    let (bound_tokens_per_s, bound_by) = question.bound().unwrap_or((plan.total_tokens_per_s, plan.bottleneck));
    let mut changes = changes(question);
    changes.retain(|change| change.gain >= 1.02);
    changes.sort_by(|a, b| b.gain.total_cmp(&a.gain));
    Explanation { binding: plan.bottleneck, bound_tokens_per_s, bound_by, changes }
}

fn changes(question: &Question<'_>) -> Vec<Change> {
    let Some(base) = question.best_program_secs() else { return Vec::new() };
    let mut changes = Vec::new();
    let mut add = |what: String, lossy: bool, question: &Question<'_>| {
        if let Some(secs) = question.best_program_secs() {
            changes.push(Change { what, gain: base / secs, lossy });
        }
    };
    let Budgets(budgets) = question.budgets;
    for (tier, name) in ["device memory", "main memory"].into_iter().enumerate() {
        let mut more = question.hardware.clone();
        let mut bytes = budgets;
        bytes[tier] *= 2.0;
        if let Some(gpu) = &mut more.gpu {
            gpu.memory_bytes = gpu.memory_bytes.max(bytes[0] as u64);
        }
        if budgets[tier] > 0.0 && (tier == 1 || question.hardware.gpu.is_some()) {
            add(
                format!("twice the {name}"),
                false,
                &Question { hardware: &more, budgets: Budgets(bytes), ..*question },
            );
        }
    }
    let mut faster = |what: &str, change: &dyn Fn(&mut Hardware)| {
        let mut hardware = question.hardware.clone();
        change(&mut hardware);
        add(what.to_owned(), false, &Question { hardware: &hardware, ..*question });
    };
    if question.hardware.rate(Link::DiskRead) > 0.0 && budgets[2] > 0.0 {
        faster("a disk twice as fast", &|hardware| {
            if let Some(disk) = &mut hardware.disk {
                disk.read_bytes_per_s *= 2.0;
                disk.write_bytes_per_s *= 2.0;
                disk.read_together_bytes_per_s *= 2.0;
                disk.write_together_bytes_per_s *= 2.0;
            }
        });
    }
    if question.hardware.gpu.is_some() {
        faster("a link to the device twice as fast", &|hardware| {
            if let Some(links) = &mut hardware.links {
                links.h2d_bytes_per_s *= 2.0;
                links.d2h_bytes_per_s *= 2.0;
                links.h2d_together_bytes_per_s *= 2.0;
                links.d2h_together_bytes_per_s *= 2.0;
            }
        });
    }
    faster("twice the computing speed", &|hardware| {
        if hardware.computes_on_cpu() {
            hardware.cpu.cores *= 2.0;
        }
        let kernels = hardware.gpu.as_mut().map_or(&mut hardware.cpu.kernels, |gpu| &mut gpu.kernels);
        kernels.matmul.values_mut().for_each(|curve| curve.0.iter_mut().for_each(|point| point.1 *= 2.0));
        kernels.attention_prefill_flops *= 2.0;
        kernels.attention_decode_flops *= 2.0;
        kernels.attention_bytes_per_s *= 2.0;
        for pages in kernels.integer_pages.values_mut() {
            pages.wide_bytes_per_s *= 2.0;
            pages.store_secs /= 2.0;
        }
        let Keeping { score_secs, sift_secs, evict_secs, turn_secs } = &mut kernels.keeping;
        [score_secs, sift_secs, evict_secs, turn_secs].into_iter().for_each(|secs| *secs /= 2.0);
        kernels.pointwise_bytes_per_s *= 2.0;
        kernels.sampled_logits_per_s *= 2.0;
    });
    if question.hardware.gpu.as_ref().is_some_and(|gpu| !gpu.rehearsed) && !question.capabilities.cpu_attention {
        let capabilities = Capabilities { cpu_attention: true };
        add("attention by the CPU where the cache lies".into(), false, &Question { capabilities, ..*question });
    }
    let (weights, kv) = (question.model.cost.weights, question.model.cost.kv);
    if weights != DType::Int4 {
        let model = question.model.with(Numerics { weights: Some(DType::Int4), kv: None });
        add("4-bit weights".into(), true, &Question { model: &model, ..*question });
    }
    if kv != DType::Int4 {
        let model = question.model.with(Numerics { weights: None, kv: Some(DType::Int4) });
        add("a 4-bit KV cache".into(), true, &Question { model: &model, ..*question });
    }
    changes
}
