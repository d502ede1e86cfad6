//! Which keys and values of a sequence stay, once there are more than it may keep.
//!
//! A policy says how much of a sequence is kept, as [`Kept`]; everything else (which page holds what, which keys a
//! query sees, what is evicted and when) follows from that and from positions alone.
//!
//! **Invariant:** what a query sees depends on its position, on the keys before it and on the request's own lengths:
//! never on chunks, on other sequences, or on where pages live.

use std::fmt;
use std::ops::{AddAssign, Range};

use super::layout::{PAGE_POSITIONS, pages_for};

/// A way of bounding the cache.
pub trait KvPolicy: fmt::Display + fmt::Debug + Send + Sync {
    /// What is kept of a sequence with a prompt of `prompt_len` tokens that may generate `max_tokens`.
    fn kept(&self, prompt_len: usize, max_tokens: usize) -> Kept;

    /// Whether it evicts by the attention that keys receive, so that pages note it.
    fn needs_scores(&self) -> bool {
        false
    }

    /// Whether positions are counted within the cache, so that a sequence may outgrow the model's context.
    fn outgrows_context(&self) -> bool {
        false
    }
}

/// What is kept of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Everything.
    #[default]
    All,
    /// The first `start` positions and the `recent` latest ones, the query's own included. Its position among them is
    /// what the first ones are rotated against (StreamingLLM, arXiv 2309.17453).
    ///
    /// Pages of the window are used in turn.
    Window {
        /// Positions at the beginning.
        start: usize,
        /// Latest positions.
        recent: usize,
    },
    /// The `recent` latest positions and, of the others, the `heavy` ones that received most attention so far (H2O,
    /// arXiv 2306.14048).
    ///
    /// In a prompt, eviction happens at positions that are multiples of `stretch` and at its end; after it, at every
    /// token. What is new goes to the slot after the last one that is taken, and after an eviction fills the slots that
    /// became free: so the slots that are taken are always the first ones. Where spread evenly, a sequence gives back
    /// the pages that it does not need any more when its prompt has been read.
    Heavy {
        /// Positions that are kept for their scores.
        heavy: usize,
        /// Latest positions.
        recent: usize,
        /// Where the prompt ends.
        prompt_len: usize,
        /// Positions of a prompt between two evictions, in whole pages; [`WHOLE_PROMPT`] where there is none before its
        /// end.
        stretch: usize,
        /// Which layers and heads have more of the heavy ones than others.
        spread: Spread,
    },
}

/// How the heavy hitters of a sequence are spread over a model. What [`Kept`] counts are averages, unless it was asked
/// for a layer ([`Kept::at`]): all spreads keep as many keys in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Spread {
    /// Every KV head of every layer has as many.
    #[default]
    Even,
    /// Fewer with depth, in a straight line (the pyramid of PyramidInfer, arXiv 2405.12532): the first layer has
    /// `slope` thousandths more than the average, the last one as many fewer.
    ///
    /// A layer that needs more pages than the average uses frames of the layer at the same distance from the other
    /// end, which needs as many fewer.
    Depth {
        /// Thousandths.
        slope: u16,
    },
    /// The heads of a layer share theirs: what receives least attention goes, whichever head it belongs to, as long as
    /// that head keeps `least` (sharing a budget is Ada-KV's, arXiv 2407.11550; FastGen, arXiv 2310.01801, chooses per
    /// head by its attention, which kept no more: bench_results/fastgen-choice.md).
    ///
    /// Heads use parts of pages in the order in which they need them, and pages note whose they are.
    Heads {
        /// Heavy hitters that every head keeps.
        least: usize,
    },
}

impl Kept {
    /// What a layer keeps.
    pub fn at(self, layer: usize, num_layers: usize) -> Kept {
        match self {
            Kept::Heavy { heavy, recent, prompt_len, stretch, spread: Spread::Depth { slope } } => {
                // From one end to the other; opposite in layers at the same distance from both.
                let depth = (num_layers - 1) as i64 - 2 * layer as i64;
                let more = heavy as i64 * i64::from(slope) * depth / (1000 * (num_layers.max(2) - 1) as i64);
                let heavy = heavy.saturating_add_signed(more as isize);
                Kept::Heavy { heavy, recent, prompt_len, stretch, spread: Spread::Even }
            }
            other => other,
        }
    }

    /// Whether layers keep different amounts.
    pub fn depends_on_layer(self) -> bool {
        matches!(self, Kept::Heavy { spread: Spread::Depth { .. }, .. })
    }

