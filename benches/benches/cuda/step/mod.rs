//! A whole decode step of one sequence, as the engine puts it into a CUDA graph: its memory and its launches. Weights of
//! every layer lie apart, as in a model. What is left out of a step, to see what each kind of kernel adds to a token, is in
//! `ways`.

mod models;
mod ways;

use std::collections::HashMap;

use cudarc::driver::CudaSlice;
use pagewise_attention::cuda::cudarc;
use pagewise_attention::cuda::ptx;
use pagewise_attention::cuda::ptx::model::argmax::{Argmax, ArgmaxArgs, ArgmaxSpec};
use pagewise_attention::cuda::ptx::model::embed::{Embed, EmbedArgs, EmbedSpec};
use pagewise_attention::cuda::ptx::model::gather_rows::{GatherRows, GatherRowsArgs, GatherRowsSpec};
use pagewise_attention::cuda::ptx::model::matvec::{
    Geometry, Input, Matvec, MatvecArgs, MatvecNorm, MatvecSpec, Store,
};
use pagewise_attention::cuda::ptx::model::{Activation, NormKind, Rows};
use pagewise_attention::cuda::ptx::write_kv::RotaryStyle;
use pagewise_attention::cuda::{
    AttentionCall, DecodePlan, Order, PlanOptions, PositionType, Rotary, RotaryQueries, RotaryTables,
    WriteKvCall,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, PagedBatch, Problem, RowStrides};

pub use models::MODELS;
use models::{HEAD_DIM, Model, PRODUCTS, Product};
use ways::Way;

use crate::gpu::Gpu;
use crate::model::Bench;

/// Keys that the sequence has.
const CONTEXT: usize = 192;

const BLOCK: usize = 16;

/// What a step reads and writes.
struct Memory {
    weights: CudaSlice<u8>,
    cache: CudaSlice<u8>,
    room: CudaSlice<u8>,
    work: CudaSlice<u32>,
}

/// Places in the room.
const PLACE: u64 = 2 << 20;
const X: u64 = 0;
const QKV: u64 = PLACE;
const ATTENDED: u64 = 2 * PLACE;
const ACTIVATED: u64 = 3 * PLACE;
const LAST: u64 = 4 * PLACE;
const LOGITS: u64 = 5 * PLACE;
const VECTORS: u64 = 6 * PLACE;
const WORKSPACE: u64 = 7 * PLACE;
const NUMBERS: u64 = 8 * PLACE;

pub struct Step<'a, 'b, 'c> {
    bench: &'c mut Bench<'a, 'b>,
    model: &'c Model,
    memory: Memory,
    config: AttentionConfig,
    layout: CacheLayout,
    plans: [DecodePlan; 2],
    matvecs: HashMap<MatvecSpec, Matvec>,
}

impl<'a, 'b, 'c> Step<'a, 'b, 'c> {
    pub fn new(bench: &'c mut Bench<'a, 'b>, model: &'c Model) -> Self {
        let gpu: &'a Gpu<'b> = bench.gpu;
        let config = AttentionConfig::new(model.q_heads, model.kv_heads, HEAD_DIM, DType::Bf16);
        let blocks = 2 * CONTEXT.div_ceil(BLOCK);
        let layout = CacheLayout::nhd(blocks, BLOCK, &config);
        let tables: Vec<i32> = (0..blocks as i32).collect();
        let (query_start, lens) = ([0, 1], [CONTEXT as i32]);
        let batch = PagedBatch::padded(&query_start, &lens, &tables, blocks);
        let q = RowStrides { token: u64::from(model.qkv()), head: HEAD_DIM as u64 };
        let out = RowStrides::packed(model.q_heads, HEAD_DIM);
        let problem = Problem::with_strides(&config, layout, q, out, batch).unwrap();
        let plan = |order| {
            let options = PlanOptions { order, grid_items: Some(2), ..PlanOptions::default() };
            let plan = DecodePlan::new(&problem, gpu.context.device(), options).unwrap();
            gpu.context.prepare_decode(&plan).unwrap();
            plan
        };
        let plans = [Order::Stream, Order::Dependent].map(plan);
        let elements = (model.bytes() / 2) as usize;
        let half = layout.k_extent(&config) as usize;
        let mut room = gpu.filled(DType::Bf16, 16 << 20);
        let numbers: Vec<u8> =
            [CONTEXT as i32 - 1; 64].iter().flat_map(|n| i64::from(*n).to_le_bytes()).collect();
        let mut at = |place: u64, bytes: &[u8]| {
            let place = place as usize;
            gpu.stream.memcpy_htod(bytes, &mut room.slice_mut(place..place + bytes.len())).unwrap();
        };
        at(NUMBERS, &numbers);
        at(NUMBERS + 4096, &tables.iter().flat_map(|block| block.to_le_bytes()).collect::<Vec<u8>>());
        at(NUMBERS + 8192, &[0; 4096]);
        at(WORKSPACE, &vec![0; PLACE as usize]);
        let memory = Memory {
            weights: gpu.filled(DType::Bf16, elements),
            cache: gpu.filled(DType::Bf16, 2 * half * model.layers),
            room,
            work: gpu.stream.clone_htod(&plans[0].work()).unwrap(),
        };
        Self { bench, model, memory, config, layout, plans, matvecs: HashMap::new() }
    }

