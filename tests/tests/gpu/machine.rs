//! What runs a kernel, a GPU or the interpreter, and the checks of `write_kv`, `merge_states` and `copy_blocks` over
//! either.

use pagewise_attention::cuda::{
    CopyBlocksCall, KvScales, LayerAddresses, MergeStatesCall, Order, Rotary, WriteKvCall,
};

use super::blocks::{BlocksCase, Side, compare_bytes};
use super::merge::{MergeAddresses, MergeCase};
use super::rotary::{RotaryAddresses, RotaryTensors};
use super::write_kv::{Case, Tensors};

/// Memory, and the calls of the CUDA backend over it.
pub trait Machine {
    /// Copies bytes to the machine; never empty.
    fn upload(&mut self, bytes: &[u8]) -> u64;

    /// What is there now.
    fn download(&self, address: u64) -> Vec<u8>;

    /// Frees everything.
    fn clear(&mut self);

    /// Runs the call; the name of the kernel variant.
    fn write_kv(&mut self, call: &WriteKvCall<'_>, rotary: Option<&Rotary>) -> Result<String, String>;

    /// Whether kernels can begin before the one before them has ended.
    fn launches_dependently(&self) -> bool;

    /// Runs the call; the name of the kernel variant.
    fn merge_states(&mut self, call: &MergeStatesCall) -> Result<String, String>;

    /// Runs the call; the name of the kernel variant.
    fn copy_blocks(&mut self, call: &CopyBlocksCall<'_>) -> Result<String, String>;
}

/// The variant that ran, and the largest error.
pub type Checked = Result<(String, f64), String>;

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Half of the cases begin before what was launched before them has ended, where there is such a thing.
fn order(machine: &dyn Machine, case: &Case) -> Order {
    let early = machine.launches_dependently() && case.seed % 2 == 1;
    if early { Order::Dependent } else { Order::Stream }
}

fn upload_write<'a>(
    machine: &mut dyn Machine,
    tensors: &'a Tensors,
    order: Order,
) -> (WriteKvCall<'a>, Vec<u64>) {
    let slots: Vec<u8> = tensors.slots.iter().flat_map(|slot| slot.to_le_bytes()).collect();
    let caches: Vec<u64> = tensors.caches.iter().map(|cache| machine.upload(cache)).collect();
    let scales = tensors.scales.as_ref().map(|scales| KvScales {
        k: machine.upload(&floats(&scales.k)),
        v: machine.upload(&floats(&scales.v)),
        per_head: scales.k.len() > 1,
    });
    let call = WriteKvCall {
        config: &tensors.config,
        layout: &tensors.layout,
        source: tensors.source,
        tokens: tensors.slots.len(),
        slots: machine.upload(&slots),
        k: machine.upload(&tensors.k) + tensors.k_offset as u64,
        k_strides: tensors.k_strides,
        v: machine.upload(&tensors.v) + tensors.v_offset as u64,
        v_strides: tensors.v_strides,
        k_cache: caches.first().unwrap() + tensors.k_cache_offset as u64,
        v_cache: caches.last().unwrap() + tensors.v_cache_offset as u64,
        scales,
        order,
    };
    (call, caches)
}

/// A `write_kv` case.
pub fn check_write(machine: &mut dyn Machine, case: &Case) -> Checked {
    machine.clear();
    let tensors = case.build();
    let order = order(machine, case);
    let (call, caches) = upload_write(machine, &tensors, order);
    let variant = machine.write_kv(&call, None)?;
    let found: Vec<Vec<u8>> = caches.iter().map(|&cache| machine.download(cache)).collect();
    let error = tensors
        .compare(&tensors.expected(), &found)
        .map_err(|error| format!("write_kv {case} ({variant}): {error}"))?;
    Ok((variant, error))
}

/// The same case with rotary embedding.
pub fn check_rotary(machine: &mut dyn Machine, case: &Case) -> Checked {
    machine.clear();
    let tensors = RotaryTensors::build(case);
    let order = order(machine, case);
    let (call, caches) = upload_write(machine, &tensors.plain, order);
    let q = machine.upload(&tensors.q);
    let addresses = RotaryAddresses {
        table: machine.upload(&floats(&tensors.table)),
        positions: machine.upload(&tensors.position_bytes()),
        q,
        out: tensors.out.as_ref().map_or(q, |(out, _)| machine.upload(out)),
    };
    let variant = machine.write_kv(&call, Some(&tensors.rotary(addresses)))?;
    let found: Vec<Vec<u8>> = caches.iter().map(|&cache| machine.download(cache)).collect();
    tensors
        .compare(&tensors.expected(), &found, &machine.download(addresses.out))
        .map_err(|error| format!("write_kv with rotary embedding {case} ({variant}): {error}"))?;
    Ok((variant, 0.0))
}

/// A `merge_states` case.
pub fn check_merge(machine: &mut dyn Machine, case: &MergeCase) -> Checked {
    machine.clear();
    let tensors = case.build();
    let (out, lse) = tensors.outputs();
    let addresses = MergeAddresses {
        part_out: machine.upload(&tensors.part_out),
        part_lse: machine.upload(&floats(&tensors.part_lse)),
        out: machine.upload(&out),
        lse: machine.upload(&floats(&lse)),
    };
    let variant = machine.merge_states(&tensors.call(addresses))?;
    let bytes = machine.download(addresses.lse);
    let lse: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let error = tensors
        .compare(&machine.download(addresses.out), &lse)
        .map_err(|error| format!("merge_states {case} ({variant}): {error}"))?;
    Ok((variant, error))
}

/// A `copy_blocks` case: every byte of both sides is compared.
pub fn check_blocks(machine: &mut dyn Machine, case: &BlocksCase) -> Checked {
    machine.clear();
    let tensors = case.build();
    let mut buffers = Vec::new();
    let mut upload = |side: &Side| -> LayerAddresses {
        let addresses: Vec<u64> = side.buffers.iter().map(|buffer| machine.upload(buffer)).collect();
        let layers = side.layers(&addresses);
        buffers.push(addresses);
        layers
    };
    let layers: Vec<LayerAddresses> = tensors.sides.iter().map(&mut upload).collect();
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let tables: Vec<u64> = layers.iter().map(|layers| machine.upload(&bytes(layers.words()))).collect();
    let pairs = machine.upload(&tensors.pair_bytes());
    let count_at = tensors.count_at.map_or(0, |count| machine.upload(&count.to_le_bytes()));
    let variant = machine.copy_blocks(&tensors.call(&layers, &tables, pairs, count_at))?;
    let found = |side: usize| -> Vec<Vec<u8>> {
        buffers[side].iter().map(|&address| machine.download(address)).collect()
    };
    let read = if case.within { Ok(()) } else { compare_bytes(&tensors.sides[0].buffers, &found(0)) };
    read.and_then(|()| compare_bytes(&tensors.expected(), &found(buffers.len() - 1)))
        .map_err(|error| format!("PAGEWISE_BLOCKS_CASE=\"{case}\" ({variant}): {error}"))?;
    Ok((variant, 0.0))
}
