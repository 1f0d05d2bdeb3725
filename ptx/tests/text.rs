//! The rendered text agrees with its descriptor, and launches cover every element exactly once.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashSet;

use pagewise_ptx::copy_blocks::{
    BlockRows, BlockStrides, CopyBlocks, CopyBlocksShape, CopyBlocksSpec, CopyBlocksTuning,
};
use pagewise_ptx::write_kv::{WriteKv, WriteKvShape, WriteKvSpec};
use pagewise_ptx::{DType, Error, all_kernels};

#[test]
fn the_text_declares_what_the_descriptor_says() {
    let mut entries = HashSet::new();
    for kernel in all_kernels().unwrap() {
        assert!(entries.insert(kernel.entry().to_string()), "{} is there twice", kernel.entry());
        let text = kernel.text();
        let declared: Vec<(String, String)> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix(".param "))
            .map(|rest| {
                // `.u64 p_q,` or `.align 64 .b8 p_map[128],`, and a remark.
                let (ty, rest) = rest.split_once(" p_").unwrap();
                let name = rest.split([' ', ',', '[']).next().unwrap();
                (ty.to_string(), format!("p_{name}"))
            })
            .collect();
        let described: Vec<(String, String)> = kernel
            .params()
            .iter()
            .map(|param| (param.ty.ptx().to_string(), format!("p_{}", param.name)))
            .collect();
        assert_eq!(declared, described, "{}", kernel.entry());
        let (major, minor) = kernel.target().ptx;
        assert!(text.contains(&format!(".version {major}.{minor}\n")));
        assert!(text.contains(&format!(".target {}\n", kernel.target().name())));
        assert!(text.contains(&format!(".maxntid {}\n", kernel.max_threads())));
        assert_eq!(text.matches(".visible .entry ").count(), 1);
        assert!(text.contains(&format!(".visible .entry {}(\n", kernel.entry())));
    }
}

#[test]
fn the_text_reads_well() {
    for kernel in all_kernels().unwrap() {
        let entry = kernel.entry();
        assert!(kernel.text().starts_with(&format!("// {entry}: ")), "{entry} opens with what it does");
        assert!(kernel.text().is_ascii() && kernel.text().ends_with("}\n"), "{entry}");
        for (number, line) in kernel.text().lines().enumerate() {
            let place = format!("{entry}:{}", number + 1);
            assert!(line.len() <= 130, "{place} is too long: {line}");
            assert_eq!(line, line.trim_end(), "{place} ends in blanks");
            for leftover in ["${", "<%", "//%", "//#", "\t"] {
                assert!(!line.contains(leftover), "{place} holds {leftover}: {line}");
            }
        }
        assert!(!kernel.code().contains("//"));
    }
}

#[test]
fn drivers_are_named_by_the_ptx_version_they_understand() {
    let needs = |cache| {
        let spec = WriteKvSpec::vectorised(DType::Bf16, cache);
        WriteKv::new(spec).unwrap().kernel().target()
    };
    assert_eq!((needs(DType::Bf16).sm, needs(DType::Bf16).cuda_version()), (80, 11_040));
    assert_eq!((needs(DType::Fp8E4m3).sm, needs(DType::Fp8E4m3).cuda_version()), (89, 12_010));
}

/// Runs the index arithmetic of the kernel's header comment on the host.
#[test]
fn a_launch_covers_every_element_exactly_once() {
    let shapes = [
        (1, 1, 8, 8),
        (3, 1, 128, 128),
        (7, 8, 128, 128),
        (300, 1, 64, 64),
        (5, 40, 256, 256),
        (2, 3, 576, 512),
        (65, 2, 96, 80),
        (2, 300, 16, 24),
        (1, 1, 4096, 8),
    ];
    for spec in [
        WriteKvSpec::vectorised(DType::Bf16, DType::Bf16),
        WriteKvSpec::vectorised(DType::F32, DType::F32),
        WriteKvSpec::scalar(DType::F16, DType::F32),
    ] {
        let write_kv = WriteKv::new(spec).unwrap();
        for (tokens, kv_heads, head_dim_k, head_dim_v) in shapes {
            let shape = WriteKvShape { tokens, kv_heads, head_dim_k, head_dim_v, q_heads: 0 };
            let launch = write_kv.launch(shape).unwrap();
            let [x, y, z] = launch.block;
            assert!(x * y * z <= write_kv.kernel().max_threads() && z <= 64, "{shape:?} {launch:?}");
            // How often each of `count` numbers is taken by the threads along one axis.
            let once = |count: u32, taken: &[u32]| {
                let mut times = vec![0; count as usize];
                taken
                    .iter()
                    .filter(|&&number| number < count)
                    .for_each(|&number| times[number as usize] += 1);
                assert!(times.iter().all(|&times| times == 1), "{shape:?} {launch:?}: {times:?}");
            };
            let per_thread = spec.tuning.tokens;
            let tokens_taken: Vec<u32> = (0..launch.grid[0])
                .flat_map(|tile| (0..z).map(move |lane| (tile, lane)))
                .flat_map(|(tile, lane)| (0..per_thread).map(move |i| (tile * per_thread + i) * z + lane))
                .collect();
            once(tokens, &tokens_taken);
            once(kv_heads, &(0..launch.grid[1] * y).collect::<Vec<_>>());
            for head_dim in [head_dim_k, head_dim_v] {
                let vectors = head_dim / spec.vector;
                let units = vectors.div_ceil(2);
                let taken: Vec<u32> = (0..launch.grid[2] * x)
                    .flat_map(|unit| [Some(unit).filter(|&unit| unit < units), Some(unit + units)])
                    .flatten()
                    .collect();
                once(vectors, &taken);
            }
        }
    }
}

