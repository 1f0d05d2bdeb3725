//! The device: which adapter, with which limits, memory from it, and what it says when it fails. Nothing here panics:
//! every error of the device is kept until somebody asks, and is then a typed error of the step that met it.

use super::kernels::Pipelines;
use crate::backend::BackendError;
use pagewise_attention::wgpu::wgpu::{
    Buffer, BufferDescriptor, BufferUsages, DeviceType, Error, PollType, SubmissionIndex,
};
use pagewise_attention::wgpu::{self as attention, AdapterReport, Context, WgpuError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AdapterChoice {
    /// The first real GPU; a software adapter only where there is no other.
    #[default]
    Best,
    /// The first real GPU, or none.
    Hardware,
    /// The one of this number in the list of adapters, or the first whose description has this in it: `llvmpipe`.
    Named(String),
}

impl AdapterChoice {
    /// The variable that names an adapter.
    pub const VARIABLE: &str = "PAGEWISE_WGPU_ADAPTER";

    /// What [`VARIABLE`](Self::VARIABLE) names, if it is set.
    pub fn named_by_environment() -> Option<Self> {
        std::env::var(Self::VARIABLE).ok().filter(|name| !name.is_empty()).map(Self::Named)
    }

    /// The adapter's description.
    ///
    /// # Errors
    /// [`WgpuError::NoAdapter`], [`WgpuError::NoSuchAdapter`], [`WgpuError::Limit`].
    pub fn find(&self) -> Result<AdapterReport, WgpuError> {
        let reports = pollster::block_on(attention::adapters());
        if reports.is_empty() {
            return Err(WgpuError::NoAdapter);
        }
        let list = || reports.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        let (known, count) = (list(), reports.len());
        let chosen = match self {
            Self::Best => reports.into_iter().next(),
            Self::Hardware => reports.into_iter().find(|report| report.device_type != DeviceType::Cpu),
            Self::Named(name) => match name.parse::<usize>() {
                Ok(index) if index >= count => return Err(WgpuError::NoSuchAdapter { index, count }),
                Ok(index) => reports.into_iter().nth(index),
                Err(_) => {
                    let wanted = name.to_lowercase();
                    reports.into_iter().find(|report| report.to_string().to_lowercase().contains(&wanted))
                }
            },
        };
        let wanted = match self {
            Self::Named(name) => name.clone(),
            Self::Best | Self::Hardware => "a GPU, other than in software".to_owned(),
        };
        let report = chosen.ok_or(WgpuError::NoMatch { wanted, known })?;
        report.check()?;
        Ok(report)
    }
}

/// What the device has said since it was last asked.
#[derive(Debug, Default)]
struct Faults {
    lost: Option<String>,
    out_of_memory: bool,
    error: Option<String>,
}

impl Faults {
    fn note(&mut self, error: &Error) {
        match error {
            Error::OutOfMemory { .. } => self.out_of_memory = true,
            other => _ = self.error.get_or_insert(other.to_string()),
        }
    }

    /// Each is said once, but that the device is lost: that is said from then on.
    fn take(&mut self) -> Result<(), BackendError> {
        if let Some(reason) = &self.lost {
            return Err(BackendError::DeviceLost { reason: reason.clone() });
        }
        let error = self.error.take();
        if std::mem::take(&mut self.out_of_memory) {
            return Err(BackendError::OutOfMemory {
                what: "a step",
                wanted: 0,
                hint: "--kv-memory or --max-batch-tokens",
            });
        }
        error.map_or(Ok(()), |reason| Err(BackendError::Device { reason }))
    }
}

/// A device of our own, what is compiled for it, and its faults.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) context: Context,
    pub(super) pipelines: Pipelines,
    faults: Arc<Mutex<Faults>>,
}

