//! Rotary embedding against its definition.

use super::*;

/// Heads of which a part is rotated: that part as heads of its own, the rest as it was; and both lengthened.
#[test]
fn rope_leaves_the_rest_of_a_head_alone() {
    let mut r = Random(24);
    let (heads, head_dim, half) = (3, 20, 7);
    let frequencies: Vec<f32> = r.floats(half);
    let positions: Vec<i32> = (0..5000).collect();
    let x = r.floats(positions.len() * heads * head_dim);
    let angles = RopeAngles::new(&frequencies, &positions);
    let mut out = x.clone();
    rope(&mut out, heads, &angles.clone().in_heads_of(head_dim)).unwrap();
    let rotated =
        |x: &[f32]| -> Vec<f32> { x.chunks(head_dim).flat_map(|head| &head[..2 * half]).copied().collect() };
    let mut alone = rotated(&x);
    rope(&mut alone, heads, &angles.clone()).unwrap();
    assert_eq!(bits(&alone), bits(&rotated(&out)));
    for (before, after) in x.chunks(head_dim).zip(out.chunks(head_dim)) {
        assert_eq!(bits(&before[2 * half..]), bits(&after[2 * half..]));
    }
    let mut longer = rotated(&x);
    rope(&mut longer, heads, &angles.stretched(2.0)).unwrap();
    assert!(longer.iter().zip(&alone).all(|(longer, x)| *longer == 2.0 * x));
}

/// One product and one sum or difference: 2 roundings of |a cos| + |b sin|; the angle is rounded to f32, which
/// the oracle repeats, and cosine and sine once more.
#[test]
fn rope_rotates_halves_by_position() {
    let mut r = Random(13);
    for (heads, half) in [(1, 1), (9, 32), (3, 40), (32, 64)] {
        let frequencies: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let positions: Vec<i32> = (0..40).map(|_| r.below(100_000) as i32).collect();
        let x = r.floats(positions.len() * heads * 2 * half);
        let mut out = x.clone();
        rope(&mut out, heads, &RopeAngles::new(&frequencies, &positions)).unwrap();
        for (i, got) in out.iter().enumerate() {
            let (row, d) = (i / (heads * 2 * half), i % (2 * half));
            let angle = f64::from(positions[row] as f32 * frequencies[d % half]);
            let (other, sin) =
                if d < half { (x[i + half], -angle.sin()) } else { (x[i - half], angle.sin()) };
            let (own, other) = (f64::from(x[i]) * angle.cos(), f64::from(other) * sin);
            let tolerance = 3.0 * 2f64.powi(-24) * (own.abs() + other.abs());
            assert!((f64::from(*got) - own - other).abs() <= tolerance, "{heads} {half} [{i}]: {got}");
        }
        let width = heads * 2 * half;
        let mut alone = x[..width].to_vec();
        rope(&mut alone, heads, &RopeAngles::new(&frequencies, &positions[..1])).unwrap();
        assert_eq!(bits(&alone), bits(&out[..width]));
    }
}
