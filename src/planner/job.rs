//! The job in numbers, and the passes that it is made of.
//!
//! **Invariant:** rows, keys and pages of a pass are those of the sequences it stands for, spread evenly over its
//! blocks; nothing here knows a tier.

use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::policy::{Kept, KvPolicy, Upkeep, positions};
use crate::schedule::shape::BlockShape;

/// Positions of a page.
const PAGE: f64 = PAGE_POSITIONS as f64;

/// Sequences whose lengths are kept one by one.
const LENGTHS: usize = 1024;

/// Jobs of fewer sequences per place than this are short.
const SHORT_ROUNDS: usize = 4;
/// Prompt tokens of a pass beyond which more of them gain nothing.
const LONGEST_CHUNK: usize = 1 << 16;

/// What is to be generated: averages, and the lengths of the first sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Sequences in all.
    pub requests: usize,
    /// Some of them, in order; the rest is taken to be like these.
    pub lengths: Vec<Request>,
    /// Prompt tokens of a sequence.
    pub prompt_len: f64,
    /// How many of them it computes: the others are there from another sequence.
    pub fresh_len: f64,
    /// Keys that the queries which a prompt computes see, summed over them.
    pub prompt_keys: f64,
    /// Tokens that a sequence generates.
    pub gen_len: f64,
    /// Pages that a sequence is expected to hold in the end beside those that it shares.
    pub pages: f64,
    /// The same with those that it shares.
    pub whole_pages: f64,
    /// Pages that it holds beyond those while its prompt is read.
    pub reading_pages: f64,
    /// The part of the sequences that share, and the pages that one of them does.
    pub sharing: (f64, f64),
    /// Pages that the longest sequence may hold.
    pub most_pages: usize,
    /// Pages that a single layer of the longest sequence works with.
    pub widest_layer: usize,
    /// Pages that a decoding query reads, on average over an answer.
    pub decode_pages: f64,
    /// Keys that a decoding query sees at most; infinite where everything is kept.
    pub most_keys: f64,
    /// What keeping part of a sequence takes beside attention, for a prompt and for a decoding query.
    pub upkeep: [Counts; 2],
    /// Whether every page of a sequence changes with every pass.
    pub rewrites: bool,
}

/// The counts of an [`Upkeep`], in averages.
pub type Counts = [f64; 4];

/// A sequence of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Prompt tokens.
    pub prompt_len: usize,
    /// How many of them are there from another sequence, in whole pages.
    pub shared: usize,
    /// Tokens that it will generate.
    pub gen_len: usize,
    /// Tokens that it may generate.
    pub max_tokens: usize,
    /// What of it is kept.
    pub kept: Kept,
}

impl Request {
    /// A sequence that may generate `max_tokens` and will generate `gen_len` of them.
    pub fn new(prompt_len: usize, gen_len: usize, max_tokens: usize, kv_policy: &dyn KvPolicy) -> Self {
        Request { prompt_len, shared: 0, gen_len, max_tokens, kept: kv_policy.kept(prompt_len, max_tokens) }
    }

    /// The same, where another sequence begins with as many of its tokens. It computes its last one, and shares
    /// nothing if it evicts.
    pub fn sharing(self, tokens: usize) -> Self {
        let most = if self.kept == Kept::All { self.prompt_len.saturating_sub(1) } else { 0 };
        Request { shared: tokens.min(most) / PAGE_POSITIONS * PAGE_POSITIONS, ..self }
    }

    /// Pages that it shares.
    pub fn shared_pages(&self) -> usize {
        self.shared / PAGE_POSITIONS
    }

    /// Pages that it may hold.
    pub fn pages(&self) -> usize {
        self.kept.most_held(positions(self.prompt_len, self.max_tokens)).max(1)
    }

    /// Pages that it will hold in the end beside those that it shares.
    fn expected_pages(&self) -> usize {
        self.kept.held(positions(self.prompt_len, self.gen_len)).saturating_sub(self.shared_pages()).max(1)
    }

