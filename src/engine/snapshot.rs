//! What caches that evict hold after a beginning that prompts have in common.
//!
//! Pages of such caches change with every query, so they cannot be shared. But what they hold after whole pages of a
//! prompt follows from these tokens and from what is kept alone. So a sequence that computes a beginning which others
//! wait for leaves copies of its pages behind where their ways part from its own, and they begin with those.
//!
//! **Invariant:** a snapshot's pages are held by the tree and never written; they are what any sequence of its class
//! has after its tokens. A prompt waits for a snapshot only while a sequence is on its way to it, and who is on its way
//! to somebody's snapshot stops there.

use super::prefix::Found;
use super::tree::{NodeId, Tree};
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::pages::{PageId, PagePool};
use crate::kv::policy::{Kept, WHOLE_PROMPT};

/// The way of a prompt through the tree: pages of tokens whose keys and values it may have from others.
#[derive(Debug, Default)]
pub struct Trail {
    nodes: Vec<NodeId>,
    /// How many of them its sequence has passed.
    passed: usize,
}

/// The tree; its roots are sequences that keep the same of all prompts.
#[derive(Debug, Default)]
pub struct Snapshots {
    tree: Tree<Kept, Node>,
    /// Pages of all snapshots.
    held: usize,
}

#[derive(Debug, Default)]
struct Node {
    /// Prompts that have not begun, and sequences, that go through it; of these, who has not passed it.
    waiting: usize,
    running: usize,
    coming: usize,
    /// The pages of the snapshot, if there is one.
    snapshot: Option<Vec<PageId>>,
}

impl Snapshots {
    /// A prompt that waits, of a cache that evicts. It takes nothing that knows its last token or one from `from` on.
    pub fn enter(&mut self, tokens: &[u32], from: usize, kept: Kept) -> Trail {
        let takes = from.min(tokens.len() - 1) / PAGE_POSITIONS;
        let nodes = self.tree.walk(class(kept), &tokens[..takes * PAGE_POSITIONS]);
        nodes.iter().for_each(|&node| self.tree[node].waiting += 1);
        Trail { nodes, passed: 0 }
    }

    fn of<'a>(&'a self, trail: &'a Trail) -> impl DoubleEndedIterator<Item = &'a Node> + ExactSizeIterator {
        trail.nodes.iter().map(|&id| &self.tree[id])
    }

    /// What there is of a prompt's beginning.
    pub fn look(&self, trail: &Trail) -> Found {
        let last = |is: fn(&Node) -> bool| self.of(trail).rposition(is).map_or(0, |index| index + 1);
        let (ready, coming) = (last(|node| node.snapshot.is_some()), last(|node| node.coming > 0));
        if coming > ready { Found::Soon } else { Found::Pages(ready) }
    }

    /// A prompt begins: gives how many positions there is a snapshot of, and its pages, which the caller holds too.
    pub fn begin(&mut self, trail: &Trail, pool: &mut PagePool) -> (usize, Vec<PageId>) {
        let Found::Pages(ready) = self.look(trail) else { panic!("the prompt waits for its beginning") };
        let last = ready.checked_sub(1).map(|last| &self.tree[trail.nodes[last]]);
        let pages = last.and_then(|node| node.snapshot.clone()).unwrap_or_default();
        pages.iter().for_each(|&page| pool.share(page));
        for &id in &trail.nodes {
            let node = &mut self.tree[id];
            (node.waiting, node.running) = (node.waiting - 1, node.running + 1);
            // Nobody else wants it.
            if node.waiting == 0 {
                self.drop_snapshot(id, pool);
            }
        }
        (ready * PAGE_POSITIONS, pages)
    }

    /// The prompt that has begun is a sequence that has `computed` positions.
    pub fn set_out(&mut self, trail: &mut Trail, computed: usize) {
        trail.passed = trail.nodes.len().min(computed / PAGE_POSITIONS);
        for &id in &trail.nodes[trail.passed..] {
            self.tree[id].coming += 1;
        }
    }

    /// Where a sequence must stop next: behind the next pages after which somebody who waits goes another way, or may
    /// take no more.
    pub fn next_point(&self, trail: &Trail) -> Option<usize> {
        let waiting = |index: usize| trail.nodes.get(index).map_or(0, |&id| self.tree[id].waiting);
        let parts = |index: &usize| waiting(*index) > waiting(index + 1);
        let lacks = |index: &usize| self.tree[trail.nodes[*index]].snapshot.is_none();
        let point = (trail.passed..trail.nodes.len()).find(|index| parts(index) && lacks(index));
        point.map(|index| (index + 1) * PAGE_POSITIONS)
    }

    /// A sequence that stands where it had to stop leaves these pages, which become the tree's.
    pub fn leave(&mut self, trail: &Trail, computed: usize, pages: Vec<PageId>) {
        self.held += pages.len();
        let node = &mut self.tree[trail.nodes[computed / PAGE_POSITIONS - 1]];
        assert!(node.snapshot.replace(pages).is_none(), "one snapshot is enough");
    }

