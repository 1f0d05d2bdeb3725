//! Linear layers: checks, division into items of work, threads. The arithmetic is in [`tile`](super::tile).

use super::instruction_set::{InstructionSet, dispatch};
use super::lanes::Weight;
use super::share::share;
use super::tile::{Ahead, Tile, block};
use super::{DenseError, check_len};
use pagewise_attention::HostTensor;

/// One linear layer of several that read the same input: `out = x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Projection<'a> {
    /// `[out_features, in_features]` in f32, f16 or bf16, the layout of Hugging Face's `Linear`.
    pub weight: HostTensor<'a>,
    /// `[out_features]` in f32, f16 or bf16.
    pub bias: Option<HostTensor<'a>>,
    /// `[rows, out_features]`, overwritten.
    pub out: &'a mut [f32],
}

/// `out[r, o] = Σ_i x[r, i] · weight[o, i] + bias[o]` for `rows` rows.
///
/// Shapes: x `[rows, in]`, weight `[out, in]`, bias `[out]`, out `[rows, out]`; `in` and `out` follow from the
/// lengths. Bits of a row depend on that row and the weights alone.
///
/// # Errors
/// Lengths that fit no shape, or weights in an fp8 type.
pub fn linear(
    x: &[f32],
    rows: usize,
    weight: HostTensor<'_>,
    bias: Option<HostTensor<'_>>,
    out: &mut [f32],
) -> Result<(), DenseError> {
    linear_many(x, rows, &mut [Projection { weight, bias, out }])
}

