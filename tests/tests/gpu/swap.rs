//! One swap between device memory and pinned host memory, checked byte for byte, by each method and both ways.

use std::sync::Arc;

use pagewise_attention::conformance::Pinned;
use pagewise_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use pagewise_attention::cuda::{Context, LayerAddresses, SwapMethod};

use super::blocks::{BlocksTensors, compare_bytes};
use super::cuda_subject::{pair_bytes, pinned};

pub const METHODS: [SwapMethod; 3] = [
    SwapMethod::CopyEngines,
    SwapMethod::Kernel { thread_blocks: None },
    SwapMethod::Kernel { thread_blocks: Some(3) },
];

pub fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// The buffers of one side of a swap, in device memory or pinned host memory.
enum Placed {
    Device(Vec<CudaSlice<u8>>),
    Host(Vec<Pinned>),
}

impl Placed {
    fn new(context: &Context, stream: &Arc<CudaStream>, buffers: &[Vec<u8>], on_host: bool) -> Self {
        match on_host {
            true => Self::Host(buffers.iter().map(|bytes| pinned(context, bytes)).collect()),
            false => Self::Device(buffers.iter().map(|bytes| stream.clone_htod(bytes).unwrap()).collect()),
        }
    }

    fn addresses(&self, stream: &CudaStream) -> Vec<u64> {
        match self {
            Self::Device(slices) => slices.iter().map(|slice| address(slice, stream)).collect(),
            Self::Host(buffers) => buffers.iter().map(|buffer| buffer.address).collect(),
        }
    }

    fn bytes(&self, stream: &Arc<CudaStream>) -> Vec<Vec<u8>> {
        stream.synchronize().unwrap();
        match self {
            Self::Device(slices) => slices.iter().map(|slice| stream.clone_dtoh(slice).unwrap()).collect(),
            Self::Host(buffers) => buffers.iter().map(|buffer| buffer.bytes().unwrap().to_vec()).collect(),
        }
    }
}

/// Swaps the pairs of a case out or in; what was wrong, if anything.
pub fn check_swap(
    context: &Context,
    stream: &Arc<CudaStream>,
    tensors: &BlocksTensors,
    method: SwapMethod,
    out: bool,
) -> Result<(), String> {
    let pairs = tensors.named(&tensors.pairs);
    let sides: Vec<Placed> = tensors
        .sides
        .iter()
        .zip([!out, out])
        .map(|(side, on_host)| Placed::new(context, stream, &side.buffers, on_host))
        .collect();
    let layers: Vec<LayerAddresses> = tensors
        .sides
        .iter()
        .zip(&sides)
        .map(|(side, placed)| side.layers(&placed.addresses(stream)))
        .collect();
    let tables: Vec<_> = layers.iter().map(|layers| stream.clone_htod(layers.words()).unwrap()).collect();
    let device_pairs = stream.clone_htod(&[pair_bytes(&pairs), vec![0xff; 8]].concat()).unwrap();
    let mut call = tensors.swap(&layers, &pairs, method);
    call.from.table = address(&tables[0], stream);
    call.to.table = address(&tables[1], stream);
    call.device_pairs = address(&device_pairs, stream);
    // SAFETY: all addresses are those of live memory that holds what shapes and strides reach.
    unsafe { context.swap_blocks_raw(&call, stream.cu_stream().into()) }
        .map_err(|error| error.to_string())?;
    compare_bytes(&tensors.sides[0].buffers, &sides[0].bytes(stream))?;
    compare_bytes(&tensors.expected_of(&pairs), &sides[1].bytes(stream))
}
