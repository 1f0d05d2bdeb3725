//! A GPU as a machine for the checks that it shares with the interpreter.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use pagewise_attention::cuda::{Context, CopyBlocksCall, MergeStatesCall, Rotary, WriteKvCall, cudarc};

use super::machine::Machine;

pub struct Gpu<'a> {
    context: &'a Context,
    stream: Arc<CudaStream>,
    slices: Vec<(u64, CudaSlice<u8>)>,
}

impl<'a> Gpu<'a> {
    pub fn new(context: &'a Context) -> Self {
        Self { context, stream: context.cudarc().unwrap().default_stream(), slices: Vec::new() }
    }
}

impl Machine for Gpu<'_> {
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

    fn write_kv(&mut self, call: &WriteKvCall<'_>, rotary: Option<&Rotary>) -> Result<String, String> {
        let stream = self.stream.cu_stream().into();
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        let variant = unsafe {
            match rotary {
                None => self.context.write_kv_raw(call, stream),
                Some(rotary) => self.context.write_kv_rotary_raw(call, rotary, stream),
            }
        };
        Ok(variant.map_err(|error| error.to_string())?.name())
    }

    fn launches_dependently(&self) -> bool {
        self.context.device().launches_dependently()
    }

    fn merge_states(&mut self, call: &MergeStatesCall) -> Result<String, String> {
        let stream = self.stream.cu_stream().into();
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        let variant = unsafe { self.context.merge_states_raw(call, stream) };
        Ok(variant.map_err(|error| error.to_string())?.name())
    }

    fn copy_blocks(&mut self, call: &CopyBlocksCall<'_>) -> Result<String, String> {
        let stream = self.stream.cu_stream().into();
        // SAFETY: all addresses are those of live slices that hold what shapes and strides reach.
        let variant = unsafe { self.context.copy_blocks_raw(call, stream) };
        Ok(variant.map_err(|error| error.to_string())?.name())
    }
}
