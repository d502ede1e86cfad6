//! Reading numbers, flags and texts out of the JSON files of a model directory.
//!
//! **Invariant:** a value that is there but has the wrong type or range is an error naming file, key and value;
//! `null` counts as absent.

use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object and where it comes from.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    /// Prefix of keys in messages, such as `rope_scaling.`.
    within: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which must be an object.
    pub fn new(value: &'a Value, path: &'a Path) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::model(path, "is not a JSON object"))?;
        Ok(Fields { map, path, within: "" })
    }

    /// The object at `key`; `within` (such as `rope_scaling.`) goes before its keys in messages.
    pub fn object(&self, key: &str, within: &'a str) -> Result<Option<Fields<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map, path: self.path, within })),
            Some(other) => Err(self.unusable(key, other, "an object")),
        }
    }

    /// The value at `key`, unless absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Whether there are no keys at all.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The whole number at `key`, within `range`.
    pub fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let wanted = format!("a whole number from {} to {}", range.start(), range.end());
                Err(self.unusable(key, value, &wanted))
            }
        }
    }

    /// As [`Fields::size`], for a key that must be there.
    pub fn required_size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.size(key, range)?.ok_or_else(|| self.missing(key))
    }

    /// The finite number at `key`, within `range`.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|number| number.is_finite() && range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let wanted = format!("a number from {} to {}", range.start(), range.end());
                Err(self.unusable(key, value, &wanted))
            }
        }
    }

    /// As [`Fields::number`], for a key that must be there.
    pub fn required_number(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        self.number(key, range)?.ok_or_else(|| self.missing(key))
    }

    /// The list of finite numbers at `key`.
    pub fn numbers(&self, key: &str, range: RangeInclusive<f64>) -> Result<Vec<f64>> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        let wrong = || self.unusable(key, value, "a list of numbers in a sane range");
        let list = value.as_array().ok_or_else(wrong)?;
        list.iter().map(|item| item.as_f64().filter(|number| range.contains(number)).ok_or_else(wrong)).collect()
    }

    /// The flag at `key`, or `default`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.unusable(key, other, "true or false")),
        }
    }

    /// The text at `key`.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.unusable(key, other, "a text")),
        }
    }

    /// The token id or list of token ids at `key`; none when the key is absent, empty when null.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.map.get(key) else { return Ok(None) };
        let wrong = || self.unusable(key, value, "a token id or a list of token ids");
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
        match value {
            Value::Null => Ok(Some(Vec::new())),
            // Some old files write -1 for "none".
            Value::Number(number) if number.as_i64() == Some(-1) => Ok(Some(Vec::new())),
            Value::Array(list) => list.iter().map(id).collect::<Result<_>>().map(Some),
            single => Ok(Some(vec![id(single)?])),
        }
    }

    /// An error saying that the value at `key` is not `wanted`.
    pub fn unusable(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            let end = (0..=77).rev().find(|&end| shown.is_char_boundary(end)).unwrap_or(0);
            shown.truncate(end);
            shown.push_str("...");
        }
        Error::model(self.path, format!("`{}{key}` is {shown}, which is not {wanted}", self.within))
    }

    /// An error saying that `key` is missing.
    pub fn missing(&self, key: &str) -> Error {
        Error::model(self.path, format!("`{}{key}` is missing", self.within))
    }

    /// An error about this file.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::model(self.path, what)
    }
}
