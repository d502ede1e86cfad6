//! The compiler of kernels: CUDA C++ to code for one card.
//!
//! **Invariant:** a program is destroyed on every way out; a compiler's complaint is part of the error.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::ptr;

use libloading::os::unix::Library;

use super::libraries::{self, Which};

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// The library's functions.
pub struct Nvrtc {
    /// Major and minor version.
    pub version: (c_int, c_int),
    /// Where it lies.
    pub path: PathBuf,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log: Output,
    cubin: Output,
    ptx: Output,
    arch_count: unsafe extern "C" fn(*mut c_int) -> Status,
    archs: unsafe extern "C" fn(*mut c_int) -> Status,
}

/// A pair of functions: how many bytes a program's output has, and the bytes.
struct Output {
    size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
}

/// A program that goes away with its owner.
struct Owned<'a>(&'a Nvrtc, Program);

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by this library and nothing else destroys it.
        unsafe { (self.0.destroy)(&mut self.1) };
    }
}

/// A symbol of a library as a value.
///
/// # Safety
/// `F` is the type that the library gives the function of this name.
pub unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: passed on from the caller.
    let symbol = unsafe { library.get::<F>(name) };
    symbol.map(|symbol| *symbol).map_err(|_| format!("`{name}` is missing in it"))
}

impl Nvrtc {
    /// Finds and opens the library, for a driver that knows CUDA up to `major`.
    ///
    /// # Errors
    /// What is missing.
    pub fn open(major: u32) -> Result<Nvrtc, String> {
        let opened = libraries::open(Which::Nvrtc, major)?;
        let library = opened.library;
        let in_it = |what: String| format!("{}: {what}", opened.path.display());
        // SAFETY: the types are those of nvrtc.h, which have not changed since CUDA 11.
        let nvrtc = unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status =
                symbol(library, "nvrtcVersion").map_err(in_it)?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            let output = |size: &str, get: &str| -> Result<Output, String> {
                Ok(Output { size: symbol(library, size)?, get: symbol(library, get)? })
            };
            (|| -> Result<Nvrtc, String> {
                Ok(Nvrtc {
                    version: (major, minor),
                    path: opened.path.clone(),
                    error_string: symbol(library, "nvrtcGetErrorString")?,
                    create: symbol(library, "nvrtcCreateProgram")?,
                    compile: symbol(library, "nvrtcCompileProgram")?,
                    destroy: symbol(library, "nvrtcDestroyProgram")?,
                    log: output("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?,
                    cubin: output("nvrtcGetCUBINSize", "nvrtcGetCUBIN")?,
                    ptx: output("nvrtcGetPTXSize", "nvrtcGetPTX")?,
                    arch_count: symbol(library, "nvrtcGetNumSupportedArchs")?,
                    archs: symbol(library, "nvrtcGetSupportedArchs")?,
                })
            })()
        };
        nvrtc.map_err(|what| format!("{}: {what}", opened.path.display()))
    }

    /// The option that compiles for a card of this compute capability (75 is 7.5), and whether the result is the card's
    /// own code. A card that is newer than the compiler gets the newest portable code there is.
    pub fn architecture(&self, card: c_int) -> Result<(String, bool), String> {
        let mut count = 0;
        // SAFETY: the count is written to a place that is there.
        self.check(unsafe { (self.arch_count)(&mut count) }, "asking for architectures")?;
        let mut archs: Vec<c_int> = vec![0; count.max(0) as usize];
        // SAFETY: there is room for as many architectures as there are.
        self.check(unsafe { (self.archs)(archs.as_mut_ptr()) }, "asking for architectures")?;
        if archs.contains(&card) {
            return Ok((format!("--gpu-architecture=sm_{card}"), true));
        }
        let newest = archs.into_iter().filter(|&arch| arch < card).max();
        let (major, minor) = self.version;
        let newest = newest.ok_or_else(|| {
            format!("this version ({major}.{minor}) compiles for no card as old as compute capability {card}")
        })?;
        Ok((format!("--gpu-architecture=compute_{newest}"), false))
    }

    /// Compiles a source; gives a module's image: the card's own code, else portable code.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(&self, name: &str, source: &str, options: &[&str], own_code: bool) -> Result<Vec<u8>, String> {
        let text = |text: &str| CString::new(text).expect("sources and options have no zero bytes");
        let (source, file) = (text(source), text(name));
        let mut program: Program = ptr::null_mut();
        // SAFETY: both texts end in zero and live through the call; there are no headers.
        let status =
            unsafe { (self.create)(&mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()) };
        self.check(status, &format!("reading {name}"))?;
        let program = Owned(self, program);
        let options: Vec<CString> = options.iter().map(|option| text(option)).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program exists, and the options live through the call.
        let status = unsafe { (self.compile)(program.1, options.len() as c_int, options.as_ptr()) };
        if let Err(what) = self.check(status, &format!("compiling {name}")) {
            let log = self.output(&self.log, &program).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            return Err(if log.is_empty() { what } else { format!("{what}\n{log}") });
        }
        self.output(if own_code { &self.cubin } else { &self.ptx }, &program)
    }

    fn output(&self, output: &Output, program: &Owned<'_>) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program exists.
        self.check(unsafe { (output.size)(program.1, &mut size) }, "asking for a result's size")?;
        let mut bytes = vec![0u8; size];
        // SAFETY: there is room for as many bytes as the result has.
        self.check(unsafe { (output.get)(program.1, bytes.as_mut_ptr().cast()) }, "asking for a result")?;
        Ok(bytes)
    }

    fn check(&self, status: Status, what: &str) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library gives a text of its own for any number.
        let text = unsafe { (self.error_string)(status) };
        let text = if text.is_null() {
            format!("error {status}")
        } else {
            // SAFETY: it is not null, ends in zero and is never freed.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Err(format!("NVRTC, {what}: {text}"))
    }
}
