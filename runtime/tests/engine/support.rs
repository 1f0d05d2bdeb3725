//! A model that is a hash of the whole context, computed from what the cache really holds: a wrong block
//! table, copy, fork or preemption gives wrong tokens.

use crate::audited::Audited;
use pagewise_kvcache::{BlockId, CacheConfig, KvCacheManager, KvGroup, NO_BLOCK};
use pagewise_runtime::engine::{Detokenize, DetokenizerFactory, Engine, EngineConfig};
use pagewise_runtime::executor::{
    CandidatesOutput, Executor, ExecutorError, LogitChanges, RowOutput, RowWanted, StepOutput, TokenOutput,
    TokenWanted,
};
use pagewise_runtime::plan::{LogitRows, StepPlan, TokenInput};
use pagewise_runtime::request::SamplingParams;
use pagewise_runtime::sampling::beam::Candidate;
use pagewise_runtime::sampling::{Draw, LogSoftmax, Sampler, TokenCounts};
use pagewise_runtime::scheduler::Preemption;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

pub(crate) const VOCAB: usize = 32;
const POISON: u32 = u32::MAX;

/// Numbers for test cases.
pub(crate) struct Numbers {
    seed: u64,
    position: u64,
}

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.position += 1;
        (Draw { seed: self.seed, sample: 77, position: self.position }.uniform() * n as f64) as usize
    }

    pub(crate) fn from(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// The model: logits of the token after this context.
pub(crate) fn hash_logits(context: &[u32]) -> Vec<f32> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for &token in context {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x0000_0100_0000_01b3);
        hash ^= hash >> 29;
    }
    (0..VOCAB as u32)
        .map(|id| (Draw { seed: hash, sample: id, position: 0 }.uniform() * 8.0) as f32)
        .collect()
}

/// What an executor was asked to do, for the test to look at.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) plans: Vec<StepPlan>,
    /// Fail the step of this many executions from now.
    pub(crate) fail_in: Option<usize>,
    /// Answer with NaN for contexts that end in this token.
    pub(crate) nan_after: Option<u32>,
    /// Tokens that came as placeholders.
    pub(crate) placeholders: u64,
    /// Rows that the executor answered itself, by kind: tokens, of these with changed logits, of these with
    /// log-probabilities; prompt tokens; beams.
    pub(crate) answered: [u64; 5],
}

impl Log {
    fn note(&mut self, wanted: &RowWanted) {
        let [tokens, changed, logprobs, prompt, beams] = &mut self.answered;
        match wanted {
            RowWanted::Logits | RowWanted::Nothing => {}
            RowWanted::Token(token) => {
                *tokens += 1;
                *changed += u64::from(!token.changes.is_empty());
                *logprobs += u64::from(token.logprobs.is_some());
            }
            RowWanted::Logprobs { .. } => *prompt += 1,
            RowWanted::Candidates(_) => *beams += 1,
        }
    }
}

/// Bias and penalties on a row, written down once more.
fn changed(row: &[f32], changes: &LogitChanges) -> Vec<f32> {
    let mut row = row.to_vec();
    for change in &changes.tokens {
        let mut x = row[change.token_id as usize] + change.bias;
        if let Some(times) = change.held {
            let factor = changes.repetition_penalty;
            x = if x > 0.0 { x / factor } else { x * factor };
            if times > 0 {
                x -= changes.frequency_penalty * times as f32 + changes.presence_penalty;
            }
        }
        row[change.token_id as usize] = x;
    }
    row
}

/// The answer of a device that knows every way.
fn answer(row: &[f32], wanted: &RowWanted) -> RowOutput {
    let counts = TokenCounts::default();
    let mut sampler = Sampler::default();
    match wanted {
        RowWanted::Logits => unreachable!(),
        RowWanted::Nothing => RowOutput::Nothing,
        RowWanted::Token(TokenWanted { sampling, changes, logprobs }) => {
            let params = SamplingParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                ..SamplingParams::default()
            };
            let token = sampler.sample(&changed(row, changes), &params, &counts, sampling.draw).ok();
            RowOutput::Token(token.map(|token_id| {
                let logprobs = logprobs.map(|top| sampler.logprobs(row, token_id, top));
                TokenOutput { token_id, logprobs }
            }))
        }
        RowWanted::Logprobs { token_id, top } => RowOutput::Logprobs(sampler.logprobs(row, *token_id, *top)),
        RowWanted::Candidates(wanted) => {
            let softmax = LogSoftmax::new(row);
            let logprobs: Vec<f32> = (0..row.len() as u32).map(|id| softmax.logprob(id)).collect();
            let logprobs = changed(&logprobs, &wanted.changes);
            // The logarithm of a softmax is its own.
            let mut ids: Vec<u32> =
                (0..row.len() as u32).filter(|&id| logprobs[id as usize] > f32::MIN).collect();
            ids.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]).then(a.cmp(&b)));
            ids.truncate(wanted.count);
            let candidate = |&token_id: &u32| {
                let logprob = f64::from(logprobs[token_id as usize]);
                Candidate { token_id, logprob }
            };
            let candidates: Vec<_> = ids.iter().map(candidate).collect();
            let asked = wanted.logprobs;
            let own = asked.map_or(vec![], |_| ids.iter().map(|&id| softmax.logprob(id)).collect());
            let top = asked.map_or(vec![], |top| sampler.logprobs(row, 0, top).top);
            RowOutput::Candidates((!ids.is_empty()).then_some(CandidatesOutput { candidates, own, top }))
        }
    }
}

