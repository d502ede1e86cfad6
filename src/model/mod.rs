//! Models as they lie on disk: configuration, weight names, tensors, tokenizer, chat template.
//!
//! **Invariant:** nothing here computes with weights; files are untrusted and every extent is checked
//! before it is used.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod dtype;
pub mod fields;
pub mod files;
pub mod fingerprint;
pub mod generation;
pub mod hub;
pub mod names;
pub mod packed;
pub mod pickle;
mod python;
pub mod rope;
pub mod safetensors;
pub mod source;
pub mod synth;
pub mod synth_files;
pub mod token_text;
pub mod tokenizer;
pub mod torch;
pub mod zip;

use std::path::Path;

use self::chat::ChatTemplate;
use self::checkpoint::Checkpoint;
use self::config::ModelConfig;
use self::dtype::DType;
use self::files::Files;
use self::fingerprint::Fingerprint;
use self::generation::GenerationConfig;
use self::hub::{EmbeddedFiles, HubCache, Location};
use self::names::WithConstants;
use self::packed::Packed;
use self::packed::layout::ModelLayout;
use self::packed::manifest::Manifest;
use self::packed::pack::Packer;
use self::packed::read::PackedModel;
use self::safetensors::SafetensorsFile;
use self::source::{ModelSource, TensorSource};
use self::synth::SyntheticWeights;
use self::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// The files of the model inside the program, by name: config.json, model.safetensors, tokenizer.json,
/// tokenizer_config.json, generation_config.json.
const DEMO: EmbeddedFiles = &[
    ("config.json", include_bytes!("../../demo/config.json")),
    ("model.safetensors", include_bytes!("../../demo/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../demo/tokenizer_config.json")),
    ("generation_config.json", include_bytes!("../../demo/generation_config.json")),
];

/// A model, ready to be packed and run.
pub struct Model {
    /// What was asked for, as typed.
    pub name: String,
    /// The architecture.
    pub config: ModelConfig,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub chat: Option<ChatTemplate>,
    /// Sampling defaults; holds the end-of-sequence tokens that count.
    pub generation: GenerationConfig,
    /// The tensors.
    pub weights: Box<dyn TensorSource>,
    /// Which tensors make up which weight.
    pub source: ModelSource,
    /// Identifies weights, tokenizer, template and configuration, wherever they lie.
    pub fingerprint: String,
    /// Configuration, tokenizer and templates as files.
    pub files: Files,
    /// The weights in packed form, if that is how they were found; `weights` then knows shapes and dtypes alone.
    pub packed: Option<PackedModel>,
}

impl Model {
    /// Opens what the text after `--model` names (design, section 8): a directory, a name in the Hugging Face cache,
    /// `demo`, or `synth:CONFIG.json#SEED`.
    ///
    /// # Errors
    /// `Error::Usage` when there is no such model, `Error::Model` when one of its files cannot be used.
    pub fn open(spec: &str) -> Result<Model> {
        match hub::resolve(spec, &HubCache::from_environment())? {
            Location::Directory(directory) => Model::from_directory(spec, &directory),
            Location::Demo => Model::embedded(DEMO),
            Location::Synthetic { config, seed } => Model::synthetic(spec, &config, seed),
        }
    }

    /// Sets the time that chat templates see, in seconds since 1970: a job's prompts must not change overnight.
    pub fn set_time(&mut self, secs: u64) {
        let secs = i64::try_from(secs).unwrap_or(i64::MAX);
        let at = |chat: ChatTemplate| chat.at_time(secs).expect("the templates have parsed before");
        self.chat = self.chat.take().map(at);
    }

