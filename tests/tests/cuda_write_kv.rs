//! `write_kv` on an NVIDIA GPU against plain code. Skipped, loudly, without one.
//!
//! One case again: `PAGEWISE_CASE="bf16 fp8_e4m3 8 1234" cargo test -p pagewise-tests --test cuda_write_kv`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/blocks.rs"]
mod blocks;
#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/cuda_machine.rs"]
mod cuda_machine;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/machine.rs"]
mod machine;
#[path = "gpu/merge.rs"]
mod merge;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/rotary.rs"]
mod rotary;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use std::sync::Arc;

use cuda::Receipts;
use cuda_machine::Gpu;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use machine::check_rotary;
use pagewise_attention::cuda::ptx::write_kv::{RotaryStyle, WriteKv, WriteKvSpec};
use pagewise_attention::cuda::{
    Context, CudaError, Device, KvScales, Order, PositionType, Rotary, RotaryTables, WriteKvCall,
    WriteKvSlices, WriteKvVariant, cudarc,
};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, ProblemError, RowStrides};
use random::{Random, run_cases, run_seed};
use write_kv::{Case, Tensors, wanted_case};

/// The tensors of a case in device memory, as bytes.
struct OnDevice<'a> {
    tensors: &'a Tensors,
    slots: CudaSlice<i64>,
    k: CudaSlice<u8>,
    v: CudaSlice<u8>,
    caches: Vec<CudaSlice<u8>>,
    scales: Option<(CudaSlice<f32>, CudaSlice<f32>)>,
}

fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

impl<'a> OnDevice<'a> {
    fn new(stream: &Arc<CudaStream>, tensors: &'a Tensors) -> Self {
        let copy = |bytes: &Vec<u8>| stream.clone_htod(bytes).unwrap();
        Self {
            tensors,
            slots: stream.clone_htod(&tensors.slots).unwrap(),
            k: copy(&tensors.k),
            v: copy(&tensors.v),
            caches: tensors.caches.iter().map(copy).collect(),
            scales: tensors
                .scales
                .as_ref()
                .map(|scales| (stream.clone_htod(&scales.k).unwrap(), stream.clone_htod(&scales.v).unwrap())),
        }
    }

    fn call(&self, stream: &CudaStream) -> WriteKvCall<'a> {
        let Tensors { config, layout, source, k_strides, v_strides, .. } = self.tensors;
        WriteKvCall {
            order: Order::Stream,
            config,
            layout,
            source: *source,
            tokens: self.tensors.slots.len(),
            slots: address(&self.slots, stream),
            k: address(&self.k, stream) + self.tensors.k_offset as u64,
            k_strides: *k_strides,
            v: address(&self.v, stream) + self.tensors.v_offset as u64,
            v_strides: *v_strides,
            k_cache: address(self.caches.first().unwrap(), stream) + self.tensors.k_cache_offset as u64,
            v_cache: address(self.caches.last().unwrap(), stream) + self.tensors.v_cache_offset as u64,
            scales: self.scales.as_ref().map(|(k, v)| KvScales {
                k: address(k, stream),
                v: address(v, stream),
                per_head: k.len() > 1,
            }),
        }
    }

    fn read(&self, stream: &Arc<CudaStream>) -> Vec<Vec<u8>> {
        self.caches.iter().map(|cache| stream.clone_dtoh(cache).unwrap()).collect()
    }
}

/// Runs a case with the raw API.
fn run(context: &Context, stream: &Arc<CudaStream>, case: Case) -> Result<(WriteKvVariant, f64), String> {
    let tensors = case.build();
    let on_device = OnDevice::new(stream, &tensors);
    let early = case.seed % 2 == 1 && context.device().launches_dependently();
    let order = if early { Order::Dependent } else { Order::Stream };
    let call = WriteKvCall { order, ..on_device.call(stream) };
    // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
    let variant = unsafe { context.write_kv_raw(&call, stream.cu_stream().into()) };
    let variant = variant.map_err(|error| error.to_string())?;
    let error = tensors
        .compare(&tensors.expected(), &on_device.read(stream))
        .map_err(|error| format!("{}: {error}", variant.name()))?;
    Ok((variant, error))
}

fn kernel(variant: WriteKvVariant) -> WriteKv {
    let spec = WriteKvSpec::all().find(|spec| spec.entry() == variant.name()).unwrap();
    WriteKv::new(spec).unwrap()
}

/// How many variants a GPU runs, those with rotary embedding or those without.
fn variants_for(device: &Device, rotary: bool) -> usize {
    let capability = device.compute_capability;
    let has_fp8 = capability.major * 10 + capability.minor >= 89;
    let runs = |spec: &WriteKvSpec| {
        spec.rotary.is_some() == rotary
            && (has_fp8 || !spec.cache.is_fp8())
            && (device.launches_dependently() || !spec.dependent)
    };
    WriteKvSpec::all().filter(runs).count()
}

