//! Lines that have tokens scored: `{"context": ..., "continuation": ...}` and `{"text": ...}`.
//!
//! **Invariant:** token ids that come out exist, and what is scored was given.

use super::fields::{Fields, invalid};
use crate::job::options::Limits;
use crate::job::request::{Given, LineError, Prompt, Scored, Scoring};

type Parsed<T> = Result<T, LineError>;

/// Whether a line that is no batch line asks for scores.
pub(super) fn is_asked(fields: &Fields) -> bool {
    let has = |key: &str| fields.has(key);
    !has("prompt") && !has("messages") && (has("context") || has("continuation") || has("text"))
}

/// Takes what to score, and how.
pub(super) fn take(body: &mut Fields, limits: &Limits) -> Parsed<Vec<Prompt>> {
    let context = given(body, "context", limits)?;
    let continuation = given(body, "continuation", limits)?;
    let text = given(body, "text", limits)?;
    let missing = |key: &str| LineError::new("missing_field", format!("`{key}` is missing"));
    let target = match (context, continuation, text) {
        (None, None, Some(text)) => Scored::Rolling(text),
        (_, _, Some(_)) => {
            let message = "`text` is given beside `context` or `continuation`; give one or the other";
            return Err(LineError::new("invalid_value", message));
        }
        (None, _, None) => return Err(missing("context")),
        (_, None, None) => return Err(missing("continuation")),
        (Some(Given::Text(_)), Some(Given::Tokens(_)), _) | (Some(Given::Tokens(_)), Some(Given::Text(_)), _) => {
            let message = "`context` and `continuation` must both be strings or both be lists of token ids";
            return Err(LineError::new("invalid_value", message));
        }
        (Some(context), Some(continuation), None) => Scored::Continuation { context, continuation },
    };
    let scoring = Scoring {
        target,
        add_special_tokens: body.get::<bool>("add_special_tokens", "true or false")?,
        prefix_token_id: body.integer("prefix_token_id", 0..=i64::from(limits.vocab_size) - 1)?,
        max_length: body.integer("max_length", 1..=i64::from(limits.context))?,
    };
    Ok(vec![Prompt::Scoring(scoring)])
}

/// A text or a list of token ids that exist.
fn given(body: &mut Fields, key: &str, limits: &Limits) -> Parsed<Option<Given>> {
    let expected = format!("a string or a list of token ids below {}", limits.vocab_size);
    let Some(raw) = body.take(key) else { return Ok(None) };
    let given: Given = serde_json::from_str(raw.get()).map_err(|_| invalid(key, &expected, raw.get()))?;
    if let Given::Tokens(ids) = &given
        && let Some(id) = ids.iter().find(|&&id| id >= limits.vocab_size)
    {
        return Err(invalid(key, &expected, &id.to_string()));
    }
    Ok(Some(given))
}
