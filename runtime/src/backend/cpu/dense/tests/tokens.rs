//! Embeddings, positions and argmax.

use super::*;

#[test]
fn positions_are_added_from_their_rows_and_refused_outside() {
    let mut r = Random(25);
    let (places, width) = (9, 5);
    for dtype in 0..3 {
        let table = Stored::new(dtype, r.floats(places * width));
        let positions = [0, 6, 3, 3];
        let x = r.floats(positions.len() * width);
        let mut out = x.clone();
        add_positions(table.view(), &positions, 2, &mut out).unwrap();
        for (i, got) in out.iter().enumerate() {
            let place = positions[i / width] as usize + 2;
            assert_eq!(*got, x[i] + table.get(place * width + i % width) as f32);
        }
        for outside in [7, -1, i32::MAX, i32::MIN] {
            let error = add_positions(table.view(), &[0, outside], 2, &mut out[..2 * width]).unwrap_err();
            assert_eq!(error, DenseError::Position { position: outside, places, offset: 2 });
        }
        assert!(add_positions(table.view(), &[0, 1, 2], 0, &mut out[..7]).is_err());
        assert!(add_positions(HostTensor::F8E4M3(&[0; 10]), &[0], 0, &mut out[..5]).is_err());
        assert!(add_positions(table.view(), &[], 0, &mut []).is_ok());
    }
    let mut x = vec![3.0; 40_000];
    scale(0.5, &mut x);
    assert!(x.iter().all(|x| *x == 1.5));
}

#[test]
fn embed_widens_rows_and_refuses_what_is_not_there() {
    let mut r = Random(15);
    for dtype in 0..3 {
        let table = Stored::new(dtype, r.floats(50 * 24));
        let ids = [0, 49, 7, 7];
        let mut out = vec![f32::NAN; ids.len() * 24];
        embed(table.view(), &ids, &mut out).unwrap();
        for (i, got) in out.iter().enumerate() {
            assert_eq!(f64::from(*got), table.get(ids[i / 24] as usize * 24 + i % 24));
        }
        let error = embed(table.view(), &[50], &mut out[..24]).unwrap_err();
        assert_eq!(error, DenseError::TokenId { id: 50, vocabulary: 50 });
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_never_nan() {
    assert_eq!(argmax(&[]), None);
    assert_eq!(argmax(&[f32::NAN; 20]), None);
    assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), Some(0));
    let mut r = Random(16);
    for n in [1, 15, 16, 17, 1000] {
        let mut x = r.floats(n);
        let at = r.below(n);
        x[at] = 2.0;
        x[n - 1] = 2.0;
        x[0] = f32::NAN;
        let expected = if at == 0 { n - 1 } else { at };
        assert_eq!(argmax(&x), if n == 1 { None } else { Some(expected) }, "{n}");
    }
}
