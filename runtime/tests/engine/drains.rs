//! What would leave the engine with requests that nothing can be done for
//! ([`EngineError::Stalled`](pagewise_runtime::engine::EngineError::Stalled)), each way built on purpose.

use crate::support::{cache_config, engine, engine_ahead, engine_config};
use pagewise_kvcache::CacheConfig;
use pagewise_runtime::engine::EngineConfig;
use pagewise_runtime::request::{Request, RequestOutput, SamplingParams};
use pagewise_runtime::scheduler::Preemption;

fn request(prompt: impl Iterator<Item = u32>, max_tokens: usize, params: SamplingParams) -> Request {
    Request::new(prompt.collect(), SamplingParams { max_tokens, ignore_eos: true, ..params })
}

fn outputs(engine: &mut pagewise_runtime::engine::Engine, requests: &[Request]) -> Vec<RequestOutput> {
    let results = engine.generate(requests.to_vec()).unwrap();
    results.into_iter().map(|result| result.unwrap()).collect()
}

/// Four requests of a sequence each cross into a new block together, a long one makes room for the group behind them by
/// ending, and that group, which was recomputed once, is swapped out by the next crossing: in the step that was planned
/// while the group's shared tokens were being computed, at whose end its others would have been forked.
#[test]
fn a_group_swapped_out_while_its_shared_tokens_are_computed_comes_back() {
    let sampled = SamplingParams { temperature: 3.0, seed: Some(9), ..SamplingParams::default() };
    let mut requests: Vec<Request> =
        (0..4).map(|first| request(first..first + 7, 20, sampled.clone())).collect();
    requests.push(request(8..20, 4, sampled.clone()));
    requests.push(request(20..28, 12, SamplingParams { n: 2, ..sampled }));

    let (mut roomy, _) = engine(engine_config(), cache_config(4, 200));
    let expected = outputs(&mut roomy, &requests);
    let samples = &expected.last().unwrap().outputs;
    assert_ne!(samples[0].token_ids[0], samples[1].token_ids[0], "they part behind the prompt");

    // The group's four blocks do not fit into the host's three, the two of its prompt do.
    let cache = CacheConfig { host_blocks: 3, prefix_cache: false, ..cache_config(4, 16) };
    let config = EngineConfig { preemption: Preemption::Swap, ..engine_config() };
    let (mut tight, log) = engine_ahead(config, cache);
    assert_eq!(outputs(&mut tight, &requests), expected);

    let log = log.lock().unwrap();
    let stats = tight.stats().scheduler;
    assert!(stats.preemptions > stats.swaps, "recomputed first: {stats:?}");
    let (at, out) =
        log.plans.iter().enumerate().find(|(_, plan)| !plan.block_ops.swap_out.is_empty()).unwrap();
    assert_eq!(out.block_ops.swap_out.len(), 2, "the prompt's blocks: {out:?}");
    let before = log.plans[at - 1].chunks.iter().find(|chunk| chunk.tokens.len() == 8);
    assert!(before.is_some_and(|chunk| chunk.start == 0), "the step before computes the prompt again");
}
