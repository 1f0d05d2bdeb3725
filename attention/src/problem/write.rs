//! The description of a `write_kv`: new keys and values, and the slot that each token goes to.

use super::{AttentionConfig, CacheLayout, ProblemError, RowStrides};

/// New keys and values to be written into their blocks (the paper's fused reshape and block write,
/// section 5.1). Token `t` goes to slot `slots[t]`: block `slot / block_size`, place `slot % block_size`.
#[derive(Clone, Copy, Debug)]
pub struct WriteKv<'a> {
    /// `[tokens]`; a negative slot skips its token, and no slot occurs twice.
    pub slots: &'a [i64],
    /// Strides of the new keys, `[tokens, kv_heads, head_dim_qk]`.
    pub k: RowStrides,
    /// Strides of the new values, `[tokens, kv_heads, head_dim_v]`.
    pub v: RowStrides,
}

impl<'a> WriteKv<'a> {
    /// New keys and values without gaps.
    pub fn packed(slots: &'a [i64], config: &AttentionConfig) -> Self {
        let k = RowStrides::packed(config.kv_heads, config.head_dim_qk);
        let v = RowStrides::packed(config.kv_heads, config.head_dim_v);
        Self { slots, k, v }
    }

    /// Checks configuration, layout, strides and slots.
    ///
    /// # Errors
    /// [`ProblemError`] names the field, its value and what it must be.
    pub fn validate(&self, config: &AttentionConfig, layout: &CacheLayout) -> Result<(), ProblemError> {
        config.validate()?;
        layout.validate(config)?;
        self.k.validate("new K", config.kv_heads, config.head_dim_qk)?;
        self.v.validate("new V", config.kv_heads, config.head_dim_v)?;
        let slots = layout.slots();
        match self.slots.iter().enumerate().find(|&(_, &slot)| slot >= 0 && slot as u64 >= slots) {
            Some((token, &value)) => Err(ProblemError::Slot { token, value, slots }),
            None => Ok(()),
        }
    }

    /// Elements that the buffers of new keys and values must hold.
    pub fn source_extents(&self, config: &AttentionConfig) -> (u64, u64) {
        let tokens = self.slots.len();
        (
            self.k.extent(tokens, config.kv_heads, config.head_dim_qk),
            self.v.extent(tokens, config.kv_heads, config.head_dim_v),
        )
    }
}
