//! How much fits: the batch and the KV cache for a memory budget.
//!
//! **Invariant:** what is refused here is refused before any weight is read, with the numbers and a budget that
//! would do.

use crate::engine::Batch;
use crate::error::{Bytes, Error, Result, Tier};
use crate::executor::size::{Capacity, Shape, total_bytes};
use crate::kv::layout::{KvLayout, pages_for};
use crate::model::Model;
use crate::model::dtype::DType;

/// Sequences in flight when neither policy nor memory says otherwise.
const SEQUENCES: usize = 256;
/// Prompt tokens in a pass by default: enough to reuse every weight often.
const CHUNK_TOKENS: usize = 512;
/// Logits of one block of rows stay below this.
const LOGIT_BYTES: usize = 64 << 20;
/// Positions that the smallest acceptable cache holds (or the whole context, if that is shorter).
const MIN_POSITIONS: usize = 1024;

/// What is fixed before the budget is looked at.
pub struct Wishes {
    /// Sequences in flight, if given.
    pub sequences: Option<usize>,
    /// Prompt tokens in a pass, if given.
    pub chunk_tokens: Option<usize>,
    /// Store matrices in this dtype.
    pub weights: Option<DType>,
    /// Store keys and values in this dtype.
    pub kv: DType,
    /// Bytes of main memory.
    pub cpu_memory: u64,
    /// Samples of a prompt share its computation.
    pub share_prompts: bool,
}

/// The batch and the memory layout for `model`.
///
/// # Errors
/// [`Error::OverBudget`] when weights, activations and one sequence do not fit.
pub fn fit(model: &Model, wishes: &Wishes) -> Result<(Batch, Shape)> {
    let config = &model.config;
    let layout = KvLayout {
        num_layers: config.num_layers,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        dtype: wishes.kv,
    };
    let mut batch = Batch {
        sequences: wishes.sequences.unwrap_or(SEQUENCES),
        chunk_tokens: wishes.chunk_tokens.unwrap_or(CHUNK_TOKENS),
        share_prompts: wishes.share_prompts,
    };
    let shape = |batch: Batch, pages: usize| {
        let rows = batch.sequences + batch.chunk_tokens;
        let logit_rows = (LOGIT_BYTES / 4 / config.vocab_size).clamp(1, 64).min(rows);
        Shape { weights: wishes.weights, layout, capacity: Capacity { rows, logit_rows, pages } }
    };
    let needed = |batch: Batch, pages: usize| total_bytes(model, &shape(batch, pages)) as u64;
    // One page more than a sequence needs: several samples of a prompt copy its last page.
    let least = pages_for(config.context_len.min(MIN_POSITIONS)) + 1;
    while needed(batch, least) > wishes.cpu_memory {
        // Activations are what can shrink, unless the user fixed them.
        let smaller = Batch {
            sequences: if wishes.sequences.is_none() { batch.sequences.div_ceil(2) } else { batch.sequences },
            chunk_tokens: if wishes.chunk_tokens.is_none() {
                batch.chunk_tokens.div_ceil(2)
            } else {
                batch.chunk_tokens
            },
            ..batch
        };
        if smaller == batch {
            let need = needed(batch, least);
            return Err(Error::OverBudget {
                what: format!("model `{}` with a batch of {} sequences", model.name, batch.sequences),
                tier: Tier::Cpu,
                need: Bytes(need),
                have: Bytes(wishes.cpu_memory),
                hint: Some(format!("use --cpu-memory {}MiB or more", need.div_ceil(1 << 20))),
            });
        }
        batch = smaller;
    }
    let left = wishes.cpu_memory - needed(batch, 0);
    let affordable = (left / layout.page_bytes() as u64) as usize;
    let useful = batch.sequences.saturating_mul(pages_for(config.context_len) + 1);
    Ok((batch, shape(batch, affordable.min(useful).max(least))))
}
