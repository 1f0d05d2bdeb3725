//! What goes into a run and what comes out, and the checks that need the buffers themselves: dtype, length
//! and presence. Shapes and tables were checked by [`Problem`].

use crate::{AttentionConfig, CacheLayout, DType, HostTensor, HostTensorMut, Problem, ProblemError};

/// What stored elements of a cache are multiplied with: dequantised value = stored · scale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum KvScale<'a> {
    /// No scale.
    #[default]
    One,
    /// One for the whole tensor.
    PerTensor(f32),
    /// One for each key-value head, `[kv_heads]`.
    PerHead(&'a [f32]),
}

impl KvScale<'_> {
    /// The factor of a key-value head. After [`KvScale::check`] every head has one.
    pub(super) fn of(&self, kv_head: usize) -> f32 {
        match self {
            Self::One => 1.0,
            Self::PerTensor(scale) => *scale,
            Self::PerHead(scales) => scales.get(kv_head).copied().unwrap_or(1.0),
        }
    }

    pub(super) fn check(&self, input: &'static str, kv_heads: usize) -> Result<(), ProblemError> {
        let scales = match self {
            Self::One => return Ok(()),
            Self::PerTensor(scale) => std::slice::from_ref(scale),
            Self::PerHead(scales) => scales,
        };
        if matches!(self, Self::PerHead(_)) && scales.len() != kv_heads {
            let problem = format!("{} scales for {kv_heads} key-value heads; give one each", scales.len());
            return Err(ProblemError::Input { input, problem });
        }
        match scales.iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
            Some(scale) => {
                let problem = format!("a scale is {scale}; scales must be finite and above 0");
                Err(ProblemError::Input { input, problem })
            }
            None => Ok(()),
        }
    }
}

/// A thing for keys and the same thing for values.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvPair<T> {
    /// For keys.
    pub k: T,
    /// For values.
    pub v: T,
}

impl<T> KvPair<T> {
    /// Both.
    pub const fn new(k: T, v: T) -> Self {
        Self { k, v }
    }
}

/// What a run reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries, with the strides of the problem (`[total_queries, q_heads, head_dim_qk]` when packed).
    pub q: HostTensor<'a>,
    /// Key cache, with the strides of the layout.
    pub k: HostTensor<'a>,
    /// Value cache, with the strides of the layout; may be the same memory as `k`.
    pub v: HostTensor<'a>,
    /// What stored keys are multiplied with.
    pub k_scale: KvScale<'a>,
    /// What stored values are multiplied with.
    pub v_scale: KvScale<'a>,
    /// `[q_heads]`, if and only if the configuration has `alibi`.
    pub alibi_slopes: Option<&'a [f32]>,
    /// `[q_heads]`, if and only if the configuration has `sinks`.
    pub sinks: Option<&'a [f32]>,
}

impl<'a> Inputs<'a> {
    /// Queries and caches without scales, slopes or sinks.
    pub const fn new(q: HostTensor<'a>, k: HostTensor<'a>, v: HostTensor<'a>) -> Self {
        let (k_scale, v_scale) = (KvScale::One, KvScale::One);
        Self { q, k, v, k_scale, v_scale, alibi_slopes: None, sinks: None }
    }

    pub(super) fn check(&self, problem: &Problem<'_>) -> Result<(), ProblemError> {
        let (config, layout) = (problem.config(), problem.layout());
        check_tensor("q", self.q.dtype(), config.q_dtype, self.q.len(), problem.q_extent())?;
        check_tensor("K", self.k.dtype(), config.kv_dtype, self.k.len(), layout.k_extent(config))?;
        check_tensor("V", self.v.dtype(), config.kv_dtype, self.v.len(), layout.v_extent(config))?;
        self.k_scale.check("k_scale", config.kv_heads)?;
        self.v_scale.check("v_scale", config.kv_heads)?;
        check_head_values("alibi_slopes", "alibi", config.alibi, self.alibi_slopes, config.q_heads)?;
        check_head_values("sinks", "sinks", config.sinks, self.sinks, config.q_heads)
    }
}

/// What a run writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// Outputs, with the strides of the problem (`[total_queries, q_heads, head_dim_v]` when packed).
    pub out: HostTensorMut<'a>,
    /// Natural logarithm of the softmax's denominator, `[total_queries, q_heads]`; −∞ for a row that saw no
    /// key.
    pub lse: Option<&'a mut [f32]>,
}

impl<'a> Outputs<'a> {
    /// Outputs without `lse`.
    pub const fn new(out: HostTensorMut<'a>) -> Self {
        Self { out, lse: None }
    }

    pub(super) fn check(&self, problem: &Problem<'_>) -> Result<(), ProblemError> {
        check_tensor(
            "out",
            self.out.dtype(),
            problem.config().q_dtype,
            self.out.len(),
            problem.out_extent(),
        )?;
        match &self.lse {
            Some(lse) => check_len("lse", lse.len(), problem.lse_extent()),
            None => Ok(()),
        }
    }
}

/// The caches of a write or copy against their layout.
pub(super) fn check_cache(
    tensor: &'static str,
    cache: &HostTensorMut<'_>,
    config: &AttentionConfig,
    needed: u64,
) -> Result<(), ProblemError> {
    check_tensor(tensor, cache.dtype(), config.kv_dtype, cache.len(), needed)
}

pub(super) fn check_tensor(
    tensor: &'static str,
    found: DType,
    expected: DType,
    len: usize,
    needed: u64,
) -> Result<(), ProblemError> {
    if found != expected {
        return Err(ProblemError::BufferDType { tensor, found, expected });
    }
    check_len(tensor, len, needed)
}

pub(super) fn check_len(tensor: &'static str, len: usize, needed: u64) -> Result<(), ProblemError> {
    match (len as u64) < needed {
        true => Err(ProblemError::BufferTooShort { tensor, len: len as u64, needed }),
        false => Ok(()),
    }
}

fn check_head_values(
    input: &'static str,
    field: &str,
    wanted: bool,
    values: Option<&[f32]>,
    q_heads: usize,
) -> Result<(), ProblemError> {
    let problem = match (wanted, values) {
        (false, None) => return Ok(()),
        (true, Some(values)) if values.len() == q_heads => return Ok(()),
        (true, Some(values)) => format!("{} values for {q_heads} query heads; give one each", values.len()),
        (true, None) => format!("missing, but the configuration has {field}; give one value a query head"),
        (false, Some(_)) => format!("given, but the configuration has no {field}; set it or leave them out"),
    };
    Err(ProblemError::Input { input, problem })
}

/// Number of elements that a cache with these strides needs, for K and V.
pub(super) fn extents(layout: &CacheLayout, config: &AttentionConfig) -> KvPair<u64> {
    KvPair::new(layout.k_extent(config), layout.v_extent(config))
}
