//! Which variants of `decode` there are: types, room for a head, rings of shared memory, and what moves the clock.

use super::{FAMILY, TILE_KEYS, TILE_QUERIES};
use crate::DType;

/// Elements of a head that a variant has room for; a head takes the smallest that holds it.
pub const HEAD_DIMS: [u32; 3] = [64, 128, 256];

/// The most warps of a thread block: its merge keeps a maximum and a sum of each in registers.
const MAX_WARPS: u32 = 8;

/// How much shared memory a thread block's rings take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ring {
    /// 128 KiB: one thread block of many warps fills a multiprocessor. sm_80, 90 and 100 have that much.
    Large,
    /// At most 96 KiB, which every GPU from sm_80 on has; two or three thread blocks fit a multiprocessor of sm_90.
    Small,
}

impl Ring {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Large, Self::Small];

    /// Shared memory that a GPU must give a thread block, in bytes: sm_80's, and the least from there on (sm_86, 89,
    /// 120).
    pub const fn shared(self) -> u32 {
        match self {
            Self::Large => 163 << 10,
            Self::Small => 99 << 10,
        }
    }
}

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTuning {
    /// Warps of a thread block, which share an item's heads and keys: 1, 2, 4 or 8.
    pub warps: u32,
    /// Tiles in a warp's ring, one in use and the others on their way: 2 to 16.
    pub stages: u32,
    /// Thread blocks that fit a multiprocessor at once; bounds the registers.
    pub blocks_per_multiprocessor: u32,
    /// Splits of a row that are merged together before the others: a power of two, at least 2.
    pub merge_group: u32,
    /// What the L2 fetches beside a 16-byte load of K or V.
    pub prefetch: Prefetch,
}

/// What the L2 fetches beside a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// The 128 bytes around.
    L2Bytes128,
    /// The 256 bytes around.
    L2Bytes256,
}

impl Prefetch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::L2Bytes128, Self::L2Bytes256];

    /// As PTX spells it, after `cp.async.cg.shared.global`.
    pub(super) const fn ptx(self) -> &'static str {
        match self {
            Self::None => "",
            Self::L2Bytes128 => ".L2::128B",
            Self::L2Bytes256 => ".L2::256B",
        }
    }

    /// Short name, part of an entry point's.
    const fn name(self) -> &'static str {
        match self {
            Self::None => "p0",
            Self::L2Bytes128 => "p128",
            Self::L2Bytes256 => "p256",
        }
    }
}

impl DecodeTuning {
    /// What measured best for rows of so many bytes in shared memory.
    pub const fn for_row_bytes(bytes: u32, ring: Ring) -> Self {
        let (warps, stages, blocks_per_multiprocessor) = match (ring, bytes) {
            (Ring::Large, ..=64) => (8, 8, 1),
            (Ring::Large, 65..=128) => (8, 4, 1),
            (Ring::Large, 129..=256) => (8, 2, 1),
            (Ring::Large, 257..=512) => (4, 2, 1),
            (Ring::Large, _) => (2, 2, 1),
            (Ring::Small, ..=64) => (4, 8, 3),
            (Ring::Small, 65..=128) => (4, 4, 3),
            (Ring::Small, 129..=256) => (4, 3, 2),
            (Ring::Small, 257..=512) => (2, 3, 2),
            (Ring::Small, _) => (1, 3, 2),
        };
        let prefetch = Prefetch::L2Bytes128;
        Self { warps, stages, blocks_per_multiprocessor, merge_group: 16, prefetch }
    }

    /// Whether a kernel can be made of it.
    pub const fn is_valid(self) -> bool {
        1 <= self.warps
            && self.warps <= MAX_WARPS
            && self.warps.is_power_of_two()
            && 2 <= self.stages
            && self.stages <= 16
            && 1 <= self.blocks_per_multiprocessor
            && self.blocks_per_multiprocessor <= 32
            && self.merge_group >= 2
            && self.merge_group.is_power_of_two()
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeSpec {
    /// Type of queries and output: f32, f16 or bf16.
    pub q_dtype: DType,
    /// Type of the cache: the same, or with 16-bit queries one of the fp8 types (sm_89).
    pub kv_dtype: DType,
    /// Elements of a head that there is room for, one of [`HEAD_DIMS`].
    pub head_dim: u32,
    /// How much shared memory it takes.
    pub ring: Ring,
    /// What it is tuned for.
    pub tuning: DecodeTuning,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on); see
    /// [`DecodeSpec::dependently`].
    pub dependent: bool,
}

impl DecodeSpec {
    /// The variant for a head of so many elements, tuned as it measured best. `None` if there is none.
    pub fn for_head(q_dtype: DType, kv_dtype: DType, head_dim: u32, ring: Ring) -> Option<Self> {
        let head_dim = HEAD_DIMS.into_iter().find(|&room| head_dim <= room)?;
        let tuning = DecodeTuning::for_row_bytes(head_dim * kv_dtype.size(), ring);
        Some(Self { q_dtype, kv_dtype, head_dim, ring, tuning, dependent: false })
            .filter(|spec| spec.exists())
    }

