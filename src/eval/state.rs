//! HELM's scenario state: an adapter's specification and requests, as `helm-run --dry-run` writes them.
//!
//! **Invariant:** the document itself is only ever changed by adding results; whatever is used of it was checked, and
//! what is wrong is named by its JSON path.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::stat::Context;
use super::tree::Node;
use crate::error::Result;

/// How an adapter makes requests of instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// One request an instance; the completion is the answer.
    Generation,
    /// One request an instance; the completion names a choice.
    Joint,
    /// A request for every reference, scored by its length.
    Separate,
    /// The same, compared with the reference without its question.
    Calibrated,
    /// Texts whose tokens are scored.
    LanguageModeling,
}

impl Method {
    const NAMES: [(&'static str, Method); 8] = [
        ("generation", Method::Generation),
        ("multiple_choice_joint", Method::Joint),
        ("multiple_choice_joint_chain_of_thought", Method::Joint),
        ("chat", Method::Generation),
        ("multiple_choice_separate_original", Method::Separate),
        ("multiple_choice_separate_calibrated", Method::Calibrated),
        ("ranking_binary", Method::Separate),
        ("language_modeling", Method::LanguageModeling),
    ];
}

/// What is used of an adapter's specification.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// How requests are made.
    pub method: Method,
    /// Completions of a request; other than one gives scores `@k`.
    pub num_outputs: i64,
    /// Runs with other examples in the prompt.
    pub num_train_trials: i64,
    /// What of a completion names a choice.
    pub output_mapping_pattern: Option<String>,
}

/// What an instance is about.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its name.
    pub id: String,
    /// Split and perturbation.
    pub context: Context,
    /// Whether the perturbation counts as one of robustness, or of fairness.
    pub tests: (bool, bool),
    /// The JSON text that tells instances apart.
    pub identity: String,
    /// Texts that may be answers, and whether they are right.
    pub references: Vec<(String, bool)>,
}

/// A request on behalf of an instance.
#[derive(Clone, Debug)]
pub struct RequestState {
    /// The instance.
    pub instance: Instance,
    /// Which reference it is about.
    pub reference: Option<usize>,
    /// Whether it is about the reference without its question.
    pub calibration: bool,
    /// Which trial it belongs to.
    pub trial: i64,
    /// What a completion stands for.
    pub output_mapping: Option<Vec<(String, String)>>,
    /// Examples in the prompt.
    pub num_train_instances: i64,
    /// Whether the prompt was cut.
    pub prompt_truncated: bool,
    /// Tokens at the beginning that do not count.
    pub num_conditioning_tokens: usize,
    /// What is asked.
    pub request: Request,
}

/// What is asked of the model.
#[derive(Clone, Debug)]
pub struct Request {
    prompt: String,
    messages: Vec<(String, String)>,
    temperature: f64,
    top_p: f64,
    presence_penalty: f64,
    frequency_penalty: f64,
    num_completions: i64,
    max_tokens: i64,
    /// Whether the completion begins with the prompt.
    pub echo: bool,
    stop: Vec<String>,
    random: String,
}

/// A scenario state, checked.
#[derive(Clone, Debug)]
pub struct ScenarioState {
    /// The specification.
    pub adapter: Adapter,
    /// The requests, in order.
    pub states: Vec<RequestState>,
}

impl ScenarioState {
    /// Checks a document.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] naming the path of what is wrong.
    pub fn read(document: &Value, file: &Path) -> Result<ScenarioState> {
        let root = Node::root(document, file, "the file must be as `helm-run --dry-run` writes it");
        let adapter = Adapter::read(&root.need("adapter_spec")?)?;
        let list = root.need("request_states")?;
        let items = list.items()?;
        if items.is_empty() {
            return Err(list.wrong("a list that is not empty"));
        }
        let states = items.iter().map(|item| RequestState::read(item, &adapter)).collect::<Result<Vec<_>>>()?;
        Ok(ScenarioState { adapter, states })
    }
}

