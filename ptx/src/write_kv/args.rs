//! What one launch of `write_kv` works on, and the kernel's parameters in their order.

use super::{WriteKvShape, WriteKvSpec};
use crate::kernel::{Arg, Param, ParamType};

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
    /// Sizes; the same as given to [`WriteKv::launch`].
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

const fn param(name: &'static str, ty: ParamType) -> Param {
    Param { name, ty }
}

/// The parameters of all variants.
const PARAMS: [Param; 24] = {
    use ParamType::{Pointer, U32, U64};
    [
        param("key", Pointer),
        param("value", Pointer),
        param("slots", Pointer),
        param("key_cache", Pointer),
        param("value_cache", Pointer),
        param("key_scale", Pointer),
        param("value_scale", Pointer),
        param("key_token_stride", U64),
        param("key_head_stride", U64),
        param("value_token_stride", U64),
        param("value_head_stride", U64),
        param("key_cache_block_stride", U64),
        param("key_cache_token_stride", U64),
        param("key_cache_head_stride", U64),
        param("value_cache_block_stride", U64),
        param("value_cache_token_stride", U64),
        param("value_cache_head_stride", U64),
        param("tokens", U32),
        param("kv_heads", U32),
        param("head_dim_k", U32),
        param("head_dim_v", U32),
        param("block_shift", U32),
        param("num_slots", U32),
        param("scale_head_stride", U32),
    ]
};

/// What the variants with rotary embedding have beside.
const ROTARY_PARAMS: [Param; 14] = {
    use ParamType::{Pointer, U32, U64};
    [
        param("query", Pointer),
        param("query_out", Pointer),
        param("positions", Pointer),
        param("cos", Pointer),
        param("sin", Pointer),
        param("query_token_stride", U64),
        param("query_head_stride", U64),
        param("query_out_token_stride", U64),
        param("query_out_head_stride", U64),
        param("table_stride", U64),
        param("q_heads", U32),
        param("rotary_half", U32),
        param("num_positions", U32),
        param("position_bytes", U32),
    ]
};

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
        let scales = self.scales.unwrap_or(Scales { key: 0, value: 0, per_head: false });
        let mut values = vec![
            Arg::pointer(self.key.address),
            Arg::pointer(self.value.address),
            Arg::pointer(self.slots),
            Arg::pointer(self.key_cache.address),
            Arg::pointer(self.value_cache.address),
            Arg::pointer(scales.key),
            Arg::pointer(scales.value),
            Arg::u64(self.key.token_stride),
            Arg::u64(self.key.head_stride),
            Arg::u64(self.value.token_stride),
            Arg::u64(self.value.head_stride),
            Arg::u64(self.key_cache.block_stride),
            Arg::u64(self.key_cache.token_stride),
            Arg::u64(self.key_cache.head_stride),
            Arg::u64(self.value_cache.block_stride),
            Arg::u64(self.value_cache.token_stride),
            Arg::u64(self.value_cache.head_stride),
            Arg::u32(self.shape.tokens),
            Arg::u32(self.shape.kv_heads),
            Arg::u32(self.shape.head_dim_k),
            Arg::u32(self.shape.head_dim_v),
            Arg::u32(self.block_shift),
            Arg::u32(self.num_slots),
            Arg::u32(u32::from(scales.per_head)),
        ];
        if let Some(rotary) = self.rotary {
            values.extend([
                Arg::pointer(rotary.query.address),
                Arg::pointer(rotary.query_out.address),
                Arg::pointer(rotary.positions),
                Arg::pointer(rotary.cos),
                Arg::pointer(rotary.sin),
                Arg::u64(rotary.query.token_stride),
                Arg::u64(rotary.query.head_stride),
                Arg::u64(rotary.query_out.token_stride),
                Arg::u64(rotary.query_out.head_stride),
                Arg::u64(rotary.table_stride),
                Arg::u32(self.shape.q_heads),
                Arg::u32(rotary.half),
                Arg::u32(rotary.num_positions),
                Arg::u32(rotary.position_bytes),
            ]);
        }
        values
    }
}