impl Gpu {
    pub(super) fn open(report: &AdapterReport) -> Result<Self, BackendError> {
        let (device, queue) = pollster::block_on(attention::open(report.index))?;
        let faults = Arc::new(Mutex::new(Faults::default()));
        let kept = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error| lock(&kept).note(&error)));
        let kept = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, message| {
            lock(&kept).lost.get_or_insert(format!("{reason:?} {message}").trim().to_owned());
        });
        Ok(Self { context: Context::new(device, queue)?, pipelines: Pipelines::default(), faults })
    }

    /// What went wrong since this was last asked; a lost device stays lost.
    pub(super) fn check(&self) -> Result<(), BackendError> {
        lock(&self.faults).take()
    }

    /// Workgroups along one axis, at most.
    pub(super) fn per_dimension(&self) -> u32 {
        self.context.limits().max_compute_workgroups_per_dimension
    }

    /// Bytes of the largest buffer that one binding holds.
    pub(super) fn largest_binding(&self) -> u64 {
        let limits = self.context.limits();
        // Indices of f32 have 32 bits, and bindings are whole vectors.
        limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(16 << 30) & !15
    }

    /// A buffer that a kernel binds whole.
    pub(super) fn storage(&self, purpose: Purpose, bytes: u64) -> Result<Buffer, BackendError> {
        let bytes = bytes.next_multiple_of(16).max(16);
        let found = self.largest_binding();
        if bytes > found {
            let limits = self.context.limits();
            let limit = match limits.max_buffer_size < limits.max_storage_buffer_binding_size {
                true => "max_buffer_size",
                false => "max_storage_buffer_binding_size",
            };
            return Err(
                WgpuError::Limit { limit, what: purpose.what.to_owned(), found, needed: bytes }.into()
            );
        }
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        self.buffer(purpose, bytes, usage)
    }

    /// A buffer for other uses.
    pub(super) fn buffer(
        &self,
        Purpose { what, hint }: Purpose,
        bytes: u64,
        usage: BufferUsages,
    ) -> Result<Buffer, BackendError> {
        self.check()?;
        let descriptor =
            BufferDescriptor { label: Some(what), size: bytes, usage, mapped_at_creation: false };
        let buffer = self.context.device().create_buffer(&descriptor);
        match self.check() {
            Err(BackendError::OutOfMemory { .. }) => {
                Err(BackendError::OutOfMemory { what, wanted: bytes as usize, hint })
            }
            Err(error) => Err(error),
            Ok(()) => Ok(buffer),
        }
    }

    /// Waits for a submission, or for all.
    pub(super) fn wait(&self, submission: Option<SubmissionIndex>) -> Result<(), BackendError> {
        let device = self.context.device();
        let waited = device.poll(PollType::Wait { submission_index: submission, timeout: None });
        if waited.is_err() {
            // That a device is lost is only said when it is asked without waiting.
            let _ = device.poll(PollType::Poll);
        }
        self.check()?;
        waited.map(drop).map_err(|error| BackendError::Device { reason: error.to_string() })
    }
}

/// What memory is for, and the option that asks for less of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose {
    pub(super) what: &'static str,
    pub(super) hint: &'static str,
}

pub(super) const ACTIVATIONS: Purpose =
    Purpose { what: "a step's activations", hint: "--max-batch-tokens or --max-num-seqs" };
pub(super) const WEIGHTS: Purpose = Purpose { what: "the weights", hint: "a smaller model or --dtype bf16" };
pub(super) const KV_CACHE: Purpose =
    Purpose { what: "one layer of the KV cache", hint: "--kv-blocks or --kv-memory" };

/// Locks; what a thread that panicked left behind is used as it is, as each change here is a single one.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_says_is_a_typed_error_once_and_a_loss_for_ever() {
        let mut faults = Faults::default();
        faults.take().unwrap();
        faults.note(&Error::OutOfMemory { source: "no pages".into() });
        assert!(matches!(faults.take(), Err(BackendError::OutOfMemory { .. })));
        faults.take().unwrap();
        let validation = |text: &str| Error::Validation { source: text.into(), description: text.to_owned() };
        faults.note(&validation("first"));
        faults.note(&validation("second"));
        let Err(BackendError::Device { reason }) = faults.take() else { panic!("an error was noted") };
        assert!(reason.contains("first"), "{reason}");
        faults.take().unwrap();
        faults.lost = Some("reset".to_owned());
        faults.note(&Error::OutOfMemory { source: "no pages".into() });
        for _ in 0..2 {
            assert!(matches!(faults.take(), Err(BackendError::DeviceLost { .. })));
        }
    }
}
