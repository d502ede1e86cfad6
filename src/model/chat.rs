//! Chat templates: conversations to text, as transformers renders them (formats, section 4.4).
//!
//! **Invariant:** a template runs in a sandbox without files, with bounded steps, depth and output. Memory is bounded
//! only by the steps, so templates come from the model's files alone, never from a line.

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value as Jinja, context};
use serde_json::{Map, Value};

use super::files::Files;
use super::python;
use crate::error::{Error, Result};

/// The chat templates of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    /// By name; the one used without tools is `default`.
    templates: BTreeMap<String, Environment<'static>>,
    sources: BTreeMap<String, String>,
    special_texts: BTreeMap<String, String>,
}

/// What a template is given.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// The messages.
    pub messages: &'a [Value],
    /// Tool definitions.
    pub tools: Option<&'a Value>,
    /// Documents.
    pub documents: Option<&'a Value>,
    /// End with the header of an assistant message.
    pub add_generation_prompt: bool,
    /// Leave the last message open.
    pub continue_final_message: bool,
    /// The name of one of the model's templates. A template itself is refused, as vLLM does by default: nothing can
    /// bound the memory that one takes.
    pub chat_template: Option<&'a str>,
    /// More template variables.
    pub kwargs: &'a Map<String, Value>,
}

/// Why a conversation cannot be rendered: a failed line, not a failed job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chat template: {what}")]
pub struct ChatError {
    /// What the template or its engine said.
    pub what: String,
}

const MAX_TEMPLATE_BYTES: usize = 4 << 20;
const MAX_OUTPUT_BYTES: usize = 64 << 20;
const MAX_STEPS: u64 = 10_000_000;
const MAX_DEPTH: usize = 200;
const NAME: &str = "chat";
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl ChatTemplate {
    /// Finds the model's templates: `chat_template.jinja` (and `additional_chat_templates/*.jinja`) win over
    /// tokenizer_config.json, that over `chat_template.json`.
    ///
    /// # Errors
    /// `Error::Model` when a template does not parse.
    pub fn load(files: &Files, special_texts: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let mut sources = BTreeMap::new();
        let mut path = files.path("chat_template.jinja");
        if let Some(text) = files.text("chat_template.jinja")? {
            sources.insert("default".to_owned(), text);
        }
        for file in files.list("additional_chat_templates") {
            if let (Some(name), Some(text)) =
                (file.strip_suffix(".jinja"), files.text(&format!("additional_chat_templates/{file}"))?)
            {
                sources.insert(name.to_owned(), text);
            }
        }
        for file in ["tokenizer_config.json", "chat_template.json"] {
            if sources.is_empty()
                && let Some(config) = files.json(file)?
            {
                path = files.path(file);
                sources = templates_in(&config);
            }
        }
        if sources.is_empty() {
            return Ok(None);
        }
        ChatTemplate::new(sources, special_texts.clone())
            .map(Some)
            .map_err(|error| Error::model(path, error.to_string()))
    }

    /// Compiles templates given by name.
    ///
    /// # Errors
    /// [`ChatError`] when one does not parse.
    pub fn new(
        sources: BTreeMap<String, String>,
        special_texts: BTreeMap<String, String>,
    ) -> std::result::Result<Self, ChatError> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now_secs = now.map_or(0, |duration| duration.as_secs() as i64);
        let templates = sources
            .iter()
            .map(|(name, source)| Ok((name.clone(), environment(source, now_secs)?)))
            .collect::<std::result::Result<_, ChatError>>()?;
        Ok(ChatTemplate { templates, sources, special_texts })
    }

    /// The same with another time (UTC) for `strftime_now`, so that a run can be repeated.
    ///
    /// # Errors
    /// None in practice: the templates have parsed before.
    pub fn at_time(self, now_secs: i64) -> std::result::Result<Self, ChatError> {
        let templates = self.sources.iter().map(|(name, source)| Ok((name.clone(), environment(source, now_secs)?)));
        let templates = templates.collect::<std::result::Result<_, ChatError>>()?;
        Ok(ChatTemplate { templates, ..self })
    }

    /// The template sources by name.
    pub fn sources(&self) -> &BTreeMap<String, String> {
        &self.sources
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`ChatError`] with what the template said (`raise_exception`), or which bound it ran into.
    pub fn render(&self, input: &ChatInput<'_>) -> std::result::Result<String, ChatError> {
        match input.chat_template {
            Some(name) if self.templates.contains_key(name) => {
                render(&self.templates[name], &self.sources[name], &self.special_texts, input)
            }
            Some(_) => Err(failed("`chat_template` is none of the model's templates; lines bring none of their own")),
            None => {
                let tool_use = input.tools.is_some() && self.templates.contains_key("tool_use");
                let name = if tool_use { "tool_use" } else { "default" };
                let Some(template) = self.templates.get(name) else {
                    let names = self.templates.keys().cloned().collect::<Vec<_>>().join(", ");
                    return Err(failed(format!("there is no default among the model's templates ({names})")));
                };
                render(template, &self.sources[name], &self.special_texts, input)
            }
        }
    }
}

