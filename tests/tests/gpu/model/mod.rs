//! Random cases of the dense layers' kernels and the plain f64 code that says what must come out.
//!
//! A case is a variant and a seed: `PAGEWISE_MODEL_CASE="matvec_bf16_direct_plain_v8 1234"` runs one alone.

mod choice;
mod elementwise;
mod logits;
mod matvec;
mod norm;
mod tensor;

use pagewise_attention::cuda::ptx::{Arg, Kernel, Launch};

use super::random::Random;

/// The kernels that have cases here.
pub const FAMILIES: [&str; 14] = [
    "activate",
    "add",
    "argmax",
    "carry_tokens",
    "embed",
    "fill_weights",
    "gather_rows",
    "log_softmax",
    "matvec",
    "norm",
    "penalize",
    "sample",
    "scale",
    "top_candidates",
];

/// What runs kernels: a GPU, or the interpreter.
pub trait Device {
    /// Copies bytes to the device.
    fn upload(&mut self, bytes: &[u8]) -> u64;
    /// What is there now.
    fn download(&self, address: u64) -> Vec<u8>;
    /// Frees everything.
    fn clear(&mut self);
    /// Bytes of shared memory that a thread block can have.
    fn shared_memory(&self) -> u32;
    /// Whether it can run a kernel.
    fn can_run(&self, kernel: &Kernel) -> bool;
    /// Runs a kernel.
    fn run(&mut self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<(), String>;
}

/// How a run of all cases is made.
pub struct Run<'a> {
    pub device: &'a mut dyn Device,
    /// Cases of each variant.
    pub cases: usize,
    pub seed: u64,
    /// Whether to keep shapes small, for the interpreter and the sanitizers.
    pub small: bool,
    /// Called with each case that passed, and its error.
    pub passed: &'a mut dyn FnMut(&Kernel, f64),
}

impl Run<'_> {
    /// Every variant of every kernel.
    pub fn all(mut self) {
        elementwise::run(&mut self);
        norm::run(&mut self);
        matvec::run(&mut self);
        logits::run(&mut self);
        choice::run(&mut self);
    }

    /// The cases of one variant, or the one that is asked for. `check` gives the error of a case.
    fn variant(
        &mut self,
        kernel: &Kernel,
        mut check: impl FnMut(&mut dyn Device, &mut Random) -> Result<f64, String>,
    ) {
        if !self.device.can_run(kernel) {
            return;
        }
        let entry = kernel.entry();
        let seeds: Vec<u64> = match std::env::var("PAGEWISE_MODEL_CASE") {
            Ok(wanted) => match wanted.split_once(' ') {
                Some((name, seed)) if name == entry => vec![seed.parse().expect("a seed")],
                Some(_) => return,
                None => panic!("PAGEWISE_MODEL_CASE is a variant and a seed, not {wanted:?}"),
            },
            Err(_) => {
                // Every variant has its own numbers.
                let mut random = entry.bytes().fold(Random::new(self.seed), |mut random, byte| {
                    Random::new(random.next() ^ u64::from(byte))
                });
                (0..self.cases).map(|_| random.next()).collect()
            }
        };
        for seed in seeds {
            self.device.clear();
            match check(self.device, &mut Random::new(seed)) {
                Ok(error) => (self.passed)(kernel, error),
                Err(error) => panic!("PAGEWISE_MODEL_CASE=\"{entry} {seed}\": {error}"),
            }
        }
    }
}
