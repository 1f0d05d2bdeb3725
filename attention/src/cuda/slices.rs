//! Attention over cudarc's slices: checked lengths and types, and a workspace that owns its memory.
//!
//! A comfort over [`Context::attention_raw`] and [`Context::decode_raw`], which do the work.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use pagewise_ptx::decode::WorkspaceSizes;

use super::plan::Extents;
use super::{
    AttentionCall, AttentionPlan, CacheScales, Context, CudaError, DecodePlan, Element, PlanBound, RawStream,
};
use crate::{AttentionConfig, DType, ProblemError};

/// An attention over cudarc slices: `Q` is the type of queries and output, `C` that of the cache (`u8` for fp8).
#[derive(Debug)]
pub struct AttentionSlices<'a, 'b, Q, C> {
    /// Queries, `[rows, q_heads, head_dim_qk]` with the strides of the planned problem.
    pub q: CudaView<'a, Q>,
    /// Key cache.
    pub k_cache: CudaView<'a, C>,
    /// Value cache; a later part of the same buffer where both lie interleaved.
    pub v_cache: CudaView<'a, C>,
    /// Block tables: `[sequences, max_blocks]`, or the `indices` of CSR tables, as they were planned.
    pub tables: CudaView<'a, i32>,
    /// Output, `[rows, q_heads, head_dim_v]` with the strides of the planned problem.
    pub out: &'b mut CudaViewMut<'a, Q>,
    /// Log-sum-exp (natural logarithm), `[rows, q_heads]`.
    pub lse: Option<&'b mut CudaViewMut<'a, f32>>,
    /// What stored keys and values are multiplied with: one factor each, or one for each KV head.
    pub scales: Option<(CudaView<'a, f32>, CudaView<'a, f32>)>,
    /// ALiBi's slopes, `[q_heads]`, if the configuration says so.
    pub alibi_slopes: Option<CudaView<'a, f32>>,
    /// Attention sinks, `[q_heads]`, if the configuration says so.
    pub sinks: Option<CudaView<'a, f32>>,
    /// The mask's words, `[rows, row_words]`, if the mask is one of bits.
    pub mask_bits: Option<CudaView<'a, u32>>,
}

/// The device memory that runs of a plan share: work items, partial results and tickets. One for each stream.
#[derive(Debug)]
pub struct AttentionWorkspace {
    work: CudaSlice<u32>,
    partial_out: CudaSlice<u8>,
    partial_max: CudaSlice<u8>,
    tickets: CudaSlice<u8>,
}

impl AttentionWorkspace {
    /// Allocates what no plan within a bound exceeds.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the memory is not there.
    pub fn new(stream: &Arc<CudaStream>, bound: &PlanBound) -> Result<Self, CudaError> {
        // Never empty, so that each has an address; zero, as the tickets must be.
        let bytes = |bytes: u64| stream.alloc_zeros::<u8>(bytes.max(16) as usize);
        Ok(Self {
            work: stream.alloc_zeros(bound.work.div_ceil(4).max(4) as usize)?,
            partial_out: bytes(bound.workspace.partial_out)?,
            partial_max: bytes(bound.workspace.partial_max)?,
            tickets: bytes(bound.workspace.tickets)?,
        })
    }

    /// Allocates what one plan needs.
    ///
    /// # Errors
    /// [`CudaError::Driver`] when the memory is not there.
    pub fn of(stream: &Arc<CudaStream>, plan: &AttentionPlan) -> Result<Self, CudaError> {
        let work = 4 * plan.work_words();
        Self::new(stream, &PlanBound { items: 0, work, workspace: plan.workspace() })
    }

    /// The addresses of its parts, for raw calls; the other fields are 0. Holds nothing back from other streams.
    pub fn addresses(&self, stream: &Arc<CudaStream>) -> AttentionCall {
        AttentionCall {
            work: self.work.device_ptr(stream).0,
            partial_out: self.partial_out.device_ptr(stream).0,
            partial_max: self.partial_max.device_ptr(stream).0,
            tickets: self.tickets.device_ptr(stream).0,
            ..AttentionCall::default()
        }
    }

    /// Copies a decode plan's work items to the device: once a step, before its runs.
    ///
    /// # Errors
    /// [`ProblemError::BufferTooShort`] for a plan beyond the bound, [`CudaError::Driver`] when the copy fails.
    pub fn upload(&mut self, stream: &Arc<CudaStream>, plan: &DecodePlan) -> Result<(), CudaError> {
        self.upload_words(stream, &plan.work())
    }

