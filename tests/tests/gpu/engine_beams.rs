//! Beam search as it is defined, over a machine's logits: what some tokens score, and how close a search's choices were.

use pagewise_runtime::request::Request;

use super::engine_machine::{Machine, rows_alone};

/// Log-probabilities of a row of logits.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
    row.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
}

/// The mean log-probability of some tokens behind a prompt.
pub fn score(machine: &mut Machine, prompt: &[u32], tokens: &[u32]) -> f64 {
    let text = [prompt, tokens].concat();
    let rows = rows_alone(machine, &[text]).remove(0);
    let each = tokens.iter().zip(&rows[prompt.len() - 1..]);
    each.map(|(&token, row)| log_softmax(row)[token as usize]).sum::<f64>() / tokens.len() as f64
}

/// The least distance between the last beam that a search without end-of-sequence tokens kept and the first that it
/// dropped, over all of its steps.
pub fn least_gap(machine: &mut Machine, request: &Request) -> f64 {
    let width = request.params.beam_width.unwrap_or(1);
    let mut beams = vec![(0.0, request.prompt.clone())];
    let mut least = f64::INFINITY;
    for _ in 0..request.params.max_tokens {
        let texts: Vec<Vec<u32>> = beams.iter().map(|(_, text)| text.clone()).collect();
        let rows = rows_alone(machine, &texts);
        let mut all: Vec<(f64, usize, u32)> = Vec::new();
        for (index, ((sum, _), rows)) in beams.iter().zip(&rows).enumerate() {
            let next = log_softmax(&rows[rows.len() - 1]);
            all.extend(next.iter().enumerate().map(|(token, x)| (sum + x, index, token as u32)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        least = least.min(all[width - 1].0 - all[width].0);
        let longer =
            |&(sum, index, token): &(f64, usize, u32)| (sum, [&beams[index].1[..], &[token]].concat());
        beams = all[..width].iter().map(longer).collect();
    }
    least
}
