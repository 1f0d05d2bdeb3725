//! The case table: the shapes of models and the corners of the contract.

use super::{Case, CaseMask, Layout, Operation, Random, Rows, ScaleKind, SequenceShape, Tables};
use crate::DType;

/// Lines of cases without seeds. Each is a shape of a known model or a corner that has a name.
const QUICK: &[&str] = &[
    // Decode and prefill of small and large groups.
    "attention q=f32 kv=f32 heads=9/3 dim=64 block=16 mask=causal sequences=1:1,1:17,1:130,1:511",
    "attention q=f32 kv=f32 heads=9/3 dim=64 block=16 mask=causal sequences=33:33,7:100,1:64",
    "attention q=f16 kv=f16 heads=8/2 dim=128 block=16 mask=causal sequences=1:257,5:40",
    "attention q=bf16 kv=bf16 heads=8/2 dim=128 block=32 mask=causal sequences=1:257,5:40",
    "attention q=f32 kv=bf16 heads=8/8 dim=64 block=16 mask=causal sequences=1:200,9:31",
    "attention q=f32 kv=f16 heads=8/1 dim=96 block=16 mask=causal sequences=1:200,9:31",
    // Head dimensions that fill no vector; values of another size.
    "attention q=f32 kv=f32 heads=2/1 dim=80 block=16 mask=causal sequences=3:50",
    "attention q=f32 kv=bf16 heads=2/1 dim=40 dim_v=24 block=8 mask=causal sequences=3:50,12:12",
    "attention q=f32 kv=f32 heads=3/1 dim=7 dim_v=5 block=4 mask=causal sequences=3:20,1:9",
    "attention q=f16 kv=f16 heads=4/2 dim=256 block=16 mask=causal sequences=2:90",
    "attention q=f32 kv=f32 heads=2/2 dim=1 block=1 mask=causal sequences=2:9",
    // Every layout, table and row form.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal layout=hnd sequences=4:70,1:300",
    "attention q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=causal layout=gaps rows=fused sequences=4:70",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal layout=interleaved sequences=4:70,1:9",
    "attention q=f32 kv=f32 heads=16/1 dim=192 dim_v=128 block=16 mask=causal layout=shared sequences=2:70",
    "attention q=bf16 kv=bf16 heads=4/2 dim=64 block=16 mask=causal tables=csr sequences=4:70,0:20,1:33",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal tables=csr rows=fused sequences=4:70,6:6",
    // Block sizes.
    "attention q=f32 kv=f32 heads=4/2 dim=32 block=1 mask=causal sequences=4:70,1:130",
    "attention q=f32 kv=f32 heads=4/2 dim=32 block=2 mask=causal sequences=4:70,1:130",
    "attention q=f32 kv=f32 heads=4/2 dim=32 block=64 mask=causal sequences=4:70,1:130",
    "attention q=f32 kv=f32 heads=4/2 dim=32 block=256 mask=causal sequences=4:300,1:130",
    // Masks and positions.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=none sequences=4:70,9:3",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=window:1 sequences=4:70,1:300",
    "attention q=f32 kv=f16 heads=4/2 dim=64 block=8 mask=window:37 sequences=40:170,1:300,5:5",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=bits sequences=40:170,1:300,5:5",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal positions sequences=40:170,1:30,5:5",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=window:20 positions sequences=40:170,1:30,5:5",
    // Empty sequences, more queries than keys: rows that see nothing.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal sequences=0:0,3:0,1:5,0:9,9:4",
    "attention q=bf16 kv=bf16 heads=4/2 dim=64 block=16 mask=window:3 sequences=2:0,9:4,1:1",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal",
    // Terms of the score.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal softcap=5 sequences=9:70,1:300",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal alibi sequences=9:70,1:300",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal sinks sequences=9:70,1:300,2:0",
    "attention q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=window:64 softcap=30 alibi sinks sequences=9:170",
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal scores=100000 sequences=9:70,1:300",
    "attention q=bf16 kv=bf16 heads=4/2 dim=64 block=16 mask=causal scores=100000 sequences=9:70,1:300",
    // Shared prefixes and long contexts.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal shared_prefix sequences=3*2:100,1:300",
    "attention q=f32 kv=f16 heads=4/1 dim=64 block=16 mask=causal sequences=1:2500",
    // 8-bit caches.
    "attention q=f32 kv=fp8_e4m3 heads=4/2 dim=64 block=16 mask=causal scale=tensor sequences=9:70,1:300",
    "attention q=f16 kv=fp8_e4m3 heads=4/2 dim=128 block=16 mask=causal scale=head sequences=9:70,1:300",
    "attention q=bf16 kv=fp8_e5m2 heads=4/2 dim=64 block=16 mask=causal scale=head sequences=9:70,1:300",
    // The cache operations.
    "write_kv q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal sequences=37:37",
    "write_kv q=f32 kv=f16 heads=4/2 dim=64 block=16 mask=causal rows=fused layout=hnd sequences=37:37",
    "write_kv q=f32 kv=bf16 heads=4/2 dim=40 dim_v=24 block=1 mask=causal layout=gaps sequences=37:37",
    "write_kv q=bf16 kv=bf16 heads=4/2 dim=64 block=256 mask=causal layout=interleaved sequences=37:37",
    "write_kv q=f16 kv=f16 heads=8/8 dim=128 block=16 mask=causal rows=fused sequences=5:5",
    "write_kv q=f32 kv=fp8_e4m3 heads=4/2 dim=64 block=16 mask=causal scale=head sequences=37:37",
    "write_kv q=bf16 kv=fp8_e5m2 heads=4/2 dim=64 block=16 mask=causal scale=tensor sequences=37:37",
    "copy_blocks q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal count=9",
    "copy_blocks q=f16 kv=f16 heads=4/2 dim=64 dim_v=32 block=16 mask=causal layout=hnd count=9",
    "copy_blocks q=bf16 kv=bf16 heads=3/3 dim=40 block=1 mask=causal layout=gaps count=9",
    "copy_blocks q=f32 kv=fp8_e4m3 heads=4/2 dim=64 block=16 mask=causal layout=interleaved count=9",
    "copy_blocks q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal",
    "swap_blocks q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal count=9",
    "swap_blocks q=f16 kv=f16 heads=4/2 dim=64 block=16 mask=causal layout=hnd count=5",
    "swap_blocks q=bf16 kv=bf16 heads=4/2 dim=40 dim_v=24 block=8 mask=causal layout=gaps count=5",
    "merge_states q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal count=2 sequences=20:20",
    "merge_states q=f16 kv=f16 heads=4/2 dim=80 block=16 mask=causal count=7 sequences=20:20",
    "merge_states q=bf16 kv=bf16 heads=4/2 dim=64 block=16 mask=causal count=3 scores=1000 sequences=20:20",
    "merge_states q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal count=1 sequences=5:5",
];

