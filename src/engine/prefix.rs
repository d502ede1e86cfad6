//! Beginnings that prompts have in common: a tree over their tokens, a page each.
//!
//! A prompt enters the tree when it arrives, as a path of whole pages. What a sequence has computed of its path is
//! there for all whose paths go the same way, at once or later: who comes while it is being computed waits for it.
//! Pages stay for as long as a prompt that has not begun needs them; they are given up earlier where their room is
//! needed, and computed again.
//!
//! **Invariant:** a node is in the tree while a prompt that waits or runs goes through it. A ready node's page holds
//! the keys and values of its tokens after those of its ancestors, is held by the tree, and is never written. A
//! sequence that computes for itself what is ready does not hold the node's page: the tree gives it up where nobody
//! else does.

use std::collections::HashSet;

use super::tree::{NodeId, Tree};
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::pages::{PageId, PagePool};

/// The way of a prompt through the tree.
#[derive(Debug, Default)]
pub struct Path {
    nodes: Vec<NodeId>,
    /// How many of its pages it may take from others: it must compute what it is asked about.
    takes: usize,
    /// How many are ready, or left to another sequence.
    published: usize,
}

/// The tree.
#[derive(Debug, Default)]
pub struct Prefixes {
    tree: Tree<(), Node>,
    /// Ready nodes whose pages only the tree holds.
    idle: usize,
}

#[derive(Debug, Default)]
struct Node {
    /// Prompts that have not begun.
    waiting: usize,
    /// Sequences that go through it, and those of them that hold its page.
    running: usize,
    holding: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Absent,
    /// By the sequence of this number.
    Computing(u64),
    Ready(PageId),
}

/// What a prompt finds of its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// So many pages that it can take.
    Pages(usize),
    /// A page that is being computed.
    Soon,
}

impl Prefixes {
    /// A prompt that waits. It takes no page that holds its last token or one from `from` on.
    pub fn enter(&mut self, tokens: &[u32], from: usize) -> Path {
        let (nodes, takes) = (self.tree.walk((), tokens), from.min(tokens.len() - 1) / PAGE_POSITIONS);
        nodes.iter().for_each(|&node| self.tree[node].waiting += 1);
        Path { nodes, takes, published: 0 }
    }

    /// What there is of a prompt's beginning.
    pub fn look(&self, path: &Path) -> Found {
        let states = path.nodes[..path.takes].iter().map(|&node| self.tree[node].state);
        let mut ready = 0;
        for state in states {
            match state {
                State::Ready(_) => ready += 1,
                State::Computing(_) => return Found::Soon,
                State::Absent => break,
            }
        }
        Found::Pages(ready)
    }

    /// A prompt begins as the sequence of this number: gives the pages that it takes from others, which it holds from
    /// now on. What nobody computes it will.
    pub fn begin(&mut self, path: &mut Path, sequence: u64, pool: &mut PagePool) -> Vec<PageId> {
        let Found::Pages(taken) = self.look(path) else { panic!("the prompt waits for its beginning") };
        let mut pages = Vec::with_capacity(taken);
        for (index, &node) in path.nodes.iter().enumerate() {
            let node = &mut self.tree[node];
            (node.waiting, node.running) = (node.waiting - 1, node.running + 1);
            match node.state {
                State::Ready(page) if index < taken => {
                    self.idle -= usize::from(node.is_idle());
                    node.holding += 1;
                    pool.share(page);
                    pages.push(page);
                }
                State::Absent => node.state = State::Computing(sequence),
                State::Ready(_) | State::Computing(_) => {}
            }
        }
        path.published = taken;
        pages
    }

    /// Another sequence of the same prompt goes on from what one has computed, and holds the pages that it does.
    pub fn join(&mut self, path: &Path, pages: &[PageId]) -> Path {
        for (&node, &page) in path.nodes.iter().zip(pages) {
            let node = &mut self.tree[node];
            node.running += 1;
            node.holding += usize::from(node.state == State::Ready(page));
        }
        Path { nodes: path.nodes.clone(), takes: path.takes, published: path.nodes.len() }
    }