fn stream_of(context: &Context) -> Arc<CudaStream> {
    context.cudarc().unwrap().default_stream()
}

#[test]
fn random_cases_store_the_same_bits_as_plain_code() {
    let Some(context) = cuda::context() else { return };
    let stream = stream_of(&context);
    let mut receipts = Receipts::default();
    let mut check = |case: Case| match run(&context, &stream, case) {
        Ok((variant, error)) => receipts.passed(&context, kernel(variant).kernel(), error),
        Err(error) => panic!("PAGEWISE_CASE=\"{case}\": {error}"),
    };
    if let Some(case) = wanted_case() {
        return check(case);
    }
    let mut random = Random::new(run_seed());
    let has_fp8 =
        context.device().compute_capability.major * 10 + context.device().compute_capability.minor >= 89;
    for source in [DType::F32, DType::F16, DType::Bf16] {
        for cache in DType::ALL {
            if cache.is_fp8() && !has_fp8 {
                eprintln!("SKIPPED: {cache} caches need sm_89");
                continue;
            }
            for unit in [8, 2, 1] {
                for _ in 0..run_cases(25) {
                    check(Case { source, cache, unit, seed: random.next() });
                }
            }
        }
    }
    let checked = receipts.variants().count();
    eprintln!("{}: {checked} variants passed", context.device());
    if run_cases(25) >= 25 {
        assert_eq!(checked, variants_for(context.device(), false), "every variant was chosen for some case");
    }
    receipts.write("write_kv");
}

/// Every variant with rotary embedding; cases whose half does not divide into vectors take the scalar one.
#[test]
fn random_cases_turn_keys_and_queries_as_plain_code_does() {
    let Some(context) = cuda::context() else { return };
    let mut machine = Gpu::new(&context);
    let mut receipts = Receipts::default();
    let variants: Vec<WriteKv> = WriteKvSpec::all()
        .filter(|spec| spec.rotary.is_some())
        .map(|spec| WriteKv::new(spec).unwrap())
        .collect();
    let mut check = |case: Case| match check_rotary(&mut machine, &case) {
        Ok((variant, error)) => {
            let ran = variants.iter().find(|write_kv| write_kv.kernel().entry() == variant).unwrap();
            receipts.passed(&context, ran.kernel(), error);
        }
        Err(error) => panic!("PAGEWISE_CASE=\"{case}\": {error}"),
    };
    if let Some(case) = wanted_case() {
        return check(case);
    }
    let mut random = Random::new(run_seed());
    let capability = context.device().compute_capability;
    let has_fp8 = capability.major * 10 + capability.minor >= 89;
    let sources = [DType::F32, DType::F16, DType::Bf16];
    for (source, cache) in sources.into_iter().flat_map(|s| DType::ALL.into_iter().map(move |c| (s, c))) {
        if cache.is_fp8() && !has_fp8 {
            eprintln!("SKIPPED: {cache} caches need sm_89");
            continue;
        }
        for unit in [8, 8, 1, 1] {
            (0..run_cases(12)).for_each(|_| check(Case { source, cache, unit, seed: random.next() }));
        }
    }
    let checked = receipts.variants().count();
    eprintln!("{}: {checked} variants passed", context.device());
    if run_cases(12) >= 12 {
        assert_eq!(checked, variants_for(context.device(), true), "every variant was chosen for some case");
    }
    receipts.write("write_kv_rotary");
}

#[test]
fn rotary_refusals_are_typed() {
    let tensors = Case { source: DType::Bf16, cache: DType::Bf16, unit: 8, seed: 1 }.build();
    let Tensors { config, layout, source, k_strides, v_strides, .. } = &tensors;
    let call = WriteKvCall {
        config,
        layout,
        source: *source,
        tokens: 1,
        slots: 0,
        k: 0,
        k_strides: *k_strides,
        v: 0,
        v_strides: *v_strides,
        k_cache: 0,
        v_cache: 0,
        scales: None,
        order: Order::Stream,
    };
    let tables = RotaryTables { cos: 0, sin: 0, stride: 64, positions: 10 };
    let position_type = PositionType::I64;
    let style = RotaryStyle::NeoX;
    let good = Rotary { style, dim: 8, tables, positions: 0, position_type, queries: None };
    assert!(good.variant(&call).is_ok());
    for dim in [0, 7, config.head_dim_qk + 2] {
        let error = Rotary { dim, ..good }.variant(&call).unwrap_err();
        assert!(matches!(error, CudaError::Problem(ProblemError::Input { .. })), "{error}");
    }
    let error = Rotary { tables: RotaryTables { stride: 3, ..tables }, ..good }.variant(&call).unwrap_err();
    assert!(error.to_string().contains("stride of the tables is 3"), "{error}");
    let error = Rotary { positions: 4, ..good }.variant(&call).unwrap_err();
    assert!(matches!(error, CudaError::Misaligned { tensor: "the positions", size: 8, .. }), "{error}");
}

