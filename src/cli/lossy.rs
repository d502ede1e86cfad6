//! Numerics that the user leaves to the program (`--allow-lossy`): dtypes of weights and cache, and the precision of
//! activations. What the cache keeps is never chosen: no arithmetic says what forgetting costs.
//!
//! **Invariant:** what was said stays; of choices that are about equally fast the one that rounds least is taken.

use rayon::prelude::*;

use super::flags::{ActivationsChoice, KvChoice, WeightsChoice, choice_name};
use crate::job::Fingerprint;
use crate::model::dtype::DType;

/// A choice within this of the fastest is as good as it.
const ABOUT: f64 = 1.1;

/// Numerics of a job; no dtype means that of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Of the matrices.
    pub weights: Option<DType>,
    /// Of the cache.
    pub kv: Option<DType>,
    /// Of products.
    pub activations: ActivationsChoice,
}

/// What was said about them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Said {
    /// `--weights`.
    pub weights: Option<Option<DType>>,
    /// `--kv-dtype`.
    pub kv: Option<Option<DType>>,
    /// `--activations`.
    pub activations: Option<ActivationsChoice>,
}

/// What there is.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// What matrices are stored in, and whether they must stay so.
    pub weights: DType,
    /// As for `weights`.
    pub is_packed: bool,
    /// What the cache keeps if nothing is said.
    pub kv: DType,
}

impl Said {
    /// As typed.
    pub fn new(weights: Option<WeightsChoice>, kv: Option<KvChoice>, activations: Option<ActivationsChoice>) -> Self {
        Said { weights: weights.map(WeightsChoice::dtype), kv: kv.map(KvChoice::dtype), activations }
    }

    /// Whether nothing is left to choose.
    pub fn is_all(&self) -> bool {
        self.weights.is_some() && self.kv.is_some() && self.activations.is_some()
    }

    /// What goes with what was said, what rounds least first.
    pub fn choices(&self, stored: Stored) -> Vec<Choice> {
        let smaller = |than: DType| {
            let rounded =
                [DType::Bf16, DType::Int8, DType::Int4].into_iter().filter(move |dtype| dtype.bytes() < than.bytes());
            std::iter::once(None).chain(rounded.map(Some))
        };
        let weights: Vec<_> = match self.weights {
            Some(said) => vec![said],
            None if stored.is_packed => vec![None],
            None => smaller(stored.weights).collect(),
        };
        let kv: Vec<_> = self.kv.map_or_else(|| smaller(stored.kv).collect(), |said| vec![said]);
        let both = vec![ActivationsChoice::F32, ActivationsChoice::Int8];
        let activations = self.activations.map_or(both, |said| vec![said]);
        let mut all = Vec::new();
        for &weights in &weights {
            let is_integer = matches!(weights.unwrap_or(stored.weights), DType::Int8 | DType::Int4);
            for &kv in &kv {
                let fits = |activations: &&ActivationsChoice| is_integer || **activations == ActivationsChoice::F32;
                all.extend(activations.iter().filter(fits).map(|&activations| Choice { weights, kv, activations }));
            }
        }
        all.sort_by_key(Choice::loss);
        all
    }
}

impl Choice {
    /// What a choice costs, to compare two: 4 bits cost more than 8 anywhere, and of weights more than of keys and
    /// values (`bench_results/quality.md`).
    fn loss(&self) -> u32 {
        let of = |dtype: Option<DType>, int4: u32| match dtype {
            Some(DType::Bf16) => 1,
            Some(DType::Int8) => 2,
            Some(DType::Int4) => int4,
            _ => 0,
        };
        of(self.weights, 16) + of(self.kv, 8) + if self.activations == ActivationsChoice::Int8 { 2 } else { 0 }
    }

    /// What a job that was begun had; `stored` names what flags need not.
    pub fn of(fingerprint: &Fingerprint, stored: Stored) -> Option<Choice> {
        let dtype = |name: &str, native: DType| {
            let found = DType::ALL.into_iter().find(|dtype| Some(dtype.name()) == fingerprint.get(name))?;
            Some(Some(found).filter(|&found| found != native))
        };
        let activations = match fingerprint.get("activations")? {
            "int8" => ActivationsChoice::Int8,
            _ => ActivationsChoice::F32,
        };
        Some(Choice { weights: dtype("weights", stored.weights)?, kv: dtype("kv_dtype", stored.kv)?, activations })
    }

