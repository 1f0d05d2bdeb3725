//! The GPU under measurement: memory with known contents, and the time of a graph.

use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode, cuLaunchKernel};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, result};
use cudarc::nvrtc::Ptx;
use pagewise_attention::DType;
use pagewise_attention::cuda::{Context, RawStream, cudarc};

/// Bytes that a run of one shape cycles through, ten times an L2.
pub const ROTATION: usize = 512 << 20;

/// Elements whose repetition fills the caches: known on the host, so that results can be checked.
const PATTERN: usize = (4 << 20) + 128 * 37;

/// The pattern in one type, on both sides.
struct Pattern {
    dtype: DType,
    values: Vec<f32>,
    device: CudaSlice<u8>,
}

impl Pattern {
    fn new(stream: &Arc<CudaStream>, dtype: DType) -> Self {
        let mut random = Random(7);
        let (values, bytes): (Vec<f32>, Vec<u8>) = match dtype {
            DType::F8E4M3 => {
                // Any sign and mantissa, exponents of numbers below 2.
                let bytes: Vec<u8> = (0..PATTERN).map(|_| random.next() as u8 & 0xbf).collect();
                (bytes.iter().map(|&byte| e4m3(byte)).collect(), bytes)
            }
            _ => {
                let numbers: Vec<half::bf16> =
                    (0..PATTERN).map(|_| half::bf16::from_f64(random.unit())).collect();
                let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                (numbers.iter().map(|number| number.to_f32()).collect(), bytes)
            }
        };
        Self { dtype, values, device: stream.clone_htod(&bytes).unwrap() }
    }
}

/// The value of an fp8 number with 4 exponent bits (bias 7) and 3 of mantissa.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = if exponent == 0 { mantissa / 512.0 } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) };
    if byte & 0x80 == 0 { size } else { -size }
}

pub struct Gpu<'a> {
    pub context: &'a Context,
    pub engine: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    patterns: [Pattern; 2],
}

impl<'a> Gpu<'a> {
    pub fn new(context: &'a Context) -> Self {
        let engine = Arc::clone(context.cudarc().unwrap());
        // SAFETY: one stream only.
        unsafe { engine.disable_event_tracking() };
        let stream = engine.new_stream().unwrap();
        let patterns = [DType::Bf16, DType::F8E4M3].map(|dtype| Pattern::new(&stream, dtype));
        Self { context, engine, stream, patterns }
    }

    fn pattern(&self, dtype: DType) -> &Pattern {
        self.patterns.iter().find(|pattern| pattern.dtype == dtype).expect("a type with a pattern")
    }

    pub fn raw_stream(&self) -> RawStream {
        self.stream.cu_stream().into()
    }

    pub fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    /// So many elements, element `i` being that of the pattern at `i` modulo its length.
    pub fn filled(&self, dtype: DType, elements: usize) -> CudaSlice<u8> {
        let (size, pattern) = (dtype.size(), self.pattern(dtype));
        // One plain allocation, as engines make for a cache: memory from the driver's stream-ordered pool may lie in
        // other pages, which matters to the TLB.
        // SAFETY: the pointer is new and as long as said; every element is written below.
        let mut slice = unsafe {
            let pointer = result::malloc_sync(elements * size).unwrap();
            self.stream.upgrade_device_ptr::<u8>(pointer, elements * size)
        };
        let mut from = 0;
        while from < elements {
            let len = PATTERN.min(elements - from);
            let mut target = slice.slice_mut(from * size..(from + len) * size);
            self.stream.memcpy_dtod(&pattern.device.slice(..len * size), &mut target).unwrap();
            from += len;
        }
        slice
    }

    /// The same element on the host.
    pub fn element(&self, dtype: DType, index: usize) -> f64 {
        f64::from(self.pattern(dtype).values[index % PATTERN])
    }

    /// A kernel that does nothing.
    pub fn bare_kernel(&self, params: usize) -> BareKernel<'_> {
        let list: Vec<String> = (0..params).map(|i| format!(".param .u64 p{i}")).collect();
        let text = format!(
            ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry bare({}) {{ ret; }}\n",
            list.join(", ")
        );
        let module = self.engine.load_module(Ptx::from_src(text)).unwrap();
        let function = module.load_function("bare").unwrap();
        BareKernel { function, stream: &self.stream, params: vec![0; params] }
    }

    /// Microseconds of one launch: `launch(i)` for i in 0..launches is captured, replayed for 20 ms to
    /// warm up, since an idle GPU clocks down, and then timed; the median of nine replays.
    pub fn time(&self, launches: usize, mut launch: impl FnMut(usize)) -> f64 {
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        (0..launches).for_each(&mut launch);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).unwrap().unwrap();
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
        let replay = || {
            let start = event();
            graph.launch().unwrap();
            let end = event();
            f64::from(start.elapsed_ms(&end).unwrap())
        };
        let mut warm = 0.0;
        while warm < 20.0 {
            warm += replay().max(0.01);
        }
        let mut times: Vec<f64> = (0..9).map(|_| replay() * 1e3 / launches as f64).collect();
        times.sort_by(f64::total_cmp);
        times[4]
    }
}

/// A kernel that does nothing, with as many parameters as asked for.
pub struct BareKernel<'a> {
    function: CudaFunction,
    stream: &'a CudaStream,
    params: Vec<u64>,
}

impl BareKernel<'_> {
    /// Straight to the driver.
    pub fn launch(&self) {
        let mut pointers = [std::ptr::null_mut::<std::ffi::c_void>(); 64];
        for (pointer, value) in pointers.iter_mut().zip(&self.params) {
            *pointer = std::ptr::from_ref(value).cast_mut().cast();
        }
        let (function, stream) = (self.function.cu_function(), self.stream.cu_stream());
        let none = std::ptr::null_mut();
        // SAFETY: the kernel takes as many 64-bit parameters as there are, and does nothing with them.
        let result =
            unsafe { cuLaunchKernel(function, 8, 1, 1, 256, 1, 1, 0, stream, pointers.as_mut_ptr(), none) };
        assert_eq!(result, cudarc::driver::sys::CUresult::CUDA_SUCCESS);
    }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// The numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<i32> {
        let mut list: Vec<i32> = (0..count as i32).collect();
        for index in (1..count).rev() {
            list.swap(index, (self.next() % (index as u64 + 1)) as usize);
        }
        list
    }
}
