//! Memory of the card: one allocation, carved before the first token; main memory that copies are fast from.
//!
//! **Invariant:** the arena never grows; buffers are disjoint, and each keeps the arena alive.

use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdeviceptr};

use crate::memory::arena::{Arena, Hold, aligned};

/// The card's memory that this process has.
struct Allocation {
    address: CUdeviceptr,
    context: Arc<CudaContext>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // When the card is lost there is nothing left to free, and nobody to tell.
        let _ = self.context.bind_to_thread();
        // SAFETY: the allocation is this one's own, and every buffer in it is gone.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// The allocation from which buffers are carved in order.
pub struct DeviceArena {
    allocation: Arc<Allocation>,
    bytes: usize,
    used: usize,
}

/// A part of the card's memory.
pub struct DeviceBuffer {
    address: CUdeviceptr,
    bytes: usize,
    /// Keeps the memory.
    _allocation: Arc<Allocation>,
}

impl DeviceArena {
    /// Takes `bytes` of the card's memory, zeroed.
    ///
    /// # Errors
    /// What the driver says: out of memory, mostly.
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<DeviceArena, DriverError> {
        context.bind_to_thread()?;
        let bytes = bytes.max(1).next_multiple_of(4096);
        // SAFETY: the context is bound; the allocation is freed once, by its last owner.
        let address = unsafe { result::malloc_sync(bytes) }?;
        let allocation = Arc::new(Allocation { address, context: context.clone() });
        // SAFETY: the range is the allocation, which nothing else knows yet; the default stream always exists.
        unsafe {
            result::memset_d8_async(address, 0, bytes, result::stream::null())?;
            result::stream::synchronize(result::stream::null())?;
        }
        Ok(DeviceArena { allocation, bytes, used: 0 })
    }

    /// Takes the next `bytes` of the arena.
    pub fn carve(&mut self, bytes: usize) -> DeviceBuffer {
        let (start, end) = (self.used, self.used + aligned(bytes));
        assert!(end <= self.bytes, "device arena of {} bytes asked for {end}", self.bytes);
        self.used = end;
        let address = self.allocation.address + start as u64;
        DeviceBuffer { address, bytes, _allocation: self.allocation.clone() }
    }

    /// Bytes handed out so far.
    pub fn used(&self) -> usize {
        self.used
    }
}

impl DeviceBuffer {
    /// The address of a byte of the buffer, from which `bytes` are to be used.
    pub fn at(&self, offset: usize, bytes: usize) -> u64 {
        assert!(offset + bytes <= self.bytes, "bytes {offset} to {} of {}", offset + bytes, self.bytes);
        self.address + offset as u64
    }

    /// The address of the first byte, from which `bytes` are to be used.
    pub fn first(&self, bytes: usize) -> u64 {
        self.at(0, bytes)
    }
}

/// An arena of main memory that the card reads and writes directly: registered as long as this is kept.
pub struct Pinned {
    context: Arc<CudaContext>,
    hold: Hold,
}

// SAFETY: the address within is only handed to the driver, which takes it from any thread.
unsafe impl Send for Pinned {}
// SAFETY: as above; nothing changes.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Registers the whole arena.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: &Arc<CudaContext>, arena: &Arena) -> Result<Pinned, DriverError> {
        let hold = arena.hold();
        context.bind_to_thread()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the range is a mapping that `hold` keeps until it is unregistered.
        unsafe { sys::cuMemHostRegister_v2(hold.start().cast(), hold.bytes(), flags) }.result()?;
        Ok(Pinned { context: context.clone(), hold })
    }

    /// The address by which kernels know bytes of the arena.
    ///
    /// # Errors
    /// What the driver says.
    pub fn mapped(&self, bytes: &[u8]) -> Result<CUdeviceptr, DriverError> {
        assert!(self.holds(bytes), "bytes of the arena");
        self.context.bind_to_thread()?;
        let mut address = 0;
        // SAFETY: the bytes lie in memory that is registered, and mapped; the address goes to a place that is there.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, bytes.as_ptr().cast_mut().cast(), 0) }.result()?;
        Ok(address)
    }

    /// Whether bytes lie within the arena.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        let within = (bytes.as_ptr() as usize).checked_sub(self.hold.start() as usize);
        within.is_some_and(|start| start + bytes.len() <= self.hold.bytes())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: it was registered, and copies from or to it are over: the device waits for its streams before.
        let _ = unsafe { sys::cuMemHostUnregister(self.hold.start().cast()) };
    }
}
