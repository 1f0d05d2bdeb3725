//! Tokens chosen from logits: penalties, draws, the likeliest.

use pagewise_attention::DType;
use pagewise_attention::cuda::ptx::model::argmax::NO_TOKEN;
use pagewise_attention::cuda::ptx::model::penalize::{
    Direction, NOT_HELD, Penalize, PenalizeArgs, PenalizeSpec,
};
use pagewise_attention::cuda::ptx::model::sample::{RowDraw, Sample, SampleArgs, SampleSpec};
use pagewise_attention::cuda::ptx::model::top_candidates::{
    MOST, TopCandidates, TopCandidatesArgs, TopCandidatesSpec,
};

use super::super::random::Random;
use super::Run;
use super::logits::logits;
use super::tensor::{F32, Tensor, vector, words};

/// Tokens that can be chosen at all, the best first: a plain sort.
fn ranked(row: &[f64]) -> Vec<usize> {
    let mut tokens: Vec<usize> = (0..row.len()).filter(|&token| row[token] > f64::NEG_INFINITY).collect();
    tokens.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    tokens
}

/// What a draw may give, by the rules as they are written: f64, a sort, sums. Those are tokens whose stretch of the whole
/// sum is within `slack` of the uniform number.
fn drawn(row: &[f64], ranked: &[usize], draw: &RowDraw, [share, part, slack]: [f64; 3]) -> Vec<usize> {
    let best = row[ranked[0]];
    let weight = |token: usize| {
        if row[token] == best { 1.0 } else { ((row[token] - best) / f64::from(draw.temperature)).exp() }
    };
    let mut kept = ranked.to_vec();
    if draw.top_k > 0 {
        kept.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let target = share * kept.iter().map(|&token| weight(token)).sum::<f64>();
        let mut sum = 0.0;
        let end = kept.iter().position(|&token| {
            sum += weight(token);
            sum >= target
        });
        kept.truncate(end.map_or(kept.len(), |end| end + 1));
    }
    kept.retain(|&token| weight(token) >= part);
    kept.sort_unstable();
    let total = kept.iter().map(|&token| weight(token)).sum::<f64>();
    let mut sum = 0.0;
    let near = |&&token: &&usize| {
        let start = sum / total;
        sum += weight(token);
        weight(token) > 0.0 && start <= draw.uniform + slack && sum / total >= draw.uniform - slack
    };
    kept.iter().filter(near).copied().collect()
}

/// Whether a draw may give this token: what the rules give for some shares as close to those asked for as the f32
/// weights are to the exact ones. An exponent of at most 31, below which a weight is below the unit of the sums, is
/// rounded twice, and the exponential is within 2 units of the last place: 64 · 2^-24 in all.
fn may_give(row: &[f64], ranked: &[usize], draw: &RowDraw, token: u32) -> Result<(), String> {
    if ranked.is_empty() {
        return if token == NO_TOKEN { Ok(()) } else { Err(format!("{token} has no logit")) };
    }
    let near = |x: f64| [x, x * (1.0 - 64.0 * F32), x * (1.0 + 64.0 * F32)];
    let mut given = Vec::new();
    for share in near(f64::from(draw.top_p)) {
        for part in near(f64::from(draw.min_p)) {
            // Nothing weighs more than the best one.
            let found = drawn(row, ranked, draw, [share, part.min(1.0), 64.0 * F32]);
            if found.contains(&(token as usize)) {
                return Ok(());
            }
            given.push(found);
        }
    }
    given.dedup();
    Err(format!("{draw:?} of {} logits: expected one of {given:?}, found {token}", row.len()))
}

fn row_of(logits: &Tensor, row: usize) -> Vec<f64> {
    (0..logits.width).map(|token| logits.get(row, token)).collect()
}

