//! Which instruction set runs the kernels, chosen once at run time.
//!
//! **Invariant:** a kernel body runs for an instruction set only after the processor said that it has it.
#[cfg(target_arch = "x86_64")]
use super::dot;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Any processor.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// The same with VNNI of 256 bits (AVX-VNNI).
    Avx2Vnni,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// The same with VNNI, and AMX for products of bytes.
    Amx,
}

/// A kernel body, generic over the vector type.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Runs the body.
    ///
    /// # Safety
    /// `V`'s instruction set must exist; implementations must be `#[inline(always)]` so that they are compiled
    /// with it.
    unsafe fn run<V: Lanes, R: Registers>(self) -> Self::Output;
}

/// How large a matrix product's register tile is on an instruction set.
pub trait Registers {
    /// Rows of a full tile.
    const ROWS: usize;
    /// Vectors per row.
    const VECTORS: usize;
}

/// Register tile of 512-bit code: 28 accumulators of 32 registers.
pub struct Wide;
impl Registers for Wide {
    const ROWS: usize = 14;
    const VECTORS: usize = 2;
}

/// Plain code goes row by row: it is there to be right.
pub struct Single;
impl Registers for Single {
    const ROWS: usize = 1;
    const VECTORS: usize = 1;
}

/// Register tile of 256-bit code: 12 accumulators of 16 registers.
pub struct Narrow;
impl Registers for Narrow {
    const ROWS: usize = 6;
    const VECTORS: usize = 1;
}

/// Asks for memory to be brought into the second cache, where the processor can be asked.
#[inline(always)]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, and nothing is read that a program could see.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

impl Isa {
    /// The best set that this processor has.
    pub fn detect() -> Isa {
        Isa::all().into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// All sets, slowest first.
    pub fn all() -> [Isa; 5] {
        [Isa::Portable, Isa::Avx2, Isa::Avx2Vnni, Isa::Avx512, Isa::Amx]
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => dot::has_vnni() && dot::amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Rows of a full register tile.
    pub fn tile_rows(self) -> usize {
        match self {
            Isa::Amx | Isa::Avx512 => Wide::ROWS,
            Isa::Avx2Vnni | Isa::Avx2 => Narrow::ROWS,
            Isa::Portable => Single::ROWS,
        }
    }

    /// Runs `kernel` compiled for this set.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_available(), "{self:?} kernels on a processor without it");
        match self {
            // SAFETY: plain code runs everywhere.
            Isa::Portable => unsafe { kernel.run::<Portable, Single>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: availability was asserted above.
            Isa::Avx2Vnni | Isa::Avx2 => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: availability was asserted above.
            Isa::Amx | Isa::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not available"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function is only entered where the set exists.
    unsafe { kernel.run::<Avx2, Narrow>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function is only entered where the set exists.
    unsafe { kernel.run::<Avx512, Wide>() }
}
