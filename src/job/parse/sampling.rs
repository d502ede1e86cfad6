//! How a line wants its completion sampled: line > flag > generation_config.json > default.
//!
//! **Invariant:** every value that comes out is finite and in range.

use std::collections::BTreeMap;

use serde_json::json;

use super::fields::{Fields, invalid};
use crate::job::options::{Defaults, Limits};
use crate::job::request::{Endpoint, LineError, Prompt, Sampling};

type Parsed<T> = Result<T, LineError>;

const MAX_SAMPLES: i64 = 128;
const MAX_LOGPROBS: i64 = 20;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_BIASES: usize = 1024;
const MAX_TOKENS: i64 = u32::MAX as i64;

/// Takes every sampling field.
pub(super) fn take(
    body: &mut Fields,
    endpoint: Endpoint,
    prompts: &[Prompt],
    defaults: &Defaults,
    limits: &Limits,
) -> Parsed<Sampling> {
    let chat = matches!(prompts, [Prompt::Messages(_)]);
    let echo = body.flag("echo", false)?;
    if echo && chat && endpoint == Endpoint::Chat {
        return Err(LineError::new("unsupported_field", "`echo` is not supported in chat completions"));
    }
    let logprobs = logprobs(body, endpoint, defaults)?;
    let asked_prompt_logprobs = body.integer("prompt_logprobs", 0..=MAX_LOGPROBS)?;
    let max_tokens = max_tokens(body, endpoint, defaults, echo || asked_prompt_logprobs.is_some())?;
    let temperature = body.float("temperature", 0.0..=100.0)?.or(defaults.temperature).unwrap_or(1.0);
    Ok(Sampling {
        temperature: raise(temperature),
        top_p: positive(body, "top_p", 1.0)?.or(defaults.top_p).unwrap_or(1.0),
        top_k: top_k(body)?.or(defaults.top_k).unwrap_or(0),
        min_p: body.float("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: positive(body, "repetition_penalty", 100.0)?.or(defaults.repetition_penalty).unwrap_or(1.0),
        frequency_penalty: body.float("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: body.float("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(body, limits)?,
        allowed_token_ids: allowed(body, limits)?,
        n: body.integer("n", 1..=MAX_SAMPLES)?.or(defaults.n).unwrap_or(1),
        seed: body.integer("seed", i64::MIN..=i64::MAX)?.or(defaults.seed).unwrap_or(0),
        max_tokens,
        min_tokens: body.integer("min_tokens", 0..=i64::from(max_tokens))?.unwrap_or(0),
        stop: stop(body)?.or_else(|| defaults.stop.clone()).unwrap_or_default(),
        stop_token_ids: body.token_ids("stop_token_ids", limits.vocab_size)?.unwrap_or_default(),
        include_stop_str_in_output: body.flag("include_stop_str_in_output", false)?,
        ignore_eos: body.flag("ignore_eos", false)?,
        logprobs,
        // An echoed prompt shows its log-probabilities as the completion does.
        prompt_logprobs: asked_prompt_logprobs.or(logprobs.filter(|_| echo)),
        echo,
        skip_special_tokens: body.flag("skip_special_tokens", true)?,
        truncate_prompt_tokens: body.integer("truncate_prompt_tokens", 1..=MAX_TOKENS)?,
    })
}

/// The sampling of a line that generates nothing and has its tokens scored, with the best alternative of each.
pub(super) fn none() -> Sampling {
    Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        logit_bias: Vec::new(),
        allowed_token_ids: None,
        n: 1,
        seed: 0,
        max_tokens: 0,
        min_tokens: 0,
        stop: Vec::new(),
        stop_token_ids: Vec::new(),
        include_stop_str_in_output: false,
        ignore_eos: false,
        logprobs: None,
        prompt_logprobs: Some(1),
        echo: false,
        skip_special_tokens: true,
        truncate_prompt_tokens: None,
    }
}

/// Checks values given for all lines against the ranges of a line's own.
///
/// # Errors
/// The name of the first value out of range, and what is wrong with it.
pub fn check_defaults(defaults: &Defaults, limits: &Limits) -> Result<(), (&'static str, String)> {
    let number = |value: Option<f32>| {
        // JSON has no NaN: a text in its place is out of range as well.
        value.map(|value| if value.is_finite() { json!(value) } else { json!(value.to_string()) })
    };
    let given = [
        ("max_tokens", defaults.max_tokens.map(|value| json!(value))),
        ("temperature", number(defaults.temperature)),
        ("top_p", number(defaults.top_p)),
        ("top_k", defaults.top_k.map(|value| json!(value))),
        ("min_p", number(defaults.min_p)),
        ("repetition_penalty", number(defaults.repetition_penalty)),
        ("n", defaults.n.map(|value| json!(value))),
        ("stop", defaults.stop.as_ref().map(|value| json!(value))),
        ("logprobs", defaults.logprobs.map(|value| json!(value))),
    ];
    for (name, value) in given {
        let Some(value) = value else { continue };
        let mut body: Fields = serde_json::from_value(json!({ name: value })).expect("an object of one field");
        let endpoint = Endpoint::Completions;
        take(&mut body, endpoint, &[], &Defaults::default(), limits).map_err(|error| (name, error.message))?;
    }
    Ok(())
}

/// Very small temperatures overflow the logits; only 0 itself means greedy (as in vLLM).
fn raise(temperature: f32) -> f32 {
    if temperature > 0.0 && temperature < 0.01 { 0.01 } else { temperature }
}

fn positive(body: &mut Fields, key: &str, max: f64) -> Parsed<Option<f32>> {
    let Some(raw) = body.take(key) else { return Ok(None) };
    match serde_json::from_str::<f64>(raw.get()) {
        Ok(value) if (value as f32) > 0.0 && value <= max => Ok(Some(value as f32)),
        _ => Err(invalid(key, &format!("a number above 0 and at most {max}"), raw.get())),
    }
}

fn top_k(body: &mut Fields) -> Parsed<Option<u32>> {
    let top_k: Option<i64> = body.integer("top_k", -1..=MAX_TOKENS)?;
    Ok(top_k.map(|k| u32::try_from(k).unwrap_or(0)))
}

fn max_tokens(body: &mut Fields, endpoint: Endpoint, defaults: &Defaults, may_be_zero: bool) -> Parsed<u32> {
    let range = if may_be_zero { 0..=MAX_TOKENS } else { 1..=MAX_TOKENS };
    let old_name = body.integer("max_tokens", range.clone())?;
    let new_name = body.integer("max_completion_tokens", range)?;
    let default = if endpoint == Endpoint::Completions { 16 } else { 256 };
    Ok(new_name.or(old_name).or(defaults.max_tokens).unwrap_or(default))
}

/// `/v1/completions` gives a number, chat gives a flag and `top_logprobs`; plain lines may do either.
fn logprobs(body: &mut Fields, endpoint: Endpoint, defaults: &Defaults) -> Parsed<Option<u32>> {
    let as_flag = match body.peek("logprobs") {
        Some("true" | "false") | None => endpoint != Endpoint::Completions,
        Some(_) => endpoint == Endpoint::Chat,
    };
    if !as_flag {
        return Ok(body.integer("logprobs", 0..=MAX_LOGPROBS)?.or(defaults.logprobs));
    }
    let wish = body.get::<bool>("logprobs", "true or false")?;
    let top: Option<u32> = body.integer("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (wish, top) {
        (Some(true), top) => Ok(Some(top.unwrap_or(0))),
        (Some(false), None | Some(0)) => Ok(None),
        (None, None | Some(0)) => Ok(defaults.logprobs),
        (_, Some(_)) => Err(LineError::new("invalid_value", "`top_logprobs` needs `logprobs` to be true")),
    }
}

fn stop(body: &mut Fields) -> Parsed<Option<Vec<String>>> {
    const EXPECTED: &str = "a string or at most 16 strings, each of 1 to 1024 bytes";
    let Some(raw) = body.take("stop") else { return Ok(None) };
    let stops = serde_json::from_str::<String>(raw.get())
        .map(|one| vec![one])
        .or_else(|_| serde_json::from_str::<Vec<String>>(raw.get()));
    match stops {
        Ok(stops) if stops.len() <= MAX_STOPS && stops.iter().all(|s| (1..=MAX_STOP_BYTES).contains(&s.len())) => {
            Ok(Some(stops))
        }
        _ => Err(invalid("stop", EXPECTED, raw.get())),
    }
}

fn logit_bias(body: &mut Fields, limits: &Limits) -> Parsed<Vec<(u32, f32)>> {
    let Some(raw) = body.take("logit_bias") else { return Ok(Vec::new()) };
    let expected = format!(
        "an object of at most {MAX_BIASES} token ids below {} with numbers from -100 to 100",
        limits.vocab_size
    );
    let entries: BTreeMap<String, f64> =
        serde_json::from_str(raw.get()).map_err(|_| invalid("logit_bias", &expected, raw.get()))?;
    if entries.len() > MAX_BIASES {
        return Err(invalid("logit_bias", &expected, &format!("{} entries", entries.len())));
    }
    let mut biases = BTreeMap::new();
    for (key, bias) in &entries {
        let id = key.parse::<u32>().ok().filter(|&id| id < limits.vocab_size);
        match id {
            Some(id) if bias.abs() <= 100.0 && biases.insert(id, *bias as f32).is_none() => {}
            _ => return Err(invalid("logit_bias", &expected, &format!("{{\"{key}\": {bias}}}"))),
        }
    }
    Ok(biases.into_iter().collect())
}

fn allowed(body: &mut Fields, limits: &Limits) -> Parsed<Option<Vec<u32>>> {
    let mut ids = body.token_ids("allowed_token_ids", limits.vocab_size)?;
    if let Some(ids) = &mut ids {
        ids.sort_unstable();
        ids.dedup();
    }
    match ids {
        Some(ids) if ids.is_empty() => Err(invalid("allowed_token_ids", "not empty", "[]")),
        ids => Ok(ids),
    }
}
