//! What a packed directory says about itself, and what its writer notes on the way.
//!
//! **Invariant:** the manifest is written last, so a directory that has one was complete; names in it are compared
//! with those that the layout gives, never used as paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::layout::{CHUNK_ALIGNMENT, CHUNKS_PER_STAGE};
use super::panels::{PANEL_OUTPUTS, TILE_INPUTS};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::dtype::DType;
use crate::model::files::read_bounded;
use crate::model::source::{LinearSource, ModelSource, Rows, TensorSource, TensorView};

/// The manifest's name.
pub const MANIFEST: &str = "tidemill.json";
/// The name of the list of compressed planes, where there are any.
pub const PLANES: &str = "tidemill.planes";
/// The journal's name, while the directory is being written.
pub const JOURNAL: &str = "tidemill.journal";

const FORMAT: u32 = 1;
const MAX_BYTES: u64 = 256 << 20;
const MAX_COPY_BYTES: u64 = 256 << 20;

/// What tells one packing from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Of this format.
    format: u32,
    /// Of the model that was packed.
    pub fingerprint: String,
    /// The dtype of matrices, or `native`.
    weights: String,
    panel_outputs: usize,
    tile_inputs: usize,
    chunk_alignment: usize,
    chunks_per_stage: usize,
}

/// A packed directory's description of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Which model, and how it is packed.
    pub identity: Identity,
    /// Whether the embedding table serves as head.
    pub tied_head: bool,
    /// Dtype and shape of every tensor that was packed.
    tensors: BTreeMap<String, (String, Vec<usize>)>,
    /// The files with weights.
    pub(super) files: Vec<FileEntry>,
    /// The other files.
    pub(super) copies: Vec<FileEntry>,
}

/// A finished file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The xxh3 of each block (of all bytes, for a copy), in hexadecimal.
    pub checksums: Vec<String>,
}

impl Identity {
    /// Of `model`, packed with matrices in `weights` or in its own dtype.
    pub fn new(model: &Model, weights: Option<DType>) -> Identity {
        Identity::of(model.fingerprint.clone(), weights.map_or("native".into(), |dtype| dtype.to_string()))
    }

    fn of(fingerprint: String, weights: String) -> Identity {
        Identity {
            format: FORMAT,
            fingerprint,
            weights,
            panel_outputs: PANEL_OUTPUTS,
            tile_inputs: TILE_INPUTS,
            chunk_alignment: CHUNK_ALIGNMENT,
            chunks_per_stage: CHUNKS_PER_STAGE,
        }
    }

    /// The dtype that matrices were asked in.
    ///
    /// # Errors
    /// `Error::Model` when it is none that is known.
    pub fn weights(&self, directory: &Path) -> Result<Option<DType>> {
        match self.weights.as_str() {
            "native" => Ok(None),
            name => parse(name, directory).map(Some),
        }
    }

    /// A name for a directory.
    pub(super) fn directory_name(&self) -> String {
        format!("{}-{}-v{}", self.fingerprint, self.weights, self.format)
    }
}

fn parse(name: &str, directory: &Path) -> Result<DType> {
    name.parse().map_err(|()| Error::model(directory.join(MANIFEST), format!("has the unknown dtype `{name}`")))
}

impl Manifest {
    /// The manifest of `directory`, or none if it is no packed directory.
    ///
    /// # Errors
    /// `Error::Model` when it cannot be used, or packing has not ended.
    pub fn read(directory: &Path) -> Result<Option<Manifest>> {
        let path = directory.join(MANIFEST);
        if !path.exists() {
            if directory.join(JOURNAL).exists() {
                let what = "is being packed, or packing it was interrupted".into();
                let hint = Some("run the same `tidemill pack` command again: it goes on where it stopped".into());
                return Err(Error::Model { path: directory.to_owned(), what, hint });
            }
            return Ok(None);
        }
        let manifest = Manifest::parse(directory)?;
        let Identity { fingerprint, weights, .. } = manifest.identity.clone();
        if manifest.identity != Identity::of(fingerprint, weights) {
            let what = "was packed in another layout than this version of tidemill uses".to_owned();
            let hint = Some("pack the model again, into another directory".into());
            return Err(Error::Model { path: directory.to_owned(), what, hint });
        }
        Ok(Some(manifest))
    }

    /// The manifest of `directory` in whatever layout.
    ///
    /// # Errors
    /// `Error::Model` when it does not parse, `Error::Io` when it cannot be read.
    pub(super) fn parse(directory: &Path) -> Result<Manifest> {
        let path = directory.join(MANIFEST);
        let text = read_bounded(&path, MAX_BYTES)?;
        serde_json::from_slice(&text).map_err(|error| damaged(directory, &path, error.to_string()))
    }

