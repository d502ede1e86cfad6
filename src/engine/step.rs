//! One pass: which rows it carries, and what becomes of the tokens drawn.
//!
//! **Invariant:** a pass is composed as [`Wishes`] says; a token that was drawn is taken in exactly once.

use std::time::Instant;

use super::lengths::{Kind, Lengths, is_certain};
use super::sample::{Rules, Sample};
use super::sequence::{self, Job, Sequence, prompt_scores};
use super::{Engine, REPLACED, journal_sample};
use crate::device::Device;
use crate::device::sampling::{Draw, Drawn, Problem, Target};
use crate::error::{Error, Result};
use crate::job::Writer;
use crate::job::request::{FinishReason, LineError, SampledToken};
use crate::policy::Order;
use crate::schedule::Run;
use crate::schedule::compose::{Fill, Wishes};

/// Who asked for a draw.
#[derive(Clone, Copy, Debug)]
enum Asker {
    /// The score of a prompt token, at this position.
    Prompt { active: usize, position: usize },
    /// The next token of an active sequence's own sample.
    Own { active: usize },
    /// The first token of a sibling.
    Sibling { active: usize, sibling: usize },
}

/// What is asked of a pass.
#[derive(Default)]
struct Asked {
    draws: Vec<Draw>,
    askers: Vec<Asker>,
    /// Rows that are asked for logits, at most.
    rows: usize,
}

/// The engine while it fills a pass.
struct Filling<'a, 'm, D: Device> {
    engine: &'a mut Engine<'m, D>,
    asked: Asked,
}

impl<D: Device> Fill for Filling<'_, '_, D> {
    type Error = Error;

    fn open_block(&mut self) {
        self.engine.pass.open_block();
    }

    fn take_up(&mut self, sequence: usize, most: usize) -> Result<usize> {
        self.engine.take_up(sequence, most, &mut self.asked)
    }
}

