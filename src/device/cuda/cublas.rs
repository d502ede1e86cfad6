//! Matrix products: the one of cuBLAS that is needed.
//!
//! **Invariant:** sums are kept in f32 and never split in ways that a workspace of ours does not hold; the handle works
//! on one stream.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr;

use super::libraries::{self, Which};
use super::nvrtc::symbol;

type Handle = *mut c_void;
type Status = c_int;

/// Element types of operands, as cudaDataType has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Element {
    /// IEEE single.
    F32 = 0,
    /// IEEE half.
    F16 = 2,
    /// bfloat16.
    Bf16 = 14,
}

impl Element {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }
}

/// A product's operands: `y = x w^T + beta y`, where x is (rows, inputs), w (outputs, inputs), both without gaps, and
/// row r of y begins `r * stride` after its first element. All are addresses in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Element type of x and w.
    pub element: Element,
    /// Rows of x and y.
    pub rows: usize,
    /// Width of x and w.
    pub inputs: usize,
    /// Width of y.
    pub outputs: usize,
    /// The rows.
    pub x: u64,
    /// The weights.
    pub w: u64,
    /// The results, f32.
    pub y: u64,
    /// Elements from row to row of y.
    pub stride: usize,
    /// 1 to add to what is in y, 0 to replace it.
    pub beta: f32,
}

type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Status;

/// The library's functions.
pub struct Cublas {
    /// Where it lies.
    pub path: PathBuf,
    /// Major and minor version.
    pub version: (c_int, c_int),
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> Status,
    set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> Status,
    gemm_ex: GemmEx,
}

/// `CUBLAS_OP_N`, `CUBLAS_OP_T`.
const PLAIN: c_int = 0;
const TRANSPOSED: c_int = 1;
/// `CUBLAS_COMPUTE_32F`: products and sums in f32, without the short cuts of TF32.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_GEMM_DEFAULT`.
const ALGORITHM: c_int = -1;

impl Cublas {
    /// Finds and opens the library, for a driver that knows CUDA up to `major`.
    ///
    /// # Errors
    /// What is missing.
    pub fn open(major: u32) -> Result<Cublas, String> {
        let opened = libraries::open(Which::Cublas, major)?;
        let library = opened.library;
        // SAFETY: the types are those of cublas_api.h, which have not changed since CUDA 11.
        let cublas = unsafe {
            (|| -> Result<Cublas, String> {
                let property: unsafe extern "C" fn(c_int, *mut c_int) -> Status = symbol(library, "cublasGetProperty")?;
                let (mut major, mut minor) = (0, 0);
                property(0, &mut major);
                property(1, &mut minor);
                Ok(Cublas {
                    path: opened.path.clone(),
                    version: (major, minor),
                    create: symbol(library, "cublasCreate_v2")?,
                    destroy: symbol(library, "cublasDestroy_v2")?,
                    set_stream: symbol(library, "cublasSetStream_v2")?,
                    set_workspace: symbol(library, "cublasSetWorkspace_v2")?,
                    gemm_ex: symbol(library, "cublasGemmEx")?,
                })
            })()
        };
        cublas.map_err(|what| format!("{}: {what}", opened.path.display()))
    }
}

/// A handle on a stream.
pub struct Products {
    library: Cublas,
    handle: Handle,
}

// SAFETY: a handle may move between threads; it is used by one at a time, the lane that computes.
unsafe impl Send for Products {}
// SAFETY: as above: every use takes the device's lock on it.
unsafe impl Sync for Products {}

impl Products {
    /// A handle, in the context that is current.
    ///
    /// # Errors
    /// The library's status.
    pub fn new(library: Cublas) -> Result<Products, String> {
        let mut handle = ptr::null_mut();
        // SAFETY: the handle is written to a place that is there.
        check(unsafe { (library.create)(&mut handle) }, "making a handle")?;
        Ok(Products { library, handle })
    }

    /// Works on a stream from now on, with `bytes` of device memory at `workspace` for itself.
    ///
    /// # Errors
    /// The library's status.
    ///
    /// # Safety
    /// Stream and memory outlive the handle's last product.
    pub unsafe fn attach(&self, stream: *mut c_void, workspace: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: passed on from the caller; setting a stream resets the workspace, so it comes first.
        unsafe {
            check((self.library.set_stream)(self.handle, stream), "setting the stream")?;
            check((self.library.set_workspace)(self.handle, workspace as *mut c_void, bytes), "setting the workspace")
        }
    }

    /// Hands a product to the stream.
    ///
    /// # Errors
    /// The library's status.
    ///
    /// # Safety
    /// The operands lie in device memory of the handle's context, whole, and live until the stream is through.
    pub unsafe fn multiply(&self, product: &Product) -> Result<(), String> {
        let Product { element, rows, inputs, outputs, x, w, y, stride, beta } = *product;
        let int = |value: usize| c_int::try_from(value).expect("widths and rows are 31 bits wide");
        let (alpha, element) = (1f32, element as c_int);
        // Rows of ours are columns of cuBLAS: y^T (outputs, rows) = w (transposed) x^T.
        // SAFETY: passed on from the caller; the factors are read before the call returns (the pointer mode is host).
        let status = unsafe {
            (self.library.gemm_ex)(
                self.handle,
                TRANSPOSED,
                PLAIN,
                int(outputs),
                int(rows),
                int(inputs),
                ptr::from_ref(&alpha).cast(),
                w as *const c_void,
                element,
                int(inputs),
                x as *const c_void,
                element,
                int(inputs),
                ptr::from_ref(&beta).cast(),
                y as *mut c_void,
                Element::F32 as c_int,
                int(stride),
                COMPUTE_F32,
                ALGORITHM,
            )
        };
        check(status, "a product")
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: the handle was made by this library, and nothing uses it any more.
        unsafe { (self.library.destroy)(self.handle) };
    }
}

fn check(status: Status, what: &str) -> Result<(), String> {
    let name = match status {
        0 => return Ok(()),
        1 => "not initialized",
        3 => "out of memory",
        7 => "invalid value",
        8 => "the card lacks a feature",
        11 => "memory cannot be reached",
        13 => "execution failed",
        14 => "internal error",
        15 => "not supported",
        _ => "an error",
    };
    Err(format!("cuBLAS, {what}: {name} ({status})"))
}
