//! The sampler against the plain formulas in f64, with a full sort, and against the frequencies that they
//! predict.

use super::{Draw, NoUsableLogit, Sampler, TokenCounts};
use crate::request::SamplingParams;

/// Probability of every token, or `None` where the top-p cut is too close to call in f32.
fn plain(row: &[f32], params: &SamplingParams, prompt: &[u32], completion: &[u32]) -> Option<Vec<f64>> {
    let mut logits: Vec<f64> =
        row.iter().map(|&l| if l.is_nan() { f64::NEG_INFINITY } else { f64::from(l) }).collect();
    for &(id, bias) in &params.logit_bias {
        logits[id as usize] += f64::from(bias);
    }
    for (id, logit) in logits.iter_mut().enumerate() {
        let occurrences = completion.iter().filter(|&&token| token as usize == id).count();
        if occurrences > 0 || prompt.contains(&(id as u32)) {
            let penalty = f64::from(params.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        *logit -= f64::from(params.frequency_penalty) * occurrences as f64;
        *logit -= if occurrences > 0 { f64::from(params.presence_penalty) } else { 0.0 };
    }
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    if params.temperature == 0.0 {
        let mut probabilities = vec![0.0; row.len()];
        probabilities[order[0]] = 1.0;
        return Some(probabilities);
    }
    let max = logits[order[0]];
    let mut weights: Vec<f64> =
        logits.iter().map(|&l| ((l - max) / f64::from(params.temperature)).exp()).collect();
    if params.top_k > 0 {
        order.iter().skip(params.top_k).for_each(|&id| weights[id] = 0.0);
    }
    if params.top_p < 1.0 {
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        for &id in &order {
            let share = sum / total;
            // The error of f32 weights, see TOLERANCE.
            if (share - f64::from(params.top_p)).abs() < TOLERANCE {
                return None;
            }
            sum += weights[id];
            if share >= f64::from(params.top_p) {
                weights[id] = 0.0;
            }
        }
    }
    for weight in &mut weights {
        let apart = (*weight - f64::from(params.min_p)).abs();
        if apart > 0.0 && apart < TOLERANCE && params.min_p > 0.0 {
            return None;
        }
        if *weight < f64::from(params.min_p) {
            *weight = 0.0;
        }
    }
    let total: f64 = weights.iter().sum();
    Some(weights.into_iter().map(|weight| weight / total).collect())
}

/// A weight is exp(x) in f32 with x rounded: relative error |x| · 2⁻²⁴ and a few units of the last place. For
/// the weights that matter |x| < 20.
const TOLERANCE: f64 = 1e-5;

struct Numbers(Draw);

impl Numbers {
    fn uniform(&mut self) -> f64 {
        self.0.position += 1;
        self.0.uniform()
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.uniform() * of.len() as f64) as usize]
    }
}

fn case(number: u64) -> (Vec<f32>, SamplingParams, Vec<u32>, Vec<u32>) {
    let mut numbers = Numbers(Draw { seed: number, sample: 9, position: 0 });
    let vocab = numbers.pick(&[1usize, 2, 10, 50, 1000]);
    let spread = numbers.pick(&[0.1, 4.0, 30.0]);
    let mut row: Vec<f32> = (0..vocab).map(|_| ((numbers.uniform() - 0.5) * spread) as f32).collect();
    if numbers.pick(&[false, true]) {
        // Ties, and logits that are none.
        for logit in row.iter_mut().skip(1) {
            *logit = numbers.pick(&[*logit, *logit, 0.25, -0.0, 0.0, f32::NEG_INFINITY, f32::NAN]);
        }
    }
    let mut token = || (numbers.uniform() * vocab as f64) as u32;
    let prompt = vec![token(), token()];
    let completion = vec![token(), token(), token()];
    let biased = token();
    let params = SamplingParams {
        temperature: numbers.pick(&[0.0, 0.3, 1.0, 1.0, 2.5]),
        top_k: numbers.pick(&[0, 0, 1, 3, 40, 5000]),
        top_p: numbers.pick(&[1.0, 1.0, 0.95, 0.5, 0.01]),
        min_p: numbers.pick(&[0.0, 0.0, 0.05, 1.0]),
        repetition_penalty: numbers.pick(&[1.0, 1.0, 1.2, 0.8]),
        presence_penalty: numbers.pick(&[0.0, 0.0, 0.7, -0.7]),
        frequency_penalty: numbers.pick(&[0.0, 0.0, 0.4]),
        logit_bias: if numbers.pick(&[true, false, false]) { vec![(biased, 2.5)] } else { vec![] },
        ..Default::default()
    };
    (row, params, prompt, completion)
}