    /// A sequence has `computed` positions by now.
    pub fn pass(&mut self, trail: &mut Trail, computed: usize) {
        let upto = trail.nodes.len().min(computed / PAGE_POSITIONS);
        for &id in &trail.nodes[trail.passed..upto] {
            self.tree[id].coming -= 1;
        }
        trail.passed = upto;
    }

    /// A sequence has ended.
    pub fn end(&mut self, trail: &Trail, pool: &mut PagePool) {
        for (index, &id) in trail.nodes.iter().enumerate().rev() {
            let node = &mut self.tree[id];
            node.running -= 1;
            node.coming -= usize::from(index >= trail.passed);
            self.drop_unneeded(id, pool);
        }
    }

    /// A prompt waits no more.
    pub fn withdraw(&mut self, trail: &Trail, pool: &mut PagePool) {
        for &id in trail.nodes.iter().rev() {
            self.tree[id].waiting -= 1;
            self.drop_unneeded(id, pool);
        }
    }

    fn drop_unneeded(&mut self, id: NodeId, pool: &mut PagePool) {
        let node = &self.tree[id];
        let is_gone = node.waiting + node.running == 0;
        if node.waiting == 0 {
            self.drop_snapshot(id, pool);
        }
        if is_gone {
            self.tree.remove(id);
        }
    }

    fn drop_snapshot(&mut self, id: NodeId, pool: &mut PagePool) -> usize {
        let pages = self.tree[id].snapshot.take().unwrap_or_default();
        pages.iter().for_each(|&page| pool.release(page));
        self.held -= pages.len();
        pages.len()
    }

    /// Pages of all snapshots; each can be had by giving it up.
    pub fn pages(&self) -> usize {
        self.held
    }

    /// Gives up snapshots of `count` pages or more, if there are as many: those first that fewest wait for.
    pub fn give_up(&mut self, count: usize, pool: &mut PagePool) {
        self.give_up_below(usize::MAX, count, pool);
    }

    /// Gives up snapshots that fewer wait for than for the one that a sequence is to leave, if `count` pages are not
    /// free.
    pub fn make_way(&mut self, trail: &Trail, computed: usize, count: usize, pool: &mut PagePool) {
        let waiting = self.tree[trail.nodes[computed / PAGE_POSITIONS - 1]].waiting;
        self.give_up_below(waiting, count.saturating_sub(pool.free()), pool);
    }

    fn give_up_below(&mut self, waiting: usize, count: usize, pool: &mut PagePool) {
        if count == 0 {
            return;
        }
        let less = self.tree.nodes().filter(|(_, node)| node.snapshot.is_some() && node.waiting < waiting);
        let mut all: Vec<(usize, NodeId)> = less.map(|(id, node)| (node.waiting, id)).collect();
        all.sort_unstable();
        let mut left = count;
        for (_, id) in all {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(self.drop_snapshot(id, pool));
        }
    }
}

