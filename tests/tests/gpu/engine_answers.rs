//! What a device answers of its logits: the host's sampler says what must come out. And weights that it makes up.

use super::engine_pair::{adapters, on_device};
use super::random::Random;
use super::seed;
use pagewise_attention::{DType, HostTensor};
use pagewise_runtime::backend::Backend;
use pagewise_runtime::backend::wgpu::WgpuBackend;
use pagewise_runtime::executor::{
    CandidatesWanted, LogitChanges, Row, RowWanted, Sampling, TokenChange, TokenWanted,
};
use pagewise_runtime::model_dir::{MadeUp, WeightTensor};
use pagewise_runtime::request::{PositionLogprobs, SamplingParams, TokenLogprob};
use pagewise_runtime::sampling::{Draw, Sampler, TokenCounts};

/// Logits that the device cannot know better than f32 lets it: its weights are a few units of 2^-24 off, and so are
/// penalties; logits here are up to 30.
const LOGPROB: f64 = 2e-5;

fn assert_near(label: &str, got: f32, want: f32) {
    // Penalties multiply, and round, numbers of up to a hundred.
    let allowed = LOGPROB + 4.0 * f64::from(f32::EPSILON) * f64::from(want.abs());
    let same = got == want || (f64::from(got) - f64::from(want)).abs() <= allowed;
    assert!(same, "{label}: {got}, not {want}");
}

fn assert_logprobs(label: &str, got: &PositionLogprobs, want: &PositionLogprobs) {
    let ids = |entries: &[TokenLogprob]| entries.iter().map(|entry| entry.token_id).collect::<Vec<_>>();
    assert_eq!(got.token.token_id, want.token.token_id, "{label}");
    assert_eq!(ids(&got.top), ids(&want.top), "{label}");
    assert_near(label, got.token.logprob, want.token.logprob);
    for (got, want) in got.top.iter().zip(&want.top) {
        assert_near(label, got.logprob, want.logprob);
    }
}

/// Ways to choose, with what they do to logits as the host and as a device are told.
fn random_params(random: &mut Random, width: usize) -> (SamplingParams, TokenCounts, LogitChanges) {
    let token = |random: &mut Random| random.below(width) as u32;
    let mut params = SamplingParams {
        temperature: random.pick(&[0.0, 1.0, 0.7]),
        top_k: random.pick(&[0, 0, 1, 7]),
        top_p: random.pick(&[1.0, 0.9]),
        min_p: random.pick(&[0.0, 0.05]),
        ..SamplingParams::default()
    };
    if random.one_in(2) {
        params.repetition_penalty = random.pick(&[1.0, 1.29]);
        params.presence_penalty = random.pick(&[0.0, 0.5]);
        params.frequency_penalty = random.pick(&[0.0, 0.25]);
        params.logit_bias =
            (0..random.below(3)).map(|i| (i as u32 * 7 % width as u32, random.pick(&[2.0, -3.0]))).collect();
        params.logit_bias.sort_by_key(|&(id, _)| id);
        params.logit_bias.dedup_by_key(|&mut (id, _)| id);
    }
    let prompt: Vec<u32> = (0..9).map(|_| token(random)).collect();
    let completion: Vec<u32> = (0..9).map(|_| token(random)).collect();
    let mut counts = TokenCounts::new(&prompt, &params);
    completion.iter().for_each(|&id| counts.push(id));
    let repeats = params.repetition_penalty != 1.0;
    let penalised = repeats || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let mut held: Vec<u32> = if penalised { completion.clone() } else { Vec::new() };
    held.extend(prompt.iter().filter(|_| repeats));
    held.extend(params.logit_bias.iter().map(|&(id, _)| id));
    held.sort_unstable();
    held.dedup();
    let change = |token_id: u32| {
        let times = completion.iter().filter(|&&id| id == token_id).count() as u32;
        let is_held = penalised && (times > 0 || (repeats && prompt.contains(&token_id)));
        let bias = params.logit_bias.iter().find(|&&(id, _)| id == token_id).map_or(0.0, |&(_, bias)| bias);
        TokenChange { token_id, bias, held: is_held.then_some(times) }
    };
    let changes = LogitChanges {
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        tokens: held.into_iter().map(change).collect(),
    };
    (params, counts, changes)
}

/// Rows of random logits, of each of which something else is wanted: the answers are the host sampler's, and nothing else
/// leaves the device.
#[test]
fn answers_are_those_of_the_host() {
    for backend in adapters() {
        let mut random = Random::new(seed());
        for _ in 0..10 {
            answers_of_one_step(&backend, &mut random);
        }
    }
}

