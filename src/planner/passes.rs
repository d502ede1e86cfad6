//! The passes of a job as the engine will make them, one by one.
//!
//! **Invariant:** a pass is composed by the function that composes the engine's, over the same pool of pages, from
//! sequences in the order of the job's lines; only tokens are missing.

use std::convert::Infallible;

use super::job::{Job, Request};
use crate::error::Tier;
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::pages::{PageId, PagePool};
use crate::kv::policy::positions;
use crate::policy::{Order, Policy};
use crate::schedule::compose::{Fill, Wishes};
use crate::schedule::forecast::Forecast;
use crate::schedule::placement::{Placement, tier_of};
use crate::schedule::shape::{BlockShape, Pages};

/// Sequences in flight that are followed; of more, each that is followed stands for several of its like.
const FOLLOWED: usize = 256;
/// Times that all places are filled one by one; what is beyond goes on at the rate of the later ones.
const ROUNDS: usize = 4;

/// A pass of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedPass {
    /// Its blocks.
    pub blocks: Vec<BlockShape>,
    /// How often it occurs.
    pub times: f64,
}

/// A sequence in flight.
struct Sequence {
    request: Request,
    /// Positions that are computed, and those whose token is known.
    computed: usize,
    known: usize,
    /// Those of its own, which come after what it shares.
    pages: Vec<PageId>,
}

/// A pass in the making, and who may be in it.
struct Crowd {
    num_layers: usize,
    /// Where things are computed, pages by tier, and where those lie that sequences share, by index.
    compute: Tier,
    pages: [usize; 3],
    common: Vec<Tier>,
    /// Sequences that one of these stands for.
    each: f64,
    /// Answers that end with a token, of all that could; none where lengths are certain.
    ends: f64,
    active: Vec<Sequence>,
    /// Those who gave their pages to others, the oldest last.
    paused: Vec<Sequence>,
    /// Pages that the next position of every active sequence needs, and all together.
    noted: Vec<usize>,
    noted_pages: usize,
    pool: PagePool,
    /// Pages in files that nobody who is paused has.
    aside: usize,
    /// Limits of a block.
    block_rows: usize,
    block_pages: usize,
    /// Blocks of the pass, and the streamed pages of the last one beside those that sequences share.
    blocks: Vec<BlockShape>,
    streamed: usize,
    /// Of each block, the pages that its sequences share, and which of them it brings.
    noted_common: Vec<(usize, Pages)>,
}

impl Sequence {
    fn new(request: Request) -> Self {
        Sequence { request, computed: request.shared, known: request.prompt_len, pages: Vec::new() }
    }

    /// Pages that it has, those that it shares included.
    fn covered(&self) -> usize {
        self.request.shared_pages() + self.pages.len()
    }

    /// Pages of what it has computed in files, while it is paused.
    fn pages_aside(&self) -> usize {
        self.request.kept.held(self.computed).saturating_sub(self.request.shared_pages())
    }

    /// Whether its next row is a generated token.
    fn decodes(&self) -> bool {
        self.computed >= self.request.prompt_len && self.known - self.computed == 1
    }

    /// Adds it to a forecast; answers end with every token that they have not got to with some probability.
    fn add_to(&self, forecast: &mut Forecast, ends: f64) {
        let Request { prompt_len, max_tokens, kept, .. } = self.request;
        let (held, answer) = (self.pages.len(), self.known - prompt_len);
        let most = positions(prompt_len, max_tokens);
        let reading = kept.reading(self.computed).saturating_sub(self.covered());
        let grown = |more: usize| kept.held((self.known + more).min(most)) as isize - self.covered() as isize;
        let goes_on = |more: usize| if more + answer < max_tokens { (-(more as f64) * ends).exp() } else { 0.0 };
        forecast.add(held, reading, grown, goes_on);
    }
}

