//! The numerics of a job whose user leaves them to the program.
//!
//! **Invariant:** a job that was begun goes on with what it began with.

use super::Arguments;
use crate::cli::exact::{Exact, Numerics, stored};
use crate::cli::flags::{KvChoice, WeightsChoice, kv_policy};
use crate::cli::lossy::{Choice, Said, choose};
use crate::cli::say;
use crate::device::cuda::card::Card;
use crate::error::{Error, Result};
use crate::job;
use crate::model::Model;

impl Arguments {
    /// The same with all numerics said; as they are, without `--allow-lossy`.
    ///
    /// # Errors
    /// What keeps the machine from being measured.
    pub(super) fn settled(self, model: &Model, card: Option<&Card>) -> Result<Arguments> {
        let said = Said::new(self.weights, self.kv_dtype, self.activations);
        if self.allow_lossy != Some(true) || said.is_all() {
            return Ok(self);
        }
        let stored = stored(model);
        let output = self.output.as_deref().filter(|output| output.as_os_str() != "-");
        let begun = output.map_or(Ok(None), job::begun)?;
        if let Some(choice) = begun.and_then(|fingerprint| Choice::of(&fingerprint, stored)) {
            say::line(&format!("--allow-lossy keeps what the job was begun with: {}", choice.words()));
            return Ok(self.with(choice));
        }
        if self.shard.is_some() {
            // Found out by `merge`, it would be a night too late.
            let hint = "run `tidemill plan --allow-lossy` once and give all shards the flags that it names";
            return Err(Error::usage("--allow-lossy could choose something else for every --shard", hint));
        }
        let kv_policy = kv_policy(self.kv_policy.as_deref(), &model.config)?;
        let (job, budgets, throttles) = (self.estimate(model, &*kv_policy), self.budgets(card)?, self.throttles()?);
        let secs = |choice: Choice| -> Result<Option<f64>> {
            let packed = model.packed(choice.weights)?;
            let numerics = Numerics {
                weights: WeightsChoice::of(choice.weights),
                kv: KvChoice::of(choice.kv),
                kv_policy: self.kv_policy.as_deref(),
                activations: Some(choice.activations),
            };
            let exact = Exact::new(model, &*packed, numerics, card.is_some())?;
            self.situation(&exact.model, None, (budgets, &throttles), &job, card)?.rough_secs()
        };
        let choices = said.choices(stored);
        // What was said may not go together, which is told to whoever uses it.
        let Some(&first) = choices.first() else { return Ok(self) };
        // Measures the machine if need be, once, and says what is wrong with what was said.
        let first_secs = secs(first)?;
        let secs = |choice| if choice == first { first_secs } else { secs(choice).unwrap_or(None) };
        let Some((choice, gain)) = choose(&choices, secs) else { return Ok(self) };
        let gain = gain.map_or_else(String::new, |gain| format!(", {gain:.1} times as fast by the plan"));
        say::line(&format!("--allow-lossy chose {}{gain}", choice.words()));
        Ok(self.with(choice))
    }

    fn with(self, choice: Choice) -> Arguments {
        Arguments {
            weights: Some(self.weights.unwrap_or(WeightsChoice::of(choice.weights))),
            kv_dtype: Some(self.kv_dtype.unwrap_or(KvChoice::of(choice.kv))),
            activations: Some(self.activations.unwrap_or(choice.activations)),
            ..self
        }
    }
}
