//! Every way in which a problem can be refused: one row of the table each, and nothing is written.
#![expect(clippy::panic, reason = "a test may stop where it stands")]

use half::f16;
use pagewise_attention::cpu::{self, Inputs, KvPair, KvScale, Outputs, Partial, Plan};
use pagewise_attention::{
    AttentionConfig, BlockTables, CacheLayout, DType, HostTensor, HostTensorMut, KvStrides, Mask, MaskBits,
    PagedBatch, Problem, ProblemError, RowStrides, WriteKv,
};

fn config() -> AttentionConfig {
    AttentionConfig::new(4, 2, 8, DType::F32)
}

fn layout() -> CacheLayout {
    CacheLayout::nhd(6, 4, &config())
}

const STARTS: [i32; 3] = [0, 1, 3];
const LENS: [i32; 2] = [5, 6];
const TABLE: [i32; 4] = [0, 5, 3, 2];

fn batch() -> PagedBatch<'static> {
    PagedBatch::padded(&STARTS, &LENS, &TABLE, 2)
}

/// The name of an error's variant.
fn variant(error: &ProblemError) -> String {
    format!("{error:?}").split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

/// Each problem must be refused with the named variant and a message that contains the words.
#[track_caller]
fn refused<T>(result: Result<T, ProblemError>, name: &str, words: &str) {
    let Err(error) = result else { panic!("{name}: not refused") };
    assert_eq!(variant(&error), name, "{error}");
    assert!(error.to_string().contains(words), "'{error}' does not say '{words}'");
}

#[test]
fn configurations() {
    let table: [(AttentionConfig, &str, &str); 14] = [
        (AttentionConfig { kv_heads: 0, ..config() }, "Heads", "kv_heads is 0"),
        (AttentionConfig { q_heads: 0, ..config() }, "Heads", "q_heads is 0"),
        (AttentionConfig { q_heads: 5, ..config() }, "Heads", "multiple"),
        (AttentionConfig { head_dim_qk: 0, ..config() }, "HeadDim", "head_dim_qk is 0"),
        (AttentionConfig { head_dim_v: 257, ..config() }, "HeadDim", "head_dim_v is 257"),
        (AttentionConfig { head_dim_qk: usize::MAX, ..config() }, "HeadDim", "between 1 and 256"),
        (AttentionConfig { q_dtype: DType::F8E4M3, ..config() }, "QueryDType", "fp8_e4m3"),
        (AttentionConfig { scale: f32::NAN, ..config() }, "NotFinite", "scale is NaN"),
        (AttentionConfig { scale: f32::INFINITY, ..config() }, "NotFinite", "finite"),
        (AttentionConfig { softcap: Some(0.0), ..config() }, "Softcap", "softcap is 0"),
        (AttentionConfig { softcap: Some(-3.0), ..config() }, "Softcap", "above 0"),
        (AttentionConfig { softcap: Some(f32::NAN), ..config() }, "Softcap", "NaN"),
        (AttentionConfig { mask: Mask::Window { size: 0 }, ..config() }, "EmptyWindow", "at least 1"),
        (AttentionConfig { q_heads: usize::MAX, kv_heads: 1, ..config() }, "TooLarge", "q"),
    ];
    for (config, name, words) in table {
        refused(Problem::new(&config, layout(), batch()), name, words);
    }
}

#[test]
fn layouts_and_rows() {
    let good = layout();
    let table: [(CacheLayout, &str, &str); 9] = [
        (CacheLayout { block_size: 0, ..good }, "BlockSize", "block_size is 0"),
        (CacheLayout { block_size: 12, ..good }, "BlockSize", "power of two"),
        (CacheLayout { block_size: 512, ..good }, "BlockSize", "256"),
        (CacheLayout { k: KvStrides { head: 7, ..good.k }, ..good }, "Overlap", "head stride is 7"),
        (CacheLayout { v: KvStrides { token: 15, ..good.v }, ..good }, "Overlap", "V: token"),
        (CacheLayout { v: KvStrides { block: 63, ..good.v }, ..good }, "Overlap", "V: block"),
        (CacheLayout { k: KvStrides { block: 0, ..good.k }, ..good }, "Overlap", "0 elements"),
        (CacheLayout { k: KvStrides { block: u64::MAX, ..good.k }, ..good }, "TooLarge", "K"),
        (CacheLayout { num_blocks: usize::MAX, ..good }, "TooLarge", "overflow"),
    ];
    let config = config();
    for (layout, name, words) in table {
        refused(Problem::new(&config, layout, batch()), name, words);
    }
    let packed = RowStrides::packed(4, 8);
    for (q, out, name, words) in [
        (RowStrides { head: 7, ..packed }, packed, "Overlap", "q: head"),
        (packed, RowStrides { token: 31, ..packed }, "Overlap", "out: token"),
        (packed, RowStrides { token: u64::MAX / 2, ..packed }, "TooLarge", "out"),
    ] {
        refused(Problem::with_strides(&config, good, q, out, batch()), name, words);
    }
}

#[test]
fn batches() {
    let bits = |words: &'static [u32], row_words| Some(MaskBits { words, row_words });
    let padded = |entries: &'static [i32], max_blocks| BlockTables::Padded { entries, max_blocks };
    let csr = |indptr: &'static [i32], indices: &'static [i32]| BlockTables::Csr { indptr, indices };
    let good = batch();
    let table: [(Mask, PagedBatch<'_>, &str, &str); 21] = [
        (Mask::Causal, PagedBatch { query_start: &[], ..good }, "SequenceCount", "0 entries"),
        (Mask::Causal, PagedBatch { query_start: &[0, 3], ..good }, "SequenceCount", "2 entries"),
        (Mask::Causal, PagedBatch { query_start: &[1, 1, 3], ..good }, "QueryStart", "query_start[0] is 1"),
        (Mask::Causal, PagedBatch { query_start: &[0, 3, 1], ..good }, "QueryStart", "query_start[2] is 1"),
        (Mask::Causal, PagedBatch { query_start: &[0, -1, 1], ..good }, "QueryStart", "never fall"),
        (Mask::Causal, PagedBatch { seq_lens: &[5, -6], ..good }, "SeqLen", "seq_lens[1] is -6"),
        (Mask::Causal, PagedBatch { block_tables: padded(&TABLE, 3), ..good }, "TableShape", "4 entries"),
        (Mask::Causal, PagedBatch { block_tables: padded(&TABLE, usize::MAX), ..good }, "TableShape", "row"),
        (Mask::Causal, PagedBatch { block_tables: csr(&[0, 2], &TABLE), ..good }, "TableShape", "needs 3"),
        (Mask::Causal, PagedBatch { block_tables: csr(&[0, 2, 1], &TABLE), ..good }, "TableShape", "fall"),
        (
            Mask::Causal,
            PagedBatch { block_tables: csr(&[0, 2, 9], &TABLE), ..good },
            "TableShape",
            "ends at 9",
        ),
        (
            Mask::Causal,
            PagedBatch { block_tables: csr(&[0, 1, 4], &TABLE), ..good },
            "TableTooShort",
            "1 blocks",
        ),
        (Mask::Causal, PagedBatch { seq_lens: &[5, 9], ..good }, "TableTooShort", "sequence 1 has 9 keys"),
        (Mask::Causal, PagedBatch { block_tables: padded(&[0, 5, 6, 2], 2), ..good }, "TableEntry", "is 6"),
        (
            Mask::Causal,
            PagedBatch { block_tables: padded(&[0, -1, 3, 2], 2), ..good },
            "TableEntry",
            "entry 1",
        ),
        (Mask::Causal, PagedBatch { query_positions: Some(&[1, 2]), ..good }, "QueryPositions", "2 entries"),
        (Mask::Bits, good, "MaskBits", "carries none"),
        (Mask::Causal, PagedBatch { mask_bits: bits(&[0; 3], 1), ..good }, "MaskBits", "Causal"),
        (Mask::Bits, PagedBatch { mask_bits: bits(&[0; 3], 0), ..good }, "MaskBits", "row_words is 0"),
        (Mask::Bits, PagedBatch { mask_bits: bits(&[0; 2], 1), ..good }, "MaskBits", "2 words"),
        (Mask::Bits, PagedBatch { mask_bits: bits(&[0; 9], usize::MAX), ..good }, "MaskBits", "words"),
    ];
    for (mask, batch, name, words) in table {
        let config = AttentionConfig { mask, ..config() };
        refused(Problem::new(&config, layout(), batch), name, words);
    }
}

#[test]
fn entries_that_no_query_can_see_may_have_any_value() {
    let window = AttentionConfig { mask: Mask::Window { size: 2 }, ..config() };
    // Past the length; behind the window; of a sequence without queries.
    let entries = [7, 5, 3, -9];
    let behind = PagedBatch::padded(&[0, 1, 1], &[6, 4], &entries, 2);
    assert!(Problem::new(&window, layout(), behind).is_ok());
    refused(Problem::new(&config(), layout(), behind), "TableEntry", "is 7");
    let past = PagedBatch::padded(&[0, 1], &[4], &[0, 99], 2);
    assert!(Problem::new(&config(), layout(), past).is_ok());
}

#[test]
fn buffers_of_a_run() {
    let (plain, layout) = (config(), layout());
    let alibi = AttentionConfig { alibi: true, ..config() };
    let sinks = AttentionConfig { sinks: true, ..config() };
    let (q, cache) = (vec![0.5f32; 3 * 32], vec![0.5f32; 6 * 4 * 16]);
    let half_cache = vec![f16::ONE; 6 * 4 * 16];
    let values = [0.1f32; 4];
    let f32s = |x: &'static [f32]| HostTensor::F32(x);
    let (q, cache): (&'static [f32], &'static [f32]) = (q.leak(), cache.leak());
    let good = Inputs::new(f32s(q), f32s(cache), f32s(cache));
    let short = f32s(&cache[1..]);
    let half = HostTensor::F16(&half_cache);
    let table: [(&AttentionConfig, Inputs<'_>, &str, &str); 16] = [
        (&plain, Inputs { q: f32s(&q[1..]), ..good }, "BufferTooShort", "q holds 95"),
        (&plain, Inputs { k: short, ..good }, "BufferTooShort", "K holds"),
        (&plain, Inputs { v: short, ..good }, "BufferTooShort", "V holds"),
        (&plain, Inputs { q: half, ..good }, "BufferDType", "q is f16"),
        (&plain, Inputs { k: half, ..good }, "BufferDType", "K is f16"),
        (&plain, Inputs { v: half, ..good }, "BufferDType", "says f32"),
        (&plain, Inputs { alibi_slopes: Some(&values), ..good }, "Input", "alibi_slopes: given"),
        (&plain, Inputs { sinks: Some(&values), ..good }, "Input", "sinks: given"),
        (&alibi, good, "Input", "alibi_slopes: missing"),
        (&alibi, Inputs { alibi_slopes: Some(&values[1..]), ..good }, "Input", "3 values for 4"),
        (&sinks, good, "Input", "sinks: missing"),
        (&sinks, Inputs { sinks: Some(&[]), ..good }, "Input", "0 values"),
        (&plain, Inputs { k_scale: KvScale::PerHead(&values), ..good }, "Input", "k_scale: 4 scales for 2"),
        (&plain, Inputs { v_scale: KvScale::PerHead(&[]), ..good }, "Input", "v_scale: 0 scales"),
        (&plain, Inputs { k_scale: KvScale::PerTensor(f32::NAN), ..good }, "Input", "a scale is NaN"),
        (&plain, Inputs { v_scale: KvScale::PerHead(&[1.0, 0.0]), ..good }, "Input", "above 0"),
    ];
    for (config, inputs, name, words) in table {
        let mut out = vec![7.0f32; 3 * 32];
        let plan = Plan::new(Problem::new(config, layout, batch()).unwrap());
        refused(plan.run(&inputs, &mut Outputs::new(HostTensorMut::F32(&mut out))), name, words);
        assert_eq!(out, [7.0; 3 * 32], "written although refused");
    }
    let plan = Plan::new(Problem::new(&plain, layout, batch()).unwrap());
    let mut out = vec![7.0f32; 3 * 32];
    let mut half_out = vec![f16::ONE; 3 * 32];
    let mut lse = vec![7.0f32; 11];
    let outputs = &mut Outputs::new(HostTensorMut::F32(&mut out[1..]));
    refused(plan.run(&good, outputs), "BufferTooShort", "out holds 95");
    refused(
        plan.run(&good, &mut Outputs::new(HostTensorMut::F16(&mut half_out))),
        "BufferDType",
        "out is f16",
    );
    let outputs = &mut Outputs { out: HostTensorMut::F32(&mut out), lse: Some(&mut lse) };
    refused(plan.run(&good, outputs), "BufferTooShort", "lse holds 11");
    assert!(out.iter().chain(&lse).all(|&x| x == 7.0), "written although refused");
}

#[test]
fn writes() {
    let (config, layout) = (config(), layout());
    let new = vec![0.5f32; 3 * 16];
    let fp8 = vec![0u8; 3 * 16];
    let good = [0i64, 23, -1];
    let scales = [1.0f32; 3];
    let (short, pair) =
        (HostTensor::F32(&new[1..]), KvPair::new(HostTensor::F32(&new), HostTensor::F32(&new)));
    let none = KvPair::<KvScale<'_>>::default();
    type Row<'a> = (&'a [i64], KvPair<HostTensor<'a>>, KvPair<KvScale<'a>>, &'a str, &'a str);
    let table: [Row<'_>; 6] = [
        (&[0, 24, 1], pair, none, "Slot", "slots[1] is 24"),
        (&[i64::MAX], pair, none, "Slot", "24 slots"),
        (&good, KvPair { k: short, ..pair }, none, "BufferTooShort", "new K holds 47"),
        (&good, KvPair { v: short, ..pair }, none, "BufferTooShort", "new V holds 47"),
        (&good, KvPair { k: HostTensor::F8E4M3(&fp8), ..pair }, none, "Input", "new K: is fp8_e4m3"),
        (&good, pair, KvPair { v: KvScale::PerHead(&scales), ..none }, "Input", "v_scale: 3 scales"),
    ];
    for (slots, source, scale, name, words) in table {
        let (mut k, mut v) = (vec![7.0f32; 384], vec![7.0f32; 384]);
        let cache = KvPair::new(HostTensorMut::F32(&mut k), HostTensorMut::F32(&mut v));
        let write = WriteKv::packed(slots, &config);
        refused(cpu::write_kv(&config, &layout, &write, source, cache, scale), name, words);
        assert!(k.iter().chain(&v).all(|&x| x == 7.0), "written although refused");
    }
    let write = WriteKv::packed(&good, &config);
    let (mut k, mut v) = (vec![7.0f32; 384], vec![f16::ONE; 384]);
    let cache = KvPair::new(HostTensorMut::F32(&mut k), HostTensorMut::F16(&mut v));
    refused(cpu::write_kv(&config, &layout, &write, pair, cache, none), "BufferDType", "V is f16");
    refused(
        cpu::write_keys(&config, &layout, &write, pair.k, HostTensorMut::F32(&mut k[1..]), none.k),
        "BufferTooShort",
        "K holds 383",
    );
    let overlapping = WriteKv { k: RowStrides { token: 3, head: 8 }, ..write };
    let result =
        cpu::write_values(&config, &layout, &overlapping, pair.v, HostTensorMut::F32(&mut k), none.v);
    refused(result, "Overlap", "new K: token");
    assert!(k.iter().all(|&x| x == 7.0), "written although refused");
}

#[test]
fn copies_and_swaps() {
    let (config, layout) = (config(), layout());
    for (pairs, words) in [
        (&[(0u32, 6u32)][..], "pair 0 is (0, 6)"),
        (&[(0, 1), (9, 2)], "pair 1 is (9, 2)"),
        (&[(0, 1), (2, 1)], "block 1 is written twice"),
        (&[(0, 1), (1, 2)], "block 1 is read and written"),
        (&[(3, 3)], "block 3 is read and written"),
    ] {
        let (mut k, mut v) = (vec![7.0f32; 384], vec![7.0f32; 384]);
        let (mut k, mut v) = (HostTensorMut::F32(&mut k), HostTensorMut::F32(&mut v));
        refused(cpu::copy_blocks(&config, &layout, pairs, &mut k, &mut v), "Input", words);
    }
    let mut short = vec![7.0f32; 383];
    let mut v = vec![7.0f32; 384];
    let (mut k, mut v) = (HostTensorMut::F32(&mut short), HostTensorMut::F32(&mut v));
    refused(cpu::copy_blocks(&config, &layout, &[], &mut k, &mut v), "BufferTooShort", "K holds 383");

    let (source, small) = (vec![1.0f32; 384], CacheLayout::nhd(2, 4, &config));
    let pair = KvPair::new(HostTensor::F32(&source), HostTensor::F32(&source));
    let halves = vec![f16::ONE; 384];
    let swap = |to: &CacheLayout, pairs: &[(u32, u32)], source: KvPair<HostTensor<'_>>| {
        let (mut k, mut v) = (vec![7.0f32; 128], vec![7.0f32; 128]);
        let target = KvPair::new(HostTensorMut::F32(&mut k), HostTensorMut::F32(&mut v));
        let result = cpu::swap_blocks(&config, &layout, to, pairs, source, target);
        assert_eq!(result.is_err(), k.iter().chain(&v).all(|&x| x == 7.0));
        result
    };
    refused(swap(&small, &[(5, 2)], pair), "Input", "6 blocks to read and 2 to write");
    refused(swap(&small, &[(5, 1), (4, 1)], pair), "Input", "written twice");
    refused(swap(&CacheLayout::nhd(2, 2, &config), &[(0, 0)], pair), "Input", "blocks hold 2 tokens");
    refused(swap(&CacheLayout::nhd(9, 4, &config), &[(0, 0)], pair), "BufferTooShort", "target K");
    refused(
        swap(&small, &[(0, 0)], KvPair { k: HostTensor::F16(&halves), ..pair }),
        "BufferDType",
        "source K is f16",
    );
    assert!(swap(&small, &[(5, 0), (0, 1)], pair).is_ok());
}

#[test]
fn merges() {
    let (numbers, bytes) = (vec![1.0f32; 12], vec![0u8; 12]);
    let part = Partial { out: HostTensor::F32(&numbers), lse: &numbers[..3] };
    let merge = |dim: usize, parts: &[Partial<'_>], out: &mut [f32], lse: &mut [f32]| {
        cpu::merge_states(dim, parts, &mut Outputs { out: HostTensorMut::F32(out), lse: Some(lse) })
    };
    let (out, lse) = (&mut [7.0; 12], &mut [7.0; 3]);
    refused(merge(4, &[], out, lse), "Input", "at least one");
    refused(merge(5, &[part], out, lse), "BufferTooShort", "a part's out holds 12");
    refused(merge(usize::MAX, &[part], out, lse), "BufferTooShort", "need");
    refused(merge(0, &[part], out, lse), "HeadDim", "head_dim is 0");
    refused(merge(4, &[part, Partial { lse: &[], ..part }], out, lse), "BufferTooShort", "a part's lse");
    refused(merge(4, &[Partial { out: HostTensor::F8E5M2(&bytes), ..part }], out, lse), "QueryDType", "e5m2");
    refused(merge(4, &[part], &mut [7.0; 11], lse), "BufferTooShort", "out holds 11");
    refused(merge(4, &[part], out, &mut [7.0; 2]), "BufferTooShort", "lse holds 2");
    assert_eq!((*out, *lse), ([7.0; 12], [7.0; 3]), "written although refused");
    assert!(merge(4, &[part], out, lse).is_ok());
    assert_eq!((*out, *lse), ([1.0; 12], [1.0; 3]));
}