/// A request whose answer is as long as chance has it, of the same mean: lengths of answers that end of themselves are
/// nearly geometric.
fn drawn(request: &Request, index: usize) -> Request {
    // Multiples of the golden ratio are spread evenly, whatever part of them is looked at.
    let share = ((index as f64 + 0.5) * 0.618_033_988_749_894_9).fract();
    let gen_len = (-(request.gen_len as f64) * (1.0 - share).ln()).ceil() as usize;
    Request { gen_len: gen_len.clamp(1, request.max_tokens), ..*request }
}

/// All passes of `job` under `placement`, in order.
pub fn passes(job: &Job, placement: &Placement) -> Vec<PlannedPass> {
    let policy = &placement.policy;
    let places = policy.sequences.min(job.requests).clamp(1, FOLLOWED);
    let each = policy.sequences.min(job.requests).max(1) as f64 / places as f64;
    let fewer = |count: usize| (count as f64 / each).ceil() as usize;
    let (lengths, common, left) = shared(job, placement);
    let pages = left.map(fewer);
    let mut crowd = Crowd {
        num_layers: placement.num_layers,
        compute: placement.compute,
        pages,
        each,
        ends: if job.ends_early() { 1.0 / job.gen_len } else { 0.0 },
        active: Vec::new(),
        paused: Vec::new(),
        noted: Vec::new(),
        noted_pages: 0,
        pool: PagePool::new(pages, 0),
        aside: fewer(policy.paused_pages),
        block_rows: fewer(policy.block_rows),
        block_pages: fewer(policy.block_pages.saturating_sub(common.len())).max(job.widest_layer),
        common,
        blocks: Vec::new(),
        streamed: 0,
        noted_common: Vec::new(),
    };
    let requests = (job.requests as f64 / each).round() as usize;
    let followed = requests.min(ROUNDS * places);
    let mut waiting = lengths.iter().cycle().take(followed).peekable();
    let (mut passes, mut begun, mut closed) = (Vec::new(), 0, false);
    // When the third round had begun, and when as many again had: the pass, and how many had begun. Between them lies
    // all that repeats, however unevenly a round begins.
    let mut marks: Vec<(usize, usize)> = Vec::new();
    loop {
        closed &= !crowd.active.is_empty();
        let wanted = !crowd.paused.is_empty() || waiting.peek().is_some();
        if wanted && !closed && crowd.active.len() < places {
            let mut forecast = crowd.forecast();
            while crowd.active.len() < places && crowd.admit_paused(&mut forecast) {
                let Some(request) = waiting.peek() else { break };
                let request = if crowd.ends > 0.0 { drawn(request, begun) } else { **request };
                if crowd.admit(Sequence::new(request), &mut forecast).is_some() {
                    break;
                }
                waiting.next();
                begun += 1;
            }
        }
        closed = policy.schedule == Order::Phased;
        crowd.make_room();
        if marks.len() < 2 && begun > (ROUNDS - 2 + marks.len()) * places {
            marks.push((passes.len(), begun));
        }
        crowd.compose(policy, fewer(policy.chunk_tokens));
        if crowd.blocks.iter().all(|block| block.rows == 0) {
            break;
        }
        passes.push(PlannedPass { blocks: crowd.shapes(), times: 1.0 });
        crowd.retire();
    }
    let rest = (requests - followed) as f64;
    if let (true, [(from, before), (to, after)]) = (rest > 0.0, &marks[..]) {
        let times = rest / (after - before) as f64;
        passes[*from..*to].iter_mut().for_each(|pass| pass.times += times);
    }
    passes
}