    /// The manifest of a directory whose files are `files` and `copies`.
    pub(super) fn new(
        model: &Model,
        weights: Option<DType>,
        files: Vec<FileEntry>,
        copies: Vec<FileEntry>,
    ) -> Result<Manifest> {
        let mut tensors = BTreeMap::new();
        for name in tensor_names(&model.source) {
            if let (Some(dtype), Some(shape)) = (model.weights.dtype(&name), model.weights.shape(&name)?) {
                tensors.insert(name, (dtype.to_string(), shape));
            }
        }
        let identity = Identity::new(model, weights);
        Ok(Manifest { identity, tied_head: model.config.tied_head, tensors, files, copies })
    }

    /// Compares configuration, tokenizer and templates with what was copied.
    ///
    /// # Errors
    /// `Error::Model` naming the file that has changed.
    pub fn check_copies(&self, directory: &Path) -> Result<()> {
        for copy in &self.copies {
            let plain = !copy.name.split('/').any(|part| part.is_empty() || part == "..");
            if !plain {
                return Err(Error::model(directory.join(MANIFEST), format!("names the file `{}`", copy.name)));
            }
            let path = directory.join(&copy.name);
            let bytes = read_bounded(&path, MAX_COPY_BYTES)?;
            if copy.checksums != [checksum(&bytes)] {
                return Err(damaged(directory, &path, "has changed since it was packed".into()));
            }
        }
        Ok(())
    }

    /// What is known about the tensors that were packed.
    ///
    /// # Errors
    /// `Error::Model` when a dtype is not known.
    pub fn tensors(&self, directory: &Path) -> Result<PackedTensors> {
        let known = |(name, (dtype, shape)): (&String, &(String, Vec<usize>))| {
            Ok((name.clone(), (parse(dtype, directory)?, shape.clone())))
        };
        let tensors = self.tensors.iter().map(known).collect::<Result<_>>()?;
        Ok(PackedTensors { directory: directory.to_owned(), tensors })
    }
}

/// The shapes and dtypes of tensors whose elements are there only in packed form.
pub struct PackedTensors {
    directory: PathBuf,
    tensors: BTreeMap<String, (DType, Vec<usize>)>,
}

impl TensorSource for PackedTensors {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        if !self.tensors.contains_key(name) {
            return Ok(None);
        }
        let what = format!("holds `{name}` in packed form alone");
        let hint = Some("use the directory that it was packed from".into());
        Err(Error::Model { path: self.directory.clone(), what, hint })
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        Some(self.tensors.get(name)?.0)
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(self.tensors.get(name).map(|(_, shape)| shape.clone()))
    }

    fn origin(&self, _: &str) -> PathBuf {
        self.directory.join(MANIFEST)
    }
}

/// Every tensor that a model is made of.
fn tensor_names(source: &ModelSource) -> Vec<String> {
    let of_rows = |rows: &[Rows]| rows.iter().map(|rows| rows.tensor.clone()).collect::<Vec<_>>();
    let of_linear = |linear: &LinearSource| {
        let mut names = of_rows(&linear.weight);
        names.extend(linear.bias.iter().flat_map(|bias| of_rows(bias)));
        names
    };
    let mut names = vec![source.embed.clone()];
    names.extend(source.positions.clone());
    let mut norms: Vec<_> = source.final_norm.iter().collect();
    let mut linears: Vec<_> = source.project_in.iter().chain(&source.project_out).chain([&source.head]).collect();
    for layer in &source.layers {
        norms.extend([&layer.attn_norm, &layer.mlp_norm]);
        linears.extend([&layer.qkv, &layer.o, &layer.up, &layer.down]);
        names.extend(layer.q_norm.iter().chain(&layer.k_norm).cloned());
    }
    for norm in norms {
        names.push(norm.weight.clone());
        names.extend(norm.bias.clone());
    }
    names.extend(linears.into_iter().flat_map(of_linear));
    names
}

/// The checksum of a block.
pub(super) fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", XxHash3_64::oneshot(bytes))
}

/// The error for a file of compressed planes that does not hold what it should.
pub(super) fn damaged_planes(directory: &Path, path: &Path, what: String) -> Error {
    let (shown, file) = (directory.display(), path.display());
    let hint = format!(
        "run `tidemill pack --planes` again with --output {shown} to mend it, or remove {file}, or leave `compressed` \
         out of the policy"
    );
    Error::Model { path: path.to_owned(), what, hint: Some(hint) }
}

/// The error for a file of a packed directory that does not hold what it should.
pub(super) fn damaged(directory: &Path, path: &Path, what: String) -> Error {
    let shown = directory.display();
    let hint = format!("run `tidemill pack` again with --output {shown} to mend it, or remove {shown}");
    Error::Model { path: path.to_owned(), what, hint: Some(hint) }
}