    fn at(&self, place: u64) -> u64 {
        self.bench.gpu.address(&self.memory.room) + place
    }

    fn product(&mut self, way: &Way, product: Product, layer: usize) {
        let index = PRODUCTS.iter().position(|one| *one == product).unwrap();
        if !way.products[index] {
            return;
        }
        let model = self.model;
        let normed = way.norms && matches!(product, Product::Qkv | Product::Up | Product::Head);
        let gated = model.gated && product == Product::Up;
        let (shape, _) = model.shape(product);
        let spec = MatvecSpec {
            dtype: ptx::DType::Bf16,
            input: if normed { Input::Staged } else { Input::Direct },
            gated,
            vector: 8,
            dependent: true,
        };
        let device = self.bench.gpu.context.device();
        let new = || Matvec::new(spec).unwrap().with_shared(device.shared_memory_per_block);
        let matvec = self.matvecs.entry(spec).or_insert_with(new).clone();
        let mut geometry = matvec.geometry(shape, device.multiprocessors, product == Product::O);
        if let Some(other) = way.geometry[index] {
            // Staged rows are not copied.
            geometry = Geometry { copies: other.copies && !normed, ..other };
        }
        let launch = matvec.launch(shape, geometry).unwrap();
        let before: u64 = PRODUCTS[..index].iter().map(|one| model.shape(*one).1).sum();
        let weights = self.bench.gpu.address(&self.memory.weights);
        let weight = match product {
            Product::Head => weights + model.layers as u64 * model.layer_bytes(),
            _ => weights + layer as u64 * model.layer_bytes() + before,
        };
        let (x, out, store) = match product {
            Product::Qkv => (X, QKV, Store::Compute),
            Product::O => (ATTENDED, X, Store::Add),
            Product::Up => (X, ACTIVATED, Store::Compute),
            Product::Down => (ACTIVATED, X, Store::Add),
            Product::Head => (LAST, LOGITS, Store::F32),
        };
        let kind = if model.gated { NormKind::Rms } else { NormKind::Layer };
        let bias = if model.gated { 0 } else { self.at(VECTORS) + (1 << 20) };
        let norm = MatvecNorm { kind, eps: 1e-5, weight: self.at(VECTORS), bias };
        let args = MatvecArgs {
            shape,
            x: Rows { address: self.at(x), stride: u64::from(shape.width) },
            norm: normed.then_some(norm),
            weight: Rows { address: weight, stride: u64::from(shape.width) },
            bias: if product == Product::Head { 0 } else { bias },
            activation: match product {
                Product::Up if gated => Activation::Silu,
                Product::Up => Activation::Relu,
                _ => Activation::None,
            },
            store,
            out: Rows { address: self.at(out), stride: u64::from(shape.features) },
        };
        let function = self
            .bench
            .edited_function(matvec.kernel(), &format!("{:?}", way.edit), |text| way.edit.apply(text));
        self.bench.launch(&function, true, launch, &args.values(geometry));
    }

    fn caches(&self, layer: usize) -> (u64, u64) {
        let half = 2 * self.layout.k_extent(&self.config);
        let k = self.bench.gpu.address(&self.memory.cache) + 2 * layer as u64 * half;
        (k, k + half)
    }

