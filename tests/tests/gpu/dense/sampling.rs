//! What is made of logits, against plain f64 that sorts: tokens chosen by temperature, top-k, top-p and min-p, biases and
//! penalties, log-probabilities, the likeliest of many.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::{Machine, Matrix};
use pagewise_attention::wgpu::shaders::model::candidates::{self, CandidatesArgs, CandidatesJob};
use pagewise_attention::wgpu::shaders::model::log_softmax::{
    self, LogSoftmaxArgs, LogSoftmaxJob, LogSoftmaxOut,
};
use pagewise_attention::wgpu::shaders::model::penalties::{self, Change, PenaltiesArgs, Rule};
use pagewise_attention::wgpu::shaders::model::sample::{self, Changed, SampleArgs, SampleJob};
use pagewise_runtime::sampling::Draw;
use std::collections::BTreeSet;

/// What no kernel may leave where it must write.
const POISON: u32 = 0xdead_beef;

/// Logits of every kind: few different ones, so that there are ties; spread out; with NaN, infinities and both zeros; all
/// the same; none usable.
fn logits(random: &mut Random, rows: usize, width: usize) -> Matrix {
    let kind = random.below(9);
    Matrix::new(random, rows, width, 1, |r| {
        let rare = r.below(20);
        let plain = match kind {
            0 => r.below(3) as f32 - 1.0,
            1 => r.below(40) as f32 / 4.0,
            2 => 30.0 * r.unit() as f32,
            3 => 2.5,
            4 => 1e30 * r.unit() as f32,
            5 => return f32::NAN,
            6 => return if rare == 0 { 1.0 } else { f32::NEG_INFINITY },
            // About a normal distribution, as models give.
            _ => (0..6).map(|_| 2.0 * r.unit() as f32).sum(),
        };
        match (kind, rare) {
            (3 | 8, _) => plain,
            (_, 0) => f32::NAN,
            (_, 1) => f32::NEG_INFINITY,
            (_, 2) => -0.0,
            (_, 3) => 0.0,
            (1, 4) => f32::INFINITY,
            _ => plain,
        }
    })
}

/// Vocabularies of every size; seldom the largest, which takes longest.
fn vocabulary(random: &mut Random) -> usize {
    match random.below(8) {
        0 => 1 + random.below(3),
        1 => random.pick(&[255, 256, 257, 512]),
        2 => 1 + random.below(6000),
        _ => 1 + random.below(600),
    }
}

/// The ids of a row that can be chosen, the likeliest first, lower ids first among equals.
fn ranked(row: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..row.len()).filter(|&id| row[id] > f64::NEG_INFINITY).collect();
    ids.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    ids
}

/// e^((x − max) / temperature)
fn weight(x: f64, max: f64, temperature: f64) -> f64 {
    if x == max { 1.0 } else { ((x - max) / temperature).exp() }
}

/// The token that the rules choose; `slack` moves what is compared: the random number, top-p and min-p.
fn chosen(row: &[f64], ranked: &[usize], job: &SampleJob, uniform: f64, slack: [f64; 3]) -> Option<u32> {
    let &best = ranked.first()?;
    if job.temperature == 0.0 || job.top_k == 1 {
        return Some(best as u32);
    }
    let weigh = |&id: &usize| (id, weight(row[id], row[best], f64::from(job.temperature)));
    let kept = match job.top_k as usize {
        0 => ranked.len(),
        k => k.min(ranked.len()),
    };
    let mut kept: Vec<(usize, f64)> = ranked[..kept].iter().map(weigh).collect();
    if job.top_p < 1.0 {
        let target = (f64::from(job.top_p) + slack[1]) * kept.iter().map(|(_, w)| w).sum::<f64>();
        let mut sum = 0.0;
        let crossing = kept.iter().position(|(_, w)| {
            sum += w;
            sum >= target
        });
        kept.truncate(crossing.map_or(kept.len(), |at| at + 1));
    }
    // The likeliest, which weighs 1, always stays.
    kept.retain(|&(_, w)| w == 1.0 || w >= f64::from(job.min_p) * (1.0 + slack[2]));
    kept.sort_by_key(|&(id, _)| id);
    let target = (uniform + slack[0]) * kept.iter().map(|(_, w)| w).sum::<f64>();
    let mut sum = 0.0;
    let found = kept.iter().find(|(_, w)| {
        sum += w;
        sum > target
    });
    found.or(kept.last()).map(|&(id, _)| id as u32)
}

