//! A context for every adapter of this machine.

use std::io::Write as _;

use pagewise_attention::wgpu::{self as backend, Context};

/// Every adapter's context. Without any: a loud line, and a failure where software Vulkan must be there.
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
            (report.to_string(), Context::new(device, queue).unwrap())
        })
        .collect()
}
