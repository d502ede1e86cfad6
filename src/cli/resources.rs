//! What fits: a placement within the budgets.
//!
//! **Invariant:** what is refused here is refused before any weight is read, with the numbers and a budget that
//! would do.

use std::path::{Path, PathBuf};

use super::config::PolicyFile;
use crate::engine::Batch;
use crate::error::{Bytes, Error, Result, Tier};
use crate::executor::stage_ids;
use crate::kv::layout::pages_for;
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;
use crate::model::packed::cache;
use crate::model::packed::layout::ModelLayout;
use crate::model::packed::read::PackedModel;
use crate::policy::{Policy, Split};
use crate::schedule::placement::{ModelBytes, Placement};

/// Sequences in flight when neither policy nor memory says otherwise.
const SEQUENCES: usize = 256;
/// Prompt tokens in a pass by default: enough to reuse every weight often.
const CHUNK_TOKENS: usize = 512;
/// Positions that the smallest acceptable cache holds (or the whole context, if that is shorter).
const MIN_POSITIONS: usize = 1024;

/// Bytes granted of each tier; none of a gpu where the CPU computes.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// Device memory (rehearsed in main memory where there is no device).
    pub gpu: Option<u64>,
    /// Main memory.
    pub cpu: u64,
    /// Files.
    pub disk: u64,
}

impl Budgets {
    /// The tier that computes.
    pub fn compute(&self) -> Tier {
        if self.gpu.is_some() { Tier::Gpu } else { Tier::Cpu }
    }

    /// All three, by tier.
    pub fn by_tier(&self) -> [u64; 3] {
        [self.gpu.unwrap_or(0), self.cpu, self.disk]
    }
}

/// What is fixed before the budgets are looked at.
pub struct Wishes<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// What its parts take.
    pub bytes: &'a ModelBytes,
    /// What the policy file says.
    pub policy: &'a PolicyFile,
    /// Bytes granted.
    pub budgets: Budgets,
    /// The model's name, for messages.
    pub name: &'a str,
}

/// Lets as many threads compute, all cores by default.
///
/// # Errors
/// [`Error::Usage`] for a number that makes no sense.
pub fn use_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    if !(1..=1024).contains(&threads) {
        let what = format!("--threads {threads} is not between 1 and 1024");
        return Err(Error::usage(what, "leave it out for all cores"));
    }
    // Fails only when the pool exists already, which nothing before this makes.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    Ok(())
}

/// Where files for what does not fit into memory are made: `given`, else in the cache directory.
///
/// # Errors
/// As [`cache::directory`].
pub fn offload_directory(given: Option<&Path>, cache: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(directory) => Ok(directory.to_owned()),
        None => Ok(cache::directory(cache)?.join("offload")),
    }
}