/// Shapes of models and steps, larger than the quick ones.
const MODELS: &[&str] = &[
    // SmolLM2-135M: decode and prefill.
    "attention q=f32 kv=f32 heads=9/3 dim=64 block=16 mask=causal sequences=8*1:512",
    "attention q=f32 kv=bf16 heads=9/3 dim=64 block=16 mask=causal sequences=256:256",
    // Llama 3 8B, Qwen2 7B, Mistral 7B with its window, Gemma 2 9B with soft cap.
    "attention q=bf16 kv=bf16 heads=32/8 dim=128 block=16 mask=causal sequences=4*1:1024,16:300",
    "attention q=f16 kv=f16 heads=28/4 dim=128 block=16 mask=causal sequences=2*1:700,33:64",
    "attention q=f16 kv=f16 heads=32/8 dim=128 block=16 mask=window:512 sequences=2*1:1100,20:600",
    "attention q=bf16 kv=bf16 heads=16/8 dim=256 block=16 mask=window:256 softcap=50 sequences=1:700,20:300",
    // MPT with ALiBi, gpt-oss with sinks and a window, multi-query attention.
    "attention q=f16 kv=f16 heads=32/32 dim=128 block=16 mask=causal alibi sequences=1:500,9:80",
    "attention q=bf16 kv=bf16 heads=64/8 dim=64 block=16 mask=window:128 sinks sequences=1:500,9:80",
    "attention q=f16 kv=f16 heads=71/1 dim=64 block=16 mask=causal sequences=1:500,9:80",
    // Latent attention: values are a part of the keys.
    "attention q=bf16 kv=bf16 heads=128/1 dim=256 dim_v=192 block=64 mask=causal layout=shared sequences=1:300,2:90",
    // Many sequences of many lengths, long contexts.
    "attention q=f32 kv=f32 heads=4/2 dim=64 block=16 mask=causal sequences=40*1:100,9*1:15,9*0:3,5*20:20",
    "attention q=f32 kv=f32 heads=2/1 dim=64 block=32 mask=causal sequences=1:9000",
    "attention q=f16 kv=f16 heads=2/1 dim=128 block=256 mask=causal tables=csr sequences=3:6000,1:1",
    "attention q=f32 kv=f32 heads=2/1 dim=64 block=16 mask=bits sequences=3:5000,70:90",
    "attention q=f32 kv=f32 heads=2/1 dim=64 block=16 mask=none scores=100000 softcap=30 sequences=3:900",
];

fn parse(lines: &[&str], random: &mut Random) -> Vec<Case> {
    let cases = lines.iter().filter_map(|line| line.parse::<Case>().ok());
    cases.map(|case| Case { seed: random.bits() % 1_000_000_000, ..case }).collect()
}

/// Some sixty small cases: every corner once. Seconds on any backend.
pub fn quick(seed: u64) -> Vec<Case> {
    parse(QUICK, &mut Random::new(seed))
}

