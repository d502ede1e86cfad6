//! The weight files of a model directory: one file or shards with an index, safetensors or torch.
//!
//! **Invariant:** only files directly inside the directory are opened, whatever an index says.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dtype::DType;
use super::files::read_bounded;
use super::safetensors::SafetensorsFile;
use super::source::{TensorSource, TensorView};
use super::torch::TorchFile;
use crate::error::{Error, Result};

/// All tensors of a model directory.
pub struct Checkpoint {
    shards: Vec<Box<dyn TensorSource>>,
    files: Vec<PathBuf>,
    /// The shard of each tensor, as the index says; none for a single file.
    index: Option<HashMap<String, usize>>,
}

const SINGLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
const MAX_INDEX_BYTES: u64 = 256 << 20;

impl Checkpoint {
    /// Opens `model.safetensors.index.json`, else `model.safetensors`, else the same for `pytorch_model.bin`.
    ///
    /// # Errors
    /// `Error::Model` when none is there, or the index or a file is unusable.
    pub fn open(directory: &Path) -> Result<Self> {
        for name in SINGLE {
            let index = directory.join(format!("{name}.index.json"));
            if index.exists() {
                return Checkpoint::sharded(directory, &index);
            }
            let path = directory.join(name);
            if path.exists() {
                return Ok(Checkpoint { shards: vec![open_file(&path)?], files: vec![path], index: None });
            }
        }
        Err(Error::Model {
            path: directory.to_owned(),
            what: "has no weights (model.safetensors or pytorch_model.bin, or their index)".into(),
            hint: Some("download the model again, with all its files".into()),
        })
    }

    fn sharded(directory: &Path, path: &Path) -> Result<Self> {
        let text = read_bounded(path, MAX_INDEX_BYTES)?;
        let value: Value = serde_json::from_slice(&text).map_err(|error| Error::model(path, format!("{error}")))?;
        let map = value.get("weight_map").and_then(Value::as_object);
        let map = map.filter(|map| !map.is_empty());
        let map = map.ok_or_else(|| Error::model(path, "has no `weight_map` object with entries"))?;
        let mut numbers = BTreeMap::new();
        let mut index = HashMap::with_capacity(map.len());
        for (tensor, file) in map {
            let file = file.as_str().filter(|file| is_plain(file));
            let file = file.ok_or_else(|| {
                Error::model(
                    path,
                    format!("puts tensor `{tensor}` into {}, which is not a plain file name", map[tensor]),
                )
            })?;
            let next = numbers.len();
            index.insert(tensor.clone(), *numbers.entry(file).or_insert(next));
        }
        let mut names = vec![""; numbers.len()];
        numbers.iter().for_each(|(name, &number)| names[number] = name);
        let files: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
        if let Some(missing) = files.iter().find(|file| !file.exists()) {
            return Err(Error::Model {
                path: missing.clone(),
                what: "is missing, but the index lists it".into(),
                hint: Some("download the model again, with all its files".into()),
            });
        }
        let shards = files.iter().map(|file| open_file(file)).collect::<Result<_>>()?;
        Ok(Checkpoint { shards, files, index: Some(index) })
    }

    /// The weight files, sorted by name.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.files.clone();
        files.sort();
        files
    }

    fn shard(&self, name: &str) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(name).copied(),
            None => Some(0),
        }
    }

    /// The shard's answer; a tensor that the index promises must be there.
    fn ask<'a, T>(
        &'a self,
        name: &str,
        question: impl FnOnce(&'a dyn TensorSource) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let Some(shard) = self.shard(name) else { return Ok(None) };
        match question(self.shards[shard].as_ref())? {
            None if self.index.is_some() => {
                Err(Error::model(&self.files[shard], format!("lacks tensor `{name}`, which the index says is in it")))
            }
            answer => Ok(answer),
        }
    }
}

fn open_file(path: &Path) -> Result<Box<dyn TensorSource>> {
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        Ok(Box::new(SafetensorsFile::open(path)?))
    } else {
        Ok(Box::new(TorchFile::open(path)?))
    }
}

/// Whether `name` names a weight file in the directory itself.
fn is_plain(name: &str) -> bool {
    let ending = name.ends_with(".safetensors") || name.ends_with(".bin");
    ending && name.len() < 256 && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        self.ask(name, |shard| shard.tensor(name))
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.shards[self.shard(name)?].dtype(name)
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        self.ask(name, |shard| shard.shape(name))
    }

    fn origin(&self, name: &str) -> PathBuf {
        self.files[self.shard(name).unwrap_or(0)].clone()
    }
}