/// `chat_template`: a text, or a list of `{name, template}`.
fn templates_in(config: &Value) -> BTreeMap<String, String> {
    match config.get("chat_template") {
        Some(Value::String(text)) => BTreeMap::from([("default".to_owned(), text.clone())]),
        Some(Value::Array(list)) => {
            let text = |item: &Value, key: &str| item.get(key)?.as_str().map(str::to_owned);
            list.iter().filter_map(|item| Some((text(item, "name")?, text(item, "template")?))).collect()
        }
        _ => BTreeMap::new(),
    }
}

fn failed(what: impl Into<String>) -> ChatError {
    ChatError { what: what.into() }
}

fn environment(source: &str, now_secs: i64) -> std::result::Result<Environment<'static>, ChatError> {
    if source.len() > MAX_TEMPLATE_BYTES {
        return Err(failed(format!("longer than {MAX_TEMPLATE_BYTES} bytes")));
    }
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| python::write_text(out, value));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Jinja| python::text(&value));
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| python::strftime(&format, now_secs));
    environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|error| describe(&error))?;
    Ok(environment)
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Jinja, kwargs: Kwargs) -> std::result::Result<Jinja, minijinja::Error> {
    let indent = match kwargs.get::<Option<Jinja>>("indent")? {
        Some(indent) if indent.is_none() || indent.is_undefined() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize),
        }),
        None => None,
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let style = python::JsonStyle {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        item_separator: match separators.as_deref() {
            Some([item, _]) => item.clone(),
            _ if indent.is_some() => ",".into(),
            _ => ", ".into(),
        },
        key_separator: match separators.as_deref() {
            Some([_, key]) => key.clone(),
            _ => ": ".into(),
        },
        indent,
    };
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Jinja::from_safe_string(style.dumps(&value)))
}

/// Replaces `{% generation %}` blocks, which only mark text for training, by blocks that do nothing but keep the
/// tags' effect on whitespace and scope.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let Some(end) = tag.find("%}") else { return result + tag };
        let inner = &tag[2..end];
        let (tag, after) = tag.split_at(end + 2);
        match inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => result.push_str(&tag.replacen("generation", "with", 1)),
            "endgeneration" => result.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            _ => {
                // A `%}` inside a text literal ends the search early, not the tag: go on right after `{%`.
                result.push_str("{%");
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = after;
    }
    result + rest
}

