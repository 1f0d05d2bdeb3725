//! The models whose decode step is measured, by their sizes: what their products multiply, and how many bytes that reads.

use pagewise_attention::cuda::ptx::model::matvec::MatvecShape;

pub const HEAD_DIM: usize = 128;

/// A model by its sizes.
pub struct Model {
    pub name: &'static str,
    pub hidden: u32,
    pub layers: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub inner: u32,
    pub vocab: u32,
    /// Llama's: RMS norms, gated MLPs, rotary embedding; else OPT's.
    pub gated: bool,
}

pub const MODELS: [Model; 2] = [
    Model {
        name: "llama3-8b",
        hidden: 4096,
        layers: 32,
        q_heads: 32,
        kv_heads: 8,
        inner: 14336,
        vocab: 128_256,
        gated: true,
    },
    Model {
        name: "opt-13b",
        hidden: 5120,
        layers: 40,
        q_heads: 40,
        kv_heads: 40,
        inner: 20480,
        vocab: 50272,
        gated: false,
    },
];

/// The products of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    Qkv,
    O,
    Up,
    Down,
    Head,
}

pub const PRODUCTS: [Product; 5] = [Product::Qkv, Product::O, Product::Up, Product::Down, Product::Head];

impl Model {
    pub fn qkv(&self) -> u32 {
        ((self.q_heads + 2 * self.kv_heads) * HEAD_DIM) as u32
    }

    /// Features (of a gated product half of its rows), width, and rows of weights of a product.
    pub fn shape(&self, product: Product) -> (MatvecShape, u64) {
        let (features, width) = match product {
            Product::Qkv => (self.qkv(), self.hidden),
            Product::O => (self.hidden, (self.q_heads * HEAD_DIM) as u32),
            Product::Up => (self.inner, self.hidden),
            Product::Down => (self.hidden, self.inner),
            Product::Head => (self.vocab, self.hidden),
        };
        let halves = if self.gated && product == Product::Up { 2 } else { 1 };
        let shape = MatvecShape { rows: 1, features, width };
        (shape, halves * u64::from(features) * u64::from(width) * 2)
    }

    pub fn layer_bytes(&self) -> u64 {
        PRODUCTS[..4].iter().map(|product| self.shape(*product).1).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.layers as u64 * self.layer_bytes() + self.shape(Product::Head).1
    }
}
