//! `copy_blocks`: copies blocks within a paged cache, all pairs of K and V in one dispatch.
//!
//! The paper's copy-on-write (Kwon et al., SOSP 2023, sections 4.4 and 5.1). Owns the choice of variant, the uniform
//! parameters and the number of workgroups; the kernel is `kernels/copy_blocks.wgsl`.

use minijinja::context;

use crate::decode::CacheRows;
use crate::dispatch::{Invocations, in_units};
use crate::shader::{Binding, BindingKind, Shader};
use crate::{DType, Error, template};

/// Family, template name and entry point.
const FAMILY: &str = "copy_blocks";

/// WebGPU's default limit of invocations.
const WORKGROUP_SIZE: u32 = 256;

/// Words of the uniform buffer.
const PARAM_WORDS: usize = 16;

/// In what units a variant moves memory, which every offset, stride and row must be a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyUnit {
    /// 16 bytes.
    Vec4,
    /// 4 bytes.
    Word,
}

impl CopyUnit {
    /// Both, the faster first.
    pub const ALL: [Self; 2] = [Self::Vec4, Self::Word];

    /// Its bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Vec4 => 16,
            Self::Word => 4,
        }
    }
}

/// What one dispatch works on. The caller has checked that every binding holds what these strides reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyBlocksArgs {
    /// Element type of the cache.
    pub dtype: DType,
    /// Pairs of blocks.
    pub pairs: u32,
    /// First word of the pairs in their binding.
    pub pairs_offset: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// Elements of a K row.
    pub head_dim_k: u32,
    /// Elements of a V row.
    pub head_dim_v: u32,
    /// K cache.
    pub key: CacheRows,
    /// V cache.
    pub value: CacheRows,
}

impl CopyBlocksArgs {
    /// The contents of the uniform buffer for a variant.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] when the variant's units do not divide an offset, stride or head dimension,
    /// [`Error::TooLarge`] when one does not fit 32 bits.
    pub fn uniform(&self, unit: CopyUnit) -> Result<[u32; PARAM_WORDS], Error> {
        let elements = unit.bytes() / self.dtype.size();
        let units = |field, value| in_units(FAMILY, field, value, elements);
        let (key, value) = (self.key, self.value);
        // No index may wrap around, so the ends of the caches must be addressable too.
        units("key_cache.extent", key.extent.next_multiple_of(elements.into()))?;
        units("value_cache.extent", value.extent.next_multiple_of(elements.into()))?;
        let key_units = units("head_dim_k", self.head_dim_k.into())?;
        let value_units = units("head_dim_v", self.head_dim_v.into())?;
        Ok([
            self.pairs,
            self.pairs_offset,
            self.kv_heads,
            self.block_size,
            key_units.max(value_units),
            key_units,
            value_units,
            units("key_cache.offset", key.offset)?,
            units("key_cache.block_stride", key.block_stride)?,
            units("key_cache.token_stride", key.token_stride)?,
            units("key_cache.head_stride", key.head_stride)?,
            units("value_cache.offset", value.offset)?,
            units("value_cache.block_stride", value.block_stride)?,
            units("value_cache.token_stride", value.token_stride)?,
            units("value_cache.head_stride", value.head_stride)?,
            0,
        ])
    }

    /// Workgroups on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// As [`CopyBlocksArgs::uniform`]; [`Error::TooManyWorkgroups`], [`Error::TooLarge`] beyond the device's limit
    /// and 32-bit indices.
    pub fn workgroups(&self, unit: CopyUnit, per_dimension: u32) -> Result<[u32; 3], Error> {
        let elements = unit.bytes() / self.dtype.size();
        let row = u64::from(self.head_dim_k.max(self.head_dim_v).div_ceil(elements));
        let rows = u64::from(self.pairs) * u64::from(self.kv_heads) * u64::from(self.block_size);
        Invocations {
            kernel: FAMILY,
            field: "pairs * block_size * kv_heads * head_dim",
            count: rows.saturating_mul(row),
            workgroup_size: WORKGROUP_SIZE,
        }
        .workgroups(per_dimension)
    }
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyBlocks {
    shader: Shader,
}

impl CopyBlocks {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::Template`]: a defect of this crate.
    pub fn new(unit: CopyUnit) -> Result<Self, Error> {
        let (suffix, unit_type) = match unit {
            CopyUnit::Vec4 => ("vec4", "vec4<u32>"),
            CopyUnit::Word => ("word", "u32"),
        };
        let name = format!("{FAMILY}_{suffix}");
        let variables = context! {
            name => name.clone(),
            unit => unit_type,
            unit_bytes => unit.bytes(),
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../kernels/copy_blocks.wgsl"), variables)?;
        let binding = |index, name, kind, element_size| Binding { index, name, kind, element_size };
        let bindings = vec![
            binding(0, "params", BindingKind::Uniform { size: 4 * PARAM_WORDS as u32 }, 4),
            binding(1, "pairs", BindingKind::ReadOnly, 4),
            binding(2, "key_cache", BindingKind::ReadWrite, unit.bytes()),
            binding(3, "value_cache", BindingKind::ReadWrite, unit.bytes()),
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
