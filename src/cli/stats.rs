//! `--stats FILE.json`.
//!
//! **Invariant:** the keys are stable (design, section 8); rates are tokens over wall time from the first prompt to
//! the last completion, with loading reported beside it.

use std::path::Path;

use serde_json::json;

use super::generate::Resolved;
use crate::engine::{Counts, Used};
use crate::error::{Error, Result};
use crate::job::Summary;
use crate::memory::limits::peak_resident;
use crate::schedule::step::Lane;

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
pub fn write(
    path: &Path,
    resolved: &Resolved,
    used: &Used,
    counts: &Counts,
    summary: &Summary,
    times: &Times,
) -> Result<()> {
    let per_second = |tokens: u64| tokens as f64 / times.wall_secs.max(1e-9);
    let decision = &resolved.decision;
    let placement = &decision.placement;
    let lanes = Lane::ALL.into_iter().zip(used.lanes).filter(|(_, count)| count.busy.as_nanos() > 0);
    let lanes: serde_json::Map<String, serde_json::Value> = lanes
        .map(|(lane, count)| {
            let value = json!({"busy_s": count.busy.as_secs_f64(), "bytes": count.bytes});
            (lane.name().to_owned(), value)
        })
        .collect();
    let [gpu, cpu, disk] = resolved.budgets.by_tier();
    let [device, host, files] = used.bytes;
    let (gpu_used, cpu_used) = if resolved.budgets.gpu.is_some() { (device, host) } else { (0, device + host) };
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
        "predicted_tokens_per_s": decision.prediction.map(|prediction| prediction.total_tokens_per_s),
        "bound_tokens_per_s": decision.bound_tokens_per_s,
        "passes": counts.passes,
        "replanned": counts.replanned,
        "peak_bytes": {"gpu": gpu_used, "cpu": cpu_used, "disk": files},
        "peak_resident_bytes": peak_resident(),
        "budget_bytes": {"gpu": gpu, "cpu": cpu, "disk": disk},
        "lanes": lanes,
        "policy": placement.policy,
        "numerics": resolved.numerics,
        "kv": {
            "policy": resolved.numerics["kv_policy"], "evicted_tokens": counts.evicted_tokens,
            "pauses": counts.paused, "kept_tokens": counts.kept_tokens,
        },
        "synthetic": resolved.synthetic,
    });
    let text = serde_json::to_string_pretty(&stats).expect("a JSON value has a text") + "\n";
    std::fs::write(path, text).map_err(Error::io("write", path))
}
