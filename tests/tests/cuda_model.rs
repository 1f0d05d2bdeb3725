//! The dense layers' kernels on an NVIDIA GPU against plain f64 code. Skipped, loudly, without one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    dead_code,
    reason = "a test"
)]

#[path = "gpu/cuda.rs"]
mod cuda;
#[path = "gpu/encode.rs"]
mod encode;
#[path = "gpu/model/mod.rs"]
mod model;
#[path = "gpu/random.rs"]
mod random;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use cuda::Receipts;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use model::{Device, Run};
use pagewise_attention::cuda::ptx::model::matvec::{
    Input, Matvec, MatvecArgs, MatvecShape, MatvecSpec, Store,
};
use pagewise_attention::cuda::ptx::model::{Activation, Rows};
use pagewise_attention::cuda::ptx::{Arg, DType, Kernel, Launch, all_kernels};
use pagewise_attention::cuda::{Context, Order, OwnKernel, cudarc};
use random::{Random, run_cases, run_seed};

struct Gpu {
    context: Arc<Context>,
    stream: Arc<CudaStream>,
    slices: Vec<(u64, CudaSlice<u8>)>,
    kernels: HashMap<String, OwnKernel>,
}

impl Gpu {
    fn new(context: &Arc<Context>) -> Self {
        // A stream of its own: dependent launches are not for the default stream.
        let stream = context.cudarc().unwrap().new_stream().unwrap();
        Self { context: Arc::clone(context), stream, slices: Vec::new(), kernels: HashMap::new() }
    }

    fn launch(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<(), String> {
        if !self.kernels.contains_key(kernel.entry()) {
            let loaded = OwnKernel::new(&self.context, kernel).map_err(|error| error.to_string())?;
            self.kernels.insert(kernel.entry().to_owned(), loaded);
        }
        assert_eq!(args.len(), kernel.params().len());
        let order = if kernel.entry().ends_with("_pdl") { Order::Dependent } else { Order::Stream };
        let loaded = &self.kernels[kernel.entry()];
        // SAFETY: the arguments are those of the kernel, all addresses those of live slices, and variants that say that
        // they wait for the kernel before them do so.
        unsafe { loaded.launch(launch, args, self.stream.cu_stream().into(), order) }
            .map_err(|error| error.to_string())
    }
}

impl Device for Gpu {
    fn upload(&mut self, bytes: &[u8]) -> u64 {
        let bytes = if bytes.is_empty() { &[0xff; 16] } else { bytes };
        let slice = self.stream.clone_htod(bytes).unwrap();
        let address = slice.device_ptr(&self.stream).0;
        self.slices.push((address, slice));
        address
    }

    fn download(&self, address: u64) -> Vec<u8> {
        let (_, slice) = self.slices.iter().find(|(at, _)| *at == address).unwrap();
        self.stream.clone_dtoh(slice).unwrap()
    }

    fn clear(&mut self) {
        self.slices.clear();
    }

    fn shared_memory(&self) -> u32 {
        self.context.device().shared_memory_per_block
    }

    fn can_run(&self, kernel: &Kernel) -> bool {
        let capability = self.context.device().compute_capability;
        kernel.target().runs_on(capability.major * 10 + capability.minor)
    }

    fn run(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<(), String> {
        self.launch(kernel, launch, args)?;
        self.stream.synchronize().map_err(|error| error.to_string())
    }
}

#[test]
fn random_cases_agree_with_the_definition() {
    let Some(context) = cuda::context().map(Arc::new) else { return };
    let mut gpu = Gpu::new(&context);
    let small = std::env::var_os("PAGEWISE_SMALL").is_some();
    let mut receipts: BTreeMap<&'static str, Receipts> = BTreeMap::new();
    let mut families: HashMap<String, &'static str> = HashMap::new();
    Run {
        device: &mut gpu,
        cases: run_cases(12),
        seed: run_seed(),
        small,
        passed: &mut |kernel, error| {
            let family = *families
                .entry(kernel.family().to_owned())
                .or_insert_with(|| String::leak(kernel.family().to_owned()));
            receipts.entry(family).or_default().passed(&context, kernel, error);
        },
    }
    .all();
    for (family, receipts) in &receipts {
        receipts.write(family);
        let known = all_kernels().unwrap();
        let runnable =
            known.iter().filter(|kernel| kernel.family() == *family && gpu.can_run(kernel)).count();
        eprintln!("{family}: {} of {runnable} variants passed", receipts.variants().count());
        if std::env::var_os("PAGEWISE_MODEL_CASE").is_none() {
            assert_eq!(receipts.variants().count(), runnable, "{family}: every variant was run");
        }
    }
}

/// A chain of products, each of which reads what the one before wrote and adds to what the one before that read: with
/// dependent launches it gives the bits that it gives without.
#[test]
fn dependent_launches_wait_for_what_they_read() {
    let Some(context) = cuda::context().map(Arc::new) else { return };
    let mut gpu = Gpu::new(&context);
    let shape = MatvecShape { rows: 3, features: 1536, width: 1536 };
    let (rows, width) = (shape.rows as usize, shape.width as usize);
    let mut random = Random::new(run_seed());
    let mut bits = |count: usize, reach: f64| -> Vec<u8> {
        (0..count).flat_map(|_| ((random.unit() * reach) as f32).to_le_bytes()).collect()
    };
    let weights: Vec<Vec<u8>> = (0..6).map(|_| bits(width * width, 0.04)).collect();
    let start = bits(2 * rows * width, 1.0);
    let spec = |dependent| MatvecSpec {
        dtype: DType::F32,
        input: Input::Direct,
        gated: false,
        vector: 4,
        dependent,
    };
    let mut found = Vec::new();
    for dependent in [false, true] {
        let matvec =
            Matvec::new(spec(dependent)).unwrap().with_shared(context.device().shared_memory_per_block);
        if !gpu.can_run(matvec.kernel()) {
            continue;
        }
        let weights: Vec<u64> = weights.iter().map(|bytes| gpu.upload(bytes)).collect();
        let state = gpu.upload(&start);
        let half = state + 4 * (rows * width) as u64;
        let geometry = matvec.geometry(shape, context.device().multiprocessors, false);
        let launch = matvec.launch(shape, geometry).unwrap();
        for step in 0..60 {
            let (x, out) = if step % 2 == 0 { (state, half) } else { (half, state) };
            let stride = u64::from(shape.width);
            let args = MatvecArgs {
                shape,
                x: Rows { address: x, stride },
                norm: None,
                weight: Rows { address: weights[step % 6], stride },
                bias: 0,
                activation: Activation::None,
                store: if step % 3 == 0 { Store::F32 } else { Store::Add },
                out: Rows { address: out, stride },
            };
            gpu.launch(matvec.kernel(), launch, &args.values(geometry)).unwrap();
        }
        gpu.stream.synchronize().unwrap();
        found.push(gpu.download(state));
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "the bits differ");
    assert!(found[0].as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite()));
}