/// [`quick`], the shapes of models, every combination of types, layouts, block sizes and masks once over, and
/// a hundred random cases.
pub fn full(seed: u64) -> Vec<Case> {
    let mut random = Random::new(seed);
    let mut cases = parse(QUICK, &mut random);
    cases.extend(parse(MODELS, &mut random));
    // Types × layouts, each with another block size and mask in turn.
    let masks = [CaseMask::Causal, CaseMask::None, CaseMask::Window(21), CaseMask::Bits];
    let mut turn = 0;
    for q_dtype in [DType::F32, DType::F16, DType::Bf16] {
        for kv_dtype in DType::ALL {
            for layout in [Layout::Nhd, Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared] {
                turn += 1;
                cases.push(Case {
                    q_dtype,
                    kv_dtype,
                    layout,
                    block_size: 1 << (turn % 9),
                    mask: masks[turn % masks.len()],
                    scale: if kv_dtype.is_fp8() { ScaleKind::Head } else { ScaleKind::One },
                    sequences: vec![
                        SequenceShape { queries: 1, keys: 150 },
                        SequenceShape { queries: 13, keys: 40 },
                    ],
                    seed: random.bits() % 1_000_000_000,
                    ..Case::default()
                });
            }
        }
    }
    cases.extend((0..100).map(|_| random_case(&mut random)));
    cases
}

/// A random case of any operation, small enough for hundreds of them.
pub fn random_case(random: &mut Random) -> Case {
    let kv_heads = 1 + random.below(4);
    let layout = random.pick(Layout::Nhd, &[Layout::Hnd, Layout::Gaps, Layout::Interleaved, Layout::Shared]);
    let any_dim = 1 + random.below(256);
    let head_dim_qk = random.pick(64, &[8, 16, 40, 64, 80, 96, 128, any_dim]);
    let head_dim_v = match random.below(3) {
        0 if layout == Layout::Shared => 1 + random.below(head_dim_qk),
        0 => 1 + random.below(256),
        _ => head_dim_qk,
    };
    let kv_dtype = random.pick(DType::F32, &DType::ALL);
    let mut sequences = Vec::new();
    for _ in 0..random.below(6) {
        let (most_keys, most_queries) = (random.pick(0, &[2, 20, 200, 700]), random.pick(1, &[2, 5, 40]));
        let queries = random.below(most_queries + 1);
        sequences.push(SequenceShape { queries, keys: random.below(most_keys + 1) });
    }
    let operation = match random.below(8) {
        0 => Operation::WriteKv,
        1 => Operation::CopyBlocks,
        2 => Operation::SwapBlocks,
        3 => Operation::MergeStates,
        _ => Operation::Attention,
    };
    let layout = match (operation, layout) {
        (Operation::Attention, layout) => layout,
        (_, Layout::Shared) => Layout::Nhd,
        (_, layout) => layout,
    };
    let window = CaseMask::Window(1 + random.below(100));
    let mask = random.pick(CaseMask::Causal, &[CaseMask::None, CaseMask::Bits, window, CaseMask::Causal]);
    let scaled = kv_dtype.is_fp8() || random.one_in(6);
    Case {
        operation,
        q_dtype: random.pick(DType::F32, &[DType::F16, DType::Bf16]),
        kv_dtype,
        q_heads: kv_heads * random.pick(1, &[2, 3, 4, 7, 8]),
        kv_heads,
        head_dim_qk,
        head_dim_v,
        block_size: 1 << random.below(9),
        layout,
        rows: random.pick(Rows::Packed, &[Rows::Fused]),
        tables: random.pick(Tables::Padded, &[Tables::Csr]),
        mask,
        positions: random.one_in(4),
        shared_prefix: random.one_in(3),
        poison_unseen: false,
        softcap: random.one_in(4).then(|| random.pick(2.0, &[30.0, 50.0])),
        alibi: random.one_in(4),
        sinks: random.one_in(4),
        scale: if scaled { random.pick(ScaleKind::Tensor, &[ScaleKind::Head]) } else { ScaleKind::One },
        scores: random.pick(8.0, &[0.5, 8.0, 60.0, 1e5]),
        sequences,
        count: random.below(12),
        seed: random.bits() % 1_000_000_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_table_is_a_case_and_reads_back() {
        for line in QUICK.iter().chain(MODELS) {
            let case: Case = line.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(case.to_string().parse(), Ok(case), "{line}");
        }
        let mut random = Random::new(super::super::fresh_seed());
        for _ in 0..500 {
            let case = random_case(&mut random);
            assert_eq!(case.to_string().parse(), Ok(case));
        }
    }

    #[test]
    fn lines_that_are_no_case_are_refused_with_the_word() {
        for (line, word) in [
            ("", "empty"),
            ("atention q=f32", "atention"),
            ("attention q=f64", "f64"),
            ("attention dim=0", "dim"),
            ("attention heads=5/2", "heads"),
            ("attention heads=5", "heads=5"),
            ("attention block=3", "block"),
            ("attention sequences=1:", "1:"),
            ("attention sequences=1:99999999999", "too large"),
            ("attention mask=window", "window"),
            ("attention colour=red", "colour=red"),
        ] {
            let error = line.parse::<Case>().unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
