//! One anonymous mapping, carved into regions before the first token.
//!
//! **Invariant:** an arena never grows; carving past its size is a bug and asserts, because sizes are summed
//! and compared with the budget before the arena exists.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::{Bytes, Error, Result, Tier};

/// Regions start on this boundary: a cache line, and the width of the widest vector.
pub const ALIGNMENT: usize = 64;

/// Rounds a size up so that the next region stays aligned.
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// One mapping from which regions are carved in order.
pub struct Arena {
    mapping: Arc<Mapping>,
    used: usize,
}

/// A part of an arena, owned by one holder.
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the mapping alive.
    _mapping: Arc<Mapping>,
}

/// Keeps an arena's memory where it is.
pub struct Hold(Arc<Mapping>);

impl Hold {
    /// The address of the first byte.
    pub fn start(&self) -> *mut u8 {
        self.0.start.as_ptr()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.0.len
    }
}

struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Arena {
    /// Maps `bytes` of zeroed memory of `tier` for `what`; pages are committed on first use.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when the system refuses the mapping.
    pub fn new(what: &str, tier: Tier, bytes: usize) -> Result<Arena> {
        let len = bytes.max(1).next_multiple_of(1 << 21);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }
                .map_err(|_| Error::OverBudget {
                    what: what.to_owned(),
                    tier,
                    need: Bytes(len as u64),
                    have: Bytes(super::limits::available_memory()),
                    hint: Some("free some memory, or lower --cpu-memory".into()),
                })?;
        // SAFETY: the range is the mapping made above; huge pages are a hint that changes no contents.
        let _ = unsafe { madvise(start, len, Advice::LinuxHugepage) };
        let start = NonNull::new(start.cast()).expect("mmap returned null");
        Ok(Arena { mapping: Arc::new(Mapping { start, len }), used: 0 })
    }

    /// Takes the next `bytes` of the arena, zeroed.
    pub fn carve(&mut self, bytes: usize) -> Region {
        self.carve_aligned(bytes, ALIGNMENT)
    }

    /// Takes the next `bytes` that start on a multiple of `align`, a power of two up to the page size; the gap
    /// before them counts as used.
    pub fn carve_aligned(&mut self, bytes: usize, align: usize) -> Region {
        assert!(align.is_power_of_two() && (ALIGNMENT..=4096).contains(&align), "alignment {align}");
        let start = self.used.next_multiple_of(align);
        let end = start + aligned(bytes);
        assert!(end <= self.mapping.len, "arena of {} bytes asked for {end}", self.mapping.len);
        self.used = end;
        // SAFETY: start <= end <= len, so the pointer stays inside the mapping.
        let start = unsafe { self.mapping.start.add(start) };
        Region { start, len: bytes, _mapping: self.mapping.clone() }
    }

    /// Where the whole arena lies, for as long as the result is kept.
    pub fn hold(&self) -> Hold {
        Hold(self.mapping.clone())
    }

    /// Bytes handed out so far.
    pub fn used(&self) -> usize {
        self.used
    }
}

impl Region {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the region lies in a live mapping, is initialised (zero pages) and `&self` excludes writers.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; regions are disjoint, so `&mut self` is the only access to these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// The bytes as elements; regions are aligned for every element type that kernels use.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// The bytes as writable elements.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

// SAFETY: a region is a unique owner of plain bytes; no thread-bound state.
unsafe impl Send for Region {}
// SAFETY: shared access only reads.
unsafe impl Sync for Region {}
// SAFETY: the mapping itself is only an address range, unmapped once by the last owner.
unsafe impl Send for Mapping {}
// SAFETY: as above; it has no interior access of its own.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: no region is left (each holds an Arc), and the range is exactly what mmap returned.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeroed_aligned_and_disjoint() {
        let mut arena = Arena::new("test", Tier::Cpu, 1000).unwrap();
        let mut a = arena.carve(10);
        let mut b = arena.carve(100);
        assert!(a.bytes().iter().chain(b.bytes()).all(|&byte| byte == 0));
        a.bytes_mut().fill(1);
        b.as_mut_slice::<f32>().fill(2.0);
        assert!(a.bytes().iter().all(|&byte| byte == 1));
        assert_eq!(b.bytes().as_ptr() as usize % ALIGNMENT, 0);
        drop(arena);
        assert!(b.as_slice::<f32>().iter().all(|&v| v == 2.0));
    }

    #[test]
    fn regions_start_where_asked() {
        let mut arena = Arena::new("test", Tier::Cpu, 1 << 20).unwrap();
        arena.carve(10);
        let page = arena.carve_aligned(5000, 4096);
        assert_eq!(page.bytes().as_ptr() as usize % 4096, 0);
        assert_eq!(arena.used(), 4096 + aligned(5000));
    }

    #[test]
    #[should_panic(expected = "asked for")]
    fn carving_past_the_end_is_a_bug() {
        let mut arena = Arena::new("test", Tier::Cpu, 1 << 21).unwrap();
        arena.carve(3 << 21);
    }
}
