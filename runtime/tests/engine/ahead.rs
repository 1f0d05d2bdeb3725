//! Planning one step ahead: step n + 1 is planned while the CPU computes step n, with placeholders for the tokens that
//! n samples. The tokens are those of the engine, which plans one step after the other.

use crate::real_model::{engine, fixture};
use crate::support::{Numbers, cache_config};
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager};
use pagewise_runtime::backend::AttentionSpec;
use pagewise_runtime::backend::cpu::CpuBackend;
use pagewise_runtime::executor::{Executor, ModelExecutor};
use pagewise_runtime::model_dir::{ModelDir, Weights};
use pagewise_runtime::models::{WeightSource, load_model};
use pagewise_runtime::plan::TokenInput;
use pagewise_runtime::request::{Request, RequestId, SamplingParams, Urgency};
use pagewise_runtime::scheduler::{NewGroup, Preemption, Scheduler, SchedulerConfig};
use std::collections::HashMap;

const TOKENS: usize = 20;
const NAME: &str = "llama_gqa";

fn prompts() -> Vec<Vec<u32>> {
    let mut numbers = Numbers::new(31);
    (0..8).map(|_| (0..numbers.from(1, 24)).map(|_| numbers.below(256) as u32).collect()).collect()
}

fn executor(cache: &CacheConfig) -> ModelExecutor<CpuBackend> {
    let dir = fixture(NAME);
    let config = ModelDir::open(dir.as_ref()).unwrap().config;
    let weights = WeightSource::Files { weights: Weights::open(dir.as_ref()).unwrap(), dtype: None };
    let backend = CpuBackend::new(Some(1)).unwrap();
    let model = load_model(&config, &weights, &backend).unwrap();
    let dtype = pagewise_attention::DType::F32;
    let mut spec = AttentionSpec::new(&config, dtype, cache.block_size, cache.device_blocks);
    spec.host_blocks = cache.host_blocks;
    ModelExecutor::new(backend, model, spec, config.vocab_size).unwrap()
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap() as u32
}

/// The completions of each request, the placeholders that the plans held, and the preemptions.
fn run_ahead(cache: &CacheConfig, preemption: Preemption, width: usize) -> (Vec<Vec<u32>>, usize, u64) {
    let mut executor = executor(cache);
    let mut manager = KvCacheManager::new(cache.clone()).unwrap();
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 16,
        max_batch_tokens: 16,
        max_model_len: 128,
        max_prompt_logit_rows: 1,
        preemption,
    });
    for (id, prompt) in prompts().into_iter().enumerate() {
        let id = RequestId(id as u64);
        let urgency = Urgency::default();
        let new = NewGroup { id, prompt, width, beams: false, prompt_logits: false, urgency };
        scheduler.add(new, &manager).unwrap();
    }
    let mut done: HashMap<(RequestId, usize), Vec<u32>> = HashMap::new();
    let mut generated: HashMap<(RequestId, usize), usize> = HashMap::new();
    let mut placeholders = 0;
    let mut current = scheduler.schedule(&mut manager).unwrap();
    let mut idle = 0;
    while scheduler.has_work() || !current.is_idle() {
        let plan = &current.plan;
        let (output, mut next) = std::thread::scope(|scope| {
            let computing = scope.spawn(|| executor.execute(plan).unwrap());
            scheduler.run_ahead(&current, |_| true);
            let next = scheduler.schedule(&mut manager).unwrap();
            (computing.join().unwrap(), next)
        });
        let inputs = next.plan.chunks.iter().flat_map(|chunk| &chunk.tokens);
        placeholders += inputs.filter(|input| matches!(input, TokenInput::Placeholder(_))).count();
        manager.confirm_block_ops().unwrap();
        scheduler.commit(&current, &mut manager).unwrap();
        manager.audit().unwrap();

        let rows: Vec<u32> = output.logits.chunks(output.vocab_size.max(1)).map(argmax).collect();
        let mut row = 0;
        for (chunk, of) in current.plan.chunks.iter().zip(&current.chunks) {
            row += chunk.logit_rows();
            if !of.next_token || done.contains_key(&(of.request, of.index)) {
                continue;
            }
            let token = rows[row - 1];
            let first = !generated.contains_key(&(of.request, 0));
            if first && width > 1 {
                scheduler.branch(of.request, &vec![0; width], &mut manager).unwrap();
            }
            for index in if first { 0..width } else { of.index..of.index + 1 } {
                scheduler.push_token(of.request, index, token);
                let count = generated.entry((of.request, index)).or_default();
                *count += 1;
                if *count == TOKENS {
                    let ended = scheduler.finish_sequence(of.request, index, &mut manager).unwrap().unwrap();
                    done.insert((of.request, index), ended.completion);
                }
            }
        }
        next.plan.resolve(current.plan.id, |row| rows.get(row).copied());
        idle = if current.is_idle() { idle + 1 } else { 0 };
        assert!(idle < 5, "no progress");
        current = next;
    }
    manager.confirm_block_ops().unwrap();
    manager.audit().unwrap();
    let usage = (manager.device_usage(), manager.host_usage());
    assert_eq!((usage.0.used, usage.0.pending, usage.1.used, usage.1.pending), (0, 0, 0, 0));
    let completions = (0..8).flat_map(|id| (0..width).map(move |index| (RequestId(id), index)));
    (completions.map(|key| done[&key].clone()).collect(), placeholders, scheduler.stats().preemptions)
}

#[test]
fn one_step_ahead_gives_the_same_tokens() {
    let params = SamplingParams {
        max_tokens: TOKENS,
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let requests = prompts().into_iter().map(|prompt| Request::new(prompt, params.clone())).collect();
    let outputs = engine(NAME, |_| {}).generate(requests).unwrap();
    let expected: Vec<Vec<u32>> =
        outputs.into_iter().map(|output| output.unwrap().outputs[0].token_ids.clone()).collect();
    for width in [1, 2] {
        let each: Vec<Vec<u32>> = expected.iter().flat_map(|tokens| vec![tokens.clone(); width]).collect();
        for (blocks, host_blocks, preemption) in
            [(400, 0, Preemption::Recompute), (30, 0, Preemption::Recompute), (30, 200, Preemption::Swap)]
        {
            for prefix_cache in [false, true] {
                let cache = CacheConfig { host_blocks, prefix_cache, ..cache_config(4, blocks) };
                let (found, placeholders, preemptions) = run_ahead(&cache, preemption, width);
                assert_eq!(found, each, "{cache:?}, {preemption:?}, width {width}");
                assert!(placeholders > 100, "{placeholders} placeholders");
                assert_eq!(preemptions > 0, blocks < 400, "{cache:?}, width {width}");
            }
        }
    }
}
