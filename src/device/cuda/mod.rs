//! A graphics card, through CUDA.
//!
//! Everything is found at run time: driver and card ([`card`]), compiler and matrix products ([`libraries`]). Kernels
//! are compiled for the card that is there (`kernels`).
//!
//! Three streams: one that computes, one for each direction of copies. What is asked for is put into them and no more;
//! marks are events in them, by which the lanes order the streams as the fences of the schedule have it.
//!
//! Activations are f32 between operations. Products of few rows take them as they are; those of more round them, and
//! the weights, to 16 bits (f32 weights stay f32), and sum up in f32.
//!
//! **Invariant:** nothing is allocated after [`Cuda::new`]. The first failure is kept, nothing is computed after it,
//! and [`Device::finish`] tells it.
#![allow(unsafe_code)]

mod attention;
pub mod card;
mod cublas;
mod kernels;
pub mod libraries;
mod memory;
mod nvrtc;
pub mod raw;
pub mod report;
mod sampling;
mod streams;
mod turn;
pub mod workspace;

use std::path::Path;
use std::sync::{Arc, Mutex};

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaContext;
use cudarc::driver::result;
use cudarc::driver::sys::CUstream;

use super::sampling::{Draw, Drawn};
use super::{
    AttentionSpan, Device, Frames, HeadNorms, Heads, KvViewMut, Matrix, NormParameters, Rotation, Stream, Target,
};
use crate::error::{Bytes, Error, Result, Tier};
use crate::kv::pages::Segment;
use crate::memory::arena::Arena;
use crate::model::config::{Activation, Norm};
use crate::model::dtype::DType;
use crate::model::packed::panels::{PANEL_OUTPUTS, TILE_INPUTS, panel_bytes};
use card::{Card, Facts, failed};
use cublas::{Element, Product, Products};
use kernels::{Kernels, words};
use memory::{DeviceArena, DeviceBuffer, Pinned};
use streams::{Events, Mark, Queue};
use turn::{State, Turn};
use workspace::Workspace;

/// Products of up to so many rows take activations as they are.
const FEW_ROWS: usize = 8;
/// Products of up to so many rows with weights of small integers widen them on the way.
const SOME_ROWS: usize = 64;
/// Rows of one launch, at most: the grid's second dimension is 16 bits wide.
const LAUNCH_ROWS: usize = 32_768;

/// A card that computes.
pub struct Cuda {
    // Dropped in this order: what uses streams and memory before streams and memory.
    products: Products,
    kernels: Kernels,
    compute: Queue,
    h2d: Queue,
    d2h: Queue,
    state: Mutex<State>,
    widened: DeviceBuffer,
    partials: DeviceBuffer,
    weighed: DeviceBuffer,
    lists: DeviceBuffer,
    _product_workspace: DeviceBuffer,
    arena: DeviceArena,
    pinned: Pinned,
    context: Arc<CudaContext>,
    workspace: Workspace,
    facts: Facts,
    /// Whether products with weights of small integers round activations to 8 bits.
    rounds: bool,
}

/// What a device is made with.
pub struct Needs<'a> {
    /// What it works in.
    pub workspace: Workspace,
    /// Rows of a block, at most.
    pub rows: usize,
    /// Bytes of its memory, workspace and lists included.
    pub device_bytes: usize,
    /// Where compiled kernels are kept.
    pub cache: &'a Path,
    /// Called before kernels are compiled, if they have to be.
    pub compiling: &'a (dyn Fn() + Sync),
}

/// Consecutive panels of a matrix, as kernels read them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PanelPiece {
    address: u64,
    first_panel: u32,
    num_panels: u32,
}