fn random_draw(random: &mut Random, row: usize) -> RowDraw {
    RowDraw {
        row: row as u32,
        temperature: random.pick(&[1e-3, 0.3, 1.0, 1.0, 3.0, 1e30]),
        top_k: random.pick(&[0, 0, 1, 2, 5, 40, 300, 900, 1500, u32::MAX]),
        top_p: random.pick(&[1.0, 1.0, 0.999, 0.9, 0.5, 1e-9]),
        min_p: random.pick(&[0.0, 0.0, 0.05, 0.7, 1.0]),
        uniform: if random.one_in(5) {
            random.pick(&[0.0, 1.0 - 1.0 / (1u64 << 53) as f64])
        } else {
            (random.unit() + 1.0) / 2.0
        },
    }
}

fn tokens_at(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

pub fn run(run: &mut Run<'_>) {
    let small = run.small;
    // A block's threads read 8192 logits at a time: some rows are longer than that.
    let most: &[usize] = if small { &[10, 3000, 20_000] } else { &[3000, 70_000, 262_144] };
    for spec in PenalizeSpec::all() {
        let penalize = Penalize::new(spec).unwrap();
        run.variant(penalize.kernel(), |device, random| {
            let mut logits = logits(random, 1, &[10, 3000]);
            let (rows, vocab) = (logits.rows, logits.width);
            let factor = |random: &mut Random| {
                [random.pick(&[1.0, 1.3, 0.5]), random.pick(&[0.0, -2.0, 0.7]), random.pick(&[0.0, 0.3])]
            };
            let factors: Vec<[f32; 3]> = (0..rows).map(|_| factor(random)).collect();
            let mut changes = Vec::new();
            for row in 0..rows {
                let step = 1 + random.below(5);
                for token in (random.below(4)..vocab).step_by(step) {
                    let bias = random.pick(&[0.0f32, 1.5, -100.0]);
                    let times = random.pick(&[NOT_HELD, 0, 1, 7]);
                    changes.push([row as u32, token as u32, bias.to_bits(), times]);
                }
            }
            changes.extend([[rows as u32, 0, 0, 0], [0, vocab as u32, 0, 0]]);
            let saves = random.one_in(2);
            let args = PenalizeArgs {
                logits: logits.upload(device),
                rows: rows as u32,
                vocab: vocab as u32,
                changes: words(device, changes.as_flattened()),
                count: changes.len() as u32,
                factors: vector(device, factors.as_flattened()),
                saved: if saves { words(device, &vec![u32::MAX; changes.len()]) } else { 0 },
                direction: Direction::Forth,
            };
            let launch = penalize.launch(args.count).unwrap();
            device.run(penalize.kernel(), launch, &args.values())?;
            let mut changed: Vec<Vec<Option<[u32; 4]>>> = vec![vec![None; vocab]; rows];
            for &change in &changes[..changes.len() - 2] {
                changed[change[0] as usize][change[1] as usize] = Some(change);
            }
            let worst = logits.compare(device, |row, token| {
                let logit = logits.get(row, token);
                let Some([_, _, bias, times]) = changed[row][token] else { return (logit, 0.0) };
                let [repetition, presence, frequency] = factors[row].map(f64::from);
                let biased = logit + f64::from(f32::from_bits(bias));
                if times == NOT_HELD {
                    return (biased, F32 * biased.abs());
                }
                let scaled = if biased > 0.0 { biased / repetition } else { biased * repetition };
                let taken = if times == 0 { 0.0 } else { frequency * f64::from(times) + presence };
                // Each of the operations rounds once; a penalty of two factors twice.
                (scaled - taken, 3.0 * F32 * (2.0 * biased.abs() + scaled.abs() + taken.abs() + 4.0))
            })?;
            if saves {
                let args = PenalizeArgs { direction: Direction::Back, ..args };
                device.run(penalize.kernel(), launch, &args.values())?;
                logits.compare(device, |row, token| (logits.get(row, token), 0.0))?;
            }
            Ok(worst)
        });
    }
    for spec in SampleSpec::all() {
        let sample = Sample::new(spec).unwrap();
        run.variant(sample.kernel(), |device, random| {
            let mut logits = logits(random, spec.vector, most);
            let (rows, vocab) = (logits.rows, logits.width);
            // Of some rows only: the others' tokens stay.
            let mut draws: Vec<RowDraw> = Vec::new();
            for row in 0..rows {
                if rows == 1 || !random.one_in(4) {
                    draws.push(random_draw(random, row));
                }
            }
            let values: Vec<Vec<f64>> = (0..rows).map(|row| row_of(&logits, row)).collect();
            let orders: Vec<Vec<usize>> = values.iter().map(|row| ranked(row)).collect();
            let view = logits.upload(device);
            let mut rounds = vec![draws];
            if !small {
                let more = if vocab > 5000 { 3 } else { 40 };
                rounds.extend((0..more).map(|_| (0..rows).map(|row| random_draw(random, row)).collect()));
            }
            for draws in rounds.iter().filter(|draws| !draws.is_empty()) {
                let bytes: Vec<u8> = draws.iter().flat_map(RowDraw::bytes).collect();
                let args = SampleArgs {
                    logits: view,
                    vocab: vocab as u32,
                    draws: device.upload(&bytes),
                    tokens: words(device, &vec![NO_TOKEN - 1; rows]),
                };
                let launch = sample.launch(draws.len() as u32, vocab as u32).unwrap();
                device.run(sample.kernel(), launch, &args.values())?;
                let tokens = tokens_at(&device.download(args.tokens));
                for (row, &token) in tokens.iter().enumerate().take(rows) {
                    match draws.iter().find(|draw| draw.row as usize == row) {
                        Some(draw) => may_give(&values[row], &orders[row], draw, token)?,
                        None if token == NO_TOKEN - 1 => {}
                        None => return Err(format!("row {row} was not drawn from, and became {token}")),
                    }
                }
            }
            logits.compare(device, |row, token| (logits.get(row, token), 0.0))
        });
    }
    for spec in TopCandidatesSpec::all() {
        let top = TopCandidates::new(spec).unwrap();
        run.variant(top.kernel(), |device, random| {
            let mut logits = logits(random, spec.vector, most);
            let (rows, vocab) = (logits.rows, logits.width);
            let most = random.pick(&[1, 2, 5, 31, 33, 200, MOST as usize]);
            let mut wanted: Vec<[u32; 2]> = Vec::new();
            for row in 0..rows {
                let count = if random.one_in(2) { most + random.below(2) } else { random.below(most + 1) };
                wanted.extend((rows == 1 || !random.one_in(4)).then_some([row as u32, count as u32]));
            }
            if wanted.is_empty() {
                wanted.push([0, 1]);
            }
            let places = wanted.len() * most;
            let mut values = Tensor::poisoned(random, DType::F32, 1, places, 1);
            let args = TopCandidatesArgs {
                logits: logits.upload(device),
                vocab: vocab as u32,
                wanted: words(device, wanted.as_flattened()),
                most: most as u32,
                tokens: words(device, &vec![7; places]),
                values: values.upload(device).address,
            };
            let launch = top.launch(wanted.len() as u32, vocab as u32, most as u32).unwrap();
            device.run(top.kernel(), launch, &args.values())?;
            let tokens = tokens_at(&device.download(args.tokens));
            let mut expected = Vec::new();
            for &[row, count] in &wanted {
                let row = row_of(&logits, row as usize);
                let mut best: Vec<(u32, f64)> = ranked(&row)
                    .into_iter()
                    .take((count as usize).min(most))
                    .map(|token| (token as u32, row[token]))
                    .collect();
                best.resize(most, (NO_TOKEN, f64::NEG_INFINITY));
                expected.extend(best);
            }
            for (place, (found, (token, _))) in tokens.iter().zip(&expected).enumerate() {
                if found != token {
                    let (list, rank) = (place / most, place % most);
                    return Err(format!(
                        "{:?} of {vocab}, rank {rank}: expected {token}, found {found}",
                        wanted[list]
                    ));
                }
            }
            values.compare(device, |_, place| (expected[place].1, 0.0))
        });
    }
}
