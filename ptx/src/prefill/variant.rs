//! Which variants of `prefill` there are: types, room for a head, and the form.

use std::fmt;

use super::FAMILY;
use crate::DType;
use crate::decode::HEAD_DIMS;

/// How a tile is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `mma.sync` with `cp.async`, at most 105 KiB of shared memory, for GPUs that have twice that: sm_90 and sm_100. Not for
    /// masks of bits over fp8 caches.
    Large,
    /// The same with tiles of half as many keys, at most 71 KiB: for every GPU from sm_80 on.
    Small,
    /// `wgmma` with the copy engine, on Hopper alone, for heads up to 128 over blocks of 16
    /// keys and more, without masks of bits and over caches of the queries' type.
    Hopper,
}

impl Form {
    /// All forms.
    pub const ALL: [Self; 3] = [Self::Large, Self::Small, Self::Hopper];

    /// Whether GPUs of a compute capability run it; Hopper's instructions are Hopper's alone.
    pub const fn runs_on(self, major: u32) -> bool {
        match self {
            Self::Large => major >= 9,
            Self::Small => major >= 8,
            Self::Hopper => major == 9,
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Large => "mma.sync, tiles of 64 keys",
            Self::Small => "mma.sync, tiles of 32 keys",
            Self::Hopper => "wgmma (Hopper)",
        })
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillSpec {
    /// Type of queries and output: f16 or bf16.
    pub dtype: DType,
    /// Type of the cache: that of the queries, or an fp8 one, which the Hopper form has no variant for.
    pub kv_dtype: DType,
    /// Elements of a head that there is room for, one of [`HEAD_DIMS`].
    pub head_dim: u32,
    /// How a tile is computed.
    pub form: Form,
    /// Whether the keys that a row sees are given by bits, and not only by a range; the Hopper form has no such variant.
    pub bits: bool,
}

impl PrefillSpec {
    /// The variant for a head of so many elements. `None` if there is none.
    pub fn for_head(dtype: DType, kv_dtype: DType, head_dim: u32, form: Form, bits: bool) -> Option<Self> {
        let head_dim = HEAD_DIMS.into_iter().find(|&room| head_dim <= room)?;
        Some(Self { dtype, kv_dtype, head_dim, form, bits }).filter(|spec| spec.exists())
    }

    /// Every variant.
    pub fn all() -> impl Iterator<Item = Self> {
        let types = [DType::F16, DType::Bf16].into_iter();
        let types = types.flat_map(|dtype| [dtype, DType::Fp8E4m3, DType::Fp8E5m2].map(|kv| (dtype, kv)));
        let rooms = types.flat_map(|types| HEAD_DIMS.into_iter().map(move |dim| (types, dim)));
        let kinds = [false, true].into_iter().flat_map(|bits| Form::ALL.map(|form| (form, bits)));
        rooms.flat_map(move |((dtype, kv_dtype), dim)| {
            kinds.clone().filter_map(move |(form, bits)| Self::for_head(dtype, kv_dtype, dim, form, bits))
        })
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        matches!(self.dtype, DType::F16 | DType::Bf16)
            && (self.kv_dtype == self.dtype || self.kv_dtype.is_fp8())
            && HEAD_DIMS.contains(&self.head_dim)
            && match self.form {
                Form::Hopper => self.head_dim <= 128 && !self.bits && !self.kv_dtype.is_fp8(),
                // With both, heads of 128 do not fit the registers.
                Form::Large => !(self.bits && self.kv_dtype.is_fp8()),
                Form::Small => true,
            }
    }

    /// The entry point: `prefill_bf16_d128`, `prefill_bf16_e4m3_d128_bits_small`.
    pub fn entry(self) -> String {
        let Self { dtype, kv_dtype, head_dim, form, bits } = self;
        let cache = if kv_dtype == dtype { String::new() } else { format!("_{kv_dtype}") };
        let bits = if bits { "_bits" } else { "" };
        let form = match form {
            Form::Large => "",
            Form::Small => "_small",
            Form::Hopper => "_hopper",
        };
        format!("{FAMILY}_{dtype}{cache}_d{head_dim}{bits}{form}")
    }

    /// The same type and room in the large form, over a cache of the queries' type and without bits: whose merge it shares.
    #[must_use]
    pub const fn usual(self) -> Self {
        Self { kv_dtype: self.dtype, form: Form::Large, bits: false, ..self }
    }

    /// Rows of a tile.
    pub const fn tile_rows(self) -> u32 {
        match self.form {
            Form::Hopper => 128,
            Form::Large | Form::Small => self.warps() * self.atoms() * 16,
        }
    }

    /// Keys that a thread block takes at a time.
    pub const fn tile_keys(self) -> u32 {
        let large = if self.head_dim <= 128 { 64 } else { 32 };
        match self.form {
            Form::Large => large,
            Form::Small => large / 2,
            Form::Hopper => 128,
        }
    }

    /// Warps of a thread block.
    pub(super) const fn warps(self) -> u32 {
        match self.form {
            Form::Hopper => 12,
            Form::Large | Form::Small => 4,
        }
    }

    /// Tiles of K, and of V, that there is room for.
    pub(super) const fn stages(self) -> u32 {
        match (self.form, self.head_dim) {
            (Form::Hopper, ..=64) => 4,
            _ => 2,
        }
    }

    /// Rows of a warp, in sixteens: as many accumulators as registers hold.
    pub(super) const fn atoms(self) -> u32 {
        if self.head_dim <= 128 { 2 } else { 1 }
    }

    /// Thread blocks that are to fit a multiprocessor.
    pub const fn blocks_per_multiprocessor(self) -> u32 {
        match self.form {
            Form::Hopper => 1,
            Form::Large | Form::Small => 2,
        }
    }

    /// Bytes of shared memory of a thread block.
    pub const fn shared_bytes(self) -> u32 {
        self.static_bytes() + self.dynamic_bytes()
    }

    /// Of them, those that the text declares: a description of each row, and with bits, for four tiles of keys, each
    /// row's words and four words for each warp.
    pub(super) const fn static_bytes(self) -> u32 {
        let bits =
            if self.bits { 4 * (self.tile_words() * self.tile_rows() * 4 + self.warps() * 16) } else { 0 };
        match self.form {
            Form::Hopper => 0,
            Form::Large | Form::Small => self.tile_rows() * 32 + bits,
        }
    }

    /// Words that hold a bit for each of a tile's keys.
    pub(super) const fn tile_words(self) -> u32 {
        self.tile_keys().div_ceil(32)
    }

    /// Those of Q, and of the tiles of K and V, of which an fp8 cache's second one has its bytes; on Hopper Q twice, two tables of rows and the barriers, from the first
    /// multiple of 1024 on.
    pub(super) const fn dynamic_bytes(self) -> u32 {
        let tiles = 2 * self.stages() * self.tile_keys();
        let row = self.head_dim * 2;
        match self.form {
            Form::Hopper => {
                let barriers = 4 * 8 * self.stages() + 8 + 2 * 8 * 4;
                1024 + (2 * self.tile_rows() + tiles) * row + 2 * self.tile_rows() * 32 + barriers
            }
            Form::Large | Form::Small => {
                // One tile of each is converted; the next one's bytes are half as many.
                let spared = if self.kv_dtype.is_fp8() { self.tile_keys() } else { 0 };
                (self.tile_rows() + tiles - spared) * row
            }
        }
    }
}