    /// Where a layer's page `index` lies: in which of the sequence's pages, and whether in the frame of the layer at
    /// the same distance from the other end.
    pub fn place(self, index: usize) -> (usize, bool) {
        let own = self.most_pages();
        // The other layer's frames that it needs last.
        if index < own { (index, false) } else { (2 * own - 1 - index, true) }
    }

    /// Pages that a sequence holds at most.
    fn most_pages(self) -> usize {
        match self {
            Kept::All => usize::MAX,
            Kept::Window { start, recent } => pages_for(start) + ring(recent),
            Kept::Heavy { heavy, recent, stretch, spread, .. } => {
                let most = heavy + recent + stretch;
                match spread {
                    Spread::Even => pages_for(most),
                    // Two layers have 2 * most slots, each in whole pages.
                    Spread::Depth { .. } => ((2 * most + 2 * (PAGE_POSITIONS - 1)) / PAGE_POSITIONS).div_ceil(2),
                    // So have all heads together.
                    Spread::Heads { .. } => pages_for(most + PAGE_POSITIONS - 1),
                }
            }
        }
    }

    /// Positions that stay after an eviction; none where nothing is evicted.
    pub fn capacity(self) -> Option<usize> {
        match self {
            Kept::All => None,
            Kept::Window { start, recent } => Some(start + recent),
            Kept::Heavy { heavy, recent, .. } => Some(heavy + recent),
        }
    }

    /// Pages that a sequence has to hold while the positions before `end` are computed.
    pub fn pages(self, end: usize) -> usize {
        match self {
            // Every token evicts one.
            Kept::Heavy { heavy, recent, prompt_len, spread: Spread::Even, .. } if end > prompt_len => {
                pages_for(end.min(heavy + recent + 1))
            }
            // No head and no layer has more slots than there are positions.
            _ => pages_for(end).min(self.most_pages()),
        }
    }

    /// Pages that a sequence goes on with when the positions before `end` have been computed.
    pub fn held(self, end: usize) -> usize {
        match self {
            Kept::Heavy { prompt_len, .. } if end == prompt_len => self.pages(end).min(self.pages(end + 1)),
            _ => self.pages(end),
        }
    }

    /// Pages that a sequence which has computed `computed` positions will hold before its prompt has been read; none
    /// where that has been, or gives nothing back.
    pub fn reading(self, computed: usize) -> usize {
        match self {
            Kept::Heavy { prompt_len, .. } if computed < prompt_len => self.pages(prompt_len),
            Kept::All | Kept::Window { .. } | Kept::Heavy { .. } => 0,
        }
    }

    /// Pages that a sequence of `positions` positions has had to hold at the same time.
    pub fn most_held(self, positions: usize) -> usize {
        match self {
            Kept::Heavy { prompt_len, .. } => self.pages(positions.min(prompt_len)).max(self.pages(positions)),
            Kept::All | Kept::Window { .. } => self.pages(positions),
        }
    }

    /// Pages that a single layer of such a sequence works with, at most.
    pub fn widest_layer(self, positions: usize, num_layers: usize) -> usize {
        // The first layer has the most.
        self.at(0, num_layers).most_held(positions).max(self.most_held(positions))
    }

    /// Which of the sequence's pages holds tile `tile`: 64 positions, or 64 slots where positions have no fixed place.
    pub fn page(self, tile: usize) -> usize {
        match self {
            Kept::Window { start, recent } => {
                let first = pages_for(start);
                if tile < first { tile } else { first + (tile - first) % ring(recent) }
            }
            Kept::All | Kept::Heavy { .. } => tile,
        }
    }

    /// Slots that are taken when `position` is about to be stored, of pages with slots.
    pub fn slots(self, position: usize) -> usize {
        let Kept::Heavy { heavy, recent, prompt_len, stretch, .. } = self else { return position };
        let evicted = if position < prompt_len { position / stretch * stretch } else { position };
        evicted.min(heavy + recent) + position - evicted
    }

    /// Where the stretch of positions that `position` belongs to ends: what follows is computed after an eviction.
    pub fn stretch_end(self, position: usize) -> usize {
        match self {
            Kept::Heavy { prompt_len, stretch, .. } if position < prompt_len => {
                ((position / stretch + 1) * stretch).min(prompt_len)
            }
            Kept::Heavy { .. } => position + 1,
            Kept::All | Kept::Window { .. } => usize::MAX,
        }
    }

    /// Keys that the query at `position` sees, its own included.
    pub fn keys(self, position: usize) -> usize {
        match self {
            Kept::Window { start, recent } => (position + 1).min(start + recent),
            Kept::All | Kept::Heavy { .. } => self.slots(position) + 1,
        }
    }