#[test]
fn what_cannot_be_had_is_a_typed_error() {
    let fp8_source = WriteKvSpec { source: DType::Fp8E4m3, ..WriteKvSpec::scalar(DType::F16, DType::F16) };
    assert!(matches!(WriteKv::new(fp8_source), Err(Error::UnsupportedTypes { .. })));
    let odd_vector = WriteKvSpec { vector: 8, ..WriteKvSpec::vectorised(DType::F32, DType::F32) };
    let message = WriteKv::new(odd_vector).unwrap_err().to_string();
    assert_eq!(message, "write_kv cannot move 8 f32 elements at once: use 1 or 4");

    let write_kv = WriteKv::new(WriteKvSpec::vectorised(DType::Bf16, DType::Bf16)).unwrap();
    let shape = WriteKvShape { tokens: 1, kv_heads: 1, head_dim_k: 128, head_dim_v: 128, q_heads: 0 };
    let odd = write_kv.launch(WriteKvShape { head_dim_v: 100, ..shape }).unwrap_err();
    assert!(matches!(odd, Error::NotDivisible { field: "head_dim_v", value: 100, .. }), "{odd}");
    let none = write_kv.launch(WriteKvShape { tokens: 0, ..shape }).unwrap_err();
    assert!(matches!(none, Error::Zero { field: "tokens", .. }), "{none}");
    let huge = write_kv.launch(WriteKvShape { kv_heads: 3_000_000, ..shape }).unwrap_err();
    assert!(matches!(huge, Error::GridTooLarge { field: "heads", .. }), "{huge}");
}

#[test]
fn copies_take_a_thread_block_an_item_or_as_many_as_they_may() {
    let strides = BlockStrides { block: 32 << 10, outer: 0, inner: 0 };
    let rows = BlockRows { outer: 1, inner: 1, row_bytes: 32 << 10, from: strides, to: strides };
    let shape = CopyBlocksShape { pairs: 7, layers: 32, key: rows, value: rows };
    let copy = CopyBlocks::new(CopyBlocksSpec::for_alignment(48)).unwrap();
    assert_eq!(copy.kernel().entry(), "copy_blocks_b16");
    // 8 KiB an item.
    let launch = copy.launch(shape, None).unwrap();
    assert_eq!((launch.grid, launch.block), ([7 * 32 * 2 * 4, 1, 1], [128, 1, 1]));
    assert_eq!(copy.launch(shape, Some(16)).unwrap().grid, [16, 1, 1]);
    for (alignment, entry) in [(0, "b16"), (16, "b16"), (8, "b4"), (6, "b2"), (7, "b1")] {
        assert_eq!(CopyBlocksSpec::for_alignment(alignment).entry(), format!("copy_blocks_{entry}"));
    }

    let refused = |shape| copy.launch(shape, None).unwrap_err();
    let none = refused(CopyBlocksShape { pairs: 0, ..shape });
    assert!(matches!(none, Error::Zero { field: "pairs", .. }), "{none}");
    let odd = refused(CopyBlocksShape { value: BlockRows { row_bytes: 24, ..rows }, ..shape });
    assert!(matches!(odd, Error::NotDivisible { value: 24, .. }), "{odd}");
    let many = refused(CopyBlocksShape { pairs: 1 << 28, ..shape });
    assert!(matches!(many, Error::TooLarge { .. }), "{many}");
    let tuning = CopyBlocksTuning { threads: 100, in_flight: 4 };
    let odd = CopyBlocks::new(CopyBlocksSpec { bytes: 16, tuning }).unwrap_err();
    assert!(matches!(odd, Error::UnsupportedTuning { .. }), "{odd}");
}