#[test]
fn picks_what_the_plain_formulas_pick() {
    let mut sampler = Sampler::default();
    let mut judged = 0;
    for number in 0..2000 {
        let (row, params, prompt, completion) = case(number);
        let Some(expected) = plain(&row, &params, &prompt, &completion) else { continue };
        let mut counts = TokenCounts::new(&prompt, &params);
        completion.iter().for_each(|&token| counts.push(token));
        for position in 0..50 {
            let draw = Draw { seed: number, sample: 0, position };
            let found = sampler.sample(&row, &params, &counts, draw).unwrap() as usize;
            assert!(expected[found] > 0.0, "case {number}: token {found} was filtered; {params:?}");
            // The token whose stretch of the cumulated probabilities holds the random number.
            let before: f64 = expected[..found].iter().sum();
            let u = draw.uniform();
            assert!(
                before - TOLERANCE <= u && u <= before + expected[found] + TOLERANCE,
                "case {number}, position {position}: token {found}; {params:?}"
            );
            judged += 1;
        }
    }
    assert!(judged > 50_000, "only {judged} draws could be judged");
}

#[test]
fn frequencies_are_the_probabilities() {
    let base = || SamplingParams { temperature: 1.5, ..Default::default() };
    let filters = [
        base(),
        SamplingParams { top_k: 7, ..base() },
        SamplingParams { top_p: 0.7, ..base() },
        SamplingParams { min_p: 0.2, ..base() },
        SamplingParams { top_k: 20, top_p: 0.9, min_p: 0.1, logit_bias: vec![(4, 1.0)], ..base() },
    ];
    for (number, params) in (0u64..).zip(filters) {
        let mut numbers = Numbers(Draw { seed: number, sample: 2, position: 0 });
        let row: Vec<f32> = (0..30).map(|_| (numbers.uniform() * 6.0) as f32).collect();
        let expected = plain(&row, &params, &[], &[]).unwrap();
        let draws = 40_000;
        let counts = TokenCounts::new(&[], &params);
        let mut sampler = Sampler::default();
        let mut seen = vec![0u32; row.len()];
        for position in 0..draws {
            let draw = Draw { seed: 5, sample: number as u32, position };
            seen[sampler.sample(&row, &params, &counts, draw).unwrap() as usize] += 1;
        }
        let (mut chi2, mut cells) = (0.0, 0.0);
        for (&p, &count) in expected.iter().zip(&seen) {
            let mean = p * draws as f64;
            assert!(p > 0.0 || count == 0);
            // The approximation by chi-square wants at least five in a cell.
            if mean >= 5.0 {
                chi2 += (f64::from(count) - mean).powi(2) / mean;
                cells += 1.0;
            }
        }
        // Mean and five standard deviations of the distribution with this many degrees of freedom.
        assert!(
            chi2 <= cells + 5.0 * (2.0 * f64::max(cells, 1.0)).sqrt(),
            "case {number}: {chi2} in {cells} cells"
        );
    }
}

