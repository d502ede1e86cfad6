//! How keys and values lie in a page.
//!
//! A page holds one layer of 64 positions. Per KV head: keys as (64 / 16 groups, head_dim, 16 positions), then
//! values as (head_dim / 16 groups, 64 positions, 16 dimensions). Both are weight panels of 16 outputs, so the
//! products with queries and with probabilities run on the same register tile as every other product.
//!
//! Integers lie in words of 32 bits, 16 words for 16 outputs side by side; a word holds 4 (int8) or 8 (int4) codes of
//! consecutive dimensions (keys) or positions (values), the first in its lowest bits. The codes of a head's 64 keys are
//! followed by 64 scales and 64 offsets in f16, one of each per position, and so are those of its values.
//!
//! **Invariant:** the layout depends on the model and the dtype alone.

use std::ops::Range;

use crate::model::dtype::DType;

/// Positions per page: also the width of an attention tile.
pub const PAGE_POSITIONS: usize = 64;

/// Outputs per panel.
const PANEL: usize = 16;

/// Bytes of scales and offsets of the keys, or values, of a head.
const GRID_BYTES: usize = 2 * 2 * PAGE_POSITIONS;

/// Bytes of a head's notes, where there are any: 64 positions as u32, then 64 scores as f32.
///
/// Positions take 24 bits. Where heads share slots ([`Spread::Heads`](super::policy::Spread::Heads)) the upper bytes of
/// the first positions say whose these are, see [`Owner`].
pub const NOTE_BYTES: usize = PAGE_POSITIONS * 8;

/// The bits of a note that are the position.
pub const POSITION_BITS: u32 = (1 << 24) - 1;

/// Whose a page's slots of a head are, where heads share them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Head + 1; 0 is nobody.
    pub head: u16,
    /// Which of that head's pages it is.
    pub order: u32,
    /// Slots that are taken.
    pub taken: u8,
}

impl Owner {
    /// What the notes of 64 positions say.
    pub fn read(positions: &[u32]) -> Owner {
        let bytes: [u8; 8] = std::array::from_fn(|index| (positions[index] >> 24) as u8);
        let [h0, h1, taken, order @ .., _] = bytes;
        Owner { head: u16::from_le_bytes([h0, h1]), order: u32::from_le_bytes(order), taken }
    }

    /// Notes it.
    pub fn write(self, positions: &mut [u32]) {
        let ([h0, h1], [o0, o1, o2, o3]) = (self.head.to_le_bytes(), self.order.to_le_bytes());
        for (position, byte) in positions.iter_mut().zip([h0, h1, self.taken, o0, o1, o2, o3, 0]) {
            *position = *position & POSITION_BITS | u32::from(byte) << 24;
        }
    }
}

/// What the layout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub num_layers: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Stored element type.
    pub dtype: DType,
    /// Whether a page notes the position of every key, and the attention that it received.
    pub scored: bool,
}

impl KvLayout {
    /// Integers in a word of 32 bits; none of dtypes that are not integers.
    pub fn codes_per_word(&self) -> Option<usize> {
        match self.dtype {
            DType::Int8 => Some(4),
            DType::Int4 => Some(8),
            DType::F32 | DType::Bf16 | DType::F16 => None,
        }
    }

    /// Bytes of a head's keys.
    fn key_bytes(&self) -> usize {
        match self.codes_per_word() {
            Some(codes) => PAGE_POSITIONS * 4 * self.head_dim.div_ceil(codes) + GRID_BYTES,
            None => PAGE_POSITIONS * self.head_dim * self.dtype.size(),
        }
    }

    /// Bytes of a head's values.
    fn value_bytes(&self) -> usize {
        let padded = self.head_dim.next_multiple_of(PANEL);
        match self.codes_per_word() {
            Some(codes) => padded * 4 * (PAGE_POSITIONS / codes) + GRID_BYTES,
            None => PAGE_POSITIONS * padded * self.dtype.size(),
        }
    }

    fn note_bytes(&self) -> usize {
        if self.scored { NOTE_BYTES } else { 0 }
    }

    /// Bytes of one head of one layer of a page.
    fn head_bytes(&self) -> usize {
        self.key_bytes() + self.value_bytes() + self.note_bytes()
    }

    /// Bytes of one layer of one page.
    pub fn layer_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes()
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(&self) -> usize {
        self.num_layers * self.layer_bytes()
    }

    /// Where a head lies within a layer of a page, in bytes.
    pub fn head(&self, head: usize) -> Range<usize> {
        head * self.head_bytes()..(head + 1) * self.head_bytes()
    }

