//! What a line asks to complete.
//!
//! **Invariant:** every prompt that comes out is non-empty as given, and its token ids exist.

use serde_json::Value;

use super::fields::{Fields, invalid, shorten};
use super::score;
use crate::job::options::Limits;
use crate::job::request::{Conversation, Endpoint, LineError, Prompt};

type Parsed<T> = Result<T, LineError>;

const MAX_PROMPTS: usize = 2048;

/// Takes `prompt` or `messages` with everything that says how to turn them into tokens.
pub(super) fn take(body: &mut Fields, endpoint: Endpoint, limits: &Limits) -> Parsed<Vec<Prompt>> {
    if endpoint == Endpoint::Score {
        return score::take(body, limits);
    }
    let add_special_tokens = body.get::<bool>("add_special_tokens", "true or false")?;
    match (endpoint, body.has("prompt"), body.has("messages")) {
        (Endpoint::Plain, true, true) => {
            Err(LineError::new("invalid_value", "`prompt` and `messages` are both given; give one"))
        }
        (Endpoint::Plain, false, false) => {
            Err(LineError::new("missing_field", "neither `prompt` nor `messages` is given"))
        }
        (Endpoint::Plain, false, true) | (Endpoint::Chat, ..) => {
            conversation(body, add_special_tokens.unwrap_or(false)).map(|chat| vec![Prompt::Messages(chat)])
        }
        (Endpoint::Plain | Endpoint::Completions | Endpoint::Score, ..) => {
            let prompts = prompts(body, add_special_tokens.unwrap_or(true), limits)?;
            match (endpoint, prompts.len()) {
                (Endpoint::Plain, 2..) => {
                    Err(LineError::new("invalid_value", "`prompt` must be one text or one list of token ids"))
                }
                _ => Ok(prompts),
            }
        }
    }
}

/// `prompt`: a text, several texts, token ids, or several lists of token ids.
fn prompts(body: &mut Fields, add_special_tokens: bool, limits: &Limits) -> Parsed<Vec<Prompt>> {
    const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of such lists";
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Shape {
        Text(String),
        Tokens(Vec<u32>),
        Texts(Vec<String>),
        TokenLists(Vec<Vec<u32>>),
    }
    let raw = body.take("prompt").ok_or_else(|| LineError::new("missing_field", "`prompt` is missing"))?;
    let shape = serde_json::from_str(raw.get()).map_err(|_| invalid("prompt", EXPECTED, raw.get()))?;
    let text = |text| Prompt::Text { text, add_special_tokens };
    let prompts = match shape {
        Shape::Text(one) => vec![text(one)],
        Shape::Tokens(ids) => vec![tokens(ids, limits)?],
        Shape::Texts(texts) => texts.into_iter().map(text).collect(),
        Shape::TokenLists(lists) => lists.into_iter().map(|ids| tokens(ids, limits)).collect::<Parsed<_>>()?,
    };
    match prompts.len() {
        0 => Err(invalid("prompt", "not empty", raw.get())),
        1..=MAX_PROMPTS => Ok(prompts),
        more => Err(invalid("prompt", &format!("at most {MAX_PROMPTS} prompts"), &more.to_string())),
    }
}

fn tokens(ids: Vec<u32>, limits: &Limits) -> Parsed<Prompt> {
    if ids.is_empty() {
        return Err(invalid("prompt", "not empty", "[]"));
    }
    if let Some(id) = ids.iter().find(|&&id| id >= limits.vocab_size) {
        return Err(invalid("prompt", &format!("token ids below {}", limits.vocab_size), &id.to_string()));
    }
    if ids.len() >= limits.context as usize {
        let (have, context) = (ids.len(), limits.context);
        let message = format!("the prompt has {have} tokens, the model's context is {context}");
        return Err(LineError::new("context_length_exceeded", message));
    }
    Ok(Prompt::Tokens(ids))
}

fn conversation(body: &mut Fields, add_special_tokens: bool) -> Parsed<Conversation> {
    let messages: Vec<Value> = body
        .get("messages", "a list of messages")?
        .ok_or_else(|| LineError::new("missing_field", "`messages` is missing"))?;
    if messages.is_empty() {
        return Err(invalid("messages", "not empty", "[]"));
    }
    messages.iter().enumerate().try_for_each(|(at, message)| check_message(at, message))?;
    let tools = body.get::<Value>("tools", "a list")?;
    let documents = body.get::<Value>("documents", "a list")?;
    for (key, value) in [("tools", &tools), ("documents", &documents)] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_array()) {
            return Err(invalid(key, "a list", &value.to_string()));
        }
    }
    let continue_final_message = body.flag("continue_final_message", false)?;
    // Continuing a message and opening a new one exclude each other; the default yields to the wish.
    let add_generation_prompt = body.flag("add_generation_prompt", !continue_final_message)?;
    if continue_final_message && add_generation_prompt {
        let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(LineError::new("invalid_value", message));
    }
    Ok(Conversation {
        messages,
        tools: tools.filter(|tools| tools.as_array().is_some_and(|tools| !tools.is_empty())),
        documents,
        continue_final_message,
        add_generation_prompt,
        add_special_tokens,
        chat_template: body.text("chat_template")?,
        chat_template_kwargs: body.get("chat_template_kwargs", "an object")?.unwrap_or_default(),
    })
}

/// A message is an object with a role, and its content is text.
fn check_message(at: usize, message: &Value) -> Parsed<()> {
    let key = format!("messages[{at}]");
    if !message.is_object() {
        return Err(invalid(&key, "an object", &message.to_string()));
    }
    if !message["role"].is_string() {
        return Err(invalid(&format!("{key}.role"), "a string", &message["role"].to_string()));
    }
    match &message["content"] {
        Value::Null | Value::String(_) => Ok(()),
        Value::Array(parts) => match parts.iter().find(|part| part["type"] != "text" || !part["text"].is_string()) {
            None => Ok(()),
            Some(part) => Err(LineError::new(
                "unsupported_field",
                format!("`{key}.content` may hold parts of type \"text\" only, got {}", shorten(&part.to_string())),
            )),
        },
        other => Err(invalid(&format!("{key}.content"), "a string or a list of text parts", &other.to_string())),
    }
}
