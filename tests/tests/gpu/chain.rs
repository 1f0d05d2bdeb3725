//! A step as three launches that may overlap: keys and values are written, queries are written, a dependent decode reads
//! both. Owns what lies in memory before the first of them; launching them is the business of a GPU's test or the
//! interpreter's.

use pagewise_attention::conformance::{AttentionData, Case, PlannedMemory, place_attention};
use pagewise_attention::cuda::ptx::decode::Ring;
use pagewise_attention::cuda::ptx::write_kv::RotaryStyle;
use pagewise_attention::cuda::{
    AttentionCall, AttentionOptions, AttentionPlan, Device, GridHeads, Order, PlanOptions, PositionType,
    Rotary, RotaryQueries, RotaryTables, WriteKvCall,
};
use pagewise_attention::{HostTensor, RowStrides};

use super::fresh::{Side, before, fresh_slots, row_bytes};

/// How a decode is planned that begins before the kernels before it have ended: by the kernel that has dependent variants.
pub const fn dependent(
    item_keys: Option<u32>,
    block_heads: Option<u32>,
    grid_items: Option<u32>,
) -> PlanOptions {
    PlanOptions {
        item_keys,
        shrink: None,
        tuning: None,
        ring: Some(Ring::Large),
        block_heads,
        grid_items,
        grid_heads: GridHeads::One,
        order: Order::Dependent,
    }
}

/// Every query row by itself, through the decode kernel.
pub fn by_rows(decode: PlanOptions) -> AttentionOptions {
    AttentionOptions { decode, tiles_from: Some(usize::MAX), ..AttentionOptions::default() }
}

/// How a case is planned that a list has, whatever its seed is.
pub fn listed(case: &Case, cases: &[(&str, PlanOptions)]) -> Option<PlanOptions> {
    let is_case = |line: &str| Case { seed: case.seed, ..line.parse().unwrap() } == *case;
    cases.iter().find(|(line, _)| is_case(line)).map(|&(_, options)| options)
}

/// Which of what is written is not there before: NaN. The rest is overwritten with itself.
#[derive(Clone, Copy, Debug)]
pub struct Late {
    pub keys: bool,
    pub queries: bool,
}

impl Late {
    pub const KEYS: Self = Self { keys: true, queries: false };
    pub const QUERIES: Self = Self { keys: false, queries: true };
    pub const BOTH: Self = Self { keys: true, queries: true };
}

/// A case, and the keys that its step writes: as many as a dependent launch allows.
pub struct Step {
    pub data: AttentionData,
    slots: Vec<u64>,
}

/// The launches of a step, in their order.
pub struct Launches<'a> {
    pub write_keys: WriteKvCall<'a>,
    /// It has no slots: queries turn by no angle on their way to where they are read, and that is all.
    pub write_queries: (WriteKvCall<'a>, Rotary),
    pub decode: AttentionCall,
}

impl Step {
    pub fn new(case: &Case) -> Self {
        let data = AttentionData::generate(case);
        let slots = fresh_slots(&data.problem().unwrap());
        Self { data, slots }
    }

    /// The plan of the decode, in the order that is asked for, and surely no other.
    pub fn plan(&self, device: &Device, options: PlanOptions) -> AttentionPlan {
        let plan = AttentionPlan::new(&self.data.problem().unwrap(), device, by_rows(options)).unwrap();
        let depends = plan.variants().iter().all(|variant| variant.ends_with("_pdl"));
        assert_eq!(
            depends,
            options.order == Order::Dependent,
            "{:?} for {}",
            plan.variants(),
            self.data.case
        );
        plan
    }

    /// What a cache holds when all is written, and before that.
    pub fn cache(&self, side: Side) -> [Vec<u8>; 2] {
        let view = match side {
            Side::K => self.data.k_view(),
            Side::V => self.data.v_view(),
        };
        let cache = view.to_bytes();
        let before = before(&self.data.problem().unwrap(), side, &cache, &self.slots);
        [cache, before]
    }

    /// Puts into memory what is there before the first launch.
    pub fn place(
        &self,
        plan: &AttentionPlan,
        late: Late,
        upload: &mut dyn FnMut(&[u8]) -> u64,
    ) -> Launches<'_> {
        let data = &self.data;
        let (config, layout, problem) = (&data.config, &data.layout, data.problem().unwrap());
        let memory = PlannedMemory { work: plan.work(), workspace: plan.workspace() };
        let out = data.poisoned_out();
        let task = data.task().unwrap();
        let whole =
            place_attention(&task, &memory, out.as_ref(), None, &mut |bytes| Ok(upload(bytes))).unwrap();

        let tokens = data.total_queries();
        let [(k_cache, k), (v_cache, v)] = Side::BOTH.map(|side| {
            let [cache, before] = self.cache(side);
            let rows = self.slots.iter().flat_map(|&slot| row_bytes(&problem, side, slot));
            let rows: Vec<u8> = rows.flat_map(|range| cache[range].to_vec()).collect();
            (upload(if late.keys { &before } else { &cache }), upload(&rows))
        });
        let write_keys = WriteKvCall {
            config,
            layout,
            source: config.kv_dtype,
            tokens: self.slots.len(),
            slots: upload(&self.slots.iter().flat_map(|slot| slot.to_le_bytes()).collect::<Vec<u8>>()),
            k,
            k_strides: RowStrides::packed(config.kv_heads, config.head_dim_qk),
            v,
            v_strides: RowStrides::packed(config.kv_heads, config.head_dim_v),
            k_cache,
            v_cache,
            scales: None,
            order: Order::Dependent,
        };
        let nothing = |dim: usize| vec![0xff; tokens * config.kv_heads * dim * config.kv_dtype.size()];
        let no_slots = WriteKvCall {
            tokens,
            slots: upload(&vec![0xff; tokens * 8]),
            k: upload(&nothing(config.head_dim_qk)),
            v: upload(&nothing(config.head_dim_v)),
            ..write_keys
        };
        let half = config.head_dim_qk / 2;
        let mut floats = |value: f32| upload(&HostTensor::F32(&vec![value; half]).to_bytes());
        let tables = RotaryTables { cos: floats(1.0), sin: floats(0.0), stride: half as u64, positions: 1 };
        let queries = data.q.as_ref().to_bytes();
        let q = upload(&if late.queries { vec![0xff; queries.len()] } else { queries });
        let rotary = Rotary {
            style: RotaryStyle::NeoX,
            dim: config.head_dim_qk,
            tables,
            positions: upload(&vec![0; tokens * 4]),
            position_type: PositionType::I32,
            queries: Some(RotaryQueries {
                q: whole.q,
                q_strides: data.q_strides,
                out: q,
                out_strides: data.q_strides,
            }),
        };
        let decode = AttentionCall { q, k_cache, v_cache, ..whole };
        Launches { write_keys, write_queries: (no_slots, rotary), decode }
    }
}
