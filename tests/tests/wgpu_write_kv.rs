//! `write_kv` through wgpu against plain code, on every adapter that is there: software Vulkan at least.
//!
//! One case again: `PAGEWISE_CASE="bf16 f16 2 1234" cargo test -p pagewise-tests --test wgpu_write_kv`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub, reason = "a test")]

#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/wgpu_buffers.rs"]
mod wgpu_buffers;
#[path = "gpu/wgpu_contexts.rs"]
mod wgpu_contexts;
#[path = "gpu/write_kv.rs"]
mod write_kv;

use pagewise_attention::wgpu::{BufferRange, Context, WgpuError, WriteKvCall, wgpu};
use pagewise_attention::{AttentionConfig, CacheLayout, DType, ProblemError};
use random::{Random, run_cases, run_seed};
use wgpu::BufferUsages;
use wgpu_buffers::{buffer, read};
use wgpu_contexts::contexts;
use write_kv::{Case, Tensors, wanted_case};

/// The buffers of a case on a device.
struct OnDevice<'a> {
    tensors: &'a Tensors,
    slots: wgpu::Buffer,
    k: wgpu::Buffer,
    v: wgpu::Buffer,
    caches: Vec<wgpu::Buffer>,
}

impl<'a> OnDevice<'a> {
    fn new(context: &Context, tensors: &'a Tensors) -> Self {
        let slots: Vec<u8> = tensors.slots.iter().flat_map(|&slot| (slot as i32).to_le_bytes()).collect();
        let input = |bytes: &[u8]| buffer(context, bytes, BufferUsages::STORAGE);
        let cache = |bytes: &Vec<u8>| buffer(context, bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
        Self {
            tensors,
            slots: input(&slots),
            k: input(&tensors.k),
            v: input(&tensors.v),
            caches: tensors.caches.iter().map(cache).collect(),
        }
    }

    fn call(&self) -> WriteKvCall<'_> {
        let from = |buffer: &'_ wgpu::Buffer, offset: usize| {
            let offset = offset as u64;
            (offset, buffer.size() - offset)
        };
        let range = |buffer, offset| {
            let (offset, size) = from(buffer, offset);
            BufferRange { buffer, offset, size }
        };
        let Tensors { config, layout, source, k_strides, v_strides, .. } = self.tensors;
        WriteKvCall {
            config,
            layout,
            source: *source,
            tokens: self.tensors.slots.len(),
            slots: BufferRange::whole(&self.slots),
            k: range(&self.k, self.tensors.k_offset),
            k_strides: *k_strides,
            v: range(&self.v, self.tensors.v_offset),
            v_strides: *v_strides,
            k_cache: range(self.caches.first().unwrap(), self.tensors.k_cache_offset),
            v_cache: range(self.caches.last().unwrap(), self.tensors.v_cache_offset),
        }
    }
}

fn run(context: &Context, case: Case) -> Result<String, String> {
    let tensors = case.build();
    let on_device = OnDevice::new(context, &tensors);
    let mut encoder = context.device().create_command_encoder(&Default::default());
    let variant = context.write_kv(&mut encoder, &on_device.call()).map_err(|error| error.to_string())?;
    context.queue().submit([encoder.finish()]);
    let found: Vec<Vec<u8>> = on_device.caches.iter().map(|cache| read(context, cache)).collect();
    tensors.compare(&tensors.expected(), &found).map_err(|error| format!("{}: {error}", variant.name()))?;
    Ok(variant.name())
}

#[test]
fn random_cases_store_the_same_bits_as_plain_code() {
    let seed = run_seed();
    for (adapter, context) in contexts() {
        let has_f16 = context.features().contains(wgpu::Features::SHADER_F16);
        let mut variants = std::collections::BTreeMap::new();
        let mut check = |case: Case| match run(&context, case) {
            Ok(variant) => *variants.entry(variant).or_insert(0) += 1,
            Err(error) => panic!("PAGEWISE_CASE=\"{case}\" on {adapter}: {error}"),
        };
        if let Some(case) = wanted_case() {
            check(case);
            continue;
        }
        let mut random = Random::new(seed);
        let types = [DType::F32, DType::F16, DType::Bf16];
        for (source, cache) in types.into_iter().flat_map(|source| types.map(|cache| (source, cache))) {
            let pair = [source, cache];
            let by_element = pair == [DType::F32; 2]
                || (has_f16 && pair.contains(&DType::F16) && !pair.contains(&DType::Bf16));
            let units: &[usize] = if by_element { &[8, 2, 1] } else { &[8, 2] };
            for &unit in units {
                for _ in 0..run_cases(6) {
                    check(Case { source, cache, unit, seed: random.next() });
                }
            }
        }
        eprintln!("{adapter}: {variants:?} cases passed");
        let all = 3 * 3 * 2 + if has_f16 { 3 } else { 0 };
        if run_cases(6) < 6 {
            continue;
        }
        assert_eq!(variants.len(), all, "every variant was chosen for some case");
    }
}

