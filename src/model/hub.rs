//! What the text after `--model` means: a directory, a name in the Hugging Face cache, `demo`, or `synth:`.
//!
//! **Invariant:** a name from outside never becomes a path outside the cache.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::files::read_bounded;
use crate::error::{Error, Result};

/// Files of a model that is part of the program, by name.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A directory: `--model DIR`, or a snapshot in the Hugging Face cache.
    Directory(PathBuf),
    /// The small trained model inside the program.
    Demo,
    /// Seeded weights in the shape of a config.json.
    Synthetic {
        /// The config.json.
        config: PathBuf,
        /// The seed.
        seed: u64,
    },
}

/// Where the Hugging Face cache may be.
#[derive(Clone, Debug, Default)]
pub struct HubCache {
    /// The directory that holds `models--*`.
    pub root: Option<PathBuf>,
}

impl HubCache {
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `huggingface/hub` in the user's cache directory.
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        HubCache::from_variables(variable)
    }

    fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        let root = variable("HF_HUB_CACHE")
            .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(variable("HF_HOME")?.join("hub")))
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("huggingface/hub")))
            .or_else(|| Some(variable("HOME")?.join(".cache/huggingface/hub")));
        HubCache { root }
    }

    /// The snapshot of the model called `name` (`org/name` or `name`) that `main` refers to.
    fn snapshot(&self, name: &str) -> Result<Option<PathBuf>> {
        let Some(root) = &self.root else { return Ok(None) };
        let folder = root.join(format!("models--{}", name.replace('/', "--")));
        let snapshots = folder.join("snapshots");
        let reference = folder.join("refs/main");
        if !reference.exists() {
            return Ok(only_entry(&snapshots));
        }
        let revision = String::from_utf8(read_bounded(&reference, 1 << 10)?).unwrap_or_default();
        let revision = revision.trim();
        if !is_plain(revision) {
            return Err(Error::model(&reference, "does not hold a revision"));
        }
        Ok(Some(snapshots.join(revision)).filter(|path| path.is_dir()))
    }
}

/// Resolves the text after `--model`.
///
/// # Errors
/// `Error::Usage` when the text names nothing that is there, with what to do about it.
pub fn resolve(spec: &str, cache: &HubCache) -> Result<Location> {
    if spec == "demo" {
        return Ok(Location::Demo);
    }
    if let Some(synthetic) = spec.strip_prefix("synth:") {
        return resolve_synthetic(synthetic);
    }
    let path = Path::new(spec);
    if path.is_dir() {
        return Ok(Location::Directory(path.to_owned()));
    }
    if path.is_file() {
        let what = format!("`--model {spec}` is a file, not a model directory");
        return Err(Error::usage(what, format!("give its directory, or `synth:{spec}` for seeded weights")));
    }
    if !is_model_name(spec) {
        return Err(Error::usage(format!("`--model {spec}`: no such directory"), "check the path"));
    }
    match cache.snapshot(spec)? {
        Some(snapshot) => Ok(Location::Directory(snapshot)),
        None => {
            let place = cache.root.as_ref().map_or("the Hugging Face cache".into(), |root| root.display().to_string());
            let what = format!("`--model {spec}`: neither a directory nor a model in {place}");
            Err(Error::usage(what, format!("run `hf download {spec}`, or `--model demo` to try the program")))
        }
    }
}

fn resolve_synthetic(spec: &str) -> Result<Location> {
    let (config, seed) = match spec.rsplit_once('#') {
        Some((config, seed)) => (config, Some(seed)),
        None => (spec, None),
    };
    let seed = seed.map_or(Ok(0), str::parse::<u64>).map_err(|_| {
        Error::usage(format!("`--model synth:{spec}`: the seed is not a whole number"), "write synth:CONFIG.json#SEED")
    })?;
    let mut config = PathBuf::from(config);
    if config.is_dir() {
        config.push("config.json");
    }
    if !config.is_file() {
        let what = format!("`--model synth:{spec}`: no such file: {}", config.display());
        return Err(Error::usage(what, "write synth:CONFIG.json#SEED"));
    }
    Ok(Location::Synthetic { config, seed })
}

/// `name` or `org/name`.
fn is_model_name(spec: &str) -> bool {
    let parts: Vec<&str> = spec.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|part| is_plain(part))
}

/// A file name made of letters, digits, `.`, `_` and `-`, without `..`.
fn is_plain(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && name.len() <= 100 && name != "." && !name.contains("..") && name.bytes().all(allowed)
}

fn only_entry(directory: &Path) -> Option<PathBuf> {
    let mut names: Vec<OsString> =
        std::fs::read_dir(directory).ok()?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    if names.len() == 1 { Some(directory.join(names.remove(0))) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn names_resolve_through_refs_main() {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("models--org--name");
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::create_dir_all(model.join("snapshots/abc123")).unwrap();
        fs::create_dir_all(model.join("snapshots/old")).unwrap();
        fs::write(model.join("refs/main"), "abc123\n").unwrap();
        let cache = HubCache { root: Some(directory.path().to_owned()) };
        let found = resolve("org/name", &cache).unwrap();
        assert_eq!(found, Location::Directory(model.join("snapshots/abc123")));
        fs::write(model.join("refs/main"), "../../../etc").unwrap();
        assert!(resolve("org/name", &cache).is_err());
        fs::remove_file(model.join("refs/main")).unwrap();
        assert!(resolve("org/name", &cache).is_err(), "two snapshots and no main");
    }

    #[test]
    fn what_is_missing_comes_with_a_hint() {
        let cache = HubCache { root: Some("/nonexistent".into()) };
        let error = resolve("facebook/opt-125m", &cache).unwrap_err();
        assert!(error.hint().unwrap().contains("hf download facebook/opt-125m"));
        for spec in ["../models--x", "a/b/c", "a/..", "org/na me", "", "/absolute/path", "a\\b", "."] {
            if let Ok(Location::Directory(path)) = resolve(spec, &cache) {
                assert_eq!(path, Path::new(spec), "{spec}");
            }
        }
    }

    #[test]
    fn synthetic_models_have_a_seed() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.json");
        fs::write(&config, "{}").unwrap();
        let shown = config.display();
        let resolve = |spec: String| resolve(&spec, &HubCache::default());
        let location = |seed| Location::Synthetic { config: config.clone(), seed };
        assert_eq!(resolve(format!("synth:{shown}")).unwrap(), location(0));
        assert_eq!(resolve(format!("synth:{shown}#42")).unwrap(), location(42));
        assert!(resolve(format!("synth:{shown}#x")).is_err());
        assert!(resolve(format!("synth:{shown}.absent#1")).is_err());
    }

    #[test]
    fn the_cache_is_where_hugging_face_puts_it() {
        let root = |set: &[(&str, &str)]| {
            HubCache::from_variables(|name| set.iter().find(|(key, _)| *key == name).map(|(_, path)| path.into())).root
        };
        assert_eq!(root(&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")]), Some("/a".into()));
        assert_eq!(root(&[("HF_HOME", "/b"), ("HOME", "/c")]), Some("/b/hub".into()));
        assert_eq!(root(&[("HOME", "/c")]), Some("/c/.cache/huggingface/hub".into()));
        assert_eq!(root(&[]), None);
    }
}
