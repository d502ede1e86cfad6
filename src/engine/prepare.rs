//! Input lines to tokens, ahead of the engine, on a thread of its own.
//!
//! **Invariant:** what cannot be generated is turned away here, as a line error with the numbers: the engine only
//! sees prompts that fit the context and the KV cache.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use super::score;
use crate::error::{Error, Result};
use crate::job::request::{Conversation, ItemHeader, LineError, Prompt, Request};
use crate::job::{Event, Item, PartialSample, Reader};
use crate::kv::policy::{Kept, KvPolicy, positions};
use crate::model::Model;
use crate::model::chat::ChatInput;

/// Lines that wait between the reader and the engine.
const WINDOW: usize = 256;

/// Samples of one line, over all its prompts.
const MAX_SAMPLES: usize = 4096;

/// What the engine is given.
// Lines are what nearly all of it is.
#[allow(clippy::large_enum_variant)]
pub enum Arrival {
    /// A line.
    Line(Prepared),
    /// The word not to wait for more lines.
    Flush,
}

/// A line that is ready to run, or to be answered with an error.
pub struct Prepared {
    /// Names the line in the output.
    pub header: ItemHeader,
    /// The work.
    pub work: Result<Work, Unfit>,
}

/// Why a line cannot run.
pub enum Unfit {
    /// It never will: the answer is this error.
    Line(LineError),
    /// It needs a cache of this many pages, and blocks of this many. What a budget holds must not decide an answer, so
    /// it waits for another run with more memory.
    Pages { cache: usize, block: usize },
}

/// The prompts of a request as tokens.
pub struct Work {
    /// The request.
    pub request: Arc<Request>,
    /// One per prompt.
    pub prompts: Vec<PreparedPrompt>,
    /// Samples that an earlier process began.
    pub partial: Vec<PartialSample>,
}

/// A prompt as tokens.
pub struct PreparedPrompt {
    /// At least one.
    pub tokens: Vec<u32>,
    /// Its text, where the answer repeats it.
    pub text: Option<String>,
    /// Tokens to generate at most, within the context.
    pub max_tokens: usize,
    /// What of its sequences is kept.
    pub kept: Kept,
    /// Which tokens are scored, if any are.
    pub scored: Option<Scored>,
    /// Tokens that it lost at its beginning.
    pub cut_tokens: usize,
}

/// Tokens of a prompt that are scored: those from a position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// The first that is predicted, above 0.
    pub from: usize,
    /// A token after the prompt, which is predicted but never computed.
    pub after: Option<u32>,
}

/// What a prompt must fit into.
#[derive(Clone, Debug)]
pub struct Room {
    /// Tokens of prompt and completion.
    pub context_len: usize,
    /// Likewise, of a sequence whose positions are not counted within a cache.
    pub trained_len: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Pages of the KV cache that a sequence can have.
    pub pages: usize,
    /// Pages that can be brought in for a layer.
    pub block_pages: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// What of a sequence is kept in it.
    pub kv_policy: Arc<dyn KvPolicy>,
}

