//! Model directories that are damaged, absurd or hostile. Each gives one clear sentence that names the file and
//! what is wrong with it, and none makes the reader allocate more than its files are worth.

use pagewise_runtime::{
    model_dir::{ModelDir, Weights},
    text::{ChatTemplate, Tokenizer},
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

mod cases;
mod spoil;

/// The largest single allocation since it was last set to 0.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Watching;

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as our caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as our caller has promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// The fixture's weights take 380 kB; nothing in a case is larger.
const MOST_BYTES: usize = 2 << 20;

/// Everything that is read from a directory before a model is built.
fn read(directory: &Path) -> Result<(), String> {
    let model = ModelDir::open(directory).map_err(|error| error.to_string())?;
    let c = &model.config;
    let weights = Weights::open(directory).map_err(|error| error.to_string())?;
    let (queries, keys) = (c.q_heads * c.head_dim, c.kv_heads * c.head_dim);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![c.vocab_size, c.hidden_size]),
        ("model.norm.weight".to_owned(), vec![c.hidden_size]),
    ];
    for layer in 0..c.num_layers() {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        tensors.push((name("input_layernorm"), vec![c.hidden_size]));
        tensors.push((name("self_attn.q_proj"), vec![queries, c.hidden_size]));
        tensors.push((name("self_attn.k_proj"), vec![keys, c.hidden_size]));
        tensors.push((name("mlp.down_proj"), vec![c.hidden_size, c.intermediate_size]));
    }
    for (name, shape) in tensors {
        weights.tensor(&name, &shape).map_err(|error| error.to_string())?;
    }
    Tokenizer::open(directory).map_err(|error| error.to_string())?;
    ChatTemplate::open(directory).map_err(|error| error.to_string())?;
    Ok(())
}

#[test]
fn each_hostile_directory_gives_its_message() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama_gqa");
    assert_eq!(read(&fixture), Ok(()), "the fixture itself");
    let mut wrong = Vec::new();
    let cases = cases::cases();
    assert!(cases.len() >= 30);
    for (name, spoil, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            fs::copy(fixture.join(file), directory.path().join(file)).unwrap();
        }
        spoil(directory.path());
        LARGEST.store(0, Ordering::Relaxed);
        let found = read(directory.path()).err().unwrap_or_else(|| "no error".to_owned());
        let largest = LARGEST.load(Ordering::Relaxed);
        let found = found.replace(directory.path().to_str().unwrap(), "DIR");
        if found != expected {
            wrong.push(format!("{name}\n   found: {found}\nexpected: {expected}"));
        }
        if largest > MOST_BYTES {
            wrong.push(format!("{name}: one allocation of {largest} bytes"));
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}