/// How far the device's f32 weights move what is compared: a difference of up to 87 temperatures is rounded twice to
/// 2^-24 of itself, so that weights are off by some 1e-5 where they are small, and by less where they count.
const SLACK: f64 = 1e-5;

pub fn chosen_tokens(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    let (mut tokens, mut exact) = (0, 0);
    for case in 0..run_cases(12 * CASES) {
        let width = if case == 5 { sample::MAX_WIDTH as usize } else { vocabulary(&mut random) };
        let rows = if width > 10_000 { 1 } else { 1 + random.below(5) };
        let x = logits(&mut random, rows, width);
        // Some of the rows, in any order, each once.
        let mut picked: Vec<u32> = (0..rows as u32).filter(|_| rows == 1 || !random.one_in(4)).collect();
        if random.one_in(2) {
            picked.reverse();
        }
        if picked.is_empty() {
            continue;
        }
        let mut saved = vec![POISON; 3];
        let mut words = vec![POISON; 7];
        let mut changes = Vec::new();
        let jobs: Vec<SampleJob> = picked
            .iter()
            .enumerate()
            .map(|(index, &row)| {
                // A list of changes that says what the logits of some tokens were.
                let start = words.len() as u32;
                let listed: Vec<u32> = (0..width as u32).filter(|_| random.one_in(3)).take(400).collect();
                let listed = if random.one_in(2) { listed } else { Vec::new() };
                let changed = Changed { start, count: listed.len() as u32, saved: saved.len() as u32 };
                for &token in &listed {
                    words.extend([POISON, token, POISON, POISON]);
                    saved.push(!token);
                }
                changes.push(listed);
                SampleJob {
                    row,
                    temperature: random.pick(&[0.0, 1.0, 1.0, 0.7, 2.0, 30.0, 1e-3, 1e-38, 1e38]),
                    top_k: random.pick(&[0, 0, 0, 1, 2, 5, 50, width as u32, u32::MAX]),
                    top_p: random.pick(&[1.0, 1.0, 0.95, 0.9, 0.5, 0.1, 1e-12]),
                    min_p: random.pick(&[0.0, 0.0, 0.0, 0.05, 0.3, 1.0]),
                    seed: random.next(),
                    sample: random.next() as u32,
                    position: random.next() >> random.below(64),
                    changed,
                    out: random.one_in(2).then_some(2 * index as u32 + 1),
                }
            })
            .collect();
        let args = SampleArgs {
            count: jobs.len() as u32,
            width: width as u32,
            x: x.place,
            jobs: words.len() as u32,
            ids: 2,
        };
        words.extend(jobs.iter().flat_map(SampleJob::words));
        let (ids, out) = (vec![POISON; rows + 4], vec![POISON; 2 * rows + 2]);
        let workgroups = args.workgroups(if random.one_in(3) { 3 } else { 65_535 }).unwrap();
        let shader = sample::shader().unwrap();
        let tensors: [&[u32]; 5] = [&x.words, &words, &saved, &ids, &out];
        let mut after = machine.run_all(&shader, args.uniform(), workgroups, &tensors);
        let (out_after, ids_after) = (after.pop().unwrap(), after.pop().unwrap());
        let (mut want_ids, mut want_out) = (ids, out);
        for (job, listed) in jobs.iter().zip(&changes) {
            let label = format!("PAGEWISE_SEED={seed} case {case}: {job:?} of {args:?}");
            let row: Vec<f64> = (0..width).map(|column| x.get(job.row as usize, column)).collect();
            let ranked = ranked(&row);
            let uniform = Draw { seed: job.seed, sample: job.sample, position: job.position }.uniform();
            let choose = |slack| chosen(&row, &ranked, job, uniform, slack).unwrap_or(sample::NO_TOKEN);
            let got = ids_after[2 + job.row as usize];
            tokens += 1;
            if got == choose([0.0; 3]) {
                exact += 1;
            } else {
                let mut near = BTreeSet::new();
                for u in [-SLACK, 0.0, SLACK] {
                    for p in [-SLACK, 0.0, SLACK] {
                        near.extend([-SLACK, 0.0, SLACK].map(|m| choose([u, p, m])));
                    }
                }
                assert!(near.contains(&got), "{label}: {got} is none of {near:?}");
            }
            want_ids[2 + job.row as usize] = got;
            if let Some(at) = job.out {
                // As it was, where the token is in the list.
                let logit = match listed.contains(&got) {
                    true => !got,
                    false if got == sample::NO_TOKEN => out_after[at as usize],
                    false => x.words[x.index(job.row as usize, got as usize)],
                };
                want_out[at as usize] = logit;
            }
        }
        assert_eq!(ids_after, want_ids, "PAGEWISE_SEED={seed} case {case}: ids");
        assert_eq!(out_after, want_out, "PAGEWISE_SEED={seed} case {case}: logits of the chosen tokens");
    }
    // One in a thousand tokens lies within the slack of a line; more would be a bias.
    assert!(exact * 100 >= tokens * 97, "PAGEWISE_SEED={seed}: only {exact} of {tokens} tokens are exact");
}

