//! Inputs of a `merge_states` case.

use super::super::subject::{MergePart, MergeTask};
use super::super::{Buffer, Case, Random};

/// Inputs of a `merge_states` case.
#[derive(Clone, Debug)]
pub struct MergeData {
    /// Query rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Outputs and LSE of each part.
    pub parts: Vec<(Buffer, Vec<f32>)>,
}

impl MergeData {
    /// Makes the data of a case.
    pub fn generate(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let rows: usize = case.sequences.iter().map(|shape| shape.queries).sum();
        let (heads, head_dim) = (case.q_heads, case.head_dim_v);
        let reach = f64::from(case.scores);
        // Some rows are empty in every part.
        let dead: Vec<bool> = (0..rows * heads).map(|_| random.one_in(9)).collect();
        let part = |random: &mut Random| {
            let mut out = Buffer::poisoned(case.q_dtype, rows * heads * head_dim, random);
            let mut lse = vec![f32::NEG_INFINITY; rows * heads];
            for row in 0..rows * heads {
                if dead[row] || random.one_in(4) {
                    // The outputs of an empty part are zeros.
                    (0..head_dim).for_each(|d| out.set(row * head_dim + d, 0.0));
                    continue;
                }
                lse[row] = random.uniform(-reach, reach) as f32;
                (0..head_dim).for_each(|d| out.set(row * head_dim + d, random.uniform(-1.0, 2.0)));
            }
            (out, lse)
        };
        let parts = (0..case.count.max(1)).map(|_| part(&mut random)).collect();
        Self { rows, heads, head_dim, parts }
    }

    /// The parts as a subject is given them.
    pub fn merge_parts(&self) -> Vec<MergePart<'_>> {
        self.parts.iter().map(|(out, lse)| MergePart { out: out.as_ref(), lse }).collect()
    }

    /// What a subject is given.
    pub fn task<'a>(&self, parts: &'a [MergePart<'a>]) -> MergeTask<'a> {
        MergeTask { rows: self.rows, heads: self.heads, head_dim: self.head_dim, parts }
    }
}
