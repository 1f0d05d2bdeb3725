//! `write_kv`'s descriptor: which variant fits which call, and workgroups that cover every piece.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use pagewise_shaders::write_kv::{
    Access, CacheRows, SourceRows, WriteKv, WriteKvArgs, WriteKvShape, WriteKvSpec,
};
use pagewise_shaders::{DType, Error};

fn spec(source: DType, cache: DType, access: Access) -> WriteKvSpec {
    WriteKvSpec { source, cache, access }
}

/// Four heads of 64 elements, packed, in blocks of 16.
fn packed() -> WriteKvArgs {
    let rows = SourceRows { offset: 0, token_stride: 256, head_stride: 64 };
    let cache = CacheRows { offset: 0, block_stride: 4096, token_stride: 256, head_stride: 64 };
    WriteKvArgs {
        shape: WriteKvShape {
            tokens: 7,
            kv_heads: 4,
            head_dim_k: 64,
            head_dim_v: 64,
            block_size: 16,
            num_slots: 160,
            slots_offset: 0,
        },
        key: rows,
        value: rows,
        key_cache: cache,
        value_cache: cache,
    }
}

#[test]
fn a_variant_fits_when_its_units_divide_everything() {
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::Bf16);
    assert!(packed().fits(spec(bf16, bf16, Access::Vec4)));
    let mut two_bytes_off = packed();
    two_bytes_off.key_cache.offset = 1;
    assert!(!two_bytes_off.fits(spec(f16, f16, Access::Vec4)));
    assert!(!two_bytes_off.fits(spec(f16, f16, Access::Word)));
    assert!(two_bytes_off.fits(spec(f16, f16, Access::Half)));
    assert!(two_bytes_off.fits(spec(f32, f32, Access::Word)));
    let mut odd_head = packed();
    odd_head.shape.head_dim_v = 63;
    let error = odd_head.uniform(spec(bf16, bf16, Access::Word)).unwrap_err();
    assert!(matches!(error, Error::NotDivisible { field: "head_dim_v", value: 63, unit: 2, .. }), "{error}");
    let mut far = packed();
    far.key.offset = 1 << 40;
    let error = far.uniform(spec(f32, f32, Access::Vec4)).unwrap_err();
    assert!(matches!(error, Error::TooLarge { field: "key.offset", .. }), "{error}");
    assert!(WriteKv::new(spec(bf16, f16, Access::Half)).is_err());
}

#[test]
fn workgroups_cover_every_piece_within_the_limit() {
    for (access, per_dimension) in [(Access::Vec4, 65_535), (Access::Word, 65_535), (Access::Word, 3)] {
        let write_kv = WriteKv::new(spec(DType::Bf16, DType::Bf16, access)).unwrap();
        for tokens in [1, 7, 64] {
            let shape = WriteKvShape { tokens, ..packed().shape };
            let pieces = u64::from(tokens * 4 * 64 / write_kv.spec().elements());
            match write_kv.workgroups(shape, per_dimension) {
                Ok([x, y, z]) => {
                    assert!(x <= per_dimension && y <= per_dimension && z == 1);
                    let covered = u64::from(x) * u64::from(y) * u64::from(write_kv.shader().workgroup_size());
                    assert!(covered >= pieces, "{tokens} tokens, {x} x {y}");
                    assert!(covered < pieces + u64::from(x + 1) * 256, "{tokens} tokens, {x} x {y}");
                }
                Err(error) => {
                    assert!(pieces > 9 * 256, "{error}");
                    assert!(matches!(error, Error::TooManyWorkgroups { .. }), "{error}");
                }
            }
        }
        let huge = WriteKvShape { tokens: u32::MAX, ..packed().shape };
        assert!(write_kv.workgroups(huge, u32::MAX).is_err());
    }
}
