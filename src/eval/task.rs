//! Task files: JSON lines with prompts and references, choices, or texts.
//!
//! **Invariant:** every item becomes lines whose names lead back to it; an item counts only when all of its lines were
//! answered.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::stat::Stat;
use super::text::{Score, strip};
use super::tree::{Node, parse};
use crate::error::{Error, Result};

/// Tokens of an answer that does not say how many.
const MAX_TOKENS: u64 = 32;

const HINT: &str = "give each line `prompt` and `references`, `prompt`, `choices` and `answer`, or `text`";

/// What an answer is compared by.
const SCORES: [&str; 6] =
    ["exact_match", "quasi_exact_match", "prefix_exact_match", "quasi_prefix_exact_match", "f1_score", "rouge_l"];

/// Fields of an item that go to its line as they are.
const SAMPLING: [&str; 9] =
    ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "chat_template", "add_special_tokens"];

/// A file's items.
#[derive(Clone, Debug)]
pub struct Task {
    items: Vec<Item>,
}

#[derive(Clone, Debug)]
struct Item {
    id: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// An answer is generated and compared.
    Answer { line: Map<String, Value>, references: Vec<String> },
    /// The most probable choice is taken.
    Choice { context: String, choices: Vec<String>, right: Vec<usize> },
    /// A text's log-probability.
    Text(String),
}

/// An item's values.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its name.
    pub id: String,
    /// By metric.
    pub stats: Vec<Stat>,
}

impl Task {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`Error::Input`] naming line and path of what is wrong.
    pub fn read(text: &str, file: &Path) -> Result<Task> {
        let mut items = Vec::new();
        for (number, line) in (1..).zip(text.split('\n')).filter(|(_, line)| !line.trim().is_empty()) {
            let named = file
                .with_file_name(format!("{}, line {number}", file.file_name().unwrap_or_default().to_string_lossy()));
            let value = parse(line, &named)?;
            items.push(Item::read(&Node::root(&value, &named, HINT), number)?);
        }
        let mut ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            let what = format!("two items have the id \"{}\"", pair[0]);
            return Err(Error::Input { path: file.to_owned(), what, hint: Some("name each item once".into()) });
        }
        if items.is_empty() {
            let hint = Some("give it one JSON object per line".into());
            return Err(Error::Input { path: file.to_owned(), what: "has no items".into(), hint });
        }
        Ok(Task { items })
    }

    /// The lines that ask for everything; `name` is the task's.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        let mut lines = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            match &item.kind {
                Kind::Answer { line, .. } => {
                    let mut line = line.clone();
                    line.insert("custom_id".into(), json!(line_name(name, index, 0)));
                    lines.push(Value::Object(line));
                }
                Kind::Choice { context, choices, .. } => {
                    for (at, choice) in choices.iter().enumerate() {
                        let id = line_name(name, index, at);
                        lines.push(json!({"custom_id": id, "context": context, "continuation": choice}));
                    }
                }
                // What the tokenizer would put before a text is not part of it.
                Kind::Text(text) => lines
                    .push(json!({"custom_id": line_name(name, index, 0), "text": text, "add_special_tokens": false})),
            }
        }
        lines
    }

    /// The values of all items whose lines were answered; how many were not comes with them.
    pub fn measure<'a>(&self, name: &str, answer: impl Fn(&str) -> Option<&'a Value>) -> (Vec<Measured>, usize) {
        let mut measured = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            let answer = |at: usize| answer(&line_name(name, index, at)).filter(|answer| answer["error"].is_null());
            if let Some(stats) = item.measure(&answer) {
                measured.push(Measured { id: item.id.clone(), stats });
            }
        }
        let failed = self.items.len() - measured.len();
        (measured, failed)
    }
}

/// The name of an item's line; a task's name has no slash.
fn line_name(task: &str, item: usize, line: usize) -> String {
    format!("task/{task}/{item}/{line}")
}

impl Item {
    fn read(node: &Node<'_>, number: usize) -> Result<Item> {
        let id = match node.get("id")? {
            Some(id) => id.text()?.to_owned(),
            None => format!("line-{number}"),
        };
        if let Some(text) = node.get("text")? {
            return Ok(Item { id, kind: Kind::Text(text.text()?.to_owned()) });
        }
        let texts = |key: &str| -> Result<Option<Vec<String>>> {
            let Some(list) = node.get(key)? else { return Ok(None) };
            let items = list.items()?;
            if items.is_empty() {
                return Err(list.wrong("a list that is not empty"));
            }
            items.iter().map(|item| item.text().map(str::to_owned)).collect::<Result<_>>().map(Some)
        };
        let references = texts("references")?;
        let kind = match (texts("choices")?, references) {
            (Some(choices), references) => Item::choice(node, choices, references)?,
            (None, Some(references)) => Kind::Answer { line: Item::line(node)?, references },
            (None, None) => return Err(node.missing("references")),
        };
        Ok(Item { id, kind })
    }

