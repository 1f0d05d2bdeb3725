//! Steps that are done again: the launches of a decode of a shape, captured once as a CUDA graph and replayed.
//!
//! The shapes that are to be expected are captured when a model is loaded (`warm_up.rs`). Of any other the first step runs
//! as it is, which loads every kernel and chooses every algorithm, and the second is captured: shapes beyond what was
//! foreseen, and those whose graphs were forgotten because the memory behind them moved. Owns the graphs; that addresses
//! and launches of a shape are always the same is `inputs.rs`'s, `arena.rs`'s and `step.rs`'s.

use std::collections::HashMap;
use std::sync::Arc;

use pagewise_attention::cuda::CudaError;
use pagewise_attention::cuda::cudarc::driver::CudaGraph;
use pagewise_attention::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::gpu::{Gpu, checked};
use super::step::GraphKey;
use super::tensor::CudaTensor;
use crate::backend::BackendError;

/// What is known of each shape.
#[derive(Default)]
pub(super) struct Graphs {
    of: HashMap<GraphKey, State>,
}

impl std::fmt::Debug for Graphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graphs").field("shapes", &self.of.len()).finish()
    }
}

enum State {
    /// Its first step has run.
    Seen,
    Captured {
        graph: Graph,
        logits: CudaTensor,
    },
}

/// A graph, which its owner uses from one thread at a time.
struct Graph(CudaGraph);

// SAFETY: the driver lets any thread use a graph, one at a time; it is inside of a mutex.
unsafe impl Send for Graph {}

impl Graphs {
    /// Runs a step by replaying its graph, by capturing one, or as it is.
    pub(super) fn run(
        &mut self,
        gpu: &Arc<Gpu>,
        key: &GraphKey,
        mut forward: impl FnMut() -> Result<CudaTensor, BackendError>,
    ) -> Result<CudaTensor, BackendError> {
        match self.of.get(key) {
            Some(State::Captured { graph, logits }) => {
                checked("cuGraphLaunch", graph.0.launch())?;
                Ok(logits.again())
            }
            None => {
                let logits = forward()?;
                self.of.insert(key.clone(), State::Seen);
                Ok(logits)
            }
            Some(State::Seen) => {
                let Some((graph, logits)) = self.capture(gpu, key, &mut forward)? else { return forward() };
                checked("cuGraphLaunch", graph.0.launch())?;
                tracing::debug!(?key, "captured a CUDA graph that was not foreseen");
                Ok(logits.again())
            }
        }
    }

    /// Captures a step, whose kernels are loaded, and brings its graph to the device; it does not run.
    pub(super) fn foresee(
        &mut self,
        gpu: &Arc<Gpu>,
        key: &GraphKey,
        mut forward: impl FnMut() -> Result<CudaTensor, BackendError>,
    ) -> Result<(), BackendError> {
        match self.capture(gpu, key, &mut forward)? {
            Some((graph, _)) => checked("cuGraphUpload", graph.0.upload()),
            None => Ok(()),
        }
    }

    /// Captures a shape's graph. `None` if somebody else who uses the GPU from this process disturbed it every time: the
    /// shape then waits for its next step.
    fn capture(
        &mut self,
        gpu: &Arc<Gpu>,
        key: &GraphKey,
        forward: &mut impl FnMut() -> Result<CudaTensor, BackendError>,
    ) -> Result<Option<(&Graph, &CudaTensor)>, BackendError> {
        // Until it has worked the shape counts as one that was never seen.
        self.of.remove(key);
        let mut tries = 0;
        let (graph, logits) = loop {
            match capture(gpu, forward) {
                Err(error) if was_disturbed(&error) && tries < TRIES => tries += 1,
                Err(error) if was_disturbed(&error) => {
                    tracing::warn!(?key, %error, "a CUDA graph could not be captured; its steps are launched as they are");
                    self.of.insert(key.clone(), State::Seen);
                    return Ok(None);
                }
                captured => break captured?,
            }
        };
        let state = self.of.entry(key.clone()).insert_entry(State::Captured { graph, logits }).into_mut();
        match state {
            State::Captured { graph, logits } => Ok(Some((graph, logits))),
            State::Seen => Err(BackendError::Library("a captured graph was lost".to_owned())),
        }
    }

    /// Shapes with a graph.
    pub(super) fn captured(&self) -> usize {
        self.of.values().filter(|state| matches!(state, State::Captured { .. })).count()
    }

    pub(super) fn clear(&mut self) {
        self.of.clear();
    }
}

/// How often a capture that was disturbed is tried again.
const TRIES: usize = 3;

/// Whether a capture was made invalid from outside: some calls of other threads that use the same context do so.
fn was_disturbed(error: &BackendError) -> bool {
    matches!(error, BackendError::Cuda(CudaError::Driver { name, .. }) if name == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
}

/// Captures what `forward` puts on the computing stream, which does not run.
fn capture(
    gpu: &Arc<Gpu>,
    forward: &mut impl FnMut() -> Result<CudaTensor, BackendError>,
) -> Result<(Graph, CudaTensor), BackendError> {
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    checked("cuStreamBeginCapture", gpu.stream.begin_capture(mode))?;
    let logits = forward();
    // Ended whatever came of it: a stream that captures cannot do anything else.
    let graph = checked("cuStreamEndCapture", gpu.stream.end_capture(CUgraphInstantiate_flags(0)));
    // What `forward` met after the capture had been disturbed says less than the end of the capture: cuBLASLt only reports
    // that it failed.
    match (logits, graph) {
        (logits, Err(error)) if was_disturbed(&error) => {
            if let Err(met) = logits {
                tracing::debug!(%met, "in a capture that was disturbed");
            }
            Err(error)
        }
        (Err(error), _) | (_, Err(error)) => Err(error),
        (Ok(logits), Ok(Some(graph))) => Ok((Graph(graph), logits)),
        (Ok(_), Ok(None)) => Err(BackendError::Library("the CUDA driver captured an empty graph".to_owned())),
    }
}