pub fn log_probabilities(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for case in 0..run_cases(6 * CASES) {
        let width = if case == 5 { sample::MAX_WIDTH as usize } else { vocabulary(&mut random) };
        let rows = if width > 10_000 { 1 } else { 1 + random.below(5) };
        let x = logits(&mut random, rows, width);
        let jobs: Vec<LogSoftmaxJob> = (0..rows as u32)
            .map(|row| LogSoftmaxJob {
                row: rows as u32 - 1 - row,
                token: (!random.one_in(4)).then(|| random.below(width + 2) as u32),
                out: 5 * row + 1,
            })
            .collect();
        let args = LogSoftmaxArgs { count: jobs.len() as u32, width: width as u32, x: x.place, jobs: 2 };
        let mut words = vec![POISON; 2];
        words.extend(jobs.iter().flat_map(LogSoftmaxJob::words));
        let out = vec![POISON; 5 * rows + 1];
        let workgroups = args.workgroups(if random.one_in(3) { 3 } else { 65_535 }).unwrap();
        let after = machine.run(
            &log_softmax::shader().unwrap(),
            args.uniform(),
            workgroups,
            &[&x.words, &words, &out],
        );
        assert!((0..rows).all(|row| after[5 * row] == POISON), "something beside the answers was written");
        for job in &jobs {
            let label = format!("PAGEWISE_SEED={seed} case {case}: {job:?} of {args:?}");
            let at = job.out as usize;
            let got = LogSoftmaxOut::from_words(after[at..at + 4].try_into().unwrap());
            let row: Vec<f64> = (0..width).map(|column| x.get(job.row as usize, column)).collect();
            let ranked = ranked(&row);
            let max = ranked.first().map_or(f64::NEG_INFINITY, |&best| row[best]);
            let sum: f64 = ranked.iter().map(|&id| weight(row[id], max, 1.0)).sum();
            assert_eq!(f64::from(got.max), max, "{label}");
            // Each weight is within a few units of 2^-24, and 2^-44 is cut off it.
            let allowed = 2f64.powi(-20) * sum + width as f64 * 2f64.powi(-44);
            assert!((got.sum - sum).abs() <= allowed, "{label}: {} is not {sum}", got.sum);
            let token = job.token.filter(|&token| (token as usize) < width);
            let logit = token.map_or(f32::NEG_INFINITY.to_bits(), |token| {
                x.words[x.index(job.row as usize, token as usize)]
            });
            assert_eq!(got.logit.to_bits(), logit, "{label}");
        }
    }
}

