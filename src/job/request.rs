//! Requests as the engine takes them and answers as it gives them.
//!
//! **Invariant:** a [`Request`] is fully resolved (line > flag > generation_config.json > default) and in range;
//! nothing after the parser looks at raw JSON again.

use std::sync::Arc;

/// One input line, parsed and validated.
#[derive(Clone, Debug)]
pub struct Request {
    /// Position among the job's non-blank lines (of this shard), from 0.
    pub index: u64,
    /// Physical line in the input file, from 1.
    pub line: u64,
    /// The user's name for the line, or `line-<physical line>`.
    pub custom_id: Arc<str>,
    /// Which shape the line came in and the answer goes out in.
    pub endpoint: Endpoint,
    /// What to complete; at least one, more than one only for `/v1/completions`.
    pub prompts: Vec<Prompt>,
    /// How to sample.
    pub sampling: Sampling,
    /// Copied to the answer of a plain line.
    pub metadata: Option<Box<serde_json::value::RawValue>>,
    /// The `model` named in an OpenAI body, echoed in the response.
    pub model: Option<String>,
    /// Write token ids into the answer.
    pub return_token_ids: bool,
    /// Write `prompt_logprobs` into the answer (asked for by name, not through `echo`).
    pub return_prompt_logprobs: bool,
}

impl Request {
    /// What the answer needs to know.
    pub fn header(&self) -> ItemHeader {
        ItemHeader {
            index: self.index,
            line: self.line,
            custom_id: self.custom_id.clone(),
            endpoint: self.endpoint,
            metadata: self.metadata.clone(),
            model: self.model.clone(),
            return_token_ids: self.return_token_ids,
            return_prompt_logprobs: self.return_prompt_logprobs,
        }
    }
}

/// The shape of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `{"prompt": ...}` or `{"messages": ...}` with sampling fields beside it.
    Plain,
    /// `{"context": ..., "continuation": ...}` or `{"text": ...}`: nothing is generated.
    Score,
    /// An OpenAI batch line for `/v1/completions`.
    Completions,
    /// An OpenAI batch line for `/v1/chat/completions`.
    Chat,
}

/// What to complete.
// Conversations are few in memory at a time: no need for a box.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text; the tokenizer adds its special tokens unless `add_special_tokens` is false.
    Text {
        /// The text.
        text: String,
        /// Whether the tokenizer's own special tokens (such as BOS) are added.
        add_special_tokens: bool,
    },
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template.
    Messages(Conversation),
    /// Tokens whose log-probabilities are wanted.
    Scoring(Scoring),
}

/// What to score, and how it becomes tokens: as lm-evaluation-harness does it.
#[derive(Clone, Debug, PartialEq)]
pub struct Scoring {
    /// What is scored.
    pub target: Scored,
    /// Whether the tokenizer's own special tokens are added; none for: unless the text brings them.
    pub add_special_tokens: Option<bool>,
    /// What stands before the first token where nothing else does; none for the model's BOS, else EOS.
    pub prefix_token_id: Option<u32>,
    /// Tokens that predictions are made from at most; none for the model's context.
    pub max_length: Option<u32>,
}

/// Which tokens are scored.
#[derive(Clone, Debug, PartialEq)]
pub enum Scored {
    /// What follows a context; if both are too long, the context loses its beginning.
    Continuation {
        /// What is given; may be empty.
        context: Given,
        /// What is scored.
        continuation: Given,
    },
    /// A whole text, in windows if it is longer than the context.
    Rolling(Given),
}

/// A text or tokens, as a line gives them.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(untagged)]
pub enum Given {
    /// Text.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
}

/// A conversation and what the chat template is given beside it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The messages, as given.
    pub messages: Vec<serde_json::Value>,
    /// Tool definitions, as given.
    pub tools: Option<serde_json::Value>,
    /// Documents, as given.
    pub documents: Option<serde_json::Value>,
    /// End the prompt with the header of an assistant message.
    pub add_generation_prompt: bool,
    /// Leave the last message open so that generation continues it.
    pub continue_final_message: bool,
    /// Whether the tokenizer's own special tokens are added to the rendered text.
    pub add_special_tokens: bool,
    /// The name of one of the model's templates.
    pub chat_template: Option<String>,
    /// More template variables.
    pub chat_template_kwargs: serde_json::Map<String, serde_json::Value>,
}

