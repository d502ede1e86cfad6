//! The directory of a zip archive whose entries are stored without compression, as `torch.save` writes them.
//!
//! **Invariant:** every entry's extent lies within the archive; compressed, encrypted or split archives are refused.

use std::collections::HashMap;
use std::ops::Range;

/// Entries by name, each with the extent of its bytes in the archive.
pub type Entries = HashMap<String, Range<usize>>;

/// What is wrong with an archive.
pub type Problem = String;

const END: u32 = 0x0605_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const END_64: u32 = 0x0606_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;
const END_LEN: usize = 22;
const CENTRAL_LEN: usize = 46;
const LOCAL_LEN: usize = 30;

/// Whether `bytes` begin as a zip archive does.
pub fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
}

/// Reads the central directory of `archive`.
pub fn entries(archive: &[u8]) -> Result<Entries, Problem> {
    let directory = directory(archive)?;
    let mut entries = Entries::new();
    let mut at = directory.extent.start;
    for _ in 0..directory.count {
        let (entry, next) = central_entry(archive, at, directory.extent.end)?;
        at = next;
        let extent = local_extent(archive, &entry, directory.extent.start)?;
        if entries.insert(entry.name.clone(), extent).is_some() {
            return Err(format!("zip entry `{}` is there twice", entry.name));
        }
    }
    Ok(entries)
}

struct Directory {
    extent: Range<usize>,
    count: u64,
}

struct CentralEntry {
    name: String,
    offset: u64,
    size: u64,
}

fn directory(archive: &[u8]) -> Result<Directory, Problem> {
    let end = find_end(archive).ok_or("no zip directory at the end: the file is cut short or no zip archive")?;
    let record = Record { bytes: archive, at: end };
    let mut disks = u64::from(record.u16(4)?) | u64::from(record.u16(6)?);
    let mut count = u64::from(record.u16(10)?);
    let mut size = u64::from(record.u32(12)?);
    let mut offset = u64::from(record.u32(16)?);
    if count == 0xFFFF || size == 0xFFFF_FFFF || offset == 0xFFFF_FFFF {
        let locator = Record { bytes: archive, at: end.checked_sub(20).ok_or("zip64 locator is missing")? };
        if locator.u32(0)? != END_64_LOCATOR {
            return Err("zip64 locator is missing".into());
        }
        let record = Record { bytes: archive, at: to_usize(locator.u64(8)?)? };
        if record.u32(0)? != END_64 {
            return Err("zip64 directory record is missing".into());
        }
        disks = u64::from(record.u32(16)?) | u64::from(record.u32(20)?);
        (count, size, offset) = (record.u64(32)?, record.u64(40)?, record.u64(48)?);
    }
    if disks != 0 && disks != 0xFFFF {
        return Err("the zip archive is split over several files".into());
    }
    let stop = offset.checked_add(size).filter(|&stop| stop <= end as u64).ok_or("zip directory is out of bounds")?;
    if count > size / CENTRAL_LEN as u64 {
        return Err("zip directory is too short for its entries".into());
    }
    Ok(Directory { extent: to_usize(offset)?..to_usize(stop)?, count })
}

/// The last end record whose comment reaches exactly to the end of the archive.
fn find_end(archive: &[u8]) -> Option<usize> {
    let last = archive.len().checked_sub(END_LEN)?;
    let first = last.saturating_sub(0xFFFF);
    (first..=last).rev().find(|&at| {
        let record = Record { bytes: archive, at };
        record.u32(0) == Ok(END)
            && record.u16(20).is_ok_and(|comment| at + END_LEN + usize::from(comment) == archive.len())
    })
}

fn central_entry(archive: &[u8], at: usize, end: usize) -> Result<(CentralEntry, usize), Problem> {
    let record = Record { bytes: &archive[..end], at };
    if record.u32(0)? != CENTRAL {
        return Err("zip directory is damaged".into());
    }
    let name_len = usize::from(record.u16(28)?);
    let extra_len = usize::from(record.u16(30)?);
    let comment_len = usize::from(record.u16(32)?);
    let name = record.slice(CENTRAL_LEN, name_len)?;
    let name = std::str::from_utf8(name).map_err(|_| "zip entry name is not UTF-8")?.to_owned();
    let extra = record.slice(CENTRAL_LEN + name_len, extra_len)?;
    let mut wide = zip64_extra(extra);
    let mut widen = |narrow: u32| -> Result<u64, Problem> {
        if narrow != 0xFFFF_FFFF {
            return Ok(u64::from(narrow));
        }
        let (number, rest) = wide.split_first_chunk::<8>().ok_or("zip64 sizes are missing")?;
        wide = rest;
        Ok(u64::from_le_bytes(*number))
    };
    let size = widen(record.u32(24)?)?;
    let stored = widen(record.u32(20)?)?;
    let offset = widen(record.u32(42)?)?;
    if record.u16(8)? & 1 != 0 {
        return Err(format!("zip entry `{name}` is encrypted"));
    }
    if record.u16(10)? != 0 || stored != size {
        return Err(format!("zip entry `{name}` is compressed"));
    }
    Ok((CentralEntry { name, offset, size }, at + CENTRAL_LEN + name_len + extra_len + comment_len))
}

/// The payload of the zip64 field (id 1) of an extra block, or nothing.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while let [id0, id1, len0, len1, rest @ ..] = extra {
        let len = usize::from(u16::from_le_bytes([*len0, *len1])).min(rest.len());
        if [*id0, *id1] == [1, 0] {
            return &rest[..len];
        }
        extra = &rest[len..];
    }
    &[]
}

