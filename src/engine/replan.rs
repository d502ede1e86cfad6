//! Another placement on the way, when lengths turn out otherwise than planned or the job nears its end.
//!
//! It is asked as answers end (after the first few, then whenever twice as many have), when no prompts are left and
//! half of those in flight have ended, and when a link has been slower than planned for a while. A change pauses
//! everybody, gives all memory back, and takes it anew; who was paused is computed again, so no bit changes.
//!
//! **Invariant:** memory of the old placement is given back before any of the new one is taken.

use super::Engine;
use super::admission::enter;
use super::lengths::{Kind, is_certain};
use super::prefix::Seen;
use super::sequence::{Begin, Sequence};
use crate::device::Device;
use crate::error::{Result, Tier};
use crate::executor::{Executor, LaneCount};
use crate::job::Writer;
use crate::kv::layout::pages_for;
use crate::kv::pages::PagePool;
use crate::planner::job::Request;
use crate::schedule::placement::Placement;
use crate::schedule::step::Lane;

/// Answers that have ended before anybody is asked.
const FIRST_LOOK: u64 = 32;
/// Passes between looks at the links.
const WATCHED: u64 = 16;

/// What is left of a job.
#[derive(Clone, Debug)]
pub struct Left {
    /// Sequences in flight, as prompts with the tokens that they have, and prompts that were looked at.
    pub requests: Vec<Request>,
    /// Lines that were read, answered or not.
    pub lines: u64,
    /// Whether there are no more.
    pub is_all: bool,
    /// Tokens that a change would compute again.
    pub again: usize,
    /// Pages of the longest sequence that there may be: a cache and its blocks must hold it.
    pub longest: usize,
}

/// Somebody who knows the machine.
pub trait Advisor<D: Device> {
    /// A placement for what is left that is worth the change.
    fn advise(&mut self, left: Left, placement: &Placement) -> Option<Placement>;

    /// Whether links have been so much slower than planned that another placement may do better.
    fn is_slow(&mut self, used: &Used) -> bool;

    /// An executor under it; everything of the one before has been given back.
    ///
    /// # Errors
    /// As [`Executor::new`], and what taking the memory gives.
    fn build(&mut self, placement: Placement) -> Result<Executor<D>>;
}

/// What executors have done and taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// What each lane has done.
    pub lanes: [LaneCount; Lane::ALL.len()],
    /// Bytes of the device's memory, of main memory beside it, and of files, at most.
    pub bytes: [u64; 3],
}

/// When to ask next.
#[derive(Debug)]
pub struct Looks {
    /// Answers that have ended by then.
    ended: u64,
    /// Once no prompts are left: sequences in flight.
    active: usize,
}

impl Default for Looks {
    fn default() -> Self {
        Looks { ended: FIRST_LOOK, active: usize::MAX }
    }
}

