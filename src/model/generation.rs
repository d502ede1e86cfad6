//! `generation_config.json`: how the model's authors sample from it.
//!
//! **Invariant:** every value is finite and in the range that sampling accepts.

use std::path::Path;

use serde_json::Value;

use super::config::ModelConfig;
use super::fields::Fields;
use super::files::Files;
use crate::error::Result;

/// Sampling defaults of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Whether to sample at all; false asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keep this many tokens; 0 is off.
    pub top_k: Option<u32>,
    /// Keep the most probable tokens up to this mass.
    pub top_p: Option<f32>,
    /// Keep tokens at least this probable relative to the best.
    pub min_p: Option<f32>,
    /// Makes tokens of prompt or output less probable.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<u32>,
    /// End-of-sequence tokens; config.json's when generation_config.json names none.
    pub eos_token_ids: Vec<u32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` if it is there.
    ///
    /// # Errors
    /// `Error::Model` naming the key and value that is out of range.
    pub fn load(files: &Files, config: &ModelConfig) -> Result<Self> {
        let mut generation = match files.json("generation_config.json")? {
            Some(value) => GenerationConfig::from_json(&value, &files.path("generation_config.json"))?,
            None => GenerationConfig::default(),
        };
        if generation.eos_token_ids.is_empty() {
            generation.eos_token_ids.clone_from(&config.eos_token_ids);
        }
        Ok(generation)
    }

    /// Reads a generation_config.json that was parsed from `path`.
    ///
    /// # Errors
    /// `Error::Model` naming the key and value that is out of range.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields::new(value, path)?;
        let number = |key, low, high| Ok(fields.number(key, low..=high)?.map(|number| number as f32));
        let count = |key| Ok(fields.size(key, 0..=u32::MAX as usize)?.map(|count| count as u32));
        let do_sample = fields.get("do_sample").map(|_| fields.flag("do_sample", false)).transpose()?;
        Ok(GenerationConfig {
            do_sample,
            temperature: number("temperature", 0.0, 100.0)?,
            top_k: count("top_k")?,
            top_p: number("top_p", 0.0, 1.0)?,
            min_p: number("min_p", 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", 1e-3, 1e3)?,
            max_new_tokens: count("max_new_tokens")?,
            eos_token_ids: fields.token_ids("eos_token_id")?.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<GenerationConfig> {
        GenerationConfig::from_json(&value, Path::new("generation_config.json"))
    }

    #[test]
    fn one_or_many_ends() {
        assert_eq!(read(json!({"eos_token_id": 2})).unwrap().eos_token_ids, [2]);
        let llama3 = read(json!({"eos_token_id": [128001, 128008], "temperature": 0.6, "top_p": 0.9})).unwrap();
        assert_eq!((llama3.eos_token_ids, llama3.temperature), (vec![128001, 128008], Some(0.6)));
        assert_eq!(read(json!({"eos_token_id": null})).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        for (key, value) in [
            ("temperature", json!(-1.0)),
            ("temperature", json!("hot")),
            ("top_p", json!(1.5)),
            ("top_k", json!(-3)),
            ("repetition_penalty", json!(0)),
            ("eos_token_id", json!("</s>")),
            ("eos_token_id", json!([1, 4_294_967_296u64])),
        ] {
            let error = read(json!({key: value})).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
