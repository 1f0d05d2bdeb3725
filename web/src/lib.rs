//! The conformance suite in a browser: the cases of `pagewise conformance --quick` on WebGPU, one at a time, so that the
//! page can show them as they come. Owns how a case waits for the device where no thread may block; cases, oracle and
//! runner are `pagewise_attention::conformance`'s. The page is `docs/web/`.
#![cfg(target_family = "wasm")]

use js_sys::Promise;
use pagewise_attention::conformance::{Case, CaseResult, Outcome, Wgpu, full, quick, try_case};
use pagewise_attention::wgpu::wgpu::{Buffer, MapMode};
use pagewise_attention::wgpu::{Context, adapters, open};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

/// The suite on one adapter.
#[wasm_bindgen]
pub struct Suite {
    name: String,
    context: Context,
    cases: Vec<Case>,
}

#[wasm_bindgen]
impl Suite {
    /// Opens the browser's adapter.
    ///
    /// # Errors
    /// The reason as a sentence: there is no WebGPU, no adapter, or its limits are too low.
    pub async fn open(seed: u32, all: bool) -> Result<Suite, JsError> {
        let reports = adapters().await;
        let report = reports.first().ok_or_else(|| {
            JsError::new("this browser shows no WebGPU adapter; it may have to be switched on")
        })?;
        let (device, queue) = open(report.index).await?;
        let context = Context::new(device, queue)?;
        let cases = if all { full(seed.into()) } else { quick(seed.into()) };
        Ok(Self { name: report.to_string(), context, cases })
    }

    /// What the adapter is called.
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Number of cases.
    pub fn count(&self) -> usize {
        self.cases.len()
    }

    /// Runs one case: a JSON object with `case`, `outcome` (passed, failed, skipped), and `worst` (largest error as a
    /// fraction of its tolerance) or `reason`.
    ///
    /// # Errors
    /// There is no such case, or a buffer could not be read.
    pub async fn run(&self, index: usize) -> Result<String, JsError> {
        let case = self.cases.get(index).ok_or_else(|| JsError::new("there is no such case"))?;
        let mut subject = Wgpu::that_does_not_wait(self.name.clone(), &self.context);
        loop {
            if let Some(CaseResult { line, outcome }) = try_case(&mut subject, case) {
                let result = match outcome {
                    Outcome::Passed(agreement) => {
                        serde_json::json!({"case": line, "outcome": "passed", "worst": agreement.worst})
                    }
                    Outcome::Failed(reason) => {
                        serde_json::json!({"case": line, "outcome": "failed", "reason": reason})
                    }
                    Outcome::Skipped(reason) => {
                        serde_json::json!({"case": line, "outcome": "skipped", "reason": reason})
                    }
                };
                return Ok(result.to_string());
            }
            let buffer = subject.under_way().ok_or_else(|| JsError::new("nothing is under way"))?;
            let bytes = read(buffer).await?;
            subject.arrived(bytes);
        }
    }
}

/// Waits for the device without blocking the page.
async fn read(buffer: &Buffer) -> Result<Vec<u8>, JsError> {
    let mapped = Promise::new(&mut |resolve, reject| {
        buffer.slice(..).map_async(MapMode::Read, move |result| {
            let answer = match result {
                Ok(()) => resolve.call0(&JsValue::UNDEFINED),
                Err(error) => reject.call1(&JsValue::UNDEFINED, &JsValue::from_str(&error.to_string())),
            };
            // Both functions are the promise's own; they do not throw.
            drop(answer);
        });
    });
    let failed = |error: JsValue| JsError::new(&error.as_string().unwrap_or_default());
    JsFuture::from(mapped).await.map_err(failed)?;
    Ok(buffer.slice(..).get_mapped_range()?.to_vec())
}
