//! A model that is there, as the planner sees it.
//!
//! **Invariant:** bytes are those that the executor will carve, not those that a configuration lets one expect.

use std::sync::Arc;

use super::flags::{ActivationsChoice, KvChoice, WeightsChoice, kv_policy, rounds_activations};
use super::lossy::Stored;
use super::{devices, resources};
use crate::error::Result;
use crate::executor::size::model_bytes;
use crate::kv::layout::KvLayout;
use crate::kv::policy::KvPolicy;
use crate::model::Model;
use crate::model::dtype::DType;
use crate::model::packed::Packed;
use crate::model::packed::read::PackedModel;
use crate::planner::model::PlanModel;

/// Numerics as typed.
#[derive(Clone, Copy, Debug)]
pub struct Numerics<'a> {
    /// `--weights`.
    pub weights: WeightsChoice,
    /// `--kv-dtype`.
    pub kv: KvChoice,
    /// `--kv-policy`.
    pub kv_policy: Option<&'a str>,
    /// `--activations`.
    pub activations: Option<ActivationsChoice>,
}

/// A model in its numerics.
pub struct Exact {
    /// What of a sequence is kept.
    pub kv_policy: Arc<dyn KvPolicy>,
    /// How pages are laid out.
    pub kv: KvLayout,
    /// What matrices are stored in.
    pub element: DType,
    /// The model to plan with.
    pub model: PlanModel,
}

/// The dtypes of a model as it lies there.
pub fn stored(model: &Model) -> Stored {
    let kv = model.weights.dtype(&model.source.embed).or(model.config.dtype).unwrap_or(DType::F32);
    let converted = model.packed.as_ref().and_then(PackedModel::weights);
    Stored { weights: converted.unwrap_or(kv), is_packed: model.packed.is_some(), kv }
}

impl Exact {
    /// The model in these numerics; `packed` is it in the dtype of its weights, `card` whether a card computes.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::error::Error::Usage) for numerics that do not go with the model.
    pub fn new(model: &Model, packed: &dyn Packed, numerics: Numerics<'_>, card: bool) -> Result<Exact> {
        let config = &model.config;
        let stored = stored(model);
        let kv_policy = kv_policy(numerics.kv_policy, config)?;
        let kv = KvLayout {
            num_layers: config.num_layers,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            dtype: numerics.kv.dtype().unwrap_or(stored.kv),
            scored: kv_policy.needs_scores(),
        };
        let mut bytes = model_bytes(config, packed.layout(), &kv);
        if card {
            bytes.workspace = devices::workspace_of(config, packed.layout());
        }
        let element = numerics.weights.dtype().unwrap_or(stored.weights);
        let plan_model = PlanModel::new(&model.name, config.clone(), None, element, kv.dtype);
        let mut plan_model = plan_model.with_scores(kv.scored).with_bytes(bytes);
        plan_model.cost.integer_activations = rounds_activations(numerics.activations, element)?;
        if !resources::may_read_planes(packed.layout(), model.packed.as_ref()) {
            plan_model.cost.compressed_ratio = 1.0;
        }
        Ok(Exact { kv_policy, kv, element, model: plan_model })
    }
}
