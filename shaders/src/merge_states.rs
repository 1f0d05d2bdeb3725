//! `merge_states`: puts attention over disjoint sets of keys together, by their log-sum-exp.
//!
//! Owns the choice of variant, the uniform parameters and the number of workgroups; the kernel is
//! `kernels/merge_states.wgsl`.

use minijinja::context;

use crate::decode::Rows;
use crate::dispatch::Invocations;
use crate::shader::{Binding, BindingKind, Shader};
use crate::{DType, Error, dispatch, template};

/// Family, template name and entry point.
const FAMILY: &str = "merge_states";

/// WebGPU's default limit of invocations.
const WORKGROUP_SIZE: u32 = 256;

/// Words of the uniform buffer.
const PARAM_WORDS: usize = 20;

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeStatesSpec {
    /// Element type of the parts' outputs.
    pub part: DType,
    /// Element type of the merged output.
    pub out: DType,
    /// Elements that an invocation merges: 4, 2, or, of f32 into f32, 1. They divide every offset, stride and the head
    /// dimension of 16-bit tensors as far as words do, and the head dimension itself.
    pub elements: u32,
}

impl MergeStatesSpec {
    /// Whether there is such a variant: pieces are whole words on both sides.
    pub fn exists(self) -> bool {
        let whole = |dtype: DType| (self.elements * dtype.size()).is_multiple_of(4);
        [1, 2, 4].contains(&self.elements) && whole(self.part) && whole(self.out)
    }

    /// The variants for a pair of types, the widest first.
    pub fn of_types(part: DType, out: DType) -> impl Iterator<Item = Self> {
        [4, 2, 1].into_iter().map(move |elements| Self { part, out, elements }).filter(|spec| spec.exists())
    }

    /// Every variant.
    pub fn all() -> Vec<Self> {
        let pairs = DType::ALL.into_iter().flat_map(|part| DType::ALL.map(|out| (part, out)));
        pairs.flat_map(|(part, out)| Self::of_types(part, out)).collect()
    }

    /// The variant's name: `merge_states_bf16_f32_x4`.
    pub fn name(self) -> String {
        format!("{FAMILY}_{}_{}_x{}", self.part, self.out, self.elements)
    }
}

/// What one dispatch works on. The caller has checked that every binding holds what these strides reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MergeStatesArgs {
    /// Parts, at least 1.
    pub parts: u32,
    /// Query rows.
    pub rows: u32,
    /// Heads of a row.
    pub heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Outputs of part 0.
    pub part_out: Rows,
    /// Elements from a part's outputs to the next's.
    pub part_out_stride: u64,
    /// Log-sum-exps of part 0.
    pub part_lse: Rows,
    /// Elements from a part's log-sum-exps to the next's.
    pub part_lse_stride: u64,
    /// Merged output.
    pub out: Rows,
    /// Merged log-sum-exp, if it is wanted.
    pub lse: Option<Rows>,
}

