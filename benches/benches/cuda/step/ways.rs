//! Steps with kinds of kernels left out or launched in other ways, and the times of each.

use pagewise_attention::cuda::Order;
use pagewise_attention::cuda::ptx::model::matvec::Geometry;
use serde_json::json;

use super::Step;
use super::models::PRODUCTS;
use crate::gpu::Gpu;

/// Steps of a graph: its launch counts less.
const STEPS: usize = 4;

/// What a step is made of, and how it is launched.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub products: [bool; 5],
    pub norms: bool,
    pub write_kv: bool,
    pub attention: bool,
    /// Embedding, and the row whose logits are wanted.
    pub ends: bool,
    pub argmax: bool,
    /// When `write_kv` and attention begin.
    pub order: Order,
    pub geometry: [Option<Geometry>; 5],
    /// What is changed in the text of the products' kernels: for tuning.
    pub edit: Edit,
}

const WHOLE: Way = Way {
    products: [true; 5],
    norms: true,
    write_kv: true,
    attention: true,
    ends: true,
    argmax: true,
    order: Order::Dependent,
    geometry: [None; 5],
    edit: Edit::None,
};

/// A change of the kernel's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    None,
    /// The next kernel may begin when a block has asked for its first weights, or is at its last tile.
    LaunchLate,
    LaunchLast,
    /// What the L2 fetches beside a load of weights: other than 256 bytes, or nothing.
    Beside(&'static str),
}

impl Edit {
    pub fn apply(self, text: &str) -> String {
        const LAUNCH: &str = "    griddepcontrol.launch_dependents;\n";
        let replaced = |text: &str, from: &str, to: &str| {
            assert!(text.contains(from), "{self:?}: {from}");
            text.replace(from, to)
        };
        match self {
            Self::None => text.to_owned(),
            Self::LaunchLate => {
                let wait = "    griddepcontrol.wait;\n";
                replaced(&replaced(text, LAUNCH, ""), wait, &format!("{LAUNCH}{wait}"))
            }
            Self::LaunchLast => replaced(
                &replaced(text, LAUNCH, ""),
                "TILE:\n",
                "TILE:\n    add.u32 %r_x, %r_tile, %r_grid;\n    setp.ge.u32 %p_x, %r_x, %r_tiles;\n    @%p_x griddepcontrol.launch_dependents;\n",
            ),
            Self::Beside(what) => replaced(text, ".L2::256B", what),
        }
    }
}

impl<'a, 'b> Step<'a, 'b, '_> {
    /// Microseconds of a step.
    fn time(&mut self, way: &Way) -> f64 {
        let gpu: &'a Gpu<'b> = self.bench.gpu;
        // Once without a graph, so that all kernels are loaded.
        self.step(way);
        gpu.stream.synchronize().unwrap();
        gpu.time(STEPS, |_| self.step(way))
    }

    fn note(&mut self, what: &str, way: &Way, whole: Option<f64>) -> f64 {
        let us = self.time(way);
        let more = whole.map_or(String::new(), |whole| format!(" {:+9.1} us", us - whole));
        println!("step {} {what:60} {us:9.1} us{more}", self.model.name);
        self.bench.figures.push(json!({ "name": format!("step {} {what}", self.model.name), "us": us }));
        us
    }

    /// The table: a step, and what it takes without each kind.
    pub fn table(&mut self) {
        let floor = self.model.bytes() as f64 / self.bench.ceiling / 1e3;
        println!("step {}: reading {} bytes takes {floor:.1} us", self.model.name, self.model.bytes());
        let whole = self.note("whole", &WHOLE, None);
        let mut without = |what: &str, way: Way| self.note(&format!("without {what}"), &way, Some(whole));
        without("early write_kv and attention", Way { order: Order::Stream, ..WHOLE });
        without("argmax", Way { argmax: false, ..WHOLE });
        without("embedding and the last row", Way { ends: false, ..WHOLE });
        without("write_kv", Way { write_kv: false, ..WHOLE });
        without("attention", Way { attention: false, ..WHOLE });
        without("write_kv and attention", Way { write_kv: false, attention: false, ..WHOLE });
        without("norms", Way { norms: false, ..WHOLE });
        for (index, product) in PRODUCTS.iter().enumerate() {
            let mut products = [true; 5];
            products[index] = false;
            without(&format!("{product:?}"), Way { products, ..WHOLE });
        }
        let bare = Way { write_kv: false, attention: false, ends: false, argmax: false, ..WHOLE };
        without("all but products and norms", bare);
        without("all but products", Way { norms: false, ..bare });
        without("products", Way { products: [false; 5], ..WHOLE });
    }

    /// Every geometry of every product in the step, and changes of the kernel.
    pub fn sweep(&mut self) {
        let whole = self.note("whole", &WHOLE, None);
        for edit in [Edit::LaunchLate, Edit::LaunchLast, Edit::Beside(".L2::128B"), Edit::Beside("")] {
            self.note(&format!("{edit:?}"), &Way { edit, ..WHOLE }, Some(whole));
        }
        let late = Way { order: Order::Stream, ..WHOLE };
        self.note("write_kv and attention in stream order", &late, Some(whole));
        let multiprocessors = self.bench.gpu.context.device().multiprocessors;
        for (index, product) in PRODUCTS.iter().enumerate() {
            let (shape, _) = self.model.shape(*product);
            let tiles = shape.features.div_ceil(8);
            for (warps, slots) in [(8, 4), (12, 4), (16, 2), (16, 4)] {
                for turns in [tiles.div_ceil(multiprocessors), 0] {
                    // As many tiles for each block, or a block on every multiprocessor.
                    let blocks = if turns == 0 { multiprocessors } else { tiles.div_ceil(turns) };
                    for copies in [false, true] {
                        let mut geometry = [None; 5];
                        geometry[index] = Some(Geometry { warps, blocks, slots, copies });
                        let what = format!(
                            "{product:?} by {blocks} blocks of {warps} warps, {slots} slots, copies {copies}"
                        );
                        self.note(&what, &Way { geometry, ..WHOLE }, Some(whole));
                    }
                }
            }
        }
    }
}