    /// Pages that it holds beyond those while its prompt is read.
    fn reading_pages(&self) -> usize {
        self.kept.reading(0).saturating_sub(self.expected_pages() + self.shared_pages())
    }

    /// Pages that a single layer of it works with, at most, in a model with more than one.
    fn widest_layer(&self) -> usize {
        self.kept.widest_layer(positions(self.prompt_len, self.max_tokens), 2).max(1)
    }

    /// Keys that a decoding query sees at most.
    fn most_keys(&self) -> f64 {
        self.kept.capacity().map_or(f64::INFINITY, |capacity| capacity as f64 + 1.0)
    }

    /// Pages with positions before the one that decodes, on average over its answer.
    fn decode_pages(&self) -> f64 {
        // The first token comes with the prompt.
        let steps = self.gen_len.saturating_sub(1).max(1);
        let pages = |step: usize| self.kept.reads(&(self.prompt_len + step..self.prompt_len + step + 1)).count() as f64;
        (0..steps).map(pages).sum::<f64>() / steps as f64
    }

    /// What keeping part of it takes, for its prompt and for a query in the middle of its answer.
    fn upkeep(&self) -> [Counts; 2] {
        let middle = self.prompt_len + self.gen_len / 2;
        [self.shared..self.prompt_len, middle..middle + 1].map(|range| {
            let Upkeep { scored, sifted, evicted, turned } = self.kept.upkeep(&range);
            [scored, sifted, evicted, turned].map(|count| count as f64)
        })
    }

    /// Keys that the queries of its prompt that it computes see, summed over them.
    fn prompt_keys(&self) -> f64 {
        let upto = |len: usize| (len * (len + 1)) as f64 / 2.0;
        match self.kept {
            Kept::All => upto(self.prompt_len) - upto(self.shared),
            kept => (0..self.prompt_len).map(|position| kept.keys(position) as f64).sum(),
        }
    }
}

impl Job {
    /// `requests` equal sequences.
    pub fn uniform(requests: usize, prompt_len: usize, gen_len: usize) -> Self {
        let request = Request { prompt_len, shared: 0, gen_len, max_tokens: gen_len, kept: Kept::All };
        Job { requests: requests.max(1), ..Job::of(&[request]) }
    }

    /// The averages of many sequences.
    pub fn of(requests: &[Request]) -> Self {
        let count = requests.len().max(1) as f64;
        let mean = |value: &dyn Fn(&Request) -> f64| requests.iter().map(value).sum::<f64>() / count;
        let sharers: Vec<f64> =
            requests.iter().map(|request| request.shared_pages() as f64).filter(|&pages| pages > 0.0).collect();
        // Of many, some from everywhere.
        let kept = requests.len().min(LENGTHS);
        let lengths = (0..kept).map(|index| requests[index * requests.len() / kept]).collect();
        Job {
            requests: requests.len().max(1),
            lengths,
            prompt_len: mean(&|request| request.prompt_len as f64).max(1.0),
            fresh_len: mean(&|request| (request.prompt_len - request.shared) as f64).max(1.0),
            prompt_keys: mean(&Request::prompt_keys).max(1.0),
            gen_len: mean(&|request| request.gen_len as f64).max(1.0),
            pages: mean(&|request| request.expected_pages() as f64).max(1.0),
            whole_pages: mean(&|request| (request.expected_pages() + request.shared_pages()) as f64).max(1.0),
            reading_pages: mean(&|request| request.reading_pages() as f64),
            sharing: (sharers.len() as f64 / count, sharers.iter().sum::<f64>() / sharers.len().max(1) as f64),
            most_pages: requests.iter().map(Request::pages).max().unwrap_or(1),
            widest_layer: requests.iter().map(Request::widest_layer).max().unwrap_or(1),
            decode_pages: mean(&Request::decode_pages),
            most_keys: mean(&Request::most_keys),
            upkeep: requests.iter().fold([Counts::default(); 2], |mut mean, request| {
                let all = mean.as_flattened_mut().iter_mut();
                all.zip(request.upkeep().as_flattened()).for_each(|(mean, value)| *mean += value / count);
                mean
            }),
            rewrites: requests.iter().any(|request| matches!(request.kept, Kept::Heavy { .. })),
        }
    }

