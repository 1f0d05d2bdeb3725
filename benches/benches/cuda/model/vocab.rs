//! What is done with rows of logits: the likeliest token, log-probabilities, draws, penalties.

use pagewise_attention::cuda::ptx::model::Rows;
use pagewise_attention::cuda::ptx::model::argmax::{Argmax, ArgmaxArgs, ArgmaxSpec};
use pagewise_attention::cuda::ptx::model::log_softmax::{LogSoftmax, LogSoftmaxArgs, LogSoftmaxSpec};
use pagewise_attention::cuda::ptx::model::penalize::{Direction, Penalize, PenalizeArgs, PenalizeSpec};
use pagewise_attention::cuda::ptx::model::sample::{RowDraw, Sample, SampleArgs, SampleSpec};
use pagewise_attention::cuda::ptx::model::top_candidates::{
    TopCandidates, TopCandidatesArgs, TopCandidatesSpec,
};
use pagewise_attention::cuda::ptx::model::vocab::blocks;
use serde_json::json;

use super::Bench;

impl Bench<'_, '_> {
    pub fn logits(&mut self, wanted: &impl Fn(&str) -> bool) {
        let (x, out, scratch) =
            (self.gpu.address(&self.x), self.gpu.address(&self.out), self.gpu.address(&self.scratch));
        for (rows, vocab) in [(1, 49_152), (1, 128_256), (8, 128_256), (1, 256_000)] {
            for dependent in [false, true] {
                let end = format!("{rows}x{vocab}{}", if dependent { " pdl" } else { "" });
                let bytes = f64::from(rows * vocab * 4);
                let logits = Rows { address: x, stride: u64::from(vocab) };
                let tickets = scratch + (1 << 20);
                if wanted(&format!("argmax {end}")) {
                    let argmax = Argmax::new(ArgmaxSpec { vector: 4, dependent }).unwrap();
                    let launch = argmax.launch(rows, vocab).unwrap();
                    let function = self.function(argmax.kernel());
                    let args =
                        ArgmaxArgs { logits, vocab, keys: scratch, tickets, tokens: out, best: out + 4096 };
                    let us = self.gpu.time(64, |_| self.launch(&function, dependent, launch, &args.values()));
                    self.note(
                        format!("argmax {end}"),
                        argmax.kernel(),
                        us,
                        bytes,
                        json!({ "grid": launch.grid[0] }),
                    );
                }
                if wanted(&format!("log_softmax {end}")) {
                    let softmax = LogSoftmax::new(LogSoftmaxSpec { vector: 4, dependent }).unwrap();
                    let launch = softmax.launch(rows, vocab).unwrap();
                    let function = self.function(softmax.kernel());
                    let args = LogSoftmaxArgs {
                        logits,
                        vocab,
                        partial: scratch + (2 << 20),
                        tickets,
                        ids: scratch + (4 << 20),
                        count: 1,
                        out,
                        stats: 0,
                    };
                    assert!(8 * rows * blocks(vocab) < 2 << 20);
                    let us = self.gpu.time(64, |_| self.launch(&function, dependent, launch, &args.values()));
                    self.note(
                        format!("log_softmax {end}"),
                        softmax.kernel(),
                        us,
                        bytes,
                        json!({ "grid": launch.grid[0] }),
                    );
                }
            }
        }
    }

