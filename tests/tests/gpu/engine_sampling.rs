//! Sampling, log-probabilities and beam candidates on the device: the host's answers, and in the engine what follows from
//! the log-probabilities that it gives itself.

use std::path::Path;

use pagewise_attention::DType;
use pagewise_runtime::backend::cuda::{CudaBackend, CudaOptions};
use pagewise_runtime::backend::{AttentionSpec, Backend, StepBatch};
use pagewise_runtime::executor::{
    CandidatesOutput, CandidatesWanted, LogitChanges, RowOutput, RowWanted, Sampling, StepOutput,
    TokenChange, TokenOutput, TokenWanted,
};
use pagewise_runtime::load::BackendChoice;
use pagewise_runtime::model_dir::WeightTensor;
use pagewise_runtime::request::{PositionLogprobs, Request, SamplingParams};
use pagewise_runtime::sampling::{Draw, Sampler, TokenCounts};
use pagewise_tests::{Numbers, fixture};

use super::engine_machine::{Machine, bound, config, rows_alone, texts};
use super::engine_oracle::{engine, generate, scale, way};

/// Ends a step whose logits are these rows.
fn on_device(backend: &CudaBackend, logits: &[f32], rows: usize, wanted: &[RowWanted]) -> StepOutput {
    let width = logits.len() / rows;
    let table = backend.upload(WeightTensor::from_f32(logits.to_vec(), &[rows, width])).unwrap();
    let spec = AttentionSpec::new(&config(&fixture("opt_preln")), DType::F32, 16, 8);
    let batch = StepBatch {
        tokens: (0..rows as u32).collect(),
        positions: (0..rows as i32).collect(),
        ..StepBatch::default()
    };
    let step = backend.prepare(&spec, &batch).unwrap();
    let mut tensor = backend.stream(rows, width).unwrap();
    backend.embed(&step, &table, &mut tensor).unwrap();
    backend.wait(backend.output(Some(tensor), wanted).unwrap()).unwrap()
}

fn unit(numbers: &mut Numbers) -> f32 {
    numbers.below(1 << 24) as f32 / (1 << 24) as f32
}

fn row(numbers: &mut Numbers, width: usize) -> Vec<f32> {
    let kind = numbers.below(9);
    (0..width)
        .map(|_| match kind {
            0 => f32::NAN,
            1 => (unit(numbers) * 4.0).floor(),
            2 => [f32::NAN, f32::NEG_INFINITY, 1.0, -2.0][numbers.below(4)],
            3 if numbers.below(width) == 0 => f32::INFINITY,
            4 => 7.0,
            5 => (unit(numbers) + unit(numbers) + unit(numbers) + unit(numbers) - 2.0) * 12.0,
            _ => (unit(numbers) - 0.5) * 30.0,
        })
        .collect()
}

/// Bias and penalties, and the same as the host knows them.
fn changes(numbers: &mut Numbers, width: usize) -> (LogitChanges, SamplingParams, TokenCounts) {
    let mut params = SamplingParams::default();
    if numbers.below(2) == 0 {
        return (LogitChanges::default(), params, TokenCounts::default());
    }
    let mut tokens: Vec<TokenChange> = Vec::new();
    if numbers.below(2) == 0 {
        params.logit_bias = (0..width.min(5)).map(|id| (id as u32, unit(numbers) * 8.0 - 4.0)).collect();
    }
    params.repetition_penalty = [1.0, 1.3][numbers.below(2)];
    params.presence_penalty = [0.0, 0.7][numbers.below(2)];
    params.frequency_penalty = [0.0, -0.3][numbers.below(2)];
    let penalties =
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let held: Vec<(u32, u32)> = match penalties {
        true => (0..width as u32).filter(|_| numbers.below(20) == 0).map(|id| (id, id % 3)).collect(),
        false => Vec::new(),
    };
    let prompt: Vec<u32> = held.iter().filter(|(_, times)| *times == 0).map(|(id, _)| *id).collect();
    let mut counts = TokenCounts::new(&prompt, &params);
    for &(id, times) in &held {
        (0..times).for_each(|_| counts.push(id));
        // Without a repetition penalty a prompt's tokens are not touched.
        tokens.push(TokenChange { token_id: id, bias: 0.0, held: Some(times) });
    }
    for &(id, bias) in &params.logit_bias {
        match tokens.iter_mut().find(|change| change.token_id == id) {
            Some(change) => change.bias = bias,
            None => tokens.push(TokenChange { token_id: id, bias, held: None }),
        }
    }
    let &SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = &params;
    let changes = LogitChanges { repetition_penalty, presence_penalty, frequency_penalty, tokens };
    (changes, params, counts)
}

