//! Packs made on the way, kept for the next run.
//!
//! **Invariant:** a pack's directory name holds everything that its bytes depend on, so one that is complete fits.

use std::path::{Path, PathBuf};

use super::layout::ModelLayout;
use super::manifest::{Identity, Manifest};
use super::planes::{self, Trust};
use super::read::PackedModel;
use super::write::{self, Progress};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::dtype::DType;

/// Where packs, calibration and kernels are kept: `given`, else `tidemill` in the user's cache directory.
///
/// # Errors
/// `Error::Usage` when neither is known.
pub fn directory(given: Option<&Path>) -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    given
        .map(Path::to_owned)
        .or_else(|| variable("TIDEMILL_CACHE_DIR"))
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("tidemill")))
        .or_else(|| Some(variable("HOME")?.join(".cache/tidemill")))
        .ok_or_else(|| Error::usage("there is no cache directory", "give --cache-dir DIR"))
}

/// The pack of `model` below `cache`, with compressed planes where they are asked for; made now if it is not there.
///
/// # Errors
/// As [`write::pack`] and [`planes::ensure`]; `Error::Model` when the pack is damaged.
pub fn ensure(
    model: &Model,
    weights: Option<DType>,
    cache: &Path,
    with_planes: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<PackedModel> {
    let directory = cache.join("packs").join(Identity::new(model, weights).directory_name());
    if Manifest::read(&directory).ok().flatten().is_none() {
        write::pack_or_wait(model, weights, &directory, progress)?;
    }
    let manifest = Manifest::read(&directory)?;
    let manifest = manifest.ok_or_else(|| Error::model(&directory, "vanished while it was in use"))?;
    let mut packed = PackedModel::open(&directory, &manifest, ModelLayout::new(model, weights))?;
    if with_planes {
        planes::ensure(&packed, Trust::Lengths, progress)?;
        packed.refresh_planes()?;
    }
    Ok(packed)
}
