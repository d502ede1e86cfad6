//! The kernels: compiled for the card that is there, kept on disk, loaded, launched.
//!
//! **Invariant:** what is kept is named by everything that it depends on, in a directory of the user's own; what does
//! not load is compiled again.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUfunction, CUmodule, CUstream};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::card::{Card, failed};
use super::nvrtc::Nvrtc;
use crate::error::{Error, Result};

/// What every program begins with.
const COMMON: &str = include_str!("../../../kernels/common.cuh");

/// A program: its file, its text, its kernels.
pub struct Program {
    /// The file's name.
    pub file: &'static str,
    source: &'static str,
    kernels: &'static [&'static str],
    /// Kernels that cards have which multiply bf16.
    bf16_kernels: &'static [&'static str],
}

macro_rules! program {
    ($file:literal, $kernels:expr) => {
        program!($file, $kernels, [])
    };
    ($file:literal, $kernels:expr, $bf16_kernels:expr) => {
        Program {
            file: $file,
            source: include_str!(concat!("../../../kernels/", $file)),
            kernels: &$kernels,
            bf16_kernels: &$bf16_kernels,
        }
    };
}

/// All programs.
pub const PROGRAMS: [Program; 7] = [
    program!(
        "rows.cu",
        [
            "copy_lists",
            "embed_rows",
            "add_rows",
            "gather_rows",
            "norm_rows",
            "add_norm_rows",
            "norm_heads",
            "rotate_heads",
            "activate_rows",
            "add_elements",
            "add_bias",
            "convert_rows",
            "round_rows",
        ]
    ),
    program!("weights.cu", ["dequantize_panels", "linear_rows"]),
    program!("weights_tensor.cu", ["linear_tensor_rows"]),
    program!("cache.cu", ["append_kv"]),
    program!(
        "attention.cu",
        [
            "attend_f32",
            "attend_bf16",
            "attend_f16",
            "attend_int8",
            "attend_int4",
            "fold_partials",
            "attend_heavy_f32",
            "attend_heavy_bf16",
            "attend_heavy_f16",
            "attend_heavy_int8",
            "attend_heavy_int4",
        ]
    ),
    program!(
        "attention_tensor.cu",
        ["attend_tensor_f16_64", "attend_tensor_f16_96", "attend_tensor_f16_128"],
        ["attend_tensor_bf16_64", "attend_tensor_bf16_96", "attend_tensor_bf16_128"]
    ),
    program!("sample.cu", ["sample_rows"]),
];

