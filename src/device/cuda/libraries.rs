//! Finding NVRTC and cuBLAS, wherever they were installed: with a toolkit, by pip or by conda.
//!
//! The driver's library is cudarc's to load (it lies where the loader looks, or there is no driver). The other two are
//! loaded here, because cudarc looks for one major version alone and in the loader's own places only, and panics where
//! a library or a symbol is missing. Both have had the same C interface since CUDA 11.
//!
//! **Invariant:** a library that was opened is never closed; what is missing is told, never a panic.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// A library that comes beside the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    Cublas,
}

impl Which {
    /// The name that people know.
    pub fn name(self) -> &'static str {
        match self {
            Which::Nvrtc => "NVRTC",
            Which::Cublas => "cuBLAS",
        }
    }

    /// What its file begins with.
    fn stem(self) -> &'static str {
        match self {
            Which::Nvrtc => "libnvrtc.so",
            Which::Cublas => "libcublas.so",
        }
    }

    /// What files of the same directory it needs begin with: wheels leave finding them to chance.
    fn companions(self) -> &'static [&'static str] {
        match self {
            Which::Nvrtc => &["libnvrtc-builtins.so"],
            Which::Cublas => &["libcublasLt.so"],
        }
    }

    /// The package of PyPI that has it for a major version of CUDA.
    pub fn wheel(self, major: u32) -> String {
        let name = match self {
            Which::Nvrtc => "nvidia-cuda-nvrtc",
            Which::Cublas => "nvidia-cublas",
        };
        if major >= 13 { name.to_owned() } else { format!("{name}-cu{major}") }
    }
}

/// A library that was opened.
pub struct Opened {
    /// Its symbols.
    pub library: &'static Library,
    /// Where it lies.
    pub path: PathBuf,
}

/// Opens a library for a driver that knows CUDA up to `major`: by name, as the loader finds it, else in the places
/// where toolkits, wheels and conda put it.
///
/// # Errors
/// What was looked for.
pub fn open(which: Which, major: u32) -> Result<Opened, String> {
    let names: Vec<String> = versions(major).map(|version| format!("{}{version}", which.stem())).collect();
    for name in &names {
        if let Some(library) = load(Path::new(name)) {
            let path = loaded_path(which.stem()).unwrap_or_else(|| PathBuf::from(name));
            return Ok(Opened { library, path });
        }
    }
    let places = Places::of_this_process().directories();
    for name in &names {
        for place in places.iter().filter(|place| place.join(name).is_file()) {
            for companion in which.companions() {
                // Kept open for the library that needs it; if it cannot be opened, that library says so.
                first_named(place, companion).and_then(|path| load(&path));
            }
            let path = place.join(name);
            if let Some(library) = load(&path) {
                return Ok(Opened { library, path });
            }
        }
    }
    Err(format!("{} is not found (looked for {} here and there)", which.name(), names.join(", ")))
}

/// Endings of file names, newest first: a driver runs what was built for its own major version and older ones.
fn versions(major: u32) -> impl Iterator<Item = String> {
    // CUDA 11's compiler is numbered by minor versions, of which the last one kept its interface.
    (11..=major.max(11)).rev().map(|version| format!(".{version}")).chain([".11.2".to_owned(), String::new()])
}

fn load(path: &Path) -> Option<&'static Library> {
    // SAFETY: NVIDIA's libraries (and the emulator's) may be loaded at any time, by any thread: their initialisers
    // touch nothing of ours.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.ok()?;
    // There are two at most, and threads of theirs may run their code until the process ends.
    Some(Box::leak(Box::new(library)))
}

/// Where a library that is loaded lies, by the beginning of its file's name.
pub fn loaded_path(stem: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let of_stem = |path: &&Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(stem));
    paths.find(of_stem).map(Path::to_owned)
}

/// The first file of a directory whose name begins so.
fn first_named(directory: &Path, stem: &str) -> Option<PathBuf> {
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(stem));
    entries(directory).into_iter().find(named)
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_unstable();
    paths
}

/// What says where libraries may lie.
struct Places {
    /// Roots of toolkits that variables name.
    toolkits: Vec<PathBuf>,
    /// Roots of environments of Python or conda: what has `lib` below it.
    prefixes: Vec<PathBuf>,
    /// Where toolkits are installed side by side.
    shelf: PathBuf,
}

impl Places {
    fn of_this_process() -> Places {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).collect();
        let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).collect();
        prefixes.extend(python_prefixes(env::var_os("PATH")));
        prefixes.extend(variable("HOME").map(|home| home.join(".local")));
        prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
        Places { toolkits, prefixes, shelf: PathBuf::from("/usr/local") }
    }

    /// Directories that may have libraries, the most particular first.
    fn directories(&self) -> Vec<PathBuf> {
        let mut directories = Vec::new();
        let toolkit = |root: &Path| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|part| root.join(part));
        self.toolkits.iter().for_each(|root| directories.extend(toolkit(root)));
        for prefix in &self.prefixes {
            directories.push(prefix.join("lib"));
            let pythons = entries(&prefix.join("lib"));
            let named =
                |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
            for python in pythons.iter().filter(named) {
                for packages in ["site-packages", "dist-packages"] {
                    let wheels = entries(&python.join(packages).join("nvidia"));
                    directories.extend(wheels.into_iter().map(|wheel| wheel.join("lib")));
                }
            }
        }
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda"));
        let shelf = entries(&self.shelf).into_iter().filter(named);
        shelf.for_each(|root| directories.extend(toolkit(&root)));
        directories.retain(|directory| directory.is_dir());
        directories
    }
}

/// Roots of the pythons on a search path.
fn python_prefixes(search: Option<OsString>) -> Vec<PathBuf> {
    let search = search.unwrap_or_default();
    let pythons = env::split_paths(&search).map(|directory| directory.join("python3")).filter(|path| path.exists());
    pythons.filter_map(|python| Some(python.parent()?.parent()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_conda_and_toolkits_are_places() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            fs::create_dir_all(root.path().join(path)).unwrap();
            root.path().join(path)
        };
        let wheel = make("venv/lib/python3.12/site-packages/nvidia/cublas/lib");
        let new_wheel = make("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        let conda = make("conda/lib");
        let toolkit = make("shelf/cuda-12.8/targets/x86_64-linux/lib");
        let named = make("named/lib64");
        let places = Places {
            toolkits: vec![root.path().join("named"), root.path().join("absent")],
            prefixes: vec![root.path().join("venv"), root.path().join("conda")],
            shelf: root.path().join("shelf"),
        };
        let directories = places.directories();
        for place in [&wheel, &new_wheel, &conda, &toolkit, &named] {
            assert!(directories.contains(place), "{} is not among {directories:?}", place.display());
        }
        assert_eq!(directories[0], named);
    }

    #[test]
    fn newer_versions_than_the_driver_are_not_tried() {
        let twelve: Vec<String> = versions(12).collect();
        assert_eq!(twelve, [".12", ".11", ".11.2", ""]);
        assert_eq!(versions(13).next().unwrap(), ".13");
    }

    #[test]
    fn pythons_on_the_path_have_prefixes() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("env/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::write(bin.join("python3"), "").unwrap();
        let search = env::join_paths([root.path().join("none"), bin]).unwrap();
        assert_eq!(python_prefixes(Some(search)), [root.path().join("env")]);
    }
}
