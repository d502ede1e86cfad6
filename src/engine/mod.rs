//! Requests in, passes through the executor, answers out.
//!
//! **Invariant:** which sequences share a pass decides speed alone: a sample depends on its prompt, its rules and
//! its own tokens.

mod admission;
mod lengths;
mod outlook;
mod prefix;
mod prepare;
mod replan;
mod room;
mod sample;
mod score;
mod sequence;
mod snapshot;
mod step;
mod tree;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::error::{Bytes, Error, Result};
use crate::executor::Executor;
use crate::job::request::{LineError, SampledToken};
use crate::job::{Reader, Writer};
use crate::kv::pages::PagePool;
use crate::kv::policy::KvPolicy;
use crate::model::Model;
use crate::policy::Order;
use crate::schedule::Pass;
use lengths::Lengths;
use outlook::Outlook;
use prefix::Prefixes;
use prepare::{Arrival, Room};
use replan::Looks;
pub use replan::{Advisor, Left, Used};
use sequence::{Begin, Job, Sequence};
use snapshot::Snapshots;

/// Prompts, and tokens of prompts, that are looked at ahead for what they have in common.
pub const AHEAD_PROMPTS: usize = 1024;
const AHEAD_TOKENS: usize = 1 << 20;

/// Passes without a new line after which none is waited for any more.
const STARVED: u32 = 8;

/// Why there is always an executor.
const REPLACED: &str = "a job ends when its executor cannot be replaced";

/// How much is computed together: placement, so it changes no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Sequences in flight.
    pub sequences: usize,
    /// Prompt tokens in a pass.
    pub chunk_tokens: usize,
    /// Samples of a prompt share its computation and its pages, and so do prompts that begin alike.
    pub share_prompts: bool,
    /// Whether prompts and answers share passes.
    pub order: Order,
    /// Tokens that answers are expected to have until they have shown it; as many as they may where nobody says.
    pub expected_len: Option<usize>,
}

/// What the engine counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines answered with a completion, in this process.
    pub succeeded: u64,
    /// Lines answered with an error, in this process.
    pub failed: u64,
    /// Tokens of prompts whose computation began, each sample's prompt counted once.
    pub prompt_tokens: u64,
    /// Prompt tokens that were taken from other samples and prompts.
    pub shared_tokens: u64,
    /// Rows computed.
    pub computed_tokens: u64,
    /// Tokens sampled.
    pub generated_tokens: u64,
    /// Positions that were evicted from the cache, of sequences that have ended.
    pub evicted_tokens: u64,
    /// Trips over the layers.
    pub passes: u64,
    /// Answers that have ended.
    pub ended: u64,
    /// Sequences that gave their pages to others.
    pub paused: u64,
    /// Positions of them that came back from files; others are computed again.
    pub kept_tokens: u64,
    /// Changes to another placement.
    pub replanned: u64,
    /// Sequences in flight now.
    pub in_flight: u64,
    /// Time spent within passes.
    pub busy: Duration,
}

/// Called after every pass.
pub type Observer<'a> = &'a mut dyn FnMut(&Counts);

/// Runs requests on a loaded model.
pub struct Engine<'m, D: Device> {
    model: &'m Model,
    /// There is one but while it is replaced.
    executor: Option<Executor<D>>,
    kv_policy: Arc<dyn KvPolicy>,
    pool: PagePool,
    batch: Batch,
    /// Being computed.
    active: Vec<Sequence>,
    /// Samples whose prompt is computed, in order of arrival; they go before new prompts.
    waiting: VecDeque<Sequence>,
    /// Prompts of accepted requests, not begun.
    pending: VecDeque<Begin>,
    /// Tokens that they have.
    pending_tokens: usize,
    /// Prompts that began before the first of them did.
    passed_over: usize,
    /// Beginnings that prompts have in common; of caches that evict, what these hold after them.
    prefixes: Prefixes,
    snapshots: Snapshots,
    /// Sequences that have begun.
    begun: u64,
    jobs: HashMap<u64, Job>,
    /// How long answers get.
    lengths: Lengths,
    /// What those in flight will need, while none of them has moved.
    outlook: Option<Outlook>,
    /// Pages that the next positions of every active sequence need, and all together.
    noted: Vec<usize>,
    noted_pages: usize,
    /// No prompt begins before everybody has ended.
    closed: bool,
    /// Lines that were read.
    accepted: u64,
    /// What earlier executors have done and taken.
    before: Used,
    /// When to ask for another placement.
    looks: Looks,
    /// Places among the active that are promised to siblings.
    promised_places: usize,
    pass: Pass,
    counts: Counts,
    /// Lines that need a larger cache than there is.
    postponed: u64,
    /// Pages that the most demanding of them need of the cache, and of a block.
    pages_wanted: [usize; 2],
    journalled: Instant,
    /// Whether lines that have no room are answered rather than left to another run.
    serves: bool,
    /// Times in a row that no line was there.
    starved: u32,
    /// How long an idle engine waits for its first batch to fill.
    batch_wait: Duration,
    /// Until when it waits now.
    hold_until: Option<Instant>,
}

