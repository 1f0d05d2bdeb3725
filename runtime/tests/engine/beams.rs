//! Beam search against the rules written down once more, plainly: every continuation of every beam is ranked, nothing
//! is cut early.

use crate::support::{Numbers, VOCAB, cache_config, engine, engine_config, hash_logits};
use pagewise_runtime::engine::EngineConfig;
use pagewise_runtime::request::{EarlyStopping, FinishReason, Request, SamplingParams};

/// Sequences with their scores, best first.
fn plain(prompt: &[u32], params: &SamplingParams, ends: &[u32]) -> Vec<(Vec<u32>, f64)> {
    let width = params.beam_width.unwrap();
    let penalty = f64::from(params.length_penalty);
    let mut running: Vec<(Vec<u32>, f64)> = vec![(vec![], 0.0)];
    let mut pool: Vec<(Vec<u32>, f64)> = vec![];
    for length in 1..=params.max_tokens {
        let mut all = vec![];
        for (tokens, sum) in &running {
            let context = [prompt, tokens].concat();
            let logits: Vec<f64> = hash_logits(&context).into_iter().map(f64::from).collect();
            let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            for (id, logit) in logits.iter().enumerate() {
                let mut logprob = logit - lse;
                for &(biased, bias) in &params.logit_bias {
                    logprob += if biased as usize == id { f64::from(bias) } else { 0.0 };
                }
                if context.contains(&(id as u32)) {
                    let factor = f64::from(params.repetition_penalty);
                    logprob = if logprob > 0.0 { logprob / factor } else { logprob * factor };
                }
                all.push(([&tokens[..], &[id as u32]].concat(), sum + logprob));
            }
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(width * 2.max(1 + ends.len()));
        let score = |sum: f64, length: usize| sum / (length as f64).powf(penalty);
        running.clear();
        for (rank, (tokens, sum)) in all.into_iter().enumerate() {
            if ends.contains(tokens.last().unwrap()) {
                if rank < width {
                    pool.push((tokens, score(sum, length)));
                }
            } else if running.len() < width {
                running.push((tokens, sum));
            }
        }
        if length == params.max_tokens {
            pool.extend(running.drain(..).map(|(tokens, sum)| (tokens, score(sum, length))));
        }
        pool.sort_by(|a, b| b.1.total_cmp(&a.1));
        pool.truncate(width);
        let (Some(best), true) = (running.first(), pool.len() == width) else { continue };
        let favoured = match params.early_stopping {
            EarlyStopping::Never if penalty > 0.0 => params.max_tokens,
            _ => length,
        };
        if params.early_stopping == EarlyStopping::True || score(best.1, favoured) <= pool[width - 1].1 {
            break;
        }
    }
    pool
}

#[test]
fn random_searches_are_what_the_plain_rules_give() {
    let mut early = 0;
    for case in 0..400 {
        let mut numbers = Numbers::new(900 + case);
        let prompt: Vec<u32> = (0..numbers.from(1, 9)).map(|_| numbers.below(VOCAB) as u32).collect();
        let eos: Vec<u32> = (0..numbers.below(4)).map(|_| numbers.below(VOCAB) as u32).collect();
        let stop_token_ids: Vec<u32> = (0..numbers.below(2)).map(|_| numbers.below(VOCAB) as u32).collect();
        let width = numbers.pick(&[1, 2, 3, 4, 6, VOCAB + 8]);
        let params = SamplingParams {
            max_tokens: numbers.from(1, 14),
            beam_width: Some(width),
            n: width,
            length_penalty: numbers.pick(&[1.0, 1.0, 0.0, 0.5, -1.0, 2.0]),
            early_stopping: numbers.pick(&[EarlyStopping::False, EarlyStopping::True, EarlyStopping::Never]),
            ignore_eos: numbers.chance(20),
            stop_token_ids: stop_token_ids.clone(),
            repetition_penalty: numbers.pick(&[1.0, 1.0, 1.3]),
            logit_bias: if numbers.chance(20) { vec![(3, 1.5), (9, -2.0)] } else { vec![] },
            ..SamplingParams::default()
        };
        let mut ends = if params.ignore_eos { vec![] } else { eos.clone() };
        ends.extend(stop_token_ids);
        ends.sort_unstable();
        ends.dedup();
        let expected = plain(&prompt, &params, &ends);

        let config = EngineConfig { eos_token_ids: eos, ..engine_config() };
        let (mut engine, _) = engine(config, cache_config(4, 500));
        let request = Request::new(prompt.clone(), params.clone());
        let output = engine.generate(vec![request]).unwrap().remove(0).unwrap();
        let found: Vec<&Vec<u32>> = output.outputs.iter().map(|o| &o.token_ids).collect();
        let sequences: Vec<&Vec<u32>> = expected.iter().map(|(tokens, _)| tokens).collect();
        assert_eq!(found, sequences, "case {case}: {prompt:?}, {params:?}, ends {ends:?}");
        for (completion, (tokens, score)) in output.outputs.iter().zip(&expected) {
            // Each of at most 14 terms is rounded to f32 once; a penalty of −1 multiplies the sum by the length.
            let error = (f64::from(completion.score.unwrap()) - score).abs();
            assert!(error <= 1e-5 * score.abs().max(1.0), "case {case}: {score}");
            let ended = ends.contains(tokens.last().unwrap());
            let reason = if ended { FinishReason::Stop } else { FinishReason::Length };
            assert_eq!(completion.finish_reason, reason);
        }
        early += usize::from(expected.iter().any(|(tokens, _)| tokens.len() < params.max_tokens));
    }
    assert!(early > 100, "{early} searches ended early");
}

#[test]
fn a_beam_without_usable_logits_fails_the_search_alone() {
    let (mut engine, log) = engine(engine_config(), cache_config(4, 100));
    log.lock().unwrap().nan_after = Some(30);
    let beams = |prompt: Vec<u32>| {
        let params =
            SamplingParams { beam_width: Some(2), max_tokens: 2, ignore_eos: true, ..Default::default() };
        Request::new(prompt, params)
    };
    let results = engine.generate(vec![beams(vec![1, 30]), beams(vec![2, 3])]).unwrap();
    assert!(results[0].as_ref().unwrap_err().message.contains("NaN"));
    assert_eq!(results[1].as_ref().unwrap().outputs.len(), 1);
    assert_eq!(engine.stats().device_blocks.used, 0);
}

#[test]
fn beams_share_the_blocks_of_their_tree() {
    let (mut engine, _) = engine(engine_config(), cache_config(4, 500));
    let prompt: Vec<u32> = (0..16).collect();
    let params =
        SamplingParams { beam_width: Some(4), max_tokens: 30, ignore_eos: true, ..SamplingParams::default() };
    engine.add(Request::new(prompt, params)).unwrap();
    let mut most = 0;
    while engine.has_work() {
        engine.step().unwrap();
        most = most.max(engine.stats().device_blocks.used);
    }
    // Four prompt blocks once. Without sharing behind the prompt it would be 4 + 4 · 8.
    assert!((8..30).contains(&most), "{most} blocks");
}