fn local_extent(archive: &[u8], entry: &CentralEntry, end: usize) -> Result<Range<usize>, Problem> {
    let record = Record { bytes: archive, at: to_usize(entry.offset)? };
    if record.u32(0)? != LOCAL {
        return Err(format!("zip entry `{}` has no header at its offset", entry.name));
    }
    let skip = LOCAL_LEN + usize::from(record.u16(26)?) + usize::from(record.u16(28)?);
    let start = record.at.checked_add(skip);
    let stop = start.and_then(|start| start.checked_add(usize::try_from(entry.size).ok()?));
    match (start, stop) {
        (Some(start), Some(stop)) if stop <= end => Ok(start..stop),
        _ => Err(format!("zip entry `{}` is out of bounds", entry.name)),
    }
}

fn to_usize(number: u64) -> Result<usize, Problem> {
    usize::try_from(number).map_err(|_| "zip offset is out of bounds".to_owned())
}

/// Little-endian numbers at offsets from a place that need not exist.
struct Record<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Record<'a> {
    fn slice(&self, offset: usize, len: usize) -> Result<&'a [u8], Problem> {
        let start = self.at.checked_add(offset);
        let extent = start.and_then(|start| Some(start..start.checked_add(len)?));
        extent.and_then(|extent| self.bytes.get(extent)).ok_or_else(|| "zip directory is out of bounds".to_owned())
    }

    fn number<const N: usize>(&self, offset: usize) -> Result<[u8; N], Problem> {
        let bytes = self.slice(offset, N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn u16(&self, offset: usize) -> Result<u16, Problem> {
        self.number(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32, Problem> {
        self.number(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, Problem> {
        self.number(offset).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An archive of stored entries; with `wide`, sizes and offsets in zip64 fields.
    pub fn archive(files: &[(&str, &[u8])], wide: bool) -> Vec<u8> {
        let (mut bytes, mut central) = (Vec::new(), Vec::new());
        for (name, data) in files {
            let offset = bytes.len() as u64;
            bytes.extend(LOCAL.to_le_bytes());
            bytes.extend([0; 22]);
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend([0; 2]);
            bytes.extend(name.as_bytes());
            bytes.extend(*data);
            let size = data.len() as u64;
            let extra: Vec<u8> = [vec![1, 0, 24, 0], [size, size, offset].map(u64::to_le_bytes).concat()].concat();
            let extra = if wide { extra } else { Vec::new() };
            let field = |number: u64| if wide { [0xFF; 4] } else { (number as u32).to_le_bytes() };
            central.extend(CENTRAL.to_le_bytes());
            central.extend([0; 16]);
            central.extend([field(size), field(size)].concat());
            central.extend((name.len() as u16).to_le_bytes());
            central.extend((extra.len() as u16).to_le_bytes());
            central.extend([0; 10]);
            central.extend(field(offset));
            central.extend(name.as_bytes());
            central.extend(extra);
        }
        let (start, size, count) = (bytes.len() as u64, central.len() as u64, files.len() as u64);
        bytes.extend(central);
        if wide {
            let record = bytes.len() as u64;
            bytes.extend(END_64.to_le_bytes());
            bytes.extend(44u64.to_le_bytes());
            bytes.extend([0; 12]);
            bytes.extend([count, count, size, start].map(u64::to_le_bytes).concat());
            bytes.extend(END_64_LOCATOR.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(record.to_le_bytes());
            bytes.extend(1u32.to_le_bytes());
        }
        bytes.extend(END.to_le_bytes());
        bytes.extend([0; 4]);
        let narrow = |number: u64| if wide { [0xFF; 4] } else { (number as u32).to_le_bytes() };
        bytes.extend(if wide { [0xFF; 4] } else { [count as u8, 0, count as u8, 0] });
        bytes.extend([narrow(size), narrow(start)].concat());
        bytes.extend([0; 2]);
        bytes
    }

    #[test]
    fn entries_are_found() {
        for wide in [false, true] {
            let bytes = archive(&[("a/data.pkl", b"hello"), ("a/data/0", b"")], wide);
            let entries = entries(&bytes).unwrap();
            assert_eq!(&bytes[entries["a/data.pkl"].clone()], b"hello");
            assert!(entries["a/data/0"].is_empty());
        }
    }

    #[test]
    fn compressed_and_encrypted_entries_are_refused() {
        let bytes = archive(&[("a", b"hello")], false);
        let central = bytes.windows(4).position(|window| window == CENTRAL.to_le_bytes()).unwrap();
        let with = |offset: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[central + offset] = value;
            entries(&bytes).unwrap_err()
        };
        assert!(with(10, 8).contains("compressed"));
        assert!(with(8, 1).contains("encrypted"));
        assert!(with(24, 200).contains("compressed"));
        assert!(entries(&archive(&[("a", b""), ("a", b"")], false)).unwrap_err().contains("twice"));
    }

    proptest::proptest! {
        /// A damaged archive is refused or its extents still lie within it.
        #[test]
        fn damage_never_panics(wide: bool, at in 0usize..400, value: u8, cut in 0usize..400) {
            let mut bytes = archive(&[("a/data.pkl", b"hello"), ("a/data/0", b"0123456789")], wide);
            let len = bytes.len();
            bytes[at % len] = value;
            bytes.truncate(len - if cut % 4 == 0 { cut % len } else { 0 });
            for extent in entries(&bytes).unwrap_or_default().values() {
                assert!(bytes.get(extent.clone()).is_some());
            }
        }
    }
}
