//! Which variants of `decode` there are, and how a configuration finds its own.

use crate::DType;

/// In what units the caches are read. Every offset, stride and head dimension must be a multiple of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// 16 bytes.
    Vec4,
    /// 8 bytes, for 16-bit heads that are multiples of 4 elements but not of 8.
    Vec2,
}

impl Unit {
    /// Both, the faster first.
    pub const ALL: [Self; 2] = [Self::Vec4, Self::Vec2];

    /// Its bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Vec4 => 16,
            Self::Vec2 => 8,
        }
    }

    /// Its WGSL type.
    pub(super) const fn wgsl(self) -> &'static str {
        match self {
            Self::Vec4 => "vec4<u32>",
            Self::Vec2 => "vec2<u32>",
        }
    }
}

/// What changes speed and not results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTuning {
    /// Keys that a group of lanes has on their way at a time.
    pub rows: u32,
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Whether queries stay in registers, or are read from workgroup memory for every round of keys.
    pub kept: bool,
    /// Whether the next round's keys are asked for before this round's probabilities are used.
    pub ahead: bool,
    /// Whether an f16 cache is read as such, which takes the feature `shader-f16`, and not as words.
    pub half: bool,
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// Element type of queries and outputs.
    pub q: DType,
    /// Element type of the cache.
    pub kv: DType,
    /// Units of the cache.
    pub unit: Unit,
    /// Lanes that share a K or V row: a power of two, at most 16, at most the smallest subgroup.
    pub lanes: u32,
    /// Units of a row for each lane.
    pub chunks: u32,
    /// Query heads of a workgroup: a power of two, at most 8, at most the lanes.
    pub queries: u32,
    /// Whether lanes exchange values through subgroup operations, or through workgroup memory.
    pub subgroups: bool,
    /// Whether keys are masked by bits.
    pub bits: bool,
    /// How it is tuned.
    pub tuning: DecodeTuning,
}

/// What a variant is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeNeeds {
    /// Element type of queries and outputs.
    pub q: DType,
    /// Element type of the cache.
    pub kv: DType,
    /// Units of the cache.
    pub unit: Unit,
    /// The longer of a K and a V row.
    pub head_dim: u32,
    /// Query heads that share a KV head.
    pub group: u32,
    /// The smallest subgroup of the device, if it has subgroup operations.
    pub subgroup: Option<u32>,
    /// Whether keys are masked by bits.
    pub bits: bool,
}

/// `vec4<f32>` of workgroup memory for the queries and, later, the outputs that are added up.
const SCRATCH: u32 = 512;

/// `vec4<f32>` registers of a lane for outputs.
const MOST_OUTPUTS: u32 = 16;

impl DecodeSpec {
    /// The variant for a configuration; `None` for an fp32 cache read by halves, or heads that are too long.
    pub fn for_needs(needs: DecodeNeeds) -> Option<Self> {
        let DecodeNeeds { q, kv, unit, head_dim, group, subgroup, bits } = needs;
        if kv == DType::F32 && unit == Unit::Vec2 {
            return None;
        }
        let elements = unit.bytes() / kv.size();
        let units = head_dim.div_ceil(elements).max(1);
        let subgroup = subgroup.filter(|size| *size >= 4);
        // The longest rows of four lanes a group would take more registers than there are.
        let lanes = units.next_power_of_two().clamp(4, 16).min(subgroup.unwrap_or(16).max(4));
        let lanes = 1 << lanes.ilog2();
        let chunks = units.div_ceil(lanes);
        let parts = chunks * (elements / 4);
        let queries = group.max(1).next_power_of_two().min(8).min(lanes).min((MOST_OUTPUTS / parts).max(1));
        let queries = 1 << queries.ilog2();
        // Few lanes hold much of a row each: then fewer groups, whose outputs are added up in the same memory.
        let most = (SCRATCH / parts.max(1)).next_power_of_two().clamp(32, 128);
        // With subgroups as measured on one H100 at 128 elements of f16: with eight queries a lane has no registers left
        // to keep them in, with four none to read ahead.
        let (rows, workgroup_size, kept, ahead) = match (subgroup.is_some(), queries) {
            (true, 8) => (8, most.min(64), false, true),
            (true, 4) => (2, most, true, false),
            (true, _) => (8, most, true, true),
            (false, 8) => (1, most, true, true),
            (false, _) => (4 / queries, most, true, true),
        };
        let rows = (rows / chunks).max(1);
        let tuning = DecodeTuning { rows, workgroup_size, kept, ahead, half: false };
        let spec = Self { q, kv, unit, lanes, chunks, queries, subgroups: subgroup.is_some(), bits, tuning };
        spec.exists().then_some(spec)
    }

    /// Elements of a unit.
    pub fn unit_elements(self) -> u32 {
        self.unit.bytes() / self.kv.size()
    }

    /// `vec4<f32>` of a unit.
    pub(super) fn vectors(self) -> u32 {
        self.unit_elements() / 4
    }

