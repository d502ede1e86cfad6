//! A graphics card that can be used: found, its driver and libraries looked at, its context made.
//!
//! **Invariant:** what keeps a card from being used is told with what to do about it; nothing here panics on a machine
//! without driver, card or libraries.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use super::cublas::Cublas;
use super::libraries::{self, Which};
use super::nvrtc::Nvrtc;
use crate::error::Error;

/// The least compute capability: Turing.
const LEAST_CAPABILITY: i32 = 75;
/// The least version of CUDA that the driver must know.
const LEAST_DRIVER: i32 = 12_000;

/// Why no card can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// There is no driver, or no card: nothing to use, and nothing to wonder about.
    Absent(String),
    /// There is a card, but something that it needs is missing.
    Unusable {
        /// What.
        what: String,
        /// What to do.
        hint: String,
    },
}

impl Problem {
    /// The error for those who asked for a card.
    pub fn into_error(self) -> Error {
        let what = self.to_string();
        match self {
            Problem::Absent(_) => Error::NoDevice {
                what,
                hint: "use --device host, or install NVIDIA's driver; `tidemill doctor` says what it finds".into(),
            },
            Problem::Unusable { hint, .. } => Error::NoDevice { what, hint },
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Absent(what) | Problem::Unusable { what, .. } => f.write_str(what),
        }
    }
}

fn unusable(what: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem::Unusable { what: what.into(), hint: hint.into() }
}

/// What a driver's error is called, and what that means.
pub fn text(error: DriverError) -> String {
    let name = error.error_name().ok().map(|name| name.to_string_lossy().into_owned());
    let meaning = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
    match (name, meaning) {
        (Some(name), Some(meaning)) => format!("{meaning} ({name})"),
        (Some(name), None) => name,
        _ => format!("error {}", error.0 as i32),
    }
}

/// What is said of a card.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What the card calls itself.
    pub name: String,
    /// Its compute capability: 75 is 7.5.
    pub capability: i32,
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// The newest CUDA that the driver knows: 12080 is 12.8.
    pub driver: i32,
}

impl Facts {
    /// The major version of CUDA that the driver knows.
    pub fn major(&self) -> u32 {
        u32::try_from(self.driver / 1000).unwrap_or(0)
    }

    /// Whether the card multiplies bf16.
    pub fn has_bf16(&self) -> bool {
        self.capability >= 80
    }
}

/// A card with its context, and the libraries that it needs.
pub struct Card {
    /// What it is.
    pub facts: Facts,
    /// The compiler.
    pub nvrtc: Nvrtc,
    /// The products.
    pub cublas: Cublas,
    /// Its context.
    pub context: Arc<CudaContext>,
}

/// Where the driver's library lies, once it has been used.
pub fn driver_path() -> Option<PathBuf> {
    libraries::loaded_path("libcuda.so")
}

/// The first card that CUDA shows (`CUDA_VISIBLE_DEVICES` chooses), without a context.
///
/// # Errors
/// Why there is none that can be used.
pub fn facts() -> Result<Facts, Problem> {
    // SAFETY: looking for the library loads it and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(Problem::Absent("no NVIDIA driver is installed (libcuda.so.1 is not found)".into()));
    }
    let driver = driver_version();
    match result::init() {
        Ok(()) => {}
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(Problem::Absent("the NVIDIA driver shows no card".into()));
        }
        Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => {
            let what = "libcuda.so is a stub for linking, not the driver";
            return Err(unusable(what, "take the toolkit's `stubs` directory out of LD_LIBRARY_PATH"));
        }
        Err(error) => {
            let what = format!("the NVIDIA driver does not start: {}", text(error));
            return Err(unusable(what, "see whether `nvidia-smi` works; in a container, start it with the GPU"));
        }
    }
    let failed = |error| unusable(format!("the NVIDIA driver: {}", text(error)), "see whether `nvidia-smi` works");
    if result::device::get_count().map_err(failed)? == 0 {
        return Err(Problem::Absent("the NVIDIA driver shows no card".into()));
    }
    if driver < LEAST_DRIVER {
        let what = format!("the driver knows CUDA {}.{}, 12.0 is needed", driver / 1000, driver % 1000 / 10);
        return Err(unusable(what, "install a newer driver"));
    }
    let device = result::device::get(0).map_err(failed)?;
    // SAFETY: the device was given by the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map_err(failed);
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let name = result::device::get_name(device).map_err(failed)?;
    // SAFETY: the device was given by the driver.
    let memory_bytes = unsafe { result::device::total_mem(device) }.map_err(failed)? as u64;
    let capability = 10 * major + minor;
    if capability < LEAST_CAPABILITY {
        let what = format!("{name} has compute capability {major}.{minor}, 7.5 is needed");
        return Err(unusable(what, "use --device host"));
    }
    Ok(Facts { name, capability, processors: processors.max(1) as usize, memory_bytes, driver })
}

fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the version is written to a place that is there; the function is in every driver.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    if status == CUresult::CUDA_SUCCESS { version } else { 0 }
}

/// What to do about a library that is missing.
pub fn library_hint(which: Which, major: u32) -> String {
    format!(
        "run `pip install {}` (any environment whose python3 is on the PATH), or put the directory of {} into \
         LD_LIBRARY_PATH; or use --device host",
        which.wheel(major),
        which.name(),
    )
}

impl Card {
    /// Opens the first card.
    ///
    /// # Errors
    /// Why there is none that can be used.
    pub fn open() -> Result<Card, Problem> {
        let facts = facts()?;
        let missing = |which: Which, what: String| {
            let what = format!("there is a card, {}, but {what}", facts.name);
            unusable(what, library_hint(which, facts.major()))
        };
        let nvrtc = Nvrtc::open(facts.major()).map_err(|what| missing(Which::Nvrtc, what))?;
        let cublas = Cublas::open(facts.major()).map_err(|what| missing(Which::Cublas, what))?;
        let context = CudaContext::new(0).map_err(|error| {
            let what = format!("{}: no context can be made: {}", facts.name, text(error));
            unusable(what, "see with `nvidia-smi` what else uses the card")
        })?;
        // SAFETY: no memory is had from cudarc, whose tracking of slices is what this turns off: device memory is one
        // arena of our own that outlives every use, and marks order the streams as the fences of the schedule have it.
        unsafe { context.disable_event_tracking() };
        Ok(Card { facts, nvrtc, cublas, context })
    }

    /// Bytes of the card's memory that are free.
    ///
    /// # Errors
    /// What the driver says.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        let (free, _) = self.context.mem_get_info().map_err(|error| failed("asking for free memory", error))?;
        Ok(free as u64)
    }
}

/// A failure of the driver while something was done.
pub fn failed(doing: &str, error: DriverError) -> Error {
    Error::Device { what: format!("{doing}: {}", text(error)) }
}
