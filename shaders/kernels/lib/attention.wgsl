//# What decode and prefill share: parameters, bindings, constants.

//# Parameters and bindings, with caches in units of this WGSL type.
<% macro interface(unit) %>
struct Params {
    tiles: u32,         // workgroups of a decode's item: KV heads * tiles of query heads
    kv_heads: u32,
    group_size: u32,    // query heads that share a KV head
    block_shift: u32,   // block size is a power of two
    k_vectors: u32,     // head_dim_k / 4
    v_vectors: u32,     // head_dim_v / 4
    k_units: u32,
    v_units: u32,
    q_offset: u32,      // in words
    q_row_stride: u32,
    q_head_stride: u32,
    out_offset: u32,    // in words
    out_row_stride: u32,
    out_head_stride: u32,
    lse_offset: u32,
    has_lse: u32,
    k_offset: u32,      // in units
    k_block_stride: u32,
    k_token_stride: u32,
    k_head_stride: u32,
    v_offset: u32,      // in units
    v_block_stride: u32,
    v_token_stride: u32,
    v_head_stride: u32,
    terms_offset: u32,
    scale: f32,
    softcap: f32,       // 0: none
    unused: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<u32>;
@group(0) @binding(2) var<storage, read> k_cache: array<${ unit }>;
@group(0) @binding(3) var<storage, read> v_cache: array<${ unit }>;
@group(0) @binding(4) var<storage, read> plan: array<u32>;
@group(0) @binding(5) var<storage, read> terms: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<u32>;
@group(0) @binding(7) var<storage, read_write> lse: array<u32>;
@group(0) @binding(8) var<storage, read_write> partials: array<vec4<f32>>;

// Below every score. WGSL lets a compiler assume that there are no infinities, so none takes part.
const LOWEST: f32 = -3.4e38;
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
<%- endmacro %>
