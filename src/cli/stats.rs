//! `--stats FILE.json`.
//!
//! **Invariant:** the keys are stable (design, section 8); rates are tokens over wall time from the first prompt to
//! the last completion, with loading reported beside it.

use std::path::Path;

use serde_json::json;

use super::generate::Resolved;
use crate::engine::Counts;
use crate::error::{Error, Result};
use crate::job::Summary;
use crate::memory::limits::peak_resident;

/// What a run took.
pub struct Times {
    /// Opening and loading the model, in seconds.
    pub load_secs: f64,
    /// From the first prompt to the last completion, in seconds.
    pub wall_secs: f64,
}

/// Writes the statistics of this process.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written.
pub fn write(path: &Path, resolved: &Resolved, counts: &Counts, summary: &Summary, times: &Times) -> Result<()> {
    let per_second = |tokens: u64| tokens as f64 / times.wall_secs.max(1e-9);
    let stats = json!({
        "wall_s": times.wall_secs,
        "load_s": times.load_secs,
        "requests": counts.succeeded + counts.failed,
        "resumed": summary.resumed,
        "failed": counts.failed,
        "prompt_tokens": counts.prompt_tokens,
        "prefix_shared_tokens": counts.shared_tokens,
        "computed_tokens": counts.computed_tokens,
        "generated_tokens": counts.generated_tokens,
        "generated_tokens_per_s": per_second(counts.generated_tokens),
        "total_tokens_per_s": per_second(counts.prompt_tokens + counts.generated_tokens),
        "predicted_tokens_per_s": null,
        "bound_tokens_per_s": null,
        "passes": counts.passes,
        "peak_bytes": {"gpu": 0, "cpu": peak_resident(), "disk": 0},
        "budget_bytes": {"gpu": 0, "cpu": resolved.cpu_memory, "disk": 0},
        "lanes": {"cpu": {"busy_s": counts.busy.as_secs_f64(), "bytes": counts.passes * resolved.weight_bytes}},
        "policy": {
            "sequences": resolved.batch.sequences,
            "chunk_tokens": resolved.batch.chunk_tokens,
            "kv_pages": resolved.shape.capacity.pages,
        },
        "numerics": resolved.numerics,
        "kv": {"policy": "full", "evicted_tokens": 0},
        "synthetic": resolved.synthetic,
    });
    let text = serde_json::to_string_pretty(&stats).expect("a JSON value has a text") + "\n";
    std::fs::write(path, text).map_err(Error::io("write", path))
}