/// How to sample, in the order of vLLM's sampler (formats, section 1.5).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Below 1e-5 greedy; values between 0 and 0.01 are raised to 0.01 by the parser.
    pub temperature: f32,
    /// Keep the most probable tokens up to this mass; 1 is off.
    pub top_p: f32,
    /// Keep this many tokens; 0 is off.
    pub top_k: u32,
    /// Keep tokens at least this probable relative to the best; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once for tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, only these tokens may be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Samples per prompt, at least 1.
    pub n: u32,
    /// Keys the randomness, together with the custom id.
    pub seed: i64,
    /// Tokens to generate at most; 0 only with `echo` or `prompt_logprobs`.
    pub max_tokens: u32,
    /// No end of sequence before this many tokens.
    pub min_tokens: u32,
    /// Texts that end a sample.
    pub stop: Vec<String>,
    /// Tokens that end a sample beside the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Leave the stop text in the answer.
    pub include_stop_str_in_output: bool,
    /// Go on after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Log-probabilities of sampled tokens, with this many alternatives.
    pub logprobs: Option<u32>,
    /// Log-probabilities of prompt tokens, with this many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// Put the prompt before the completion in the answer's text.
    pub echo: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Prompts lose their beginning beyond this many tokens.
    pub truncate_prompt_tokens: Option<u32>,
}

/// What an answer needs to know of its line.
#[derive(Clone, Debug)]
pub struct ItemHeader {
    /// Position among the job's non-blank lines (of this shard), from 0.
    pub index: u64,
    /// Physical line in the input file, from 1.
    pub line: u64,
    /// The line's name.
    pub custom_id: Arc<str>,
    /// The shape of the answer.
    pub endpoint: Endpoint,
    /// See [`Request::metadata`].
    pub metadata: Option<Box<serde_json::value::RawValue>>,
    /// See [`Request::model`].
    pub model: Option<String>,
    /// See [`Request::return_token_ids`].
    pub return_token_ids: bool,
    /// See [`Request::return_prompt_logprobs`].
    pub return_prompt_logprobs: bool,
}

/// A failed line: the code and message of its error record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// A stable code such as `invalid_json_line` or `duplicate_custom_id`.
    pub code: String,
    /// What is wrong, naming the key or value.
    pub message: String,
}

impl LineError {
    /// A line error from its parts.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        LineError { code: code.into(), message: message.into() }
    }
}

/// A token sampled so far, as the journal keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// Its log-probability before any penalty or temperature.
    pub logprob: f32,
    /// The most probable alternatives, best first; empty unless log-probabilities were asked for.
    pub top: Vec<(u32, f32)>,
}

/// The answer to a request: one entry per prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// In the order of [`Request::prompts`].
    pub prompts: Vec<PromptAnswer>,
}

/// What came of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptAnswer {
    /// The prompt as tokens.
    pub prompt_token_ids: Vec<u32>,
    /// The prompt's text, given when it is echoed.
    pub prompt_text: Option<String>,
    /// Tokens that the context of a scored continuation lost at its beginning.
    pub cut_tokens: usize,
    /// One per prompt token, the first without a value, or one per scored token; given when asked for.
    pub prompt_logprobs: Option<Vec<TokenLogprob>>,
    /// The samples, in order of their index.
    pub choices: Vec<Choice>,
}

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The completion, without the prompt.
    pub text: String,
    /// The completion as tokens.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop text or token that ended it; none for end of sequence.
    pub stop_reason: Option<StopReason>,
    /// One per token, when asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, a stop text or a stop token.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// What stopped a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of [`Sampling::stop`].
    Text(String),
    /// One of [`Sampling::stop_token_ids`].
    Token(u32),
}

/// A token with its log-probability and the alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenText,
    /// None for the first prompt token, which nothing predicts.
    pub logprob: Option<f32>,
    /// The most probable tokens, best first.
    pub top: Vec<(TokenText, f32)>,
}

/// A token and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    /// Its id.
    pub id: u32,
    /// Its text alone, with U+FFFD for incomplete UTF-8.
    pub text: String,
    /// Its bytes, where the tokenizer knows them.
    pub bytes: Vec<u8>,
}
