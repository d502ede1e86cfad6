//! What the card works in, besides what is placed on it.
//!
//! **Invariant:** sizes follow from the model alone, so they are known, and counted, before anything is allocated.

use crate::device::Heads;
use crate::model::config::ModelConfig;

/// What cuBLAS gets: what it wants on the largest cards.
const PRODUCT_BYTES: usize = 32 << 20;
/// Weights that are widened at once, at most: enough for products to be fast.
const WIDENED_BYTES: usize = 128 << 20;
/// Partial results of attention, counted for every key head.
const PARTIALS: usize = 1024;
/// Query rows of a task of attention.
pub const TASK_ROWS: usize = 16;
/// Rows of logits that are weighed at the same time.
const WEIGHED_ROWS: usize = 32;
/// Lists of any operation, besides what grows with rows and vocabulary.
const LIST_BYTES: usize = 1 << 20;

/// The sizes of everything that a model's operations work in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Bytes for cuBLAS.
    pub products: usize,
    /// Bytes for weights that are widened for a product.
    pub widened: usize,
    /// Partial results of attention that there is room for, each of all key heads.
    pub num_partials: usize,
    /// Bytes of one of them.
    pub partial: usize,
    /// Rows of logits that are weighed at the same time.
    pub weighed_rows: usize,
    /// Bytes of one of them.
    pub weighed_row: usize,
    /// Bytes of lists, besides those for rows.
    pub lists: usize,
    /// Bytes of lists for every row of a block.
    pub lists_row: usize,
}

impl Workspace {
    /// The workspace of a model whose largest matrix takes `widened` bytes as it is multiplied.
    pub fn new(config: &ModelConfig, widened: usize) -> Self {
        let heads = Heads { num_heads: config.num_heads, num_kv_heads: config.num_kv_heads, head_dim: config.head_dim };
        Workspace::of(heads, config.vocab_size, widened)
    }

    /// The same, of a model of these widths.
    pub fn of(heads: Heads, vocab_size: usize, widened: usize) -> Self {
        let group = heads.num_heads / heads.num_kv_heads;
        // Rotation twice, the row's number and segment, that segment, and tasks of attention.
        let lists_row = 8 * heads.head_dim + 16 + 48 + 44 * (group / TASK_ROWS + 3);
        Workspace {
            products: PRODUCT_BYTES,
            widened: widened.clamp(1, WIDENED_BYTES),
            num_partials: (PARTIALS / heads.num_kv_heads).max(2),
            partial: 4 * heads.num_kv_heads * TASK_ROWS * (2 + heads.head_dim),
            weighed_rows: WEIGHED_ROWS,
            weighed_row: 4 * vocab_size,
            // A draw's lists name every token a few times at most; its answer may name every token once.
            lists: LIST_BYTES + 40 * vocab_size,
            lists_row,
        }
    }

    /// Bytes of each place on the card but the lists, in the order of allocation: for products, widened weights,
    /// partial results, weighed rows.
    pub fn places(&self) -> [usize; 4] {
        let large = |bytes: usize| bytes.next_multiple_of(4096);
        [
            large(self.products),
            large(self.widened),
            large(self.num_partials * self.partial),
            large(self.weighed_rows * self.weighed_row),
        ]
    }

    /// Bytes of all places on the card but the lists.
    pub fn bytes(&self) -> usize {
        self.places().iter().sum()
    }
}
