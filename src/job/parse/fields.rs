//! A JSON object as named fields that are taken one by one.
//!
//! **Invariant:** every field is taken by name or reported by [`Fields::finish`]; none is silently ignored.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{self, DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::job::request::LineError;

type Parsed<T> = Result<T, LineError>;

/// The fields of one JSON object, by name.
#[derive(Debug, Default)]
pub(crate) struct Fields(BTreeMap<String, Box<RawValue>>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if fields.contains_key(&key) {
                        return Err(de::Error::custom(format_args!("`{}` is given twice", shorten(&key))));
                    }
                    fields.insert(key, value);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    /// Whether a field is there, `null` included.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// The JSON text of a field, left where it is; `null` counts as absent.
    pub fn peek(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|value| value.get()).filter(|text| *text != "null")
    }

    /// Removes a field; `null` counts as absent.
    pub fn take(&mut self, key: &str) -> Option<Box<RawValue>> {
        self.0.remove(key).filter(|value| value.get() != "null")
    }

    /// Removes a field that must have a JSON type, told in words by `expected`.
    pub fn get<T: DeserializeOwned>(&mut self, key: &str, expected: &str) -> Parsed<Option<T>> {
        let Some(raw) = self.take(key) else { return Ok(None) };
        match serde_json::from_str(raw.get()) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(invalid(key, expected, raw.get())),
        }
    }

    /// A text.
    pub fn text(&mut self, key: &str) -> Parsed<Option<String>> {
        self.get(key, "a string")
    }

    /// A flag.
    pub fn flag(&mut self, key: &str, default: bool) -> Parsed<bool> {
        Ok(self.get(key, "true or false")?.unwrap_or(default))
    }

    /// A number within a range.
    pub fn float(&mut self, key: &str, range: RangeInclusive<f64>) -> Parsed<Option<f32>> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let Some(raw) = self.take(key) else { return Ok(None) };
        match serde_json::from_str::<f64>(raw.get()) {
            Ok(value) if range.contains(&value) => Ok(Some(value as f32)),
            _ => Err(invalid(key, &expected, raw.get())),
        }
    }

    /// A whole number within a range; `16.0` is one too.
    pub fn integer<T: TryFrom<i64>>(&mut self, key: &str, range: RangeInclusive<i64>) -> Parsed<Option<T>> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let Some(raw) = self.take(key) else { return Ok(None) };
        whole(raw.get())
            .filter(|value| range.contains(value))
            .and_then(|value| T::try_from(value).ok())
            .map(Some)
            .ok_or_else(|| invalid(key, &expected, raw.get()))
    }

    /// A list of token ids below `vocab_size`.
    pub fn token_ids(&mut self, key: &str, vocab_size: u32) -> Parsed<Option<Vec<u32>>> {
        let expected = format!("a list of token ids below {vocab_size}");
        let Some(raw) = self.take(key) else { return Ok(None) };
        match serde_json::from_str::<Vec<u32>>(raw.get()) {
            Ok(ids) => match ids.iter().find(|&&id| id >= vocab_size) {
                None => Ok(Some(ids)),
                Some(id) => Err(invalid(key, &expected, &id.to_string())),
            },
            Err(_) => Err(invalid(key, &expected, raw.get())),
        }
    }

    /// Says which fields nobody took.
    pub fn finish(self) -> Parsed<()> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(LineError::new("unknown_field", format!("`{}` is not a known field", shorten(&key)))),
        }
    }
}

fn whole(text: &str) -> Option<i64> {
    serde_json::from_str::<i64>(text).ok().or_else(|| {
        let value = serde_json::from_str::<f64>(text).ok()?;
        (value.fract() == 0.0 && value.abs() < 9e15).then_some(value as i64)
    })
}

/// The error for a value that is not what its key needs.
pub(crate) fn invalid(key: &str, expected: &str, got: &str) -> LineError {
    LineError::new("invalid_value", format!("`{key}` must be {expected}, got {}", shorten(got)))
}

/// A text cut to a length that an error message can carry.
pub(crate) fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    match text.char_indices().nth(MAX_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
