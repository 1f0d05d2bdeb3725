//! `write_kv`: stores the K and V rows of new tokens into the blocks of a paged cache, in one dispatch.
//!
//! The paper's fused reshape and block write (Kwon et al., SOSP 2023, section 5.1). Owns the choice of variant,
//! the uniform parameters and the number of workgroups; the kernel is `kernels/write_kv.wgsl`.

use minijinja::context;

use crate::dispatch::Invocations;
use crate::shader::{Binding, BindingKind, Shader};
use crate::{DType, Error, dispatch, template};

/// Family, template name and entry point.
const FAMILY: &str = "write_kv";

/// WebGPU's default limit of invocations.
const WORKGROUP_SIZE: u32 = 256;

/// Words of the uniform buffer.
const PARAM_WORDS: usize = 24;

/// In what units a variant reads and writes memory. Every offset, stride and head dimension must be a multiple
/// of [`Access::unit`] elements, so that no two invocations write parts of one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// 16 bytes at a time.
    Vec4,
    /// 4 bytes at a time: pairs of 16-bit elements.
    Word,
    /// f16 elements one by one, on devices with the feature `shader-f16`.
    Half,
}

impl Access {
    /// All of them, fastest first.
    pub const ALL: [Self; 3] = [Self::Vec4, Self::Word, Self::Half];

    /// Elements of a type that are moved together.
    pub const fn unit(self, dtype: DType) -> u32 {
        match self {
            Self::Vec4 => 16 / dtype.size(),
            Self::Word => 4 / dtype.size(),
            Self::Half => 1,
        }
    }

    /// The name used in kernel names and in the template.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vec4 => "vec4",
            Self::Word => "word",
            Self::Half => "half",
        }
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvSpec {
    /// Element type of the new rows.
    pub source: DType,
    /// Element type of the cache.
    pub cache: DType,
    /// Units of memory.
    pub access: Access,
}

impl WriteKvSpec {
    /// Every variant that exists.
    pub fn all() -> impl Iterator<Item = Self> {
        let pairs = DType::ALL
            .into_iter()
            .flat_map(|source| DType::ALL.into_iter().map(move |cache| (source, cache)));
        pairs
            .flat_map(|(source, cache)| {
                Access::ALL.into_iter().map(move |access| Self { source, cache, access })
            })
            .filter(|spec| spec.exists())
    }

    /// Whether there is such a variant: [`Access::Half`] needs f16 on one side and no bf16 on the other.
    pub fn exists(self) -> bool {
        let types = [self.source, self.cache];
        self.access != Access::Half || (types.contains(&DType::F16) && !types.contains(&DType::Bf16))
    }

    /// Elements that an invocation moves: as many as both sides' units hold.
    pub fn elements(self) -> u32 {
        self.access.unit(self.source).max(self.access.unit(self.cache))
    }

    /// The variant's name: `write_kv_f32_bf16_vec4`.
    pub fn name(self) -> String {
        format!("{FAMILY}_{}_{}_{}", self.source, self.cache, self.access.name())
    }

    /// The WGSL type of an array's elements, and its bytes.
    fn array_type(self, dtype: DType) -> (&'static str, u32) {
        match (self.access, dtype) {
            (Access::Vec4, _) => ("vec4<u32>", 16),
            (Access::Half, DType::F16) => ("f16", 2),
            (Access::Word | Access::Half, _) => ("u32", 4),
        }
    }
}

/// The sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvShape {
    /// New tokens, skipped ones included.
    pub tokens: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a K row.
    pub head_dim_k: u32,
    /// Elements of a V row.
    pub head_dim_v: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// Slots of the cache: blocks × block size. Slots outside are skipped.
    pub num_slots: u32,
    /// Index of the first slot in its binding.
    pub slots_offset: u32,
}

/// Where one of K and V comes from, `[tokens, kv_heads, head_dim]`: offsets and strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRows {
    /// The first element's place in its binding.
    pub offset: u64,
    /// From a token to the next.
    pub token_stride: u64,
    /// From a head to the next.
    pub head_stride: u64,
}

/// Where one of K and V goes, `[blocks, block_size, kv_heads, head_dim]`: offsets and strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRows {
    /// The first element's place in its binding.
    pub offset: u64,
    /// From a block to the next.
    pub block_stride: u64,
    /// From a token of a block to the next.
    pub token_stride: u64,
    /// From a head to the next.
    pub head_stride: u64,
}

/// What one dispatch works on. The caller has checked that every binding holds what these strides reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvArgs {
    /// Sizes.
    pub shape: WriteKvShape,
    /// New K rows.
    pub key: SourceRows,
    /// New V rows.
    pub value: SourceRows,
    /// K cache.
    pub key_cache: CacheRows,
    /// V cache.
    pub value_cache: CacheRows,
}

impl WriteKvArgs {
    /// Whether a variant's units divide every offset, stride and head dimension.
    pub fn fits(&self, spec: WriteKvSpec) -> bool {
        self.uniform(spec).is_ok()
    }

