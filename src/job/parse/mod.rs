//! One input line to a [`Request`] or the reason why not.
//!
//! **Invariant:** a line's name and answer shape depend on that line alone, and are found even when the rest of the
//! line is wrong.

mod fields;
mod prompt;
mod sampling;
mod score;

pub use sampling::check_defaults;

use std::sync::Arc;

use serde_json::value::RawValue;

use self::fields::{Fields, shorten};
use super::lines::Line;
use super::options::{Defaults, Limits};
use super::request::{Endpoint, LineError, Request};

const URLS: [(&str, Endpoint); 2] =
    [("/v1/completions", Endpoint::Completions), ("/v1/chat/completions", Endpoint::Chat)];

/// A line's name and shape, and its fields if it is a JSON object.
#[derive(Debug)]
pub(crate) struct Envelope {
    /// The user's name for the line, or `line-<physical line>`.
    pub custom_id: Arc<str>,
    /// The shape of its answer.
    pub endpoint: Endpoint,
    fields: Result<Fields, LineError>,
}

impl Envelope {
    /// Opens a line that is not blank.
    pub fn open(number: u64, line: &Line<'_>, limits: &Limits) -> Envelope {
        let bytes = if let Line::Text(bytes) = line { bytes } else { &b""[..] };
        let mut fields = match line {
            Line::TooLong => {
                Err(LineError::new("line_too_long", format!("the line has more than {} bytes", limits.line_bytes)))
            }
            _ => read_object(bytes),
        };
        let endpoint = match &mut fields {
            Ok(fields) => shape(fields),
            Err(_) if looks_like_openai(bytes) => Endpoint::Completions,
            Err(_) => Endpoint::Plain,
        };
        let custom_id = match fields.as_mut().map(take_id) {
            Ok(Ok(Some(id))) => id.into(),
            Ok(Ok(None)) | Err(_) => default_id(number),
            Ok(Err(error)) => {
                fields = Err(error);
                default_id(number)
            }
        };
        Envelope { custom_id, endpoint, fields }
    }

    /// Parses and validates the rest.
    pub fn request(self, index: u64, line: u64, defaults: &Defaults, limits: &Limits) -> Result<Request, LineError> {
        let Envelope { custom_id, endpoint, fields } = self;
        let mut fields = fields?;
        let mut metadata = None;
        let mut body = match endpoint {
            Endpoint::Plain | Endpoint::Score => {
                metadata = fields.take("metadata");
                metadata.as_deref().map_or(Ok(()), check_depth)?;
                fields
            }
            Endpoint::Completions | Endpoint::Chat => take_body(fields)?,
        };
        let model = body.text("model")?;
        let prompts = prompt::take(&mut body, endpoint, limits)?;
        let return_token_ids = body.flag("return_token_ids", false)?;
        let return_prompt_logprobs = body.has("prompt_logprobs");
        let sampling = match endpoint {
            Endpoint::Score => sampling::none(),
            _ => sampling::take(&mut body, endpoint, &prompts, defaults, limits)?,
        };
        let return_prompt_logprobs = return_prompt_logprobs && sampling.prompt_logprobs.is_some();
        accept_neutral(&mut body, sampling.n)?;
        body.finish()?;
        Ok(Request {
            index,
            line,
            custom_id,
            endpoint,
            prompts,
            sampling,
            metadata,
            model: model.filter(|_| !matches!(endpoint, Endpoint::Plain | Endpoint::Score)),
            return_token_ids,
            return_prompt_logprobs,
        })
    }
}

fn default_id(number: u64) -> Arc<str> {
    format!("line-{number}").into()
}

fn read_object(bytes: &[u8]) -> Result<Fields, LineError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        LineError::new("invalid_utf8", format!("the line is not UTF-8 (from byte {})", error.valid_up_to()))
    })?;
    serde_json::from_str(text)
        .map_err(|error| LineError::new("invalid_json_line", shorten_error(&format!("not a JSON object: {error}"))))
}

fn shorten_error(text: &str) -> String {
    // serde_json counts lines within the text that it was given, which is always one.
    text.replace(" at line 1 column ", " at column ")
}

/// The shape of a line that is an object: any field of a batch line makes it one.
fn shape(fields: &Fields) -> Endpoint {
    if !["url", "body", "method"].iter().any(|key| fields.has(key)) {
        return if score::is_asked(fields) { Endpoint::Score } else { Endpoint::Plain };
    }
    let url: Option<String> = fields.peek("url").and_then(|raw| serde_json::from_str(raw).ok());
    let known = URLS.iter().find(|(known, _)| Some(*known) == url.as_deref());
    known.map_or(Endpoint::Completions, |(_, endpoint)| *endpoint)
}

