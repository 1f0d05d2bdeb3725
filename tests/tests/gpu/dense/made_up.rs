//! `fill_weights`: the numbers are those that the host makes up, to the bit.

use super::super::random::{Random, run_cases};
use super::CASES;
use super::machine::Machine;
use pagewise_attention::wgpu::shaders::DType;
use pagewise_attention::wgpu::shaders::model::Rows;
use pagewise_attention::wgpu::shaders::model::fill_weights::{FillWeightsArgs, FillWeightsSpec};
use pagewise_attention::{DType as HostDType, HostTensor};
use pagewise_runtime::model_dir::{MadeUp, WeightTensor};

pub fn made_up_weights(machine: &mut Machine, seed: u64) {
    let mut random = Random::new(seed);
    for dtype in DType::ALL {
        let spec = FillWeightsSpec { dtype };
        let shader = spec.shader().unwrap();
        for _ in 0..run_cases(CASES) {
            let (rows, width) = (1 + random.below(20), 1 + random.below(90));
            let stride = width.next_multiple_of(8);
            let offset = 8 * random.below(3);
            // Numbers beyond 32 bits as well; 0.0411 is sqrt(3 / 1776).
            let first = random.next() >> random.pick(&[0, 31, 32, 33, 50, 64 - 1]);
            let (center, spread) = random.pick(&[(1.0, 0.125), (0.0, 0.02), (0.0, 0.0411), (2.0, 0.125)]);
            let made = MadeUp { seed: random.next(), first, center, spread };
            let args = FillWeightsArgs {
                rows: rows as u32,
                width: width as u32,
                out: Rows { offset: offset as u32, stride: stride as u32 },
                first,
                seed: made.seed,
                center,
                spread,
            };
            let label = format!("PAGEWISE_SEED={seed} {} {args:?}", spec.name());
            let per_word = 4 / dtype.size() as usize;
            let before = vec![0x7fc1_7fc1u32; (offset + rows * stride) / per_word + 4];
            let workgroups = spec.workgroups(&args, if random.one_in(3) { 3 } else { 65_535 }).unwrap();
            let after = machine.run(&shader, spec.uniform(&args).unwrap(), workgroups, &[&before]);

            let host = match dtype {
                DType::F32 => HostDType::F32,
                DType::F16 => HostDType::F16,
                DType::Bf16 => HostDType::Bf16,
            };
            let tensor = WeightTensor::of_made_up(made, host, &[rows, width]);
            let bits: Vec<u32> = match tensor.host() {
                HostTensor::F32(x) => x.iter().map(|x| x.to_bits()).collect(),
                HostTensor::F16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
                HostTensor::Bf16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
                HostTensor::F8E4M3(_) | HostTensor::F8E5M2(_) => panic!("no weight has this type"),
            };
            let mut want = before;
            for (row, bits) in bits.chunks(width).enumerate() {
                for column in 0..stride {
                    let (at, bits) = (offset + row * stride + column, bits.get(column).copied().unwrap_or(0));
                    let (word, shift) = (&mut want[at / per_word], 16 * (at % per_word));
                    let mask = if per_word == 1 { u32::MAX } else { 0xffff << shift };
                    *word = (*word & !mask) | bits << shift;
                }
            }
            let first = after.iter().zip(&want).position(|(after, want)| after != want);
            assert_eq!(first, None, "{label}: the first word that differs");
        }
    }
}