    /// Copies a plan's work to the device: once a step, before its runs.
    ///
    /// # Errors
    /// As [`AttentionWorkspace::upload`].
    pub fn upload_attention(
        &mut self,
        stream: &Arc<CudaStream>,
        plan: &AttentionPlan,
    ) -> Result<(), CudaError> {
        self.upload_words(stream, &plan.work())
    }

    fn upload_words(&mut self, stream: &Arc<CudaStream>, words: &[u32]) -> Result<(), CudaError> {
        if words.is_empty() {
            return Ok(());
        }
        let (len, needed) = (self.work.len(), words.len());
        match self.work.try_slice_mut(..needed) {
            Some(mut target) => Ok(stream.memcpy_htod(words, &mut target)?),
            None => Err(too_short("the work items", len as u64, needed as u64)),
        }
    }
}

/// What a plan reaches of a call's slices and of the workspace.
struct Needs<'a> {
    config: &'a AttentionConfig,
    extents: &'a Extents,
    sizes: WorkspaceSizes,
    work_words: u64,
}

impl<'a> From<&'a DecodePlan> for Needs<'a> {
    fn from(plan: &'a DecodePlan) -> Self {
        let (config, extents) = (&plan.config, &plan.extents);
        Self { config, extents, sizes: plan.workspace(), work_words: plan.work_words() }
    }
}

impl<'a> From<&'a AttentionPlan> for Needs<'a> {
    fn from(plan: &'a AttentionPlan) -> Self {
        let (config, extents) = (&plan.decode.config, &plan.decode.extents);
        Self { config, extents, sizes: plan.workspace(), work_words: plan.work_words() }
    }
}

impl Context {
    /// Puts a decode on a stream, over slices. The workspace holds the plan ([`AttentionWorkspace::upload`]).
    ///
    /// # Errors
    /// [`CudaError::OtherContext`] for a stream of another context, [`ProblemError::BufferTooShort`],
    /// [`ProblemError::BufferDType`] for slices that are not what was planned, and as
    /// [`Context::decode_raw`].
    ///
    /// # Safety
    /// - The block tables on the device agree with those that were planned, wherever a query sees a key: what they
    ///   name lies in the caches.
    /// - The workspace was last given this plan, and no other stream uses it meanwhile.
    pub unsafe fn decode<Q: Element, C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        plan: &DecodePlan,
        workspace: &mut AttentionWorkspace,
        args: AttentionSlices<'_, '_, Q, C>,
    ) -> Result<(), CudaError> {
        self.with_addresses(stream, &Needs::from(plan), workspace, args, |call, stream| {
            // SAFETY: the slices hold what the plan reaches, and the caller answers for tables and workspace.
            unsafe { self.decode_raw(plan, call, stream) }
        })
    }

    /// Puts attention on a stream, over slices. The workspace holds the plan
    /// ([`AttentionWorkspace::upload_attention`]).
    ///
    /// # Errors
    /// As [`Context::decode`].
    ///
    /// # Safety
    /// As [`Context::decode`].
    pub unsafe fn attention<Q: Element, C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        plan: &AttentionPlan,
        workspace: &mut AttentionWorkspace,
        args: AttentionSlices<'_, '_, Q, C>,
    ) -> Result<(), CudaError> {
        self.with_addresses(stream, &Needs::from(plan), workspace, args, |call, stream| {
            // SAFETY: the slices hold what the plan reaches, and the caller answers for tables and workspace.
            unsafe { self.attention_raw(plan, call, stream) }
        })
    }

    /// Checks the slices, and has `run` launch on their addresses.
    fn with_addresses<Q: Element, C: Element>(
        &self,
        stream: &Arc<CudaStream>,
        needs: &Needs<'_>,
        workspace: &mut AttentionWorkspace,
        args: AttentionSlices<'_, '_, Q, C>,
        run: impl FnOnce(&AttentionCall, RawStream) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if !self.is(stream.context()) {
            return Err(CudaError::OtherContext);
        }
        check(needs, workspace, &args)?;
        let AttentionSlices { q, k_cache, v_cache, tables, out, lse, scales, alibi_slopes, sinks, mask_bits } =
            args;
        // The guards make the stream wait for, and record, what other streams do with the slices.
        let (q, _q) = q.device_ptr(stream);
        let (k, _k) = k_cache.device_ptr(stream);
        let (v, _v) = v_cache.device_ptr(stream);
        let (tables, _tables) = tables.device_ptr(stream);
        let (out, _out) = out.device_ptr_mut(stream);
        let lse = lse.map(|lse| lse.device_ptr_mut(stream));
        let factors = scales.as_ref().map(|(k, v)| (k.device_ptr(stream), v.device_ptr(stream)));
        let slopes = alibi_slopes.as_ref().map(|slopes| slopes.device_ptr(stream));
        let sinks = sinks.as_ref().map(|sinks| sinks.device_ptr(stream));
        let bits = mask_bits.as_ref().map(|bits| bits.device_ptr(stream));
        let (work, _work) = workspace.work.device_ptr(stream);
        let (partial_out, _partial_out) = workspace.partial_out.device_ptr_mut(stream);
        let (partial_max, _partial_max) = workspace.partial_max.device_ptr_mut(stream);
        let (tickets, _tickets) = workspace.tickets.device_ptr_mut(stream);
        let per_head = scales.as_ref().is_some_and(|(k, v)| k.len() > 1 || v.len() > 1);
        let call = AttentionCall {
            q,
            k_cache: k,
            v_cache: v,
            tables,
            scales: factors.as_ref().map_or(CacheScales::default(), |((k, _), (v, _))| CacheScales {
                k: *k,
                v: *v,
                per_head,
            }),
            alibi_slopes: slopes.as_ref().map_or(0, |(address, _)| *address),
            sinks: sinks.as_ref().map_or(0, |(address, _)| *address),
            mask_bits: bits.as_ref().map_or(0, |(address, _)| *address),
            out,
            lse: lse.as_ref().map_or(0, |(address, _)| *address),
            work,
            partial_out,
            partial_max,
            tickets,
        };
        // The guards order the launch with other uses of the slices.
        run(&call, stream.cu_stream().into())
    }
}