/// Four heads of 64, eight blocks of 16, five tokens.
fn small() -> (AttentionConfig, CacheLayout, Tensors) {
    let case = Case { source: DType::Bf16, cache: DType::Bf16, unit: 8, seed: 1 };
    let tensors = case.build();
    (tensors.config.clone(), tensors.layout, tensors)
}

#[test]
fn what_does_not_fit_is_a_typed_error() {
    for (_, context) in contexts() {
        let (config, layout, tensors) = small();
        let on_device = OnDevice::new(&context, &tensors);
        let call = on_device.call();
        let refused = |call: &WriteKvCall<'_>| context.prepare_write_kv(call).unwrap_err();

        let mut fp8 = config.clone();
        fp8.kv_dtype = DType::F8E4M3;
        let error = refused(&WriteKvCall { config: &fp8, ..call });
        assert!(matches!(error, WgpuError::UnsupportedDType { dtype: DType::F8E4M3, .. }), "{error}");

        let more_blocks = CacheLayout { num_blocks: layout.num_blocks + 1000, ..layout };
        let error = refused(&WriteKvCall { layout: &more_blocks, ..call });
        assert!(matches!(error, WgpuError::Problem(ProblemError::BufferTooShort { .. })), "{error}");

        let odd = BufferRange { offset: call.k.offset + 2, size: call.k.size - 2, ..call.k };
        let one = WriteKvCall { k: odd, tokens: 0, ..call };
        let error = refused(&one);
        assert!(matches!(error, WgpuError::Alignment { .. }), "{error}");

        let error = refused(&WriteKvCall { k: call.k_cache, ..call });
        assert!(
            matches!(
                error,
                WgpuError::SharedBuffer { .. } | WgpuError::Problem(ProblemError::BufferTooShort { .. })
            ),
            "{error}"
        );

        let plain = buffer(&context, &[0; 4096], BufferUsages::COPY_SRC);
        let error = refused(&WriteKvCall { slots: BufferRange::whole(&plain), ..call });
        assert!(matches!(error, WgpuError::Usage { tensor: "slots", .. }), "{error}");

        let past = BufferRange { size: call.v.size + 4, ..call.v };
        let error = refused(&WriteKvCall { v: past, ..call });
        assert!(matches!(error, WgpuError::Range { tensor: "new V", .. }), "{error}");
    }
}

#[test]
fn a_prepared_call_writes_the_tokens_that_are_set() {
    for (adapter, context) in contexts() {
        let (_, _, tensors) = small();
        let on_device = OnDevice::new(&context, &tensors);
        let mut prepared = context.prepare_write_kv(&on_device.call()).unwrap();
        for tokens in [0, tensors.slots.len() / 2, tensors.slots.len()] {
            prepared.set_tokens(context.queue(), tokens).unwrap();
            let mut encoder = context.device().create_command_encoder(&Default::default());
            prepared.encode(&mut encoder.begin_compute_pass(&Default::default()));
            context.queue().submit([encoder.finish()]);
            let mut fewer = tensors.clone();
            fewer.slots.truncate(tokens);
            let found: Vec<Vec<u8>> = on_device.caches.iter().map(|cache| read(&context, cache)).collect();
            fewer
                .compare(&fewer.expected(), &found)
                .unwrap_or_else(|error| panic!("{adapter}, {tokens} tokens: {error}"));
        }
        let error = prepared.set_tokens(context.queue(), tensors.slots.len() + 1).unwrap_err();
        assert!(matches!(error, WgpuError::TooManyTokens { .. }), "{error}");
    }
}