/// The sequences that find room, where the pages lie that they share, by index, and what is left of the cache by tier.
/// Nothing is shared where hardly anybody does, or where more than a few would find no room beside what is: it would be
/// given up.
fn shared(job: &Job, placement: &Placement) -> (Vec<Request>, Vec<Tier>, [usize; 3]) {
    let alone = || {
        let alone = job.lengths.iter().map(|request| Request { shared: 0, ..*request });
        (alone.filter(|request| request.pages() <= placement.total_pages()).collect(), Vec::new(), placement.pages)
    };
    let reserved = job.common_pages(placement.policy.sequences as f64).round() as usize;
    if reserved == 0 || reserved >= placement.total_pages() {
        return alone();
    }
    let (mut pool, mut left) = (PagePool::new(placement.pages, 0), placement.pages);
    let tiers: Vec<Tier> = (0..reserved).map(|_| placement.page_tier(pool.take() as usize)).collect();
    tiers.iter().for_each(|&tier| left[tier as usize] -= 1);
    let room: usize = left.iter().sum();
    let fits = |request: &&Request| request.pages() - request.shared_pages() <= room;
    let lengths: Vec<Request> = job.lengths.iter().filter(fits).copied().collect();
    if lengths.len() * 10 < job.lengths.len() * 9 {
        return alone();
    }
    let most = lengths.iter().map(Request::shared_pages).max().unwrap_or(0);
    (lengths, tiers.into_iter().cycle().take(most).collect(), left)
}

impl Crowd {
    /// What those in flight will need, as the engine sees it once it has learned how long answers get.
    fn forecast(&self) -> Forecast {
        let mut forecast = Forecast::default();
        self.active.iter().for_each(|sequence| sequence.add_to(&mut forecast, self.ends));
        forecast
    }

    /// Begins a sequence if the cache is expected to hold it; else gives it back.
    fn admit(&mut self, sequence: Sequence, forecast: &mut Forecast) -> Option<Sequence> {
        let mut with = *forecast;
        sequence.add_to(&mut with, self.ends);
        if !self.active.is_empty() && with.peak() > self.pool.free() as f64 {
            return Some(sequence);
        }
        *forecast = with;
        self.active.push(sequence);
        None
    }

    /// Begins those again that were paused; whether all have room.
    fn admit_paused(&mut self, forecast: &mut Forecast) -> bool {
        while let Some(sequence) = self.paused.pop() {
            if let Some(sequence) = self.admit(sequence, forecast) {
                self.paused.push(sequence);
                return false;
            }
            let sequence = self.active.last_mut().expect("it was admitted");
            let back = sequence.pages_aside();
            self.aside += back;
            if back <= self.pool.free() {
                sequence.pages.extend((0..back).map(|_| self.pool.take()));
                *forecast = self.forecast();
            } else {
                sequence.computed = sequence.request.shared;
            }
        }
        true
    }

    /// Pauses the youngest until everybody who decodes, and the oldest, can take the pages of its next position.
    fn make_room(&mut self) {
        loop {
            let needs = |(index, sequence): (usize, &Sequence)| match index == 0 || sequence.decodes() {
                true => sequence.request.kept.pages(sequence.computed + 1).saturating_sub(sequence.covered()),
                false => 0,
            };
            self.noted = self.active.iter().enumerate().map(needs).collect();
            self.noted_pages = self.noted.iter().sum();
            if self.active.len() < 2 || self.noted_pages <= self.pool.free() {
                return;
            }
            let youngest = self.active.pop().expect("there are two");
            youngest.pages.iter().for_each(|&page| self.pool.release(page));
            let mut paused = Sequence { pages: Vec::new(), ..youngest };
            match self.aside.checked_sub(paused.pages_aside()) {
                Some(aside) => self.aside = aside,
                None => paused.computed = paused.request.shared,
            }
            self.paused.push(paused);
        }
    }

    fn compose(&mut self, policy: &Policy, chunk_tokens: usize) {
        self.blocks.clear();
        self.noted_common.clear();
        let decodes = |index: &usize| self.active[*index].decodes();
        let (decoding, prompts): (Vec<usize>, Vec<usize>) = (0..self.active.len()).partition(decodes);
        let left = |&index: &usize| self.active[index].known - self.active[index].computed;
        let prompt_tokens = prompts.iter().map(left).sum();
        let (blocks, order) = (policy.blocks, policy.schedule);
        let wishes = Wishes { decoding, prompts, prompt_tokens, blocks, chunk_tokens, order };
        let Ok(()) = wishes.compose(self);
    }

