//! Times of the dense layers' kernels: shapes of Llama 3.1 8B and of small models, each beside the bytes it moves.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::sys::{
    CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUresult, cuLaunchKernelEx,
};
use cudarc::driver::{CudaFunction, CudaSlice};
use cudarc::nvrtc::Ptx;
use pagewise_attention::DType;
use pagewise_attention::cuda::cudarc;
use pagewise_attention::cuda::ptx::model::argmax::{Argmax, ArgmaxArgs, ArgmaxSpec};
use pagewise_attention::cuda::ptx::model::log_softmax::{LogSoftmax, LogSoftmaxArgs, LogSoftmaxSpec};
use pagewise_attention::cuda::ptx::model::matvec::{
    Geometry, Input, Matvec, MatvecArgs, MatvecNorm, MatvecShape, MatvecSpec, Store,
};
use pagewise_attention::cuda::ptx::model::norm::{Norm, NormArgs, NormSpec, Parts};
use pagewise_attention::cuda::ptx::model::penalize::{Direction, Penalize, PenalizeArgs, PenalizeSpec};
use pagewise_attention::cuda::ptx::model::sample::{RowDraw, Sample, SampleArgs, SampleSpec};
use pagewise_attention::cuda::ptx::model::top_candidates::{
    TopCandidates, TopCandidatesArgs, TopCandidatesSpec,
};
use pagewise_attention::cuda::ptx::model::vocab::blocks;
use pagewise_attention::cuda::ptx::model::{Activation, NormKind, Rows};
use pagewise_attention::cuda::ptx::{self, Arg, Kernel, Launch};
use serde_json::{Value, json};

use crate::gpu::{Gpu, ROTATION};

/// Bytes of the buffers that everything but the weights is in.
const ROOM: usize = 64 << 20;