pub fn likeliest_of_many(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for case in 0..run_cases(8 * CASES) {
        let width = if case == 5 { 200_000 } else { vocabulary(&mut random) };
        let rows = if width > 10_000 { 1 } else { 1 + random.below(5) };
        let x = logits(&mut random, rows, width);
        let (mut words, mut saved, mut at) = (vec![POISON; 3], vec![POISON; 2], 1);
        let mut changes = Vec::new();
        let jobs: Vec<CandidatesJob> = (0..rows as u32)
            .map(|row| {
                let count = random.pick(&[0, 1, 2, 5, 20, 130, width as u32, width as u32 + 3]).min(3000);
                let listed: Vec<u32> = (0..width as u32).filter(|_| random.one_in(5)).take(50).collect();
                let changed = Changed {
                    start: words.len() as u32,
                    count: listed.len() as u32,
                    saved: saved.len() as u32,
                };
                for &token in &listed {
                    words.extend([POISON, token, POISON, POISON]);
                    saved.push((token as f32 + 0.5).to_bits());
                }
                changes.push(listed);
                let out = at;
                at += candidates::out_words(count.min(width as u32)) as u32 + 1;
                CandidatesJob { row, count, changed, out }
            })
            .collect();
        let args = CandidatesArgs {
            count: jobs.len() as u32,
            width: width as u32,
            x: x.place,
            jobs: words.len() as u32,
        };
        words.extend(jobs.iter().flat_map(CandidatesJob::words));
        let out = vec![POISON; at as usize];
        let workgroups = args.workgroups(if random.one_in(3) { 3 } else { 65_535 }).unwrap();
        let shader = candidates::shader().unwrap();
        let after = machine.run(&shader, args.uniform(), workgroups, &[&x.words, &words, &saved, &out]);
        for (job, listed) in jobs.iter().zip(&changes) {
            let label = format!("PAGEWISE_SEED={seed} case {case}: {job:?} of {args:?}");
            let row: Vec<f64> = (0..width).map(|column| x.get(job.row as usize, column)).collect();
            let mut want = ranked(&row);
            want.truncate(job.count as usize);
            let mut got = candidates::found(&after[job.out as usize..]);
            got.sort_by(|a, b| b.logit.partial_cmp(&a.logit).unwrap().then(a.id.cmp(&b.id)));
            assert_eq!(got.iter().map(|c| c.id as usize).collect::<Vec<_>>(), want, "{label}");
            for candidate in got {
                assert_eq!(f64::from(candidate.logit), row[candidate.id as usize], "{label}");
                let before = match listed.contains(&candidate.id) {
                    true => candidate.id as f32 + 0.5,
                    false => candidate.logit,
                };
                assert_eq!(candidate.before, before, "{label}: as it was");
            }
            let end = job.out as usize + candidates::out_words(want.len() as u32);
            let past = after[end..].first().copied().unwrap_or(POISON);
            assert_eq!(past, POISON, "{label}: something behind the answer was written");
        }
    }
}

