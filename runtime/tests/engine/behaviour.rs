//! What the engine does with a request, one behaviour a test.

use crate::support::{
    HashExecutor, Log, VOCAB, cache_config, engine, engine_ahead, engine_config, hash_logits, letter, text_of,
};
use pagewise_kvcache::{CacheConfig, KvCacheManager};
use pagewise_runtime::engine::{Engine, EngineConfig};
use pagewise_runtime::executor::{Executor, ExecutorError, RowWanted, StepOutput};
use pagewise_runtime::plan::StepPlan;
use pagewise_runtime::request::{
    Completion, Event, FinishReason, PositionLogprobs, Request, RequestOutput, SamplingParams,
};
use pagewise_runtime::scheduler::Preemption;
use std::sync::{Arc, Mutex};

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, temperature: 0.0, ignore_eos: true, ..Default::default() }
}

fn roomy() -> CacheConfig {
    cache_config(4, 500)
}

fn one(params: SamplingParams, prompt: &[u32]) -> RequestOutput {
    let (mut engine, _) = engine(engine_config(), roomy());
    engine.generate(vec![Request::new(prompt.to_vec(), params)]).unwrap().remove(0).unwrap()
}

/// Greedy decoding written down once more, without any engine.
fn plain_greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = hash_logits(&tokens);
        let best = (0..VOCAB).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

fn run(engine: &mut Engine) -> Vec<Event> {
    let mut events = Vec::new();
    while engine.has_work() {
        events.extend(engine.step().unwrap());
    }
    events
}

#[test]
fn greedy_is_what_a_plain_loop_gives() {
    for first in 0..20 {
        let prompt = [first, 7, 3];
        let output = one(greedy(25), &prompt);
        let Completion { token_ids, finish_reason, text, .. } = &output.outputs[0];
        assert_eq!(*token_ids, plain_greedy(&prompt, 25));
        assert_eq!(*finish_reason, FinishReason::Length);
        assert_eq!(text.as_deref(), Some(&*text_of(token_ids)));
        assert_eq!(output.usage.prompt_tokens, 3);
        assert_eq!(output.usage.completion_tokens, 25);
    }
}

#[test]
fn an_end_token_ends_and_is_not_text() {
    let prompt = [5, 6];
    let free = plain_greedy(&prompt, 40);
    let end = free[10];
    let until = free.iter().position(|&token| token == end).unwrap() + 1;
    for by_id in [false, true] {
        let config =
            EngineConfig { eos_token_ids: if by_id { vec![] } else { vec![3, end] }, ..engine_config() };
        // 3 may not come before.
        assert!(!free[..until - 1].contains(&3));
        let params = SamplingParams {
            ignore_eos: false,
            stop_token_ids: if by_id { vec![end] } else { vec![] },
            ..greedy(40)
        };
        let (mut engine, _) = engine(config.clone(), roomy());
        let request = Request::new(prompt.to_vec(), params.clone());
        let output = engine.generate(vec![request]).unwrap().remove(0).unwrap();
        assert_eq!(output.outputs[0].finish_reason, FinishReason::Stop);
        assert_eq!(output.outputs[0].token_ids, free[..until]);
        assert_eq!(output.outputs[0].text.as_deref(), Some(&*text_of(&free[..until - 1])));
        if !by_id {
            let params = SamplingParams { ignore_eos: true, ..params };
            let output =
                engine.generate(vec![Request::new(prompt.to_vec(), params)]).unwrap().remove(0).unwrap();
            assert_eq!(output.outputs[0].token_ids, free);
        }
    }
}

