//! Which pages are free, and who shares the others.
//!
//! **Invariant:** a page is free or has at least one holder; the counts of all holders add up.

use super::policy::Kept;

/// The number of a page in the pool.
pub type PageId = u32;

/// New positions of one sequence in a pass, and where the sequence's keys and values live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The rows of the pass that hold them, from this one on.
    pub first_row: usize,
    /// How many.
    pub len: usize,
    /// Position of the first.
    pub start: usize,
    /// The sequence's pages, in the order that `kept` counts them in; they cover `start + len`.
    pub pages: Vec<PageId>,
    /// What of the sequence is kept.
    pub kept: Kept,
}

/// The free lists and holder counts of a fixed number of pages, numbered tier by tier.
#[derive(Debug)]
pub struct PagePool {
    /// Free pages of each tier, and how many it has in all.
    tiers: [(Vec<PageId>, usize); 3],
    /// The same of the pages that are not of the cache.
    aside: (Vec<PageId>, usize),
    holders: Vec<u32>,
}

impl PagePool {
    /// A pool of free pages; `tiers` says how many each tier has. After them come `aside` pages that are not of the
    /// cache: for what sequences that are paused have computed.
    pub fn new(tiers: [usize; 3], aside: usize) -> Self {
        let mut first = 0;
        let mut list = |count: usize| {
            let last = first + PageId::try_from(count).expect("page ids are 32 bits wide");
            let free = (first..last).rev().collect();
            first = last;
            (free, count)
        };
        let (tiers, aside) = (tiers.map(&mut list), list(aside));
        PagePool { tiers, aside, holders: vec![0; first as usize] }
    }

    /// Pages of the cache.
    pub fn len(&self) -> usize {
        self.tiers.iter().map(|(_, count)| count).sum()
    }

    /// Whether the cache has no pages at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pages of the cache that nobody holds.
    pub fn free(&self) -> usize {
        self.tiers.iter().map(|(free, _)| free.len()).sum()
    }

    /// Takes `count` pages that are not of the cache; none if there are fewer.
    pub fn take_aside(&mut self, count: usize) -> Option<Vec<PageId>> {
        let (free, _) = &mut self.aside;
        let pages = free.split_off(free.len().checked_sub(count)?);
        pages.iter().for_each(|&page| self.holders[page as usize] = 1);
        Some(pages)
    }

    /// Takes a free page of the tier that is emptiest, so that every sequence has its share of every tier; the caller
    /// has made room, so there is one.
    pub fn take(&mut self) -> PageId {
        let share = |tier: &&mut (Vec<PageId>, usize)| tier.0.len() as f64 / (tier.1.max(1)) as f64;
        // The last of equals wins in `max_by`, the fastest tier should.
        let emptiest = self.tiers.iter_mut().rev().max_by(|a, b| share(a).total_cmp(&share(b)));
        let page = emptiest.and_then(|(free, _)| free.pop()).expect("room is made before pages are taken");
        self.holders[page as usize] = 1;
        page
    }

    /// Adds a holder to a held page.
    pub fn share(&mut self, page: PageId) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "sharing the free page {page}");
        *holders += 1;
    }

    /// Whether a page has several holders, so that nobody may write to it.
    pub fn is_shared(&self, page: PageId) -> bool {
        self.holders[page as usize] > 1
    }

    /// Whether a page is of the cache and has one holder, who may do with it what it wants.
    pub fn is_alone(&self, page: PageId) -> bool {
        (page as usize) < self.len() && self.holders[page as usize] == 1
    }

    /// Drops a holder; the last one frees the page.
    pub fn release(&mut self, page: PageId) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "releasing the free page {page}");
        *holders -= 1;
        if *holders == 0 {
            let mut end = 0;
            let of_page = self.tiers.iter_mut().chain([&mut self.aside]).find(|(_, count)| {
                end += count;
                (page as usize) < end
            });
            of_page.expect("every page is of a tier").0.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_holder_frees() {
        let mut pool = PagePool::new([2, 0, 0], 0);
        let page = pool.take();
        pool.share(page);
        pool.release(page);
        assert_eq!(pool.free(), 1);
        pool.release(page);
        assert_eq!(pool.free(), 2);
    }

    #[test]
    fn tiers_fill_evenly() {
        let mut pool = PagePool::new([4, 2, 2], 3);
        let mut taken: Vec<PageId> = (0..4).map(|_| pool.take()).collect();
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 4, 6]);
        taken.iter().for_each(|&page| pool.release(page));
        assert_eq!((pool.free(), pool.len()), (8, 8));
    }

    #[test]
    fn what_lies_aside_is_not_of_the_cache() {
        let mut pool = PagePool::new([1, 0, 1], 3);
        let aside = pool.take_aside(2).unwrap();
        assert!(aside.iter().all(|&page| (2..5).contains(&page)));
        assert_eq!((pool.free(), pool.len(), pool.take_aside(2)), (2, 2, None));
        let all = [pool.take(), pool.take()];
        aside.iter().chain(&all).for_each(|&page| pool.release(page));
        assert_eq!((pool.free(), pool.take_aside(3).map(|pages| pages.len())), (2, Some(3)));
    }

    #[test]
    #[should_panic(expected = "releasing the free page")]
    fn releasing_twice_is_a_bug() {
        let mut pool = PagePool::new([0, 1, 0], 0);
        let page = pool.take();
        pool.release(page);
        pool.release(page);
    }
}
