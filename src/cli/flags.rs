//! Flag values with units and names of their own.
//!
//! **Invariant:** a value that parses is in range; messages say what would be.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kv::policies;
use crate::kv::policy::KvPolicy;
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;
use crate::policy::Order;

/// A number of bytes such as `14GiB`, `512MB` or `1000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no size; write one such as 14GiB, 512MiB or 3GB");
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let value = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
        if value.is_finite() && value >= 1.0 && value < 2f64.powi(60) { Ok(Size(value as u64)) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Size> for String {
    fn from(size: Size) -> String {
        size.to_string()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceChoice {
    /// The first GPU that can be used, else the CPU.
    Auto,
    /// The first GPU (CUDA_VISIBLE_DEVICES chooses).
    Cuda,
    /// The CPU.
    Host,
}

/// `--weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightsChoice {
    /// As stored.
    Native,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
    /// 8 bits, in groups of 64 with a scale and an offset: 8.5 bits a weight.
    Int8,
    /// 4 bits, likewise: 4.5 bits a weight.
    Int4,
}

impl WeightsChoice {
    /// The choice that stands for a dtype; none is as stored.
    pub fn of(dtype: Option<DType>) -> Self {
        *Self::value_variants().iter().find(|choice| choice.dtype() == dtype).expect("every dtype has a choice")
    }

    /// The dtype to convert to; none for as stored.
    pub fn dtype(self) -> Option<DType> {
        match self {
            WeightsChoice::Native => None,
            WeightsChoice::Bf16 => Some(DType::Bf16),
            WeightsChoice::F16 => Some(DType::F16),
            WeightsChoice::F32 => Some(DType::F32),
            WeightsChoice::Int8 => Some(DType::Int8),
            WeightsChoice::Int4 => Some(DType::Int4),
        }
    }
}

/// `--kv-dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvChoice {
    /// The checkpoint's dtype.
    Auto,
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8 bits, with a scale and an offset for every position and head.
    Int8,
    /// 4 bits, likewise.
    Int4,
}

impl KvChoice {
    /// The choice that stands for a dtype; none is the checkpoint's.
    pub fn of(dtype: Option<DType>) -> Self {
        *Self::value_variants().iter().find(|choice| choice.dtype() == dtype).expect("every dtype has a choice")
    }

    /// The dtype; none for the checkpoint's.
    pub fn dtype(self) -> Option<DType> {
        match self {
            KvChoice::Auto => None,
            KvChoice::F32 => Some(DType::F32),
            KvChoice::Bf16 => Some(DType::Bf16),
            KvChoice::F16 => Some(DType::F16),
            KvChoice::Int8 => Some(DType::Int8),
            KvChoice::Int4 => Some(DType::Int4),
        }
    }
}

/// `--kv-policy`; none is `full`.
///
/// # Errors
/// [`Error::Usage`] with what is wrong.
pub fn kv_policy(text: Option<&str>, config: &ModelConfig) -> Result<Arc<dyn KvPolicy>> {
    let hint = "write full, h2o:keep=0.2,recent=8,stretch=1.0 or h2o:heavy=0.1,recent=0.1 (shares of a request's \
                length, or counts), pyramid or per-head likewise, or sink:start=4,recent=1020";
    let Some(text) = text else { return Ok(policies::full()) };
    let policy = policies::parse(text).map_err(|what| Error::usage(format!("--kv-policy {text}: {what}"), hint))?;
    if policy.outgrows_context() && config.positions.depend_on_length() {
        let what = format!("--kv-policy {text}: this model's rotation depends on the length of the whole sequence");
        return Err(Error::usage(what, "use full, h2o, pyramid or per-head, which leave positions as they are"));
    }
    let narrow = |window: &Option<usize>| window.is_some_and(|window| window < config.context_len);
    if policy.needs_scores() && config.sliding_window.iter().any(narrow) {
        let what = format!("--kv-policy {text}: this model has layers with a window of their own");
        return Err(Error::usage(what, "use full or sink"));
    }
    Ok(policy)
}

/// `--activations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationsChoice {
    /// Products take activations in IEEE single.
    F32,
    /// Products with int8 and int4 weights round activations to 8 bits, in groups of 64: faster, and less exact.
    Int8,
}

/// Whether products round activations to integers, which takes weights that are integers.
///
/// # Errors
/// [`Error::Usage`] for other weights.
pub fn rounds_activations(choice: Option<ActivationsChoice>, weights: DType) -> Result<bool> {
    let rounds = choice == Some(ActivationsChoice::Int8);
    match weights {
        DType::F32 | DType::Bf16 | DType::F16 if rounds => Err(Error::usage(
            format!("--activations int8 goes with weights of small integers, these are {weights}"),
            "add --weights int4 or int8, or leave --activations away",
        )),
        _ => Ok(rounds),
    }
}

/// `--schedule`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleChoice {
    /// Prompts are computed beside the tokens of those who decode, and take the places of those who end.
    Mixed,
    /// A batch begins together: first all of its prompts, then its answers, and the next one when all have ended.
    Phased,
}

impl ScheduleChoice {
    /// The order that it stands for.
    pub fn order(self) -> Order {
        match self {
            ScheduleChoice::Mixed => Order::Mixed,
            ScheduleChoice::Phased => Order::Phased,
        }
    }
}

/// `--prefix-sharing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// Samples of a prompt share its computation and its KV cache, and so do prompts that begin alike.
    On,
    /// Each sample computes the prompt for itself.
    Off,
}

/// `--progress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressChoice {
    /// A bar; the default on a terminal.
    Bar,
    /// A line every few seconds; the default elsewhere.
    Line,
    /// A JSON object every few seconds.
    Json,
    /// Nothing.
    None,
}

/// The name that a choice has on the command line.
pub fn choice_name(choice: impl clap::ValueEnum) -> String {
    choice.to_possible_value().expect("no choice is hidden").get_name().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!("14GiB".parse(), Ok(Size(14 << 30)));
        assert_eq!("1.5 MiB".parse(), Ok(Size(3 << 19)));
        assert_eq!("3gb".parse(), Ok(Size(3_000_000_000)));
        assert_eq!("77".parse(), Ok(Size(77)));
        for wrong in ["", "GiB", "-1GiB", "1 parsec", "0", "1e30TiB", "nan"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }
}