/// What is wanted of a row, and what the host makes of it.
fn wanted(numbers: &mut Numbers, logits: &[f32]) -> (RowWanted, Option<RowOutput>) {
    let width = logits.len();
    let mut sampler = Sampler::default();
    let top = [0, 1, 5, 20, 300][numbers.below(5)].min(width);
    let plain = (SamplingParams::default(), TokenCounts::default());
    match numbers.below(8) {
        0 => (RowWanted::Logits, None),
        1 => (RowWanted::Nothing, Some(RowOutput::Nothing)),
        2 => {
            let token_id = numbers.below(width) as u32;
            let expected = sampler.logprobs(logits, token_id, top);
            (RowWanted::Logprobs { token_id, top }, Some(RowOutput::Logprobs(expected)))
        }
        3 => {
            let count = [1, 6, 40, 1000][numbers.below(4)];
            let logprobs = (numbers.below(2) == 0).then_some(top);
            let found = sampler.candidates(logits, &plain.0, &plain.1, count).ok();
            let expected = found.map(|candidates| CandidatesOutput {
                own: logprobs.map_or(vec![], |_| candidates.iter().map(|c| c.logprob as f32).collect()),
                top: logprobs.map_or(vec![], |top| sampler.logprobs(logits, 0, top).top),
                candidates,
            });
            let wanted = CandidatesWanted { count, changes: LogitChanges::default(), logprobs };
            (RowWanted::Candidates(wanted), Some(RowOutput::Candidates(expected)))
        }
        _ => {
            let (changes, mut params, counts) = changes(numbers, width);
            params.temperature = [0.0, 0.4, 1.0, 1.0, 50.0][numbers.below(5)];
            params.top_k = [0, 0, 1, 3, 50, 2000][numbers.below(6)];
            params.top_p = [1.0, 1.0, 0.95, 0.3][numbers.below(4)];
            params.min_p = [0.0, 0.0, 0.02][numbers.below(3)];
            let draw = Draw { seed: numbers.below(1 << 30) as u64, sample: 1, position: 77 };
            let sampling = Sampling {
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                min_p: params.min_p,
                draw,
            };
            let logprobs = (numbers.below(2) == 0).then_some(top);
            let token = sampler.sample(logits, &params, &counts, draw).ok();
            let expected = token.map(|token_id| TokenOutput {
                token_id,
                logprobs: logprobs.map(|top| sampler.logprobs(logits, token_id, top)),
            });
            let wanted = TokenWanted { sampling, changes, logprobs };
            (RowWanted::Token(wanted), Some(RowOutput::Token(expected)))
        }
    }
}

/// Tokens are the same; log-probabilities within what f32 sums of 128 thousand weights, 2^-20 of their size, make of
/// theirs.
fn same(found: &RowOutput, expected: &RowOutput) -> bool {
    let near = |x: f32, y: f32| x == y || f64::from((x - y).abs()) <= 4e-6 * (1.0 + f64::from(y.abs()));
    let lists = |x: &PositionLogprobs, y: &PositionLogprobs| {
        let both = |x: &PositionLogprobs| [vec![x.token], x.top.clone()].concat();
        let (x, y) = (both(x), both(y));
        x.len() == y.len()
            && x.iter().zip(&y).all(|(x, y)| x.token_id == y.token_id && near(x.logprob, y.logprob))
    };
    match (found, expected) {
        (RowOutput::Token(Some(x)), RowOutput::Token(Some(y))) => {
            let logprobs = match (&x.logprobs, &y.logprobs) {
                (Some(x), Some(y)) => lists(x, y),
                (x, y) => x == y,
            };
            x.token_id == y.token_id && logprobs
        }
        (RowOutput::Logprobs(x), RowOutput::Logprobs(y)) => lists(x, y),
        (RowOutput::Candidates(Some(x)), RowOutput::Candidates(Some(y))) => {
            let candidates = x.candidates.len() == y.candidates.len()
                && x.candidates
                    .iter()
                    .zip(&y.candidates)
                    .all(|(x, y)| x.token_id == y.token_id && near(x.logprob as f32, y.logprob as f32));
            let own = x.own.len() == y.own.len() && x.own.iter().zip(&y.own).all(|(x, y)| near(*x, *y));
            let top = x.top.len() == y.top.len()
                && x.top
                    .iter()
                    .zip(&y.top)
                    .all(|(x, y)| x.token_id == y.token_id && near(x.logprob, y.logprob));
            candidates && own && top
        }
        (x, y) => x == y,
    }
}

