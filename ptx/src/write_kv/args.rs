//! What one launch of `write_kv` works on, and the kernel's parameters in their order.

use super::{WriteKvShape, WriteKvSpec};
use crate::kernel::{Arg, Param, parameters};

/// Where one of K and V comes from: `[tokens, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceRows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a token to the next.
    pub token_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// Where one of K and V goes: `[blocks, block_size, kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheRows {
    /// Device address of the first element.
    pub address: u64,
    /// Elements from a block to the next.
    pub block_stride: u64,
    /// Elements from a token of a block to the next.
    pub token_stride: u64,
    /// Elements from a head to the next.
    pub head_stride: u64,
}

/// The scales of an fp8 cache, which holds `value / scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scales {
    /// Device address of the scale (f32) of K, or of one for each head.
    pub key: u64,
    /// Device address of the scale (f32) of V, or of one for each head.
    pub value: u64,
    /// Whether each head has its own.
    pub per_head: bool,
}

/// What one launch works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvArgs {
    /// Sizes; the same as given to [`WriteKv::launch`](super::WriteKv::launch).
    pub shape: WriteKvShape,
    /// New K rows.
    pub key: SourceRows,
    /// New V rows.
    pub value: SourceRows,
    /// Device address of the slots, i64 `[tokens]`.
    pub slots: u64,
    /// K cache.
    pub key_cache: CacheRows,
    /// V cache.
    pub value_cache: CacheRows,
    /// Tokens of a block, a power of two, as its logarithm in base 2.
    pub block_shift: u32,
    /// Slots of the cache: blocks × block size. Slots outside are skipped.
    pub num_slots: u32,
    /// Scales, read by the fp8 variants only.
    pub scales: Option<Scales>,
    /// Rotary embedding, for its variants only.
    pub rotary: Option<RotaryArgs>,
}

/// Rotary embedding: by which angles K and queries turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RotaryArgs {
    /// Device address of the queries, `[tokens, q_heads, head_dim_k]`; of the type of K.
    pub query: SourceRows,
    /// Where the turned queries go; may be where they come from.
    pub query_out: SourceRows,
    /// Device address of the positions, i32 or i64 `[tokens]`.
    pub positions: u64,
    /// Bytes of a position: 4 or 8.
    pub position_bytes: u32,
    /// Device address of the cosines, f32 `[num_positions, half]`.
    pub cos: u64,
    /// Device address of the sines.
    pub sin: u64,
    /// Elements from a position's cosines, or sines, to the next's.
    pub table_stride: u64,
    /// Rows of the tables. Positions outside give NaN.
    pub num_positions: u32,
    /// Pairs that turn: half of the rotary dimension.
    pub half: u32,
}

parameters! {
    /// The parameters of all variants.
    const PARAMS of fn WriteKvArgs::common_values(&self);
    key: Pointer = self.key.address,
    value: Pointer = self.value.address,
    slots: Pointer = self.slots,
    key_cache: Pointer = self.key_cache.address,
    value_cache: Pointer = self.value_cache.address,
    key_scale: Pointer = self.scales.map_or(0, |scales| scales.key),
    value_scale: Pointer = self.scales.map_or(0, |scales| scales.value),
    key_token_stride: U64 = self.key.token_stride,
    key_head_stride: U64 = self.key.head_stride,
    value_token_stride: U64 = self.value.token_stride,
    value_head_stride: U64 = self.value.head_stride,
    key_cache_block_stride: U64 = self.key_cache.block_stride,
    key_cache_token_stride: U64 = self.key_cache.token_stride,
    key_cache_head_stride: U64 = self.key_cache.head_stride,
    value_cache_block_stride: U64 = self.value_cache.block_stride,
    value_cache_token_stride: U64 = self.value_cache.token_stride,
    value_cache_head_stride: U64 = self.value_cache.head_stride,
    tokens: U32 = self.shape.tokens,
    kv_heads: U32 = self.shape.kv_heads,
    head_dim_k: U32 = self.shape.head_dim_k,
    head_dim_v: U32 = self.shape.head_dim_v,
    block_shift: U32 = self.block_shift,
    num_slots: U32 = self.num_slots,
    scale_head_stride: U32 = u32::from(self.scales.is_some_and(|scales| scales.per_head)),
}

parameters! {
    /// What the variants with rotary embedding have beside.
    const ROTARY_PARAMS of fn RotaryArgs::values(&self, q_heads: u32);
    query: Pointer = self.query.address,
    query_out: Pointer = self.query_out.address,
    positions: Pointer = self.positions,
    cos: Pointer = self.cos,
    sin: Pointer = self.sin,
    query_token_stride: U64 = self.query.token_stride,
    query_head_stride: U64 = self.query.head_stride,
    query_out_token_stride: U64 = self.query_out.token_stride,
    query_out_head_stride: U64 = self.query_out.head_stride,
    table_stride: U64 = self.table_stride,
    q_heads: U32 = q_heads,
    rotary_half: U32 = self.half,
    num_positions: U32 = self.num_positions,
    position_bytes: U32 = self.position_bytes,
}

/// The parameters of a variant.
pub(super) fn params(spec: WriteKvSpec) -> Vec<Param> {
    let mut params = PARAMS.to_vec();
    if spec.rotary.is_some() {
        params.extend(ROTARY_PARAMS);
    }
    params
}

impl WriteKvArgs {
    /// The values of the parameters, in launch order.
    pub fn values(&self) -> Vec<Arg> {
        let mut values = self.common_values().to_vec();
        if let Some(rotary) = self.rotary {
            values.extend(rotary.values(self.shape.q_heads));
        }
        values
    }
}
