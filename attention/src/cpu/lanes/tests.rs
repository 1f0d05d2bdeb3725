//! Every instruction set that this processor has against plain arithmetic, lane by lane.

use super::*;
use crate::cpu::elements::{E4m3, E5m2, Element};
use half::{bf16, f16};

fn read<L: Lanes>(lanes: L) -> [f32; LANES] {
    let mut values = [0.0; LANES];
    // SAFETY: sixteen elements.
    unsafe { lanes.store(values.as_mut_ptr()) };
    values
}

fn make<L: Lanes>(values: &[f32; LANES]) -> L {
    // SAFETY: sixteen elements.
    unsafe { L::load(values.as_ptr()) }
}

#[track_caller]
fn same(found: [f32; LANES], expected: impl Fn(usize) -> f32) {
    for (i, found) in found.into_iter().enumerate() {
        let expected = expected(i);
        let equal = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(equal, "lane {i}: {found} instead of {expected}");
    }
}

/// Registers do what their lanes of all sixteen do.
fn check_registers<L: Lanes>(a: &[f32; LANES], b: &[f32; LANES], c: &[f32; LANES], fused: bool) {
    let width = L::Register::WIDTH;
    let mut result = L::splat(f32::NAN);
    for i in 0..LANES / width {
        let of = |values: &[f32; LANES]| {
            let values = &values[i * width..(i + 1) * width];
            // SAFETY: as many elements as the register has lanes.
            unsafe { L::Register::load(values.as_ptr()) }
        };
        let one = L::Register::splat(1.0);
        // Products with 1 and sums with 0 are exact, so only the first rounds.
        let zero = L::Register::splat(0.0);
        result = result.with_register(i, of(a).fma(of(b), of(c)).fma(one, zero));
    }
    same(read(result), |i| if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] });
}

fn check_lanes<L: Lanes>(fused: bool) {
    let a: [f32; LANES] = std::array::from_fn(|i| (i as f32 * 1.37 - 8.1).powi(3) + 1e-3);
    let b: [f32; LANES] = std::array::from_fn(|i| 5.3 - i as f32 * 0.91);
    let c: [f32; LANES] = std::array::from_fn(|i| (i as f32 * 0.77).sin());
    let (x, y, z) = (make::<L>(&a), make::<L>(&b), make::<L>(&c));
    same(read(L::splat(3.25)), |_| 3.25);
    same(read(x.add(y)), |i| a[i] + b[i]);
    same(read(x.sub(y)), |i| a[i] - b[i]);
    same(read(x.mul(y)), |i| a[i] * b[i]);
    same(read(x.div(y)), |i| a[i] / b[i]);
    same(read(x.fma(y, z)), |i| if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] });
    same(read(x.max(y)), |i| a[i].max(b[i]));
    same(read(y.round()), |i| b[i].round_ties_even());
    same(read(y.round().pow2()), |i| b[i].round_ties_even().exp2());
    for bits in [0, 1, 0x8000, 0x5a3c, 0xffff] {
        same(read(L::select(bits, x, y)), |i| if bits >> i & 1 == 1 { a[i] } else { b[i] });
    }
    same(read(L::select_less(x, y, z, y)), |i| if a[i] < b[i] { c[i] } else { b[i] });
    same(read(L::select_less(L::splat(f32::NAN), y, z, y)), |i| b[i]);
    assert_eq!(x.first(), a[0]);
    assert_eq!(x.max_lane(), a.into_iter().fold(f32::MIN, f32::max));
    // The tree, in plain words.
    let tree = |v: &[f32; LANES]| {
        let a: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    };
    assert_eq!(x.sum().to_bits(), tree(&a).to_bits());
    let many: [[f32; LANES]; 16] = std::array::from_fn(|j| {
        std::array::from_fn(|i| (i as f32 * 3.3 + j as f32).sin() * 10f32.powi(j as i32 % 5))
    });
    let many = many.map(|v| (v, make::<L>(&v)));
    let (values, vectors) = (many.map(|(v, _)| v), many.map(|(_, v)| v));
    for count in [1, 4, 6, 8, 12, 16] {
        let sums = L::sums(&vectors, count);
        for i in 0..count {
            assert_eq!(sums[i].to_bits(), tree(&values[i]).to_bits(), "sum {i} of {count}");
        }
    }
    check_registers::<L>(&a, &b, &c, fused);

    // All bit patterns of the small types.
    for start in (0..=u16::MAX).step_by(LANES) {
        let words: [u16; LANES] = std::array::from_fn(|i| start + i as u16);
        // SAFETY: sixteen elements.
        unsafe {
            same(read(L::load_f16(words.as_ptr())), |i| f16::from_bits(words[i]).to_f32());
            same(read(L::load_bf16(words.as_ptr())), |i| bf16::from_bits(words[i]).to_f32());
        }
    }
    for start in (0..=255u8).step_by(LANES) {
        let bytes: [u8; LANES] = std::array::from_fn(|i| start + i as u8);
        // SAFETY: sixteen elements.
        unsafe {
            same(read(L::load_e4m3(bytes.as_ptr())), |i| E4m3(bytes[i]).to_f32());
            same(read(L::load_e5m2(bytes.as_ptr())), |i| E5m2(bytes[i]).to_f32());
        }
    }
}

#[test]
fn portable() {
    check_lanes::<Portable>(false);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn avx512() {
    if Level::Avx512.is_available() {
        check_lanes::<Avx512>(true);
    } else {
        eprintln!("skipped: this processor has no AVX-512");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn avx2() {
    if Level::Avx2.is_available() {
        check_lanes::<Avx2>(true);
    } else {
        eprintln!("skipped: this processor has no AVX2");
    }
}

#[cfg(target_arch = "aarch64")]
#[test]
fn neon() {
    check_lanes::<Neon>(true);
}
