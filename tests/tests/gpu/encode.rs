//! Element types as bytes, written independently of the kernels: what rounding to nearest even gives.

use std::sync::LazyLock;

use pagewise_attention::DType;

/// The number that a stored element stands for.
pub fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f64(),
        (DType::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f64(),
        (DType::F8E4M3 | DType::F8E5M2, &[code]) => decode_fp8(dtype, code),
        _ => panic!("{} bytes are not one {dtype}", bytes.len()),
    }
}

/// The element nearest to a number, ties to even; fp8 saturates at its largest value.
pub fn encode(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F8E4M3 | DType::F8E5M2 => vec![encode_fp8(dtype, value)],
    }
}

/// By the definition of the format (OCP OFP8): sign, exponent, mantissa.
fn decode_fp8(dtype: DType, code: u8) -> f64 {
    let (mantissa_bits, bias) = if dtype == DType::F8E4M3 { (3, 7) } else { (2, 15) };
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let magnitude = match dtype {
        DType::F8E4M3 if code & 0x7f == 0x7f => f64::NAN,
        DType::F8E5M2 if exponent == 31 && mantissa > 0.0 => f64::NAN,
        DType::F8E5M2 if exponent == 31 => f64::INFINITY,
        _ if exponent == 0 => mantissa * 2f64.powi(1 - bias),
        _ => (1.0 + mantissa) * 2f64.powi(exponent - bias),
    };
    sign * magnitude
}

/// The values of the codes 0, 1, 2 … that are finite, in rising order.
fn finite_values(dtype: DType) -> &'static [f64] {
    static E4M3: LazyLock<Vec<f64>> = LazyLock::new(|| list(DType::F8E4M3));
    static E5M2: LazyLock<Vec<f64>> = LazyLock::new(|| list(DType::F8E5M2));
    fn list(dtype: DType) -> Vec<f64> {
        (0..0x80).map(|code| decode_fp8(dtype, code)).take_while(|value| value.is_finite()).collect()
    }
    if dtype == DType::F8E4M3 { &E4M3 } else { &E5M2 }
}

/// Compares with the values on either side and keeps the nearer one.
fn encode_fp8(dtype: DType, value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = f64::from(value.abs());
    let values = finite_values(dtype);
    let above = values.partition_point(|&other| other < magnitude).min(values.len() - 1);
    let below = above.saturating_sub(1);
    let (up, down) = ((values[above] - magnitude).abs(), (magnitude - values[below]).abs());
    if magnitude >= values[values.len() - 1] {
        return (values.len() - 1) as u8 | if value.is_sign_negative() { 0x80 } else { 0 };
    }
    // Of two equally near codes the even one has the even mantissa.
    let nearest = match up.total_cmp(&down) {
        std::cmp::Ordering::Less => above,
        std::cmp::Ordering::Greater => below,
        std::cmp::Ordering::Equal => above - above % 2 * usize::from(above != below),
    } as u8;
    if value.is_sign_negative() { nearest | 0x80 } else { nearest }
}