    /// Pages that `sequences` in flight share, as prompts with one beginning follow each other: what the beginning
    /// takes, if anybody shares.
    pub fn common_pages(&self, sequences: f64) -> f64 {
        let (share, pages) = self.sharing;
        pages * (1.0 - (1.0 - share).powf(sequences))
    }

    /// Pages that `sequences` in flight hold together, whose prompts are read so many tokens a pass.
    pub fn pages_of(&self, sequences: f64, chunk_tokens: usize) -> f64 {
        let held = (sequences * self.whole_pages).min(sequences * self.pages + self.common_pages(sequences));
        let prompts = (chunk_tokens as f64 / self.fresh_len).ceil().clamp(1.0, sequences.max(1.0));
        held + prompts * self.reading_pages
    }

    /// Whether answers are expected to end before their last token.
    pub fn ends_early(&self) -> bool {
        self.lengths.iter().any(|request| request.gen_len < request.max_tokens)
    }

    /// Prompt and generated tokens of all sequences, what they share counted for each.
    pub fn tokens(&self) -> f64 {
        self.requests as f64 * (self.prompt_len + self.gen_len)
    }

    /// Prompt tokens per pass that keep `sequences` in flight, each decoding as soon as its prompt is done.
    pub fn balanced_chunk(&self, sequences: usize) -> usize {
        let (count, steps) = (sequences as f64, self.gen_len);
        let tokens = match count >= steps || steps < 2.0 {
            // Prompts take one pass each.
            true => count * self.fresh_len / steps,
            // One prompt at a time, in several passes.
            false => (count - 1.0) * self.fresh_len / (steps - 1.0),
        };
        tokens.ceil().max(16.0) as usize
    }

    /// Prompt tokens per pass that are worth trying with `sequences` in flight: what balances a long job, or a whole
    /// prompt if that is more; of a short one, whose beginning and end count, also all prompts at once, and between.
    pub fn chunks(&self, sequences: usize) -> Vec<usize> {
        let balanced = self.balanced_chunk(sequences);
        let all = (sequences as f64 * self.fresh_len).ceil() as usize;
        let mut chunks = vec![balanced];
        if self.requests < SHORT_ROUNDS * sequences && all > balanced {
            let between = (balanced as f64 * all as f64).sqrt() as usize;
            chunks.extend([between, all].into_iter().filter(|&chunk| chunk > balanced && chunk <= LONGEST_CHUNK));
        } else if self.fresh_len.ceil() as usize > balanced {
            chunks.push(self.fresh_len.ceil() as usize);
        }
        chunks.dedup();
        chunks
    }

    /// The mean pass of a long job with `sequences` in flight and at most `chunk_tokens` prompt tokens in a pass.
    pub fn steady(&self, sequences: usize, chunk_tokens: usize) -> PassLoad {
        let (count, chunk, steps) = (sequences as f64, chunk_tokens as f64, self.gen_len);
        // Passes that a prompt takes on its own.
        let prefill = (self.fresh_len / chunk).max(1.0);
        let rate = (chunk / self.fresh_len).min(count / (prefill + steps - 1.0));
        PassLoad { prompt_tokens: rate * self.fresh_len, prompts: rate, decodes: rate * (steps - 1.0) }
    }
}

/// What a pass carries, in averages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassLoad {
    /// Prompt tokens.
    pub prompt_tokens: f64,
    /// Prompts that they complete.
    pub prompts: f64,
    /// Sequences that decode.
    pub decodes: f64,
}

/// A block of a pass before placement: its shape without transfers, and the pages that transfers would be about.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Block {
    /// The shape; `loads` and `stores` are empty.
    pub shape: BlockShape,
    /// Pages with positions from before the pass.
    pub old_pages: f64,
    /// Pages that the pass writes to.
    pub written_pages: f64,
}