    /// The same for a programmatic dependent launch, where there is one: with the large ring. Before it waits for the kernel
    /// before it, it reads work items, block tables, and keys and values but the last
    /// [`FRESH_KEYS`](super::FRESH_KEYS) of each row.
    pub fn dependently(self) -> Option<Self> {
        Some(Self { dependent: true, ..self }).filter(|spec| spec.exists())
    }

    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        let types = DType::ALL.into_iter().flat_map(|q| DType::ALL.into_iter().map(move |kv| (q, kv)));
        let rooms = types.flat_map(|(q, kv)| HEAD_DIMS.into_iter().map(move |dim| (q, kv, dim)));
        rooms
            .flat_map(|(q, kv, dim)| {
                Ring::ALL.into_iter().filter_map(move |ring| Self::for_head(q, kv, dim, ring))
            })
            .flat_map(|spec| [Some(spec), spec.dependently()])
            .flatten()
    }

    /// Whether there is such a variant.
    pub fn exists(self) -> bool {
        let Self { q_dtype, kv_dtype, .. } = self;
        let types = !q_dtype.is_fp8() && (q_dtype == kv_dtype || (q_dtype.size() == 2 && kv_dtype.is_fp8()));
        let depends = !self.dependent || self.ring == Ring::Large;
        types && depends && HEAD_DIMS.contains(&self.head_dim) && self.tuning.is_valid()
    }

    /// The entry point: `decode_bf16_e4m3_d128`, and what is tuned otherwise than by default.
    pub fn entry(self) -> String {
        let Self { q_dtype, kv_dtype, head_dim, ring, tuning, dependent } = self;
        let DecodeTuning { warps, stages, blocks_per_multiprocessor, merge_group, prefetch } = tuning;
        let small = if ring == Ring::Small { "_small" } else { "" };
        let pdl = if dependent { "_pdl" } else { "" };
        let plain = format!("{FAMILY}_{q_dtype}_{kv_dtype}_d{head_dim}{small}{pdl}");
        if tuning == DecodeTuning::for_row_bytes(head_dim * kv_dtype.size(), ring) {
            return plain;
        }
        format!("{plain}_w{warps}s{stages}x{blocks_per_multiprocessor}_m{merge_group}_{}", prefetch.name())
    }

    /// Elements that begin at 16-byte boundaries: head dimensions are multiples of 4 in f32 and of 8 else.
    pub const fn dim_multiple(self) -> u32 {
        if self.q_dtype.size() == 4 { 4 } else { 8 }
    }

    /// Bytes of shared memory of a thread block.
    pub const fn shared_bytes(self) -> u32 {
        self.static_bytes() + self.ring_bytes()
    }

    /// Of them, those that the text declares; the ring after them begins at a multiple of 128.
    pub(super) const fn static_bytes(self) -> u32 {
        (self.tuning.warps * TILE_QUERIES * 8 + 4).next_multiple_of(128)
    }

    /// Bytes of shared memory for the rings: `warps` x `stages` tiles of K and V.
    pub(super) const fn ring_bytes(self) -> u32 {
        self.tuning.warps * self.tuning.stages * 2 * TILE_KEYS * self.head_dim * self.kv_dtype.size()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::Decode;
    use super::*;

    #[test]
    fn every_variant_fits_the_gpus_that_it_is_for() {
        for spec in DecodeSpec::all() {
            let kernel = Decode::new(spec).unwrap().into_kernel();
            let shared = kernel.static_shared() + kernel.dynamic_shared();
            let most = spec.ring.shared();
            assert!(shared <= most, "{} takes {shared} bytes", spec.entry());
        }
    }

    #[test]
    fn a_head_takes_the_smallest_variant_that_holds_it() {
        let room =
            |dim| DecodeSpec::for_head(DType::Bf16, DType::Bf16, dim, Ring::Large).map(|spec| spec.head_dim);
        assert_eq!([8, 64, 72, 128, 136, 256].map(room), [64, 64, 128, 128, 256, 256].map(Some));
        assert_eq!(room(264), None);
        for (q, kv) in [(DType::F32, DType::F16), (DType::F16, DType::Bf16), (DType::F32, DType::Fp8E4m3)] {
            assert_eq!(DecodeSpec::for_head(q, kv, 64, Ring::Large), None);
        }
    }
}
