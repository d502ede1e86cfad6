//! Which device computes.
//!
//! **Invariant:** a GPU is looked for only where one may be used, and on machines without one nothing is said about it.

use super::flags::DeviceChoice;
use super::say;
use crate::device::cuda::card::{Card, Problem};
use crate::device::cuda::{Needs, arithmetic, workspace};
use crate::error::{Bytes, Error, Result, Tier};
use crate::executor::size::product_bytes;
use crate::kv::policy::{Kept, KvPolicy, Spread};
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;
use crate::model::packed::layout::ModelLayout;
use crate::schedule::placement::{Placement, Workspace};

/// The widest head that kernels take.
const MOST_HEAD_DIM: usize = 256;

/// The version of the arithmetic on cards: a change that alters bits raises it, so that no job mixes two.
const ARITHMETIC: &str = "cuda-2";

/// The card that is to compute; none for the CPU.
///
/// # Errors
/// [`Error::NoDevice`] when a card was asked for and cannot be used.
pub fn choose(choice: Option<DeviceChoice>) -> Result<Option<Card>> {
    match choice.unwrap_or(DeviceChoice::Auto) {
        DeviceChoice::Host => Ok(None),
        DeviceChoice::Cuda => Card::open().map(Some).map_err(Problem::into_error),
        DeviceChoice::Auto => match Card::open() {
            Ok(card) => Ok(Some(card)),
            Err(Problem::Absent(_)) => Ok(None),
            Err(Problem::Unusable { what, hint }) => {
                say::line(&format!("the CPU computes: {what}; {hint}"));
                Ok(None)
            }
        },
    }
}

/// The device memory to use: `given`, else 90 % of what is free.
///
/// # Errors
/// [`Error::OverBudget`] when less is free than was given.
pub fn budget(card: &Card, given: Option<u64>) -> Result<u64> {
    let free = card.free_bytes()?;
    match given {
        Some(bytes) if bytes > free => Err(Error::OverBudget {
            what: "--gpu-memory".into(),
            tier: Tier::Gpu,
            need: Bytes(bytes),
            have: Bytes(free),
            hint: Some(format!("use --gpu-memory {}MiB or less; others may be using the card", free >> 20)),
        }),
        Some(bytes) => Ok(bytes),
        None => Ok(free / 10 * 9),
    }
}

/// What a card works in for a model.
pub fn workspace_of(config: &ModelConfig, layout: &ModelLayout) -> Workspace {
    let workspace = workspace::Workspace::new(config, product_bytes(layout));
    Workspace { device: workspace.bytes() as u64, lists: workspace.lists as u64, lists_row: workspace.lists_row as u64 }
}

/// What a card's results depend on: part of a run's fingerprint, so that no run goes on with another arithmetic.
///
/// # Errors
/// [`Error::Usage`] for what cards do not compute.
pub fn numerics(card: &Card, weights: DType, kv_policy: &dyn KvPolicy, config: &ModelConfig) -> Result<String> {
    if config.head_dim > MOST_HEAD_DIM {
        let what =
            format!("heads of {} are too wide for the GPU's kernels, which take {MOST_HEAD_DIM}", config.head_dim);
        return Err(Error::usage(what, "add --device host"));
    }
    let long = 1 << 30;
    if matches!(kv_policy.kept(long, long), Kept::Heavy { spread: Spread::Heads { .. }, .. }) {
        let what = format!("--kv-policy {kv_policy}: per-head is not on GPUs yet");
        return Err(Error::usage(what, "use h2o or pyramid, or add --device host"));
    }
    Ok(format!("{ARITHMETIC} {}", arithmetic(weights, &card.facts)))
}

/// What the device for a placement is made with.
pub fn needs<'a>(
    config: &ModelConfig,
    layout: &ModelLayout,
    placement: &Placement,
    cache: &'a std::path::Path,
    compiling: &'a (dyn Fn() + Sync),
) -> Needs<'a> {
    Needs {
        workspace: workspace::Workspace::new(config, product_bytes(layout)),
        rows: placement.policy.block_rows,
        device_bytes: placement.arenas().0 as usize,
        cache,
        compiling,
    }
}