/// One product: name, features, width, gated.
type Shape = (&'static str, u32, u32, bool);

/// Llama 3.1 8B's products, a square one, and those of models of 135 million and of one billion parameters.
const SHAPES: [Shape; 12] = [
    ("o 4096x4096", 4096, 4096, false),
    ("qkv 6144x4096", 6144, 4096, false),
    ("gate_up 28672x4096", 14336, 4096, true),
    ("gate_up_plain 28672x4096", 28672, 4096, false),
    ("down 4096x14336", 4096, 14336, false),
    ("lm_head 128256x4096", 128_256, 4096, false),
    ("small_qkv 960x576", 960, 576, false),
    ("small_o 576x576", 576, 576, false),
    ("small_gate_up 3072x576", 1536, 576, true),
    ("small_down 576x1536", 576, 1536, false),
    ("1b_qkv 3072x2048", 3072, 2048, false),
    ("1b_down 2048x8192", 2048, 8192, false),
];

pub struct Bench<'a, 'b> {
    pub gpu: &'a Gpu<'b>,
    pub ceiling: f64,
    weights: CudaSlice<u8>,
    x: CudaSlice<u8>,
    out: CudaSlice<u8>,
    scratch: CudaSlice<u8>,
    functions: HashMap<String, CudaFunction>,
    pub figures: Vec<Value>,
}

impl<'a, 'b> Bench<'a, 'b> {
    pub fn new(gpu: &'a Gpu<'b>, ceiling: f64) -> Self {
        Self {
            gpu,
            ceiling,
            // The largest matrix is 1.05 GB.
            weights: gpu.filled(DType::Bf16, 1100 << 19),
            x: gpu.filled(DType::Bf16, ROOM / 2),
            out: gpu.filled(DType::Bf16, ROOM / 2),
            scratch: gpu.stream.alloc_zeros(ROOM).unwrap(),
            functions: HashMap::new(),
            figures: Vec::new(),
        }
    }

    pub fn figures(&self) -> &[Value] {
        &self.figures
    }

    pub fn function(&mut self, kernel: &Kernel) -> CudaFunction {
        self.edited_function(kernel, "", str::to_owned)
    }

    /// The kernel with a change of its text, known by a name.
    pub fn edited_function(
        &mut self,
        kernel: &Kernel,
        name: &str,
        edit: impl Fn(&str) -> String,
    ) -> CudaFunction {
        let gpu = self.gpu;
        self.functions
            .entry(format!("{} {name}", kernel.entry()))
            .or_insert_with(|| {
                let module = gpu.engine.load_module(Ptx::from_src(edit(kernel.text()))).unwrap();
                let function = module.load_function(kernel.entry()).unwrap();
                if kernel.dynamic_shared() > 0 {
                    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    function.set_attribute(most, kernel.dynamic_shared() as i32).unwrap();
                }
                function
            })
            .clone()
    }

    /// Puts a launch on the stream; dependent variants are allowed to start early.
    pub fn launch(&self, function: &CudaFunction, dependent: bool, launch: Launch, args: &[Arg]) {
        let mut pointers: Vec<*mut c_void> = args.iter().map(|arg| arg.as_ptr().cast_mut().cast()).collect();
        // SAFETY: all zeros is a value of this union of plain numbers.
        let mut value: CUlaunchAttributeValue = unsafe { std::mem::zeroed() };
        value.programmaticStreamSerializationAllowed = 1;
        // SAFETY: a structure of plain numbers, whose padding may be zero.
        let mut attribute: CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value = value;
        let ([x, y, z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: launch.dynamic_shared,
            hStream: self.gpu.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(dependent),
        };
        // SAFETY: the arguments are those of the kernel, and all addresses are within the buffers.
        let result = unsafe {
            cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        assert_eq!(result, CUresult::CUDA_SUCCESS);
    }

    fn note(&mut self, name: String, kernel: &Kernel, us: f64, bytes: f64, mut more: Value) {
        let rate = bytes / us / 1e3;
        println!(
            "{name:42} {us:8.2} us {rate:6.0} GB/s {:5.1} %  {}  {more}",
            100.0 * rate / self.ceiling,
            kernel.entry()
        );
        more["name"] = json!(name);
        more["variant"] = json!(kernel.entry());
        more["us"] = json!(us);
        more["gb_s"] = json!(rate);
        more["percent_of_ceiling"] = json!(100.0 * rate / self.ceiling);
        self.figures.push(more);
    }

    /// The time of a product over weights that no cache holds.
    fn product(
        &mut self,
        spec: MatvecSpec,
        shape: MatvecShape,
        store: Store,
        normed: bool,
        geometry: Option<Geometry>,
    ) -> Option<(f64, Matvec, Launch, f64)> {
        let device = self.gpu.context.device();
        let matvec = Matvec::new(spec).unwrap().with_shared(device.shared_memory_per_block);
        let geometry = geometry.unwrap_or_else(|| matvec.geometry(shape, device.multiprocessors, false));
        let launch = matvec.launch(shape, geometry).ok()?;
        let function = self.function(matvec.kernel());
        let halves = if spec.gated { 2 } else { 1 };
        let size = spec.dtype.size() as usize;
        let bytes = (halves * shape.features * shape.width) as usize * size;
        let copies = (self.weights.len() / bytes).clamp(1, 512);
        let needed = ROTATION.div_ceil(bytes).clamp(4, 64);
        let (weights, x, out) =
            (self.gpu.address(&self.weights), self.gpu.address(&self.x), self.gpu.address(&self.out));
        let us = self.gpu.time(needed, |i| {
            // Rows of x and of the result move along too, as they do in a model.
            let norm = MatvecNorm { kind: NormKind::Rms, eps: 1e-5, weight: x + (32 << 20), bias: 0 };
            let args = MatvecArgs {
                shape,
                x: Rows { address: x + ((i as u64 % 2) << 20), stride: u64::from(shape.width) },
                norm: normed.then_some(norm),
                weight: Rows {
                    address: weights + ((i % copies) * bytes) as u64,
                    stride: u64::from(shape.width),
                },
                bias: 0,
                activation: if spec.gated { Activation::Silu } else { Activation::None },
                store,
                out: Rows { address: out, stride: u64::from(shape.features) },
            };
            self.launch(&function, spec.dependent, launch, &args.values(geometry));
        });
        Some((us, matvec, launch, bytes as f64))
    }

    pub fn all(&mut self, wanted: impl Fn(&str) -> bool) {
        let bf16 = |gated, dependent, input| MatvecSpec {
            dtype: ptx::DType::Bf16,
            input,
            gated,
            vector: 8,
            dependent,
        };
        for (name, features, width, gated) in SHAPES {
            for rows in [1, 2, 4, 8] {
                let shape = MatvecShape { rows, features, width };
                for dependent in [false, true] {
                    let mut kinds = vec![("", Input::Direct, Store::Compute, false)];
                    if rows == 1 || (rows == 8 && dependent) {
                        kinds.push(("norm ", Input::Staged, Store::Compute, true));
                    }
                    if rows == 1 && dependent && !gated {
                        kinds.push(("add ", Input::Direct, Store::Add, false));
                    }
                    for (kind, input, store, normed) in kinds {
                        let store = if features > 100_000 { Store::F32 } else { store };
                        let full =
                            format!("matvec {name} {kind}rows {rows}{}", if dependent { " pdl" } else { "" });
                        if !wanted(&full) {
                            continue;
                        }
                        let spec = bf16(gated, dependent, input);
                        let Some((us, matvec, launch, bytes)) =
                            self.product(spec, shape, store, normed, None)
                        else {
                            println!("{full}: does not fit");
                            continue;
                        };
                        let more = json!({ "grid": launch.grid[0], "threads": launch.block[0] });
                        self.note(full, matvec.kernel(), us, bytes, more);
                    }
                }
            }
        }
        for dtype in [ptx::DType::F32, ptx::DType::F16] {
            for rows in [1, 8] {
                let full = format!("matvec {dtype} 4096x4096 rows {rows}");
                if !wanted(&full) {
                    continue;
                }
                let spec = MatvecSpec {
                    dtype,
                    input: Input::Direct,
                    gated: false,
                    vector: 16 / dtype.size(),
                    dependent: false,
                };
                let shape = MatvecShape { rows, features: 4096, width: 4096 };
                if let Some((us, matvec, _, bytes)) = self.product(spec, shape, Store::Compute, false, None) {
                    self.note(full, matvec.kernel(), us, bytes, json!({}));
                }
            }
        }
        self.norms(&wanted);
        self.logits(&wanted);
        self.choices(&wanted);
    }

    fn norms(&mut self, wanted: &impl Fn(&str) -> bool) {
        for (rows, parts, width) in [(1, 1, 4096), (8, 1, 4096), (512, 1, 4096), (1, 32, 128), (1, 1, 576)] {
            for dependent in [false, true] {
                let full = format!("norm {rows}x{parts}x{width}{}", if dependent { " pdl" } else { "" });
                if !wanted(&full) {
                    continue;
                }
                let bf16 = ptx::DType::Bf16;
                let (x_type, vector) = if parts == 1 { (ptx::DType::F32, 4) } else { (bf16, 8) };
                let norm = Norm::new(NormSpec { x: x_type, out: bf16, vector, dependent }).unwrap();
                let launch = norm.launch(rows, parts, width).unwrap();
                let function = self.function(norm.kernel());
                let (x, out) = (self.gpu.address(&self.x), self.gpu.address(&self.out));
                let view = |address| Parts {
                    address,
                    row_stride: u64::from(parts * width),
                    part_stride: u64::from(width),
                };
                let args = NormArgs {
                    rows,
                    parts,
                    width,
                    kind: NormKind::Rms,
                    eps: 1e-5,
                    x: view(x),
                    weight: x + (32 << 20),
                    bias: 0,
                    out: view(out),
                };
                let us = self.gpu.time(64, |_| self.launch(&function, dependent, launch, &args.values()));
                let bytes = f64::from(rows * parts * width * (x_type.size() + 2));
                self.note(
                    full,
                    norm.kernel(),
                    us,
                    bytes,
                    json!({ "grid": launch.grid[0], "threads": launch.block[0] }),
                );
            }
        }
    }

    fn logits(&mut self, wanted: &impl Fn(&str) -> bool) {
        let (x, out, scratch) =
            (self.gpu.address(&self.x), self.gpu.address(&self.out), self.gpu.address(&self.scratch));
        for (rows, vocab) in [(1, 49_152), (1, 128_256), (8, 128_256), (1, 256_000)] {
            for dependent in [false, true] {
                let end = format!("{rows}x{vocab}{}", if dependent { " pdl" } else { "" });
                let bytes = f64::from(rows * vocab * 4);
                let logits = Rows { address: x, stride: u64::from(vocab) };
                let tickets = scratch + (1 << 20);
                if wanted(&format!("argmax {end}")) {
                    let argmax = Argmax::new(ArgmaxSpec { vector: 4, dependent }).unwrap();
                    let launch = argmax.launch(rows, vocab).unwrap();
                    let function = self.function(argmax.kernel());
                    let args =
                        ArgmaxArgs { logits, vocab, keys: scratch, tickets, tokens: out, best: out + 4096 };
                    let us = self.gpu.time(64, |_| self.launch(&function, dependent, launch, &args.values()));
                    self.note(
                        format!("argmax {end}"),
                        argmax.kernel(),
                        us,
                        bytes,
                        json!({ "grid": launch.grid[0] }),
                    );
                }
                if wanted(&format!("log_softmax {end}")) {
                    let softmax = LogSoftmax::new(LogSoftmaxSpec { vector: 4, dependent }).unwrap();
                    let launch = softmax.launch(rows, vocab).unwrap();
                    let function = self.function(softmax.kernel());
                    let args = LogSoftmaxArgs {
                        logits,
                        vocab,
                        partial: scratch + (2 << 20),
                        tickets,
                        ids: scratch + (4 << 20),
                        count: 1,
                        out,
                        stats: 0,
                    };
                    assert!(8 * rows * blocks(vocab) < 2 << 20);
                    let us = self.gpu.time(64, |_| self.launch(&function, dependent, launch, &args.values()));
                    self.note(
                        format!("log_softmax {end}"),
                        softmax.kernel(),
                        us,
                        bytes,
                        json!({ "grid": launch.grid[0] }),
                    );
                }
            }
        }
    }

    /// Draws with each filter, and the likeliest tokens, of logits whose tail is exponential: a few tokens have most of the
    /// weight, and all of them some.
    fn choices(&mut self, wanted: &impl Fn(&str) -> bool) {
        let (out, scratch) = (self.gpu.address(&self.out), self.gpu.address(&self.scratch));
        let (most_rows, vocab) = (64u32, 128_256u32);
        let logits: Vec<u8> = (0..u64::from(most_rows * vocab))
            .flat_map(|i| {
                // Hashed to a uniform number; its logarithm makes the tail of an exponential distribution.
                let hash = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let uniform = ((hash >> 40) as f32 + 0.5) / (1 << 24) as f32;
                (-uniform.ln() * 1.2 - 8.0).to_le_bytes()
            })
            .collect();
        let logits = self.gpu.stream.clone_htod(&logits).unwrap();
        let view = Rows { address: self.gpu.address(&logits), stride: u64::from(vocab) };
        let ways = [("temperature", 0, 1.0, 0.0), ("min-p", 0, 1.0, 0.1), ("top-k 50", 50, 1.0, 0.0)];
        let ways =
            [ways.as_slice(), &[("top-p 0.9", 0, 0.9, 0.0), ("top-k 50 top-p 0.9", 50, 0.9, 0.0)]].concat();
        for rows in [1, 8, most_rows] {
            let bytes = f64::from(rows) * f64::from(vocab) * 4.0;
            for &(name, top_k, top_p, min_p) in &ways {
                let full = format!("sample {rows}x{vocab} {name}");
                if !wanted(&full) {
                    continue;
                }
                let draw = |row: u32| RowDraw {
                    row,
                    temperature: 0.8,
                    top_k,
                    top_p,
                    min_p,
                    uniform: f64::from(row * 37 % 64) / 64.0,
                };
                let draws: Vec<u8> = (0..rows).flat_map(|row| draw(row).bytes()).collect();
                let draws = self.gpu.stream.clone_htod(&draws).unwrap();
                let sample = Sample::new(SampleSpec { vector: 4, dependent: false }).unwrap();
                let launch = sample.launch(rows, vocab).unwrap();
                let function = self.function(sample.kernel());
                let args =
                    SampleArgs { logits: view, vocab, draws: self.gpu.address(&draws), tokens: scratch };
                let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
                self.note(full, sample.kernel(), us, bytes, json!({ "grid": launch.grid[0] }));
            }
            for most in [1, 20, 1000] {
                let full = format!("top_candidates {rows}x{vocab} {most}");
                if !wanted(&full) {
                    continue;
                }
                let lists: Vec<u8> =
                    (0..rows).flat_map(|row| [row, most]).flat_map(u32::to_le_bytes).collect();
                let lists = self.gpu.stream.clone_htod(&lists).unwrap();
                let top = TopCandidates::new(TopCandidatesSpec { vector: 4, dependent: false }).unwrap();
                let launch = top.launch(rows, vocab, most).unwrap();
                let function = self.function(top.kernel());
                let args = TopCandidatesArgs {
                    logits: view,
                    vocab,
                    wanted: self.gpu.address(&lists),
                    most,
                    tokens: scratch,
                    values: out,
                };
                let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
                self.note(full, top.kernel(), us, bytes, json!({ "grid": launch.grid[0] }));
            }
        }
        let full = format!("penalize {most_rows}x1000");
        if wanted(&full) {
            let count = most_rows * 1000;
            let changes: Vec<u8> = (0..count)
                .flat_map(|i| [i / 1000, i % 1000 * 127, 0, 1])
                .flat_map(u32::to_le_bytes)
                .collect();
            let changes = self.gpu.stream.clone_htod(&changes).unwrap();
            let penalize = Penalize::new(PenalizeSpec { dependent: false }).unwrap();
            let launch = penalize.launch(count).unwrap();
            let function = self.function(penalize.kernel());
            // Penalties that change nothing, however often.
            let factors: Vec<u8> =
                (0..most_rows).flat_map(|_| [1.0f32, 0.0, 0.0]).flat_map(f32::to_le_bytes).collect();
            let factors = self.gpu.stream.clone_htod(&factors).unwrap();
            let args = PenalizeArgs {
                logits: view,
                rows: most_rows,
                vocab,
                changes: self.gpu.address(&changes),
                count,
                factors: self.gpu.address(&factors),
                saved: out,
                direction: Direction::Forth,
            };
            let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
            // A sector of 32 bytes for each logit, read and written.
            self.note(full, penalize.kernel(), us, f64::from(count) * (16.0 + 64.0 + 4.0), json!({}));
        }
    }

    /// Every geometry of a product of one and of eight rows.
    pub fn sweep(&mut self, wanted: impl Fn(&str) -> bool) {
        let multiprocessors = self.gpu.context.device().multiprocessors;
        for (name, features, width, gated) in SHAPES {
            for rows in [1, 8] {
                let full = format!("matvec {name} rows {rows}");
                if !wanted(&full) {
                    continue;
                }
                let shape = MatvecShape { rows, features, width };
                let tiles = features.div_ceil(16);
                let spec = MatvecSpec {
                    dtype: ptx::DType::Bf16,
                    input: Input::Direct,
                    gated,
                    vector: 8,
                    dependent: true,
                };
                let all = |warps| [2, 4].map(move |slots| [false, true].map(|copies| (warps, slots, copies)));
                for (warps, slots, copies) in [4, 8, 12, 16].into_iter().flat_map(all).flatten() {
                    let mut tried = Vec::new();
                    for resident in [1, 2, 3, 1000] {
                        let turns = tiles.div_ceil(multiprocessors * resident).max(1);
                        let blocks = tiles.div_ceil(turns);
                        if tried.contains(&blocks) {
                            continue;
                        }
                        tried.push(blocks);
                        let geometry = Geometry { warps, blocks, slots, copies };
                        if let Some((us, matvec, _, bytes)) =
                            self.product(spec, shape, Store::Compute, false, Some(geometry))
                        {
                            let more =
                                json!({ "warps": warps, "blocks": blocks, "slots": slots, "copies": copies });
                            self.note(full.clone(), matvec.kernel(), us, bytes, more);
                        }
                    }
                }
            }
        }
    }
}