/// Whether every slice has the type and the length that the plan reaches.
fn check<Q: Element, C: Element>(
    needs: &Needs<'_>,
    workspace: &AttentionWorkspace,
    args: &AttentionSlices<'_, '_, Q, C>,
) -> Result<(), CudaError> {
    let Needs { config, extents, sizes, work_words } = needs;
    let same = |found: DType, expected: DType| {
        found == expected || (found.is_fp8() && expected.is_fp8() && found.size() == expected.size())
    };
    for (tensor, found, expected) in
        [("q", Q::DTYPE, config.q_dtype), ("the cache", C::DTYPE, config.kv_dtype)]
    {
        if !same(found, expected) {
            return Err(ProblemError::BufferDType { tensor, found, expected }.into());
        }
    }
    let optional = |len: Option<usize>, wanted: bool, needed: u64| match (len, wanted) {
        (Some(len), true) => (len as u64, needed),
        // Whether one is missing is the launch's to say.
        _ => (needed, needed),
    };
    let per_head = |(k, v): &(CudaView<'_, f32>, CudaView<'_, f32>)| {
        let needed = if k.len() > 1 || v.len() > 1 { config.kv_heads as u64 } else { 1 };
        (k.len().min(v.len()) as u64, needed)
    };
    let heads = config.q_heads as u64;
    let pairs = [
        ("q", (args.q.len() as u64, extents.q)),
        ("the K cache", (args.k_cache.len() as u64, extents.k_cache)),
        ("the V cache", (args.v_cache.len() as u64, extents.v_cache)),
        ("the block tables", (args.tables.len() as u64, extents.tables)),
        ("out", (args.out.len() as u64, extents.out)),
        ("lse", optional(args.lse.as_ref().map(|lse| lse.len()), true, extents.lse)),
        ("the scales", args.scales.as_ref().map_or((0, 0), per_head)),
        ("ALiBi's slopes", optional(args.alibi_slopes.as_ref().map(CudaView::len), config.alibi, heads)),
        ("the sinks", optional(args.sinks.as_ref().map(CudaView::len), config.sinks, heads)),
        ("the mask's bits", optional(args.mask_bits.as_ref().map(CudaView::len), true, extents.mask_bits)),
        ("the work items", (workspace.work.len() as u64, *work_words)),
        ("the partial outputs", (workspace.partial_out.len() as u64, sizes.partial_out)),
        ("the partial maxima", (workspace.partial_max.len() as u64, sizes.partial_max)),
        ("the tickets", (workspace.tickets.len() as u64, sizes.tickets)),
    ];
    match pairs.into_iter().find(|(_, (len, needed))| len < needed) {
        Some((tensor, (len, needed))) => Err(too_short(tensor, len, needed)),
        None => Ok(()),
    }
}

fn too_short(tensor: &'static str, len: u64, needed: u64) -> CudaError {
    ProblemError::BufferTooShort { tensor, len, needed }.into()
}