    /// What the sequence has computed by now, so many positions in `pages`, is ready.
    pub fn publish(&mut self, path: &mut Path, sequence: u64, computed: usize, pages: &[PageId], pool: &mut PagePool) {
        let upto = path.nodes.len().min(computed / PAGE_POSITIONS);
        while path.published < upto {
            let node = &mut self.tree[path.nodes[path.published]];
            let stale = match node.state {
                State::Computing(other) => (other == sequence).then_some(None),
                // What another sequence began and did not end.
                State::Absent => Some(None),
                // There is no need for two.
                State::Ready(page) => node.is_idle().then_some(Some(page)),
            };
            if let Some(stale) = stale {
                self.idle -= usize::from(stale.is_some());
                stale.into_iter().for_each(|page| pool.release(page));
                let page = pages[path.published];
                pool.share(page);
                (node.state, node.holding) = (State::Ready(page), 1);
            }
            path.published += 1;
        }
    }

    /// The sequence, which holds `pages`, has ended; what it has not computed somebody else must.
    pub fn end(&mut self, path: &Path, sequence: u64, pages: &[PageId], pool: &mut PagePool) {
        for (index, &id) in path.nodes.iter().enumerate().rev() {
            let node = &mut self.tree[id];
            node.running -= 1;
            match node.state {
                State::Computing(other) if other == sequence => node.state = State::Absent,
                State::Ready(page) if pages.get(index) == Some(&page) => {
                    node.holding -= 1;
                    self.idle += usize::from(node.is_idle());
                }
                _ => {}
            }
            self.drop_unneeded(id, pool);
        }
    }

    /// How many of a sequence's first pages other sequences hold too, so that it will find them there.
    pub fn held_by_others(&self, path: &Path, pages: &[PageId]) -> usize {
        let nodes = path.nodes[..path.takes].iter().map(|&node| &self.tree[node]);
        nodes.zip(pages).take_while(|(node, page)| node.state == State::Ready(**page) && node.holding > 1).count()
    }

    /// How many of a sequence's pages no other sequence holds, though the tree does.
    pub fn held_alone(&self, path: &Path, pages: &[PageId]) -> usize {
        let nodes = path.nodes.iter().map(|&node| &self.tree[node]);
        nodes.zip(pages).filter(|(node, page)| node.state == State::Ready(**page) && node.holding == 1).count()
    }

    fn drop_unneeded(&mut self, id: NodeId, pool: &mut PagePool) {
        let node = &mut self.tree[id];
        if node.waiting + node.running > 0 {
            return;
        }
        self.idle -= usize::from(node.is_idle());
        if let State::Ready(page) = node.state {
            pool.release(page);
        }
        self.tree.remove(id);
    }

    /// Pages that the tree alone holds.
    pub fn idle_pages(&self) -> usize {
        self.idle
    }

    /// How many of the first `taken` pages of a way the tree alone holds.
    pub fn idle_pages_of(&self, path: &Path, taken: usize) -> usize {
        path.nodes[..taken].iter().filter(|&&node| self.tree[node].is_idle()).count()
    }

    /// Gives up `count` pages that the tree alone holds: the ends of beginnings first.
    pub fn give_up(&mut self, count: usize, pool: &mut PagePool) {
        let idle = self.tree.nodes().filter(|(_, node)| node.is_idle());
        let mut idle: Vec<(usize, NodeId)> = idle.map(|(id, _)| (self.tree.depth(id), id)).collect();
        // A page is of no use without those before it.
        idle.sort_unstable_by(|a, b| b.cmp(a));
        for (_, id) in idle.into_iter().take(count) {
            let node = &mut self.tree[id];
            if let State::Ready(page) = std::mem::replace(&mut node.state, State::Absent) {
                pool.release(page);
                self.idle -= 1;
            }
        }
    }
}

