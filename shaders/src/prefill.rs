//! `prefill`: many query rows of a sequence attend to its keys in a paged cache, in tiles through workgroup memory.
//!
//! Owns the choice of variant and the form of its items in the plan; the kernel is `kernels/prefill.wgsl`, and
//! `kernels/prefill_matrix.wgsl` on matrix units. Parameters and bindings are those of [`decode`](crate::decode), and
//! `decode_merge` merges the rows that are split.

mod matrix;

use minijinja::{Value, context};

pub use matrix::{MOST_HEAD_DIM, MatrixNeeds, MatrixShape, MatrixSpec, MatrixTuning};

use crate::decode::{DecodeArgs, PARAM_WORDS, bindings};
use crate::shader::Shader;
use crate::{DType, Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "prefill";

/// Lanes of a group, which share rows.
const LANES: u32 = 16;

/// Keys of a tile, four a lane.
pub const TILE_KEYS: u32 = 64;

/// Some query rows of one sequence and a range of keys, for every head. Twelve u32 in the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrefillItem {
    /// First entry of the sequence's block table, counted from the beginning of all tables.
    pub table: u32,
    /// First row of the queries and of the output.
    pub row: u32,
    /// Query rows: at most as many as the variant takes.
    pub queries: u32,
    /// First key: a multiple of 64 where keys are masked by bits.
    pub begin: u32,
    /// One past the last key.
    pub end: u32,
    /// First key that every row sees.
    pub plain_begin: u32,
    /// One past the last of those.
    pub plain_end: u32,
    /// Which split of the rows' keys this is.
    pub split: u32,
    /// Splits of the rows. With one, the workgroup writes the output itself.
    pub splits: u32,
    /// Number of the first row's first partial result in the workspace; the next row's come `splits` further on.
    pub first_partial: u32,
    /// Where the ranges of the rows begin in the plan: four words a row, first key, one past the last, position, 0.
    pub ranges: u32,
}

impl PrefillItem {
    /// Words of an item in the plan.
    pub const WORDS: usize = 12;

    /// Words of a row's range.
    pub const RANGE_WORDS: usize = 4;

    /// The item as the kernel reads it.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let Self { table, row, queries, begin, end, plain_begin, plain_end, .. } = *self;
        let Self { split, splits, first_partial, ranges, .. } = *self;
        [table, row, queries, begin, end, plain_begin, plain_end, split, splits, first_partial, ranges, 0]
    }
}

/// What changes speed and not results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillTuning {
    /// Times four rows of an invocation: 1 or 2.
    pub row_quads: u32,
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Times four elements of the head dimension that are staged at a time.
    pub chunk: u32,
    /// Whether staged rows have a gap, so that groups meet in workgroup memory less often.
    pub gap: bool,
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillSpec {
    /// Element type of queries and outputs.
    pub q: DType,
    /// Element type of the cache.
    pub kv: DType,
    /// Whether an f16 cache is read as such, which takes the feature `shader-f16`.
    pub half: bool,
    /// Times 64 elements of an output row, rounded up.
    pub columns: u32,
    /// Whether keys are masked by bits.
    pub bits: bool,
    /// How it is tuned.
    pub tuning: PrefillTuning,
}

/// What a variant is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillNeeds {
    /// Element type of queries and outputs.
    pub q: DType,
    /// Element type of the cache.
    pub kv: DType,
    /// Elements of an output row.
    pub head_dim_v: u32,
    /// Whether keys are masked by bits.
    pub bits: bool,
    /// Whether the device has the feature `shader-f16`.
    pub half: bool,
    /// Its bytes of workgroup memory.
    pub workgroup_memory: u32,
}

impl PrefillSpec {
    /// The variant for a configuration: larger tiles where workgroup memory is larger than every device's.
    pub fn for_needs(needs: PrefillNeeds) -> Self {
        let PrefillNeeds { q, kv, head_dim_v, bits, half, workgroup_memory } = needs;
        let spec = |workgroup_size, gap| Self {
            q,
            kv,
            half: half && kv == DType::F16,
            columns: head_dim_v.div_ceil(4 * LANES).clamp(1, 4),
            bits,
            tuning: PrefillTuning { row_quads: 1, workgroup_size, chunk: 8, gap },
        };
        let large = spec(256, true);
        if large.workgroup_memory() <= workgroup_memory { large } else { spec(128, false) }
    }