/// A guess for lines that do not parse, so that their error records fit those of their neighbours.
fn looks_like_openai(bytes: &[u8]) -> bool {
    let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    has(b"\"url\"") && has(b"/v1/")
}

fn take_id(fields: &mut Fields) -> Result<Option<String>, LineError> {
    let (custom_id, id) = (fields.take("custom_id"), fields.take("id"));
    if custom_id.is_some() && id.is_some() {
        return Err(LineError::new("invalid_value", "`custom_id` and `id` are both given; give one"));
    }
    let (key, raw) = match (custom_id, id) {
        (Some(raw), _) => ("custom_id", raw),
        (None, Some(raw)) => ("id", raw),
        (None, None) => return Ok(None),
    };
    match serde_json::from_str::<String>(raw.get()) {
        Ok(id) if !id.is_empty() => Ok(Some(id)),
        _ => Err(fields::invalid(key, "a string that is not empty", raw.get())),
    }
}

/// Checks the envelope of an OpenAI batch line and opens its body.
fn take_body(mut fields: Fields) -> Result<Fields, LineError> {
    let method = fields.text("method")?;
    if method.as_deref() != Some("POST") {
        let got = method.map_or("none".into(), |method| format!("`{}`", shorten(&method)));
        return Err(LineError::new("invalid_value", format!("`method` must be \"POST\", got {got}")));
    }
    let url = fields.text("url")?.unwrap_or_default();
    if !URLS.iter().any(|(known, _)| *known == url) {
        let known = URLS.map(|(known, _)| known).join(", ");
        let url = shorten(&url);
        return Err(LineError::new("url_mismatch", format!("`url` \"{url}\" is not supported; supported: {known}")));
    }
    let body: Option<Box<RawValue>> = fields.take("body");
    fields.finish()?;
    let body = body.ok_or_else(|| LineError::new("missing_field", "`body` is missing"))?;
    serde_json::from_str(body.get())
        .map_err(|error| LineError::new("invalid_value", shorten_error(&format!("`body` is not usable: {error}"))))
}

/// Copied values must not make an output line that common parsers refuse.
fn check_depth(metadata: &RawValue) -> Result<(), LineError> {
    let parsed = serde_json::from_str::<serde_json::Value>(&format!("[{}]", metadata.get()));
    parsed.map(drop).map_err(|_| fields::invalid("metadata", "nested less deeply", metadata.get()))
}

/// Fields that cannot be honoured (the first few: on this kind of line), with the values (besides null) that ask for nothing special.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_generation_prompt", &["true"]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &["{}"]),
    ("continue_final_message", &["false"]),
    ("documents", &["[]"]),
    ("messages", &[]),
    ("prompt", &[]),
    ("tools", &["[]"]),
    ("top_logprobs", &["0"]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("cache_salt", &[]),
    ("early_stopping", &["false"]),
    ("function_call", &["\"none\""]),
    ("functions", &["[]"]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("include_reasoning", &["true"]),
    ("kv_transfer_params", &[]),
    ("length_penalty", &["1", "1.0"]),
    ("logits_processors", &["[]"]),
    ("mm_processor_kwargs", &[]),
    ("modalities", &["[\"text\"]"]),
    ("parallel_tool_calls", &["true"]),
    ("prediction", &[]),
    ("priority", &["0"]),
    ("reasoning_effort", &[]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("service_tier", &["\"auto\"", "\"default\""]),
    ("spaces_between_special_tokens", &["true"]),
    ("store", &["false"]),
    ("stream", &["false"]),
    ("stream_options", &[]),
    ("structured_outputs", &[]),
    ("suffix", &["\"\""]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("truncation_side", &["\"left\""]),
    ("use_beam_search", &["false"]),
    ("verbosity", &[]),
    ("web_search_options", &[]),
];

/// Fields that are about the account or the request, not about the completion.
const IGNORED: &[&str] = &["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"];

fn accept_neutral(body: &mut Fields, n: u32) -> Result<(), LineError> {
    for key in IGNORED {
        body.take(key);
    }
    let best_of = body.take("best_of");
    if best_of.as_ref().is_some_and(|raw| raw.get() != n.to_string()) {
        return Err(unsupported("best_of", "a value other than `n`"));
    }
    for (key, accepted) in NEUTRAL {
        let Some(raw) = body.take(key) else { continue };
        let value: Option<serde_json::Value> = serde_json::from_str(raw.get()).ok();
        if !value.is_some_and(|value| accepted.contains(&value.to_string().as_str())) {
            return Err(unsupported(key, &shorten(raw.get())));
        }
    }
    Ok(())
}

fn unsupported(key: &str, value: &str) -> LineError {
    LineError::new("unsupported_field", format!("`{key}` is not supported ({value})"))
}
