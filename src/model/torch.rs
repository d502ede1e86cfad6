//! Tensors of a `pytorch_model.bin`: a zip archive of a pickle and one raw file per storage.
//!
//! **Invariant:** a tensor's bytes lie within its storage's entry; the pickle is never executed.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::dtype::DType;
use super::pickle::{PickledTensor, element_size, state_dict};
use super::source::{TensorSource, TensorView};
use super::zip::{self, Entries};
use crate::error::{Error, Result};
use crate::memory::mapped_file::MappedFile;

/// One file written by `torch.save` (since torch 1.6).
pub struct TorchFile {
    file: MappedFile,
    tensors: HashMap<String, Stored>,
}

/// A tensor that can be read, or why not: files hold buffers (masks, positions) that nobody asks for.
type Stored = std::result::Result<Located, String>;

#[derive(Debug)]
struct Located {
    dtype: DType,
    shape: Vec<usize>,
    extent: Range<usize>,
}

impl TorchFile {
    /// Maps the file at `path` and reads its pickle.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be mapped, `Error::Model` when it is of the old format, malformed, or asks for
    /// anything but tensors. A tensor that does not fit its storage is an error once it is asked for.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let tensors = read(file.bytes()?, path)?;
        Ok(TorchFile { file, tensors })
    }

    /// The names of all tensors, in no particular order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn find(&self, name: &str) -> Result<Option<&Located>> {
        let Some(stored) = self.tensors.get(name) else { return Ok(None) };
        let problem = |what: &String| Error::model(self.file.path(), format!("tensor `{name}` {what}"));
        stored.as_ref().map(Some).map_err(problem)
    }
}

fn read(bytes: &[u8], path: &Path) -> Result<HashMap<String, Stored>> {
    let fail = |what: String| Error::model(path, what);
    if !zip::is_zip(bytes) {
        let file = path.display();
        return Err(Error::Model {
            path: path.to_owned(),
            what: "is not in the zip format that torch.save writes since version 1.6".into(),
            hint: Some(format!(
                "save it again: python -c \"import torch; \
                 torch.save(torch.load('{file}', map_location='cpu', weights_only=True), '{file}')\""
            )),
        });
    }
    let entries = zip::entries(bytes).map_err(fail)?;
    let pickle = entries.keys().find(|name| name.split_once('/').is_some_and(|(_, file)| file == "data.pkl"));
    let pickle = pickle.ok_or_else(|| Error::model(path, "has no `data.pkl` in its archive"))?;
    let root = pickle.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(order) = entries.get(&format!("{root}byteorder"))
        && &bytes[order.clone()] != b"little"
    {
        return Err(Error::model(path, "holds big-endian numbers"));
    }
    let pickled = state_dict(&bytes[entries[pickle].clone()]).map_err(fail)?;
    Ok(pickled.into_iter().map(|(name, tensor)| (name.to_owned(), locate(&tensor, &entries, root))).collect())
}

/// Checks a described tensor against its storage.
fn locate(tensor: &PickledTensor<'_>, entries: &Entries, root: &str) -> Stored {
    let dtype = match tensor.storage_type {
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::Bf16,
        other => return Err(format!("is a {other} (Float, Half and BFloat16 storages are supported)")),
    };
    let element = element_size(tensor.storage_type).ok_or("has an unknown storage type")?;
    let key = format!("{root}data/{}", tensor.storage_key);
    let entry = entries.get(&key).ok_or_else(|| format!("refers to `{key}`, which is not in the archive"))?;
    let storage_bytes = tensor.storage_len.checked_mul(element);
    if storage_bytes.is_none_or(|bytes| bytes > entry.len() as u64) {
        return Err(format!("needs {} elements, `{key}` has {} bytes", tensor.storage_len, entry.len()));
    }
    if !contiguous(&tensor.shape, &tensor.strides) {
        return Err("is not stored in row-major order".into());
    }
    let outside = || "lies outside its storage".to_owned();
    let elements = tensor.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
    let end = elements.and_then(|elements| tensor.offset.checked_add(elements));
    let end = end.filter(|&end| end <= tensor.storage_len).ok_or_else(outside)?;
    // Within the entry, so neither product nor conversion can overflow.
    let extent = entry.start + (tensor.offset * element) as usize..entry.start + (end * element) as usize;
    let shape =
        tensor.shape.iter().map(|&size| usize::try_from(size).map_err(|_| outside())).collect::<Result<_, _>>()?;
    Ok(Located { dtype, shape, extent })
}