/// Starts reading and tokenizing; the receiver gets lines in input order, then the reader's error if it has one.
pub fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut reader: Reader,
    model: &'scope Model,
    room: Room,
) -> Receiver<Result<Arrival>> {
    let (sender, receiver): (SyncSender<Result<Arrival>>, _) = sync_channel(WINDOW);
    scope.spawn(move || {
        loop {
            let message = match reader.next_event() {
                Ok(Some(Event::Item(item))) => Ok(Arrival::Line(prepare(item, model, &room))),
                Ok(Some(Event::Flush)) => Ok(Arrival::Flush),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            let failed = message.is_err();
            // The engine hangs up when it stops early; there is nobody left to tell.
            if sender.send(message).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

fn prepare(item: Item, model: &Model, room: &Room) -> Prepared {
    let header = item.header();
    let work = item.request.map_err(Unfit::Line).and_then(|request| {
        let samples = request.prompts.len() * request.sampling.n as usize;
        if samples > MAX_SAMPLES {
            let what =
                format!("{} prompts with n = {} are {samples} samples", request.prompts.len(), request.sampling.n);
            return Err(Unfit::Line(LineError::new("too_many_samples", format!("{what}, at most {MAX_SAMPLES}"))));
        }
        let mut prompts = Vec::with_capacity(request.prompts.len());
        for prompt in &request.prompts {
            let prepared = match prompt {
                Prompt::Scoring(scoring) => score::prepare(scoring, model, room.context_len),
                prompt => tokenize(prompt, &request, model).map(|prompt| vec![prompt]),
            };
            let rendered = matches!(prompt, Prompt::Messages(_));
            for prompt in prepared.map_err(Unfit::Line)? {
                // Of a conversation of which nothing is computed the text is wanted, however long it is.
                let text_alone = rendered && prompt.max_tokens == 0 && prompt.scored.is_none();
                prompts.push(if text_alone { prompt } else { fit(prompt, &request, room)? });
            }
        }
        Ok(Work { request: Arc::new(request), prompts, partial: item.partial })
    });
    Prepared { header, work }
}

fn tokenize(prompt: &Prompt, request: &Request, model: &Model) -> Result<PreparedPrompt, LineError> {
    let failed = |error: Error| LineError::new("tokenizer_error", error.to_string());
    let (mut tokens, text) = match prompt {
        Prompt::Scoring(_) => unreachable!("what is scored is prepared elsewhere"),
        Prompt::Tokens(tokens) => {
            let text = request.sampling.echo.then(|| model.tokenizer.decode(tokens, false)).transpose();
            (tokens.clone(), text.map_err(failed)?)
        }
        Prompt::Text { text, add_special_tokens } => {
            let tokens = model.tokenizer.encode(text, *add_special_tokens).map_err(failed)?;
            (tokens, Some(text.clone()))
        }
        Prompt::Messages(conversation) => {
            let text = render(conversation, model)?;
            (model.tokenizer.encode(&text, conversation.add_special_tokens).map_err(failed)?, Some(text))
        }
    };
    let sampling = &request.sampling;
    let text = text.filter(|_| sampling.echo);
    let cut_tokens = sampling.truncate_prompt_tokens.map_or(0, |most| tokens.len().saturating_sub(most as usize));
    tokens.drain(..cut_tokens);
    // The first token of a prompt is predicted by nothing.
    let scored = sampling.prompt_logprobs.map(|_| Scored { from: 1, after: None });
    Ok(PreparedPrompt { tokens, text, max_tokens: sampling.max_tokens as usize, kept: Kept::All, scored, cut_tokens })
}

fn render(conversation: &Conversation, model: &Model) -> Result<String, LineError> {
    let failed = |what: String| LineError::new("chat_template_error", what);
    let no_template = || failed("the model has no chat template; use `prompt`".into());
    let input = ChatInput {
        messages: &conversation.messages,
        tools: conversation.tools.as_ref(),
        documents: conversation.documents.as_ref(),
        add_generation_prompt: conversation.add_generation_prompt,
        continue_final_message: conversation.continue_final_message,
        chat_template: conversation.chat_template.as_deref(),
        kwargs: &conversation.chat_template_kwargs,
    };
    model.chat.as_ref().ok_or_else(no_template)?.render(&input).map_err(|error| failed(error.to_string()))
}

/// Clips `max_tokens` to the context and turns away what has no room.
fn fit(mut prompt: PreparedPrompt, request: &Request, room: &Room) -> Result<PreparedPrompt, Unfit> {
    let refused = |code: &str, what: String| Err(Unfit::Line(LineError::new(code, what)));
    let len = prompt.tokens.len();
    if len == 0 {
        return refused("empty_prompt", "the prompt has no tokens".into());
    }
    let context_len = context_of(room, len, prompt.max_tokens);
    // Nothing is stored of the last token that is scored.
    let beyond = usize::from(prompt.scored.is_some_and(|scored| scored.after.is_some()));
    if len >= context_len + beyond {
        let what =
            format!("the prompt has {len} tokens, the model's context has {context_len} for prompt and completion");
        return refused("context_length_exceeded", what);
    }
    if prompt.max_tokens == 0 && prompt.scored.is_none() {
        // Only its text is wanted: nothing is computed.
        return Ok(prompt);
    }
    // A tokenizer may know more tokens than the embedding table has rows.
    if let Some(id) = prompt.tokens.iter().find(|&&id| id as usize >= room.vocab_size) {
        let what = format!("the prompt has token {id}, the model's vocabulary has {} tokens", room.vocab_size);
        return refused("token_out_of_vocabulary", what);
    }
    prompt.max_tokens = prompt.max_tokens.min(context_len.saturating_sub(len));
    prompt.kept = room.kv_policy.kept(len, prompt.max_tokens);
    let pages = least_pages(&prompt, request.sampling.n as usize);
    let block = prompt.kept.widest_layer(positions(len, prompt.max_tokens), room.num_layers);
    if pages > room.pages || block > room.block_pages {
        return Err(Unfit::Pages { cache: pages, block });
    }
    Ok(prompt)
}

/// Tokens that a request may have in all. It outgrows the context that the model was trained with only if what is kept
/// of it does not.
fn context_of(room: &Room, len: usize, max_tokens: usize) -> usize {
    let all = room.context_len.max(len);
    match room.kv_policy.kept(len, max_tokens.min(all - len)) {
        Kept::Window { start, recent } if start + recent <= room.trained_len => room.context_len,
        _ => room.trained_len,
    }
}

/// Pages with which a prompt can run at all: its samples can take turns.
fn least_pages(prompt: &PreparedPrompt, samples: usize) -> usize {
    let pages = prompt.kept.most_held(positions(prompt.tokens.len(), prompt.max_tokens));
    // Whole pages of the prompt stay shared; the last one is copied by whoever goes on from it.
    pages + usize::from(samples > 1 && prompt.kept == Kept::All)
}
