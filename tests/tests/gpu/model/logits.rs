//! What is made of logits.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::argmax::{Argmax, ArgmaxArgs, ArgmaxSpec, NO_TOKEN};
use pagewise_attention::cuda::ptx::model::carry_tokens::{CarryTokens, CarryTokensArgs, CarryTokensSpec};
use pagewise_attention::cuda::ptx::model::log_softmax::{LogSoftmax, LogSoftmaxArgs, LogSoftmaxSpec};
use pagewise_attention::cuda::ptx::model::vocab::blocks;

use super::super::random::Random;
use super::Run;
use super::tensor::{F32, Tensor, words};

/// Rows of logits: ordinary ones, ones with ties, with NaN and infinities, and ones without a candidate.
pub(super) fn logits(random: &mut Random, vector: u32, most: &[usize]) -> Tensor {
    let rows = random.pick(&[1, 1, 2, 5]);
    let unit = vector as usize;
    let most = random.pick(most);
    let vocab = unit * (1 + random.below(most / unit + 1));
    let kinds: Vec<usize> = (0..rows).map(|_| random.below(8)).collect();
    let tensor = Tensor::poisoned(random, DType::F32, rows, vocab, unit);
    tensor.filled(|row, _| match kinds[row] {
        0 => (random.unit() * 3.0).floor(),
        1 => random.pick(&[f64::NAN, f64::NEG_INFINITY, -0.0, 0.0, -3.5]),
        2 => random.pick(&[f64::NAN, f64::NEG_INFINITY]),
        3 if random.one_in(vocab) => f64::INFINITY,
        4 => random.unit() * 1e4,
        5 => -(random.unit().abs() * 10.0),
        _ => random.unit() * 20.0,
    })
}