#[test]
fn refusals_are_typed() {
    let Some(context) = cuda::context() else { return };
    let stream = stream_of(&context);
    let tensors = Case { source: DType::Bf16, cache: DType::Bf16, unit: 8, seed: 1 }.build();
    let on_device = OnDevice::new(&stream, &tensors);
    let call = on_device.call(&stream);
    let refused = |call: &WriteKvCall<'_>| context.prepare_write_kv(call).unwrap_err();

    let error = refused(&WriteKvCall { source: DType::F8E5M2, ..call });
    assert!(matches!(error, CudaError::UnsupportedDType { dtype: DType::F8E5M2, .. }), "{error}");
    let error = refused(&WriteKvCall { k: call.k + 1, ..call });
    assert!(matches!(error, CudaError::Misaligned { tensor: "new K", size: 2, .. }), "{error}");
    let mut fp8 = tensors.config.clone();
    fp8.kv_dtype = DType::F8E4M3;
    let error = refused(&WriteKvCall { config: &fp8, ..call });
    assert!(matches!(error, CudaError::Problem(ProblemError::Input { input: "scales", .. })), "{error}");
    let error = Context::primary(1000).unwrap_err();
    assert!(matches!(error, CudaError::NoSuchDevice { ordinal: 1000, .. }), "{error}");
}

#[test]
fn cudarc_slices_are_checked_and_written() {
    let Some(context) = cuda::context() else { return };
    let stream = stream_of(&context);
    let config = AttentionConfig::new(4, 4, 64, DType::F32);
    let layout = CacheLayout::nhd(3, 16, &config);
    let rows: Vec<f32> = (0..2 * 4 * 64).map(|i| i as f32).collect();
    let k = stream.clone_htod(&rows).unwrap();
    let v = stream.clone_htod(&rows.iter().map(|x| -x).collect::<Vec<f32>>()).unwrap();
    let slots = stream.clone_htod(&[17i64, 1_000_000]).unwrap();
    let len = layout.k_extent(&config) as usize;
    let mut k_cache = stream.clone_htod(&vec![f32::NAN; len]).unwrap();
    let mut v_cache = stream.clone_htod(&vec![f32::NAN; len]).unwrap();
    let strides = RowStrides::packed(4, 64);
    let call = |layout: &CacheLayout, k_cache: &mut CudaSlice<f32>, v_cache: &mut CudaSlice<f32>| {
        let args = WriteKvSlices {
            config: &config,
            layout,
            slots: slots.as_view(),
            k: k.as_view(),
            k_strides: strides,
            v: v.as_view(),
            v_strides: strides,
            k_cache: &mut k_cache.as_view_mut(),
            v_cache: &mut v_cache.as_view_mut(),
            scales: None,
        };
        context.write_kv(&stream, args)
    };
    let variant = call(&layout, &mut k_cache, &mut v_cache).unwrap();
    assert_eq!(variant.name(), "write_kv_f32_f32_v4");
    // Token 0 went to slot 17; token 1's slot is past the cache and was skipped.
    let (k_found, v_found) = (stream.clone_dtoh(&k_cache).unwrap(), stream.clone_dtoh(&v_cache).unwrap());
    for (index, (k, v)) in k_found.iter().zip(&v_found).enumerate() {
        match index.checked_sub(17 * 256) {
            Some(place @ 0..256) => assert_eq!((*k, *v), (place as f32, -(place as f32))),
            _ => assert!(k.is_nan() && v.is_nan(), "slot {} was touched", index / 256),
        }
    }
    let larger = CacheLayout { num_blocks: 4, ..layout };
    let error = call(&larger, &mut k_cache, &mut v_cache).unwrap_err();
    assert!(matches!(error, CudaError::Problem(ProblemError::BufferTooShort { .. })), "{error}");
}

