//! `write_kv`: new keys and values into their slots (the paper's fused reshape and block write, section 5.1),
//! converted to the cache's type.

use super::elements::{E4m3, E5m2, Element};
use super::io::{self, KvPair, KvScale};
use crate::{
    AttentionConfig, CacheLayout, HostTensor, HostTensorMut, KvStrides, ProblemError, RowStrides, WriteKv,
};
use half::{bf16, f16};

/// Writes new keys and values into the cache. The source may be f32, f16 or bf16 whatever the cache is; a
/// stored element is `value / scale` rounded to nearest, ties to even, and an 8-bit one saturates at its
/// type's largest finite value.
///
/// Where keys and values share memory, use [`write_keys`] and [`write_values`], or the first alone if values
/// are a part of the keys.
///
/// # Errors
/// [`ProblemError`] if a slot lies outside of the cache or a buffer is too short or of the wrong dtype; nothing
/// has been written then.
pub fn write_kv(
    config: &AttentionConfig,
    layout: &CacheLayout,
    write: &WriteKv<'_>,
    source: KvPair<HostTensor<'_>>,
    cache: KvPair<HostTensorMut<'_>>,
    scale: KvPair<KvScale<'_>>,
) -> Result<(), ProblemError> {
    write.validate(config, layout)?;
    let k = Side::keys(config, layout, write);
    let v = Side::values(config, layout, write);
    k.check(config, &source.k, &cache.k, &scale.k)?;
    v.check(config, &source.v, &cache.v, &scale.v)?;
    k.write(layout, write.slots, source.k, cache.k, scale.k);
    v.write(layout, write.slots, source.v, cache.v, scale.v);
    Ok(())
}

/// The keys of [`write_kv`] alone.
///
/// # Errors
/// As [`write_kv`].
pub fn write_keys(
    config: &AttentionConfig,
    layout: &CacheLayout,
    write: &WriteKv<'_>,
    source: HostTensor<'_>,
    cache: HostTensorMut<'_>,
    scale: KvScale<'_>,
) -> Result<(), ProblemError> {
    write.validate(config, layout)?;
    let side = Side::keys(config, layout, write);
    side.check(config, &source, &cache, &scale)?;
    side.write(layout, write.slots, source, cache, scale);
    Ok(())
}

/// The values of [`write_kv`] alone.
///
/// # Errors
/// As [`write_kv`].
pub fn write_values(
    config: &AttentionConfig,
    layout: &CacheLayout,
    write: &WriteKv<'_>,
    source: HostTensor<'_>,
    cache: HostTensorMut<'_>,
    scale: KvScale<'_>,
) -> Result<(), ProblemError> {
    write.validate(config, layout)?;
    let side = Side::values(config, layout, write);
    side.check(config, &source, &cache, &scale)?;
    side.write(layout, write.slots, source, cache, scale);
    Ok(())
}

/// Names of one side's buffers in errors.
#[derive(Clone, Copy)]
struct Names {
    source: &'static str,
    cache: &'static str,
    scale: &'static str,
}

/// Keys or values.
struct Side {
    names: Names,
    source: RowStrides,
    cache: KvStrides,
    heads: usize,
    dim: usize,
    source_needed: u64,
    cache_needed: u64,
}

impl Side {
    fn keys(config: &AttentionConfig, layout: &CacheLayout, write: &WriteKv<'_>) -> Self {
        Self {
            names: Names { source: "new K", cache: "K", scale: "k_scale" },
            source: write.k,
            cache: layout.k,
            heads: config.kv_heads,
            dim: config.head_dim_qk,
            source_needed: write.source_extents(config).0,
            cache_needed: layout.k_extent(config),
        }
    }

    fn values(config: &AttentionConfig, layout: &CacheLayout, write: &WriteKv<'_>) -> Self {
        Self {
            names: Names { source: "new V", cache: "V", scale: "v_scale" },
            source: write.v,
            cache: layout.v,
            heads: config.kv_heads,
            dim: config.head_dim_v,
            source_needed: write.source_extents(config).1,
            cache_needed: layout.v_extent(config),
        }
    }

    fn check(
        &self,
        config: &AttentionConfig,
        source: &HostTensor<'_>,
        cache: &HostTensorMut<'_>,
        scale: &KvScale<'_>,
    ) -> Result<(), ProblemError> {
        if source.dtype().is_fp8() {
            let problem = format!("is {}; new keys and values are f32, f16 or bf16", source.dtype());
            return Err(ProblemError::Input { input: self.names.source, problem });
        }
        io::check_len(self.names.source, source.len(), self.source_needed)?;
        io::check_cache(self.names.cache, cache, config, self.cache_needed)?;
        scale.check(self.names.scale, self.heads)
    }

    fn write(
        &self,
        layout: &CacheLayout,
        slots: &[i64],
        source: HostTensor<'_>,
        cache: HostTensorMut<'_>,
        scale: KvScale<'_>,
    ) {
        match source {
            HostTensor::F32(source) => self.write_from(layout, slots, source, cache, scale),
            HostTensor::F16(source) => self.write_from(layout, slots, source, cache, scale),
            HostTensor::Bf16(source) => self.write_from(layout, slots, source, cache, scale),
            // Refused by `check`.
            HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => {}
        }
    }

    fn write_from<S: Element>(
        &self,
        layout: &CacheLayout,
        slots: &[i64],
        source: &[S],
        cache: HostTensorMut<'_>,
        scale: KvScale<'_>,
    ) {
        match cache {
            HostTensorMut::F32(cache) => self.write_typed(layout, slots, source, cache, scale, f32::from_f32),
            HostTensorMut::F16(cache) => self.write_typed(layout, slots, source, cache, scale, f16::from_f32),
            HostTensorMut::Bf16(cache) => {
                self.write_typed(layout, slots, source, cache, scale, bf16::from_f32);
            }
            HostTensorMut::F8E4M3(cache) => {
                self.write_typed(layout, slots, source, cache, scale, |x| E4m3::from_f32(x).0);
            }
            HostTensorMut::F8E5M2(cache) => {
                self.write_typed(layout, slots, source, cache, scale, |x| E5m2::from_f32(x).0);
            }
        }
    }

    fn write_typed<S: Element, T>(
        &self,
        layout: &CacheLayout,
        slots: &[i64],
        source: &[S],
        cache: &mut [T],
        scale: KvScale<'_>,
        from_f32: impl Fn(f32) -> T,
    ) {
        let block_size = layout.block_size as u64;
        for (token, &slot) in slots.iter().enumerate() {
            let Ok(slot) = u64::try_from(slot) else { continue };
            let (block, place) = (slot / block_size, slot % block_size);
            for head in 0..self.heads {
                let from = token as u64 * self.source.token + head as u64 * self.source.head;
                let to = block * self.cache.block + place * self.cache.token + head as u64 * self.cache.head;
                let from = source.get(from as usize..from as usize + self.dim).unwrap_or(&[]);
                let to = cache.get_mut(to as usize..to as usize + self.dim).unwrap_or(&mut []);
                let scale = scale.of(head);
                if scale == 1.0 {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from_f32(from.to_f32()));
                } else {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from_f32(from.to_f32() / scale));
                }
            }
        }
    }
}