    fn choice(node: &Node<'_>, choices: Vec<String>, references: Option<Vec<String>>) -> Result<Kind> {
        let context = node.need("prompt")?.text()?.to_owned();
        let place = |text: &str| choices.iter().position(|choice| choice == text);
        let right = match (node.get("answer")?, references) {
            (Some(answer), _) => match answer.value.as_str() {
                Some(text) => vec![place(text).ok_or_else(|| answer.wrong("one of the choices"))?],
                None => vec![answer.integer(0, choices.len() as i64 - 1)? as usize],
            },
            (None, Some(references)) => {
                let right: Vec<usize> = references.iter().filter_map(|text| place(text)).collect();
                if right.is_empty() {
                    return Err(node.need("references")?.wrong("a list with one of the choices"));
                }
                right
            }
            (None, None) => return Err(node.missing("answer")),
        };
        Ok(Kind::Choice { context, choices, right })
    }

    fn line(node: &Node<'_>) -> Result<Map<String, Value>> {
        let mut line = Map::new();
        let (prompt, messages) = (node.get("prompt")?, node.get("messages")?);
        match (prompt, messages) {
            (Some(prompt), None) => line.insert("prompt".into(), prompt.value.clone()),
            (None, Some(messages)) => line.insert("messages".into(), messages.value.clone()),
            (Some(_), Some(messages)) => return Err(messages.wrong("absent where `prompt` is given")),
            (None, None) => return Err(node.missing("prompt")),
        };
        line.insert("max_tokens".into(), json!(MAX_TOKENS));
        line.insert("temperature".into(), json!(0));
        for key in SAMPLING {
            if let Some(value) = node.get(key)? {
                line.insert(key.into(), value.value.clone());
            }
        }
        Ok(line)
    }

    fn measure<'a>(&self, answer: &dyn Fn(usize) -> Option<&'a Value>) -> Option<Vec<Stat>> {
        let yes = |holds: bool| f64::from(u8::from(holds));
        match &self.kind {
            Kind::Answer { references, .. } => {
                let text = strip(answer(0)?["text"].as_str()?);
                let score = |name: &str| {
                    let score = Score::named(name).expect("the name is known");
                    Stat::new(name, references.iter().map(|gold| score.of(gold, text)).fold(0.0, f64::max))
                };
                Some(SCORES.map(score).to_vec())
            }
            Kind::Choice { choices, right, .. } => {
                let logprobs: Vec<f64> =
                    (0..choices.len()).map(|at| answer(at)?["logprob"].as_f64()).collect::<Option<_>>()?;
                let by_byte: Vec<f64> = logprobs
                    .iter()
                    .zip(choices)
                    .map(|(logprob, choice)| logprob / choice.len().max(1) as f64)
                    .collect();
                Some(vec![
                    Stat::new("accuracy", yes(right.contains(&first_best(&logprobs)))),
                    Stat::new("accuracy_per_byte", yes(right.contains(&first_best(&by_byte)))),
                ])
            }
            Kind::Text(text) => {
                let answer = answer(0)?;
                Some(vec![
                    Stat::new("logprob", answer["logprob"].as_f64()?),
                    Stat::new("num_perplexity_tokens", answer["token_logprobs"].as_array()?.len() as f64),
                    Stat::new("num_bytes", text.len() as f64),
                ])
            }
        }
    }
}

/// The first of the greatest values.
fn first_best(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, at| if values[at] > values[best] { at } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Task> {
        Task::read(text, Path::new("t.jsonl"))
    }

    #[test]
    fn items_that_cannot_be_judged_are_named() {
        for (line, expected) in [
            (r#"{"prompt": "a"}"#, "t.jsonl, line 2: references is missing"),
            (r#"{"references": ["a"]}"#, "t.jsonl, line 2: prompt is missing"),
            (r#"{"prompt": "a", "references": ["a", 3]}"#, "line 2: references[1] must be a string, got 3"),
            (r#"{"prompt": "a", "choices": ["b"]}"#, "line 2: answer is missing"),
            (r#"{"prompt": "a", "choices": ["b"], "answer": "c"}"#, "answer must be one of the choices, got \"c\""),
            (r#"{"prompt": "a", "choices": ["b"], "answer": 1}"#, "answer must be a whole number from 0 to 0, got 1"),
            (r#"{"prompt": "a", "choices": [], "answer": 0}"#, "choices must be a list that is not empty"),
            (r#"{"prompt": "a", "references": NaN}"#, "line 2: references is no JSON: expected value"),
            ("[1]", "line 2: the file must be an object, got a list of 1"),
        ] {
            let error = read(&format!("\n{line}\n")).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
        assert!(read("\n").unwrap_err().to_string().contains("has no items"));
        let twice = "{\"id\": \"a\", \"text\": \"x\"}\n{\"id\": \"a\", \"text\": \"y\"}";
        assert!(read(twice).unwrap_err().to_string().contains("two items have the id \"a\""));
    }

    #[test]
    fn choices_are_judged_by_their_log_probabilities() {
        let task = read(r#"{"prompt": "q", "choices": ["longer", "no"], "references": ["longer"]}"#).unwrap();
        assert_eq!(task.lines("t").len(), 2);
        let answers = [json!({"logprob": -4.0, "error": null}), json!({"logprob": -3.0, "error": null})];
        let (measured, failed) = task.measure("t", |id| answers.get(id.rsplit('/').next()?.parse::<usize>().ok()?));
        let values: Vec<f64> = measured[0].stats.iter().map(|stat| stat.sum).collect();
        assert_eq!((values, failed), (vec![0.0, 1.0], 0));
        assert_eq!(task.measure("t", |_| None).1, 1);
    }
}