    /// The packed weights, with matrices in `weights` or in the checkpoint's dtype: from packed files, or packed when
    /// they are asked for.
    ///
    /// # Errors
    /// `Error::Usage` when packed files hold another dtype.
    pub fn packed(&self, weights: Option<DType>) -> Result<Box<dyn Packed + '_>> {
        match &self.packed {
            None => Ok(Box::new(Packer::new(self, weights))),
            Some(packed) => packed.in_dtype(weights).map(|packed| Box::new(packed) as Box<dyn Packed>),
        }
    }

    /// Opens a Hugging Face directory or a packed one.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_directory(name: &str, directory: &Path) -> Result<Model> {
        match Manifest::read(directory)? {
            Some(manifest) => Model::from_packed(name, directory, manifest),
            None => Model::from_checkpoint(name, directory),
        }
    }

    fn from_packed(name: &str, directory: &Path, manifest: Manifest) -> Result<Model> {
        manifest.check_copies(directory)?;
        let files = Files::Directory(directory.to_owned());
        let config = ModelConfig { tied_head: manifest.tied_head, ..read_config(&files)? };
        let tensors = manifest.tensors(directory)?;
        let fingerprint = manifest.identity.fingerprint.clone();
        let mut model = Model::assemble(name, config, files, Box::new(tensors), fingerprint)?;
        let layout = ModelLayout::new(&model, manifest.identity.weights(directory)?);
        model.packed = Some(PackedModel::open(directory, &manifest, layout)?);
        Ok(model)
    }

    fn from_checkpoint(name: &str, directory: &Path) -> Result<Model> {
        let files = Files::Directory(directory.to_owned());
        let config = read_config(&files)?;
        let checkpoint = Checkpoint::open(directory)?;
        let mut fingerprint = Fingerprint::of_files(&files)?;
        checkpoint.files().iter().try_for_each(|file| fingerprint.add_weights(file))?;
        Model::assemble(name, config, files, Box::new(checkpoint), fingerprint.finish())
    }

    /// Opens a model that is part of the program: config.json, model.safetensors, tokenizer.json and so on.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn embedded(embedded: EmbeddedFiles) -> Result<Model> {
        let weights = embedded.iter().find(|(name, _)| *name == "model.safetensors");
        let (_, weights) = weights.ok_or_else(|| Error::model("demo", "is not part of this program"))?;
        let small = embedded.iter().filter(|(name, _)| *name != "model.safetensors");
        let files =
            Files::Memory("demo".into(), small.map(|(name, bytes)| ((*name).to_owned(), (*bytes).into())).collect());
        let config = read_config(&files)?;
        let mut fingerprint = Fingerprint::of_files(&files)?;
        fingerprint.add_bytes("model.safetensors", weights);
        let source = SafetensorsFile::embedded("demo/model.safetensors", weights)?;
        Model::assemble("demo", config, files, Box::new(source), fingerprint.finish())
    }

    /// Opens seeded weights in the shape of the config.json at `path`.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn synthetic(name: &str, path: &Path, seed: u64) -> Result<Model> {
        let (config, files) = synth_files::describe(path)?;
        let mut fingerprint = Fingerprint::of_files(&files)?;
        fingerprint.add_bytes("seed", &seed.to_le_bytes());
        let weights = SyntheticWeights::new(&config, seed, path.to_owned());
        Model::assemble(name, config, files, Box::new(weights), fingerprint.finish())
    }

    fn assemble(
        name: &str,
        mut config: ModelConfig,
        files: Files,
        weights: Box<dyn TensorSource>,
        fingerprint: String,
    ) -> Result<Model> {
        let weights = WithConstants::wrap(&config, weights);
        config.tied_head &= !names::stored_head_differs(&config, weights.as_ref())?;
        let source = names::model_source(&config, weights.as_ref())?;
        let tokenizer = Tokenizer::load(&files)?;
        let chat = ChatTemplate::load(&files, tokenizer.special_texts())?;
        let generation = GenerationConfig::load(&files, &config)?;
        let name = name.into();
        Ok(Model { name, config, tokenizer, chat, generation, weights, source, fingerprint, files, packed: None })
    }
}

/// Reads and checks the model's config.json.
fn read_config(files: &Files) -> Result<ModelConfig> {
    let path = files.path("config.json");
    match files.json("config.json")? {
        Some(value) => ModelConfig::from_json(&value, &path),
        None => Err(Error::Model {
            path,
            what: "is missing".into(),
            hint: Some("give a directory as Hugging Face writes it, with config.json, tokenizer and weights".into()),
        }),
    }
}
