//! `prefill_matrix`: prefill on matrix units, for f16 on devices with cooperative matrices.
//!
//! Owns the choice of variant; the kernel is `kernels/prefill_matrix.wgsl`. Items, parameters and bindings are those of
//! [`prefill`](super).

use minijinja::{Value, context};

/// Family, template name and entry point.
pub(super) const FAMILY: &str = "prefill_matrix";

/// A device's matrices: f16 times f16 added up in f32, with as many rows as columns, held by a subgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixShape {
    /// Rows and columns: 8 or 16.
    pub size: u32,
    /// Invocations of every subgroup of the device, a multiple of `size`.
    pub subgroup: u32,
}

/// What changes speed and not results, but for the last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixTuning {
    /// Subgroups of a workgroup; each has as many rows as a matrix.
    pub strips: u32,
}

/// Which variant: fixed when the text is rendered. Queries, outputs and cache are f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixSpec {
    /// The device's matrices.
    pub shape: MatrixShape,
    /// Matrices that a row of K takes.
    pub k_parts: u32,
    /// And a row of V.
    pub v_parts: u32,
    /// Whether keys are masked by bits.
    pub bits: bool,
    /// How it is tuned.
    pub tuning: MatrixTuning,
}

/// What a variant is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixNeeds {
    /// The device's matrices.
    pub shape: MatrixShape,
    /// Elements of a row of K.
    pub head_dim_k: u32,
    /// And of V.
    pub head_dim_v: u32,
    /// Whether keys are masked by bits.
    pub bits: bool,
    /// The device's bytes of workgroup memory.
    pub workgroup_memory: u32,
}

/// The longest head: queries and outputs of a strip stay in registers.
pub const MOST_HEAD_DIM: u32 = 128;

/// Keys of a tile.
const KEYS: u32 = 32;

/// Vectors that a staged row is longer than its elements: so that matrices' rows meet in memory less often.
const GAP: u32 = 2;

impl MatrixSpec {
    /// The variant for a configuration; `None` for long heads, or devices with too little workgroup memory.
    pub fn for_needs(needs: MatrixNeeds) -> Option<Self> {
        let MatrixNeeds { shape, head_dim_k, head_dim_v, bits, workgroup_memory } = needs;
        let size = shape.size.max(1);
        // As measured on one H100: the more rows share what is staged, the better.
        let strips = [128, 64, 32].map(|rows| rows / size);
        strips.into_iter().find_map(|strips| {
            let spec = Self {
                shape,
                k_parts: head_dim_k.div_ceil(size).max(1),
                v_parts: head_dim_v.div_ceil(size).max(1),
                bits,
                tuning: MatrixTuning { strips },
            };
            (spec.exists() && spec.workgroup_memory() <= workgroup_memory).then_some(spec)
        })
    }

    /// Rows of a tile, each one query head of one query.
    pub fn rows(self) -> u32 {
        self.shape.size * self.tuning.strips
    }

    /// Invocations of a workgroup.
    pub(super) fn workgroup_size(self) -> u32 {
        self.shape.subgroup * self.tuning.strips
    }

    /// Vectors from a row of K or V, of scores, and of probabilities to the next.
    fn strides(self) -> [u32; 3] {
        let vectors = self.shape.size / 4;
        let row = self.k_parts.max(self.v_parts) * vectors;
        let keys = KEYS / 4;
        [row + GAP, keys + 1, keys + GAP]
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_memory(self) -> u32 {
        let [row, scores, weights] = self.strides();
        let keys = KEYS;
        8 * 2 * keys * row
            + (16 * scores + 8 * weights + 4) * self.rows()
            + 4 * (6 * keys + (2 * (keys / 32) + 1).next_multiple_of(4))
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        let MatrixShape { size, subgroup } = self.shape;
        let MatrixTuning { strips } = self.tuning;
        [8, 16].contains(&size)
            && subgroup.is_power_of_two()
            && (size..=128).contains(&subgroup)
            && KEYS / 4 >= subgroup / size
            && (1..=MOST_HEAD_DIM / size).contains(&self.k_parts)
            && (1..=MOST_HEAD_DIM / size).contains(&self.v_parts)
            && (1..=16).contains(&strips)
            && (KEYS..=256).contains(&self.workgroup_size())
    }

    /// The variant's name: `prefill_matrix_16_k8_v8_r64_s32`, with `_bits`.
    pub fn name(self) -> String {
        let Self { shape, k_parts, v_parts, bits, .. } = self;
        format!(
            "{FAMILY}_{}_k{k_parts}_v{v_parts}_r{}_s{}{}",
            shape.size,
            self.rows(),
            shape.subgroup,
            if bits { "_bits" } else { "" },
        )
    }

    /// Variants that configurations find.
    pub(super) fn all() -> Vec<Self> {
        let mut found = Vec::new();
        let shapes = [(16, 32), (8, 8)].map(|(size, subgroup)| MatrixShape { size, subgroup });
        for shape in shapes {
            for (head_dim_k, head_dim_v) in [(64, 64), (80, 80), (128, 128), (96, 20)] {
                for bits in [false, true] {
                    let needs = MatrixNeeds { shape, head_dim_k, head_dim_v, bits, workgroup_memory: 49_152 };
                    found.extend(Self::for_needs(needs));
                }
            }
        }
        found
    }

    /// What the template is rendered with.
    pub(super) fn variables(self) -> Value {
        let [stride, s_stride, p_stride] = self.strides();
        let share = self.shape.subgroup / self.shape.size;
        let share_bits: Vec<u32> = (0..share.trailing_zeros()).map(|bit| 1 << bit).collect();
        context! {
            name => self.name(),
            size => self.shape.size,
            subgroup => self.shape.subgroup,
            strips => self.tuning.strips,
            keys => KEYS,
            k_parts => self.k_parts,
            v_parts => self.v_parts,
            stride,
            s_stride,
            p_stride,
            share_bits,
            bits => self.bits,
            workgroup_size => self.workgroup_size(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_up_to_the_longest_find_a_variant_that_fits() {
        for (size, subgroup, workgroup_memory) in
            [(16, 32, 49_152), (16, 32, 32_768), (8, 8, 32_768), (16, 64, 65_536)]
        {
            let shape = MatrixShape { size, subgroup };
            for (head_dim_k, head_dim_v) in
                (4..=160).step_by(4).flat_map(|k| [4, 64, 128, 160].map(|v| (k, v)))
            {
                let needs = MatrixNeeds { shape, head_dim_k, head_dim_v, bits: false, workgroup_memory };
                let spec = MatrixSpec::for_needs(needs);
                assert_eq!(spec.is_some(), head_dim_k.max(head_dim_v) <= MOST_HEAD_DIM, "{needs:?}");
                let Some(spec) = spec else { continue };
                assert!(spec.workgroup_memory() <= workgroup_memory, "{needs:?}");
                assert!(spec.k_parts * size >= head_dim_k && spec.v_parts * size >= head_dim_v, "{needs:?}");
            }
        }
    }
}