impl<D: Device> Engine<'_, D> {
    /// Computes one pass and takes its tokens in.
    pub(super) fn step(&mut self, writer: &mut Writer) -> Result<()> {
        self.outlook = None;
        self.closed = self.batch.order == Order::Phased;
        self.make_room(writer)?;
        let (draws, askers) = self.compose()?;
        assert!(self.pass.rows() > 0, "no active sequence fits into a pass of its own");
        let started = Instant::now();
        let drawn = self.executor.as_mut().expect(REPLACED).run(&self.pass, &draws)?;
        self.counts.busy += started.elapsed();
        self.counts.passes += 1;
        self.counts.computed_tokens += self.pass.rows() as u64;
        self.take_in(askers, drawn)?;
        self.give_back();
        for sequence in &mut self.active {
            let Sequence { path, number, computed, pages, .. } = sequence;
            self.prefixes.publish(path, *number, *computed, pages, &mut self.pool);
        }
        self.leave_snapshots()?;
        self.start_finished_prompts();
        self.retire(writer)
    }

    /// Fills the pass, and lists what is asked of its rows.
    fn compose(&mut self) -> Result<(Vec<Draw>, Vec<Asker>)> {
        self.pass.clear();
        let (decoding, mut prompts): (Vec<usize>, Vec<usize>) =
            (0..self.active.len()).partition(|&index| self.active[index].decodes());
        // The oldest has been left room for; it may have been paused and come back late.
        prompts.sort_by_key(|&index| self.active[index].number);
        let wishes = Wishes {
            prompt_tokens: prompts.iter().map(|&index| self.active[index].uncomputed()).sum(),
            decoding,
            prompts,
            blocks: self.executor().placement().policy.blocks,
            chunk_tokens: self.batch.chunk_tokens,
            order: self.batch.order,
        };
        let mut filling = Filling { engine: self, asked: Asked::default() };
        wishes.compose(&mut filling)?;
        let Asked { draws, askers, .. } = filling.asked;
        Ok((draws, askers))
    }

    /// Puts up to `most` new positions of a sequence into the last block; gives how many.
    fn take_up(&mut self, index: usize, most: usize, asked: &mut Asked) -> Result<usize> {
        let sequence = &self.active[index];
        let from = sequence.computed;
        let to = sequence.tokens.len().min(from + most);
        // The prompt ends a chunk: siblings start from it, and length scaling changes there.
        let to = if from < sequence.prompt_len { to.min(sequence.prompt_len) } else { to };
        let to = self.snapshots.next_point(&sequence.trail).map_or(to, |point| to.min(point));
        let to = self.within_pages(index, sequence.kept.reach(&(from..to)));
        let outputs = self.executor().placement().output_rows - asked.rows;
        let to = sequence.scored.map_or(to, |scored| to.min(from.max(scored.from - 1) + outputs));
        if to == from || sequence.asks(from..to) > outputs {
            return Ok(0);
        }
        self.own_pages(index, from, to)?;
        let sequence = &mut self.active[index];
        let to = from
            + self.pass.room(
                self.executor.as_ref().expect(REPLACED).placement(),
                (&sequence.pages, sequence.kept),
                from..to,
            );
        if to == from {
            return Ok(0);
        }
        asked.rows += sequence.asks(from..to);
        let run = Run {
            tokens: &sequence.tokens,
            range: from..to,
            prompt_len: sequence.prompt_len,
            pages: &sequence.pages,
            kept: sequence.kept,
        };
        let first_row = self.pass.push(&run);
        sequence.computed = to;
        ask(index, &self.active[index], &self.jobs[&self.active[index].job], from..to, first_row, |draw, asker| {
            asked.draws.push(draw);
            asked.askers.push(asker);
        });
        Ok(to - from)
    }

    fn take_in(&mut self, askers: Vec<Asker>, drawn: Vec<Drawn>) -> Result<()> {
        assert_eq!(askers.len(), drawn.len());
        for (asker, drawn) in askers.into_iter().zip(drawn) {
            let token = SampledToken { id: drawn.token, logprob: drawn.logprob, top: drawn.top };
            let index = match asker {
                Asker::Prompt { active, .. } | Asker::Own { active } | Asker::Sibling { active, .. } => active,
            };
            let sequence = &mut self.active[index];
            let job = self.jobs.get_mut(&sequence.job).expect("an active sequence belongs to a job");
            if let Some(problem) = drawn.problem {
                job.error.get_or_insert_with(|| problem_error(problem));
                continue;
            }
            match asker {
                Asker::Prompt { position, .. } => job.prompts[sequence.prompt].scores[position] = Some(token),
                Asker::Own { .. } => {
                    let sample = sequence.sample.as_mut().expect("only sequences with a sample ask");
                    sequence.tokens.push(token.id);
                    sample.accept(token, &job.rules, self.model)?;
                    learn(&mut self.lengths, &job.rules, sequence.prompt_len, sample);
                    self.counts.generated_tokens += 1;
                }
                Asker::Sibling { sibling, .. } => {
                    let sample = &mut sequence.siblings[sibling];
                    sample.accept(token, &job.rules, self.model)?;
                    learn(&mut self.lengths, &job.rules, sequence.prompt_len, sample);
                    self.counts.generated_tokens += 1;
                }
            }
        }
        Ok(())
    }

    /// Starts the siblings of prompts that this pass completed.
    fn start_finished_prompts(&mut self) {
        for index in 0..self.active.len() {
            let sequence = &self.active[index];
            if sequence.computed >= sequence.prompt_len && !sequence.siblings.is_empty() {
                self.start_siblings(index);
            }
        }
    }

    /// Removes sequences that have nothing left to do, and answers the requests that they complete.
    fn retire(&mut self, writer: &mut Writer) -> Result<()> {
        let mut index = 0;
        while index < self.active.len() {
            if !self.is_done(&self.active[index]) {
                index += 1;
                continue;
            }
            let sequence = self.active.remove(index);
            let num_layers = self.model.config.num_layers;
            self.counts.evicted_tokens += sequence.kept.evicted_of_layers(sequence.computed, num_layers) as u64;
            self.release(&sequence);
            self.put_away(sequence, writer)?;
        }
        // A sibling can end with its first token, before it had a place.
        while let Some(position) = self.waiting.iter().position(|sequence| self.is_done(sequence)) {
            let sequence = self.waiting.remove(position).expect("position is within");
            self.release(&sequence);
            self.put_away(sequence, writer)?;
        }
        Ok(())
    }

    fn is_done(&self, sequence: &Sequence) -> bool {
        match &sequence.sample {
            Some(sample) => sample.finish.is_some() || self.jobs[&sequence.job].error.is_some(),
            None => sequence.computed >= sequence.prompt_len,
        }
    }

    fn put_away(&mut self, sequence: Sequence, writer: &mut Writer) -> Result<()> {
        let job = self.jobs.get_mut(&sequence.job).expect("an active sequence belongs to a job");
        let own = usize::from(sequence.sample.is_some()) + usize::from(sequence.scored.is_some());
        job.open -= own + sequence.siblings.len();
        let finished = job.open == 0;
        if let Some(mut sample) = sequence.sample {
            self.counts.ended += 1;
            if !finished {
                journal_sample(writer, sequence.job, sequence.prompt, &mut sample)?;
            }
            let place = sample.index as usize;
            job.prompts[sequence.prompt].samples[place] = Some(sample);
        }
        if finished {
            let job = self.jobs.remove(&sequence.job).expect("found above");
            self.finish(job, writer)?;
        }
        Ok(())
    }

    /// Writes a request's answer.
    pub(super) fn finish(&mut self, job: Job, writer: &mut Writer) -> Result<()> {
        if let Some(error) = &job.error {
            let error = error.clone();
            return self.fail(&job.header, &error, writer);
        }
        let header = job.header.clone();
        let answer = sequence::answer(job, self.model)?;
        self.counts.succeeded += 1;
        writer.finish(&header, Ok(&answer))
    }
}

