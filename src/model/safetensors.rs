//! Tensors of a `.safetensors` file or image.
//!
//! The header is parsed by the `safetensors` crate, which bounds it to 100 MB and accepts only extents that follow
//! each other without gap or overlap, fit shape and dtype, and end with the file.
//!
//! **Invariant:** a tensor's bytes lie within the file's data.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::dtype::DType;
use super::source::{TensorSource, TensorView};
use crate::error::{Error, Result};
use crate::memory::mapped_file::MappedFile;

/// One safetensors file.
pub struct SafetensorsFile {
    data: Data,
    tensors: HashMap<String, Stored>,
}

enum Data {
    Mapped(MappedFile),
    Static(PathBuf, &'static [u8]),
}

struct Stored {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    extent: Range<usize>,
}

impl SafetensorsFile {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be mapped, `Error::Model` when the header is malformed or does not fit the file.
    pub fn open(path: &Path) -> Result<Self> {
        SafetensorsFile::new(Data::Mapped(MappedFile::open(path)?))
    }

    /// A file that is part of the program; `name` is for messages.
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self> {
        SafetensorsFile::new(Data::Static(PathBuf::from(name), bytes))
    }

    fn new(data: Data) -> Result<Self> {
        let bytes = data.bytes()?;
        let malformed = |error| {
            let hint = "the file may be cut short: download it again".to_owned();
            let what = format!("is not a valid safetensors file: {error}");
            Error::Model { path: data.path().to_owned(), what, hint: Some(hint) }
        };
        let (header_len, metadata) = safetensors::SafeTensors::read_metadata(bytes).map_err(malformed)?;
        let start = 8 + header_len;
        let mut tensors = HashMap::new();
        for (name, info) in metadata.tensors() {
            let extent = start + info.data_offsets.0..start + info.data_offsets.1;
            // The crate has checked it; a slip there must not become a panic here.
            if bytes.get(extent.clone()).is_none() {
                return Err(Error::model(data.path(), format!("tensor `{name}` lies outside the file")));
            }
            tensors.insert(name, Stored { dtype: info.dtype, shape: info.shape.clone(), extent });
        }
        Ok(SafetensorsFile { data, tensors })
    }

    /// The names of all tensors, in no particular order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn supported(&self, name: &str, stored: &Stored) -> Result<DType> {
        supported(stored.dtype).ok_or_else(|| {
            let what = format!("tensor `{name}` has dtype {} (F32, F16 and BF16 are supported)", stored.dtype);
            Error::model(self.data.path(), what)
        })
    }
}

fn supported(dtype: safetensors::Dtype) -> Option<DType> {
    match dtype {
        safetensors::Dtype::F32 => Some(DType::F32),
        safetensors::Dtype::F16 => Some(DType::F16),
        safetensors::Dtype::BF16 => Some(DType::Bf16),
        _ => None,
    }
}

impl Data {
    fn path(&self) -> &Path {
        match self {
            Data::Mapped(file) => file.path(),
            Data::Static(path, _) => path,
        }
    }

    fn bytes(&self) -> Result<&[u8]> {
        match self {
            Data::Mapped(file) => file.bytes(),
            Data::Static(_, bytes) => Ok(bytes),
        }
    }
}

impl TensorSource for SafetensorsFile {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let Some(stored) = self.tensors.get(name) else { return Ok(None) };
        let dtype = self.supported(name, stored)?;
        let data = Cow::Borrowed(&self.data.bytes()?[stored.extent.clone()]);
        Ok(Some(TensorView { dtype, shape: stored.shape.clone(), data }))
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        supported(self.tensors.get(name)?.dtype)
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let Some(stored) = self.tensors.get(name) else { return Ok(None) };
        self.supported(name, stored)?;
        Ok(Some(stored.shape.clone()))
    }

    fn origin(&self, _: &str) -> PathBuf {
        self.data.path().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with the header `header` and `data_len` bytes of data.
    fn file(header: &str, data_len: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data_len, 1);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<SafetensorsFile> {
        SafetensorsFile::embedded("test.safetensors", bytes.to_vec().leak())
    }

    #[test]
    fn tensors_are_found_and_sliced() {
        let header = r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
            "b":{"dtype":"I64","shape":[1],"data_offsets":[12,20]}}"#;
        let source = open(&file(header, 20)).unwrap();
        let tensor = source.tensor("a").unwrap().unwrap();
        assert_eq!((tensor.dtype, tensor.shape, tensor.data.len()), (DType::Bf16, vec![2, 3], 12));
        assert_eq!(source.rows("a", 1..2).unwrap().unwrap().data.len(), 6);
        assert!(source.tensor("absent").unwrap().is_none());
        let error = source.tensor("b").err().unwrap().to_string();
        assert!(error.contains("`b` has dtype I64"), "{error}");
        assert_eq!(source.dtype("b"), None);
    }

    #[test]
    fn extents_must_fit() {
        let with = |shape: &str, from: u64, to: u64| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
        };
        assert!(open(&file(&with("[2,2]", 0, 16), 16)).is_ok());
        let overlapping = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        let bad = [
            file(&with("[2,2]", 0, 16), 15),
            file(&with("[2,2]", 0, 16), 17),
            file(&with("[2,3]", 0, 16), 16),
            file(&with("[2,2]", 16, 0), 16),
            file(&with("[18446744073709551615,18446744073709551615]", 0, 16), 16),
            file(&with("[9223372036854775808,2]", 0, 0), 0),
            file(overlapping, 12),
            file("{", 0),
            u64::MAX.to_le_bytes().to_vec(),
            200_000_000u64.to_le_bytes().to_vec(),
            vec![1, 2, 3],
        ];
        for (i, bytes) in bad.iter().enumerate() {
            assert!(open(bytes).is_err(), "case {i}");
        }
    }

    proptest::proptest! {
        /// Arbitrary bytes after a plausible length never panic.
        #[test]
        fn any_header_is_refused_or_consistent(header in "[\\[\\]{}\":,a-z0-9F_]{0,80}", data_len in 0usize..64) {
            if let Ok(source) = open(&file(&header, data_len)) {
                for name in source.names() {
                    if let Ok(Some(tensor)) = source.tensor(name) {
                        let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
                        assert_eq!(bytes, tensor.data.len());
                    }
                }
            }
        }
    }
}
