//! Products of a few rows with a matrix.

use pagewise_attention::cuda::ptx;
use pagewise_attention::cuda::ptx::Launch;
use pagewise_attention::cuda::ptx::model::matvec::{
    Geometry, Input, Matvec, MatvecArgs, MatvecNorm, MatvecShape, MatvecSpec, Store,
};
use pagewise_attention::cuda::ptx::model::{Activation, NormKind, Rows};
use serde_json::json;

use super::Bench;
use crate::gpu::ROTATION;

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

impl Bench<'_, '_> {
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

    pub fn products(&mut self, wanted: &impl Fn(&str) -> bool) {
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
