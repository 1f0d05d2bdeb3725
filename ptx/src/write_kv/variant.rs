//! The variants of `write_kv`: types, widths, rotary embedding and tuning; which of them there are, what each asks of
//! addresses, and its name.

use super::FAMILY;
use crate::DType;

/// Which elements of a head turn together, as a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RotaryStyle {
    /// Element `i` and element `i + rotary_dim / 2`: GPT-NeoX, LLaMA and most others.
    NeoX,
    /// Elements `2 i` and `2 i + 1`: GPT-J, and RoFormer as it was published.
    GptJ,
}

impl RotaryStyle {
    /// Both.
    pub const ALL: [Self; 2] = [Self::NeoX, Self::GptJ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::NeoX => "neox",
            Self::GptJ => "gptj",
        }
    }
}

/// What a load of the new rows asks of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadHint {
    /// Nothing.
    Plain,
    /// No place in the L1: every byte is used once.
    Stream,
    /// The same, and the first to leave the L2.
    Once,
}

/// What a store into the cache asks of the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreHint {
    /// Nothing: attention reads the new rows soon.
    Plain,
    /// Likely not read again soon (`st.cs`).
    Stream,
    /// The first to leave the L2.
    Once,
}

/// What moves the clock but not the result, fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvTuning {
    /// Tokens of a thread, all under way together: 1 to 8.
    pub tokens: u32,
    /// How the new rows are loaded.
    pub load: LoadHint,
    /// How they are stored.
    pub store: StoreHint,
}

impl WriteKvTuning {
    const fn default_of(vector: u32, rotary: Option<RotaryStyle>) -> Self {
        match (vector, rotary) {
            (1, _) => Self { tokens: 1, load: LoadHint::Plain, store: StoreHint::Plain },
            (_, None) => Self { tokens: 2, load: LoadHint::Stream, store: StoreHint::Plain },
            (_, Some(_)) => Self { tokens: 1, load: LoadHint::Plain, store: StoreHint::Plain },
        }
    }

    /// Whether a kernel can be made of it.
    pub const fn is_valid(self) -> bool {
        1 <= self.tokens && self.tokens <= 8
    }
}

/// Which variant: fixed when the text is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteKvSpec {
    /// Element type of the new rows: f32, f16 or bf16.
    pub source: DType,
    /// Element type of the cache. An fp8 cache needs sm_89.
    pub cache: DType,
    /// Elements that a thread moves at once: 1, or as many as fit 16 bytes of the source, see
    /// [`WriteKvSpec::vectorised`].
    pub vector: u32,
    /// Rotary embedding of K, and of the queries if there are any.
    pub rotary: Option<RotaryStyle>,
    /// What it is tuned for.
    pub tuning: WriteKvTuning,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, sm_90 on); see
    /// [`WriteKvSpec::dependently`].
    pub dependent: bool,
}

impl WriteKvSpec {
    /// The fast variant, 16 bytes of the source at once. Needs every address and stride to be a
    /// multiple of [`WriteKvSpec::source_alignment`] or [`WriteKvSpec::cache_alignment`] bytes, and
    /// head dimensions that are multiples of [`WriteKvSpec::vector`].
    pub const fn vectorised(source: DType, cache: DType) -> Self {
        Self::of_vector(source, cache, 16 / source.size(), None)
    }

    /// The variant for everything else: one element at once, aligned to itself.
    pub const fn scalar(source: DType, cache: DType) -> Self {
        Self::of_vector(source, cache, 1, None)
    }

    /// The same with rotary embedding. The fast variant then also needs half of the rotary dimension to be a
    /// multiple of [`WriteKvSpec::vector`], and tables whose address and stride are multiples of 16 bytes.
    #[must_use]
    pub const fn with_rotary(self, style: RotaryStyle) -> Self {
        Self::of_vector(self.source, self.cache, self.vector, Some(style))
    }

    const fn of_vector(source: DType, cache: DType, vector: u32, rotary: Option<RotaryStyle>) -> Self {
        let tuning = WriteKvTuning::default_of(vector, rotary);
        Self { source, cache, vector, rotary, tuning, dependent: false }
    }

    /// The same for a programmatic dependent launch, where there is one: for what engines do at every layer, with the
    /// cache in the type of the new rows, 16 bytes at once, and no rotary embedding or GPT-NeoX's. It reads slots and
    /// positions before it waits for the kernel before it.
    pub fn dependently(self) -> Option<Self> {
        Some(Self { dependent: true, ..self }).filter(|spec| spec.exists())
    }

    pub(super) fn exists(self) -> bool {
        let usual = self.source == self.cache
            && self.vector > 1
            && self.rotary != Some(RotaryStyle::GptJ)
            && self.tuning == WriteKvTuning::default_of(self.vector, self.rotary);
        usual || !self.dependent
    }

    /// Every variant, tuned as it is when nothing else is asked for.
    pub fn all() -> impl Iterator<Item = Self> {
        let rotary = [None, Some(RotaryStyle::NeoX), Some(RotaryStyle::GptJ)];
        let types = [DType::F32, DType::F16, DType::Bf16]
            .into_iter()
            .flat_map(|source| DType::ALL.into_iter().map(move |cache| (source, cache)));
        rotary
            .into_iter()
            .flat_map(move |rotary| {
                types.clone().flat_map(move |(source, cache)| {
                    [16 / source.size(), 1].map(|vector| Self::of_vector(source, cache, vector, rotary))
                })
            })
            .flat_map(|spec| [Some(spec), spec.dependently()])
            .flatten()
    }

    /// Bytes to which the new rows must be aligned.
    pub const fn source_alignment(self) -> u32 {
        let bytes = self.vector * self.source.size();
        if bytes < 16 { bytes } else { 16 }
    }

    /// Bytes to which rows in the cache must be aligned.
    pub const fn cache_alignment(self) -> u32 {
        let bytes = self.vector * self.cache.size();
        if bytes < 16 { bytes } else { 16 }
    }

    /// Bytes to which rows of the tables of cosines and sines must be aligned.
    pub const fn table_alignment(self) -> u32 {
        if self.vector == 1 { 4 } else { 16 }
    }

    /// The entry point: `write_kv_bf16_e4m3_v8`, `write_kv_f16_f16_v8_neox`, and what is tuned otherwise than by
    /// default.
    pub fn entry(self) -> String {
        let Self { source, cache, vector, rotary, tuning, dependent } = self;
        let rotary_name = rotary.map(|style| format!("_{}", style.name())).unwrap_or_default();
        let pdl = if dependent { "_pdl" } else { "" };
        let plain = format!("{FAMILY}_{source}_{cache}_v{vector}{rotary_name}{pdl}");
        if tuning == WriteKvTuning::default_of(vector, rotary) {
            return plain;
        }
        let load = match tuning.load {
            LoadHint::Plain => "plain",
            LoadHint::Stream => "stream",
            LoadHint::Once => "once",
        };
        let store = match tuning.store {
            StoreHint::Plain => "plain",
            StoreHint::Stream => "stream",
            StoreHint::Once => "once",
        };
        format!("{plain}_t{}_{load}_{store}", tuning.tokens)
    }
}
