//! Draws: what kernels are told of them, and their answers.
//!
//! **Invariant:** a draw is answered from its own row and lists alone, so it does not matter with which others it goes
//! to the card.

use bytemuck::{Pod, Zeroable};

use super::memory::DeviceBuffer;
use super::turn::{Turn, list_bytes};
use super::words;
use crate::device::sampling::{Draw, Drawn, Problem, SampleRule, Target};

/// A draw, as kernels read it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Task {
    uniform: f64,
    row: u32,
    target: u32,
    token: u32,
    top: u32,
    first_top: u32,
    has_allowed: u32,
    first_allowed: u32,
    num_allowed: u32,
    first_banned: u32,
    num_banned: u32,
    first_bias: u32,
    num_bias: u32,
    first_count: u32,
    num_counts: u32,
    top_k: u32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    temperature: f32,
    min_p: f32,
    top_p: f32,
    unused: u32,
}

/// An answer, as kernels write it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Answer {
    token: u32,
    logprob: f32,
    problem: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Task>() == 96 && size_of::<Answer>() == 16);

/// Draws that go to the card together.
#[derive(Default)]
struct Lists {
    tasks: Vec<Task>,
    tokens: Vec<u32>,
    /// Pairs of a token and a bias.
    biases: Vec<[u32; 2]>,
    /// Pairs of a token and how often it occurred in the output.
    counts: Vec<[u32; 2]>,
    num_tops: usize,
}

impl Lists {
    /// Bytes that it takes, answers included.
    fn bytes(&self) -> usize {
        list_bytes(&[
            size_of::<Task>() * self.tasks.len(),
            4 * self.tokens.len(),
            8 * self.biases.len(),
            8 * self.counts.len(),
            size_of::<Answer>() * self.tasks.len(),
            4 * self.num_tops,
            4 * self.num_tops,
        ])
    }

    /// Bytes that a draw takes of them, with gaps.
    fn bytes_of(draw: &Draw, top: usize) -> usize {
        let rule = match &draw.target {
            Target::Score(_) => 0,
            Target::Sample(rule) => {
                let tokens = rule.allowed.as_ref().map_or(0, |allowed| allowed.len()) + rule.banned.len();
                4 * tokens + 8 * (rule.bias.len() + rule.counts.len())
            }
        };
        size_of::<Task>() + size_of::<Answer>() + rule + 8 * top
    }

    fn add(&mut self, row: usize, draw: &Draw, top: usize) {
        let mut task = Task {
            row: row as u32,
            top: top as u32,
            first_top: self.num_tops as u32,
            repetition_penalty: 1.0,
            top_p: 1.0,
            ..Task::zeroed()
        };
        self.num_tops += top;
        match &draw.target {
            Target::Score(token) => task.token = *token,
            Target::Sample(rule) => self.add_rule(rule, &mut task),
        }
        self.tasks.push(task);
    }

    fn add_rule(&mut self, rule: &SampleRule, task: &mut Task) {
        let mut add = |tokens: &[u32]| {
            let first = self.tokens.len() as u32;
            self.tokens.extend_from_slice(tokens);
            (first, tokens.len() as u32)
        };
        (task.first_allowed, task.num_allowed) = add(rule.allowed.as_deref().unwrap_or(&[]));
        (task.first_banned, task.num_banned) = add(&rule.banned);
        (task.first_bias, task.num_bias) = (self.biases.len() as u32, rule.bias.len() as u32);
        self.biases.extend(rule.bias.iter().map(|&(token, bias)| [token, bias.to_bits()]));
        (task.first_count, task.num_counts) = (self.counts.len() as u32, rule.counts.len() as u32);
        self.counts.extend(rule.counts.iter().map(|count| [count.token, count.output]));
        task.target = 1;
        task.uniform = rule.uniform;
        task.has_allowed = u32::from(rule.allowed.is_some());
        task.top_k = rule.top_k;
        task.repetition_penalty = rule.repetition_penalty;
        task.frequency_penalty = rule.frequency_penalty;
        task.presence_penalty = rule.presence_penalty;
        task.temperature = rule.temperature;
        task.min_p = rule.min_p;
        task.top_p = rule.top_p;
    }

    /// Answers the draws.
    fn answer(
        &self,
        turn: &mut Turn<'_>,
        logits: &DeviceBuffer,
        vocab_size: usize,
        drawn: &mut Vec<Drawn>,
    ) -> Result<(), String> {
        let count = self.tasks.len();
        let rows = self.tasks.iter().map(|task| task.row as usize + 1).max().unwrap_or(0);
        let logits = logits.first(4 * rows * vocab_size);
        let answer_bytes = [size_of::<Answer>() * count, 4 * self.num_tops, 4 * self.num_tops];
        let lists = [
            bytemuck::cast_slice(&self.tasks),
            bytemuck::cast_slice(&self.tokens),
            bytemuck::cast_slice(&self.biases),
            bytemuck::cast_slice(&self.counts),
        ];
        let ([tasks, tokens, biases, counts], [answers, top_tokens, top_logprobs]) =
            turn.exchange(lists, answer_bytes)?;
        let workspace = &turn.device().workspace;
        let grid = count.min(workspace.weighed_rows);
        let weighed = turn.device().weighed.first(grid * workspace.weighed_row);
        turn.launch(
            "sample_rows",
            (grid, 1),
            512,
            0,
            &mut words![
                logits,
                vocab_size,
                tasks,
                count,
                tokens,
                biases,
                counts,
                weighed,
                answers,
                top_tokens,
                top_logprobs
            ],
        )?;
        // The three lie one after the other.
        let [answer_len, top_len, _] = answer_bytes;
        let (at_tokens, at_logprobs) = ((top_tokens - answers) as usize, (top_logprobs - answers) as usize);
        let bytes = turn.fetch(answers, at_logprobs + top_len)?;
        let answers: Vec<Answer> = collect(&bytes[..answer_len]);
        let tokens: Vec<u32> = collect(&bytes[at_tokens..at_tokens + top_len]);
        let logprobs: Vec<f32> = collect(&bytes[at_logprobs..at_logprobs + top_len]);
        for (task, answer) in self.tasks.iter().zip(answers) {
            let tops = task.first_top as usize..(task.first_top + task.top) as usize;
            let top = tokens[tops.clone()].iter().copied().zip(logprobs[tops].iter().copied()).collect();
            let problem = match answer.problem {
                0 => None,
                1 => Some(Problem::NotFinite),
                _ => Some(Problem::NoneAllowed),
            };
            drawn.push(Drawn { token: answer.token, logprob: answer.logprob, top, problem });
        }
        Ok(())
    }
}

/// Elements that begin on any byte.
fn collect<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// Answers draws, as many at a time as the lists have room for.
pub fn sample(
    turn: &mut Turn<'_>,
    logits: &DeviceBuffer,
    vocab_size: usize,
    draws: &[(usize, &Draw)],
    drawn: &mut Vec<Drawn>,
) -> Result<(), String> {
    // Gaps are few.
    let room = turn.capacity() / 2;
    let mut lists = Lists::default();
    for &(row, draw) in draws {
        let top = draw.top.min(vocab_size);
        if !lists.tasks.is_empty() && lists.bytes() + Lists::bytes_of(draw, top) > room {
            std::mem::take(&mut lists).answer(turn, logits, vocab_size, drawn)?;
        }
        lists.add(row, draw, top);
    }
    if lists.tasks.is_empty() { Ok(()) } else { lists.answer(turn, logits, vocab_size, drawn) }
}
