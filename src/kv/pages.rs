//! Which pages are free, and who shares the others.
//!
//! **Invariant:** a page is free or has at least one holder; the counts of all holders add up.

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
    /// The sequence's pages from position 0 on; covers `start + len`.
    pub pages: Vec<PageId>,
}

/// The free list and holder counts of a fixed number of pages.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<PageId>,
    holders: Vec<u32>,
}

impl PagePool {
    /// A pool of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        let count = PageId::try_from(pages).expect("page ids are 32 bits wide");
        PagePool { free: (0..count).rev().collect(), holders: vec![0; pages] }
    }

    /// Pages in all.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether the pool has no pages at all.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free page; the caller has reserved it, so there is one.
    pub fn take(&mut self) -> PageId {
        let page = self.free.pop().expect("admission reserves pages before they are taken");
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

    /// Drops a holder; the last one frees the page.
    pub fn release(&mut self, page: PageId) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "releasing the free page {page}");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_holder_frees() {
        let mut pool = PagePool::new(2);
        let page = pool.take();
        pool.share(page);
        pool.release(page);
        assert_eq!(pool.free(), 1);
        pool.release(page);
        assert_eq!(pool.free(), 2);
    }

    #[test]
    #[should_panic(expected = "releasing the free page")]
    fn releasing_twice_is_a_bug() {
        let mut pool = PagePool::new(1);
        let page = pool.take();
        pool.release(page);
        pool.release(page);
    }
}
