//! SmolLM2-135M-Instruct's golden continuations, reproduced greedily by the engine in f32.
//!
//! The model is not in the repository: `scripts/fetch-smollm2` brings it, and `scripts/test` calls that.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use pagewise_runtime::load::{LoadOptions, LoadedModel, load};
use pagewise_runtime::request::{FinishReason, Request, SamplingParams};
use pagewise_tests::smollm2_f32;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    max_new_tokens: usize,
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    text: String,
    prompt: Vec<u32>,
    new: Vec<u32>,
    new_text: String,
    top5: Vec<(u32, f32)>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../fixtures/smollm2_golden.json")).unwrap()
}

fn model(change: impl FnOnce(&mut LoadOptions)) -> Option<LoadedModel> {
    let mut options = LoadOptions::new(smollm2_f32()?.to_string_lossy());
    change(&mut options);
    Some(load(&options, &mut |_| {}).unwrap())
}

fn greedy(item: &Item, max_tokens: usize) -> Request {
    let params =
        SamplingParams { max_tokens, temperature: 0.0, logprobs: Some(5), ..SamplingParams::default() };
    Request::new(item.prompt.clone(), params)
}

#[test]
fn greedy_tokens_and_text() {
    let Some(LoadedModel { mut engine, tokenizer, .. }) = model(|_| {}) else { return };
    let tokenizer = tokenizer.expect("the directory has a tokenizer");
    let golden = golden();
    let requests = golden.items.iter().map(|item| greedy(item, golden.max_new_tokens)).collect();
    let outputs = engine.generate(requests).unwrap();
    for (item, output) in golden.items.iter().zip(outputs) {
        assert_eq!(tokenizer.encode(&item.text, false).unwrap(), item.prompt, "{:?}", item.text);
        let completion = output.unwrap().outputs.remove(0);
        assert_eq!(completion.token_ids, item.new, "{:?}", item.text);
        let ended = item.new.len() < golden.max_new_tokens;
        assert_eq!(completion.finish_reason, if ended { FinishReason::Stop } else { FinishReason::Length });
        let shown = completion.text.unwrap();
        assert_eq!(
            shown,
            item.new_text.strip_suffix("<|im_end|>").unwrap_or(&item.new_text),
            "{:?}",
            item.text
        );

        // The likeliest tokens of the first step: differences of log-probabilities are differences of logits.
        let first = &completion.logprobs.unwrap()[0];
        for (got, want) in first.top.iter().zip(&item.top5) {
            assert_eq!(got.token_id, want.0, "{:?}", item.text);
            let (got, want) = (got.logprob - first.top[0].logprob, want.1 - item.top5[0].1);
            // Logits of about 25 in f32 through 30 layers; the golden ones are printed to 1e-5.
            assert!((got - want).abs() < 2e-3, "{:?}: {got} against {want}", item.text);
        }
    }
}

#[test]
fn small_blocks_and_small_steps_give_the_same_tokens() {
    let small = |options: &mut LoadOptions| {
        options.block_size = 4;
        options.max_batch_tokens = Some(24);
        options.prefix_cache = false;
    };
    let Some(LoadedModel { mut engine, .. }) = model(small) else { return };
    let golden = golden();
    let outputs = engine.generate(golden.items.iter().map(|item| greedy(item, 12)).collect()).unwrap();
    for (item, output) in golden.items.iter().zip(outputs) {
        let tokens = output.unwrap().outputs.remove(0).token_ids;
        assert_eq!(tokens, item.new[..item.new.len().min(12)], "{:?}", item.text);
    }
}