impl Cuda {
    /// Compiles and loads the kernels, takes the memory, makes the streams. `host` is main memory beside the device: it
    /// is registered, and the lists' share of it is taken first.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when the card has not as much memory; [`Error::Device`] for what else goes wrong.
    pub fn new(card: Card, needs: &Needs<'_>, host: &mut Arena) -> Result<Cuda> {
        let Needs { workspace, rows, device_bytes, cache, compiling } = *needs;
        let kernels = Kernels::load(&card, cache, compiling)?;
        let Card { facts, cublas, context, .. } = card;
        let in_words = |what| Error::Device { what };
        let products = Products::new(cublas).map_err(in_words)?;
        let mut arena = DeviceArena::new(&context, device_bytes).map_err(|error| {
            let free = context.mem_get_info().map_or(0, |(free, _)| free as u64);
            no_memory(error, "the model and its cache", Tier::Gpu, device_bytes as u64, free)
        })?;
        let [product_workspace, widened, partials, weighed] = workspace.places().map(|bytes| arena.carve(bytes));
        let lists_bytes = (workspace.lists + rows * workspace.lists_row).next_multiple_of(4096);
        let lists = arena.carve(lists_bytes);
        let host_lists = host.carve_aligned(lists_bytes, 4096);
        let pinned = Pinned::new(&context, host).map_err(|error| {
            let bytes = host.hold().bytes() as u64;
            no_memory(
                error,
                "main memory that copies go from",
                Tier::Cpu,
                bytes,
                crate::memory::limits::available_memory(),
            )
        })?;
        let events = Events::new(&context);
        let mapped_lists = pinned.mapped(host_lists.bytes()).map_err(|error| failed("mapping lists", error))?;
        let queue = || Queue::new(&context, &events).map_err(|error| failed("making a stream", error));
        let (compute, h2d, d2h) = (queue()?, queue()?, queue()?);
        // SAFETY: stream and workspace are dropped after the handle.
        let attached = unsafe {
            products.attach(compute.raw().cast(), product_workspace.first(workspace.products), workspace.products)
        };
        attached.map_err(in_words)?;
        Ok(Cuda {
            products,
            kernels,
            compute,
            h2d,
            d2h,
            state: Mutex::new(State::new(host_lists, mapped_lists)),
            widened,
            partials,
            weighed,
            lists,
            _product_workspace: product_workspace,
            arena,
            pinned,
            context,
            workspace,
            facts,
            rounds: false,
        })
    }

    /// What the card is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What operands of products with these weights are rounded to.
    fn element(&self, weights: DType) -> Element {
        element(weights, &self.facts)
    }

    /// Copies on a stream; waits for copies of memory that is not registered, which go through the default stream.
    fn copy(
        &self,
        queue: &Queue,
        doing: &str,
        all_registered: bool,
        copies: impl FnOnce(CUstream) -> Result<(), result::DriverError>,
    ) -> Result<()> {
        let copy = || {
            self.context.bind_to_thread()?;
            if all_registered {
                return copies(queue.raw());
            }
            // The default stream knows nothing of what this one has to come after.
            queue.wait()?;
            let copied = copies(queue.raw());
            // A copy from memory that is not registered returns when the driver has its bytes, maybe before the card
            // has. Also after a failure: nothing may be under way to or from borrowed memory when this returns.
            // SAFETY: the default stream always exists.
            let waited = unsafe { result::stream::synchronize(result::stream::null()) };
            copied.and(waited).and(queue.wait())
        };
        copy().map_err(|error| failed(doing, error))
    }

    fn queue(&self, stream: Stream) -> &Queue {
        match stream {
            Stream::Compute => &self.compute,
            Stream::In => &self.h2d,
            Stream::Out => &self.d2h,
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is dropped next needs the context on this thread, and nothing under way. Nobody is left to tell.
        let _ = self.context.bind_to_thread();
        for queue in [&self.compute, &self.h2d, &self.d2h] {
            let _ = queue.wait();
        }
    }
}

/// What operands of products with such weights are rounded to on a card.
fn element(weights: DType, facts: &Facts) -> Element {
    match weights {
        DType::F32 => Element::F32,
        DType::Bf16 if facts.has_bf16() => Element::Bf16,
        DType::Bf16 | DType::F16 | DType::Int8 | DType::Int4 => Element::F16,
    }
}

/// The arithmetic of products on this card, by name: part of what a run's results depend on.
pub fn arithmetic(weights: DType, facts: &Facts) -> &'static str {
    match element(weights, facts) {
        Element::F32 => "f32",
        Element::F16 => "f16",
        Element::Bf16 => "bf16",
    }
}

