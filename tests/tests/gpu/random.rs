//! Random numbers for GPU tests: one seed gives one case, on every machine.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to, not including, `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    #[allow(dead_code, reason = "not every test takes chances")]
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Uniform in [-1, 1).
    #[allow(dead_code, reason = "not every test draws numbers")]
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// The seed of this run: `PAGEWISE_SEED`, or the time.
pub fn run_seed() -> u64 {
    match std::env::var("PAGEWISE_SEED") {
        Ok(seed) => seed.parse().expect("PAGEWISE_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64),
    }
}

/// How many cases of each kind: `PAGEWISE_CASES`, or `default`.
#[allow(dead_code, reason = "not every test has cases")]
pub fn run_cases(default: usize) -> usize {
    std::env::var("PAGEWISE_CASES")
        .map_or(default, |cases| cases.parse().expect("PAGEWISE_CASES is a number"))
}
