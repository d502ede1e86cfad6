//! Answers and errors as output lines.
//!
//! **Invariant:** a line is a pure function of the answer, its header and [`Names`]; no clock and no chance enters, so
//! `created` is always 0 and ids are hashes.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::lines::hex;
use super::options::Fingerprint;
use super::request::{
    Answer, Choice, Endpoint, FinishReason, ItemHeader, LineError, PromptAnswer, StopReason, TokenLogprob, TokenText,
};

/// What -infinity is written as: JSON has no such number.
const LOWEST_LOGPROB: f32 = -9999.0;

/// What every line of a job shares.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    seed: [u8; 32],
    model: String,
}

impl Names {
    /// Ids depend on the fingerprint as the caller gave it: without input and shard, so that shards agree.
    pub fn new(fingerprint: &Fingerprint, model: &str) -> Self {
        Names { seed: fingerprint.digest(), model: model.to_owned() }
    }

    /// An answer's id goes by its line's name, so that the order of lines changes nothing; an error's by its place
    /// too, as names may be given twice.
    fn id(&self, header: &ItemHeader, failed: bool) -> String {
        let mut hasher = Sha256::new();
        hasher.update(self.seed);
        if failed {
            hasher.update(header.line.to_le_bytes());
        }
        hasher.update(header.custom_id.as_bytes());
        hex(&hasher.finalize()[..12])
    }

    /// The output line, with its line end.
    pub fn line(&self, header: &ItemHeader, outcome: Result<&Answer, &LineError>) -> Vec<u8> {
        let id = self.id(header, outcome.is_err());
        let mut line = match (header.endpoint, outcome) {
            (Endpoint::Plain, Ok(answer)) => to_json(&plain(header, answer)),
            (Endpoint::Score, Ok(answer)) => to_json(&score(header, answer)),
            (Endpoint::Plain | Endpoint::Score, Err(error)) => {
                to_json(&PlainError { custom_id: &header.custom_id, error: numbered(header, error) })
            }
            (Endpoint::Completions, Ok(answer)) => self.batch(header, &id, Some(self.completion(header, &id, answer))),
            (Endpoint::Chat, Ok(answer)) => self.batch(header, &id, Some(self.chat(header, &id, answer))),
            (_, Err(error)) => to_json(&BatchLine::<()> {
                id: format!("batch_req_{id}"),
                custom_id: &header.custom_id,
                response: None,
                error: Some(numbered(header, error)),
            }),
        };
        line.push(b'\n');
        line
    }

    fn batch<B: Serialize>(&self, header: &ItemHeader, id: &str, body: Option<B>) -> Vec<u8> {
        to_json(&BatchLine {
            id: format!("batch_req_{id}"),
            custom_id: &header.custom_id,
            response: body.map(|body| Response { status_code: 200, request_id: format!("req_{id}"), body }),
            error: None,
        })
    }

    fn model<'a>(&'a self, header: &'a ItemHeader) -> &'a str {
        header.model.as_deref().unwrap_or(&self.model)
    }

    fn completion<'a>(&'a self, header: &'a ItemHeader, id: &str, answer: &'a Answer) -> Body<'a> {
        let samples =
            answer.prompts.iter().flat_map(|prompt| prompt.choices.iter().map(move |choice| (prompt, choice)));
        let choices = samples.enumerate().map(|(index, (prompt, choice))| AnyChoice {
            prompt_token_ids: header.return_token_ids.then_some(&prompt.prompt_token_ids),
            prompt_logprobs: prompt_logprobs(header, prompt),
            ..completion_choice(header, index, prompt, choice)
        });
        Body {
            id: format!("cmpl-{id}"),
            object: "text_completion",
            created: 0,
            model: self.model(header),
            choices: choices.collect(),
            usage: Usage::of(answer),
            system_fingerprint: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
        }
    }

    fn chat<'a>(&'a self, header: &'a ItemHeader, id: &str, answer: &'a Answer) -> Body<'a> {
        let prompt = answer.prompts.first();
        let choices = prompt.into_iter().flat_map(|prompt| &prompt.choices).enumerate();
        let choices = choices.map(|(index, choice)| AnyChoice {
            index,
            text: None,
            message: Some(Message { role: "assistant", content: &choice.text, refusal: None }),
            logprobs: choice.logprobs.as_ref().map(|tokens| Logprobs::Chat { content: chat_logprobs(tokens) }),
            finish_reason: reason(choice),
            stop_reason: Some(stop_reason(choice)),
            token_ids: header.return_token_ids.then_some(&choice.token_ids),
            prompt_token_ids: None,
            prompt_logprobs: None,
        });
        Body {
            id: format!("chatcmpl-{id}"),
            object: "chat.completion",
            created: 0,
            model: self.model(header),
            choices: choices.collect(),
            usage: Usage::of(answer),
            system_fingerprint: None,
            prompt_token_ids: prompt.filter(|_| header.return_token_ids).map(|prompt| &prompt.prompt_token_ids),
            prompt_logprobs: prompt.and_then(|prompt| prompt_logprobs(header, prompt)),
        }
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("output shapes have text keys and finite numbers")
}