fn answers_of_one_step(backend: &WgpuBackend, random: &mut Random) {
    let (rows, width) = (1 + random.below(7), 1 + random.below(3000));
    let levels = random.pick(&[20.0, 1e6]);
    let mut logits: Vec<f32> =
        (0..rows * width).map(|_| ((random.unit() * levels).round() * 30.0 / levels) as f32).collect();
    for row in logits.chunks_mut(width) {
        match random.below(8) {
            0 => row.fill(f32::NAN),
            1 => row.fill(f32::NEG_INFINITY),
            2 => row.iter_mut().step_by(2).for_each(|x| *x = f32::NAN),
            3 => row.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 2 == 0 { -0.0 } else { 0.0 }),
            _ => {}
        }
    }
    let table = backend.upload(WeightTensor::from_f32(logits.clone(), &[rows, width])).unwrap();
    // Sometimes all rows are greedy, which is another kernel.
    let all_greedy = random.one_in(4);
    let mut asked = Vec::new();
    let mut of_host = Vec::new();
    for _ in 0..rows {
        let (mut params, mut counts, mut changes) = random_params(random, width);
        let mut logprobs = random.pick(&[None, None, Some(0), Some(1), Some(5)]);
        let mut kind = random.below(8);
        if all_greedy {
            (params, changes, logprobs) = (SamplingParams::default(), LogitChanges::default(), None);
            params.temperature = 0.0;
            counts = TokenCounts::new(&[], &params);
            kind = random.pick(&[0, 3]);
        }
        let draw =
            Draw { seed: random.next(), sample: random.below(9) as u32, position: random.next() >> 33 };
        let top = random.pick(&[0, 1, 5]).min(width);
        asked.push(match kind {
            0 => RowWanted::Logits,
            1 => RowWanted::Nothing,
            2 => RowWanted::Logprobs { token_id: random.below(width) as u32, top },
            3..6 => {
                let SamplingParams { temperature, top_k, top_p, min_p, .. } = params;
                let sampling = Sampling { temperature, top_k, top_p, min_p, draw };
                RowWanted::Token(TokenWanted { sampling, changes, logprobs })
            }
            _ => {
                let count = random.pick(&[1, 8, 33]);
                RowWanted::Candidates(CandidatesWanted { count, changes, logprobs })
            }
        });
        of_host.push((params, counts, draw));
    }
    let output = on_device(backend, &table, [rows, width], &asked);
    let whole = asked.iter().filter(|asked| matches!(asked, RowWanted::Logits)).count();
    assert_eq!(output.logits.len(), whole * width, "only rows that were asked for leave the device");
    let mut sampler = Sampler::default();
    for (index, ((asked, row), (params, counts, draw))) in
        asked.iter().zip(logits.chunks(width)).zip(&of_host).enumerate()
    {
        let label = format!("row {index} of {rows}, {width} wide: {asked:?}");
        match (asked, output.row(index).unwrap()) {
            (RowWanted::Logits, Row::Logits(got)) => {
                let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                assert!(got.len() == width && got.iter().zip(row).all(same), "{label}");
            }
            (RowWanted::Nothing, Row::Nothing) => {}
            (&RowWanted::Logprobs { token_id, top }, Row::Logprobs(got)) => {
                assert_logprobs(&label, got, &sampler.logprobs(row, token_id, top));
            }
            (RowWanted::Token(wanted), Row::Token(got)) => {
                let want = sampler.sample(row, params, counts, *draw).ok();
                assert_eq!(got.map(|got| got.token_id), want, "{label}");
                if let (Some(got), Some(want)) = (got, want) {
                    assert_eq!(got.logprobs.is_some(), wanted.logprobs.is_some(), "{label}");
                    if let (Some(got), Some(top)) = (&got.logprobs, wanted.logprobs) {
                        assert_logprobs(&label, got, &sampler.logprobs(row, want, top));
                    }
                }
            }
            (RowWanted::Candidates(wanted), Row::Candidates(got)) => {
                let want = sampler.candidates(row, params, counts, wanted.count).ok();
                assert_eq!(got.is_some(), want.is_some(), "{label}");
                let (Some(got), Some(want)) = (got, want) else { continue };
                assert_eq!(got.candidates.len(), want.len(), "{label}");
                for (at, (found, want)) in got.candidates.iter().zip(&want).enumerate() {
                    // Log-probabilities that are equal to f32 may change places.
                    assert_near(&label, found.logprob as f32, want.logprob as f32);
                    if wanted.changes.is_empty() {
                        assert_eq!(found.token_id, want.token_id, "{label}");
                    }
                    if wanted.logprobs.is_some() {
                        let own = sampler.logprobs(row, found.token_id, 0).token.logprob;
                        assert_near(&label, got.own[at], own);
                    }
                }
                let top = sampler.logprobs(row, 0, wanted.logprobs.unwrap_or(0)).top;
                let ids = |top: &[TokenLogprob]| top.iter().map(|entry| entry.token_id).collect::<Vec<_>>();
                assert_eq!(ids(&got.top), ids(&top), "{label}");
            }
            (_, got) => panic!("{label}: {got:?} was not asked for"),
        }
    }
}

fn widened(host: HostTensor<'_>) -> Vec<f32> {
    match host {
        HostTensor::F32(x) => x.to_vec(),
        HostTensor::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
        HostTensor::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => panic!("no weight has this type"),
    }
}

/// Weights that come from no file are made on the device: whole, in parts, and one behind the other, they are the host's
/// to the bit.
#[test]
fn made_up_weights_are_those_of_the_host() {
    for backend in adapters() {
        let small = backend.sibling().unwrap().with_largest_weight(4096);
        let mut random = Random::new(seed());
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let [rows, width] = [40, random.pick(&[61, 64, 97])];
            let tensors: Vec<WeightTensor> = [(0.0, 0.0411), (1.0, 0.125)]
                .into_iter()
                .map(|(center, spread)| {
                    let made = MadeUp { seed: random.next(), first: random.next() >> 20, center, spread };
                    WeightTensor::of_made_up(made, dtype, &[rows, width])
                })
                .collect();
            for backend in [&backend, &small] {
                let mut tables = backend.upload_together(tensors.clone()).unwrap();
                tables.push(backend.upload(tensors[0].clone()).unwrap());
                for (table, tensor) in tables.iter().zip(tensors.iter().chain(&tensors)) {
                    let output = on_device(backend, table, [rows, width], &[]);
                    let wide = widened(tensor.host());
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&output.logits), bits(&wide), "{dtype}, {rows} rows of {width}");
                }
            }
        }
    }
}
