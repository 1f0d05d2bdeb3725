//! What would leave the engine with requests that nothing can be done for
//! ([`EngineError::Stalled`](pagewise_runtime::engine::EngineError::Stalled)), each way built on purpose.

use crate::support::{cache_config, engine, engine_ahead, engine_config};
use pagewise_kvcache::{CacheConfig, CacheManager, KvCacheManager};
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::request::{Event, Request, RequestId, RequestOutput, SamplingParams, Urgency};
use pagewise_runtime::scheduler::{NewGroup, Preemption, Scheduler, SchedulerConfig};

fn request(prompt: impl Iterator<Item = u32>, max_tokens: usize, params: SamplingParams) -> Request {
    Request::new(prompt.collect(), SamplingParams { max_tokens, ignore_eos: true, ..params })
}

fn outputs(engine: &mut Engine, requests: &[Request]) -> Vec<RequestOutput> {
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

/// The blocks of the one that was swapped out are still cached, so that nothing has to be copied for it to come back; and
/// all others are pinned, by a request of a registered prefix which computed it again and ended. A step with nothing to
/// do is then the one before it is refused.
#[test]
fn whoever_comes_back_without_a_copy_and_finds_no_block_is_refused() {
    let cache = CacheConfig { host_blocks: 8, ..cache_config(1, 10) };
    let config = EngineConfig { max_batch_tokens: 2, preemption: Preemption::Swap, ..engine_config() };
    let (mut engine, log) = engine(config, cache);
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    engine.register_prefix("system", vec![1, 2, 3, 4]).unwrap();
    log.lock().unwrap().fail_in = Some(0);
    assert!(engine.generate(vec![request(9..10, 1, greedy.clone())]).unwrap()[0].is_err());
    assert_eq!(engine.stats().device_blocks.used, 0, "what was pinned is lost");

    let long = engine.add(request(20..24, 20, greedy.clone())).unwrap();
    engine.step().unwrap();
    engine.step().unwrap();
    let urgency = Urgency { priority: -1, deadline: None };
    let named = Request { prefix: Some("system".into()), urgency, ..request(0..0, 1, greedy) };
    let named = engine.add(named).unwrap();
    let mut ended = vec![];
    while engine.has_work() {
        for event in engine.step().unwrap() {
            match event {
                Event::Finished { request, .. } => ended.push((request, None)),
                Event::Failed { request, error } => ended.push((request, error.param)),
                Event::Token { .. } => {}
            }
        }
    }
    assert_eq!(ended, [(named, None), (long, Some("max_tokens"))]);
    let stats = engine.stats();
    assert_eq!((stats.scheduler.swaps, stats.device_blocks.used), (1, 4));
    let log = log.lock().unwrap();
    assert!(log.plans.iter().all(|plan| plan.block_ops.swap_in.is_empty()), "nothing was copied back");
}

/// A prompt of one token whose samples part while it is out: it made room in the step that was planned ahead of the one
/// that they come from. With their first tokens there is something again that they share.
#[test]
fn samples_that_part_outside_of_the_cache_come_back() {
    let mut cache = KvCacheManager::new(cache_config(1, 9)).unwrap();
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 8,
        max_batch_tokens: 16,
        max_model_len: 100,
        max_prompt_logit_rows: 1,
        preemption: Preemption::Recompute,
    });
    for (id, prompt) in [vec![1, 2], vec![3, 4], vec![5, 6], vec![7]].into_iter().enumerate() {
        let width = if id == 3 { 2 } else { 1 };
        let (id, urgency) = (RequestId(id as u64), Urgency::default());
        let new = NewGroup { id, prompt, width, beams: false, prompt_logits: false, urgency };
        scheduler.add(new, &cache).unwrap();
    }
    let first = scheduler.schedule(&mut cache).unwrap();
    assert_eq!(first.chunks.len(), 4);
    scheduler.run_ahead(&first, |_| true);
    let ahead = scheduler.schedule(&mut cache).unwrap();
    assert_eq!(ahead.preempted, [RequestId(3)]);
    cache.confirm_block_ops().unwrap();
    scheduler.commit(&first, &mut cache).unwrap();
    scheduler.branch(RequestId(3), &[0, 0], &mut cache).unwrap();
    scheduler.push_token(RequestId(3), 0, 8);
    scheduler.push_token(RequestId(3), 1, 9);
    cache.confirm_block_ops().unwrap();
    for id in 0..3 {
        scheduler.remove(RequestId(id), &mut cache).unwrap();
    }
    // The prompt is computed once, and then each sample's own token.
    for chunks in [1, 2] {
        let step = scheduler.schedule(&mut cache).unwrap();
        assert_eq!(step.chunks.len(), chunks, "{step:?}");
        assert!(step.plan.chunks.iter().all(|chunk| chunk.tokens.len() == 1));
        cache.confirm_block_ops().unwrap();
        scheduler.commit(&step, &mut cache).unwrap();
    }
}