pub(crate) struct HashExecutor {
    block_size: usize,
    windows: Vec<Option<usize>>,
    device: Vec<u32>,
    host: Vec<u32>,
    log: Arc<Mutex<Log>>,
    /// Chooses tokens itself, and takes a step before it has given out the one before.
    runs_ahead: bool,
    begun: VecDeque<StepOutput>,
    /// The last step's tokens.
    chosen: (u64, Vec<Option<u32>>),
}

impl HashExecutor {
    pub(crate) fn new(config: &CacheConfig, log: Arc<Mutex<Log>>) -> Self {
        Self {
            block_size: config.block_size,
            windows: config.groups.iter().map(|group| group.window).collect(),
            device: vec![POISON; config.device_blocks * config.block_size],
            host: vec![POISON; config.host_blocks * config.block_size],
            log,
            runs_ahead: false,
            begun: VecDeque::new(),
            chosen: (0, Vec::new()),
        }
    }

    pub(crate) fn that_runs_ahead(config: &CacheConfig, log: Arc<Mutex<Log>>) -> Self {
        Self { runs_ahead: true, ..Self::new(config, log) }
    }

    /// What is wanted of the rows.
    fn choose(&mut self, step: u64, logits: &[f32], wanted: &[RowWanted], log: &mut Log) -> StepOutput {
        let mut output = StepOutput { vocab_size: VOCAB, ..StepOutput::default() };
        self.chosen = (step, Vec::new());
        for (row, logits) in logits.chunks(VOCAB).enumerate() {
            let wanted = wanted.get(row).unwrap_or(&RowWanted::Logits);
            let answer = if *wanted == RowWanted::Logits {
                output.logits.extend(logits);
                RowOutput::Logits(output.logits.len() / VOCAB - 1)
            } else {
                log.note(wanted);
                answer(logits, wanted)
            };
            let token = if let RowOutput::Token(Some(token)) = &answer { Some(token.token_id) } else { None };
            self.chosen.1.push(token);
            output.rows.push(answer);
        }
        output
    }

    fn blocks(&self, block: BlockId) -> std::ops::Range<usize> {
        let start = block as usize * self.block_size;
        start..start + self.block_size
    }
}

impl Executor for HashExecutor {
    fn answers(&self, wanted: &RowWanted) -> bool {
        self.runs_ahead || *wanted == RowWanted::Logits
    }

    fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.begun.pop_front().ok_or(ExecutorError::NothingBegun)
    }

    fn begin(&mut self, plan: &StepPlan, wanted: &[RowWanted]) -> Result<(), ExecutorError> {
        assert!(self.begun.len() <= usize::from(self.runs_ahead), "two steps ahead");
        let log = self.log.clone();
        let mut log = log.lock().unwrap();
        log.plans.push(plan.clone());
        if let Some(left) = &mut log.fail_in {
            if *left == 0 {
                log.fail_in = None;
                self.device.fill(POISON);
                self.begun.clear();
                return Err(ExecutorError::Plan { step: plan.id, problem: "injected".into() });
            }
            *left -= 1;
        }
        for op in &plan.block_ops.swap_out {
            let (from, to) = (self.blocks(op.src), self.blocks(op.dst));
            self.host[to].copy_from_slice(&self.device[from]);
        }
        for op in &plan.block_ops.swap_in {
            let (from, to) = (self.blocks(op.src), self.blocks(op.dst));
            self.device[to].copy_from_slice(&self.host[from]);
        }
        for op in &plan.block_ops.copy {
            let (from, to) = (self.blocks(op.src), self.blocks(op.dst));
            self.device.copy_within(from, to.start);
        }
        for chunk in &plan.chunks {
            assert!(!chunk.tokens.is_empty() && chunk.block_tables.len() == self.windows.len());
            for table in &chunk.block_tables {
                for (offset, token) in chunk.tokens.iter().enumerate() {
                    let token = match *token {
                        TokenInput::Known(token) => token,
                        TokenInput::Placeholder(place) => {
                            assert_eq!((place.step, self.runs_ahead), (self.chosen.0, true));
                            log.placeholders += 1;
                            // Where no token could be chosen the sequence ends, whatever comes of this.
                            self.chosen.1[place.row].unwrap_or(0)
                        }
                    };
                    let position = chunk.start + offset;
                    let block = table[position / self.block_size];
                    if block != NO_BLOCK {
                        self.device[block as usize * self.block_size + position % self.block_size] = token;
                    }
                }
            }
        }
        let mut logits = Vec::new();
        for chunk in &plan.chunks {
            let end = chunk.start + chunk.tokens.len();
            let mut context = Vec::new();
            for position in 0..end {
                let mut seen: Vec<u32> = Vec::new();
                for (table, window) in chunk.block_tables.iter().zip(&self.windows) {
                    let visible = window.is_none_or(|window| position + window >= end);
                    if visible {
                        let block = table[position / self.block_size];
                        seen.push(self.device[block as usize * self.block_size + position % self.block_size]);
                    }
                }
                assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "groups disagree");
                context.push(seen[0]);
            }
            assert!(!context.contains(&POISON), "a slot was read that nobody wrote");
            let rows = match chunk.logits {
                LogitRows::None => end..end,
                LogitRows::Last => end - 1..end,
                LogitRows::All => chunk.start..end,
            };
            for row in rows {
                if log.nan_after == Some(context[row]) {
                    logits.extend([f32::NAN; VOCAB]);
                } else {
                    logits.extend(hash_logits(&context[..=row]));
                }
            }
        }
        let output = self.choose(plan.id, &logits, wanted, &mut log);
        self.begun.push_back(output);
        Ok(())
    }
}

pub(crate) fn cache_config(block_size: usize, device_blocks: usize) -> CacheConfig {
    CacheConfig {
        block_size,
        device_blocks,
        host_blocks: 0,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: true,
    }
}

pub(crate) fn engine_config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 64,
        max_batch_tokens: 512,
        max_model_len: 4096,
        vocab_size: VOCAB,
        eos_token_ids: vec![0],
        preemption: Preemption::Auto,
    }
}

pub(crate) fn engine(config: EngineConfig, cache: CacheConfig) -> (Engine, Arc<Mutex<Log>>) {
    engine_on(HashExecutor::new, config, cache)
}

/// An engine whose executor chooses the tokens itself, a step ahead.
pub(crate) fn engine_ahead(config: EngineConfig, cache: CacheConfig) -> (Engine, Arc<Mutex<Log>>) {
    engine_on(HashExecutor::that_runs_ahead, config, cache)
}

fn engine_on(
    make: impl FnOnce(&CacheConfig, Arc<Mutex<Log>>) -> HashExecutor,
    config: EngineConfig,
    cache: CacheConfig,
) -> (Engine, Arc<Mutex<Log>>) {
    let log = Arc::new(Mutex::new(Log::default()));
    let executor = make(&cache, log.clone());
    let manager = Audited(KvCacheManager::new(cache).unwrap());
    (Engine::with_detokenizer(config, Box::new(manager), Box::new(executor), Some(letters())), log)
}

/// Token `i` is the letter `i` of an alphabet with some wide characters, and multiples of 8 come in halves:
/// their text appears with the token after them.
struct Letters(String);

pub(crate) fn letter(token: u32) -> char {
    "abcdefghijklmnopqrstuvwxyzäöüéß🙂".chars().nth(token as usize).unwrap()
}

pub(crate) fn letters() -> DetokenizerFactory {
    Box::new(|| Box::new(Letters(String::new())))
}

impl Detokenize for Letters {
    fn push(&mut self, token_id: u32) -> String {
        self.0.push(letter(token_id));
        if token_id.is_multiple_of(8) { String::new() } else { std::mem::take(&mut self.0) }
    }
    fn finish(&mut self) -> String {
        std::mem::take(&mut self.0)
    }
}

/// The text of these tokens, all at once.
pub(crate) fn text_of(tokens: &[u32]) -> String {
    tokens.iter().map(|&token| letter(token)).collect()
}

/// Texts of events joined, by completion.
pub(crate) type Streams = HashMap<(u64, usize), (Vec<u32>, String)>;