impl PassLoad {
    /// Rows of the pass.
    pub fn rows(&self) -> f64 {
        self.prompt_tokens + self.decodes
    }

    /// The pass in `count` equal blocks, as near as whole rows allow.
    pub fn blocks(&self, job: &Job, count: usize) -> Vec<Block> {
        let parts = count as f64;
        let rows = self.prompt_tokens / parts;
        // A prompt is cut by the passes and blocks that it goes through; a cut segment attends to what was before it.
        // Never into parts of less than a token, whatever rounding leaves of a pass.
        let cuts = if rows > 0.0 { (job.fresh_len / rows).clamp(1.0, job.fresh_len) } else { 1.0 };
        let started = self.prompt_tokens / job.fresh_len;
        let shared_pages = (job.prompt_len - job.fresh_len) / PAGE;
        // No segment reads more pages than its sequence holds.
        let most_own = job.pages + job.reading_pages;
        let own_pages = (job.fresh_len / PAGE).ceil().min(cuts * most_own);
        let prompt_keys = started * job.prompt_keys;
        let (old, written) = cut_pages(job.fresh_len, cuts);
        let (prompt_old, mut prompt_written) = (started * old.min(cuts * most_own), started * written);
        let decode_len = (job.prompt_len + job.gen_len / 2.0).min(job.most_keys);
        let decode_pages = job.decode_pages - shared_pages;
        let totals = [
            self.prompt_tokens,
            self.decodes,
            prompt_keys + self.decodes * decode_len,
            prompt_old + started * own_pages + self.decodes * decode_pages,
            self.prompts + self.decodes,
            started * cuts + self.decodes,
        ];
        let [prompt_upkeep, decode_upkeep] = job.upkeep;
        let upkeep: Counts =
            std::array::from_fn(|count| started * prompt_upkeep[count] + self.decodes * decode_upkeep[count]);
        // Whole numbers that add up over the blocks.
        let part = |total: f64, index: usize| {
            let upto = |index: usize| (total * index as f64 / parts).round();
            upto(index + 1) - upto(index)
        };
        // A block brings what its sequences share once, and attends to it together.
        let common = job.common_pages((started * cuts + self.decodes) / parts);
        let shape = |index: usize| {
            let [prompt, decodes, keys, pages, outputs, segments] = totals.map(|total| part(total, index));
            let rows = prompt + decodes;
            let [scored, sifted, evicted, turned] = upkeep.map(|total| part(total, index) as u64);
            BlockShape {
                rows: rows as usize,
                segments: segments.min(rows).max(f64::from(u8::from(rows > 0.0))) as usize,
                keys: keys as u64,
                pages: (pages + common).round() as u64,
                upkeep: Upkeep { scored, sifted, evicted, turned },
                outputs: outputs.min(rows) as usize,
                ..BlockShape::default()
            }
        };
        let old_pages = (prompt_old + self.decodes * decode_pages) / parts + common;
        let mut decode_written = self.decodes;
        if job.rewrites {
            (prompt_written, decode_written) = (prompt_written.max(prompt_old), self.decodes * decode_pages);
        }
        let written_pages = (prompt_written + decode_written) / parts;
        let blocks = (0..count).map(|index| Block { shape: shape(index), old_pages, written_pages });
        blocks.filter(|block| block.shape.rows > 0).collect()
    }
}

