//! Weights and shards.

use super::Case;
use crate::spoil::*;
use serde_json::json;
use std::fs;

pub(super) fn cases() -> Vec<Case> {
    let f32s = |name: &str, shape: &str, begin: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    vec![
        // Weights
        ("empty weights", file("model.safetensors", ""), "DIR/model.safetensors: it is empty"),
        (
            "weights of three bytes",
            file("model.safetensors", "abc"),
            "DIR/model.safetensors: it has 3 bytes and cannot be a safetensors file",
        ),
        (
            "header longer than the file",
            bytes(|b| b[..8].copy_from_slice(&1_000_000u64.to_le_bytes())),
            "DIR/model.safetensors: its header claims 1000000 bytes but only 380248 follow: the file is truncated",
        ),
        (
            "absurd header length",
            bytes(|b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())),
            "DIR/model.safetensors: its header claims 18446744073709551615 bytes, more than the format's limit 100000000",
        ),
        (
            "weights cut short",
            bytes(|b| b.truncate(b.len() - 1)),
            "DIR/model.safetensors: tensor 'model.norm.weight' ends at byte 378112 of 378111 bytes of data: the file is truncated",
        ),
        (
            "bytes left over",
            bytes(|b| b.push(0)),
            "DIR/model.safetensors: its tensors end at byte 378112 but 378113 bytes of data are stored",
        ),
        ("header not UTF-8", bytes(|b| b[9] = 0xff), "DIR/model.safetensors: its header is not UTF-8 text"),
        (
            "header not JSON",
            header("{]", 0),
            "DIR/model.safetensors: its header is not valid: key must be a string at line 1 column 2",
        ),
        (
            "header deeply nested",
            header("[".repeat(10_000), 0),
            "DIR/model.safetensors: its header is not valid: invalid type: sequence, expected an object with one entry a tensor at line 1 column 0",
        ),
        (
            "tensor twice",
            header(format!("{{{},{}}}", f32s("a", "[1]", 0, 4), f32s("a", "[1]", 0, 4)), 4),
            "DIR/model.safetensors: its header is not valid: tensor 'a' occurs twice at line 1 column 57",
        ),
        (
            "offsets past the end",
            header(format!("{{{}}}", f32s("a", "[2]", 0, 8)), 4),
            "DIR/model.safetensors: tensor 'a' ends at byte 8 of 4 bytes of data: the file is truncated",
        ),
        (
            "offsets the wrong way round",
            header(format!("{{{}}}", f32s("a", "[1]", 4, 0)), 4),
            "DIR/model.safetensors: tensor 'a' ends at byte 0, before it begins at byte 4",
        ),
        (
            "overlapping tensors",
            header(format!("{{{},{}}}", f32s("a", "[2]", 0, 8), f32s("b", "[2]", 4, 12)), 12),
            "DIR/model.safetensors: tensor 'b' overlaps the tensor before it: it begins at byte 4 and should begin at 8",
        ),
        (
            "hole between tensors",
            header(format!("{{{},{}}}", f32s("a", "[1]", 0, 4), f32s("b", "[1]", 8, 12)), 12),
            "DIR/model.safetensors: tensor 'b' leaves a hole before it: it begins at byte 8 and should begin at 4",
        ),
        (
            "shape and bytes disagree",
            header(format!("{{{}}}", f32s("a", "[3]", 0, 8)), 8),
            "DIR/model.safetensors: tensor 'a' is F32 of shape [3], 12 bytes, but 8 bytes are stored",
        ),
        (
            "shape that overflows",
            header(format!("{{{}}}", f32s("a", "[4294967296,4294967296,4]", 0, 8)), 8),
            "DIR/model.safetensors: tensor 'a' has the shape [4294967296, 4294967296, 4], which is absurd",
        ),
        (
            "negative extent",
            header(format!("{{{}}}", f32s("a", "[-1]", 0, 4)), 4),
            "DIR/model.safetensors: its header is not valid: tensor 'a': invalid value: integer `-1`, expected u64 at line 1 column 31",
        ),
        (
            "unknown dtype",
            header(r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}"#, 4),
            "DIR/model.safetensors: tensor 'a' has the unknown dtype 'Q4'",
        ),
        (
            "missing tensor",
            header(format!("{{{}}}", f32s("a", "[1]", 0, 4)), 4),
            "DIR/model.safetensors: tensor 'model.embed_tokens.weight' of shape [256, 64] is missing",
        ),
        (
            "tensor of another dtype",
            header(
                r#"{"model.embed_tokens.weight":{"dtype":"I8","shape":[256,64],"data_offsets":[0,16384]}}"#,
                16384,
            ),
            "DIR/model.safetensors: dtype I8 of tensor 'model.embed_tokens.weight' is not supported; store the weights as F32, F16 or BF16",
        ),
        (
            "tensor of another shape",
            config(json!({"hidden_size": 128, "head_dim": 16})),
            "DIR/model.safetensors: tensor 'model.embed_tokens.weight' has shape [256, 64]; the configuration asks for [256, 128]",
        ),
        // Shards
        (
            "shard missing",
            index("two.safetensors"),
            "DIR/two.safetensors is missing; model.safetensors.index.json names it; download the model again",
        ),
        (
            "shard above the directory",
            index("../one.safetensors"),
            "DIR/model.safetensors.index.json: shard '../one.safetensors' is not a plain file name",
        ),
        (
            "shard by absolute path",
            index("/etc/passwd"),
            "DIR/model.safetensors.index.json: shard '/etc/passwd' is not a plain file name",
        ),
        (
            "shard in a folder",
            index("sub/one.safetensors"),
            "DIR/model.safetensors.index.json: shard 'sub/one.safetensors' is not a plain file name",
        ),
        (
            "shard without a name",
            index(""),
            "DIR/model.safetensors.index.json: shard '' is not a plain file name",
        ),
        (
            "shard with a zero byte",
            index("a\0b"),
            r#"DIR/model.safetensors.index.json: shard 'a\0b' is not a plain file name"#,
        ),
        (
            "tensor not in its shard",
            all(vec![index("two.safetensors"), file("two.safetensors", safetensors("{}", 0))]),
            "DIR/model.safetensors.index.json: tensor 'model.norm.weight' is not in 'two.safetensors', where the index puts it",
        ),
        (
            "tensor in two shards",
            Box::new(|directory| {
                let one = directory.join("one.safetensors");
                fs::rename(directory.join("model.safetensors"), &one).unwrap();
                fs::copy(&one, directory.join("two.safetensors")).unwrap();
                let map = json!({"model.norm.weight": "one.safetensors", "model.embed_tokens.weight": "two.safetensors"});
                let index = json!({"weight_map": map}).to_string();
                fs::write(directory.join("model.safetensors.index.json"), index).unwrap();
                let keep = safetensors(
                    r#"{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                    4,
                );
                fs::write(&one, &keep).unwrap();
                fs::write(directory.join("two.safetensors"), keep).unwrap();
            }),
            "DIR/two.safetensors: tensor 'model.norm.weight' is also in another shard",
        ),
        (
            "index without a map",
            all(vec![remove("model.safetensors"), file("model.safetensors.index.json", "{}")]),
            "DIR/model.safetensors.index.json: 'weight_map' must be an object from tensor names to file names; it is missing",
        ),
        (
            "empty index",
            all(vec![
                remove("model.safetensors"),
                file("model.safetensors.index.json", r#"{"weight_map": {}}"#),
            ]),
            "DIR/model.safetensors.index.json: 'weight_map' is empty",
        ),
        (
            "index that maps to a number",
            all(vec![
                remove("model.safetensors"),
                file("model.safetensors.index.json", r#"{"weight_map": {"a": 7}}"#),
            ]),
            "DIR/model.safetensors.index.json: tensor 'a' is mapped to a number, not to a file name",
        ),
        #[cfg(unix)]
        (
            "shard that is a link out of the directory",
            all(vec![
                index("two.safetensors"),
                Box::new(|directory| {
                    let outside = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
                    std::os::unix::fs::symlink(outside, directory.join("two.safetensors")).unwrap();
                }),
            ]),
            "DIR/two.safetensors: it is a link that leaves the model's directory",
        ),
        #[cfg(unix)]
        (
            "a pipe as weights",
            all(vec![
                remove("model.safetensors"),
                Box::new(|directory| {
                    let made = std::process::Command::new("mkfifo")
                        .arg(directory.join("model.safetensors"))
                        .status();
                    assert!(made.unwrap().success());
                }),
            ]),
            "DIR/model.safetensors: it is not a regular file",
        ),
    ]
}