    /// The flags that say it.
    pub fn words(&self) -> String {
        let Choice { weights, kv, activations } = self;
        let (weights, kv) = (choice_name(WeightsChoice::of(*weights)), choice_name(KvChoice::of(*kv)));
        format!("--weights {weights} --kv-dtype {kv} --activations {}", choice_name(*activations))
    }
}

/// The first of some choices, in order of what they round, that takes a tenth longer than the fastest at most, and how
/// many times as fast it is as the very first; none of no choices. `secs` is what the job takes, none where it does not
/// fit. Where nothing fits it is the last, which is smallest: what is told of it then helps most.
pub fn choose(choices: &[Choice], secs: impl Fn(Choice) -> Option<f64> + Sync) -> Option<(Choice, Option<f64>)> {
    let timed: Vec<Option<f64>> = choices.par_iter().map(|&choice| secs(choice)).collect();
    let least = timed.iter().flatten().copied().fold(f64::INFINITY, f64::min);
    let good = timed.iter().position(|secs| secs.is_some_and(|secs| secs <= ABOUT * least));
    let chosen = good.or(choices.len().checked_sub(1))?;
    let gain = timed[0].zip(timed[chosen]).map(|(first, secs)| first / secs);
    Some((choices[chosen], gain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BF16: Stored = Stored { weights: DType::Bf16, is_packed: false, kv: DType::Bf16 };

    #[test]
    fn what_was_said_stays_and_numbers_go_with_each_other() {
        let all = Said::default().choices(BF16);
        // Weights as they are with f32 alone, integers with both, each with three caches.
        assert_eq!(all.len(), 3 * (1 + 2 + 2));
        assert_eq!(all[0], Choice { weights: None, kv: None, activations: ActivationsChoice::F32 });
        assert!(all.is_sorted_by_key(Choice::loss));
        let said = Said { weights: Some(Some(DType::Bf16)), kv: Some(None), activations: None };
        assert_eq!(said.choices(BF16).len(), 1);
        let said = Said { activations: Some(ActivationsChoice::Int8), ..Said::default() };
        assert!(said.choices(BF16).iter().all(|choice| choice.weights.is_some()));
        // Of 32 bits, 16 are on the way.
        let single = Stored { weights: DType::F32, is_packed: false, kv: DType::F32 };
        let all = Said::default().choices(single);
        assert_eq!((all.len(), all[1].weights.or(all[1].kv)), (4 * (2 + 2 + 2), Some(DType::Bf16)));
        let packed = Stored { weights: DType::Int4, is_packed: true, kv: DType::F16 };
        assert_eq!(Said::default().choices(packed).len(), 3 * 2);
    }

    #[test]
    fn speed_is_bought_where_it_is_worth_it() {
        let choices = Said { activations: Some(ActivationsChoice::F32), ..Said::default() }.choices(BF16);
        let by = |weights: [f64; 3]| {
            let secs = move |choice: Choice| match choice.weights {
                None => weights[0],
                Some(DType::Int8) => weights[1],
                Some(_) => weights[2],
            };
            choose(&choices, |choice| Some(secs(choice)).filter(|secs| secs.is_finite())).unwrap()
        };
        assert_eq!(by([100.0, 95.0, 92.0]).0.weights, None);
        let (choice, gain) = by([100.0, 55.0, 52.0]);
        assert_eq!((choice.weights, choice.kv), (Some(DType::Int8), None));
        assert!((gain.unwrap() - 100.0 / 55.0).abs() < 1e-9);
        // What fits nowhere is no choice, and nothing to compare with.
        assert_eq!(by([f64::INFINITY, f64::INFINITY, 30.0]), (by([9.0, 9.0, 1.0]).0, None));
        assert_eq!(choose(&choices, |_| None), Some((choices[choices.len() - 1], None)));
        assert_eq!(choose(&[], |_| Some(1.0)), None);
    }
}
