//! Models step by step, below the engine: the logits of given tokens on the CPU and on CUDA, in every way to compute
//! them, and how far they may be apart.

use half::{bf16, f16};
use pagewise_attention::DType;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::backend::cuda::{CudaBackend, CudaOptions};
use pagewise_runtime::backend::{AttentionSpec, Backend};
use pagewise_runtime::executor::Executor;
use pagewise_runtime::model_dir::{ModelConfig, ModelDir};
use pagewise_runtime::plan::LogitRows;
use pagewise_tests::{Numbers, Planner, Sequence, executor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use std::fmt;
use std::path::Path;

pub fn config(dir: &Path) -> ModelConfig {
    ModelDir::open(dir).unwrap().config
}

/// A model on a device, and its cache.
pub struct Machine {
    executor: Box<dyn Executor>,
    planner: Planner,
}

/// The types of a model's weights and of its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Types {
    pub weights: DType,
    pub cache: DType,
}

impl Types {
    pub const fn new(weights: DType, cache: DType) -> Self {
        Self { weights, cache }
    }
}

/// A cache of the weights' type.
impl From<DType> for Types {
    fn from(dtype: DType) -> Self {
        Self::new(dtype, dtype)
    }
}

impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.weights)?;
        if self.cache == self.weights { Ok(()) } else { write!(f, " over {}", self.cache) }
    }
}

const BLOCK_SIZE: usize = 16;

impl Machine {
    fn new<B: Backend>(dir: &Path, backend: B, types: Types, activations: DType) -> Self {
        let config = config(dir);
        let num_blocks = 509;
        let mut spec =
            AttentionSpec::new(&config, types.cache, BLOCK_SIZE, num_blocks).with_compute_dtype(activations);
        spec.limits.max_seq_len = spec.limits.max_seq_len.min(2048);
        let executor = Box::new(executor(backend, dir, Some(types.weights), spec));
        Self { executor, planner: Planner::new(&config, BLOCK_SIZE, num_blocks) }
    }

    pub fn cpu(dir: &Path, types: impl Into<Types>) -> Self {
        Self::new(dir, CpuBackend::new(None).unwrap(), types.into(), DType::F32)
    }

    pub fn cuda(dir: &Path, types: impl Into<Types>, graphs: bool) -> Self {
        let types = types.into();
        let backend = CudaBackend::new(CudaOptions { ordinal: 0, dtype: types.weights, graphs }).unwrap();
        Self::new(dir, backend, types, types.weights)
    }

    /// The logits of the next tokens of some sequences, so many of each.
    fn step(&mut self, work: &mut [(&mut Sequence, usize)], logits: LogitRows) -> Vec<Vec<f32>> {
        let plan = self.planner.step(work, logits);
        let output = self.executor.execute(&plan).unwrap();
        output.logits.chunks(output.vocab_size).map(<[f32]>::to_vec).collect()
    }

    fn sequence(&self, id: u64, tokens: &[u32]) -> Sequence {
        self.planner.sequence(id, tokens)
    }
}

/// Token sequences of different lengths.
pub fn texts(vocab_size: usize, count: usize, longest: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut numbers = Numbers(seed);
    (0..count)
        .map(|_| {
            let len = 2 + numbers.below(longest - 1);
            (0..len).map(|_| numbers.below(vocab_size) as u32).collect()
        })
        .collect()
}

/// Every row of each text alone, whole.
pub fn rows_alone(machine: &mut Machine, texts: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let free = machine.planner.free.clone();
    let rows = |(id, text): (usize, &Vec<u32>)| {
        machine.planner.free.clone_from(&free);
        let mut sequence = machine.sequence(id as u64, text);
        machine.step(&mut [(&mut sequence, text.len())], LogitRows::All)
    };
    let rows = texts.iter().enumerate().map(rows).collect();
    machine.planner.free = free;
    rows
}

/// The same through chunks of random lengths in mixed batches, the last tokens of each one by one.
pub fn rows_mixed(machine: &mut Machine, texts: &[Vec<u32>], seed: u64) -> Vec<Vec<Vec<f32>>> {
    let mut numbers = Numbers(seed);
    let mut sequences: Vec<Sequence> =
        texts.iter().enumerate().map(|(id, text)| machine.sequence(id as u64, text)).collect();
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); texts.len()];
    loop {
        let mut chosen = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            let left = sequence.tokens.len() - sequence.computed;
            if left > 0 && numbers.below(5) > 0 {
                let count = if left <= 8 { 1 } else { 1 + numbers.below(left - 8) };
                chosen.push((index, count, sequence));
            }
        }
        if chosen.is_empty() {
            if sequences.iter().all(|sequence| sequence.computed == sequence.tokens.len()) {
                return rows;
            }
            continue;
        }
        let counts: Vec<(usize, usize)> = chosen.iter().map(|(index, count, _)| (*index, *count)).collect();
        let mut work: Vec<_> = chosen.into_iter().map(|(_, count, sequence)| (sequence, count)).collect();
        let mut output = machine.step(&mut work, LogitRows::All).into_iter();
        for (index, count) in counts {
            rows[index].extend(output.by_ref().take(count));
        }
    }
}

/// Decodes of a fixed batch, token by token: what graphs are for.
pub fn rows_decoded(machine: &mut Machine, texts: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let mut sequences: Vec<Sequence> =
        texts.iter().enumerate().map(|(id, text)| machine.sequence(id as u64, text)).collect();
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); texts.len()];
    loop {
        let mut indices = Vec::new();
        let mut work = Vec::new();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            if sequence.computed < sequence.tokens.len() {
                indices.push(index);
                work.push((sequence, 1));
            }
        }
        if work.is_empty() {
            return rows;
        }
        let output = machine.step(&mut work, LogitRows::Last);
        for (index, row) in indices.into_iter().zip(output) {
            rows[index].push(row);
        }
    }
}