    /// The pass's blocks as large as they are in truth.
    fn shapes(&self) -> Vec<BlockShape> {
        let more = |count: usize| (count as f64 * self.each).round() as usize;
        let pages = |pages: Pages| Pages { cpu: more(pages.cpu), disk: more(pages.disk) };
        let shape = |(block, (shared, common)): (&BlockShape, &(usize, Pages))| BlockShape {
            rows: more(block.rows),
            segments: more(block.segments),
            keys: (block.keys as f64 * self.each) as u64,
            // What sequences share is read and brought once, however many one stands for.
            pages: (block.pages as f64 * self.each) as u64 + *shared as u64,
            upkeep: block.upkeep.times(self.each),
            loads: Pages { cpu: more(block.loads.cpu) + common.cpu, disk: more(block.loads.disk) + common.disk },
            stores: pages(block.stores),
            outputs: more(block.outputs),
        };
        let all = self.blocks.iter().zip(&self.noted_common);
        all.filter(|(block, _)| block.rows > 0).map(shape).collect()
    }

    /// Draws the tokens that the pass asked for, takes out who has ended, and takes back what prompts needed.
    fn retire(&mut self) {
        let pool = &mut self.pool;
        self.active.retain_mut(|sequence| {
            if sequence.computed == sequence.known {
                sequence.known += 1;
            }
            let over = sequence.known == sequence.request.prompt_len + sequence.request.gen_len;
            let held = if over { 0 } else { sequence.request.kept.held(sequence.computed) };
            let held = held.saturating_sub(sequence.request.shared_pages()).min(sequence.pages.len());
            sequence.pages.drain(held..).for_each(|page| pool.release(page));
            !over
        });
    }
}

impl Fill for Crowd {
    type Error = Infallible;

    fn open_block(&mut self) {
        self.blocks.push(BlockShape::default());
        self.noted_common.push((0, Pages::default()));
        self.streamed = 0;
    }