/// The placement that the policy file asks for, its gaps filled: everything where it is computed, as many sequences
/// and pages as the budgets allow.
///
/// # Errors
/// [`Error::OverBudget`] when weights, activations and one sequence do not fit.
pub fn fit(wishes: &Wishes<'_>) -> Result<Placement> {
    let policy = wishes.policy;
    let mut sequences = policy.sequences.unwrap_or(SEQUENCES);
    let mut chunk_tokens = policy.chunk_tokens.unwrap_or(CHUNK_TOKENS);
    loop {
        let least = wishes.placement(sequences, chunk_tokens, wishes.least_pages());
        let Some((tier, need, have)) = wishes.over(&least) else { break };
        // Activations are what can shrink, unless the user fixed them.
        let smaller = (
            if policy.sequences.is_none() { sequences.div_ceil(2) } else { sequences },
            if policy.chunk_tokens.is_none() { chunk_tokens.div_ceil(2) } else { chunk_tokens },
        );
        if smaller == (sequences, chunk_tokens) {
            let flag = match tier {
                Tier::Gpu => "--gpu-memory",
                Tier::Cpu => "--cpu-memory",
                Tier::Disk => "--disk-space",
            };
            return Err(Error::OverBudget {
                what: format!("model `{}` with a batch of {sequences} sequences", wishes.name),
                tier,
                need: Bytes(need),
                have: Bytes(have),
                hint: Some(format!("use {flag} {}MiB or more", need.div_ceil(1 << 20))),
            });
        }
        (sequences, chunk_tokens) = smaller;
    }
    let fits = |pages: usize| wishes.over(&wishes.placement(sequences, chunk_tokens, pages)).is_none();
    let (mut low, least) = (wishes.least_pages(), wishes.least_pages());
    let most = sequences.saturating_mul(pages_for(wishes.config.context_len) + 1).max(least);
    // More pages take more memory in every tier, so the greatest number that fits is found by halving.
    let mut high = policy.pages.map_or(most + 1, |_| low + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Ok(wishes.placement(sequences, chunk_tokens, low))
}

/// Refuses compressed planes where they cannot be had: every stage that comes from the disk must be bf16, and files
/// that were packed must have planes.
///
/// # Errors
/// [`Error::Usage`] with what to do instead.
pub fn check_planes(placement: &Placement, layout: &ModelLayout, packed: Option<&PackedModel>) -> Result<()> {
    if !placement.reads_planes() {
        return Ok(());
    }
    let stages = stage_ids(layout, placement).into_iter().zip(&placement.stages);
    for (id, _) in stages.filter(|(_, stage)| stage.disk > 0) {
        let mut matrices = layout.stage(id).matrices.iter();
        if let Some(matrix) = matrices.find(|matrix| matrix.dtype != DType::Bf16) {
            return Err(Error::usage(
                format!("the policy reads compressed planes, which only bf16 has; these weights are {}", matrix.dtype),
                "leave `compressed` out of the policy",
            ));
        }
        if let Some(packed) = packed.filter(|packed| !packed.has_planes(id)) {
            let shown = packed.directory().display();
            return Err(Error::usage(
                format!("the policy reads compressed planes, which {shown} does not have"),
                format!("run `tidemill pack --planes --model {shown} --output {shown}`, or leave `compressed` out"),
            ));
        }
    }
    Ok(())
}

/// Whether layers can be read as compressed planes: a packed directory must have them, a cache can be given them.
pub fn may_read_planes(layout: &ModelLayout, packed: Option<&PackedModel>) -> bool {
    layout.stages().all(|(id, stage)| {
        let bf16 = stage.matrices.iter().all(|matrix| matrix.dtype == DType::Bf16);
        bf16 && packed.is_none_or(|packed| packed.has_planes(id))
    })
}

/// How the engine fills passes under a placement.
pub fn batch(placement: &Placement, share_prompts: bool, expected_len: Option<usize>) -> Batch {
    let Policy { sequences, chunk_tokens, schedule, .. } = placement.policy;
    Batch { sequences, chunk_tokens, share_prompts, order: schedule, expected_len }
}

impl Wishes<'_> {
    /// The pages of the smallest cache, or those that the policy file asks for. One page more than a sequence needs:
    /// several samples of a prompt copy its last page.
    fn least_pages(&self) -> usize {
        self.policy.pages.unwrap_or(pages_for(self.config.context_len.min(MIN_POSITIONS)) + 1)
    }

    fn placement(&self, sequences: usize, chunk_tokens: usize, pages: usize) -> Placement {
        let file = self.policy;
        let compute = self.budgets.compute();
        let here = Split::all(compute);
        let blocks = file.blocks.unwrap_or(1);
        let kv = file.kv.unwrap_or(here);
        let streamed = (pages as f64 * (1.0 - kv.share(compute))).ceil() as usize;
        let longest = pages_for(self.config.context_len.min(MIN_POSITIONS)) + 1;
        let policy = Policy {
            sequences,
            chunk_tokens,
            blocks,
            block_rows: file.block_rows.unwrap_or((sequences + chunk_tokens).div_ceil(blocks)),
            weight_slots: file.weight_slots.unwrap_or(3),
            kv_slots: file.kv_slots.unwrap_or(2),
            pages,
            block_pages: file.block_pages.unwrap_or(streamed.div_ceil(blocks).max(longest)),
            paused_pages: file.paused_pages.unwrap_or(0),
            weights: file.weights.unwrap_or(here),
            kv,
            hidden: file.hidden.unwrap_or(here),
            embed: file.embed.unwrap_or(compute),
            head: file.head.unwrap_or(compute),
            compressed: file.compressed.unwrap_or(false),
            schedule: file.schedule.unwrap_or_default(),
        };
        Placement::new(self.bytes, &policy, compute)
    }

    /// The first tier that a placement overfills.
    fn over(&self, placement: &Placement) -> Option<(Tier, u64, u64)> {
        crate::schedule::check::over_budget(placement, self.budgets.by_tier())
    }
}
