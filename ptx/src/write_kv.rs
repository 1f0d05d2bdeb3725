//! `write_kv`: stores the K and V rows of new tokens into the blocks of a paged cache, in one launch.
//!
//! The paper's fused reshape and block write (Kwon et al., SOSP 2023, section 5.1). Owns how a variant is rendered and the
//! launch geometry; which variants there are is `write_kv/variant.rs`'s, the parameter list `write_kv/args.rs`'s, and the
//! kernel `kernels/write_kv.ptx`.

mod args;
mod variant;

pub use args::{CacheRows, RotaryArgs, Scales, SourceRows, WriteKvArgs};
pub use variant::{LoadHint, RotaryStyle, StoreHint, WriteKvSpec, WriteKvTuning};

use minijinja::context;

use crate::kernel::{Kernel, Launch, Target};
use crate::{Error, template};

/// Family and template name.
const FAMILY: &str = "write_kv";

/// The most threads of a block: enough to hide latency with eight blocks on a multiprocessor.
const MAX_THREADS: u32 = 256;

/// The most blocks along y and z that CUDA allows (along x it allows more than there are tokens).
const MAX_GRID_YZ: u32 = 65_535;

/// The sizes that decide the grid.
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
    /// Query heads that turn along: 0 without queries, and without rotary embedding.
    pub q_heads: u32,
}

/// One variant, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteKv {
    spec: WriteKvSpec,
    kernel: Kernel,
}

impl WriteKv {
    /// Renders a variant.
    ///
    /// # Errors
    /// [`Error::UnsupportedTypes`] for an fp8 source, [`Error::UnsupportedVector`] for a vector that
    /// is neither 1 nor 16 bytes of the source.
    pub fn new(spec: WriteKvSpec) -> Result<Self, Error> {
        let WriteKvSpec { source, cache, vector, rotary, tuning, dependent } = spec;
        if source.is_fp8() {
            return Err(Error::UnsupportedTypes { kernel: FAMILY, source_dtype: source, cache });
        }
        let widest = 16 / source.size();
        if vector != 1 && vector != widest {
            return Err(Error::UnsupportedVector { kernel: FAMILY, vector, source_dtype: source, widest });
        }
        if !tuning.is_valid() {
            return Err(Error::UnsupportedTuning {
                kernel: FAMILY,
                what: "tokens of a thread",
                bounds: "1 to 8",
            });
        }
        if !spec.exists() {
            return Err(Error::UnsupportedTypes {
                kernel: "write_kv for a dependent launch",
                source_dtype: source,
                cache,
            });
        }
        // Ada brought the fp8 conversions, PTX 8.1 their names; PTX 7.4 brought cache hints. Dependent launches came with
        // Hopper.
        let target = match (cache.is_fp8(), dependent) {
            (_, true) => Target::from(90, (8, 0)),
            (true, false) => Target::from(89, (8, 1)),
            (false, false) => Target::from(80, (7, 4)),
        };
        let (load_how, load_policy) = match tuning.load {
            // What the kernel before writes is not constant for as long as this one runs.
            LoadHint::Plain | LoadHint::Stream if dependent => ("ld.global", ""),
            LoadHint::Plain => ("ld.global.nc", ""),
            LoadHint::Stream => ("ld.global.nc.L1::no_allocate", ""),
            LoadHint::Once => ("ld.global.nc.L1::no_allocate.L2::cache_hint", ", %rd_once"),
        };
        let (store_how, store_policy) = match tuning.store {
            StoreHint::Plain => ("st.global", ""),
            StoreHint::Stream => ("st.global.cs", ""),
            StoreHint::Once => ("st.global.L2::cache_hint", ", %rd_once"),
        };
        let entry = spec.entry();
        let variables = context! {
            entry => &entry,
            sm => target.sm,
            ptx_version => format!("{}.{}", target.ptx.0, target.ptx.1),
            max_threads => MAX_THREADS,
            source_dtype => source.name(),
            source_size => source.size(),
            cache_dtype => cache.name(),
            cache_size => cache.size(),
            vector,
            tokens => tuning.tokens,
            dependent,
            fp8 => cache.is_fp8(),
            rotary => rotary.map_or("", RotaryStyle::name),
            load_how,
            load_policy,
            store_how,
            store_policy,
            policies => tuning.load == LoadHint::Once || tuning.store == StoreHint::Once,
        };
        let text = template::render(FAMILY, include_str!("../kernels/write_kv.ptx"), variables)?;
        Ok(Self {
            spec,
            kernel: Kernel {
                family: FAMILY,
                entry,
                text,
                target,
                params: args::params(spec),
                max_threads: MAX_THREADS,
                static_shared: 0,
                dynamic_shared: 0,
            },
        })
    }

    /// The variant.
    pub fn spec(&self) -> WriteKvSpec {
        self.spec
    }

    /// The rendered kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The rendered kernel, by value.
    pub fn into_kernel(self) -> Kernel {
        self.kernel
    }

    /// Grid and block for a shape: threads run along a head's elements, then heads, then tokens.
    ///
    /// # Errors
    /// [`Error::Zero`] for an empty dimension (a call without tokens needs no launch),
    /// [`Error::NotDivisible`] when the vector does not divide a head dimension,
    /// [`Error::GridTooLarge`] beyond CUDA's limits, [`Error::TooLarge`] beyond 2³¹ tokens.
    pub fn launch(&self, shape: WriteKvShape) -> Result<Launch, Error> {
        let WriteKvSpec { vector, tuning, .. } = self.spec;
        for (field, value) in [
            ("tokens", shape.tokens),
            ("kv_heads", shape.kv_heads),
            ("head_dim_k", shape.head_dim_k),
            ("head_dim_v", shape.head_dim_v),
        ] {
            if value == 0 {
                return Err(Error::Zero { kernel: FAMILY, field });
            }
        }
        for (field, value) in [("head_dim_k", shape.head_dim_k), ("head_dim_v", shape.head_dim_v)] {
            if value % vector != 0 {
                return Err(Error::NotDivisible { kernel: FAMILY, vector, field, value });
            }
        }
        // The kernel numbers tokens, those past the last one included, with 32 bits.
        let limit = i32::MAX as u32;
        for (field, value) in
            [("tokens", shape.tokens), ("kv_heads", shape.kv_heads), ("q_heads", shape.q_heads)]
        {
            if value > limit {
                return Err(Error::TooLarge { kernel: FAMILY, field, value, limit });
            }
        }
        let head_dim = shape.head_dim_k.max(shape.head_dim_v);
        let units = (head_dim / vector).div_ceil(2);
        let heads = shape.kv_heads + shape.q_heads;
        let x = units.min(MAX_THREADS);
        let y = heads.min(MAX_THREADS / x);
        // A block has at most 64 threads along z.
        let z = shape.tokens.div_ceil(tuning.tokens).min(MAX_THREADS / (x * y)).min(64);
        let grid = [shape.tokens.div_ceil(z * tuning.tokens), heads.div_ceil(y), units.div_ceil(x)];
        for (field, value, needed) in [("heads", heads, grid[1]), ("head_dim", head_dim, grid[2])] {
            if needed > MAX_GRID_YZ {
                return Err(Error::GridTooLarge { kernel: FAMILY, field, value, needed, limit: MAX_GRID_YZ });
            }
        }
        Ok(Launch { grid, block: [x, y, z], dynamic_shared: 0 })
    }
}