    /// Rows of a tile, each one query head of one query.
    pub fn rows(self) -> u32 {
        self.tuning.workgroup_size / LANES * 4 * self.tuning.row_quads
    }

    /// V rows that are staged at a time.
    fn value_keys(self) -> u32 {
        (LANES / self.columns.next_power_of_two()).max(4)
    }

    /// Vectors from a staged row of Q, K and P to the next.
    fn strides(self) -> [u32; 3] {
        let PrefillTuning { chunk, gap, .. } = self.tuning;
        [chunk + u32::from(gap), chunk + 1, TILE_KEYS / 4 + u32::from(gap)]
    }

    /// `vec4<f32>` of workgroup memory for what is staged.
    fn tile(self) -> u32 {
        let [q, k, p] = self.strides();
        let scores = self.rows() * q + TILE_KEYS * k;
        scores.max(self.rows() * p + self.value_keys() * LANES * self.columns)
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_memory(self) -> u32 {
        let states = self.tuning.row_quads * self.tuning.workgroup_size;
        16 * (self.tile() + states) + 4 * (self.rows() + 2 * TILE_KEYS + 2)
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        let PrefillTuning { row_quads, workgroup_size, chunk, .. } = self.tuning;
        (!self.half || self.kv == DType::F16)
            && (1..=4).contains(&self.columns)
            && [1, 2].contains(&row_quads)
            && [64, 128, 256].contains(&workgroup_size)
            && [4, 8, 16].contains(&chunk)
    }

    /// The variant's name: `prefill_f16_f16_c2_r64_w256_k8`, with `_half` and `_bits`.
    pub fn name(self) -> String {
        let Self { q, kv, half, columns, bits, tuning } = self;
        format!(
            "{FAMILY}_{q}_{kv}_c{columns}_r{}_w{}_k{}{}{}{}",
            self.rows(),
            tuning.workgroup_size,
            tuning.chunk,
            if tuning.gap { "_gap" } else { "" },
            if half { "_half" } else { "" },
            if bits { "_bits" } else { "" },
        )
    }

    /// The variants that configurations find: every type and number of columns, on small and large devices, with and
    /// without f16 and mask bits.
    pub fn all() -> Vec<Self> {
        let mut found = Vec::new();
        for (q, kv) in DType::ALL.into_iter().flat_map(|q| DType::ALL.map(|kv| (q, kv))) {
            for (head_dim_v, workgroup_memory) in
                [64, 128, 192, 256].into_iter().flat_map(|dim| [16_384, 32_768].map(|memory| (dim, memory)))
            {
                // The types of queries change two functions: one of each with everything is enough.
                if q != kv && (q, head_dim_v) != (DType::F32, 64) {
                    continue;
                }
                for (bits, half) in [(false, false), (false, true), (true, false), (true, true)] {
                    let needs = PrefillNeeds { q, kv, head_dim_v, bits, half, workgroup_memory };
                    let spec = Self::for_needs(needs);
                    if !found.contains(&spec) {
                        found.push(spec);
                    }
                }
            }
        }
        found
    }

    /// What the template is rendered with.
    fn variables(self) -> Value {
        let [q_stride, k_stride, p_stride] = self.strides();
        let unit = match self.kv {
            DType::F32 => "vec4<u32>",
            _ if self.half => "vec4<f16>",
            _ => "vec2<u32>",
        };
        context! {
            name => self.name(),
            q => self.q.name(),
            kv => self.kv.name(),
            unit,
            half => self.half,
            rows => self.rows(),
            row_quads => self.tuning.row_quads,
            chunk => self.tuning.chunk,
            q_stride,
            k_stride,
            p_stride,
            columns => self.columns,
            value_keys => self.value_keys(),
            tile => self.tile(),
            bits => self.bits,
            workgroup_size => self.tuning.workgroup_size,
        }
    }

    /// The contents of the uniform buffer, the same for all variants of both kernels.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] when four elements do not divide an offset, stride or head dimension of the caches, or
    /// words those of the queries and outputs; [`Error::TooLarge`] when one does not fit 32 bits.
    pub fn uniform(q: DType, args: &DecodeArgs) -> Result<[u32; PARAM_WORDS], Error> {
        args.uniform_in_units(q, 4, args.kv_heads)
    }
}

/// One of the two kernels, in a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrefillKernel {
    /// In registers and workgroup memory: any types, any device.
    Tiled(PrefillSpec),
    /// On matrix units.
    Matrix(MatrixSpec),
}