    fn take_up(&mut self, index: usize, most: usize) -> Result<usize, Infallible> {
        let sequence = &mut self.active[index];
        let from = sequence.computed;
        let block = self.blocks.last_mut().expect("a block is open");
        let to = sequence.known.min(from + most.min(self.block_rows - block.rows));
        let kept = sequence.request.kept;
        let to = kept.reach(&(from..to));
        if to == from {
            return Ok(0);
        }
        // Others have been promised what their next positions need.
        let free = self.pool.free() - (self.noted_pages - self.noted[index]);
        let most = (sequence.covered() + free) * PAGE_POSITIONS;
        let to = if kept.pages(to) > sequence.covered() + free { most.max(from) } else { to };
        if to == from {
            return Ok(0);
        }
        self.noted_pages -= std::mem::take(&mut self.noted[index]);
        while sequence.covered() < kept.pages(to) {
            sequence.pages.push(self.pool.take());
        }
        let (range, pages, shared) = (from..to, &sequence.pages, sequence.request.shared_pages());
        let tiers = |indices: &mut dyn Iterator<Item = usize>| {
            let mut counts = [0; 3];
            let own = indices.filter_map(|index| index.checked_sub(shared));
            own.for_each(|index| counts[tier_of(&self.pages, pages[index] as usize) as usize] += 1);
            counts[self.compute as usize] = 0;
            counts
        };
        // The first layer needs the most.
        let first = kept.at(0, self.num_layers);
        let streamed: usize = tiers(&mut first.touches(&range).map(|index| kept.place(index).0)).iter().sum();
        if self.streamed + streamed > self.block_pages {
            return Ok(0);
        }
        self.streamed += streamed;
        let (old, written) = (tiers(&mut kept.reads(&range)), tiers(&mut kept.writes(&range)));
        let (noted, common) = self.noted_common.last_mut().expect("a block is open");
        for &tier in &self.common[shared.min(*noted)..shared] {
            common.cpu += usize::from(tier == Tier::Cpu && self.compute != Tier::Cpu);
            common.disk += usize::from(tier == Tier::Disk);
        }
        *noted = shared.max(*noted);
        block.rows += to - from;
        block.segments += 1;
        block.keys += range.clone().map(|position| kept.keys(position) as u64).sum::<u64>();
        block.pages += (kept.touches(&range).count() - shared) as u64;
        block.upkeep += kept.upkeep(&range);
        block.loads.cpu += old[1];
        block.loads.disk += old[2];
        block.stores.cpu += written[1];
        block.stores.disk += written[2];
        block.outputs += usize::from(to == sequence.known);
        sequence.computed = to;
        Ok(to - from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Split;
    use crate::schedule::placement::ModelBytes;

    fn placement(job: &Job, sequences: usize, chunk_tokens: usize, blocks: usize, kv: Split) -> Placement {
        let model = ModelBytes {
            layers: vec![vec![4096; 8]; 4],
            head: vec![vec![4096; 8]],
            table: 1 << 15,
            small: 1 << 10,
            frame: 4096,
            activations: vec![64],
            embedding_row: 64,
            hidden_row: 64,
            logit_row: 256,
            ..ModelBytes::default()
        };
        let policy = Policy {
            sequences,
            chunk_tokens,
            blocks,
            block_rows: (sequences + chunk_tokens).div_ceil(blocks) + 8,
            pages: job.most_pages * sequences + 1,
            block_pages: job.most_pages * sequences + 4,
            paused_pages: 0,
            weight_slots: 2,
            kv_slots: 2,
            weights: Split::all(Tier::Gpu),
            kv,
            hidden: Split::all(Tier::Gpu),
            embed: Tier::Gpu,
            head: Tier::Gpu,
            compressed: false,
            schedule: Order::Mixed,
        };
        Placement::new(&model, &policy, Tier::Gpu)
    }

    #[test]
    fn every_token_is_computed_once() {
        for (requests, sequences, chunk, blocks) in
            [(1, 1, 64, 1), (10, 4, 64, 2), (100, 16, 2000, 4), (60, 16, 300, 5), (64, 64, 5000, 3)]
        {
            let job = Job::uniform(requests, 100, 10);
            let passes =
                passes(&job, &placement(&job, sequences, chunk, blocks, Split { gpu: 0.3, cpu: 0.4, disk: 0.3 }));
            let sum = |value: &dyn Fn(&BlockShape) -> usize| -> f64 {
                passes.iter().map(|pass| pass.times * pass.blocks.iter().map(value).sum::<usize>() as f64).sum()
            };
            let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 0.02, "{requests} {sequences}: {a} {b}");
            near(sum(&|block| block.rows), (requests * 109) as f64);
            near(sum(&|block| block.outputs), (requests * 10) as f64);
            near(sum(&|block| block.keys as usize), (requests * (109 * 110) / 2) as f64);
            for pass in &passes {
                assert!(pass.blocks.iter().map(|block| block.rows).sum::<usize>() <= sequences + chunk);
                assert!(pass.blocks.len() <= blocks);
            }
        }
    }

    #[test]
    fn what_sequences_share_is_brought_once_by_a_block() {
        let all = Request::new(650, 10, 10, &*crate::kv::policies::full());
        let job = |request: Request| {
            let mut requests = [request; 10];
            requests[0] = all;
            Job { requests: 200, ..Job::of(&requests) }
        };
        let (alone, sharing) = (job(all), job(all.sharing(640)));
        let on_cpu = Split::all(Tier::Cpu);
        let count = |job: &Job, pages: usize| {
            let mut placement = placement(job, 40, 400, 2, on_cpu);
            placement.pages = [0, pages, 0];
            let passes = passes(job, &placement);
            let sum = |value: &dyn Fn(&BlockShape) -> usize| -> f64 {
                passes.iter().map(|pass| pass.times * pass.blocks.iter().map(value).sum::<usize>() as f64).sum()
            };
            [sum(&|block| block.rows), sum(&|block| block.loads.cpu), sum(&|block| block.outputs)]
        };
        // Of ten prompts nine compute their last ten tokens; everybody decodes nine times.
        let [rows, loads, outputs] = count(&sharing, 200);
        assert!((rows / 20.0 / (659.0 + 9.0 * 19.0) - 1.0).abs() < 0.02, "{rows}");
        assert!((outputs / 2000.0 - 1.0).abs() < 0.02, "{outputs}");
        let [rows, apart, _] = count(&alone, 200);
        assert!((rows / 200.0 / 659.0 - 1.0).abs() < 0.02 && apart > 4.0 * loads, "{rows}: {apart} {loads}");
        // Where many find no room beside the beginning, nothing is shared; where few do, they are left out.
        let halves = Job { requests: 200, ..Job::of(&[all, all.sharing(640)]) };
        assert!((count(&halves, 20)[0] / 200.0 / 659.0 - 1.0).abs() < 0.02);
        assert!((count(&sharing, 20)[0] / 200.0 / 19.0 - 1.0).abs() < 0.02);
    }

    #[test]
    fn blocks_have_room_for_the_layer_that_needs_most() {
        let policy = crate::kv::policies::parse("pyramid:heavy=200,recent=20,slope=1.0").unwrap();
        let job = Job::of(&[Request::new(600, 20, 20, &*policy); 40]);
        // 220 slots and 64 more on average, 420 and 64 in the first layer; one more than 420 when they decode.
        assert_eq!((job.most_pages, job.widest_layer), (5, 8));
        let mut placement = placement(&job, 8, 300, 2, Split::all(Tier::Cpu));
        // Sequences that decode together in a block, at most.
        let mut most = |block_pages: usize| {
            placement.policy.block_pages = block_pages;
            let passes = passes(&job, &placement);
            let blocks = passes.iter().flat_map(|pass| &pass.blocks).filter(|block| block.rows == block.segments);
            blocks.map(|block| block.segments).max().unwrap()
        };
        let first = job.lengths[0].kept.at(0, 4);
        assert_eq!([599, 600, 610].map(|at| first.touches(&(at..at + 1)).count()), [8, 7, 7]);
        assert_eq!([21, 22, 28, 29].map(&mut most), [2, 3, 3, 4]);
    }

    #[test]
    fn few_places_repeat_unevenly_and_are_counted_whole() {
        let passes = |requests: usize| {
            let job = Job::uniform(requests, 512, 256);
            let passes = passes(&job, &placement(&job, 3, 16, 1, Split::all(Tier::Gpu)));
            passes.iter().map(|pass| pass.times).sum::<f64>()
        };
        // A prompt takes 32 passes and goes alone, an answer 255; three at a time.
        for requests in [24, 100, 1000] {
            let least = requests as f64 / 3.0 * (32.0 + 255.0);
            let ratio = passes(requests) / least;
            assert!((0.99..1.1).contains(&ratio), "{requests}: {} of {least}", passes(requests));
        }
    }

    #[test]
    fn a_long_job_goes_on_like_its_middle_and_a_large_one_like_its_likeness() {
        let kv = Split { gpu: 0.0, cpu: 0.4, disk: 0.6 };
        let rows = |requests: usize, sequences: usize| {
            let job = Job::uniform(requests, 100, 10);
            let placement = placement(&job, sequences, job.balanced_chunk(sequences), 4, kv);
            let passes = passes(&job, &placement);
            let total = |value: &dyn Fn(&BlockShape) -> usize| -> f64 {
                passes.iter().map(|pass| pass.times * pass.blocks.iter().map(value).sum::<usize>() as f64).sum()
            };
            // Not stores: where prompts are cut, a page is written twice, and that goes by the places.
            [total(&|block| block.rows), total(&|block| block.loads.cpu), total(&|block| block.loads.disk)]
                .map(|total| total / requests as f64)
        };
        let few = rows(800, 50);
        for (requests, sequences) in [(100_000, 50), (20_000, 1000), (100_000, 47)] {
            for (many, few) in rows(requests, sequences).into_iter().zip(few) {
                assert!((many / few - 1.0).abs() < 0.05, "{requests}, {sequences}: {many} {few}");
            }
        }
    }
}