pub fn run(run: &mut Run<'_>) {
    let most: &[usize] = if run.small { &[10, 3000] } else { &[3000, 70_000] };
    for spec in ArgmaxSpec::all() {
        let argmax = Argmax::new(spec).unwrap();
        run.variant(argmax.kernel(), |device, random| {
            let mut logits = logits(random, spec.vector, most);
            let (rows, vocab) = (logits.rows, logits.width);
            let (keys, tickets) = (device.upload(&vec![0; 8 * rows]), words(device, &vec![0; rows]));
            let mut best = Tensor::poisoned(random, DType::F32, 1, rows, 1);
            let args = ArgmaxArgs {
                logits: logits.upload(device),
                vocab: vocab as u32,
                keys,
                tickets,
                tokens: words(device, &vec![7; rows]),
                best: best.upload(device).address,
            };
            // Twice, since the first launch must leave the scratch memory as it was.
            for _ in 0..2 {
                let launch = argmax.launch(rows as u32, vocab as u32).unwrap();
                device.run(argmax.kernel(), launch, &args.values())?;
            }
            let tokens = device.download(args.tokens);
            let expected = |row: usize| {
                (0..vocab).map(|token| logits.get(row, token)).enumerate().fold(
                    (NO_TOKEN, f64::NEG_INFINITY),
                    |best, (token, logit)| {
                        if logit > best.1 { (token as u32, logit) } else { best }
                    },
                )
            };
            for row in 0..rows {
                let found = u32::from_le_bytes(tokens[4 * row..4 * row + 4].try_into().unwrap());
                if found != expected(row).0 {
                    return Err(format!("row {row} of {vocab}: expected {:?}, found {found}", expected(row)));
                }
            }
            if device.download(keys).iter().chain(&device.download(tickets)).any(|&byte| byte != 0) {
                return Err("the scratch memory is not zero again".to_owned());
            }
            best.compare(device, |_, row| (expected(row).1, 0.0))
        });
    }
    for spec in LogSoftmaxSpec::all() {
        let log_softmax = LogSoftmax::new(spec).unwrap();
        run.variant(log_softmax.kernel(), |device, random| {
            let mut logits = logits(random, spec.vector, most);
            let (rows, vocab) = (logits.rows, logits.width);
            let count = random.pick(&[0, 1, 3, 300]);
            let ids: Vec<u32> = (0..rows * count)
                .map(|_| {
                    if random.one_in(9) {
                        random.pick(&[u32::MAX, vocab as u32])
                    } else {
                        random.below(vocab) as u32
                    }
                })
                .collect();
            let tickets = words(device, &vec![0; rows]);
            // The view of a stride of its own is the logits' alone: results are packed.
            let mut out = Tensor::poisoned(random, DType::F32, 1, rows * count, 1);
            let mut stats = Tensor::poisoned(random, DType::F32, 1, rows * 2, 1);
            let args = LogSoftmaxArgs {
                logits: logits.upload(device),
                vocab: vocab as u32,
                partial: words(device, &vec![u32::MAX; 2 * rows * blocks(vocab as u32) as usize]),
                tickets,
                ids: words(device, if ids.is_empty() { &[0] } else { &ids }),
                count: count as u32,
                out: out.upload(device).address,
                stats: stats.upload(device).address,
            };
            for _ in 0..2 {
                let launch = log_softmax.launch(rows as u32, vocab as u32).unwrap();
                device.run(log_softmax.kernel(), launch, &args.values())?;
            }
            if device.download(tickets).iter().any(|&byte| byte != 0) {
                return Err("the tickets are not zero again".to_owned());
            }
            let rows: Vec<(f64, f64)> = (0..rows)
                .map(|row| {
                    let logits =
                        (0..vocab).map(|token| logits.get(row, token)).filter(|logit| !logit.is_nan());
                    let max = logits.clone().fold(f64::NEG_INFINITY, f64::max);
                    let weight = |logit: f64| if logit == max { 1.0 } else { (logit - max).exp() };
                    let sum = if max == f64::NEG_INFINITY { 0.0 } else { logits.map(weight).sum::<f64>() };
                    (max, sum.ln())
                })
                .collect();
            // A weight's exponent is rounded to f32, at most 100 where it counts; ln of the sum is within 2^-22 of its
            // value and of 1.
            let error = |log_sum: f64| 256.0 * F32 * (1.0 + log_sum.abs() / 16.0);
            let worst = out.compare(device, |_, index| {
                let (row, token) = (index / count, ids[index] as usize);
                let (max, log_sum) = rows[row];
                let logit = if token < vocab { logits.get(row, token) } else { f64::NEG_INFINITY };
                if logit.is_nan() || logit == f64::NEG_INFINITY {
                    return (f64::NEG_INFINITY, 0.0);
                }
                let value = if logit == max { -log_sum } else { logit - max - log_sum };
                (value, error(log_sum) + 2.0 * F32 * value.abs())
            })?;
            stats.compare(device, |_, index| {
                let (max, log_sum) = rows[index / 2];
                if index % 2 == 0 { (max, 0.0) } else { (log_sum, error(log_sum)) }
            })?;
            Ok(worst)
        });
    }
    for spec in CarryTokensSpec::all() {
        let carry = CarryTokens::new(spec).unwrap();
        run.variant(carry.kernel(), |device, random| {
            let (rows, chosen) = (1 + random.below(400), 1 + random.below(300));
            let mut expected: Vec<u32> = (0..rows).map(|_| random.next() as u32).collect();
            let tokens: Vec<u32> = (0..chosen).map(|_| random.next() as u32).collect();
            let ids = words(device, &expected);
            let mut pairs = Vec::new();
            for (row, id) in expected.iter_mut().enumerate() {
                let from = random.below(chosen + 5);
                match random.below(3) {
                    0 => {}
                    1 => pairs.extend([row as u32, u32::MAX]),
                    _ => {
                        pairs.extend([row as u32, from as u32]);
                        *id = tokens.get(from).copied().unwrap_or(*id);
                    }
                }
            }
            pairs.extend([rows as u32, 0]);
            let args = CarryTokensArgs {
                pairs: words(device, &pairs),
                count: pairs.len() as u32 / 2,
                tokens: words(device, &tokens),
                chosen: chosen as u32,
                ids,
                rows: rows as u32,
            };
            device.run(carry.kernel(), carry.launch(), &args.values())?;
            let found = device.download(ids);
            let expected: Vec<u8> = expected.iter().flat_map(|id| id.to_le_bytes()).collect();
            if found == expected { Ok(0.0) } else { Err("tokens are not where they should be".to_owned()) }
        });
    }
}