impl<'m, D: Device> Engine<'m, D> {
    /// An engine over a loaded model.
    pub fn new(model: &'m Model, executor: Executor<D>, kv_policy: Arc<dyn KvPolicy>, batch: Batch) -> Self {
        let placement = executor.placement();
        let pool = PagePool::new(placement.pages, placement.policy.paused_pages);
        Engine {
            model,
            executor: Some(executor),
            kv_policy,
            pool,
            batch,
            active: Vec::new(),
            waiting: VecDeque::new(),
            pending: VecDeque::new(),
            pending_tokens: 0,
            passed_over: 0,
            prefixes: Prefixes::default(),
            snapshots: Snapshots::default(),
            begun: 0,
            jobs: HashMap::new(),
            lengths: Lengths::new(batch.expected_len),
            outlook: None,
            noted: Vec::new(),
            noted_pages: 0,
            closed: false,
            accepted: 0,
            before: Used::default(),
            looks: Looks::default(),
            promised_places: 0,
            pass: Pass::default(),
            counts: Counts::default(),
            postponed: 0,
            pages_wanted: [0; 2],
            journalled: Instant::now(),
            serves: false,
            starved: 0,
            batch_wait: Duration::ZERO,
            hold_until: None,
        }
    }

    /// Serves somebody who waits for every answer, also to lines that have no room. An idle engine waits this long
    /// after a first line for others to be computed with it.
    pub fn serve(&mut self, batch_wait: Duration) {
        (self.serves, self.batch_wait) = (true, batch_wait);
    }

    /// The executor.
    pub fn executor(&self) -> &Executor<D> {
        self.executor.as_ref().expect(REPLACED)
    }

    /// The executor, to take from it what it noted.
    pub fn executor_mut(&mut self) -> &mut Executor<D> {
        self.executor.as_mut().expect(REPLACED)
    }

    /// Runs everything that `reader` gives, until it ends or `signal` becomes non-zero.
    ///
    /// # Errors
    /// [`Error::Stopped`] on a signal, with everything so far in the journal; errors of reading and writing.
    pub fn run(
        &mut self,
        reader: Reader,
        writer: &mut Writer,
        signal: &AtomicUsize,
        advisor: Option<&mut dyn Advisor<D>>,
        observe: Observer<'_>,
    ) -> Result<Counts> {
        let config = &self.model.config;
        let (pages, block_pages) = (self.longest(), self.block_pages());
        let context_len = config.sequence_len(self.kv_policy.outgrows_context());
        let kv_policy = self.kv_policy.clone();
        let room = Room {
            context_len,
            trained_len: config.sequence_len(false),
            vocab_size: config.vocab_size,
            pages,
            block_pages,
            num_layers: config.num_layers,
            kv_policy,
        };
        std::thread::scope(|scope| {
            let lines = prepare::spawn(scope, reader, self.model, room);
            let result = self.work(&lines, writer, signal, advisor, observe);
            // Whatever ended the run, what was sampled goes into the journal, unless that is what failed.
            let saved = if writer.is_broken() { Ok(()) } else { self.journal(writer) };
            result.and(saved).map(|()| self.counts)
        })
    }

    fn work(
        &mut self,
        lines: &Receiver<Result<Arrival>>,
        writer: &mut Writer,
        signal: &AtomicUsize,
        mut advisor: Option<&mut dyn Advisor<D>>,
        observe: Observer<'_>,
    ) -> Result<()> {
        let mut more = true;
        loop {
            check(signal)?;
            self.admit()?;
            while more && self.wants_lines() {
                // Lines that fail cost no pass: any number of them may come in a row.
                check(signal)?;
                writer.tick(Instant::now())?;
                let idle = self.active.is_empty();
                match self.next_line(lines) {
                    Next::Arrival(arrival) => match arrival? {
                        Arrival::Line(prepared) => self.accept(prepared, writer)?,
                        Arrival::Flush => {
                            self.hold_until = None;
                            break;
                        }
                    },
                    Next::Held => continue,
                    Next::NotYet => break,
                    Next::End => more = false,
                }
                self.admit()?;
                if idle && !self.active.is_empty() {
                    self.hold_until = Some(Instant::now() + self.batch_wait);
                }
            }
            if self.active.is_empty() {
                if !more && self.pending.is_empty() {
                    return self.check_postponed();
                }
                writer.tick(Instant::now())?;
                continue;
            }
            self.step(writer)?;
            self.reconsider(!more, advisor.as_deref_mut(), writer)?;
            self.counts.in_flight = self.active.len() as u64;
            observe(&self.counts);
            self.save(writer)?;
        }
    }

    /// Pages of the longest sequence that can run: those of a block, where some of them have to be brought in.
    fn longest(&self) -> usize {
        self.pool.len().min(self.block_pages())
    }

    /// Pages that a block can have brought in for a layer; no limit where all are there.
    fn block_pages(&self) -> usize {
        self.executor().placement().most_block_pages()
    }

