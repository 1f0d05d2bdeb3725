//! A part of a buffer, and how it is bound: WebGPU wants aligned offsets, tensors begin where they please.

use std::num::NonZeroU64;

use ::wgpu::{Buffer, BufferBinding, BufferUsages, Limits};

use super::WgpuError;
use crate::ProblemError;

/// Where a tensor lies: bytes `offset..offset + size` of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct BufferRange<'a> {
    /// The buffer, made with `STORAGE`.
    pub buffer: &'a Buffer,
    /// First byte; a multiple of the element's size, no more.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl<'a> BufferRange<'a> {
    /// All of a buffer.
    pub fn whole(buffer: &'a Buffer) -> Self {
        Self { buffer, offset: 0, size: buffer.size() }
    }
}

/// A tensor as a kernel sees it: a binding, and the place of its first element in it.
pub(super) struct Bound<'a> {
    pub(super) binding: BufferBinding<'a>,
    /// Elements from the binding's begin.
    pub(super) first: u64,
}

/// What a tensor needs of its range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// The tensor's name, for errors.
    pub(super) tensor: &'static str,
    /// Bytes of an element.
    pub(super) element: u64,
    /// Elements that shape and strides reach.
    pub(super) extent: u64,
}

/// Checks a range and makes the binding that holds `need`, from the last aligned offset before it.
pub(super) fn bind<'a>(range: BufferRange<'a>, need: Need, limits: &Limits) -> Result<Bound<'a>, WgpuError> {
    let Need { tensor, element, extent } = need;
    let BufferRange { buffer, offset, size } = range;
    let wrong = |reason: String| Err(WgpuError::Range { tensor, reason });
    if !buffer.usage().contains(BufferUsages::STORAGE) {
        return Err(WgpuError::Usage { tensor, usage: "STORAGE" });
    }
    if offset.checked_add(size).is_none_or(|end| end > buffer.size()) {
        let there = buffer.size();
        return wrong(format!(
            "bytes {offset}.. with size {size} pass the end of its buffer of {there} bytes"
        ));
    }
    if !offset.is_multiple_of(element) {
        return wrong(format!("offset {offset} is not a multiple of its element size {element}"));
    }
    let len = size / element;
    if len < extent {
        return Err(ProblemError::BufferTooShort { tensor, len, needed: extent }.into());
    }
    let alignment = u64::from(limits.min_storage_buffer_offset_alignment.max(16));
    let start = offset - offset % alignment;
    // Whole words, as bindings must be. A buffer that ends within the last word cannot be bound to its end.
    let bytes = (offset - start + extent * element).next_multiple_of(4);
    if start + bytes > buffer.size() {
        return wrong(format!(
            "its last word ends at byte {} of a buffer of {} bytes; make buffers of whole words",
            start + bytes,
            buffer.size()
        ));
    }
    if bytes > limits.max_storage_buffer_binding_size {
        return Err(WgpuError::Limit {
            limit: "max_storage_buffer_binding_size",
            what: format!("binding {tensor}"),
            found: limits.max_storage_buffer_binding_size,
            needed: bytes,
        });
    }
    // A binding cannot be empty, and a vector of 16 bytes must fit it.
    let bytes = bytes.max(16).min(buffer.size() - start);
    Ok(Bound {
        binding: BufferBinding { buffer, offset: start, size: NonZeroU64::new(bytes) },
        first: (offset - start) / element,
    })
}