/// Whether strides are those of row-major order, where they matter.
fn contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1u64;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size == 0 {
            return true;
        }
        if size > 1 && stride != expected {
            return false;
        }
        expected = expected.saturating_mul(size);
    }
    true
}

impl TensorSource for TorchFile {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let Some(Located { dtype, shape, extent }) = self.find(name)? else { return Ok(None) };
        let data = Cow::Borrowed(&self.file.bytes()?[extent.clone()]);
        Ok(Some(TensorView { dtype: *dtype, shape: shape.clone(), data }))
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.tensors.get(name)?.as_ref().ok().map(|located| located.dtype)
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(self.find(name)?.map(|located| located.shape.clone()))
    }

    fn origin(&self, _: &str) -> PathBuf {
        self.file.path().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::zip::tests::archive;

    /// The pickle that torch writes for one float tensor of `shape` with `strides` at `offset`.
    fn pickle(shape: &[u8], strides: &[u8], offset: u8, storage_len: u8) -> Vec<u8> {
        let text = |text: &str| [b"X".to_vec(), (text.len() as u32).to_le_bytes().to_vec(), text.into()].concat();
        let tuple = |items: &[u8]| {
            let items: Vec<u8> = items.iter().flat_map(|&item| [b'K', item]).collect();
            [b"(".to_vec(), items, b"t".to_vec()].concat()
        };
        [
            b"\x80\x02}q\x00(".to_vec(),
            text("weight"),
            b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text("0"),
            text("cpu"),
            vec![b'K', storage_len],
            b"tQ".to_vec(),
            vec![b'K', offset],
            tuple(shape),
            tuple(strides),
            b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
        ]
        .concat()
    }

    fn open(pickle: &[u8], storage: &[u8]) -> Result<HashMap<String, Stored>> {
        read(&archive(&[("m/data.pkl", pickle), ("m/data/0", storage)], false), Path::new("m.bin"))
    }

    #[test]
    fn a_tensor_is_a_view_of_its_storage() {
        let tensors = open(&pickle(&[2, 3], &[3, 1], 2, 8), &[0; 32]).unwrap();
        let stored = tensors["weight"].as_ref().unwrap();
        assert_eq!((stored.dtype, &stored.shape[..], stored.extent.len()), (DType::F32, &[2, 3][..], 24));
    }

    #[test]
    fn extents_and_strides_are_checked() {
        let error = |pickle: &[u8], storage: &[u8]| match open(pickle, storage) {
            Ok(tensors) => tensors["weight"].as_ref().unwrap_err().clone(),
            Err(error) => error.to_string(),
        };
        assert!(error(&pickle(&[2, 3], &[3, 1], 3, 8), &[0; 32]).contains("outside its storage"));
        assert!(error(&pickle(&[2, 3], &[3, 1], 0, 9), &[0; 32]).contains("has 32 bytes"));
        assert!(error(&pickle(&[2, 3], &[1, 2], 0, 8), &[0; 32]).contains("row-major"));
        assert!(error(&pickle(&[255; 15], &[0; 15], 0, 8), &[0; 32]).contains("row-major"));
        assert!(error(b"\x80\x02", &[]).contains("cut short"));
        assert!(error(b"P", &[]).contains("not supported"));
    }

    #[test]
    fn code_is_refused_by_name() {
        let error = open(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", &[]).err().unwrap();
        assert!(error.to_string().contains("`os.system`"), "{error}");
        let old = read(b"\x80\x02\x8a\x0al\xfc\x9c\x46", Path::new("old.bin")).err().unwrap();
        assert!(old.hint().unwrap().contains("torch.load"));
    }

    proptest::proptest! {
        /// Damaged pickles and streams of random operations end in an error or a consistent table.
        #[test]
        fn damage_never_panics(at in 0usize..300, value: u8, tail in proptest::collection::vec(0u8.., 0..60)) {
            let mut damaged = pickle(&[2, 3], &[3, 1], 2, 8);
            let len = damaged.len();
            damaged[at % len] = value;
            let _ = open(&damaged, &[0; 32]);
            damaged.splice(at % len.., tail.clone());
            let _ = open(&damaged, &[0; 32]);
            let _ = open(&tail, &[0; 32]);
        }
    }
}