/// An allocation that was refused.
fn no_memory(error: result::DriverError, what: &str, tier: Tier, need: u64, have: u64) -> Error {
    use cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    if error.0 != CUDA_ERROR_OUT_OF_MEMORY {
        return failed(&format!("taking memory for {what}"), error);
    }
    let flag = if tier == Tier::Gpu { "--gpu-memory" } else { "--cpu-memory" };
    let less = (have / 10 * 9).max(1 << 20) >> 20;
    let hint = format!("something else uses it; free it, or use {flag} {less}MiB or less");
    Error::OverBudget { what: what.to_owned(), tier, need: Bytes(need), have: Bytes(have), hint: Some(hint) }
}

/// The number that kernels have for a dtype.
fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::Int8 => 3,
        DType::Int4 => 4,
    }
}

fn element_code(element: Element) -> u32 {
    match element {
        Element::F32 => 0,
        Element::Bf16 => 1,
        Element::F16 => 2,
    }
}

/// A normalisation's parameters, as kernels take them.
struct Scale {
    weight: u64,
    bias: u64,
    kind: u32,
    eps: f32,
}

impl Scale {
    fn of(parameters: &NormParameters<DeviceBuffer>, width: usize) -> Scale {
        let (kind, eps) = match parameters.norm {
            Norm::Rms { eps } => (0u32, eps),
            Norm::Layer { eps } => (1, eps),
        };
        let bias = parameters.bias.as_ref().map_or(0, |bias| bias.first(4 * width));
        Scale { weight: parameters.weight.first(4 * width), bias, kind, eps }
    }
}

/// A matrix's pieces, as kernels read them.
fn pieces(matrix: &Matrix<'_, DeviceBuffer>) -> Vec<PanelPiece> {
    let panel = panel_bytes(matrix.inputs, matrix.dtype);
    let mut first_panel = 0;
    let piece = |piece: &super::Piece<'_, DeviceBuffer>| {
        let num_panels = (piece.bytes.len() / panel) as u32;
        first_panel += num_panels;
        let address = piece.buffer.at(piece.bytes.start, piece.bytes.len());
        PanelPiece { address, first_panel: first_panel - num_panels, num_panels }
    };
    let pieces: Vec<PanelPiece> = matrix.pieces.iter().map(piece).collect();
    assert_eq!(first_panel as usize, matrix.outputs.div_ceil(PANEL_OUTPUTS), "pieces cover the matrix");
    pieces
}

/// A product's operands, in the words of [`Device::linear`].
struct Linear<'a> {
    x: &'a DeviceBuffer,
    rows: usize,
    w: &'a Matrix<'a, DeviceBuffer>,
    bias: Option<&'a DeviceBuffer>,
    scratch: &'a mut DeviceBuffer,
    y: Target<'a, DeviceBuffer>,
    /// Whether rows are rounded to 8 bits.
    rounds: bool,
}