impl PrefillKernel {
    /// Every variant of both.
    pub fn all() -> Vec<Self> {
        let tiled = PrefillSpec::all().into_iter().map(Self::Tiled);
        tiled.chain(MatrixSpec::all().into_iter().map(Self::Matrix)).collect()
    }

    /// Rows of a tile, each one query head of one query.
    pub fn rows(self) -> u32 {
        match self {
            Self::Tiled(spec) => spec.rows(),
            Self::Matrix(spec) => spec.rows(),
        }
    }

    /// Queries of a tile, where so many query heads share a KV head.
    pub fn queries(self, group: u32) -> u32 {
        (self.rows() / group.max(1)).max(1)
    }

    /// Workgroups of an item for each KV head.
    pub fn head_tiles(self, group: u32) -> u32 {
        group.max(1).div_ceil(self.rows())
    }

    /// Bytes of workgroup memory.
    pub fn workgroup_memory(self) -> u32 {
        match self {
            Self::Tiled(spec) => spec.workgroup_memory(),
            Self::Matrix(spec) => spec.workgroup_memory(),
        }
    }

    /// The variant's name.
    pub fn name(self) -> String {
        match self {
            Self::Tiled(spec) => spec.name(),
            Self::Matrix(spec) => spec.name(),
        }
    }

    fn exists(self) -> bool {
        match self {
            Self::Tiled(spec) => spec.exists(),
            Self::Matrix(spec) => spec.exists(),
        }
    }
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefill {
    kernel: PrefillKernel,
    shader: Shader,
}

impl Prefill {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate. [`Error::NoSuchVariant`] for a specification out of its bounds.
    pub fn new(kernel: PrefillKernel) -> Result<Self, Error> {
        let name = kernel.name();
        let (family, source) = match kernel {
            PrefillKernel::Tiled(_) => (FAMILY, include_str!("../kernels/prefill.wgsl")),
            PrefillKernel::Matrix(_) => (matrix::FAMILY, include_str!("../kernels/prefill_matrix.wgsl")),
        };
        if !kernel.exists() {
            return Err(Error::NoSuchVariant { kernel: family, name });
        }
        let (variables, unit_size, workgroup_size, half) = match kernel {
            PrefillKernel::Tiled(spec) => {
                let unit_size = if spec.kv == DType::F32 { 16 } else { 8 };
                (spec.variables(), unit_size, spec.tuning.workgroup_size, spec.half)
            }
            PrefillKernel::Matrix(spec) => (spec.variables(), 8, spec.workgroup_size(), true),
        };
        let text = template::render(family, source, variables)?;
        let matrices = matches!(kernel, PrefillKernel::Matrix(_));
        let shader = Shader {
            family,
            name,
            text,
            bindings: bindings(unit_size),
            workgroup_size,
            needs_f16: half,
            needs_subgroups: matrices,
            needs_matrices: matrices,
        };
        Ok(Self { kernel, shader })
    }

    /// The variant.
    pub fn kernel(&self) -> PrefillKernel {
        self.kernel
    }

    /// The rendered kernel.
    pub fn shader(&self) -> &Shader {
        &self.shader
    }

    /// The rendered kernel, by value.
    pub fn into_shader(self) -> Shader {
        self.shader
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_finds_a_variant_that_fits_its_device() {
        for (q, kv) in DType::ALL.into_iter().flat_map(|q| DType::ALL.map(|kv| (q, kv))) {
            for head_dim_v in (4..=256).step_by(4) {
                for workgroup_memory in [16_384, 32_768, 49_152] {
                    for (bits, half) in [(false, false), (true, true)] {
                        let needs = PrefillNeeds { q, kv, head_dim_v, bits, half, workgroup_memory };
                        let spec = PrefillSpec::for_needs(needs);
                        assert!(spec.exists(), "{needs:?}");
                        assert!(spec.workgroup_memory() <= workgroup_memory, "{needs:?}: {spec:?}");
                        assert!(4 * LANES * spec.columns >= head_dim_v, "{needs:?}");
                        assert!(TILE_KEYS.is_multiple_of(spec.value_keys()), "{needs:?}");
                    }
                }
            }
        }
    }
}