#[test]
fn works_in_a_context_that_another_engine_made() {
    let Some(first) = cuda::context() else { return };
    let engine = CudaContext::new(first.device().ordinal).unwrap();
    drop(first);
    engine.bind_to_thread().unwrap();
    // SAFETY: `engine` outlives `context`.
    let context = unsafe { Context::current() }.unwrap();
    assert!(context.cudarc().is_none());
    let stream = engine.new_stream().unwrap();
    run(&context, &stream, Case { source: DType::F16, cache: DType::F16, unit: 8, seed: 7 }).unwrap();
    drop(context);
    // The engine's context still works after ours is gone.
    assert_eq!(stream.clone_dtoh(&stream.clone_htod(&[1u32, 2]).unwrap()).unwrap(), [1, 2]);

    // On a thread where nothing is current, there is nothing to take.
    let elsewhere = std::thread::spawn(|| {
        // SAFETY: there is no context to outlive anything.
        unsafe { Context::current() }.unwrap_err().to_string()
    });
    let error = elsewhere.join().unwrap();
    assert!(error.contains("no CUDA context"), "{error}");
}

#[test]
fn a_captured_graph_writes_what_its_buffers_hold_at_replay() {
    let Some(context) = cuda::context() else { return };
    let engine = context.cudarc().unwrap();
    // SAFETY: one stream only, so that nothing needs the events.
    unsafe { engine.disable_event_tracking() };
    let stream = engine.new_stream().unwrap();
    let mut tensors = Case { source: DType::Bf16, cache: DType::Bf16, unit: 8, seed: 11 }.build();
    let poisoned = tensors.caches.clone();
    let mut on_device = OnDevice::new(&stream, &tensors);
    let call = on_device.call(&stream);
    context.prepare_write_kv(&call).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the slices live until the last replay has completed.
    unsafe { context.write_kv_raw(&call, stream.cu_stream().into()) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();

    let slots = tensors.slots.clone();
    for turn in 0..3 {
        let mut turned = slots.clone();
        let by = turn % turned.len();
        turned.rotate_left(by);
        stream.memcpy_htod(&turned, &mut on_device.slots).unwrap();
        for (cache, bytes) in on_device.caches.iter_mut().zip(&poisoned) {
            stream.memcpy_htod(bytes, cache).unwrap();
        }
        graph.launch().unwrap();
        let found = on_device.read(&stream);
        let expected = Tensors { slots: turned, ..on_device.tensors.clone() }.expected();
        on_device.tensors.compare(&expected, &found).unwrap();
    }
    drop(on_device);
    tensors.slots.clear();
    assert!(tensors.expected() == poisoned);
}

/// A cache of more than 2³² bytes and 2³¹ elements: slots at its end are reached, and nothing else.
#[test]
fn offsets_beyond_32_bits_are_reached() {
    let Some(context) = cuda::context() else { return };
    let (heads, dim) = (8, 128);
    let config = AttentionConfig::new(heads, heads, dim, DType::Bf16);
    let blocks = 150_000;
    let layout = CacheLayout::hnd(blocks, 16, &config);
    let bytes = layout.k_extent(&config) as usize * 2;
    assert!(bytes > 1 << 32 && layout.k_extent(&config) > 1 << 31);
    if context.device().memory < 3 * bytes as u64 || std::env::var_os("PAGEWISE_SMALL").is_some() {
        eprintln!("SKIPPED: a cache of {} GiB is too large here", (2 * bytes) >> 30);
        return;
    }
    let stream = stream_of(&context);
    let slots = [layout.slots() as i64 - 1, 0, layout.slots() as i64 / 2 + 5];
    let rows: Vec<half::bf16> =
        (0..slots.len() * heads * dim).map(|i| half::bf16::from_f32(i as f32)).collect();
    let k = stream.clone_htod(&rows).unwrap();
    let v = stream.clone_htod(&rows).unwrap();
    let device_slots = stream.clone_htod(&slots).unwrap();
    let mut caches = [(); 2].map(|()| stream.alloc_zeros::<half::bf16>(bytes / 2).unwrap());
    let [k_cache, v_cache] = &mut caches;
    let strides = RowStrides::packed(heads, dim);
    let args = WriteKvSlices {
        config: &config,
        layout: &layout,
        slots: device_slots.as_view(),
        k: k.as_view(),
        k_strides: strides,
        v: v.as_view(),
        v_strides: strides,
        k_cache: &mut k_cache.as_view_mut(),
        v_cache: &mut v_cache.as_view_mut(),
        scales: None,
    };
    context.write_kv(&stream, args).unwrap();
    for cache in &caches {
        for (token, &slot) in slots.iter().enumerate() {
            let (block, place) = (slot as usize / 16, slot as usize % 16);
            let first = block * heads * 16 * dim;
            let found = stream.clone_dtoh(&cache.slice(first..first + heads * 16 * dim)).unwrap();
            for (index, &value) in found.iter().enumerate() {
                let (head, inside, element) = (index / (16 * dim), index / dim % 16, index % dim);
                let row = (token * heads + head) * dim + element;
                let expected = if inside == place { rows[row] } else { half::bf16::ZERO };
                assert_eq!(value, expected, "block {block}, head {head}, token {inside}, element {element}");
            }
        }
    }
}