#[test]
fn a_large_vocabulary_is_cut_right() {
    // Top-p alone, so flat that the nucleus has thousands of tokens, and so peaked that it has one.
    let mut sampler = Sampler::default();
    for (number, spread) in [(0u64, 0.5), (1, 6.0), (2, 200.0)] {
        let mut numbers = Numbers(Draw { seed: number, sample: 1, position: 0 });
        let row: Vec<f32> = (0..150_000).map(|_| (numbers.uniform() * spread) as f32).collect();
        let params = SamplingParams { top_p: 0.9, ..Default::default() };
        let expected = plain(&row, &SamplingParams { top_p: 1.0, ..params.clone() }, &[], &[]).unwrap();
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let mut rank = vec![0; row.len()];
        let mut cumulated = vec![0.0; row.len()];
        let mut sum = 0.0;
        for (place, &id) in order.iter().enumerate() {
            rank[id] = place;
            cumulated[place] = sum;
            sum += expected[id];
        }
        let mut deepest: f64 = 0.0;
        for position in 0..200 {
            let draw = Draw { seed: 1, sample: 0, position };
            let counts = TokenCounts::default();
            let token = sampler.sample(&row, &params, &counts, draw).unwrap() as usize;
            deepest = deepest.max(cumulated[rank[token]]);
        }
        assert!(deepest < 0.9 + TOLERANCE, "spread {spread}: a token from {deepest}");
        assert!(spread > 100.0 || deepest > 0.8, "spread {spread}: none beyond {deepest}");
    }
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let mut sampler = Sampler::default();
    let mut greedy = |row: &[f32]| {
        sampler.sample(row, &params, &TokenCounts::default(), Draw { seed: 0, sample: 0, position: 0 })
    };
    assert_eq!(greedy(&[1.0, 3.0, f32::NAN, 3.0]), Ok(1));
    assert_eq!(greedy(&[f32::NEG_INFINITY, -0.0, 0.0]), Ok(1));
    assert_eq!(greedy(&[f32::NAN, f32::NEG_INFINITY, f32::MIN]), Ok(2));
    assert_eq!(greedy(&[0.0, f32::INFINITY]), Ok(1));
    // The largest may stand anywhere in the vector lanes or in the rest.
    for len in [31, 32, 33, 100] {
        for place in 0..len {
            let mut row = vec![-1.0; len];
            row[place] = 2.0;
            assert_eq!(greedy(&row), Ok(place as u32));
        }
    }
}

#[test]
fn rows_without_a_usable_logit_are_an_error() {
    let mut sampler = Sampler::default();
    for row in [vec![f32::NAN; 40], vec![f32::NEG_INFINITY; 3], vec![f32::NAN, f32::NEG_INFINITY], vec![]] {
        for temperature in [0.0, 1.0] {
            let params = SamplingParams { temperature, top_p: 0.5, top_k: 2, ..Default::default() };
            let draw = Draw { seed: 0, sample: 0, position: 0 };
            assert_eq!(sampler.sample(&row, &params, &TokenCounts::default(), draw), Err(NoUsableLogit));
        }
    }
}

#[test]
fn extreme_logits_and_temperatures_choose_sensibly() {
    let mut sampler = Sampler::default();
    let mut sample = |row: &[f32], temperature: f32, position| {
        let params = SamplingParams { temperature, top_p: 0.9, min_p: 0.01, ..Default::default() };
        sampler.sample(row, &params, &TokenCounts::default(), Draw { seed: 3, sample: 0, position }).unwrap()
    };
    for position in 0..100 {
        // So cold that logits divided by it would overflow.
        assert_eq!(sample(&[1e30, 2e30, 1.0], 1e-38, position), 1);
        assert_eq!(sample(&[f32::MIN, f32::MAX, f32::NAN], 1.0, position), 1);
        assert_ne!(sample(&[f32::INFINITY, 3.0, f32::INFINITY], 1.0, position), 1);
        assert_eq!(sample(&[f32::NEG_INFINITY, f32::MIN], 1e30, position), 1);
    }
}