impl Linear<'_> {
    /// The first result.
    fn target(&self) -> u64 {
        let Target { buffer, stride, column } = &self.y;
        let bytes = 4 * ((self.rows - 1) * stride + self.w.outputs);
        buffer.at(4 * column, bytes)
    }

    fn few_rows(&self, turn: &mut Turn<'_>) -> Result<(), String> {
        let Linear { rows, w, bias, y, .. } = self;
        let list = pieces(w);
        let [pieces] = turn.upload([bytemuck::cast_slice(&list)])?;
        let operand = self.operand(turn, Element::F32, w.inputs)?;
        let bias = bias.map_or(0, |bias| bias.first(4 * w.outputs));
        turn.launch(
            "linear_rows",
            (w.outputs.div_ceil(PANEL_OUTPUTS), 1),
            256,
            0,
            &mut words![
                operand,
                *rows,
                pieces,
                list.len(),
                dtype_code(w.dtype),
                w.inputs,
                w.outputs,
                bias,
                self.target() - 4 * y.column as u64,
                y.stride,
                y.column,
            ],
        )
    }

    /// The rows as products take them, rounded and padded to `width`.
    fn operand(&self, turn: &Turn<'_>, element: Element, width: usize) -> Result<u64, String> {
        let Linear { x, rows, w, scratch, .. } = self;
        let from = x.first(4 * rows * w.inputs);
        if element == Element::F32 && !self.rounds {
            return Ok(from);
        }
        let operand = scratch.first(element.size() * rows * width);
        for first in (0..*rows).step_by(LAUNCH_ROWS) {
            let from = from + 4 * (first * w.inputs) as u64;
            let to = operand + (element.size() * first * width) as u64;
            let (name, together) = if self.rounds { ("round_rows", 512) } else { ("convert_rows", 256) };
            let grid = (width.div_ceil(together), LAUNCH_ROWS.min(rows - first));
            turn.launch(name, grid, 256, 0, &mut words![from, w.inputs, to, width, element_code(element)])?;
        }
        Ok(operand)
    }

    fn some_rows(&self, turn: &mut Turn<'_>, width: usize) -> Result<(), String> {
        let Linear { rows, w, bias, y, .. } = self;
        let list = pieces(w);
        let [pieces] = turn.upload([bytemuck::cast_slice(&list)])?;
        let operand = self.operand(turn, Element::F16, width)?;
        let bias = bias.map_or(0, |bias| bias.first(4 * w.outputs));
        turn.launch(
            "linear_tensor_rows",
            (w.outputs.div_ceil(32), 1),
            256,
            0,
            &mut words![
                operand,
                *rows,
                width,
                pieces,
                list.len(),
                dtype_code(w.dtype),
                w.inputs,
                w.outputs,
                bias,
                self.target() - 4 * y.column as u64,
                y.stride,
                y.column,
            ],
        )
    }

    fn many_rows(&self, turn: &mut Turn<'_>, element: Element, width: usize) -> Result<(), String> {
        let Linear { rows, w, bias, y, .. } = self;
        let list = pieces(w);
        let [pieces] = turn.upload([bytemuck::cast_slice(&list)])?;
        let operand = self.operand(turn, element, width)?;
        let panels = w.outputs.div_ceil(PANEL_OUTPUTS);
        let together = turn.device().workspace.widened / (PANEL_OUTPUTS * width * element.size());
        assert!(together > 0, "the workspace holds a panel");
        for first_panel in (0..panels).step_by(together) {
            let count = together.min(panels - first_panel);
            let first = first_panel * PANEL_OUTPUTS;
            let outputs = (count * PANEL_OUTPUTS).min(w.outputs - first);
            let widened = turn.device().widened.first(outputs * width * element.size());
            turn.launch(
                "dequantize_panels",
                (count, width.div_ceil(256)),
                256,
                0,
                &mut words![
                    pieces,
                    list.len(),
                    dtype_code(w.dtype),
                    w.inputs,
                    w.outputs,
                    first_panel,
                    widened,
                    width,
                    element_code(element),
                ],
            )?;
            turn.multiply(&Product {
                element,
                rows: *rows,
                inputs: width,
                outputs,
                x: operand,
                w: widened,
                y: self.target() + 4 * first as u64,
                stride: y.stride,
                beta: 0.0,
            })?;
        }
        let Some(bias) = bias else { return Ok(()) };
        for first in (0..*rows).step_by(LAUNCH_ROWS) {
            let y_from = self.target() - 4 * y.column as u64 + 4 * (first * y.stride) as u64;
            turn.launch(
                "add_bias",
                (w.outputs.div_ceil(256), LAUNCH_ROWS.min(rows - first)),
                256,
                0,
                &mut words![y_from, y.stride, y.column, bias.first(4 * w.outputs), w.outputs],
            )?;
        }
        Ok(())
    }
}

