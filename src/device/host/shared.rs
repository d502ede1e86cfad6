//! A slice that tasks write in disjoint places.
//!
//! **Invariant:** tasks of one parallel loop touch disjoint elements; each use says why.
use std::marker::PhantomData;

/// A mutable slice shared by the tasks of one parallel loop.
pub struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through unsafe methods whose callers keep tasks on disjoint elements.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Shares `slice` for as long as the loop runs.
    pub fn new(slice: &'a mut [T]) -> Self {
        SharedMut { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// A pointer to element `index`, which exists.
    pub fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len);
        self.start.wrapping_add(index)
    }

    /// Elements `start .. start + len`, to read.
    ///
    /// # Safety
    /// No task writes them meanwhile.
    pub unsafe fn view(&self, start: usize, len: usize) -> &[T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds by the assertion; nobody writes by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(start), len) }
    }

    /// Elements `start .. start + len`.
    ///
    /// # Safety
    /// No other task touches them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