/// Several linear layers of the same input in one parallel region: query, key and value, or gate and up.
///
/// # Errors
/// Those of [`linear`]; nothing is written then.
pub fn linear_many(x: &[f32], rows: usize, projections: &mut [Projection<'_>]) -> Result<(), DenseError> {
    linear_many_on(InstructionSet::best(), x, rows, projections)
}

/// [`linear_many`] with the instruction set asked for, for tests and benches.
///
/// # Errors
/// Those of [`linear`]; nothing is written then.
pub fn linear_many_on(
    set: InstructionSet,
    x: &[f32],
    rows: usize,
    projections: &mut [Projection<'_>],
) -> Result<(), DenseError> {
    if rows == 0 || x.is_empty() {
        return check_empty(x, rows, projections);
    }
    if !x.len().is_multiple_of(rows) {
        return Err(DenseError::Rows { what: "the input x", len: x.len(), row: rows });
    }
    let k = x.len() / rows;
    for p in projections.iter() {
        check(p, rows, k)?;
    }
    let layers: Vec<Layer<'_>> = projections
        .iter_mut()
        .map(|p| Layer {
            weight: p.weight,
            bias: p.bias,
            features: p.out.len() / rows,
            out: Out(p.out.as_mut_ptr()),
        })
        .collect();
    run(set, x, rows, k, &layers);
    Ok(())
}

/// No rows: every output is empty. Rows of nothing: sums of nothing.
fn check_empty(x: &[f32], rows: usize, projections: &mut [Projection<'_>]) -> Result<(), DenseError> {
    check_len("the input x", x.len(), 0)?;
    for p in projections.iter() {
        if rows == 0 {
            check_len("the output", p.out.len(), 0)?;
        } else {
            check(p, rows, 0)?;
        }
    }
    for p in projections.iter_mut() {
        let features = p.out.len() / rows.max(1);
        for (i, out) in p.out.iter_mut().enumerate() {
            *out = match p.bias {
                Some(HostTensor::F32(b)) => b[i % features],
                Some(HostTensor::F16(b)) => b[i % features].to_f32(),
                Some(HostTensor::Bf16(b)) => b[i % features].to_f32(),
                _ => 0.0,
            };
        }
    }
    Ok(())
}

/// Lengths and element types of one layer.
fn check(p: &Projection<'_>, rows: usize, k: usize) -> Result<(), DenseError> {
    if !p.out.len().is_multiple_of(rows) {
        return Err(DenseError::Rows { what: "the output", len: p.out.len(), row: rows });
    }
    let features = p.out.len() / rows;
    // An overflow cannot be the length of a slice that exists.
    check_len("the weight", p.weight.len(), features.saturating_mul(k))?;
    check_dtype("the weight", p.weight)?;
    if let Some(bias) = p.bias {
        check_len("the bias", bias.len(), features)?;
        check_dtype("the bias", bias)?;
    }
    Ok(())
}

/// The element types that the kernels read.
pub(super) fn check_dtype(what: &'static str, tensor: HostTensor<'_>) -> Result<(), DenseError> {
    match tensor {
        HostTensor::F32(_) | HostTensor::F16(_) | HostTensor::Bf16(_) => Ok(()),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {
            Err(DenseError::DType { what, dtype: tensor.dtype() })
        }
    }
}

/// A checked layer.
struct Layer<'a> {
    weight: HostTensor<'a>,
    bias: Option<HostTensor<'a>>,
    features: usize,
    out: Out,
}

/// The output, of which each item of work writes a block of its own.
#[derive(Clone, Copy)]
struct Out(*mut f32);

// SAFETY: items write disjoint blocks, and the slice is borrowed until all are done.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// How a region is cut into items: panels of weights × blocks of rows.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Output features of a panel.
    features: usize,
    /// Rows of a block.
    rows: usize,
}

/// A panel stays in the second-level cache while all rows of its item pass.
const PANEL_BYTES: usize = 256 << 10;

/// Features of a panel are a multiple of this, so that few tiles overlap: divisible by 1, 2, 3, 4, 6 and 8.
const PANEL_STEP: usize = 24;

/// Rows of a block are a multiple of this, and many enough to pay for fetching the panel.
const ROW_STEP: usize = 64;

/// Below as many bytes of weights or multiply-adds, waking another thread costs more than it helps.
const ALONE: usize = 64 << 10;

impl Cut {
    /// Items small enough that threads end together, large enough that each is worth taking.
    fn new(rows: usize, k: usize, features: usize, element: usize, threads: usize) -> Self {
        let steps = |features: usize| features.next_multiple_of(PANEL_STEP).max(PANEL_STEP);
        let largest = steps(PANEL_BYTES / (k * element).max(1));
        if threads == 1 {
            return Self { features: largest, rows };
        }
        let wanted = threads * 8;
        let panel = steps(features.div_ceil(wanted)).min(largest);
        let blocks = wanted.div_ceil(features.div_ceil(panel).max(1)).clamp(1, rows.div_ceil(ROW_STEP));
        Self { features: panel, rows: rows.div_ceil(blocks).next_multiple_of(8).min(rows) }
    }
}

/// Runs checked layers.
fn run(set: InstructionSet, x: &[f32], rows: usize, k: usize, layers: &[Layer<'_>]) {
    let features = layers.iter().map(|l| l.features).sum();
    let element = layers.iter().map(|l| l.weight.dtype().size()).max().unwrap_or(1);
    let alone = features * k * element.max(rows) < ALONE;
    let threads = if alone { 1 } else { rayon::current_num_threads() };
    let cut = Cut::new(rows, k, features, element, threads);
    let blocks = rows.div_ceil(cut.rows);
    let panels: usize = layers.iter().map(|l| l.features.div_ceil(cut.features)).sum();
    let body = |item: usize| {
        let (mut panel, row_block) = (item / blocks, item % blocks);
        for layer in layers {
            let here = layer.features.div_ceil(cut.features);
            if panel < here {
                let start = panel * cut.features;
                let first_row = row_block * cut.rows;
                let place = Place {
                    row: first_row,
                    rows: cut.rows.min(rows - first_row),
                    feature: start,
                    features: cut.features.min(layer.features - start),
                };
                return run_block(set, x, k, layer, place);
            }
            panel -= here;
        }
    };
    if alone { (0..panels * blocks).for_each(body) } else { share(panels * blocks, body) }
}

/// Which part of a layer's output an item computes.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    rows: usize,
    feature: usize,
    features: usize,
}

fn run_block(set: InstructionSet, x: &[f32], k: usize, layer: &Layer<'_>, place: Place) {
    match layer.weight {
        HostTensor::F32(w) => run_typed(set, x, k, layer, w, place),
        HostTensor::F16(w) => run_typed(set, x, k, layer, w, place),
        HostTensor::Bf16(w) => run_typed(set, x, k, layer, w, place),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
    }
}

fn run_typed<T: Weight>(
    set: InstructionSet,
    x: &[f32],
    k: usize,
    layer: &Layer<'_>,
    weight: &[T],
    place: Place,
) {
    let Place { row, rows, feature, features } = place;
    let tile = Tile {
        x: x[row * k..(row + rows) * k].as_ptr(),
        rows,
        weight: weight[feature * k..(feature + features) * k].as_ptr(),
        features,
        k,
        bias: layer.bias,
        bias_start: feature,
        // SAFETY: `place` is inside of the output.
        out: unsafe { layer.out.0.add(row * layer.features + feature) },
        out_stride: layer.features,
        ahead: Ahead::NONE,
    };
    let following = layer.features - feature - features;
    // SAFETY: the slices above and the checked lengths are the tile's contract.
    unsafe { dispatch!(set, block::<T: Weight>(tile: Tile<'_, T>, following: usize)) }
}
