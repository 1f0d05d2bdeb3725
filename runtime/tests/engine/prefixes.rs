//! Shared prefixes: found by themselves, and registered, pinned and named. What is cached is not computed again.

use crate::support::{VOCAB, cache_config, engine, engine_config};
use pagewise_kvcache::CacheConfig;
use pagewise_runtime::engine::{Engine, PrefixError};
use pagewise_runtime::request::{Event, Request, RequestOutput, SamplingParams};

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() }
}

fn tokens(seed: u32, count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 7 + seed * 11 + i * i) % VOCAB as u32).collect()
}

fn run(engine: &mut Engine, request: Request) -> RequestOutput {
    engine.generate(vec![request]).unwrap().remove(0).unwrap()
}

fn alone(prompt: Vec<u32>) -> Vec<u32> {
    let (mut engine, _) = engine(engine_config(), cache_config(4, 200));
    run(&mut engine, Request::new(prompt, greedy(5))).outputs.remove(0).token_ids
}

#[test]
fn the_turns_of_a_chat_are_computed_once() {
    let (mut engine, _) = engine(engine_config(), cache_config(4, 200));
    let mut conversation = tokens(1, 13);
    let mut before = 0;
    for turn in 2..6 {
        let output = run(&mut engine, Request::new(conversation.clone(), greedy(9)));
        // All of the turns before it but the last answer's last token, which nobody has computed, in full blocks.
        let known = if turn == 2 { 0 } else { before / 4 * 4 };
        assert_eq!(output.usage.cached_tokens, known, "turn {turn}");
        let computed = engine.stats().computed_tokens;
        conversation.extend(&output.outputs[0].token_ids);
        before = conversation.len() - 1;
        conversation.extend(tokens(turn, 6));
        assert!(computed >= before as u64);
    }
    // Each turn computes what is new, and less than a block that it shares.
    let all = engine.stats().computed_tokens;
    assert!(all <= conversation.len() as u64 + 4 * 4, "{all} tokens computed for {}", conversation.len());
}

#[test]
fn a_registered_prefix_is_computed_once_and_stays() {
    let (mut engine, _) = engine(engine_config(), cache_config(4, 30));
    let prefix = tokens(3, 22);
    // Somebody else's events are not lost while it is computed.
    let other = engine.add(Request::new(tokens(8, 5), greedy(2))).unwrap();
    engine.register_prefix("system", prefix.clone()).unwrap();
    assert!(engine.has_work());
    let mut finished = vec![];
    while engine.has_work() {
        for event in engine.step().unwrap() {
            match event {
                Event::Finished { request, .. } => finished.push(request),
                Event::Token { request, .. } => assert_eq!(request, other),
                Event::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
    assert_eq!(finished, [other]);
    assert_eq!(engine.stats().device_blocks.used, 5, "its full blocks are pinned");

    for round in 0..5 {
        // Enough to evict whatever is not pinned.
        run(&mut engine, Request::new(tokens(round + 20, 60), greedy(20)));
        let before = engine.stats().computed_tokens;
        let named = Request { prefix: Some("system".into()), ..Request::new(tokens(round, 6), greedy(5)) };
        let output = run(&mut engine, named);
        assert_eq!((output.usage.prompt_tokens, output.usage.cached_tokens), (28, 20));
        assert_eq!(output.outputs[0].token_ids, alone([prefix.clone(), tokens(round, 6)].concat()));
        assert_eq!(
            engine.stats().computed_tokens - before,
            8 + 4,
            "the cached tokens are not computed again"
        );
    }
    assert!(engine.unregister_prefix("system") && !engine.unregister_prefix("system"));
    assert_eq!(engine.stats().device_blocks.used, 0);
    let named = Request { prefix: Some("system".into()), ..Request::new(vec![1], greedy(5)) };
    assert_eq!(engine.add(named).unwrap_err().param, Some("prefix"));
}

#[test]
fn a_prefix_survives_the_loss_of_the_cache() {
    let (mut engine, log) = engine(engine_config(), cache_config(4, 30));
    let prefix = tokens(3, 16);
    engine.register_prefix("system", prefix.clone()).unwrap();
    log.lock().unwrap().fail_in = Some(0);
    let named = || Request { prefix: Some("system".into()), ..Request::new(vec![5, 6], greedy(5)) };
    assert!(engine.generate(vec![named()]).unwrap()[0].is_err());
    assert_eq!(engine.stats().device_blocks.used, 0, "what was pinned is lost");
    for cached in [0, 16] {
        let output = run(&mut engine, named());
        assert_eq!(output.usage.cached_tokens, cached);
        assert_eq!(output.outputs[0].token_ids, alone([prefix.clone(), vec![5, 6]].concat()));
        assert_eq!(engine.stats().device_blocks.used, 4, "it is pinned again");
    }
}

#[test]
fn prefixes_that_cannot_be_kept_are_refused() {
    let refused = |cache: CacheConfig, prefix: Vec<u32>| {
        let (mut engine, _) = engine(engine_config(), cache);
        match engine.register_prefix("p", prefix).unwrap_err() {
            PrefixError::Refused(error) => error,
            error => panic!("{error}"),
        }
    };
    assert!(refused(cache_config(4, 30), tokens(1, 3)).message.contains("no block"));
    assert!(refused(cache_config(4, 3), tokens(1, 30)).message.contains("--kv-blocks"));
    let off = CacheConfig { prefix_cache: false, ..cache_config(4, 30) };
    assert!(refused(off, tokens(1, 8)).message.contains("--no-prefix-cache"));
}