    fn write_kv(&self, order: Order, layer: usize) {
        let model = self.model;
        let (k_cache, v_cache) = self.caches(layer);
        let strides = RowStrides { token: u64::from(model.qkv()), head: HEAD_DIM as u64 };
        let q = self.at(QKV);
        let k = q + (2 * model.q_heads * HEAD_DIM) as u64;
        let call = WriteKvCall {
            config: &self.config,
            layout: &self.layout,
            source: DType::Bf16,
            tokens: 1,
            slots: self.at(NUMBERS),
            k,
            k_strides: strides,
            v: k + (2 * model.kv_heads * HEAD_DIM) as u64,
            v_strides: strides,
            k_cache,
            v_cache,
            scales: None,
            order,
        };
        let context = self.bench.gpu.context;
        let stream = self.bench.gpu.raw_stream();
        if !model.gated {
            // SAFETY: all addresses are within live slices that hold what shapes and strides reach.
            unsafe { context.write_kv_raw(&call, stream) }.unwrap();
            return;
        }
        let cos = self.at(VECTORS);
        let tables = RotaryTables { cos, sin: cos + 256, stride: HEAD_DIM as u64, positions: CONTEXT };
        let rotary = Rotary {
            style: RotaryStyle::NeoX,
            dim: HEAD_DIM,
            tables,
            positions: self.at(NUMBERS),
            position_type: PositionType::I64,
            queries: Some(RotaryQueries { q, q_strides: strides, out: q, out_strides: strides }),
        };
        // SAFETY: as above.
        unsafe { context.write_kv_rotary_raw(&call, &rotary, stream) }.unwrap();
    }

    fn attention(&self, order: Order, layer: usize) {
        let plan = &self.plans[usize::from(order == Order::Dependent)];
        let (k_cache, v_cache) = self.caches(layer);
        let call = AttentionCall {
            q: self.at(QKV),
            k_cache,
            v_cache,
            tables: self.at(NUMBERS) + 4096,
            out: self.at(ATTENDED),
            work: self.bench.gpu.address(&self.memory.work),
            partial_out: self.at(WORKSPACE),
            partial_max: self.at(WORKSPACE) + (1 << 20),
            tickets: self.at(WORKSPACE) + (3 << 19),
            ..AttentionCall::default()
        };
        // SAFETY: as above.
        unsafe { self.bench.gpu.context.decode_raw(plan, &call, self.bench.gpu.raw_stream()) }.unwrap();
    }

    fn ends(&mut self, last: bool) {
        let model = self.model;
        let x = Rows { address: self.at(X), stride: u64::from(model.hidden) };
        if last {
            let spec = GatherRowsSpec { out: ptx::DType::F32, vector: 4, dependent: true };
            let gather = GatherRows::new(spec).unwrap();
            let args = GatherRowsArgs {
                rows: 1,
                width: model.hidden,
                x,
                x_rows: 1,
                index: self.at(NUMBERS) + 8192,
                out: Rows { address: self.at(LAST), stride: u64::from(model.hidden) },
            };
            let function = self.bench.function(gather.kernel());
            self.bench.launch(&function, true, gather.launch(1, model.hidden).unwrap(), &args.values());
            return;
        }
        let embed = Embed::new(EmbedSpec { dtype: ptx::DType::Bf16, vector: 8, dependent: true }).unwrap();
        let table = self.bench.gpu.address(&self.memory.weights) + model.layers as u64 * model.layer_bytes();
        let args = EmbedArgs {
            rows: 1,
            width: model.hidden,
            ids: self.at(NUMBERS),
            id_bytes: 8,
            table: Rows { address: table, stride: u64::from(model.hidden) },
            table_rows: model.vocab,
            scale: 1.0,
            out: x,
            ..EmbedArgs::default()
        };
        let function = self.bench.function(embed.kernel());
        self.bench.launch(&function, false, embed.launch(1, model.hidden).unwrap(), &args.values());
    }

    fn argmax(&mut self) {
        let vocab = self.model.vocab;
        let argmax = Argmax::new(ArgmaxSpec { vector: 4, dependent: true }).unwrap();
        let args = ArgmaxArgs {
            logits: Rows { address: self.at(LOGITS), stride: u64::from(vocab) },
            vocab,
            keys: self.at(WORKSPACE) + (7 << 18),
            tickets: self.at(WORKSPACE) + (15 << 17),
            tokens: self.at(NUMBERS) + 16384,
            best: self.at(NUMBERS) + 20480,
        };
        let function = self.bench.function(argmax.kernel());
        self.bench.launch(&function, true, argmax.launch(1, vocab).unwrap(), &args.values());
    }

    fn step(&mut self, way: &Way) {
        if way.ends {
            self.ends(false);
        }
        for layer in 0..self.model.layers {
            self.product(way, Product::Qkv, layer);
            if way.write_kv {
                self.write_kv(way.order, layer);
            }
            if way.attention {
                self.attention(way.order, layer);
            }
            self.product(way, Product::O, layer);
            self.product(way, Product::Up, layer);
            self.product(way, Product::Down, layer);
        }
        if way.ends {
            self.ends(true);
        }
        self.product(way, Product::Head, 0);
        if way.argmax {
            self.argmax();
        }
    }
}