    /// Everything that fits is done; what does not is told with the memory that would do.
    fn check_postponed(&self) -> Result<()> {
        if self.postponed == 0 {
            return Ok(());
        }
        let placement = self.executor().placement();
        let page_bytes = placement.num_layers as u64 * placement.frame;
        let ([cache, block], longest) = (self.pages_wanted, self.longest());
        // What a block holds counts where pages are brought in, or would be if there were more.
        let all_are_there = placement.policy.kv.share(placement.compute) == 1.0;
        let block = if all_are_there { 0 } else { block.max(cache) };
        let (need, have) = (cache.max(block) as u64 * page_bytes, longest as u64 * page_bytes);
        let policy = match block {
            0 => format!("`pages` are {cache} or more"),
            _ => format!("`pages` and `block-pages` are {cache} and {block} or more"),
        };
        Err(Error::OverBudget {
            what: format!("the KV cache for the longest of {} postponed lines", self.postponed),
            tier: placement.compute,
            need: Bytes(need),
            have: Bytes(have),
            hint: Some(format!(
                "all other lines are done; run the same command with {}MiB more of --{}-memory or fewer sequences, or \
                 with a policy whose {policy}",
                (need - have).div_ceil(1 << 20),
                placement.compute,
            )),
        })
    }

    /// Whether prompts share their beginnings; not where keys are rotated by the length of the whole prompt.
    fn shares_beginnings(&self) -> bool {
        self.batch.share_prompts && !self.model.config.positions.depend_on_length()
    }

    /// Whether a batch that will be closed has room for more.
    fn fills(&self) -> bool {
        self.batch.order == Order::Phased && !self.closed && self.pending.is_empty() && self.places() > 0
    }

    /// Whether new prompts could be admitted if there were any, or are to be looked at ahead.
    fn wants_lines(&self) -> bool {
        let ahead = self.pending.len() < AHEAD_PROMPTS && self.pending_tokens < AHEAD_TOKENS;
        match self.shares_beginnings() {
            true => ahead,
            false => self.pending.is_empty() && self.waiting.is_empty() && self.places() > 0,
        }
    }

    /// The next line. While sequences run, it waits just long enough for a tokenizer that is keeping up.
    fn next_line(&mut self, lines: &Receiver<Result<Arrival>>) -> Next {
        let left = self.hold_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        // Long waits are short too: a slow input must not keep a signal waiting.
        let patience = match self.active.is_empty() {
            true => Duration::from_millis(100),
            // A batch that nobody joins later is worth one.
            false if self.fills() => Duration::from_millis(100),
            // Looking ahead is worth no wait, nor is an input that has had nothing for a while.
            false if !self.pending.is_empty() || self.places() == 0 || self.starved > STARVED => {
                left.min(Duration::from_millis(100))
            }
            false => left.clamp(Duration::from_millis(2), Duration::from_millis(100)),
        };
        let received = lines.recv_timeout(patience);
        self.starved = if received.is_ok() { 0 } else { self.starved.saturating_add(1) };
        match received {
            Ok(arrival) => Next::Arrival(arrival),
            Err(RecvTimeoutError::Timeout) if left > patience => Next::Held,
            Err(RecvTimeoutError::Timeout) => Next::NotYet,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// Writes what is due, and journals tokens of unfinished samples about once a second.
    fn save(&mut self, writer: &mut Writer) -> Result<()> {
        let now = Instant::now();
        if now.duration_since(self.journalled).as_millis() >= 500 {
            self.journalled = now;
            self.journal(writer)?;
        }
        writer.tick(now)
    }

    /// Journals the tokens of every unfinished sample.
    fn journal(&mut self, writer: &mut Writer) -> Result<()> {
        let sequences = self.active.iter_mut().chain(&mut self.waiting);
        for sequence in sequences {
            let (job, prompt) = (sequence.job, sequence.prompt);
            for sample in sequence.sample.iter_mut().chain(&mut sequence.siblings) {
                journal_sample(writer, job, prompt, sample)?;
            }
        }
        Ok(())
    }

    /// Answers a request with an error.
    fn fail(&mut self, header: &crate::job::request::ItemHeader, error: &LineError, writer: &mut Writer) -> Result<()> {
        self.counts.failed += 1;
        writer.finish(header, Err(error))
    }
}

// It is looked at at once.
#[allow(clippy::large_enum_variant)]
enum Next {
    Arrival(Result<Arrival>),
    /// Nothing came, but it is worth waiting on.
    Held,
    NotYet,
    End,
}

/// Journals a sample's tokens that the journal does not have.
fn journal_sample(writer: &mut Writer, job: u64, prompt: usize, sample: &mut sample::Sample) -> Result<()> {
    let new: &[SampledToken] = &sample.tokens[sample.journalled..];
    if !new.is_empty() {
        writer.tokens(job, prompt as u32, sample.index, sample.journalled as u32, new)?;
        sample.journalled = sample.tokens.len();
    }
    Ok(())
}

fn check(signal: &AtomicUsize) -> Result<()> {
    match signal.load(Ordering::Relaxed) {
        0 => Ok(()),
        number => Err(Error::Stopped { signal: signal_name(number) }),
    }
}

fn signal_name(number: usize) -> &'static str {
    match number {
        2 => "SIGINT",
        15 => "SIGTERM",
        _ => "a signal",
    }
}