#[derive(Serialize)]
struct PlainError<'a> {
    custom_id: &'a str,
    error: NumberedError<'a>,
}

#[derive(Serialize)]
struct NumberedError<'a> {
    code: &'a str,
    message: &'a str,
    line: u64,
}

fn numbered<'a>(header: &ItemHeader, error: &'a LineError) -> NumberedError<'a> {
    NumberedError { code: &error.code, message: &error.message, line: header.line }
}

#[derive(Serialize)]
struct BatchLine<'a, B> {
    id: String,
    custom_id: &'a str,
    response: Option<Response<B>>,
    error: Option<NumberedError<'a>>,
}

#[derive(Serialize)]
struct Response<B> {
    status_code: u16,
    request_id: String,
    body: B,
}

#[derive(Serialize)]
struct Body<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<AnyChoice<'a>>,
    usage: Usage,
    system_fingerprint: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<PositionLogprobs<'a>>>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    fn of(answer: &Answer) -> Usage {
        let prompt_tokens = answer.prompts.iter().map(|prompt| prompt.prompt_token_ids.len()).sum();
        let choices = answer.prompts.iter().flat_map(|prompt| &prompt.choices);
        let completion_tokens = choices.map(|choice| choice.token_ids.len()).sum();
        Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// A choice of any endpoint; exactly one of `text` and `message` is given.
#[derive(Serialize)]
struct AnyChoice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Stop<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<PositionLogprobs<'a>>>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Stop<'a> {
    Text(&'a str),
    Token(u32),
    None,
}

fn stop_reason(choice: &Choice) -> Stop<'_> {
    match &choice.stop_reason {
        Some(StopReason::Text(text)) => Stop::Text(text),
        Some(StopReason::Token(id)) => Stop::Token(*id),
        None => Stop::None,
    }
}

fn reason(choice: &Choice) -> &'static str {
    match choice.finish_reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn completion_choice<'a>(
    header: &ItemHeader,
    index: usize,
    prompt: &'a PromptAnswer,
    choice: &'a Choice,
) -> AnyChoice<'a> {
    AnyChoice {
        index,
        text: Some(echoed_text(prompt, choice)),
        message: None,
        logprobs: text_logprobs(header, prompt, choice).map(Logprobs::Text),
        finish_reason: reason(choice),
        stop_reason: Some(stop_reason(choice)),
        token_ids: header.return_token_ids.then_some(&choice.token_ids),
        prompt_token_ids: None,
        prompt_logprobs: None,
    }
}

fn echoed_text(prompt: &PromptAnswer, choice: &Choice) -> String {
    format!("{}{}", prompt.prompt_text.as_deref().unwrap_or_default(), choice.text)
}

#[derive(Serialize)]
struct Plain<'a> {
    custom_id: &'a str,
    text: String,
    finish_reason: &'static str,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<TextLogprobs<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<PositionLogprobs<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<Vec<PlainChoice<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct PlainChoice<'a> {
    index: usize,
    text: String,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<TextLogprobs<'a>>,
}

fn plain<'a>(header: &'a ItemHeader, answer: &'a Answer) -> Plain<'a> {
    let prompt = answer.prompts.first().expect("an answer has a prompt");
    let choice = |(index, choice): (usize, &'a Choice)| PlainChoice {
        index,
        text: echoed_text(prompt, choice),
        finish_reason: reason(choice),
        token_ids: header.return_token_ids.then_some(&choice.token_ids),
        logprobs: text_logprobs(header, prompt, choice),
    };
    let mut choices = prompt.choices.iter().enumerate().map(choice);
    let first = choices.next().expect("a prompt has a sample");
    let several = prompt.choices.len() > 1;
    Plain {
        custom_id: &header.custom_id,
        text: first.text,
        finish_reason: first.finish_reason,
        usage: Usage::of(answer),
        token_ids: first.token_ids,
        prompt_token_ids: header.return_token_ids.then_some(&prompt.prompt_token_ids),
        logprobs: first.logprobs,
        prompt_logprobs: prompt_logprobs(header, prompt),
        choices: several.then(|| prompt.choices.iter().enumerate().map(choice).collect()),
        metadata: header.metadata.as_deref(),
    }
}

/// The answer to a line that had tokens scored, over all of its windows.
#[derive(Serialize)]
struct Score<'a> {
    custom_id: &'a str,
    logprob: f64,
    is_greedy: bool,
    token_logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    /// Tokens that the context lost at its beginning.
    truncated_tokens: usize,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a RawValue>,
}

