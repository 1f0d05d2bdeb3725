//! A CUDA context for the tests, or a loud line that says why there is none; and receipts of what was run.

use std::collections::BTreeMap;
use std::io::Write as _;

use pagewise_attention::cuda::ptx::Kernel;
use pagewise_attention::cuda::ptx::receipt::{Receipt, Run, fingerprint};
use pagewise_attention::cuda::{Context, CudaError, devices, driver_release};

/// The first GPU. Without one, `SKIPPED:` and why; with `PAGEWISE_REQUIRE_CUDA=1` that fails the test instead.
pub fn context() -> Option<Context> {
    let usable = devices().and_then(|devices| match devices.first() {
        Some(device) => device.check().map(|()| device.ordinal),
        None => Err(CudaError::NoSuchDevice { ordinal: 0, count: 0 }),
    });
    match usable {
        Ok(ordinal) => Some(Context::primary(ordinal).expect("a usable GPU gives a context")),
        Err(error) => {
            let required = std::env::var("PAGEWISE_REQUIRE_CUDA").as_deref() == Ok("1");
            assert!(!required, "PAGEWISE_REQUIRE_CUDA=1, but there is no usable NVIDIA GPU: {error}");
            // Past the test harness, which keeps eprintln! of a passing test to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no NVIDIA GPU for this test: {error}");
            None
        }
    }
}

/// What was checked of each kernel variant in this run.
#[derive(Debug, Default)]
pub struct Receipts(BTreeMap<String, Receipt>);

impl Receipts {
    /// Notes a passed case.
    pub fn passed(&mut self, context: &Context, kernel: &Kernel, error: f64) {
        let device = context.device();
        let receipt = self.0.entry(kernel.entry().to_owned()).or_insert_with(|| Receipt {
            variant: kernel.entry().to_owned(),
            run: Some(Run {
                code: fingerprint(&kernel.code()),
                descriptor: fingerprint(&kernel.description()),
                gpu: device.name.clone(),
                compute_capability: device.compute_capability.to_string(),
                driver: format!(
                    "{} (CUDA {})",
                    driver_release().unwrap_or_else(|| "?".into()),
                    device.driver
                ),
                cases: 0,
                worst_error: 0.0,
            }),
        });
        if let Some(run) = &mut receipt.run {
            run.cases += 1;
            run.worst_error = run.worst_error.max(error);
        }
    }

    /// The variants that were checked.
    pub fn variants(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Writes `receipts_FAMILY.json` into the folder `PAGEWISE_RECEIPTS`, if it is set, for
    /// `cargo run -p pagewise-ptx --example import_receipts`.
    pub fn write(&self, family: &str) {
        let Some(folder) = std::env::var_os("PAGEWISE_RECEIPTS") else { return };
        let path = std::path::Path::new(&folder).join(format!("receipts_{family}.json"));
        let list: Vec<&Receipt> = self.0.values().collect();
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(path, serde_json::to_string_pretty(&list).unwrap() + "\n").unwrap();
    }
}