impl Program {
    /// The whole text.
    pub fn text(&self) -> String {
        [COMMON, self.source].concat()
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: (usize, usize),
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// An argument of a kernel: at most eight bytes, the lowest first.
pub trait Argument {
    /// The argument's bytes.
    fn word(self) -> u64;
}

impl Argument for u64 {
    fn word(self) -> u64 {
        self
    }
}

impl Argument for u32 {
    fn word(self) -> u64 {
        u64::from(self)
    }
}

impl Argument for f32 {
    fn word(self) -> u64 {
        u64::from(self.to_bits())
    }
}

/// A number that kernels count in 32 bits.
impl Argument for usize {
    fn word(self) -> u64 {
        u64::from(u32::try_from(self).expect("kernels count in 32 bits"))
    }
}

/// The modules of all programs, loaded.
pub struct Kernels {
    functions: HashMap<&'static str, CUfunction>,
    modules: Vec<CUmodule>,
    context: Arc<CudaContext>,
}

// SAFETY: handles of functions and modules are the driver's, which takes them from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above; nothing changes after loading.
unsafe impl Sync for Kernels {}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for &module in &self.modules {
            // SAFETY: it was loaded here, and every launch of its functions has been waited for.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

impl Kernels {
    /// Loads all programs, compiled now or, if `cache` has them, before. `compiling` is called before the first is
    /// compiled.
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's or the driver's words.
    pub fn load(card: &Card, cache: &Path, compiling: &(dyn Fn() + Sync)) -> Result<Kernels> {
        let directory = cache.join("kernels");
        let (architecture, own_code) =
            card.nvrtc.architecture(card.facts.capability).map_err(|what| Error::Device { what })?;
        let make = Make { nvrtc: &card.nvrtc, architecture, own_code, directory: private(&directory) };
        let kept: Vec<Option<Vec<u8>>> = PROGRAMS.iter().map(|program| make.kept(program)).collect();
        if kept.iter().any(Option::is_none) {
            compiling();
        }
        let images = PROGRAMS.par_iter().zip(kept).map(|(program, kept)| match kept {
            Some(image) => Ok((image, true)),
            None => make.compile(program).map(|image| (image, false)),
        });
        let images: Vec<(Vec<u8>, bool)> = images.collect::<Result<_>>()?;
        let context = card.context.clone();
        let mut kernels = Kernels { functions: HashMap::new(), modules: Vec::new(), context };
        kernels.context.bind_to_thread().map_err(|error| failed("taking the context", error))?;
        for (program, (image, was_kept)) in PROGRAMS.iter().zip(images) {
            let has_bf16 = card.facts.has_bf16();
            match kernels.add(program, &image, has_bf16) {
                Ok(()) => make.keep(program, &image, was_kept),
                // Whatever was kept is not what it should be.
                Err(_) if was_kept => {
                    let image = make.compile(program)?;
                    kernels
                        .add(program, &image, has_bf16)
                        .map_err(|error| failed(&format!("loading {}", program.file), error))?;
                    make.keep(program, &image, false);
                }
                Err(error) => return Err(failed(&format!("loading {}", program.file), error)),
            }
        }
        Ok(kernels)
    }

    fn add(&mut self, program: &Program, image: &[u8], has_bf16: bool) -> Result<(), DriverError> {
        // Portable code is a text that ends in zero.
        let image = [image, &[0]].concat();
        // SAFETY: the image is whole and lives through the call.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        self.modules.push(module);
        let of_bf16 = program.bf16_kernels.iter().filter(|_| has_bf16);
        for &name in program.kernels.iter().chain(of_bf16) {
            let c_name = std::ffi::CString::new(name).expect("names have no zero bytes");
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(module, c_name) }?;
            self.functions.insert(name, function);
        }
        Ok(())
    }

    /// Launches a kernel on a stream.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The context is bound; the arguments are those of the kernel's signature, and what they point to is memory of the
    /// card that is as large as the kernel's contract says and lives until the stream is through.
    pub unsafe fn launch(
        &self,
        name: &str,
        shape: Shape,
        stream: CUstream,
        arguments: &mut [u64],
    ) -> Result<(), DriverError> {
        let Shape { grid: (x, y), block, shared } = shape;
        if x == 0 || y == 0 {
            return Ok(());
        }
        assert!(y <= 65_535, "{name}: {y} blocks in the second dimension");
        let grid = (u32::try_from(x).expect("blocks are counted in 32 bits"), y as u32, 1);
        let mut pointers: Vec<*mut std::ffi::c_void> =
            arguments.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        // SAFETY: passed on from the caller; the driver reads as many bytes behind every pointer as the kernel's
        // argument has, eight at most.
        unsafe { result::launch_kernel(self.functions[name], grid, (block, 1, 1), shared, stream, &mut pointers) }
    }
}

/// The words of a kernel's arguments.
macro_rules! words {
    ($($argument:expr),* $(,)?) => { [$($crate::device::cuda::kernels::Argument::word($argument)),*] };
}
pub(super) use words;

/// How programs are made and kept.
struct Make<'a> {
    nvrtc: &'a Nvrtc,
    architecture: String,
    own_code: bool,
    /// Where they are kept; none if there is no place of the user's own.
    directory: Option<PathBuf>,
}

impl Make<'_> {
    fn options(&self) -> [&str; 2] {
        [&self.architecture, "--std=c++17"]
    }

    fn path(&self, program: &Program) -> Option<PathBuf> {
        let mut hash = Sha256::new();
        for part in [program.text().as_str(), &self.options().join(" "), &format!("{:?}", self.nvrtc.version)] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let name: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let stem = program.file.trim_end_matches(".cu");
        Some(self.directory.as_ref()?.join(format!("{stem}-{name}.image")))
    }

    fn kept(&self, program: &Program) -> Option<Vec<u8>> {
        fs::read(self.path(program)?).ok().filter(|image| !image.is_empty())
    }

    fn compile(&self, program: &Program) -> Result<Vec<u8>> {
        let compiled = self.nvrtc.compile(program.file, &program.text(), &self.options(), self.own_code);
        compiled.map_err(|what| Error::Device { what })
    }

    /// Keeps an image; a full disk only costs the next run some seconds.
    fn keep(&self, program: &Program, image: &[u8], was_kept: bool) {
        let Some(path) = self.path(program).filter(|_| !was_kept) else { return };
        let partial = path.with_extension(format!("{}.partial", std::process::id()));
        let written = fs::write(&partial, image).and_then(|()| fs::rename(&partial, &path));
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
    }
}

/// A directory that nobody but the user may write to or read from, since code is loaded from it; none if it cannot be.
fn private(directory: &Path) -> Option<PathBuf> {
    fs::create_dir_all(directory.parent()?).ok()?;
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(_) => return None,
    }
    let found = fs::symlink_metadata(directory).ok()?;
    let own = found.is_dir() && found.uid() == rustix::process::getuid().as_raw();
    if own && found.mode() & 0o077 != 0 {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).ok()?;
    }
    own.then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_of_kernels_is_the_users_own() {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let made = private(&root.path().join("cache/kernels")).unwrap();
        assert_eq!(mode(&made), 0o700);
        fs::set_permissions(&made, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(private(&made), Some(made.clone()));
        assert_eq!(mode(&made), 0o700);
        let elsewhere = root.path().join("link");
        std::os::unix::fs::symlink(&made, &elsewhere).unwrap();
        assert_eq!(private(&elsewhere), None);
    }
}