/// Pages that a prompt brings from before, and pages that it writes, when it is computed in `cuts` equal parts.
fn cut_pages(prompt_len: f64, cuts: f64) -> (f64, f64) {
    let count = cuts.round().max(1.0);
    let bound = |part: f64| prompt_len * part / count / PAGE;
    let parts = (0..count as usize).map(|part| part as f64);
    let each = |part: f64| (bound(part).ceil(), bound(part + 1.0).ceil() - bound(part).floor());
    parts.map(each).fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balanced_pass_keeps_everything_in_flight() {
        let job = Job::uniform(10_000, 512, 32);
        assert_eq!((job.pages, job.most_pages), (9.0, 9));
        let load = job.steady(320, job.balanced_chunk(320));
        assert!((load.prompts - 10.0).abs() < 1e-9 && (load.decodes - 310.0).abs() < 1e-6, "{load:?}");
        let few = job.steady(8, job.balanced_chunk(8));
        assert!(few.decodes > 6.0 && few.decodes < 8.0, "{few:?}");
        // A smaller chunk than that leaves places empty.
        assert!(job.steady(320, 512).decodes < 32.0);
    }

    #[test]
    fn a_pass_of_next_to_nothing_is_cut_into_tokens_at_most() {
        let job = Job::of(&[
            Request { prompt_len: 65, shared: 0, gen_len: 4, max_tokens: 4, kept: Kept::All },
            Request { prompt_len: 1, shared: 0, gen_len: 9, max_tokens: 9, kept: Kept::All },
        ]);
        let load = PassLoad { prompt_tokens: 1e-13, prompts: 0.0, decodes: 3.0 };
        assert_eq!(load.blocks(&job, 2).iter().map(|block| block.shape.rows).sum::<usize>(), 3);
    }

    #[test]
    fn what_is_shared_is_neither_computed_nor_held_again() {
        let request = Request { prompt_len: 700, shared: 0, gen_len: 20, max_tokens: 20, kept: Kept::All };
        let job = Job::of(&[request.sharing(650); 4]);
        assert_eq!((job.prompt_len, job.fresh_len, job.sharing), (700.0, 60.0, (1.0, 10.0)));
        // 720 positions lie in 12 pages, ten of which are shared.
        assert_eq!((job.pages, job.whole_pages, job.most_pages), (2.0, 12.0, 12));
        assert_eq!((job.pages_of(1.0, 64), job.pages_of(20.0, 64)), (12.0, 50.0));
        // Of two samples one holds the prompt, and nobody shares more than that. Two prompts of many hardly matter.
        let two = Job::of(&[request, request.sharing(700)]);
        assert_eq!((two.pages_of(1.0, 64), two.pages_of(100.0, 64) < 710.1), (12.0, true));
        let mut many = [Request { prompt_len: 40, ..request }; 600];
        (many[0], many[1]) = (request, request.sharing(700));
        assert!(Job::of(&many).pages_of(20.0, 64) < 22.0, "{}", Job::of(&many).pages_of(20.0, 64));
        let load = job.steady(100, job.balanced_chunk(100));
        assert!((load.prompts - 5.0).abs() < 1e-9 && (load.prompt_tokens - 300.0).abs() < 1e-6, "{load:?}");
        let all: f64 = load.blocks(&job, 2).iter().map(|block| block.shape.keys as f64).sum();
        // Every query sees the whole beginning.
        let keys = 5.0 * (640..700).map(|at| f64::from(at + 1)).sum::<f64>() + load.decodes * 710.0;
        assert!((all / keys - 1.0).abs() < 0.001, "{all} {keys}");
        let [one, _] = load.blocks(&job, 2)[..] else { panic!("two blocks") };
        assert!(one.old_pages < 10.0 + 50.0 * 3.0, "{}", one.old_pages);
    }

    #[test]
    fn blocks_add_up_to_the_pass() {
        let job = Job::uniform(10_000, 512, 32);
        let load = job.steady(320, 5120);
        for count in [1, 3, 8, 40] {
            let blocks = load.blocks(&job, count);
            let sum = |value: &dyn Fn(&Block) -> f64| blocks.iter().map(value).sum::<f64>();
            assert_eq!(sum(&|block| block.shape.rows as f64), 5430.0);
            assert_eq!(sum(&|block| block.shape.outputs as f64), 320.0);
            assert!(sum(&|block| block.written_pages) >= 10.0 * 8.0 + 310.0);
        }
    }
}