#[test]
fn a_stop_string_is_found_across_tokens_and_never_shown() {
    let prompt = [9, 1];
    let free = plain_greedy(&prompt, 30);
    for length in 1..=4 {
        let stop = text_of(&free[12..12 + length]);
        let text = text_of(&free);
        let (mut engine, _) = engine(engine_config(), roomy());
        let params =
            SamplingParams { stop: vec!["never".into(), stop.clone()], logprobs: Some(1), ..greedy(30) };
        let id = engine.add(Request::new(prompt.to_vec(), params)).unwrap();
        let mut shown = String::new();
        for event in run(&mut engine) {
            match event {
                Event::Token { text, .. } => {
                    shown.push_str(&text);
                    assert!(!shown.contains(&stop));
                }
                Event::Finished { request, output } => {
                    assert_eq!(request, id);
                    let done = &output.outputs[0];
                    assert_eq!(done.finish_reason, FinishReason::Stop);
                    assert_eq!(done.text.as_deref(), Some(&text[..text.find(&stop).unwrap()]));
                    assert_eq!(done.text.as_deref(), Some(&*shown));
                    // The tokens go on to the one that completes the stop string; a wide one may need one more.
                    assert!(text_of(&done.token_ids).contains(&stop));
                    assert_eq!(done.logprobs.as_ref().unwrap().len(), done.token_ids.len());
                }
                Event::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
}

#[test]
fn text_held_for_a_stop_string_comes_when_the_end_does() {
    let prompt = [2, 2];
    let free = plain_greedy(&prompt, 10);
    let stop = format!("{}!", text_of(&free[8..10]));
    let output = one(SamplingParams { stop: vec![stop], ..greedy(10) }, &prompt);
    assert_eq!(output.outputs[0].text.as_deref(), Some(&*text_of(&free)));
}

#[test]
fn the_context_ends_a_completion() {
    let config = EngineConfig { max_model_len: 20, ..engine_config() };
    let (mut engine, _) = engine(config, roomy());
    let request = |length: usize| Request::new(vec![1; length], greedy(1000));
    for length in [1, 10, 19] {
        let output = engine.generate(vec![request(length)]).unwrap().remove(0).unwrap();
        assert_eq!(output.outputs[0].token_ids.len(), 20 - length);
        assert_eq!(output.outputs[0].finish_reason, FinishReason::Length);
    }
    let error = engine.add(request(20)).unwrap_err();
    assert_eq!(error.param, Some("prompt"));
    assert!(error.message.contains("20 tokens") && error.message.contains("--max-model-len"), "{error}");
}

/// Against log-softmax in f64.
fn assert_logprobs(found: &PositionLogprobs, context: &[u32], token: u32, top: usize) {
    let logits: Vec<f64> = hash_logits(context).into_iter().map(f64::from).collect();
    let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
    // One rounding to f32 of numbers below 16, and the noise of f64.
    let close = |logprob: f32, id: u32| (f64::from(logprob) - (logits[id as usize] - lse)).abs() < 1e-6;
    assert_eq!(found.token.token_id, token);
    assert!(close(found.token.logprob, token));
    let mut order: Vec<u32> = (0..VOCAB as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let ids: Vec<u32> = found.top.iter().map(|t| t.token_id).collect();
    assert_eq!(ids, order[..top]);
    assert!(found.top.iter().all(|t| close(t.logprob, t.token_id)));
}

#[test]
fn logprobs_are_the_models_own() {
    // Whatever bends the choice does not bend them.
    let params = SamplingParams {
        logprobs: Some(3),
        temperature: 2.0,
        top_k: 4,
        repetition_penalty: 1.5,
        logit_bias: vec![(3, 4.0)],
        seed: Some(1),
        ..greedy(20)
    };
    let prompt = [4, 8, 15];
    let output = one(params, &prompt);
    let mut context = prompt.to_vec();
    let entries = output.outputs[0].logprobs.as_ref().unwrap();
    assert_eq!(entries.len(), 20);
    for (entry, &token) in entries.iter().zip(&output.outputs[0].token_ids) {
        assert_logprobs(entry, &context, token, 3);
        context.push(token);
    }
}

#[test]
fn prompt_logprobs_cover_the_prompt_even_where_it_is_cached() {
    let prompt: Vec<u32> = (0..30).map(|i| (i * 7 + 3) % VOCAB as u32).collect();
    for budget in [1, 7, 512] {
        let (mut engine, _) = engine(EngineConfig { max_batch_tokens: budget, ..engine_config() }, roomy());
        let request =
            |top| Request::new(prompt.clone(), SamplingParams { prompt_logprobs: top, ..greedy(2) });
        assert_eq!(engine.generate(vec![request(None)]).unwrap()[0].as_ref().unwrap().usage.cached_tokens, 0);
        let output = engine.generate(vec![request(Some(2))]).unwrap().remove(0).unwrap();
        assert_eq!(output.usage.cached_tokens, 0, "every position is computed");
        let entries = output.prompt_logprobs.unwrap();
        assert_eq!(entries.len(), prompt.len());
        assert_eq!(entries[0], None);
        for position in 1..prompt.len() {
            assert_logprobs(entries[position].as_ref().unwrap(), &prompt[..position], prompt[position], 2);
        }
        // Without them the cached blocks are used.
        let output = engine.generate(vec![request(None)]).unwrap().remove(0).unwrap();
        assert_eq!((output.usage.cached_tokens, output.prompt_logprobs), (28, None));
    }
    let single = one(SamplingParams { prompt_logprobs: Some(1), ..greedy(1) }, &[3]);
    assert_eq!(single.prompt_logprobs, Some(vec![None]));
}

#[test]
fn samples_share_the_prompt_and_are_those_of_their_seed() {
    let params = SamplingParams { n: 4, seed: Some(11), temperature: 1.0, ..greedy(12) };
    let prompt: Vec<u32> = (0..18).collect();
    let together = one(params.clone(), &prompt);
    assert_eq!(together, one(params.clone(), &prompt));
    assert_eq!(together.outputs.len(), 4);
    assert_eq!(together.usage.completion_tokens, 48);
    for (a, b) in [(0, 1), (1, 2), (2, 3), (0, 3)] {
        assert_ne!(together.outputs[a].token_ids, together.outputs[b].token_ids);
    }
    // The first sample is what n = 1 gives.
    let single = one(SamplingParams { n: 1, ..params.clone() }, &prompt);
    assert_eq!(single.outputs[0], together.outputs[0]);
    assert_ne!(one(SamplingParams { seed: Some(12), ..params.clone() }, &prompt).outputs, together.outputs);

    // 18 tokens are four full blocks of 4, held once, and a partial one that is copied for all but one.
    let (mut engine, log) = engine(engine_config(), roomy());
    engine.add(Request::new(prompt, params)).unwrap();
    engine.step().unwrap();
    engine.step().unwrap();
    assert_eq!(engine.stats().device_blocks.used, 4 + 4);
    assert_eq!(log.lock().unwrap().plans[1].block_ops.copy.len(), 3);
    run(&mut engine);
    assert_eq!(engine.stats().device_blocks.used, 0);
}

#[test]
fn best_of_returns_the_likeliest() {
    let params = SamplingParams { seed: Some(5), temperature: 1.5, logprobs: Some(0), ..greedy(6) };
    let all = one(SamplingParams { n: 8, ..params.clone() }, &[1, 2]);
    let best = SamplingParams { n: 3, best_of: Some(8), ..params };
    let (mut engine, _) = engine(engine_config(), roomy());
    engine.add(Request::new(vec![1, 2], best)).unwrap();
    let events = run(&mut engine);
    let [Event::Finished { output, .. }] = events.as_slice() else {
        panic!("nothing is streamed: {events:?}")
    };
    let sum = |c: &Completion| c.logprobs.iter().flatten().map(|e| f64::from(e.token.logprob)).sum::<f64>();
    let mut expected = all.outputs.clone();
    expected.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
    assert_eq!(output.outputs, expected[..3]);
    assert_eq!(output.usage.completion_tokens, 48, "all that was generated counts");
}

#[test]
fn without_a_seed_every_request_draws_its_own() {
    let params = SamplingParams { temperature: 3.0, ..greedy(30) };
    assert_ne!(one(params.clone(), &[1]).outputs, one(params, &[1]).outputs);
}

#[test]
fn bad_requests_are_refused_by_name_and_the_others_finish() {
    let (mut engine, _) = engine(EngineConfig { max_num_seqs: 4, ..engine_config() }, cache_config(4, 10));
    let with = |params| Request::new(vec![1], params);
    let cases: Vec<(&str, Request)> = vec![
        ("prompt", Request::new(vec![], greedy(1))),
        ("prompt_token_ids", Request::new(vec![1, VOCAB as u32], greedy(1))),
        ("prompt", Request::new(vec![1; 5000], greedy(1))),
        ("prompt", Request::new(vec![1; 40], greedy(1))),
        ("n", with(SamplingParams { n: 5, ..greedy(1) })),
        ("best_of", with(SamplingParams { best_of: Some(5), ..greedy(1) })),
        ("beam_width", with(SamplingParams { beam_width: Some(5), ..greedy(1) })),
        ("temperature", with(SamplingParams { temperature: f32::NAN, ..greedy(1) })),
    ];
    let mut requests: Vec<Request> = cases.iter().map(|(_, request)| request.clone()).collect();
    requests.insert(3, with(greedy(3)));
    let mut results = engine.generate(requests).unwrap();
    assert_eq!(results.remove(3).unwrap().outputs[0].token_ids, plain_greedy(&[1], 3));
    for ((param, _), result) in cases.iter().zip(results) {
        assert_eq!(result.unwrap_err().param, Some(*param));
    }
    let error = engine.add(Request::new(vec![1; 40], greedy(1))).unwrap_err();
    for part in ["40 tokens", "10 blocks of 4", "--kv-blocks", "--kv-memory"] {
        assert!(error.message.contains(part), "{error}");
    }
    assert!(!engine.has_work());
}

#[test]
fn a_request_that_outgrows_the_whole_cache_fails_with_the_sizes() {
    let (mut engine, _) = engine(engine_config(), cache_config(4, 5));
    let mut results = engine
        .generate(vec![Request::new(vec![1; 6], greedy(100)), Request::new(vec![2; 6], greedy(9))])
        .unwrap();
    assert_eq!(results.remove(1).unwrap().outputs[0].token_ids, plain_greedy(&[2; 6], 9));
    let error = results.remove(0).unwrap_err();
    assert_eq!(error.param, Some("max_tokens"));
    for part in ["prompt of 6", "5 blocks of 4", "--kv-blocks", "--kv-memory"] {
        assert!(error.message.contains(part), "{error}");
    }
    assert_eq!(engine.stats().device_blocks.used, 0);
}

#[test]
fn without_a_tokenizer_there_is_no_text() {
    let cache = roomy();
    let log = Arc::new(Mutex::new(Log::default()));
    let executor = HashExecutor::new(&cache, log);
    let manager = KvCacheManager::new(cache).unwrap();
    let mut engine = Engine::new(engine_config(), Box::new(manager), Box::new(executor), None);
    let output = engine.generate(vec![Request::new(vec![1], greedy(3))]).unwrap().remove(0).unwrap();
    assert_eq!((output.outputs[0].text.as_ref(), output.outputs[0].token_ids.len()), (None, 3));
    let params = SamplingParams { stop: vec!["a".into()], ..greedy(3) };
    assert_eq!(engine.add(Request::new(vec![1], params)).unwrap_err().param, Some("stop"));
}

#[test]
fn cancelling_frees_everything_at_the_next_step() {
    let (mut engine, _) = engine(EngineConfig { max_num_seqs: 3, ..engine_config() }, roomy());
    let params = SamplingParams { n: 2, ..greedy(50) };
    let running = engine.add(Request::new(vec![1; 9], params.clone())).unwrap();
    let waiting = engine.add(Request::new(vec![2; 9], params)).unwrap();
    let other = engine.add(Request::new(vec![3; 9], greedy(3))).unwrap();
    engine.step().unwrap();
    engine.step().unwrap();
    assert!(engine.cancel(running) && engine.cancel(waiting));
    assert!(!engine.cancel(running) && !engine.cancel(waiting));
    let events = run(&mut engine);
    let finished: Vec<_> = events
        .iter()
        .filter_map(|e| if let Event::Finished { request, .. } = e { Some(*request) } else { None })
        .collect();
    assert_eq!(finished, [other]);
    assert!(events.iter().all(|event| matches!(event, Event::Token { request, .. } | Event::Finished { request, .. } if *request == other)));
    assert_eq!((engine.stats().device_blocks.used, engine.stats().cancelled), (0, 2));
    assert!(!engine.cancel(other));

    // The last one cancelled: one more step, without computing, frees it.
    let last = engine.add(Request::new(vec![4; 9], greedy(50))).unwrap();
    engine.step().unwrap();
    engine.cancel(last);
    assert!(engine.has_work());
    assert!(engine.step().unwrap().is_empty() && !engine.has_work());
    assert_eq!(engine.stats().device_blocks.used, 0);
}

#[test]
fn a_failed_step_fails_its_requests_and_nothing_of_it_stays() {
    for (fail_in, ahead) in (0..6).flat_map(|fail_in| [(fail_in, false), (fail_in, true)]) {
        let make = if ahead { engine_ahead } else { engine };
        let (mut engine, log) = make(EngineConfig { max_num_seqs: 3, ..engine_config() }, roomy());
        let prompt: Vec<u32> = (0..10).collect();
        let params = SamplingParams { n: 2, ..greedy(8) };
        let first = engine.add(Request::new(prompt.clone(), params.clone())).unwrap();
        let second = engine.add(Request::new(vec![1; 5], greedy(8))).unwrap();
        let queued = engine.add(Request::new(vec![2; 5], greedy(8))).unwrap();
        log.lock().unwrap().fail_in = Some(fail_in);
        let events = run(&mut engine);
        let failed: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Failed { request, error } => {
                    assert!(error.message.contains("injected"), "{error}");
                    Some(*request)
                }
                _ => None,
            })
            .collect();
        assert_eq!(failed, [first, second]);
        let done = events.iter().find_map(|event| match event {
            Event::Finished { request, output } if *request == queued => Some(output),
            _ => None,
        });
        assert_eq!(done.unwrap().outputs[0].token_ids, plain_greedy(&[2; 5], 8));
        assert_eq!((engine.stats().device_blocks.used, engine.stats().device_blocks.pending), (0, 0));
        // The device lost its content, so nothing from before may be found in the prefix cache.
        let again = engine.generate(vec![Request::new(prompt.clone(), params)]).unwrap().remove(0).unwrap();
        assert_eq!(again.usage.cached_tokens, 0);
        assert_eq!(again.outputs[0].token_ids, plain_greedy(&prompt, 8));
        let hit = engine.generate(vec![Request::new(prompt.clone(), greedy(8))]).unwrap().remove(0).unwrap();
        assert_eq!((hit.usage.cached_tokens, &hit.outputs[0].token_ids), (8, &again.outputs[0].token_ids));
    }
}

#[test]
fn unusable_logits_fail_their_request_alone() {
    unusable_logits(engine(engine_config(), roomy()));
    unusable_logits(engine_ahead(engine_config(), roomy()));
}

fn unusable_logits((mut engine, log): (Engine, Arc<Mutex<Log>>)) {
    log.lock().unwrap().nan_after = Some(30);
    let bad = |n| Request::new(vec![3, 30], SamplingParams { n, ..greedy(5) });
    let good = Request::new(vec![4, 5], greedy(5));
    let expected = plain_greedy(&[4, 5], 5);
    assert!(!expected.contains(&30));
    let results = engine.generate(vec![bad(1), good, bad(3)]).unwrap();
    assert_eq!(results[1].as_ref().unwrap().outputs[0].token_ids, expected);
    for result in [&results[0], &results[2]] {
        let error = result.as_ref().unwrap_err();
        assert!(error.message.contains("NaN"), "{error}");
    }
    assert_eq!((engine.stats().device_blocks.used, engine.stats().failed), (0, 2));
}

/// Answers with too few logits.
struct Short;

impl Executor for Short {
    fn begin(&mut self, _: &StepPlan, _: &[RowWanted]) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        Ok(StepOutput::of_logits(vec![0.0; VOCAB - 1], VOCAB))
    }
}

#[test]
fn an_executor_that_answers_in_another_shape_is_a_failed_step() {
    let manager = KvCacheManager::new(roomy()).unwrap();
    let mut engine = Engine::new(engine_config(), Box::new(manager), Box::new(Short), None);
    let error = engine.generate(vec![Request::new(vec![1], greedy(1))]).unwrap().remove(0).unwrap_err();
    assert!(error.message.contains("1 rows of 32"), "{error}");
    assert!(!engine.has_work() && engine.stats().device_blocks.used == 0);
}

#[test]
fn wide_characters_are_shown_whole() {
    let (mut engine, _) = engine(engine_config(), roomy());
    engine.add(Request::new(vec![6, 6], greedy(60))).unwrap();
    let mut tokens = Vec::new();
    let mut shown = String::new();
    for event in run(&mut engine) {
        if let Event::Token { token_id, text, .. } = event {
            tokens.push(token_id);
            shown.push_str(&text);
            if token_id % 8 != 0 {
                assert!(shown.ends_with(letter(token_id)));
            }
        }
    }
    assert_eq!(shown, text_of(&tokens));
}

#[test]
fn recorded_plans_replay_to_the_same_tokens() {
    let cache = CacheConfig { host_blocks: 40, ..cache_config(2, 14) };
    let config = EngineConfig { max_batch_tokens: 6, preemption: Preemption::Swap, ..engine_config() };
    let (mut engine, log) = engine(config, cache.clone());
    for first in 0..5 {
        engine.add(Request::new(vec![first, 9, 9, first], greedy(12))).unwrap();
    }
    let events = run(&mut engine);
    let tokens: Vec<u32> = events
        .iter()
        .filter_map(|event| if let Event::Token { token_id, .. } = event { Some(*token_id) } else { None })
        .collect();
    assert!(engine.stats().scheduler.swaps > 0 && tokens.len() == 60);

    let plans = std::mem::take(&mut log.lock().unwrap().plans);
    let mut executor = HashExecutor::new(&cache, Arc::default());
    let mut replayed = Vec::new();
    for plan in &plans {
        let output = executor.execute(plan).unwrap();
        let best = |row: &[f32]| (0..VOCAB).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        replayed.extend(output.logits.chunks(VOCAB).map(best));
    }
    assert_eq!(replayed, tokens);
}

#[test]
fn an_engine_can_move_to_another_thread() {
    let (mut engine, _) = engine(engine_config(), roomy());
    let request = Request::new(vec![1, 2], greedy(4));
    let results = std::thread::spawn(move || engine.generate(vec![request]).unwrap()).join().unwrap();
    assert_eq!(results[0].as_ref().unwrap().outputs[0].token_ids, plain_greedy(&[1, 2], 4));
}
