//! Buffers with contents, and their contents back.

use pagewise_attention::wgpu::Context;
use pagewise_attention::wgpu::wgpu::util::{BufferInitDescriptor, DeviceExt};
use pagewise_attention::wgpu::wgpu::{Buffer, BufferDescriptor, BufferUsages, MapMode, PollType};

pub fn buffer(context: &Context, contents: &[u8], usage: BufferUsages) -> Buffer {
    context.device().create_buffer_init(&BufferInitDescriptor { label: None, contents, usage })
}

/// What a buffer holds that can be copied from.
#[allow(dead_code, reason = "not every test copies")]
pub fn read(context: &Context, buffer: &Buffer) -> Vec<u8> {
    let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
    let descriptor = BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let copy = context.device().create_buffer(&descriptor);
    let mut encoder = context.device().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, buffer.size());
    context.queue().submit([encoder.finish()]);
    mapped(context, &copy)
}

/// What a buffer holds that can be mapped.
pub fn mapped(context: &Context, buffer: &Buffer) -> Vec<u8> {
    buffer.slice(..).map_async(MapMode::Read, Result::unwrap);
    context.device().poll(PollType::wait_indefinitely()).unwrap();
    let bytes = buffer.slice(..).get_mapped_range().unwrap().to_vec();
    buffer.unmap();
    bytes
}