impl<D: Device> Engine<'_, D> {
    /// Asks whether to go on under another placement, if it is time, and changes to it.
    pub(super) fn reconsider(
        &mut self,
        is_all: bool,
        advisor: Option<&mut (dyn Advisor<D> + '_)>,
        writer: &mut Writer,
    ) -> Result<()> {
        let Some(advisor) = advisor else { return Ok(()) };
        let flying = self.active.len() + self.waiting.len();
        let ends = is_all && self.pending.is_empty();
        let slow = self.counts.passes.is_multiple_of(WATCHED) && advisor.is_slow(&self.used());
        let due = self.counts.ended >= self.looks.ended || ends && flying <= self.looks.active;
        if flying == 0 || !(due || slow) {
            return Ok(());
        }
        self.looks.ended = 2 * self.counts.ended.max(FIRST_LOOK);
        if ends {
            self.looks.active = flying / 2;
        }
        let left = self.left(is_all);
        let Some(placement) = advisor.advise(left, self.executor().placement()) else { return Ok(()) };
        self.pause_all(writer)?;
        self.before = self.used();
        self.executor = None;
        let policy = &placement.policy;
        (self.batch.sequences, self.batch.chunk_tokens) = (policy.sequences, policy.chunk_tokens);
        self.pool = PagePool::new(placement.pages, policy.paused_pages);
        self.counts.replanned += 1;
        self.outlook = None;
        self.executor = Some(advisor.build(placement)?);
        Ok(())
    }

    /// What all executors of this job have done and taken.
    pub fn used(&self) -> Used {
        let Used { mut lanes, bytes } = self.before;
        // There is none after one that could not be built.
        let Some(executor) = &self.executor else { return self.before };
        for (lane, now) in lanes.iter_mut().zip(executor.lane_counts()) {
            (lane.busy, lane.bytes) = (lane.busy + now.busy, lane.bytes + now.bytes);
        }
        let (device, host) = executor.used_bytes();
        let now = [device as u64, host as u64, executor.placement().bytes[Tier::Disk as usize]];
        let most = |tier: usize| bytes[tier].max(now[tier]);
        Used { lanes, bytes: [most(0), most(1), most(2)] }
    }

    fn left(&self, is_all: bool) -> Left {
        let flying = self.active.iter().chain(&self.waiting);
        let aside = self.pending.iter().filter_map(|begin| begin.paused.as_ref()?.aside.as_ref());
        let aside = aside.map(|aside| aside.computed);
        let again = flying.clone().map(|sequence| sequence.computed).chain(aside).sum();
        let (mut requests, mut seen) = (Vec::new(), Seen::default());
        for Sequence { job, prompt, sample, siblings, path, .. } in flying {
            let shared = seen.walk(path);
            self.requests_of((*job, *prompt), shared, sample.iter().chain(siblings), &mut requests);
        }
        for Begin { job, prompt, samples, path, .. } in &self.pending {
            let shared = seen.walk(path);
            self.requests_of((*job, *prompt), shared, samples.iter(), &mut requests);
        }
        // Lines to come were let in as what the cache holds now.
        let longest = match is_all {
            true => requests.iter().map(Request::pages).max().unwrap_or(0),
            false => {
                let most = self.model.config.sequence_len(self.kv_policy.outgrows_context());
                self.longest().min(pages_for(most))
            }
        };
        // Several samples copy their last page.
        Left { requests, lines: self.accepted, is_all, again, longest: longest + 1 }
    }

    /// Samples of a prompt as requests for what they lack; of a prompt that is scored alone, the prompt. The first
    /// shares `shared` of its tokens with another prompt, further samples the whole prompt with the first.
    fn requests_of<'a>(
        &'a self,
        (job, prompt): (u64, usize),
        shared: usize,
        samples: impl Iterator<Item = &'a super::sample::Sample>,
        requests: &mut Vec<Request>,
    ) {
        let job = &self.jobs[&job];
        let prompt = &job.prompts[prompt].prompt;
        let request = job.rules.request();
        let (len, kept) = (prompt.tokens.len(), prompt.kept);
        let before = requests.len();
        requests.extend(samples.map(|sample| {
            let known = sample.tokens.len();
            let max_tokens = prompt.max_tokens.saturating_sub(known).max(1);
            let gen_len = match is_certain(request) {
                true => max_tokens,
                false => {
                    let survival = self.lengths.survival(Kind::new(request.endpoint, len));
                    survival.expected(known, max_tokens).round().max(1.0) as usize
                }
            };
            Request { prompt_len: len + known, shared: 0, gen_len, max_tokens, kept }
        }));
        if requests.len() == before {
            requests.push(Request { prompt_len: len, shared: 0, gen_len: 1, max_tokens: 1, kept });
        }
        for (index, request) in requests[before..].iter_mut().enumerate() {
            let siblings = index > 0 && self.batch.share_prompts;
            *request = request.sharing(if siblings { len } else { shared });
        }
    }

    fn pause_all(&mut self, writer: &mut Writer) -> Result<()> {
        while let Some(sequence) = self.waiting.pop_back().or_else(|| self.active.pop()) {
            self.pause(sequence, false, writer)?;
        }
        // What the tree holds lies in the pages that go.
        (self.prefixes, self.snapshots) = Default::default();
        let shares = self.shares_beginnings();
        for Begin { job, prompt, scored, path, trail, paused, .. } in &mut self.pending {
            // So do what was put aside.
            paused.iter_mut().for_each(|paused| paused.aside = None);
            let state = &self.jobs[job].prompts[*prompt].prompt;
            (*path, *trail) = enter((&mut self.prefixes, &mut self.snapshots), shares, state, *scored);
        }
        Ok(())
    }
}
