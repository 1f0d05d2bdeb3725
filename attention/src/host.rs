//! Tensors in host memory: a slice that knows its element type. Used by the CPU backend and the oracle.

use crate::DType;
use half::{bf16, f16};

/// Read-only elements in host memory.
#[derive(Clone, Copy, Debug)]
pub enum HostTensor<'a> {
    /// binary32
    F32(&'a [f32]),
    /// binary16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
    /// fp8 E4M3, one byte each
    F8E4M3(&'a [u8]),
    /// fp8 E5M2, one byte each
    F8E5M2(&'a [u8]),
}

/// Writable elements in host memory.
#[derive(Debug)]
pub enum HostTensorMut<'a> {
    /// binary32
    F32(&'a mut [f32]),
    /// binary16
    F16(&'a mut [f16]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// fp8 E4M3, one byte each
    F8E4M3(&'a mut [u8]),
    /// fp8 E5M2, one byte each
    F8E5M2(&'a mut [u8]),
}

macro_rules! common {
    ($name:ident) => {
        impl $name<'_> {
            /// Element type.
            pub fn dtype(&self) -> DType {
                match self {
                    Self::F32(_) => DType::F32,
                    Self::F16(_) => DType::F16,
                    Self::Bf16(_) => DType::Bf16,
                    Self::F8E4M3(_) => DType::F8E4M3,
                    Self::F8E5M2(_) => DType::F8E5M2,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    Self::F32(x) => x.len(),
                    Self::F16(x) => x.len(),
                    Self::Bf16(x) => x.len(),
                    Self::F8E4M3(x) | Self::F8E5M2(x) => x.len(),
                }
            }

            /// No elements?
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }
        }
    };
}

common!(HostTensor);
common!(HostTensorMut);

impl HostTensorMut<'_> {
    /// The same elements, read-only.
    pub fn as_ref(&self) -> HostTensor<'_> {
        match self {
            Self::F32(x) => HostTensor::F32(x),
            Self::F16(x) => HostTensor::F16(x),
            Self::Bf16(x) => HostTensor::Bf16(x),
            Self::F8E4M3(x) => HostTensor::F8E4M3(x),
            Self::F8E5M2(x) => HostTensor::F8E5M2(x),
        }
    }

    /// The same elements for a shorter time, so that a tensor can be lent out more than once.
    pub fn reborrow(&mut self) -> HostTensorMut<'_> {
        match self {
            Self::F32(x) => HostTensorMut::F32(x),
            Self::F16(x) => HostTensorMut::F16(x),
            Self::Bf16(x) => HostTensorMut::Bf16(x),
            Self::F8E4M3(x) => HostTensorMut::F8E4M3(x),
            Self::F8E5M2(x) => HostTensorMut::F8E5M2(x),
        }
    }
}

impl HostTensor<'_> {
    /// The elements as bytes, in little-endian order as devices hold them.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bf16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F8E4M3(x) | Self::F8E5M2(x) => x.to_vec(),
        }
    }
}

impl HostTensorMut<'_> {
    /// Sets the elements from such bytes, as far as both reach.
    pub fn set_bytes(&mut self, bytes: &[u8]) {
        match self {
            Self::F32(x) => {
                x.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
            }
            Self::F16(x) => {
                x.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f16::from_le_bytes(*b));
            }
            Self::Bf16(x) => {
                x.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = bf16::from_le_bytes(*b));
            }
            Self::F8E4M3(x) | Self::F8E5M2(x) => x.iter_mut().zip(bytes).for_each(|(x, b)| *x = *b),
        }
    }
}