/// Notes whether a sample ended with its last token, if what is drawn decides it.
fn learn(lengths: &mut Lengths, rules: &Rules, prompt_len: usize, sample: &Sample) {
    if !is_certain(rules.request()) {
        let ended = sample.finish.as_ref().is_some_and(|(reason, _)| *reason != FinishReason::Length);
        lengths.note(Kind::new(rules.request().endpoint, prompt_len), sample.tokens.len() - 1, ended);
    }
}

fn problem_error(problem: Problem) -> LineError {
    match problem {
        Problem::NotFinite => LineError::new("not_finite", "the model computed a logit that is not a finite number"),
        Problem::NoneAllowed => LineError::new("no_token_allowed", "the sampling rules exclude every token"),
    }
}

/// Lists what a sequence asks of the rows of positions `range`, the first of which is `first_row`.
fn ask(
    active: usize,
    sequence: &Sequence,
    job: &Job,
    range: std::ops::Range<usize>,
    first_row: usize,
    mut push: impl FnMut(Draw, Asker),
) {
    let row = |position: usize| first_row + position - range.start;
    if let Some(top) = prompt_scores(&job.rules).filter(|_| sequence.scored.is_some()) {
        // The row at a position predicts the token after it.
        for position in range.clone() {
            let Some(target) = sequence.target(position + 1) else { continue };
            let asker = Asker::Prompt { active, position: position + 1 };
            push(Draw { row: row(position), target: Target::Score(target), top }, asker);
        }
    }
    let top = job.rules.request().sampling.logprobs.unwrap_or(0) as usize;
    if range.end == sequence.prompt_len {
        for (sibling, sample) in sequence.siblings.iter().enumerate().filter(|(_, sample)| sample.tokens.is_empty()) {
            let target = Target::Sample(sample.rule(&job.rules));
            push(Draw { row: row(range.end - 1), target, top }, Asker::Sibling { active, sibling });
        }
    }
    if let (Some(sample), true) = (&sequence.sample, range.end == sequence.tokens.len()) {
        let target = Target::Sample(sample.rule(&job.rules));
        push(Draw { row: row(range.end - 1), target, top }, Asker::Own { active });
    }
}