    /// Draws with each filter, and the likeliest tokens, of logits whose tail is exponential: a few tokens have most of the
    /// weight, and all of them some.
    pub fn choices(&mut self, wanted: &impl Fn(&str) -> bool) {
        let (out, scratch) = (self.gpu.address(&self.out), self.gpu.address(&self.scratch));
        let (most_rows, vocab) = (64u32, 128_256u32);
        let logits: Vec<u8> = (0..u64::from(most_rows * vocab))
            .flat_map(|i| {
                // Hashed to a uniform number; its logarithm makes the tail of an exponential distribution.
                let hash = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let uniform = ((hash >> 40) as f32 + 0.5) / (1 << 24) as f32;
                (-uniform.ln() * 1.2 - 8.0).to_le_bytes()
            })
            .collect();
        let logits = self.gpu.stream.clone_htod(&logits).unwrap();
        let view = Rows { address: self.gpu.address(&logits), stride: u64::from(vocab) };
        let ways = [("temperature", 0, 1.0, 0.0), ("min-p", 0, 1.0, 0.1), ("top-k 50", 50, 1.0, 0.0)];
        let ways =
            [ways.as_slice(), &[("top-p 0.9", 0, 0.9, 0.0), ("top-k 50 top-p 0.9", 50, 0.9, 0.0)]].concat();
        for rows in [1, 8, most_rows] {
            let bytes = f64::from(rows) * f64::from(vocab) * 4.0;
            for &(name, top_k, top_p, min_p) in &ways {
                let full = format!("sample {rows}x{vocab} {name}");
                if !wanted(&full) {
                    continue;
                }
                let draw = |row: u32| RowDraw {
                    row,
                    temperature: 0.8,
                    top_k,
                    top_p,
                    min_p,
                    uniform: f64::from(row * 37 % 64) / 64.0,
                };
                let draws: Vec<u8> = (0..rows).flat_map(|row| draw(row).bytes()).collect();
                let draws = self.gpu.stream.clone_htod(&draws).unwrap();
                let sample = Sample::new(SampleSpec { vector: 4, dependent: false }).unwrap();
                let launch = sample.launch(rows, vocab).unwrap();
                let function = self.function(sample.kernel());
                let args =
                    SampleArgs { logits: view, vocab, draws: self.gpu.address(&draws), tokens: scratch };
                let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
                self.note(full, sample.kernel(), us, bytes, json!({ "grid": launch.grid[0] }));
            }
            for most in [1, 20, 1000] {
                let full = format!("top_candidates {rows}x{vocab} {most}");
                if !wanted(&full) {
                    continue;
                }
                let lists: Vec<u8> =
                    (0..rows).flat_map(|row| [row, most]).flat_map(u32::to_le_bytes).collect();
                let lists = self.gpu.stream.clone_htod(&lists).unwrap();
                let top = TopCandidates::new(TopCandidatesSpec { vector: 4, dependent: false }).unwrap();
                let launch = top.launch(rows, vocab, most).unwrap();
                let function = self.function(top.kernel());
                let args = TopCandidatesArgs {
                    logits: view,
                    vocab,
                    wanted: self.gpu.address(&lists),
                    most,
                    tokens: scratch,
                    values: out,
                };
                let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
                self.note(full, top.kernel(), us, bytes, json!({ "grid": launch.grid[0] }));
            }
        }
        let full = format!("penalize {most_rows}x1000");
        if wanted(&full) {
            let count = most_rows * 1000;
            let changes: Vec<u8> = (0..count)
                .flat_map(|i| [i / 1000, i % 1000 * 127, 0, 1])
                .flat_map(u32::to_le_bytes)
                .collect();
            let changes = self.gpu.stream.clone_htod(&changes).unwrap();
            let penalize = Penalize::new(PenalizeSpec { dependent: false }).unwrap();
            let launch = penalize.launch(count).unwrap();
            let function = self.function(penalize.kernel());
            // Penalties that change nothing, however often.
            let factors: Vec<u8> =
                (0..most_rows).flat_map(|_| [1.0f32, 0.0, 0.0]).flat_map(f32::to_le_bytes).collect();
            let factors = self.gpu.stream.clone_htod(&factors).unwrap();
            let args = PenalizeArgs {
                logits: view,
                rows: most_rows,
                vocab,
                changes: self.gpu.address(&changes),
                count,
                factors: self.gpu.address(&factors),
                saved: out,
                direction: Direction::Forth,
            };
            let us = self.gpu.time(16, |_| self.launch(&function, false, launch, &args.values()));
            // A sector of 32 bytes for each logit, read and written.
            self.note(full, penalize.kernel(), us, f64::from(count) * (16.0 + 64.0 + 4.0), json!({}));
        }
    }
}