/// The largest difference as a share of the largest logit.
pub fn difference(label: &str, found: &[Vec<Vec<f32>>], expected: &[Vec<Vec<f32>>]) -> f64 {
    let mut worst = 0.0f64;
    for (text, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len(), "{label}, text {text}");
        for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
            let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (token, (x, y)) in found.iter().zip(expected).enumerate() {
                let error = f64::from((x - y).abs()) / f64::from(largest);
                assert!(
                    !error.is_nan(),
                    "{label}, text {text}, row {row}, logit {token}: {x}, on the CPU {y}"
                );
                worst = worst.max(error);
            }
        }
    }
    worst
}

/// How far logits may be apart, as a share of the largest.
///
/// In f32 both sides only sum in another order: half a unit of a sum of some thousand products (2^-21), for each of about
/// eight roundings a layer, which add up like a random walk; three times their root for the largest of many logits.
///
/// In 16 bits the device rounds every activation, which the CPU keeps in f32. What that does to the logits differs from
/// model to model, so it is measured: [`sensitivity`] is what one rounding for each weight of a product does. The device
/// rounds up to four times where that rounds once (a product's input and its result, the norm or the gate between two
/// products, the attention's probabilities); these are independent, so that they add up to twice as much.
///
/// Over an fp8 cache a rounding may move a key or a value to the next number of that type; so may those of the measurement.
pub fn bound(dir: &Path, types: impl Into<Types>, texts: &[Vec<u32>]) -> f64 {
    let types = types.into();
    if types.weights == DType::F32 {
        return 3.0 * 2f64.powi(-21) * (8.0 * (config(dir).num_layers() + 1) as f64).sqrt();
    }
    2.0 * sensitivity(dir, types, texts)
}

/// How far the CPU's logits move when every weight is multiplied by 1 + u·r, as a share of the largest: r is uniform in
/// [-1, 1), u the unit roundoff, the most that rounding to nearest changes a number by as a share of it. In one output
/// Σ w·x that is the noise of rounding each x by itself, w·x·(1 + δ). The largest of several draws.
pub fn sensitivity(dir: &Path, types: Types, texts: &[Vec<u32>]) -> f64 {
    let expected = rows_alone(&mut Machine::cpu(dir, types), texts);
    let measure = |seed| {
        let copy = perturbed(dir, types.weights, seed);
        let noisy = Types::new(DType::F32, types.cache);
        let rows = rows_alone(&mut Machine::cpu(copy.path(), noisy), texts);
        difference(&format!("perturbed by seed {seed}"), &rows, &expected)
    };
    // The worst of two million logits, so that small models are not judged by a lucky draw.
    let logits = expected.iter().flatten().map(Vec::len).sum::<usize>();
    let draws = ((1 << 21) / logits as u64).clamp(3, 24);
    (1..=draws).map(measure).fold(0.0, f64::max)
}

/// Unit roundoff of a type of 16 bits: 2^-p with p bits of significand, the hidden one among them (11 and 8).
fn unit_roundoff(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 2f32.powi(-11),
        DType::Bf16 => 2f32.powi(-8),
        other => panic!("{other} has not 16 bits"),
    }
}

/// A copy of a model directory with its weights rounded to a type, each then multiplied by its own 1 + u·r, in f32.
fn perturbed(dir: &Path, dtype: DType, seed: u64) -> tempfile::TempDir {
    let unit = unit_roundoff(dtype);
    let mut numbers = Numbers(seed);
    altered(dir, |_, value| {
        let rounded = match dtype {
            DType::F16 => f16::from_f32(value).to_f32(),
            _ => bf16::from_f32(value).to_f32(),
        };
        let r = numbers.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0;
        rounded * (1.0 + unit * r)
    })
}

/// A copy of a model of the LLaMA family in which attention and products add an eighth of what they did to the residual
/// stream. The fixtures' random weights make much of little from layer to layer: a key rounded to the next number of fp8
/// changes their logits as much as a wrong token does. In these it does not.
pub fn calmed(dir: &Path) -> tempfile::TempDir {
    altered(dir, |name, value| {
        let adds = ["o_proj.weight", "down_proj.weight"].iter().any(|end| name.ends_with(end));
        if adds { value / 8.0 } else { value }
    })
}

/// A copy of a model directory with weights of its own, in f32.
fn altered(dir: &Path, mut change: impl FnMut(&str, f32) -> f32) -> tempfile::TempDir {
    let file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let mut tensors = SafeTensors::deserialize(&file).unwrap().tensors();
    // The file's own order is that of a hash map.
    tensors.sort_by(|(x, _), (y, _)| x.cmp(y));
    let copies: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, view)| {
            let bytes = view.data();
            let mut changed = |x| change(&name, x).to_le_bytes();
            let data = match view.dtype() {
                Dtype::F32 => bytes
                    .chunks_exact(4)
                    .flat_map(|x| changed(f32::from_le_bytes(x.try_into().unwrap())))
                    .collect(),
                Dtype::F16 => bytes
                    .chunks_exact(2)
                    .flat_map(|x| changed(f16::from_le_bytes(x.try_into().unwrap()).to_f32()))
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, view.shape().to_vec(), data)
        })
        .collect();
    let copy = tempfile::tempdir().unwrap();
    let views = copies.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    std::fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    copy
}