    /// `vec4<f32>` of a lane for one query.
    fn parts(self) -> u32 {
        self.chunks * self.vectors()
    }

    /// Queries whose outputs are added up at a time.
    pub(super) fn gather_queries(self) -> u32 {
        (SCRATCH / (self.parts() * self.tuning.workgroup_size)).clamp(1, self.queries)
    }

    /// `vec4<f32>` of workgroup memory.
    pub(super) fn scratch(self) -> u32 {
        let queries = self.queries * self.parts() * self.lanes;
        queries.max(self.gather_queries() * self.parts() * self.tuning.workgroup_size)
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_memory(self) -> u32 {
        let DecodeTuning { rows, workgroup_size, .. } = self.tuning;
        let groups = workgroup_size / self.lanes.max(1);
        let exchanged = match self.subgroups {
            true => 0,
            false => 4 * (rows * self.queries * workgroup_size + (rows + 1) * self.queries * groups),
        };
        16 * self.scratch() + 8 * groups * self.queries + exchanged
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        let Self { lanes, chunks, queries, tuning, .. } = self;
        let DecodeTuning { rows, workgroup_size, .. } = tuning;
        (self.kv != DType::F32 || self.unit == Unit::Vec4)
            && (!tuning.half || self.kv == DType::F16)
            && [4, 8, 16].contains(&lanes)
            && (1..=16).contains(&chunks)
            && queries.is_power_of_two()
            && queries <= lanes.min(8)
            && (queries == 1 || queries * self.parts() <= MOST_OUTPUTS)
            && (1..=8).contains(&rows)
            && [32, 64, 128, 256].contains(&workgroup_size)
            && self.workgroup_memory() <= 16_384
    }

    /// The variant's name: `decode_bf16_bf16_vec4_16x1_q4_r4_w128`, with `_kept`, `_ahead`, `_half`, `_subgroups`
    /// and `_bits`.
    pub fn name(self) -> String {
        let Self { q, kv, unit, lanes, chunks, queries, subgroups, bits, tuning } = self;
        let unit = match unit {
            Unit::Vec4 => "vec4",
            Unit::Vec2 => "vec2",
        };
        format!(
            "decode_{q}_{kv}_{unit}_{lanes}x{chunks}_q{queries}_r{}_w{}{}{}{}{}{}",
            tuning.rows,
            tuning.workgroup_size,
            if tuning.kept { "_kept" } else { "" },
            if tuning.ahead { "_ahead" } else { "" },
            if tuning.half { "_half" } else { "" },
            if subgroups { "_subgroups" } else { "" },
            if bits { "_bits" } else { "" },
        )
    }

    /// The variants that configurations find: every type, unit, tuned head dimension and number of queries, with and
    /// without subgroups of 8 and 32 lanes and mask bits.
    pub fn all() -> Vec<Self> {
        let mut found = Vec::new();
        let pairs = DType::ALL.into_iter().flat_map(|q| DType::ALL.into_iter().map(move |kv| (q, kv)));
        for (q, kv) in pairs {
            for unit in Unit::ALL {
                for head_dim in [16, 64, 80, 96, 128, 256] {
                    for group in [1, 2, 4, 8] {
                        // The types of queries change two functions: one of each with everything is enough.
                        let usual = q == kv || (q == DType::F32 && head_dim == 64);
                        for subgroup in [None, Some(8), Some(32)] {
                            for bits in [false, true] {
                                let needs = DecodeNeeds { q, kv, unit, head_dim, group, subgroup, bits };
                                let spec = Self::for_needs(needs).filter(|_| usual);
                                let half = spec.map(|spec| Self {
                                    tuning: DecodeTuning { half: true, ..spec.tuning },
                                    ..spec
                                });
                                for spec in [spec, half].into_iter().flatten().filter(|spec| spec.exists()) {
                                    if !found.contains(&spec) {
                                        found.push(spec);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_finds_a_variant_on_every_device() {
        for (q, kv) in DType::ALL.into_iter().flat_map(|q| DType::ALL.map(|kv| (q, kv))) {
            for (unit, head_dim) in
                Unit::ALL.into_iter().flat_map(|unit| (4..=256).map(move |dim| (unit, dim)))
            {
                for group in 1..=20 {
                    for subgroup in [None, Some(4), Some(8), Some(16), Some(32), Some(64)] {
                        for bits in [false, true] {
                            let needs = DecodeNeeds { q, kv, unit, head_dim, group, subgroup, bits };
                            let spec = DecodeSpec::for_needs(needs);
                            // An f32 cache has no halves to read.
                            let there = kv != DType::F32 || unit == Unit::Vec4;
                            assert_eq!(spec.is_some(), there, "{needs:?}");
                            let Some(spec) = spec else { continue };
                            assert!(spec.lanes * spec.chunks * spec.unit_elements() >= head_dim, "{needs:?}");
                            assert!(subgroup.is_none_or(|size| spec.lanes <= size), "{needs:?}");
                        }
                    }
                }
            }
        }
    }
}
