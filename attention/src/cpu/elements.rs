//! Element types of caches as Rust types, and the scalar conversions between them and `f32`.
//! Rounding is to nearest, ties to even; the 8-bit types saturate at their largest finite value.

use super::lanes::Vector;
use half::{bf16, f16};

/// An fp8 E4M3 element (OCP OFP8: no infinities, NaN is `0x7f` and `0xff`).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct E4m3(pub(super) u8);

/// An fp8 E5M2 element (OCP OFP8: the upper byte of a binary16).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct E5m2(pub(super) u8);

/// An element type of a tensor.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Exact.
    fn to_f32(self) -> f32;

    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;

    /// As many elements as the vector has lanes, exactly.
    ///
    /// # Safety
    /// `from` is valid for reads of as many elements.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's; `f16` is a transparent `u16`.
        unsafe { V::load_f16(from.cast()) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's; `bf16` is a transparent `u16`.
        unsafe { V::load_bf16(from.cast()) }
    }
}

impl E4m3 {
    /// Bytes as elements.
    pub(super) fn slice(bytes: &[u8]) -> &[Self] {
        // SAFETY: a transparent byte without invariants.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
    }
}

impl Element for E4m3 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // The seven magnitude bits, moved to where a binary16 has them, read 2^8 too small: its exponent bias
        // is 15, ours 7. That holds for subnormals too. Only NaN needs care.
        let magnitude = u16::from(self.0 & 0x7f) << 7;
        let sign = u16::from(self.0 & 0x80) << 8;
        match self.0 & 0x7f {
            0x7f => f32::NAN,
            _ => f16::from_bits(sign | magnitude).to_f32() * 256.0,
        }
    }

    fn from_f32(value: f32) -> Self {
        let sign = ((value.to_bits() >> 24) & 0x80) as u8;
        if value.is_nan() {
            return Self(sign | 0x7f);
        }
        // Three stored significand bits, exponents from 2^-6; 448 = 1.75 · 2^8 is code 0x7e.
        Self(sign | round_magnitude(value.abs(), 3, -6).min(0x7e) as u8)
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's; `E4m3` is a transparent `u8`.
        unsafe { V::load_e4m3(from.cast()) }
    }
}

impl E5m2 {
    /// Bytes as elements.
    pub(super) fn slice(bytes: &[u8]) -> &[Self] {
        // SAFETY: a transparent byte without invariants.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
    }
}

impl Element for E5m2 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::from_bits(u16::from(self.0) << 8).to_f32()
    }

    fn from_f32(value: f32) -> Self {
        let sign = ((value.to_bits() >> 24) & 0x80) as u8;
        if value.is_nan() {
            return Self(sign | 0x7f);
        }
        // Two stored significand bits, exponents from 2^-14; 57344 = 1.75 · 2^15 is code 0x7b.
        Self(sign | round_magnitude(value.abs(), 2, -14).min(0x7b) as u8)
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's; `E5m2` is a transparent `u8`.
        unsafe { V::load_e5m2(from.cast()) }
    }
}

/// The code of a magnitude in a format with `bits` stored significand bits whose smallest normal number is
/// `2^least`: codes count up from 0 with the value, so that rounding up carries into the exponent by itself.
fn round_magnitude(magnitude: f32, bits: u32, least: i32) -> u32 {
    if magnitude.is_infinite() {
        return u32::MAX;
    }
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(least);
    // Spacing of the format's numbers around the magnitude: a power of two, so the quotient is exact.
    let spacing = f64::from(exponent - bits as i32).exp2();
    let steps = (f64::from(magnitude) / spacing).round_ties_even() as u32;
    // `steps` counts from 0 in units of the spacing: normal numbers have the implicit bit in it.
    (((exponent - least) as u32) << bits) + steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_codes(decode: fn(u8) -> f32, encode: fn(f32) -> u8) {
        let finite: Vec<(u8, f32)> =
            (0..=255).map(|code| (code, decode(code))).filter(|(_, value)| value.is_finite()).collect();
        for &(code, value) in &finite {
            assert_eq!(encode(value), code, "{value} does not round-trip");
        }
        // Between two neighbours the nearer one wins, and the even code at the midpoint.
        let positive: Vec<_> = finite.iter().filter(|(code, _)| code & 0x80 == 0).collect();
        for pair in positive.windows(2) {
            let ((low_code, low), (high_code, high)) = (*pair[0], *pair[1]);
            let middle = (low + high) / 2.0;
            let even = if low_code & 1 == 0 { low_code } else { high_code };
            assert_eq!(encode(middle), even);
            assert_eq!(encode(middle.next_down()), low_code);
            assert_eq!(encode(middle.next_up()), high_code);
        }
        let (top, _) = **positive.last().unwrap();
        assert_eq!(encode(f32::INFINITY), top);
        assert_eq!(encode(1e30), top);
        assert_eq!(encode(-1e30), top | 0x80);
        assert!(decode(encode(f32::NAN)).is_nan());
        assert_eq!(encode(1e-30), 0);
    }

    #[test]
    fn e4m3_rounds_to_nearest_even_and_saturates() {
        check_codes(|code| E4m3(code).to_f32(), |value| E4m3::from_f32(value).0);
        assert_eq!(E4m3(0x7e).to_f32(), 448.0);
        assert_eq!(E4m3(0x01).to_f32(), 2f32.powi(-9));
    }

    #[test]
    fn e5m2_rounds_to_nearest_even_and_saturates() {
        check_codes(|code| E5m2(code).to_f32(), |value| E5m2::from_f32(value).0);
        assert_eq!(E5m2(0x7b).to_f32(), 57344.0);
        assert_eq!(E5m2(0x01).to_f32(), 2f32.powi(-16));
    }
}