    /// What the positions `range` take beside attention.
    pub fn upkeep(self, range: &Range<usize>) -> Upkeep {
        let mut upkeep = Upkeep::default();
        match self {
            Kept::All | Kept::Window { start: 0, .. } => {}
            Kept::Window { start, recent } => {
                upkeep.turned = range.end.saturating_sub(range.start.max(start + recent)) as u64;
            }
            Kept::Heavy { heavy, recent, .. } => {
                let mut position = range.start;
                while position < range.end {
                    let (stretch_end, before) = (self.stretch_end(position), self.slots(position));
                    let stop = stretch_end.min(range.end);
                    let (len, taken) = (stop - position, before + stop - position);
                    upkeep.scored += (len * before + len * (len + 1) / 2) as u64;
                    if stop == stretch_end {
                        // A page's worth of keys at a time.
                        let left = (heavy + recent..taken).rev().step_by(PAGE_POSITIONS).map(|last| last as u64 + 1);
                        upkeep.sifted += left.sum::<u64>();
                        upkeep.evicted += taken.saturating_sub(heavy + recent) as u64;
                    }
                    position = stop;
                }
            }
        }
        upkeep
    }

    /// How far a segment that begins at `range.start` can go within `range`: pages that its queries still read must not
    /// be written again, and where a prompt ends pages are given back.
    pub fn reach(self, range: &Range<usize>) -> usize {
        match self {
            Kept::Window { start, recent } => {
                let tile = self.oldest(range.start) / PAGE_POSITIONS;
                let first = tile.max(pages_for(start));
                range.end.min((first + ring(recent)) * PAGE_POSITIONS)
            }
            Kept::Heavy { prompt_len, .. } if range.start < prompt_len => range.end.min(prompt_len),
            Kept::All | Kept::Heavy { .. } => range.end,
        }
    }

    /// The oldest position of the window of the query at `position`.
    fn oldest(self, position: usize) -> usize {
        match self {
            Kept::Window { recent, .. } => (position + 1).saturating_sub(recent),
            Kept::All | Kept::Heavy { .. } => 0,
        }
    }

    /// The sequence's pages that the positions `range` find something in.
    pub fn reads(self, range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let end = self.read_end(range.start);
        let (before, from) = match self {
            Kept::Window { start, .. } => {
                let (start, from) = (pages_for(start), self.oldest(range.start) / PAGE_POSITIONS);
                (start.min(from).min(end), from)
            }
            Kept::All | Kept::Heavy { .. } => (0, 0),
        };
        (0..before).chain(from..end).map(move |tile| self.page(tile))
    }

    /// The first tile that holds nothing when `position` is about to be stored.
    fn read_end(self, position: usize) -> usize {
        match self {
            Kept::Heavy { spread: Spread::Heads { .. }, .. } => self.pages(position),
            _ => pages_for(self.slots(position)),
        }
    }

    /// The sequence's pages that the positions `range` are stored into, or change.
    pub fn writes(self, range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let tiles = match self {
            Kept::All | Kept::Window { .. } => range.start / PAGE_POSITIONS..pages_for(range.end),
            // Every key's score is written.
            Kept::Heavy { .. } => 0..self.pages(range.end),
        };
        tiles.map(move |tile| self.page(tile))
    }

    /// All pages that the positions `range` need.
    pub fn touches(self, range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let read = self.read_end(range.start);
        let later = match self {
            Kept::All | Kept::Window { .. } => read..pages_for(range.end),
            Kept::Heavy { .. } => read..self.pages(range.end),
        };
        self.reads(range).chain(later.map(move |tile| self.page(tile)))
    }

    /// Positions of the first `positions` that are gone, on average over the layers.
    pub fn evicted_of_layers(self, positions: usize, num_layers: usize) -> usize {
        match self.depends_on_layer() {
            true => {
                (0..num_layers).map(|layer| self.at(layer, num_layers).evicted(positions)).sum::<usize>() / num_layers
            }
            false => self.evicted(positions),
        }
    }

    /// Positions of the first `positions` that are gone.
    pub fn evicted(self, positions: usize) -> usize {
        match self {
            Kept::All => 0,
            Kept::Window { start, recent } => positions.saturating_sub(start + recent),
            Kept::Heavy { .. } => positions - self.slots(positions),
        }
    }
}

/// What keeping part of a sequence takes beside attention to the keys that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Keys that queries see and score, summed over the queries.
    pub scored: u64,
    /// Slots of a head that evictions look through, summed over the evictions.
    pub sifted: u64,
    /// Keys of a head that are evicted.
    pub evicted: u64,
    /// Queries that see the first positions across a gap, rotated back.
    pub turned: u64,
}

