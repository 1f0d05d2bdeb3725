//! Times of the dense layers' kernels, each beside the bytes it moves: their launches, and norms. Products and what is done
//! with logits have files of their own; whole steps are `step`'s.

mod products;
mod vocab;

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
use pagewise_attention::cuda::ptx::model::NormKind;
use pagewise_attention::cuda::ptx::model::norm::{Norm, NormArgs, NormSpec, Parts};
use pagewise_attention::cuda::ptx::{self, Arg, Kernel, Launch};
use serde_json::{Value, json};

use crate::gpu::Gpu;

/// Bytes of the buffers that everything but the weights is in.
const ROOM: usize = 64 << 20;

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

    /// Everything that `wanted` names.
    pub fn all(&mut self, wanted: impl Fn(&str) -> bool) {
        self.products(&wanted);
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
}