pub fn biases_and_penalties(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for case in 0..run_cases(6 * CASES) {
        let (rows, width) = (1 + random.below(5), vocabulary(&mut random));
        let x = logits(&mut random, rows, width);
        // The largest logit and the sum of a row, as log_softmax leaves them.
        let log_sums: Vec<(f32, f64)> =
            (0..rows).map(|_| (8.0 * random.unit() as f32, 1.0 + random.below(1000) as f64)).collect();
        let sums: Vec<u32> = log_sums
            .iter()
            .flat_map(|&(max, sum)| {
                let units = (sum * 2f64.powi(44)) as u64;
                [max.to_bits(), units as u32, (units >> 32) as u32, POISON]
            })
            .collect();
        let rules: Vec<Rule> = (0..rows as u32)
            .map(|row| Rule {
                row,
                repetition: random.pick(&[1.0, 1.2, 0.8, 3.0]),
                frequency: random.pick(&[0.0, 0.5, -1.5]),
                presence: random.pick(&[0.0, 0.25, -2.0]),
                sums: random.one_in(2).then_some(4 * row),
            })
            .collect();
        let mut words = vec![POISON; 1];
        let places: Vec<u32> = rules
            .iter()
            .map(|rule| {
                let at = words.len() as u32;
                words.extend(rule.words());
                at
            })
            .collect();
        let mut changes = Vec::new();
        for &rule in &places {
            let tokens: Vec<u32> = (0..width as u32 + 2).filter(|_| random.one_in(3)).take(300).collect();
            changes.extend(tokens.into_iter().map(|token| Change {
                rule,
                token,
                bias: random.pick(&[0.0, 0.0, 5.0, -100.0, 0.3]),
                times: (!random.one_in(3)).then(|| random.pick(&[0, 1, 2, 17])),
            }));
        }
        if changes.is_empty() {
            continue;
        }
        let args = PenaltiesArgs {
            count: changes.len() as u32,
            width: width as u32,
            x: x.place,
            changes: words.len() as u32,
            saved: 1,
        };
        words.extend(changes.iter().flat_map(Change::words));
        let saved = vec![POISON; changes.len() + 2];
        let workgroups = args.workgroups(if random.one_in(3) { 3 } else { 65_535 }).unwrap();
        let shader = penalties::shader().unwrap();
        let tensors: [&[u32]; 4] = [&x.words, &words, &sums, &saved];
        let mut after = machine.run_all(&shader, args.uniform(), workgroups, &tensors);
        let (saved_after, x_after) = (after.pop().unwrap(), after.swap_remove(0));
        let (mut want_saved, mut want) = (saved, x.words.clone());
        for (index, change) in changes.iter().enumerate() {
            let label = format!("PAGEWISE_SEED={seed} case {case}: {change:?} of {args:?}");
            if change.token as usize >= width {
                continue;
            }
            let rule = rules[places.iter().position(|&place| place == change.rule).unwrap()];
            let at = x.index(rule.row as usize, change.token as usize);
            want_saved[1 + index] = x.words[at];
            let before = f64::from(f32::from_bits(x.words[at]));
            if !before.is_finite() {
                continue;
            }
            let (max, sum) = log_sums[rule.row as usize];
            let normaliser = if rule.sums.is_some() { f64::from(max) + sum.ln() } else { 0.0 };
            let mut value = before - normaliser + f64::from(change.bias);
            let mut size = before.abs() + normaliser.abs() + f64::from(change.bias).abs();
            if let Some(times) = change.times {
                let repetition = f64::from(rule.repetition);
                // At 0 both ways give the same; next to it roundings may go either way.
                value = if value > 0.0 { value / repetition } else { value * repetition };
                size *= repetition.max(1.0 / repetition);
                if times > 0 {
                    let subtracted = f64::from(rule.frequency) * f64::from(times) + f64::from(rule.presence);
                    value -= subtracted;
                    size += subtracted.abs();
                }
            }
            value += normaliser;
            let got = f64::from(f32::from_bits(x_after[at]));
            // Some ten roundings of what went in, among them a division and a logarithm of 3 units.
            let allowed = 16.0 * 2f64.powi(-24) * size + 1e-6 * f64::from(u8::from(rule.sums.is_some()));
            assert!((got - value).abs() <= allowed, "{label}: {before} became {got}, not {value}");
            want[at] = x_after[at];
        }
        assert_eq!(saved_after, want_saved, "PAGEWISE_SEED={seed} case {case}: logits as they were");
        assert!(want == x_after, "PAGEWISE_SEED={seed} case {case}: something else was changed");
    }
}