/// What sequences have in common that have the same after the same tokens: where the prompt ends does not count before,
/// nor how much is kept when nothing is evicted till then.
fn class(kept: Kept) -> Kept {
    match kept {
        Kept::Heavy { stretch: WHOLE_PROMPT, spread, .. } => {
            Kept::Heavy { heavy: 0, recent: 0, prompt_len: 0, stretch: WHOLE_PROMPT, spread }
        }
        Kept::Heavy { heavy, recent, stretch, spread, .. } => {
            Kept::Heavy { heavy, recent, prompt_len: 0, stretch, spread }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn kept(class: u32) -> Kept {
        Kept::Window { start: 4, recent: 10 + class as usize }
    }

    /// Tokens whose pages are all of one kind.
    fn prompt(kinds: &[u32], tail: usize) -> Vec<u32> {
        kinds.iter().flat_map(|&kind| [kind; PAGE_POSITIONS]).chain((0..tail as u32).map(|token| 100 + token)).collect()
    }

    #[test]
    fn snapshots_are_left_where_ways_part() {
        let (mut pool, mut tree) = (PagePool::new([20, 0, 0], 0), Snapshots::default());
        let enter = |tree: &mut Snapshots, kinds: &[u32]| tree.enter(&prompt(kinds, 5), usize::MAX, kept(0));
        let mut a = enter(&mut tree, &[0, 1, 2, 3]);
        assert_eq!(tree.begin(&a, &mut pool), (0, vec![]));
        tree.set_out(&mut a, 0);
        assert_eq!(tree.next_point(&a), None, "nobody waits");
        let (mut b, c) = (enter(&mut tree, &[0, 1, 2, 7]), enter(&mut tree, &[0, 9]));
        let other = tree.enter(&prompt(&[0, 1], 5), usize::MAX, kept(1));
        assert_eq!([&b, &c, &other].map(|trail| tree.look(trail)), [Found::Soon, Found::Soon, Found::Pages(0)]);
        assert_eq!(tree.next_point(&a), Some(64), "c goes another way");
        let left = vec![pool.take()];
        tree.leave(&a, 64, left.clone());
        tree.pass(&mut a, 64);
        assert_eq!([&b, &c].map(|trail| tree.look(trail)), [Found::Soon, Found::Pages(1)]);
        assert_eq!(tree.next_point(&a), Some(192), "b does after three pages");
        assert_eq!((tree.begin(&c, &mut pool), tree.pages()), ((64, left.clone()), 1), "b could still use it");
        // It ends before it comes to the next point.
        tree.end(&a, &mut pool);
        assert_eq!(tree.look(&b), Found::Pages(1));
        assert_eq!((tree.begin(&b, &mut pool), tree.pages()), ((64, left.clone()), 0), "nobody else could");
        assert_eq!(pool.free(), 19, "b and c hold it until they have copied it");
        tree.set_out(&mut b, 64);
        // Who passes where another will wait comes too late for it.
        tree.pass(&mut b, 128);
        let late = enter(&mut tree, &[0, 1, 8]);
        assert_eq!((tree.look(&late), tree.next_point(&b)), (Found::Pages(0), None));
    }

    /// A sequence of the model below.
    struct Running {
        tokens: Vec<u32>,
        trail: Trail,
        computed: usize,
    }

    proptest! {
        /// Whatever prompts do, a snapshot that is taken is of the tokens that its taker begins with, and in the end
        /// every page is free.
        #[test]
        fn snapshots_are_of_their_takers_tokens(
            prompts in prop::collection::vec(
                (prop::collection::vec(0u32..3, 0..5), 1usize..64, 0usize..400, 0u32..2), 1..24),
            turns in prop::collection::vec((0u8..6, 0usize..24), 0..200),
        ) {
            let mut pool = PagePool::new([60, 0, 0], 0);
            let mut tree = Snapshots::default();
            let mut contents: HashMap<PageId, (u32, Vec<u32>)> = HashMap::new();
            let mut waiting = Vec::new();
            let mut running: Vec<(u32, Running)> = Vec::new();
            for (kinds, tail, from, class) in &prompts {
                let tokens = prompt(kinds, *tail);
                let trail = tree.enter(&tokens, *from, kept(*class));
                prop_assert!(trail.nodes.len() * PAGE_POSITIONS < tokens.len());
                waiting.push((tokens, trail, *class));
            }
            let rest = (0..1200u32).map(|turn| ((turn % 3) as u8, 0));
            for (number, (turn, which)) in turns.into_iter().chain(rest).enumerate() {
                match turn {
                    0 | 3 if !waiting.is_empty() && (turn == 0 || which % 3 > 0) => {
                        let which = which % waiting.len();
                        if tree.look(&waiting[which].1) == Found::Soon {
                            prop_assert!(running.iter().any(|(_, one)| tree.next_point(&one.trail).is_some()));
                            continue;
                        }
                        let (tokens, mut trail, class) = waiting.remove(which);
                        let (computed, pages) = tree.begin(&trail, &mut pool);
                        for &page in &pages {
                            prop_assert_eq!(&contents[&page], &(class, tokens[..computed].to_vec()));
                            pool.release(page);
                        }
                        tree.set_out(&mut trail, computed);
                        running.push((class, Running { tokens, trail, computed }));
                    }
                    1 | 4 if !running.is_empty() => {
                        let which = which % running.len();
                        let (class, one) = &mut running[which];
                        let point = tree.next_point(&one.trail);
                        let most = point.unwrap_or(usize::MAX).min(one.tokens.len());
                        prop_assert!(most > one.computed || most == one.tokens.len());
                        one.computed = most.min(one.computed + 50);
                        if point == Some(one.computed) && pool.free() > 1 {
                            let pages = vec![pool.take(), pool.take()];
                            for &page in &pages {
                                contents.insert(page, (*class, one.tokens[..one.computed].to_vec()));
                            }
                            tree.leave(&one.trail, one.computed, pages);
                        }
                        tree.pass(&mut one.trail, one.computed);
                    }
                    2 if !running.is_empty() && (number > 200 || which % 4 == 0) => {
                        let which = which % running.len();
                        // Some end before they are done.
                        if number < 200 || running[which].1.computed == running[which].1.tokens.len() {
                            let (_, one) = running.remove(which);
                            tree.end(&one.trail, &mut pool);
                        }
                    }
                    3 if !waiting.is_empty() && which % 3 == 0 => {
                        // As samples do that are parted.
                        let (tokens, trail, class) = waiting.swap_remove(which % waiting.len());
                        tree.withdraw(&trail, &mut pool);
                        let trail = tree.enter(&tokens, usize::MAX, kept(class));
                        waiting.push((tokens, trail, class));
                    }
                    5 => {
                        let (free, held) = (pool.free(), tree.pages());
                        tree.give_up(which, &mut pool);
                        prop_assert!(pool.free() - free >= which.min(held));
                    }
                    _ => {}
                }
                prop_assert_eq!(pool.free() + tree.pages(), 60);
            }
            prop_assert!(waiting.is_empty() && running.is_empty(), "{} wait, {} run", waiting.len(), running.len());
            prop_assert_eq!(pool.free(), 60);
            prop_assert!(tree.tree.is_empty());
        }
    }
}