impl Upkeep {
    /// That of `times` as many sequences.
    #[must_use]
    pub fn times(self, times: f64) -> Self {
        let Upkeep { scored, sifted, evicted, turned } = self;
        let [scored, sifted, evicted, turned] =
            [scored, sifted, evicted, turned].map(|count| (count as f64 * times).round() as u64);
        Upkeep { scored, sifted, evicted, turned }
    }
}

impl AddAssign for Upkeep {
    fn add_assign(&mut self, other: Self) {
        self.scored += other.scored;
        self.sifted += other.sifted;
        self.evicted += other.evicted;
        self.turned += other.turned;
    }
}

/// Pages that a window of `recent` positions takes, wherever it begins.
fn ring(recent: usize) -> usize {
    pages_for(recent - 1) + 1
}

/// No context has as many positions; notes of pages count on it.
pub const MAX_POSITIONS: usize = 1 << 24;

/// The [`Kept::Heavy::stretch`] of prompts that are kept whole until they have been read.
pub const WHOLE_PROMPT: usize = MAX_POSITIONS;

/// Positions whose keys and values are computed: the last token sampled is not fed back.
pub fn positions(prompt_len: usize, max_tokens: usize) -> usize {
    prompt_len + max_tokens.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept() -> impl Strategy<Value = Kept> {
        prop_oneof![
            Just(Kept::All),
            (0usize..200, 1usize..300).prop_map(|(start, recent)| Kept::Window { start, recent }),
            (0usize..200, 1usize..200, 1usize..500, stretch(), spread()).prop_map(
                |(heavy, recent, prompt_len, stretch, spread)| {
                    let stretch = if spread == Spread::Even { stretch } else { PAGE_POSITIONS };
                    Kept::Heavy { heavy, recent, prompt_len, stretch, spread }
                }
            ),
        ]
    }

    fn stretch() -> impl Strategy<Value = usize> {
        prop_oneof![Just(PAGE_POSITIONS), (1usize..8).prop_map(|pages| pages * PAGE_POSITIONS), Just(WHOLE_PROMPT)]
    }

    fn spread() -> impl Strategy<Value = Spread> {
        prop_oneof![
            Just(Spread::Even),
            (0u16..=1000).prop_map(|slope| Spread::Depth { slope }),
            (0usize..100).prop_map(|least| Spread::Heads { least }),
        ]
    }

    proptest! {
        /// A sequence in any chunks: what a query reads has been written by then and not been written over since.
        #[test]
        fn what_is_read_is_there(
            kept in kept(), len in 1usize..900, chunks in prop::collection::vec(1usize..300, 1..20),
        ) {
            // The tile that a page of the list holds.
            let mut held: Vec<usize> = Vec::new();
            let (mut at, mut chunk) = (0, 0);
            while at < len {
                let to = kept.reach(&(at..len.min(at + chunks[chunk % chunks.len()])));
                chunk += 1;
                prop_assert!(to > at);
                let range = at..to;
                let reads: Vec<usize> = kept.reads(&range).collect();
                prop_assert!(reads.iter().all(|&page| page < held.len()));
                let writes: Vec<usize> = kept.writes(&range).collect();
                let mut both: Vec<usize> = [&reads[..], &writes].concat();
                both.sort_unstable();
                both.dedup();
                let mut touched: Vec<usize> = kept.touches(&range).collect();
                touched.sort_unstable();
                prop_assert_eq!(&touched, &both);
                if let Kept::All | Kept::Window { .. } = kept {
                    for tile in at / 64..pages_for(to) {
                        let page = kept.page(tile);
                        prop_assert!(page <= held.len());
                        if page == held.len() {
                            held.push(tile);
                        }
                        held[page] = tile;
                    }
                    // Every key of every query, where it should be.
                    for query in [at, to - 1] {
                        let (start, recent) = match kept {
                            Kept::Window { start, recent } => (start, recent),
                            _ => (0, usize::MAX),
                        };
                        let sees = (0..=query).filter(|&key| key < start || query - key < recent);
                        prop_assert_eq!(sees.clone().count(), kept.keys(query));
                        for key in sees {
                            prop_assert_eq!(held[kept.page(key / 64)], key / 64, "query {} key {}", query, key);
                            prop_assert!(both.contains(&kept.page(key / 64)));
                        }
                    }
                } else {
                    prop_assert!(held.len() <= kept.pages(to));
                    for position in range.clone() {
                        prop_assert!(pages_for(kept.slots(position) + 1) <= kept.pages(to));
                    }
                    held.resize(kept.held(to), 0);
                    prop_assert!(pages_for(kept.slots(to)) <= held.len());
                }
                prop_assert_eq!(held.len(), kept.held(to));
                prop_assert!(kept.reading(at) == 0 || kept.reading(at) >= kept.pages(to));
                prop_assert!(kept.held(to) <= kept.pages(to) && kept.pages(to) <= kept.most_held(len));
                at = to;
            }
        }

        /// Layers of a pyramid keep as much in all as even ones, and no two use the same frame.
        #[test]
        fn layers_lend_each_other_what_they_do_not_need(
            heavy in 0usize..400, recent in 1usize..200, slope in 0u16..=1000, num_layers in 1usize..40,
            len in 1usize..900,
        ) {
            let (prompt_len, stretch) = (300.max(len), PAGE_POSITIONS);
            let kept = Kept::Heavy { heavy, recent, prompt_len, stretch, spread: Spread::Depth { slope } };
            let mut used = std::collections::HashSet::new();
            let mut total = 0;
            for layer in 0..num_layers {
                let here = kept.at(layer, num_layers);
                total += here.capacity().unwrap();
                prop_assert!(here.pages(len) <= kept.widest_layer(len, num_layers));
                let mut touched: Vec<usize> = here.touches(&(0..len)).collect();
                touched.sort_unstable();
                prop_assert!(touched.into_iter().eq(0..here.pages(len)));
                for index in 0..here.pages(len) {
                    let (page, mirrored) = kept.place(index);
                    prop_assert!(page < kept.pages(len));
                    let frame = if mirrored { num_layers - 1 - layer } else { layer };
                    prop_assert!(used.insert((page, frame)), "page {} of layer {}", page, layer);
                }
            }
            prop_assert_eq!(total, num_layers * (heavy + recent));
        }

        /// Slots as they are defined, counted one by one.
        #[test]
        fn slots_follow_the_evictions(
            heavy in 0usize..200, recent in 1usize..200, prompt_len in 1usize..500, stretch in stretch(),
        ) {
            let kept = Kept::Heavy { heavy, recent, prompt_len, stretch, spread: Spread::Even };
            let mut taken = 0usize;
            for position in 0..prompt_len + 100 {
                prop_assert_eq!(kept.slots(position), taken);
                prop_assert!(taken < heavy + recent + stretch);
                taken += 1;
                let next = position + 1;
                let evicts = next >= prompt_len || next % stretch == 0;
                prop_assert_eq!(kept.stretch_end(position) == next, evicts);
                if evicts {
                    taken = taken.min(heavy + recent);
                }
            }
        }
    }

    #[test]
    fn what_is_kept_is_kept_up() {
        let heavy = Kept::Heavy { heavy: 60, recent: 40, prompt_len: 150, stretch: 64, spread: Spread::Even };
        let keys = |range: Range<usize>| range.map(|position| heavy.keys(position) as u64).sum::<u64>();
        // The prompt evicts at 128 and at its end, an answer at every token.
        let prompt = Upkeep { scored: keys(0..150), sifted: 128 + 122, evicted: 28 + 22, turned: 0 };
        assert_eq!(heavy.upkeep(&(0..150)), prompt);
        let token = Upkeep { scored: 101, sifted: 101, evicted: 1, turned: 0 };
        assert_eq!(heavy.upkeep(&(150..151)), token);
        // A whole prompt goes down to its capacity page by page.
        let (stretch, spread) = (WHOLE_PROMPT, Spread::Even);
        let whole = Kept::Heavy { heavy: 60, recent: 40, prompt_len: 230, stretch, spread };
        let upkeep = whole.upkeep(&(0..230));
        assert_eq!((upkeep.sifted, upkeep.evicted, upkeep.scored), (230 + 166 + 102, 130, 230 * 231 / 2));
        // However it is cut.
        for cut in [1, 64, 100, 149] {
            let mut parts = heavy.upkeep(&(0..cut));
            parts += heavy.upkeep(&(cut..150));
            assert_eq!(parts, prompt, "{cut}");
        }
        let sink = Kept::Window { start: 4, recent: 96 };
        assert_eq!(sink.upkeep(&(90..103)), Upkeep { turned: 3, ..Upkeep::default() });
        for nothing in [Kept::All, Kept::Window { start: 0, recent: 96 }] {
            assert_eq!(nothing.upkeep(&(0..500)), Upkeep::default());
        }
    }
}