fn score<'a>(header: &'a ItemHeader, answer: &'a Answer) -> Score<'a> {
    let scores: Vec<&TokenLogprob> =
        answer.prompts.iter().flat_map(|window| window.prompt_logprobs.iter().flatten()).collect();
    let token_logprobs: Vec<f32> = scores.iter().map(|score| floor(score.logprob.unwrap_or(LOWEST_LOGPROB))).collect();
    Score {
        custom_id: &header.custom_id,
        logprob: token_logprobs.iter().map(|&logprob| f64::from(logprob)).sum(),
        is_greedy: scores.iter().all(|score| score.top.first().is_some_and(|(best, _)| best.id == score.token.id)),
        token_logprobs,
        token_ids: header.return_token_ids.then(|| scores.iter().map(|score| score.token.id).collect()),
        truncated_tokens: answer.prompts.iter().map(|window| window.cut_tokens).sum(),
        usage: Usage::of(answer),
        metadata: header.metadata.as_deref(),
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Logprobs<'a> {
    Text(TextLogprobs<'a>),
    Chat { content: Vec<ChatLogprob<'a>> },
}

/// The shape of `/v1/completions`. Offsets count characters from the start of the choice's text.
#[derive(Default, Serialize)]
struct TextLogprobs<'a> {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<&'a str>,
    top_logprobs: Vec<Option<TopLogprobs<'a>>>,
    /// With the token ids: what the texts cannot say of tokens that end within a character.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_bytes: Option<Vec<&'a [u8]>>,
}

/// Log-probabilities of a choice, the echoed prompt's before it.
fn text_logprobs<'a>(header: &ItemHeader, prompt: &'a PromptAnswer, choice: &'a Choice) -> Option<TextLogprobs<'a>> {
    let completion = choice.logprobs.as_ref()?;
    let echoed = prompt.prompt_logprobs.as_ref().filter(|_| prompt.prompt_text.is_some());
    let mut shape = TextLogprobs { token_bytes: header.return_token_ids.then(Vec::new), ..TextLogprobs::default() };
    let mut offset = 0;
    for token in echoed.into_iter().flatten().chain(completion) {
        shape.text_offset.push(offset);
        shape.token_logprobs.push(token.logprob.map(floor));
        shape.tokens.push(&token.token.text);
        shape.token_bytes.iter_mut().for_each(|bytes| bytes.push(&token.token.bytes));
        shape.top_logprobs.push(token.logprob.map(|logprob| TopLogprobs(token, logprob)));
        offset += token.token.text.chars().count();
    }
    Some(shape)
}

fn floor(logprob: f32) -> f32 {
    logprob.max(LOWEST_LOGPROB)
}

/// The sampled token first, then the alternatives; of two tokens with the same text the first stays.
struct TopLogprobs<'a>(&'a TokenLogprob, f32);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut seen: Vec<&str> = Vec::with_capacity(self.0.top.len() + 1);
        let alternatives = self.0.top.iter().filter(|(token, _)| token.id != self.0.token.id);
        let sampled = std::iter::once((self.0.token.text.as_str(), self.1));
        for (text, logprob) in sampled.chain(alternatives.map(|(token, logprob)| (token.text.as_str(), *logprob))) {
            if !seen.contains(&text) {
                seen.push(text);
                map.serialize_entry(text, &floor(logprob))?;
            }
        }
        map.end()
    }
}

#[derive(Serialize)]
struct ChatLogprob<'a> {
    token: &'a str,
    logprob: f32,
    bytes: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatLogprob<'a>>>,
}

fn chat_logprobs<'a>(tokens: &'a [TokenLogprob]) -> Vec<ChatLogprob<'a>> {
    fn entry(token: &TokenText, logprob: f32) -> ChatLogprob<'_> {
        ChatLogprob { token: &token.text, logprob: floor(logprob), bytes: &token.bytes, top_logprobs: None }
    }
    let full = |TokenLogprob { token, logprob, top }: &'a TokenLogprob| {
        let top_logprobs = Some(top.iter().map(|(token, logprob)| entry(token, *logprob)).collect());
        ChatLogprob { top_logprobs, ..entry(token, logprob.unwrap_or(LOWEST_LOGPROB)) }
    };
    tokens.iter().map(full).collect()
}

/// vLLM's `prompt_logprobs` of one position: token ids with value, rank where known, and text.
#[derive(Clone, Copy)]
struct PositionLogprobs<'a>(&'a TokenLogprob);

impl Serialize for PositionLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry<'a> {
            logprob: f32,
            rank: Option<usize>,
            decoded_token: &'a str,
        }
        let PositionLogprobs(TokenLogprob { token, logprob, top }) = self;
        let Some(logprob) = logprob else { return serializer.serialize_none() };
        let mut map = serializer.serialize_map(None)?;
        let rank = top.iter().position(|(other, _)| other.id == token.id).map(|at| at + 1);
        map.serialize_entry(&token.id, &Entry { logprob: floor(*logprob), rank, decoded_token: &token.text })?;
        for (at, (other, logprob)) in top.iter().enumerate().filter(|(_, (other, _))| other.id != token.id) {
            let entry = Entry { logprob: floor(*logprob), rank: Some(at + 1), decoded_token: &other.text };
            map.serialize_entry(&other.id, &entry)?;
        }
        map.end()
    }
}

fn prompt_logprobs<'a>(header: &ItemHeader, prompt: &'a PromptAnswer) -> Option<Vec<PositionLogprobs<'a>>> {
    let tokens = prompt.prompt_logprobs.as_ref().filter(|_| header.return_prompt_logprobs)?;
    Some(tokens.iter().map(PositionLogprobs).collect())
}