impl Device for Cuda {
    type Buffer = DeviceBuffer;
    type Mark = Mark;

    fn allocate(&mut self, bytes: usize) -> DeviceBuffer {
        self.arena.carve(bytes)
    }

    fn round_activations(&mut self, round: bool) {
        self.rounds = round;
    }

    fn used_bytes(&self) -> usize {
        self.arena.used()
    }

    fn bytes<'a>(&self, _: &'a DeviceBuffer) -> Option<&'a [u8]> {
        None
    }

    fn bytes_mut<'a>(&self, _: &'a mut DeviceBuffer) -> Option<&'a mut [u8]> {
        None
    }

    fn copy_in(&self, parts: &[(&[u8], usize)], to: &mut DeviceBuffer) -> Result<()> {
        let all_registered = parts.iter().all(|(part, _)| self.pinned.holds(part));
        self.copy(&self.h2d, "copying to the card", all_registered, |stream| {
            parts.iter().filter(|(part, _)| !part.is_empty()).try_for_each(|&(part, offset)| {
                let to = to.at(offset, part.len());
                // SAFETY: the target lies in a buffer of the card. The source, if it is registered, lies in the arena
                // that stays mapped and registered until all streams have been waited for; the fences keep everybody
                // from writing to it before the mark behind the copy is passed. Else it is borrowed until the copy is
                // over.
                unsafe {
                    match self.pinned.holds(part) {
                        true => result::memcpy_htod_async(to, part, stream),
                        false => result::memcpy_htod_sync(to, part),
                    }
                }
            })
        })
    }

    fn copy_out(&self, from: &DeviceBuffer, parts: &mut [(usize, &mut [u8])]) -> Result<()> {
        let all_registered = parts.iter().all(|(_, part)| self.pinned.holds(part));
        self.copy(&self.d2h, "copying from the card", all_registered, |stream| {
            parts.iter_mut().filter(|(_, part)| !part.is_empty()).try_for_each(|(offset, part)| {
                let from = from.at(*offset, part.len());
                // SAFETY: the source lies in a buffer of the card. The target, if it is registered, lies in the arena
                // that stays mapped and registered until all streams have been waited for; the fences keep everybody
                // from it before the mark behind the copy is passed. Else it is borrowed until the copy is over.
                unsafe {
                    match self.pinned.holds(part) {
                        true => result::memcpy_dtoh_async(part, from, stream),
                        false => result::memcpy_dtoh_sync(part, from),
                    }
                }
            })
        })
    }

    fn mark(&self, stream: Stream) -> Result<Mark> {
        let mark = self.queue(stream).mark().map_err(|error| failed("marking", error))?;
        match stream {
            Stream::Compute => Turn::marked(self, &mark)?,
            Stream::In | Stream::Out => {}
        }
        Ok(mark)
    }

    fn follow(&self, stream: Stream, mark: &Mark) -> Result<()> {
        self.queue(stream).follow(mark).map_err(|error| failed("ordering streams", error))
    }

    fn passed(&self, mark: &Mark) -> Result<bool> {
        mark.passed().map_err(|error| failed("computing", error))
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        mark.wait().map_err(|error| failed("computing", error))
    }

    fn between(&self, from: &Mark, to: &Mark) -> Result<f64> {
        from.secs_until(to).map_err(|error| failed("timing", error))
    }

    fn finish(&self) -> Result<()> {
        Turn::finish(self)
    }

    fn embed(&self, table: &Matrix<'_, DeviceBuffer>, tokens: &[u32], out: &mut DeviceBuffer) {
        self.turn(|turn| {
            let list = pieces(table);
            let [pieces, tokens_at] = turn.upload([bytemuck::cast_slice(&list), bytemuck::cast_slice(tokens)])?;
            let out = out.first(4 * tokens.len() * table.inputs);
            turn.launch(
                "embed_rows",
                (tokens.len(), 1),
                256,
                0,
                &mut words![pieces, list.len(), dtype_code(table.dtype), table.inputs, table.outputs, tokens_at, out],
            )
        });
    }

    fn add_rows(&self, table: &DeviceBuffer, indices: &[u32], width: usize, x: &mut DeviceBuffer) {
        self.turn(|turn| {
            let most = indices.iter().max().map_or(0, |&index| index as usize + 1);
            let [at] = turn.upload([bytemuck::cast_slice(indices)])?;
            let (table, x) = (table.first(4 * most * width), x.first(4 * indices.len() * width));
            turn.launch("add_rows", (indices.len(), 1), 256, 0, &mut words![table, at, width, x])
        });
    }

    fn gather(&self, x: &DeviceBuffer, indices: &[usize], width: usize, out: &mut DeviceBuffer, first: usize) {
        self.turn(|turn| {
            let most = indices.iter().max().map_or(0, |&index| index + 1);
            let list: Vec<u32> = indices.iter().map(|&index| index as u32).collect();
            let [at] = turn.upload([bytemuck::cast_slice(&list)])?;
            let (x, out) = (x.first(4 * most * width), out.first(4 * (first + list.len()) * width));
            turn.launch("gather_rows", (list.len(), 1), 256, 0, &mut words![x, at, width, out, first])
        });
    }

    fn norm(
        &self,
        x: &DeviceBuffer,
        rows: usize,
        width: usize,
        parameters: &NormParameters<DeviceBuffer>,
        out: &mut DeviceBuffer,
    ) {
        self.turn(|turn| {
            let Scale { weight, bias, kind, eps } = Scale::of(parameters, width);
            let (x, out) = (x.first(4 * rows * width), out.first(4 * rows * width));
            turn.launch("norm_rows", (rows, 1), 256, 0, &mut words![x, width, weight, bias, kind, eps, out])
        });
    }

    fn add_norm(
        &self,
        x: &mut DeviceBuffer,
        y: &DeviceBuffer,
        rows: usize,
        width: usize,
        parameters: &NormParameters<DeviceBuffer>,
        out: &mut DeviceBuffer,
    ) {
        self.turn(|turn| {
            let Scale { weight, bias, kind, eps } = Scale::of(parameters, width);
            let [x, y, out] = [&*x, y, &*out].map(|rows_of| rows_of.first(4 * rows * width));
            turn.launch("add_norm_rows", (rows, 1), 256, 0, &mut words![x, y, width, weight, bias, kind, eps, out])
        });
    }

    fn linear(
        &self,
        x: &DeviceBuffer,
        rows: usize,
        w: &Matrix<'_, DeviceBuffer>,
        bias: Option<&DeviceBuffer>,
        scratch: &mut DeviceBuffer,
        y: Target<'_, DeviceBuffer>,
    ) {
        if rows == 0 {
            return;
        }
        let element = self.element(w.dtype);
        // Rows of 16-bit elements begin on 16 bytes, as tensor cores want them.
        let width = if element == Element::F32 { w.inputs } else { w.inputs.next_multiple_of(8) };
        let integers = matches!(w.dtype, DType::Int8 | DType::Int4);
        let rounds = self.rounds && integers && w.inputs >= TILE_INPUTS;
        let linear = Linear { x, rows, w, bias, scratch, y, rounds };
        // Very narrow rows would not fit into the scratch when they are padded.
        let few = rows <= FEW_ROWS || width * element.size() > 4 * w.inputs;
        self.turn(|turn| match rows {
            _ if few => linear.few_rows(turn),
            _ if rows <= SOME_ROWS && integers => linear.some_rows(turn, width),
            _ => linear.many_rows(turn, element, width),
        });
    }

    fn norm_heads(&self, qkv: &mut DeviceBuffer, rows: usize, heads: Heads, norms: &HeadNorms<DeviceBuffer>) {
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        self.turn(|turn| {
            let qkv = qkv.first(4 * rows * heads.qkv_width());
            let (query, key) = (norms.query.first(4 * head_dim), norms.key.first(4 * head_dim));
            turn.launch(
                "norm_heads",
                (rows, num_heads + num_kv_heads),
                32,
                0,
                &mut words![qkv, num_heads, num_kv_heads, head_dim, norms.eps, query, key],
            )
        });
    }

    fn rotate(&self, qkv: &mut DeviceBuffer, rows: usize, heads: Heads, rotation: &Rotation<'_>) {
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        self.turn(|turn| {
            let [cos, sin] = turn.upload([rotation.cos, rotation.sin].map(bytemuck::cast_slice))?;
            let qkv = qkv.first(4 * rows * heads.qkv_width());
            turn.launch(
                "rotate_heads",
                (rows, 1),
                256,
                0,
                &mut words![qkv, num_heads, num_kv_heads, head_dim, cos, sin, rotation.rotary_dim],
            )
        });
    }

    fn append_kv(&self, kv: KvViewMut<'_, DeviceBuffer>, segments: &[Segment], qkv: &DeviceBuffer, heads: Heads) {
        self.turn(|turn| attention::append(turn, &kv, segments, qkv, heads));
    }

    fn attend(
        &self,
        kv: KvViewMut<'_, DeviceBuffer>,
        span: AttentionSpan<'_>,
        segments: &[Segment],
        qkv: &DeviceBuffer,
        heads: Heads,
        out: &mut DeviceBuffer,
    ) {
        self.turn(|turn| attention::attend(turn, &attention::Call { kv: &kv, span, qkv, heads, out }, segments));
    }

    fn activate(
        &self,
        activation: Activation,
        gated: bool,
        up: &DeviceBuffer,
        rows: usize,
        width: usize,
        out: &mut DeviceBuffer,
    ) {
        let code = match activation {
            Activation::Relu => 0u32,
            Activation::Silu => 1,
            Activation::Gelu => 2,
            Activation::GeluTanh => 3,
        };
        let up_width = if gated { 2 * width } else { width };
        self.turn(|turn| {
            let (up, out) = (up.first(4 * rows * up_width), out.first(4 * rows * width));
            for first in (0..rows).step_by(LAUNCH_ROWS) {
                let (up, out) = (up + 4 * (first * up_width) as u64, out + 4 * (first * width) as u64);
                let grid = (width.div_ceil(256), LAUNCH_ROWS.min(rows - first));
                turn.launch("activate_rows", grid, 256, 0, &mut words![code, u32::from(gated), up, width, out])?;
            }
            Ok(())
        });
    }

    fn add(&self, x: &mut DeviceBuffer, y: &DeviceBuffer, elements: usize) {
        self.turn(|turn| {
            let (x, y) = (x.first(4 * elements), y.first(4 * elements));
            turn.launch("add_elements", (elements.div_ceil(1024), 1), 256, 0, &mut words![x, y, elements as u64])
        });
    }

    fn copy_frame(&self, frames: &mut Frames<DeviceBuffer>, from: usize, to: usize) {
        let stride = frames.stride;
        self.turn(|turn| {
            turn.copy(frames.memory.at(from * stride, stride), frames.memory.at(to * stride, stride), stride)
        });
    }

    fn sample(&self, logits: &DeviceBuffer, vocab_size: usize, draws: &[(usize, &Draw)]) -> Vec<Drawn> {
        let mut drawn = Vec::with_capacity(draws.len());
        self.turn(|turn| sampling::sample(turn, logits, vocab_size, draws, &mut drawn));
        // What was not answered is never looked at: `finish` tells why.
        drawn.resize(draws.len(), Drawn { token: 0, logprob: 0.0, top: Vec::new(), problem: None });
        drawn
    }
}
