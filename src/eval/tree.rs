//! JSON whose values know where they stand, so that whatever is wrong is named by its path.
//!
//! **Invariant:** a message names file, path and the value found, cut to a length that can be read.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Longest text that a value may be: that of an input line.
const MAX_TEXT_BYTES: usize = 64 << 20;

/// A value within a file.
#[derive(Clone)]
pub struct Node<'a> {
    /// The value.
    pub value: &'a Value,
    file: &'a Path,
    path: String,
    /// What to do when something is wrong.
    hint: &'static str,
}

/// Parses a file's text.
///
/// # Errors
/// [`Error::Input`] naming the path of the value that is no JSON.
pub fn parse(text: &str, file: &Path) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| {
        let line_start = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum::<usize>();
        let at = (line_start + error.column().saturating_sub(1)).min(text.len());
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        let hint = if what.contains("expected value") {
            "NaN, Infinity and comments are no JSON: write null, or leave the key out"
        } else {
            "write the file anew"
        };
        let (path, line) = (path_at(text.as_bytes(), at), error.line());
        wrong(file, &path, &format!("is no JSON: {what} (line {line}, column {})", error.column()), hint)
    })
}

fn wrong(file: &Path, path: &str, what: &str, hint: &str) -> Error {
    let path = if path.is_empty() { "the file" } else { path };
    Error::Input { path: file.to_owned(), what: format!("{path} {what}"), hint: Some(hint.into()) }
}

/// The path of the value that a byte belongs to, in a text that is JSON up to there.
fn path_at(text: &[u8], end: usize) -> String {
    enum Place {
        Key(String),
        Index(usize),
    }
    let mut places: Vec<Place> = Vec::new();
    let mut string: Option<usize> = None;
    let mut last = "";
    let mut at = 0;
    while at < end.min(text.len()) {
        match (string, text[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(start), b'"') => {
                last = std::str::from_utf8(&text[start..at]).unwrap_or_default();
                string = None;
            }
            (Some(_), _) => {}
            (None, b'"') => string = Some(at + 1),
            (None, b'{') => places.push(Place::Key(String::new())),
            (None, b'[') => places.push(Place::Index(0)),
            (None, b'}' | b']') => drop(places.pop()),
            (None, b':') => {
                if let Some(Place::Key(key)) = places.last_mut() {
                    *key = last.to_owned();
                }
            }
            (None, b',') => match places.last_mut() {
                Some(Place::Index(index)) => *index += 1,
                Some(Place::Key(key)) => key.clear(),
                None => {}
            },
            (None, _) => {}
        }
        at += 1;
    }
    let steps = places.iter().filter_map(|place| match place {
        Place::Index(index) => Some(format!("[{index}]")),
        Place::Key(key) if key.is_empty() => None,
        Place::Key(key) => Some(format!(".{key}")),
    });
    steps.collect::<String>().trim_start_matches('.').to_owned()
}

impl fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.value)
    }
}

impl<'a> Node<'a> {
    /// A file's whole content.
    pub fn root(value: &'a Value, file: &'a Path, hint: &'static str) -> Self {
        Node { value, file, path: String::new(), hint }
    }

    /// The error that this value is not what it must be.
    pub fn wrong(&self, expected: &str) -> Error {
        let found = match self.value {
            Value::Array(list) => format!("a list of {}", list.len()),
            Value::Object(map) => format!("an object of {} keys", map.len()),
            value => shortened(&value.to_string()),
        };
        wrong(self.file, &self.path, &format!("must be {expected}, got {found}"), self.hint)
    }

    /// The error that a key is missing.
    pub fn missing(&self, key: &str) -> Error {
        let path = self.step(key);
        wrong(self.file, &path, "is missing", self.hint)
    }

    fn step(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// A member that may be absent; `null` is absent.
    pub fn get(&self, key: &str) -> Result<Option<Node<'a>>> {
        let Value::Object(map) = self.value else { return Err(self.wrong("an object")) };
        let value = map.get(key).filter(|value| !value.is_null());
        Ok(value.map(|value| Node { value, file: self.file, path: self.step(key), hint: self.hint }))
    }

    /// A member that must be there.
    pub fn need(&self, key: &str) -> Result<Node<'a>> {
        self.get(key)?.ok_or_else(|| self.missing(key))
    }

    /// The items of a list.
    pub fn items(&self) -> Result<Vec<Node<'a>>> {
        let Value::Array(list) = self.value else { return Err(self.wrong("a list")) };
        let (file, hint) = (self.file, self.hint);
        let node = |(index, value)| Node { value, file, path: format!("{}[{index}]", self.path), hint };
        Ok(list.iter().enumerate().map(node).collect())
    }

    /// The members of an object.
    pub fn members(&self) -> Result<Vec<(&'a str, Node<'a>)>> {
        let Value::Object(map) = self.value else { return Err(self.wrong("an object")) };
        let node = |(key, value): (&'a String, _)| {
            (key.as_str(), Node { value, file: self.file, path: self.step(key), hint: self.hint })
        };
        Ok(map.iter().map(node).collect())
    }

    /// A text.
    pub fn text(&self) -> Result<&'a str> {
        let text = self.value.as_str().ok_or_else(|| self.wrong("a string"))?;
        if text.len() > MAX_TEXT_BYTES {
            let what = format!("has {} bytes, at most {MAX_TEXT_BYTES} are taken", text.len());
            return Err(wrong(self.file, &self.path, &what, "split it"));
        }
        Ok(text)
    }

    /// A finite number within a range.
    pub fn number(&self, low: f64, high: f64) -> Result<f64> {
        let number = self.value.as_f64().filter(|number| (low..=high).contains(number));
        number.ok_or_else(|| self.wrong(&format!("a number from {low} to {high}")))
    }

    /// A whole number within a range.
    pub fn integer(&self, low: i64, high: i64) -> Result<i64> {
        let number = self.value.as_i64().filter(|number| (low..=high).contains(number));
        number.ok_or_else(|| self.wrong(&format!("a whole number from {low} to {high}")))
    }

    /// True or false.
    pub fn flag(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_json_is_named_by_its_path() {
        let said = |text: &str| parse(text, Path::new("s.json")).unwrap_err().to_string();
        let text = "{\"a\": {\"x\": [1, {\"b,]\\\"\": 2}]},\n \"list\": [{\"n\": 1}, {\"m\": 2, \"n\": NaN}]}";
        assert!(said(text).starts_with("s.json: list[1].n is no JSON: expected value"), "{}", said(text));
        assert!(said("{\"a\": [1, 2").starts_with("s.json: a[1] is no JSON: EOF"), "{}", said("{\"a\": [1, 2"));
        assert!(said("").starts_with("s.json: the file is no JSON"));
        assert!(said("[-Infinity]").starts_with("s.json: [0] is no JSON"));
    }

    #[test]
    fn values_are_named_by_their_path() {
        let value = serde_json::json!({"a": [{"b": "x".repeat(100)}]});
        let root = Node::root(&value, Path::new("s.json"), "");
        let item = &root.need("a").unwrap().items().unwrap()[0];
        let error = item.need("b").unwrap().integer(0, 9).unwrap_err().to_string();
        assert!(error.starts_with("s.json: a[0].b must be a whole number from 0 to 9, got \"xxx"), "{error}");
        assert!(error.ends_with("… (102 bytes)"), "{error}");
        assert_eq!(item.need("c").unwrap_err().to_string(), "s.json: a[0].c is missing");
        assert_eq!(
            root.need("a").unwrap().flag().unwrap_err().to_string(),
            "s.json: a must be true or false, got a list of 1"
        );
    }
}