/// Given logits the device answers as the host does: to the token, also where bias, penalties and filters come together.
/// Weights are the same to the bit there, and their sums to 2^-26, so that a number that falls between them would have
/// to come within that of a border.
#[test]
fn answers_to_given_logits_are_the_hosts() {
    if super::cuda::context().is_none() {
        return;
    }
    let backend = CudaBackend::new(CudaOptions { ordinal: 0, dtype: DType::F32, graphs: true }).unwrap();
    let spec = AttentionSpec::new(&config(&fixture("opt_preln")), DType::F32, 16, 8);
    let _cache = backend.cache(&spec).unwrap();
    let seed = std::env::var("PAGEWISE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(5);
    let mut numbers = Numbers(seed);
    let quick = std::env::var_os("PAGEWISE_SMALL").is_some();
    let shapes: &[(usize, usize)] = match quick {
        true => &[(1, 256), (5, 1001)],
        false => {
            &[(1, 256), (1, 1), (5, 1001), (64, 4096), (300, 257), (3, 50_257), (4, 128_256), (2, 262_144)]
        }
    };
    let mut answered = [0; 5];
    for &(rows, width) in shapes {
        for round in 0..if quick { 2 } else { 6 } {
            let logits: Vec<Vec<f32>> = (0..rows).map(|_| row(&mut numbers, width)).collect();
            let (asked, expected): (Vec<RowWanted>, Vec<Option<RowOutput>>) =
                logits.iter().map(|row| wanted(&mut numbers, row)).unzip();
            let output = on_device(&backend, &logits.concat(), rows, &asked);
            assert_eq!(output.rows.len(), rows);
            for (index, ((asked, expected), logits)) in asked.iter().zip(&expected).zip(&logits).enumerate() {
                let label =
                    format!("seed {seed}, {rows} rows of {width}, round {round}, row {index}: {asked:?}");
                let found = &output.rows[index];
                match (expected, found) {
                    (Some(expected), found) => {
                        assert!(same(found, expected), "{label}: {found:?}, not {expected:?}");
                    }
                    (None, RowOutput::Logits(place)) => {
                        let found = &output.logits[place * width..(place + 1) * width];
                        let same =
                            found.iter().zip(logits).all(|(x, y)| x == y || (x.is_nan() && y.is_nan()));
                        assert!(same, "{label}: the logits have changed");
                    }
                    (None, found) => panic!("{label}: {found:?}"),
                }
                answered[match asked {
                    RowWanted::Logits => 0,
                    RowWanted::Nothing => 1,
                    RowWanted::Token(_) => 2,
                    RowWanted::Logprobs { .. } => 3,
                    RowWanted::Candidates(_) => 4,
                }] += 1;
            }
        }
    }
    println!("logits, nothing, tokens, log-probabilities, candidates: {answered:?}");
}

/// The token that follows from log-probabilities of all tokens: plain f64, temperature and top-p by a sort.
fn follows(logprobs: &PositionLogprobs, params: &SamplingParams, draw: Draw) -> Vec<u32> {
    let mut given = Vec::new();
    // The log-probabilities are rounded where the logits were not: 2^-20 of a share.
    for nudge in [0.0, -1e-6, 1e-6] {
        let best = f64::from(logprobs.top[0].logprob);
        let mut kept: Vec<(u32, f64)> = logprobs
            .top
            .iter()
            .map(|t| (t.token_id, ((f64::from(t.logprob) - best) / f64::from(params.temperature)).exp()))
            .collect();
        let target = (f64::from(params.top_p) + nudge) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut sum = 0.0;
        let end = kept.iter().position(|(_, weight)| {
            sum += weight;
            sum >= target
        });
        kept.truncate(end.map_or(kept.len(), |end| end + 1));
        kept.sort_unstable_by_key(|(id, _)| *id);
        for shift in [0.0, -1e-6, 1e-6] {
            let target = (draw.uniform() + shift) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            given.extend(kept.iter().find(|(_, weight)| {
                sum += weight;
                sum > target
            }));
        }
    }
    given.into_iter().map(|(id, _)| id).collect()
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().fold(f64::MIN, |max, &x| max.max(f64::from(x)));
    let sum = max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
    row.iter().map(|&x| f64::from(x) - sum).collect()
}

/// Sampled requests through the whole engine, several samples each: every token follows from the log-probabilities that
/// the device gives, and these are the CPU's of the same text.
fn sampled_answers_agree(name: &str, dir: &Path, dtype: DType) {
    let config = config(dir);
    let prompts = texts(config.vocab_size, 12, 30, 41);
    let margin = 2.0 * bound(dir, dtype, &prompts) * scale(dir, &prompts);
    let requests: Vec<Request> = prompts
        .into_iter()
        .enumerate()
        .map(|(index, prompt)| {
            let params = SamplingParams {
                max_tokens: 5 + index,
                ignore_eos: true,
                temperature: [0.5, 1.0, 2.0][index % 3],
                top_p: [1.0, 0.8][index % 2],
                seed: Some(index as u64 * 7),
                n: 1 + index % 2,
                logprobs: Some(config.vocab_size),
                prompt_logprobs: (index % 4 == 1).then_some(2),
                ..SamplingParams::default()
            };
            Request::new(prompt, params)
        })
        .collect();
    let mut device = engine(dir, way(BackendChoice::Cuda, dtype));
    let outputs = generate(&mut device, &requests);
    let mut machine = Machine::cpu(dir, dtype);
    let mut tokens = 0;
    for (request, output) in requests.iter().zip(&outputs) {
        for (index, completion) in output.outputs.iter().enumerate() {
            let text = [request.prompt.as_slice(), &completion.token_ids].concat();
            let rows = rows_alone(&mut machine, std::slice::from_ref(&text)).remove(0);
            for (at, entry) in output.prompt_logprobs.iter().flatten().enumerate() {
                let Some(entry) = entry else { continue };
                assert_eq!(
                    (entry.token.token_id, entry.top.len()),
                    (text[at], 2),
                    "{name} {dtype}, prompt {at}"
                );
                let expected = log_softmax(&rows[at - 1]);
                for of in entry.top.iter().chain([&entry.token]) {
                    let apart = f64::from(of.logprob) - expected[of.token_id as usize];
                    assert!(apart.abs() <= margin, "{name} {dtype}, prompt {at}: {of:?} is {apart:.2e} off");
                }
            }
            for (at, (&token, logprobs)) in
                completion.token_ids.iter().zip(completion.logprobs.as_ref().unwrap()).enumerate()
            {
                let position = request.prompt.len() + at;
                let label = format!("{name} {dtype}, {request:?}, sample {index}, token {at}");
                let draw = Draw {
                    seed: request.params.seed.unwrap(),
                    sample: index as u32,
                    position: position as u64,
                };
                let given = follows(logprobs, &request.params, draw);
                assert!(given.contains(&token), "{label}: {token}, where {given:?} follows");
                let expected = log_softmax(&rows[position - 1]);
                assert_eq!(logprobs.top.len(), expected.len(), "{label}");
                for of in &logprobs.top {
                    let apart = f64::from(of.logprob) - expected[of.token_id as usize];
                    assert!(
                        apart.abs() <= margin,
                        "{label}: {of:?} is {apart:.2e} off, {margin:.2e} allowed"
                    );
                }
                tokens += 1;
            }
        }
    }
    println!("{name} {dtype}: {tokens} sampled tokens follow, log-probabilities within {margin:.2e}");
}

#[test]
fn sampled_answers_follow_from_log_probabilities() {
    if super::cuda::context().is_none() {
        return;
    }
    let names = ["llama_gqa", "opt_preln"];
    for name in names {
        for dtype in super::DTYPES {
            sampled_answers_agree(name, &fixture(name), dtype);
        }
    }
}