impl MergeStatesArgs {
    /// The contents of the uniform buffer for a variant.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] when an offset, stride or the head dimension is no whole number of words or pieces,
    /// [`Error::TooLarge`] when one, or the last part's place, does not fit 32 bits.
    pub fn uniform(&self, spec: MergeStatesSpec) -> Result<[u32; PARAM_WORDS], Error> {
        let words = |field, value: u64, dtype: DType| in_units(field, value, 4 / dtype.size());
        let (part, out) = (spec.part, spec.out);
        let lse = self.lse.unwrap_or(Rows { offset: 0, row_stride: 0, head_stride: 0 });
        // No index may wrap around, so the last part must be addressable too.
        let (rows, heads) = (u64::from(self.rows), u64::from(self.heads));
        let last = |first: Rows, stride: u64| {
            let parts = u64::from(self.parts.max(1) - 1).checked_mul(stride);
            let rows = rows.checked_mul(first.row_stride);
            let heads = heads.checked_mul(first.head_stride);
            let ends = [parts, rows, heads].into_iter().try_fold(first.offset, |sum, x| sum.checked_add(x?));
            ends.unwrap_or(u64::MAX)
        };
        for (field, value) in [
            ("part_out's end", last(self.part_out, self.part_out_stride)),
            ("part_lse's end", last(self.part_lse, self.part_lse_stride)),
            ("out's end", last(self.out, 0)),
            ("lse's end", last(lse, 0)),
        ] {
            if value > u64::from(u32::MAX) {
                return Err(Error::TooLarge { kernel: FAMILY, field, value });
            }
        }
        Ok([
            self.parts,
            self.rows,
            self.heads,
            in_units("head_dim", self.head_dim.into(), spec.elements)?,
            words("out.offset", self.out.offset, out)?,
            words("out.row_stride", self.out.row_stride, out)?,
            words("out.head_stride", self.out.head_stride, out)?,
            words("part_out.offset", self.part_out.offset, part)?,
            words("part_out_stride", self.part_out_stride, part)?,
            words("part_out.row_stride", self.part_out.row_stride, part)?,
            words("part_out.head_stride", self.part_out.head_stride, part)?,
            words("part_lse.offset", self.part_lse.offset, DType::F32)?,
            words("part_lse_stride", self.part_lse_stride, DType::F32)?,
            words("part_lse.row_stride", self.part_lse.row_stride, DType::F32)?,
            words("part_lse.head_stride", self.part_lse.head_stride, DType::F32)?,
            words("lse.offset", lse.offset, DType::F32)?,
            words("lse.row_stride", lse.row_stride, DType::F32)?,
            words("lse.head_stride", lse.head_stride, DType::F32)?,
            u32::from(self.lse.is_some()),
            0,
        ])
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::TooManyWorkgroups`], [`Error::TooLarge`] beyond the device's limit and 32-bit indices.
    pub fn workgroups(&self, spec: MergeStatesSpec, per_dimension: u32) -> Result<[u32; 3], Error> {
        let pieces = u64::from(self.head_dim.div_ceil(spec.elements));
        let heads = u64::from(self.rows) * u64::from(self.heads);
        Invocations {
            kernel: FAMILY,
            field: "rows * heads * head_dim",
            count: heads.saturating_mul(pieces),
            workgroup_size: WORKGROUP_SIZE,
        }
        .workgroups(per_dimension)
    }
}

/// A value in units, which must fit an index of 32 bits.
fn in_units(field: &'static str, value: u64, unit: u32) -> Result<u32, Error> {
    dispatch::in_units(FAMILY, field, value, unit)
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeStates {
    shader: Shader,
}

impl MergeStates {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::NoSuchVariant`] for pieces that are no whole words, [`Error::Template`]: a defect of this crate.
    pub fn new(spec: MergeStatesSpec) -> Result<Self, Error> {
        let name = spec.name();
        if !spec.exists() {
            return Err(Error::NoSuchVariant { kernel: FAMILY, name });
        }
        let variables = context! {
            name => name.clone(),
            part => spec.part.name(),
            out => spec.out.name(),
            elements => spec.elements,
            part_words => spec.elements * spec.part.size() / 4,
            out_words => spec.elements * spec.out.size() / 4,
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../kernels/merge_states.wgsl"), variables)?;
        let binding = |index, name, kind| Binding { index, name, kind, element_size: 4 };
        let bindings = vec![
            binding(0, "params", BindingKind::Uniform { size: 4 * PARAM_WORDS as u32 }),
            binding(1, "part_out", BindingKind::ReadOnly),
            binding(2, "part_lse", BindingKind::ReadOnly),
            binding(3, "out", BindingKind::ReadWrite),
            binding(4, "lse", BindingKind::ReadWrite),
        ];
        let shader = Shader {
            family: FAMILY,
            name,
            text,
            bindings,
            workgroup_size: WORKGROUP_SIZE,
            needs_f16: false,
            needs_subgroups: false,
            needs_matrices: false,
        };
        Ok(Self { shader })
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
