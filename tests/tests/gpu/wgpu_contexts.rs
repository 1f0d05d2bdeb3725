//! A context for every adapter of this machine.

use std::io::Write as _;

use pagewise_attention::wgpu::wgpu::{DeviceDescriptor, Features, Limits};
use pagewise_attention::wgpu::{self as backend, Context};

/// Every adapter's context. Without any: a loud line, and a failure where software Vulkan must be there.
#[allow(dead_code, reason = "not every test takes the devices as they are")]
pub fn contexts() -> Vec<(String, Context)> {
    let reports = pollster::block_on(backend::adapters());
    if reports.is_empty() {
        let advice = "no Vulkan adapter; ./scripts/install-vulkan installs a software one";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{advice}");
        // Past the test harness, which keeps eprintln! of a passing test to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {advice}");
    }
    reports
        .iter()
        .map(|report| {
            report.check().unwrap();
            let (device, queue) = pollster::block_on(backend::open(report.index)).unwrap();
            (report.to_string(), Context::new(device, queue).unwrap().with_matrices(&report.matrices))
        })
        .collect()
}

/// The same adapters with what every WebGPU device has and no more: no f16, no subgroups, the default limits.
#[allow(dead_code, reason = "not every test has kernels that differ there")]
pub fn plain_contexts() -> Vec<(String, Context)> {
    pollster::block_on(backend::adapters())
        .iter()
        .map(|report| {
            let descriptor = DeviceDescriptor {
                required_features: Features::empty(),
                required_limits: Limits::default(),
                ..DeviceDescriptor::default()
            };
            let (device, queue) = pollster::block_on(report.adapter().request_device(&descriptor)).unwrap();
            (format!("{report}, plain"), Context::new(device, queue).unwrap())
        })
        .collect()
}