    /// The contents of the uniform buffer for a variant.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] when the variant's units do not divide an offset, stride or head dimension,
    /// [`Error::TooLarge`] when one does not fit 32 bits.
    pub fn uniform(&self, spec: WriteKvSpec) -> Result<[u32; PARAM_WORDS], Error> {
        let Self { shape, key, value, key_cache, value_cache } = self;
        let elements = spec.elements();
        let pieces = |field, head_dim: u32| in_units(field, u64::from(head_dim), elements);
        let source = |field, elements| in_units(field, elements, spec.access.unit(spec.source));
        let cache = |field, elements| in_units(field, elements, spec.access.unit(spec.cache));
        let key_pieces = pieces("head_dim_k", shape.head_dim_k)?;
        let value_pieces = pieces("head_dim_v", shape.head_dim_v)?;
        Ok([
            shape.tokens,
            shape.kv_heads,
            shape.block_size,
            shape.num_slots,
            shape.slots_offset,
            key_pieces.max(value_pieces),
            key_pieces,
            value_pieces,
            source("key.offset", key.offset)?,
            source("key.token_stride", key.token_stride)?,
            source("key.head_stride", key.head_stride)?,
            source("value.offset", value.offset)?,
            source("value.token_stride", value.token_stride)?,
            source("value.head_stride", value.head_stride)?,
            cache("key_cache.offset", key_cache.offset)?,
            cache("key_cache.block_stride", key_cache.block_stride)?,
            cache("key_cache.token_stride", key_cache.token_stride)?,
            cache("key_cache.head_stride", key_cache.head_stride)?,
            cache("value_cache.offset", value_cache.offset)?,
            cache("value_cache.block_stride", value_cache.block_stride)?,
            cache("value_cache.token_stride", value_cache.token_stride)?,
            cache("value_cache.head_stride", value_cache.head_stride)?,
            0,
            0,
        ])
    }
}

/// Elements as whole units, which must fit a 32-bit index.
fn in_units(field: &'static str, value: u64, unit: u32) -> Result<u32, Error> {
    dispatch::in_units(FAMILY, field, value, unit)
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteKv {
    spec: WriteKvSpec,
    shader: Shader,
}

impl WriteKv {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for [`Access::Half`] without f16 or with bf16.
    pub fn new(spec: WriteKvSpec) -> Result<Self, Error> {
        let WriteKvSpec { source, cache, access } = spec;
        if !spec.exists() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: source, cache });
        }
        let elements = spec.elements();
        let (source_type, source_size) = spec.array_type(source);
        let (cache_type, cache_size) = spec.array_type(cache);
        let variables = context! {
            name => spec.name(),
            source => source.name(),
            cache => cache.name(),
            access => access.name(),
            elements,
            source_units => elements / access.unit(source),
            cache_units => elements / access.unit(cache),
            source_type,
            cache_type,
            workgroup_size => WORKGROUP_SIZE,
        };
        let text = template::render(FAMILY, include_str!("../kernels/write_kv.wgsl"), variables)?;
        let binding = |index, name, kind, element_size| Binding { index, name, kind, element_size };
        let bindings = vec![
            binding(0, "params", BindingKind::Uniform { size: 4 * PARAM_WORDS as u32 }, 4),
            binding(1, "key", BindingKind::ReadOnly, source_size),
            binding(2, "value", BindingKind::ReadOnly, source_size),
            binding(3, "slots", BindingKind::ReadOnly, 4),
            binding(4, "key_cache", BindingKind::ReadWrite, cache_size),
            binding(5, "value_cache", BindingKind::ReadWrite, cache_size),
        ];
        Ok(Self {
            spec,
            shader: Shader {
                family: FAMILY,
                name: spec.name(),
                text,
                bindings,
                workgroup_size: WORKGROUP_SIZE,
                needs_f16: access == Access::Half,
                needs_subgroups: false,
                needs_matrices: false,
            },
        })
    }

    /// The variant.
    pub fn spec(&self) -> WriteKvSpec {
        self.spec
    }

    /// The rendered kernel.
    pub fn shader(&self) -> &Shader {
        &self.shader
    }

    /// The rendered kernel, by value.
    pub fn into_shader(self) -> Shader {
        self.shader
    }

    /// Workgroups for a shape on a device that allows `per_dimension` of them along one axis.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension (a call without tokens needs no dispatch),
    /// [`Error::NotDivisible`] when the variant's units do not divide a head dimension,
    /// [`Error::TooLarge`] and [`Error::TooManyWorkgroups`] beyond 32-bit indices or the device's limit.
    pub fn workgroups(&self, shape: WriteKvShape, per_dimension: u32) -> Result<[u32; 3], Error> {
        let WriteKvShape { tokens, kv_heads, head_dim_k, head_dim_v, block_size, .. } = shape;
        for (field, value) in [
            ("tokens", tokens),
            ("kv_heads", kv_heads),
            ("head_dim_k", head_dim_k),
            ("head_dim_v", head_dim_v),
            ("block_size", block_size),
        ] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        let elements = self.spec.elements();
        let pieces = in_units("head_dim_k", u64::from(head_dim_k), elements)?.max(in_units(
            "head_dim_v",
            u64::from(head_dim_v),
            elements,
        )?);
        let rows = u64::from(tokens) * u64::from(kv_heads);
        Invocations {
            kernel: FAMILY,
            field: "tokens * kv_heads * head_dim",
            count: rows.saturating_mul(u64::from(pieces)),
            workgroup_size: WORKGROUP_SIZE,
        }
        .workgroups(per_dimension)
    }
}