/// Ways that were walked, one after the other.
#[derive(Debug, Default)]
pub struct Seen(HashSet<NodeId>);

impl Seen {
    /// Walks a way; gives how many of its first tokens lie on one that was walked before.
    pub fn walk(&mut self, path: &Path) -> usize {
        let shared = path.nodes[..path.takes].iter().take_while(|node| self.0.contains(node)).count();
        self.0.extend(&path.nodes);
        shared * PAGE_POSITIONS
    }
}

impl Node {
    fn is_idle(&self) -> bool {
        self.holding == 0 && matches!(self.state, State::Ready(_))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// A sequence of the model below.
    struct Running {
        tokens: Vec<u32>,
        path: Path,
        number: u64,
        computed: usize,
        pages: Vec<PageId>,
    }

    /// Tokens whose pages are all of one kind.
    fn prompt(kinds: &[u32], tail: usize) -> Vec<u32> {
        kinds.iter().flat_map(|&kind| [kind; PAGE_POSITIONS]).chain((0..tail as u32).map(|token| 100 + token)).collect()
    }

    /// A page behind one that nobody computed after all is of no use to a prompt that could take it, and not kept.
    #[test]
    fn what_cannot_be_taken_is_given_up() {
        let (mut pool, mut tree) = (PagePool::new([6, 0, 0], 0), Prefixes::default());
        let both = prompt(&[0, 1], 3);
        let [mut a, mut b, c] =
            [(&both[..70], 70), (&both[..], 0), (&both[..], 130)].map(|(t, from)| tree.enter(t, from));
        tree.begin(&mut a, 1, &mut pool);
        // It takes nothing, so it does not wait.
        assert_eq!((tree.look(&b), tree.look(&c)), (Found::Pages(0), Found::Soon));
        tree.begin(&mut b, 2, &mut pool);
        tree.end(&a, 1, &[], &mut pool);
        let pages = [(); 3].map(|()| pool.take());
        tree.publish(&mut b, 2, 64, &pages, &mut pool);
        assert_eq!(tree.look(&c), Found::Soon, "what the first one left is there, the second page is on its way");
        tree.publish(&mut b, 2, 131, &pages, &mut pool);
        assert_eq!(tree.look(&c), Found::Pages(2));
        tree.end(&b, 2, &pages, &mut pool);
        pages.iter().for_each(|&page| pool.release(page));
        assert_eq!((pool.free(), tree.idle_pages()), (4, 2));
        tree.give_up(1, &mut pool);
        assert_eq!((pool.free(), tree.look(&c)), (5, Found::Pages(1)));
        tree.give_up(9, &mut pool);
        assert_eq!((pool.free(), tree.look(&c)), (6, Found::Pages(0)));
    }

    /// A prompt that may not take its last page leaves no second one with the tree, nor holds the first.
    #[test]
    fn what_is_computed_again_takes_the_place_of_what_was_ready() {
        let (mut pool, mut tree) = (PagePool::new([4, 0, 0], 0), Prefixes::default());
        let tokens = prompt(&[0, 1], 0);
        let [mut a, mut b] = [(); 2].map(|()| tree.enter(&tokens, usize::MAX));
        tree.begin(&mut a, 1, &mut pool);
        let pages = [(); 2].map(|()| pool.take());
        tree.publish(&mut a, 1, 128, &pages, &mut pool);
        tree.end(&a, 1, &pages, &mut pool);
        pages.iter().for_each(|&page| pool.release(page));
        let mut pages = tree.begin(&mut b, 2, &mut pool);
        assert_eq!((pages.len(), tree.idle_pages(), pool.free()), (1, 1, 2), "its second page is still to be had");
        pages.push(pool.take());
        tree.publish(&mut b, 2, 128, &pages, &mut pool);
        assert_eq!((tree.idle_pages(), pool.free(), tree.held_alone(&b, &pages)), (0, 2, 2));
        tree.end(&b, 2, &pages, &mut pool);
        pages.iter().for_each(|&page| pool.release(page));
        assert_eq!(pool.free(), 4);
    }

    proptest! {
        /// Whatever prompts do, a page that is taken holds the tokens that its taker has there, and in the end every
        /// page is free.
        #[test]
        fn pages_hold_what_their_takers_have(
            prompts in prop::collection::vec((prop::collection::vec(0u32..3, 0..5), 1usize..64, 0usize..400), 1..24),
            turns in prop::collection::vec((0u8..6, 0usize..24), 0..200),
        ) {
            let mut pool = PagePool::new([200, 0, 0], 0);
            let mut tree = Prefixes::default();
            // What every page holds: all tokens up to its end.
            let mut contents: HashMap<PageId, Vec<u32>> = HashMap::new();
            let mut waiting: Vec<(Vec<u32>, Path)> = Vec::new();
            let mut running: Vec<Running> = Vec::new();
            for (kinds, tail, from) in &prompts {
                let tokens = prompt(kinds, *tail);
                let path = tree.enter(&tokens, *from);
                prop_assert!(path.takes * PAGE_POSITIONS < tokens.len() && path.takes * PAGE_POSITIONS <= *from);
                waiting.push((tokens, path));
            }
            let rest = (0..1200u32).map(|turn| ((turn % 3) as u8, 0));
            for (number, (turn, which)) in turns.into_iter().chain(rest).enumerate() {
                match turn {
                    0 | 3 if !waiting.is_empty() => {
                        let which = which % waiting.len();
                        if tree.look(&waiting[which].1) == Found::Soon {
                            prop_assert!(running.iter().any(|one| one.computed < one.tokens.len()));
                            continue;
                        }
                        let (tokens, mut path) = waiting.remove(which);
                        let pages = tree.begin(&mut path, number as u64, &mut pool);
                        for (index, page) in pages.iter().enumerate() {
                            prop_assert_eq!(&contents[page][..], &tokens[..(index + 1) * PAGE_POSITIONS]);
                        }
                        let computed = pages.len() * PAGE_POSITIONS;
                        running.push(Running { tokens, path, number: number as u64, computed, pages });
                    }
                    1 | 4 if !running.is_empty() => {
                        let which = which % running.len();
                        let one = &mut running[which];
                        one.computed = one.tokens.len().min(one.computed + 50);
                        while one.pages.len() * PAGE_POSITIONS < one.computed {
                            let page = pool.take();
                            let end = one.tokens.len().min((one.pages.len() + 1) * PAGE_POSITIONS);
                            contents.insert(page, one.tokens[..end].to_vec());
                            one.pages.push(page);
                        }
                        tree.publish(&mut one.path, one.number, one.computed, &one.pages, &mut pool);
                    }
                    2 if !running.is_empty() && (number > 200 || which % 4 == 0) => {
                        let which = which % running.len();
                        // Some end before they are done.
                        if number < 200 || running[which].computed == running[which].tokens.len() {
                            let one = running.remove(which);
                            tree.end(&one.path, one.number, &one.pages, &mut pool);
                            one.pages.iter().for_each(|&page| pool.release(page));
                        }
                    }
                    5 => {
                        let (free, idle) = (pool.free(), tree.idle_pages());
                        tree.give_up(which, &mut pool);
                        prop_assert_eq!(pool.free() - free, which.min(idle));
                    }
                    _ => {}
                }
                let idle = tree.tree.nodes().filter(|(_, node)| node.is_idle()).count();
                prop_assert_eq!(idle, tree.idle_pages());
                for (_, node) in tree.tree.nodes() {
                    let State::Ready(page) = node.state else { continue };
                    let holders = running.iter().filter(|one| one.pages.contains(&page)).count();
                    prop_assert_eq!(holders, node.holding);
                }
            }
            prop_assert!(waiting.is_empty() && running.is_empty(), "{} wait, {} run", waiting.len(), running.len());
            prop_assert_eq!(pool.free(), 200);
            prop_assert!(tree.tree.is_empty());
        }
    }
}
