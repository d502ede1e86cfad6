//! How keys and values lie in a page.
//!
//! A page holds one layer of 64 positions. Per KV head: keys as (64 / 16 groups, head_dim, 16 positions), then
//! values as (head_dim / 16 groups, 64 positions, 16 dimensions). Both are weight panels of 16 outputs, so the
//! products with queries and with probabilities run on the same register tile as every other product.
//!
//! **Invariant:** the layout depends on the model and the dtype alone.

use std::ops::Range;

use crate::model::dtype::DType;

/// Positions per page: also the width of an attention tile.
pub const PAGE_POSITIONS: usize = 64;

/// Outputs per panel.
const PANEL: usize = 16;

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
}

impl KvLayout {
    fn key_elements(&self) -> usize {
        PAGE_POSITIONS * self.head_dim
    }

    fn value_elements(&self) -> usize {
        PAGE_POSITIONS * self.head_dim.next_multiple_of(PANEL)
    }

    /// Bytes of one layer of one page.
    pub fn layer_bytes(&self) -> usize {
        self.num_kv_heads * (self.key_elements() + self.value_elements()) * self.dtype.size()
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(&self) -> usize {
        self.num_layers * self.layer_bytes()
    }

    /// Where a head's keys lie within a layer of a page, in bytes.
    pub fn keys(&self, head: usize) -> Range<usize> {
        let start = head * (self.key_elements() + self.value_elements()) * self.dtype.size();
        start..start + self.key_elements() * self.dtype.size()
    }

    /// Where a head's values lie within a layer of a page, in bytes.
    pub fn values(&self, head: usize) -> Range<usize> {
        let start = self.keys(head).end;
        start..start + self.value_elements() * self.dtype.size()
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
        let layout = KvLayout { num_layers: 3, num_kv_heads: 2, head_dim: 20, dtype: DType::Bf16 };
        let mut keys: Vec<usize> = (0..64).flat_map(|s| (0..20).map(move |d| layout.key_element(s, d))).collect();
        keys.sort_unstable();
        assert!(keys.iter().copied().eq(0..64 * 20));
        let mut values: Vec<usize> = (0..64).flat_map(|s| (0..20).map(move |d| layout.value_element(s, d))).collect();
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), 64 * 20);
        assert!(*values.last().unwrap() < 64 * 32);
        assert_eq!(layout.values(1).end, layout.layer_bytes());
        assert_eq!(layout.keys(1).start, layout.values(0).end);
    }
}