impl Adapter {
    fn read(node: &Node<'_>) -> Result<Adapter> {
        let method = node.need("method")?;
        let known = Method::NAMES.iter().find(|(name, _)| Some(*name) == method.value.as_str());
        let Some((_, known)) = known else {
            let names: Vec<&str> = Method::NAMES.iter().map(|(name, _)| *name).collect();
            return Err(method.wrong(&format!("one of {}", names.join(", "))));
        };
        let pattern = node.get("output_mapping_pattern")?;
        if let Some(pattern) = &pattern
            && fancy_regex::Regex::new(pattern.text()?).is_err()
        {
            return Err(pattern.wrong("a regular expression"));
        }
        Ok(Adapter {
            method: *known,
            num_outputs: integer(node, "num_outputs", 1, 1000, 5)?,
            num_train_trials: integer(node, "num_train_trials", 1, 1000, 1)?,
            output_mapping_pattern: pattern.map(|pattern| pattern.text().map(str::to_owned)).transpose()?,
        })
    }
}

impl RequestState {
    fn read(node: &Node<'_>, adapter: &Adapter) -> Result<RequestState> {
        let instance = Instance::read(&node.need("instance")?)?;
        let mode = node.get("request_mode")?;
        let calibration = match mode.as_ref().map(|mode| mode.value.as_str()) {
            None | Some(Some("original")) => false,
            Some(Some("calibration")) => true,
            _ => return Err(mode.expect("it is there").wrong("\"original\" or \"calibration\"")),
        };
        let most = instance.references.len() as i64 - 1;
        let reference = node.get("reference_index")?.map(|index| index.integer(0, most)).transpose()?;
        let per_reference = matches!(adapter.method, Method::Separate | Method::Calibrated);
        if per_reference && reference.is_none() {
            return Err(node.missing("reference_index"));
        }
        if !per_reference
            && adapter.method != Method::LanguageModeling
            && !instance.references.is_empty()
            && !instance.references.iter().any(|(_, correct)| *correct)
        {
            return Err(node.need("instance")?.need("references")?.wrong("a list with a reference tagged `correct`"));
        }
        let output_mapping = node.get("output_mapping")?.map(|mapping| {
            let entry = |(key, value): (&str, Node<'_>)| Ok((key.to_owned(), value.text()?.to_owned()));
            mapping.members()?.into_iter().map(entry).collect::<Result<Vec<_>>>()
        });
        Ok(RequestState {
            instance,
            reference: reference.map(|index| index as usize),
            calibration,
            trial: integer(node, "train_trial_index", 0, adapter.num_train_trials - 1, 0)?,
            output_mapping: output_mapping.transpose()?,
            num_train_instances: integer(node, "num_train_instances", 0, i64::MAX, 0)?,
            prompt_truncated: flag(node, "prompt_truncated")?,
            num_conditioning_tokens: integer(node, "num_conditioning_tokens", 0, i64::from(u32::MAX), 0)? as usize,
            request: Request::read(&node.need("request")?)?,
        })
    }
}

impl Instance {
    fn read(node: &Node<'_>) -> Result<Instance> {
        node.need("input")?;
        let id = node.need("id")?.text()?.to_owned();
        let optional = |key| node.get(key)?.map(|part| part.text().map(str::to_owned)).transpose();
        let perturbation = node.get("perturbation")?;
        let tests = match &perturbation {
            Some(perturbation) => (flag(perturbation, "robustness")?, flag(perturbation, "fairness")?),
            None => (false, false),
        };
        let mut references = Vec::new();
        if let Some(list) = node.get("references")? {
            for reference in list.items()? {
                let text = reference.need("output")?.need("text")?.text()?.to_owned();
                let tags = reference.get("tags")?.map(|tags| tags.items()).transpose()?.unwrap_or_default();
                let tags = tags.iter().map(Node::text).collect::<Result<Vec<_>>>()?;
                references.push((text, tags.contains(&"correct")));
            }
        }
        let context = Context {
            split: optional("split")?,
            sub_split: optional("sub_split")?,
            perturbation: perturbation.map(|perturbation| perturbation.value.to_string()),
        };
        Ok(Instance { id, context, tests, identity: node.value.to_string(), references })
    }
}

impl Request {
    fn read(node: &Node<'_>) -> Result<Request> {
        for key in ["multimodal_prompt", "image_generation_parameters", "response_format"] {
            if let Some(part) = node.get(key)? {
                return Err(part.wrong("absent: only text is generated"));
            }
        }
        if flag(node, "embedding")? {
            return Err(node.need("embedding")?.wrong("false: there are no embeddings"));
        }
        let mut messages = Vec::new();
        if let Some(list) = node.get("messages")? {
            for message in list.items()? {
                let part = |key| message.need(key)?.text().map(str::to_owned);
                messages.push((part("role")?, part("content")?));
            }
        }
        let prompt = match node.get("prompt")? {
            Some(prompt) => prompt.text()?.to_owned(),
            None if !messages.is_empty() => String::new(),
            None => return Err(node.missing("prompt")),
        };
        let number = |key: &str, low, high, default| {
            node.get(key)?.map_or(Ok(default), |number: Node<'_>| number.number(low, high))
        };
        let echo = flag(node, "echo_prompt")?;
        let stop = node.get("stop_sequences")?.map(|list| list.items()).transpose()?.unwrap_or_default();
        let random = node.get("random")?.map_or(Ok(""), |random| random.text())?.to_owned();
        Ok(Request {
            prompt,
            messages,
            temperature: number("temperature", 0.0, 100.0, 1.0)?,
            top_p: number("top_p", f64::MIN_POSITIVE, 1.0, 1.0)?,
            presence_penalty: number("presence_penalty", -2.0, 2.0, 0.0)?,
            frequency_penalty: number("frequency_penalty", -2.0, 2.0, 0.0)?,
            num_completions: integer(node, "num_completions", 1, 128, 1)?,
            max_tokens: integer(node, "max_tokens", i64::from(!echo), i64::from(u32::MAX), 100)?,
            echo,
            stop: stop.iter().map(|stop| stop.text().map(str::to_owned)).collect::<Result<_>>()?,
            random,
        })
    }

    /// Whether it is a conversation.
    pub fn is_chat(&self) -> bool {
        !self.messages.is_empty()
    }

    /// What identifies it: all that its result depends on. Equal requests are asked once. The Python adapter has the
    /// same names, so the same samples are drawn on both ways.
    pub fn name(&self) -> String {
        let mut digest = Sha256::new();
        let mut add = |part: &[u8]| {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        };
        add(self.prompt.as_bytes());
        add(self.messages.len().to_string().as_bytes());
        for (role, content) in &self.messages {
            add(role.as_bytes());
            add(content.as_bytes());
        }
        for number in [self.temperature, self.top_p, self.presence_penalty, self.frequency_penalty] {
            add(&number.to_be_bytes());
        }
        for count in [self.num_completions, self.max_tokens, i64::from(self.echo), self.stop.len() as i64] {
            add(count.to_string().as_bytes());
        }
        self.stop.iter().for_each(|stop| add(stop.as_bytes()));
        add(self.random.as_bytes());
        let digest: String = digest.finalize()[..12].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("helm-{digest}")
    }

    /// The request as a batch line; `bos` is the text that the model's prompts begin with.
    pub fn line(&self, bos: Option<&str>) -> Value {
        let mut body = json!({
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "n": self.num_completions,
            "stop": self.stop,
            "seed": self.seed(),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "return_token_ids": true,
        });
        let url = if self.is_chat() {
            let message = |(role, content): &(String, String)| json!({"role": role, "content": content});
            body["messages"] = self.messages.iter().map(message).collect();
            body["logprobs"] = json!(true);
            "/v1/chat/completions"
        } else {
            body["prompt"] = json!(self.prompt);
            body["logprobs"] = json!(0);
            body["echo"] = json!(self.echo);
            // A prompt that begins with the model's own beginning gets no second one.
            let begins = bos.is_some_and(|bos| !bos.is_empty() && self.prompt.starts_with(bos));
            body["add_special_tokens"] = json!(!begins);
            "/v1/completions"
        };
        json!({"custom_id": self.name(), "method": "POST", "url": url, "body": body})
    }

    fn seed(&self) -> i64 {
        if self.random.is_empty() {
            return 0;
        }
        let digest: [u8; 32] = Sha256::digest(self.random.as_bytes()).into();
        let first: [u8; 8] = std::array::from_fn(|index| digest[index]);
        (u64::from_be_bytes(first) & i64::MAX as u64) as i64
    }
}

fn integer(node: &Node<'_>, key: &str, low: i64, high: i64, default: i64) -> Result<i64> {
    node.get(key)?.map_or(Ok(default), |number| number.integer(low, high))
}

fn flag(node: &Node<'_>, key: &str) -> Result<bool> {
    node.get(key)?.map_or(Ok(false), |flag| flag.flag())
}