    /// Where the keys lie within a head.
    pub fn keys(&self) -> Range<usize> {
        0..self.key_bytes()
    }

    /// Where the values lie within a head.
    pub fn values(&self) -> Range<usize> {
        self.key_bytes()..self.key_bytes() + self.value_bytes()
    }

    /// Where the notes lie within a head.
    pub fn notes(&self) -> Range<usize> {
        self.values().end..self.head_bytes()
    }

    /// Index of a word, within a head's keys, and the place in it of dimension `dim` at page position `slot`.
    pub fn key_code(&self, slot: usize, dim: usize) -> (usize, usize) {
        let codes = self.codes_per_word().expect("a layout of integers");
        let word = slot / PANEL * self.head_dim.div_ceil(codes) + dim / codes;
        (word * PANEL + slot % PANEL, dim % codes)
    }

    /// Index of a word, within a head's values, and the place in it of dimension `dim` at page position `slot`.
    pub fn value_code(&self, slot: usize, dim: usize) -> (usize, usize) {
        let codes = self.codes_per_word().expect("a layout of integers");
        let word = dim / PANEL * (PAGE_POSITIONS / codes) + slot / codes;
        (word * PANEL + dim % PANEL, slot % codes)
    }

    /// Element index, within a head's keys, of dimension `dim` at page position `slot`.
    pub fn key_element(&self, slot: usize, dim: usize) -> usize {
        (slot / PANEL * self.head_dim + dim) * PANEL + slot % PANEL
    }

    /// Element index, within a head's values, of dimension `dim` at page position `slot`.
    pub fn value_element(&self, slot: usize, dim: usize) -> usize {
        (dim / PANEL * PAGE_POSITIONS + slot) * PANEL + dim % PANEL
    }
}

/// Pages that `positions` positions take.
pub fn pages_for(positions: usize) -> usize {
    positions.div_ceil(PAGE_POSITIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_fill_their_ranges_without_overlap() {
        let layout = KvLayout { num_layers: 3, num_kv_heads: 2, head_dim: 20, dtype: DType::Bf16, scored: false };
        let mut keys: Vec<usize> = (0..64).flat_map(|s| (0..20).map(move |d| layout.key_element(s, d))).collect();
        keys.sort_unstable();
        assert!(keys.iter().copied().eq(0..64 * 20));
        let mut values: Vec<usize> = (0..64).flat_map(|s| (0..20).map(move |d| layout.value_element(s, d))).collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), 64 * 20);
        assert!(*values.last().unwrap() < 64 * 32);
        assert_eq!((layout.head(1).end, layout.values().len()), (layout.layer_bytes(), 64 * 32 * 2));
        let scored = KvLayout { scored: true, ..layout };
        assert_eq!((layout.notes().len(), scored.notes().len()), (0, NOTE_BYTES));
        assert_eq!(scored.layer_bytes(), layout.layer_bytes() + 2 * NOTE_BYTES);
    }

    #[test]
    fn owners_and_positions_share_the_notes() {
        let mut positions: [u32; PAGE_POSITIONS] = std::array::from_fn(|slot| (slot as u32 * 99_991) & POSITION_BITS);
        let before = positions;
        for owner in [Owner { head: 513, order: 70_001, taken: 64 }, Owner::default()] {
            owner.write(&mut positions);
            assert_eq!(Owner::read(&positions), owner);
            assert_eq!(positions.map(|position| position & POSITION_BITS), before);
        }
        assert_eq!(positions, before);
    }

    #[test]
    fn codes_fill_their_ranges_without_overlap() {
        for (dtype, codes) in [(DType::Int8, 4), (DType::Int4, 8)] {
            let layout = KvLayout { num_layers: 3, num_kv_heads: 2, head_dim: 20, dtype, scored: false };
            let places = |place: &dyn Fn(usize, usize) -> (usize, usize)| {
                let all = (0..64).flat_map(|slot| (0..20).map(move |dim| (slot, dim)));
                let mut places: Vec<(usize, usize)> = all.map(|(slot, dim)| place(slot, dim)).collect();
                places.sort_unstable();
                places.dedup();
                assert_eq!(places.len(), 64 * 20);
                assert!(places.iter().all(|&(_, within)| within < codes));
                4 * (places.last().unwrap().0 + 1)
            };
            assert_eq!(places(&|slot, dim| layout.key_code(slot, dim)) + GRID_BYTES, layout.keys().len());
            assert!(places(&|slot, dim| layout.value_code(slot, dim)) + GRID_BYTES <= layout.values().len());
        }
    }
}