fn render(
    environment: &Environment<'static>,
    source: &str,
    special_texts: &BTreeMap<String, String>,
    input: &ChatInput<'_>,
) -> std::result::Result<String, ChatError> {
    let (messages, last) = prepare(input, source)?;
    let template = environment.get_template(NAME).map_err(|error| describe(&error))?;
    let mut variables: Map<String, Value> =
        special_texts.iter().map(|(key, text)| (key.clone(), text.as_str().into())).collect();
    variables.extend(input.kwargs.clone());
    for fixed in ["messages", "tools", "documents", "add_generation_prompt"] {
        variables.remove(fixed);
    }
    let context = context! {
        messages => messages,
        tools => input.tools,
        documents => input.documents,
        add_generation_prompt => input.add_generation_prompt,
        ..Jinja::from_serialize(&variables)
    };
    let mut output = Bounded(Vec::new());
    let outcome = template.render_captured_to(context, &mut output).map(drop);
    outcome.map_err(|error| {
        if output.0.len() >= MAX_OUTPUT_BYTES {
            return failed(format!("more than {MAX_OUTPUT_BYTES} bytes of output"));
        }
        describe(&error)
    })?;
    let text = String::from_utf8(output.0).map_err(|_| failed("output is not UTF-8"))?;
    match last {
        Some(last) => cut_at_tag(text, &last),
        None => Ok(text),
    }
}

/// Whether a template loops over the parts of a message's content; others expect a text (as vLLM tells them apart).
fn takes_parts(source: &str) -> bool {
    let pattern = r#"\bin\s+\w+(\[-?\d+\])?(\.content\b|\[['"]content['"]\])"#;
    let pattern = fancy_regex::Regex::new(pattern).expect("the pattern is valid");
    pattern.is_match(source).unwrap_or(true)
}

/// Joins a content of text parts alone into one text.
fn flatten(content: &mut Value) {
    let Value::Array(parts) = content else { return };
    let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
    if let Some(texts) = texts {
        *content = Value::String(texts.join("\n"));
    }
}

/// The messages as transformers hands them on, and the text to continue, if any.
fn prepare(input: &ChatInput<'_>, source: &str) -> std::result::Result<(Vec<Value>, Option<String>), ChatError> {
    if input.messages.is_empty() {
        return Err(failed("a conversation needs at least one message"));
    }
    let mut messages = Vec::with_capacity(input.messages.len());
    let takes_parts = takes_parts(source);
    for message in input.messages {
        let Value::Object(fields) = message else { return Err(failed("a message is not an object")) };
        let mut fields: Map<String, Value> = fields
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if let Some(reasoning) = REASONING_FIELDS.iter().find_map(|field| fields.get(*field).cloned()) {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning);
        }
        if let (false, Some(content)) = (takes_parts, fields.get_mut("content")) {
            flatten(content);
        }
        messages.push(Value::Object(fields));
    }
    if !input.continue_final_message {
        return Ok((messages, None));
    }
    if input.add_generation_prompt {
        return Err(failed("continue_final_message and add_generation_prompt exclude each other"));
    }
    if !source.contains("content") {
        return Err(failed("continue_final_message needs a template that uses `content`"));
    }
    let content = messages.last_mut().and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(blocks)) => blocks.iter_mut().rev().find_map(|block| match block.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let text = text.ok_or_else(|| failed("continue_final_message, but the last message has no text to continue"))?;
    let last = text.clone();
    text.push_str(CONTINUE_TAG);
    Ok((messages, Some(last)))
}

/// Ends the text where the last message ends.
fn cut_at_tag(text: String, last: &str) -> std::result::Result<String, ChatError> {
    let tag = CONTINUE_TAG.trim_end();
    match text.rfind(tag) {
        Some(at) if text.contains(last.trim()) => {
            let kept = &text[..at];
            // Without its space behind, the template has trimmed the message.
            Ok(if text[at..].starts_with(CONTINUE_TAG) { kept } else { kept.trim_end() }.to_owned())
        }
        _ => Err(failed("continue_final_message, but the template leaves out or changes the last message")),
    }
}

/// The error's own words, without the engine's frame where a template raised it.
fn describe(error: &minijinja::Error) -> ChatError {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("more than {MAX_STEPS} steps"),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    failed(what + &line)
}

/// Output up to a bound.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = MAX_OUTPUT_BYTES - self.0.len();
        self.0.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if bytes.len() > room { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
