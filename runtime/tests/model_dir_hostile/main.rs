//! Model directories that are damaged, absurd or hostile. Each gives one clear sentence that names the file and
//! what is wrong with it, and none makes the reader allocate more than its files are worth.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use pagewise_attention::DType;
use pagewise_runtime::{
    backend::{AttentionSpec, cpu::CpuBackend},
    model_dir::{ModelDir, Weights},
    models::{WeightSource, load_model},
    text::{ChatTemplate, Tokenizer},
};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
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

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Everything that is read from a directory.
fn read(directory: &Path) -> Result<(), String> {
    let model = ModelDir::open(directory).map_err(|error| error.to_string())?;
    let weights = Weights::open(directory).map_err(|error| error.to_string())?;
    let weights = WeightSource::Files { weights, dtype: None };
    let backend = CpuBackend::new(Some(1)).map_err(|error| error.to_string())?;
    load_model(&model.config, &weights, &backend).map_err(|error| error.to_string())?;
    Tokenizer::open(directory).map_err(|error| error.to_string())?;
    ChatTemplate::open(directory).map_err(|error| error.to_string())?;
    Ok(())
}

/// Held by the test that watches allocations or makes some.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn each_hostile_directory_gives_its_message() {
    let _alone = ALONE.lock();
    let mut wrong = Vec::new();
    let cases = cases::cases();
    assert!(cases.len() >= 30);
    for (fixture_name, (name, spoil, expected)) in cases {
        let fixture = fixture(fixture_name);
        assert_eq!(read(&fixture), Ok(()), "the fixture {fixture_name} itself");
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
            wrong.push(format!("{fixture_name}: {name}\n   found: {found}\nexpected: {expected}"));
        }
        if largest > MOST_BYTES {
            wrong.push(format!("{fixture_name}: {name}: one allocation of {largest} bytes"));
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

const TOKENIZER: &str = r#"{"version":"1.0","truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst",
"stride":1},"padding":null,"added_tokens":[{"id":5,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,
"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Precompiled",
"precompiled_charsmap":"ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyI="}]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":
"(?i:'s)|\\p{L}+"},"behavior":"Isolated","invert":false},"post_processor":{"type":"TemplateProcessing","single":[
{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"<s>":{
"id":"<s>","ids":[5],"tokens":["<s>"]}}},"decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":
"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"BPE","dropout":null,"unk_token":"u","byte_fallback":true,
"fuse_unk":true,"vocab":{"a":0,"b":1,"ab":2,"u":3,"<0x41>":4},"merges":["a b"]}}"#;

/// A few bytes of each file changed, dropped or doubled, or a number made extreme: whatever comes of it, reading it
/// returns. A case prints as one line: the file's name and the seed.
#[test]
fn random_damage_never_panics() {
    let _alone = ALONE.lock();
    let template = r#"{"bos_token":{"content":"<s>"},"chat_template":"{% for m in messages %}{{ m.role }}{% endfor %}"}"#;
    let config = fs::read(fixture("llama_gqa").join("config.json")).unwrap();
    let generation = fs::read(fixture("llama_gqa").join("generation_config.json")).unwrap();
    let weights = spoil::safetensors(
        r#"{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]},"x":{"dtype":"F16","shape":[2,3],"data_offsets":[256,268]}}"#,
        268,
    );
    let index =
        br#"{"metadata":{"total_size":268},"weight_map":{"model.norm.weight":"model-1.safetensors"}}"#;
    let files: [(&str, &[u8]); 6] = [
        ("config.json", &config),
        ("generation_config.json", &generation),
        ("model-1.safetensors", &weights),
        ("model.safetensors.index.json", index),
        ("tokenizer.json", TOKENIZER.as_bytes()),
        ("tokenizer_config.json", template.as_bytes()),
    ];
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, contents: &[u8]| fs::write(directory.path().join(name), contents).unwrap();
    files.iter().for_each(|(name, contents)| write(name, contents));
    for (name, contents) in files {
        for seed in 0..100 {
            let mut damaged = contents.to_vec();
            damage(&mut damaged, seed);
            write(name, &damaged);
            let read = || {
                let directory = directory.path();
                // Each by itself, so that the damage to one does not hide another.
                let _ = ModelDir::open(directory);
                if let Ok(weights) = Weights::open(directory) {
                    let _ = weights.tensor("model.norm.weight", &[64]).map(|tensor| tensor.host().len());
                }
                if let Ok(Some(tokenizer)) = Tokenizer::open(directory)
                    && let Ok(ids) = tokenizer.encode("ab<s> Ab\u{e9}", true)
                {
                    let _ = tokenizer.decode(&ids, false);
                }
                if let Ok(Some(template)) = ChatTemplate::open(directory) {
                    let _ = template.render(&[], true);
                }
            };
            LARGEST.store(0, Ordering::Relaxed);
            assert!(std::panic::catch_unwind(read).is_ok(), "{name}, seed {seed}");
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest <= MOST_BYTES, "{name}, seed {seed}: one allocation of {largest} bytes");
        }
        write(name, contents);
    }
}

/// The same for the other families' configurations.
#[test]
fn random_damage_to_other_configurations_never_panics() {
    let _alone = ALONE.lock();
    let directory = tempfile::tempdir().unwrap();
    for name in ["phi3", "gemma2", "gpt2", "opt_postln_proj", "qwen3", "mistral_swa"] {
        let config = fs::read(fixture(name).join("config.json")).unwrap();
        for seed in 0..200 {
            let mut damaged = config.clone();
            damage(&mut damaged, seed);
            fs::write(directory.path().join("config.json"), &damaged).unwrap();
            LARGEST.store(0, Ordering::Relaxed);
            let open = || {
                ModelDir::open(directory.path()).map(|dir| AttentionSpec::new(&dir.config, DType::F32, 16, 1))
            };
            assert!(std::panic::catch_unwind(open).is_ok(), "{name}, seed {seed}");
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest <= MOST_BYTES, "{name}, seed {seed}: one allocation of {largest} bytes");
        }
    }
}

/// Changes that a seed stands for (numbers from splitmix64, Steele et al. 2014).
fn damage(bytes: &mut Vec<u8>, seed: u64) {
    let mut state = seed;
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below.max(1) as u64) as usize
    };
    for _ in 0..=random(3) {
        let at = random(bytes.len());
        match random(5) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, b"0-[{\",\xff"[random(7)]),
            2 if !bytes.is_empty() => bytes[at] = random(256) as u8,
            3 if !bytes.is_empty() => drop(bytes.remove(at)),
            _ => {
                // The digits after a place become a number that nothing has room for.
                let Some(begin) = (at..bytes.len()).find(|i| bytes[*i].is_ascii_digit()) else { continue };
                let end = (begin..bytes.len()).find(|i| !bytes[*i].is_ascii_digit()).unwrap_or(bytes.len());
                let number =
                    ["-1", "0", "4294967295", "4294967296", "18446744073709551615", "1e999"][random(6)];
                bytes.splice(begin..end, number.bytes());
            }
        }
    }
}
