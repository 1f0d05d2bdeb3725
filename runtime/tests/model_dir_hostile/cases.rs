//! The table: what is done to the fixture, and the message. DIR stands for the directory.

use crate::spoil::*;
use serde_json::json;
use std::fs;

pub(crate) fn cases() -> Vec<(&'static str, Spoil, &'static str)> {
    let f32s = |name: &str, shape: &str, begin: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    vec![
        // Files
        (
            "no config.json",
            remove("config.json"),
            "DIR/config.json is missing; a model directory holds config.json, model.safetensors and tokenizer.json",
        ),
        (
            "no weights",
            remove("model.safetensors"),
            "DIR/model.safetensors is missing; the weights are expected there or in shards named by model.safetensors.index.json",
        ),
        (
            "a directory as config.json",
            all(vec![remove("config.json"), Box::new(|d| fs::create_dir(d.join("config.json")).unwrap())]),
            "DIR/config.json: it is not a regular file",
        ),
        ("empty config.json", file("config.json", ""), "DIR/config.json: it is empty"),
        (
            "a list as config.json",
            file("config.json", "[]"),
            "DIR/config.json: it must hold a JSON object, not a list",
        ),
        (
            "config.json cut short",
            file("config.json", r#"{"architectures": ["Llama"#),
            "DIR/config.json: it is not valid JSON: EOF while parsing a string at line 1 column 25",
        ),
        (
            "config.json not UTF-8",
            file("config.json", b"{\"a\": \"\xff\"}"),
            "DIR/config.json: it is not UTF-8 text (byte 7)",
        ),
        (
            "config.json deeply nested",
            file("config.json", format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000))),
            "DIR/config.json: it is not valid JSON: recursion limit exceeded at line 1 column 128",
        ),
        // What is not supported
        (
            "unknown architecture",
            config(json!({"architectures": ["FooForCausalLM"]})),
            "DIR/config.json: architecture 'FooForCausalLM' is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM",
        ),
        (
            "unknown model type",
            all(vec![without("architectures"), config(json!({"model_type": "gpt9"}))]),
            "DIR/config.json: model_type 'gpt9' is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM and MistralForCausalLM",
        ),
        (
            "no architecture",
            all(vec![without("architectures"), without("model_type")]),
            "DIR/config.json: 'architectures' must be a list of one class name; it is missing",
        ),
        (
            "architecture of another type",
            config(json!({"model_type": "mistral"})),
            r#"DIR/config.json: 'model_type' must be "llama" for LlamaForCausalLM; found "mistral""#,
        ),
        (
            "architectures of the wrong type",
            config(json!({"architectures": "LlamaForCausalLM"})),
            r#"DIR/config.json: 'architectures' must be a list of strings; found "LlamaForCausalLM""#,
        ),
        (
            "quantized",
            config(json!({"quantization_config": {"bits": 4}})),
            "DIR/config.json: 'quantization_config' is not supported; use the unquantized model",
        ),
        (
            "other activation",
            config(json!({"hidden_act": "gelu"})),
            r#"DIR/config.json: 'hidden_act' = "gelu" is not supported; the activation has to be "silu""#,
        ),
        (
            "partial rotary embedding",
            config(json!({"partial_rotary_factor": 0.5})),
            "DIR/config.json: 'partial_rotary_factor' = 0.5 is not supported; only rotary embeddings of the whole head are",
        ),
        (
            "experts",
            config(json!({"num_local_experts": 8})),
            "DIR/config.json: 'num_local_experts' = 8 is not supported; only models without experts are",
        ),
        (
            "logit scale",
            config(json!({"logit_scale": 0.0625})),
            "DIR/config.json: 'logit_scale' = 0.0625 is not supported; logits have to be used as they are",
        ),
        (
            "sliding window in a Llama",
            config(json!({"sliding_window": 1024})),
            "DIR/config.json: 'sliding_window' = 1024 is not supported; LlamaForCausalLM attends to all positions",
        ),
        (
            "layer types in a Llama",
            config(json!({"layer_types": ["full_attention", "sliding_attention"]})),
            "DIR/config.json: 'layer_types' is not supported; all layers of this architecture have to be alike",
        ),
        (
            "unknown layer type",
            config(json!({"layer_types": ["full_attention", "linear_attention"]})),
            "DIR/config.json: layer type 'linear_attention' is not supported; supported are full_attention and sliding_attention",
        ),
        (
            "layer types of the wrong length",
            config(json!({"layer_types": ["full_attention"]})),
            "DIR/config.json: 'layer_types' must be a list of 'num_hidden_layers' = 2 entries; found a list of 1",
        ),
        // Rotary embedding
        (
            "unknown rope type",
            config(json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})),
            r#"DIR/config.json: 'rope_parameters.rope_type' = "yarn" is not supported; supported are default, linear and llama3"#,
        ),
        (
            "unknown rope type, old spelling",
            config(json!({"rope_parameters": null, "rope_scaling": {"type": "dynamic", "factor": 2.0}})),
            r#"DIR/config.json: 'rope_scaling.type' = "dynamic" is not supported; supported are default, linear and llama3"#,
        ),
        (
            "rope without type",
            config(json!({"rope_parameters": {"factor": 2.0}})),
            r#"DIR/config.json: 'rope_parameters.rope_type' must be "default", "linear" or "llama3"; it is missing"#,
        ),
        (
            "linear rope without factor",
            config(json!({"rope_parameters": {"rope_type": "linear"}})),
            "DIR/config.json: 'rope_parameters.factor' must be a number above 0; it is missing",
        ),
        (
            "negative rope factor",
            config(json!({"rope_parameters": {"rope_type": "linear", "factor": -2.0}})),
            "DIR/config.json: 'rope_parameters.factor' must be a number above 0; found -2.0",
        ),
        (
            "rope frequencies the wrong way round",
            config(
                json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32}}),
            ),
            "DIR/config.json: 'rope_parameters.high_freq_factor' must be above 'rope_parameters.low_freq_factor' = 4; found 1.0",
        ),
        (
            "rope with a stranger",
            config(json!({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}})),
            "DIR/config.json: 'rope_parameters.mrope_section' is not supported; rope type default has no such parameter",
        ),
        (
            "rope for each layer type",
            config(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
            "DIR/config.json: 'rope_parameters.full_attention' is not supported; all layers have to share one rotary embedding",
        ),
        (
            "two ropes that differ",
            config(json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})),
            "DIR/config.json: 'rope_parameters' and 'rope_scaling' are both given and do not agree",
        ),
        (
            "two thetas that differ",
            config(json!({"rope_theta": 500000.0})),
            "DIR/config.json: 'rope_parameters.rope_theta' must be equal to 'rope_theta' = 500000; found 10000.0",
        ),
        (
            "zero theta",
            config(json!({"rope_parameters": null, "rope_theta": 0})),
            "DIR/config.json: 'rope_theta' must be a number above 0; found 0",
        ),
        // Sizes
        (
            "missing size",
            without("hidden_size"),
            "DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; it is missing",
        ),
        (
            "zero size",
            config(json!({"vocab_size": 0})),
            "DIR/config.json: 'vocab_size' must be a whole number from 1 to 16777216; found 0",
        ),
        (
            "negative size",
            config(json!({"intermediate_size": -96})),
            "DIR/config.json: 'intermediate_size' must be a whole number from 1 to 1048576; found -96",
        ),
        (
            "fractional size",
            config(json!({"hidden_size": 64.5})),
            "DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; found 64.5",
        ),
        (
            "size as text",
            config(json!({"hidden_size": "64"})),
            r#"DIR/config.json: 'hidden_size' must be a whole number from 1 to 1048576; found "64""#,
        ),
        (
            "absurd number of layers",
            config(json!({"num_hidden_layers": 1_000_000_000_000_000_000u64})),
            "DIR/config.json: 'num_hidden_layers' must be a whole number from 1 to 1024; found 1000000000000000000",
        ),
        (
            "absurd vocabulary",
            config(json!({"vocab_size": 1_099_511_627_776u64})),
            "DIR/config.json: 'vocab_size' must be a whole number from 1 to 16777216; found 1099511627776",
        ),
        (
            "absurd number of positions",
            config(json!({"max_position_embeddings": 1_000_000_000_000u64})),
            "DIR/config.json: 'max_position_embeddings' must be a whole number from 1 to 67108864; found 1000000000000",
        ),
        (
            "heads that do not divide",
            config(json!({"num_key_value_heads": 3})),
            "DIR/config.json: 'num_key_value_heads' must be a divisor of 'num_attention_heads' = 4; found 3",
        ),
        (
            "more key heads than query heads",
            config(json!({"num_key_value_heads": 8})),
            "DIR/config.json: 'num_key_value_heads' must be a divisor of 'num_attention_heads' = 4; found 8",
        ),
        (
            "odd head",
            config(json!({"head_dim": 15})),
            "DIR/config.json: 'head_dim' must be an even number up to 256; found 15",
        ),
        (
            "large head",
            config(json!({"head_dim": 512})),
            "DIR/config.json: 'head_dim' must be an even number up to 256; found 512",
        ),
        (
            "implied head that does not divide",
            all(vec![without("head_dim"), config(json!({"hidden_size": 66}))]),
            "DIR/config.json: 'hidden_size' must be a multiple of 'num_attention_heads' = 4 where 'head_dim' is not given; found 66",
        ),
        (
            "implied head that is odd",
            all(vec![without("head_dim"), config(json!({"hidden_size": 60}))]),
            "DIR/config.json: 'hidden_size' must be such that 'hidden_size' / 'num_attention_heads' = 15, the dimension of a head, is an even number up to 256; found 60",
        ),
        (
            "zero epsilon",
            config(json!({"rms_norm_eps": 0.0})),
            "DIR/config.json: 'rms_norm_eps' must be a number above 0 and below 1; found 0.0",
        ),
        (
            "boolean as text",
            config(json!({"tie_word_embeddings": "no"})),
            r#"DIR/config.json: 'tie_word_embeddings' must be true or false; found "no""#,
        ),
        (
            "end token outside of the vocabulary",
            config(json!({"eos_token_id": [2, 256]})),
            "DIR/config.json: 'eos_token_id' must be a token id below the vocabulary's size 256, or a list of them; found a list of 2",
        ),
        (
            "negative end token",
            fields_of("generation_config.json", json!({"eos_token_id": -1})),
            "DIR/generation_config.json: 'eos_token_id' must be a token id below the vocabulary's size 256, or a list of them; found -1",
        ),
        (
            "negative temperature",
            fields_of("generation_config.json", json!({"temperature": -0.5})),
            "DIR/generation_config.json: 'temperature' must be a number from 0 to 100; found -0.5",
        ),
        (
            "top_p as text",
            fields_of("generation_config.json", json!({"top_p": "0.9"})),
            r#"DIR/generation_config.json: 'top_p' must be a number above 0 and at most 1; found "0.9""#,
        ),
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
        // Tokenizer and template
        ("empty tokenizer", file("tokenizer.json", ""), "DIR/tokenizer.json: it is empty"),
        (
            "tokenizer not JSON",
            file("tokenizer.json", "tokens"),
            "DIR/tokenizer.json: it is not a tokenizer: expected ident at line 1 column 2",
        ),
        (
            "tokenizer without a model",
            tokenizer(json!({"version": "1.0"})),
            "DIR/tokenizer.json: it is not a tokenizer: Model missing. at line 1 column 17",
        ),
        (
            "tokenizer of unknown type",
            tokenizer(json!({"version": "1.0", "model": {"type": "Magic", "vocab": {}}})),
            "DIR/tokenizer.json: it is not a tokenizer: data did not match any variant of untagged enum ModelUntagged at line 1 column 53",
        ),
        (
            "merge of unknown tokens",
            tokenizer(
                json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
            ),
            "DIR/tokenizer.json: it is not a tokenizer: Token `b` out of vocabulary at line 1 column 77",
        ),
        (
            "vocabulary of the wrong type",
            tokenizer(json!({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}})),
            "DIR/tokenizer.json: it is not a tokenizer: invalid value: integer `-1`, expected u32 at line 1 column 69",
        ),
        (
            "pattern that does not end",
            tokenizer(
                json!({"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
            ),
            "DIR/tokenizer.json: it is not a tokenizer: Parsing error at position 2: Opening parenthesis without closing parenthesis at line 1 column 111",
        ),
        (
            "tokenizer deeply nested",
            file("tokenizer.json", format!("{{\"version\": {}", "[".repeat(100_000))),
            "DIR/tokenizer.json: it is not a tokenizer: invalid type: sequence, expected a string at line 1 column 12",
        ),
        (
            "tokenizer config not an object",
            file("tokenizer_config.json", "3"),
            "DIR/tokenizer_config.json: it must hold a JSON object, not a number",
        ),
        (
            "template of the wrong type",
            file("tokenizer_config.json", r#"{"chat_template": 3}"#),
            "DIR/tokenizer_config.json: 'chat_template' must be a template or a list of {name, template}; found 3",
        ),
        (
            "no default template",
            file("tokenizer_config.json", r#"{"chat_template": [{"name": "tools", "template": ""}]}"#),
            "DIR/tokenizer_config.json: 'chat_template' must be a template or a list that has one named 'default'; found a list of 1",
        ),
        (
            "template that does not end",
            file("chat_template.jinja", "{% for m in messages %}"),
            "DIR/chat_template.jinja: its chat template is not valid: syntax error: unexpected end of input, expected end of block (line 1)",
        ),
        (
            "template nested too deeply",
            file("chat_template.jinja", format!("{{{{ {}1 }}}}", "(".repeat(100_000))),
            "DIR/chat_template.jinja: its chat template is not valid: syntax error: template exceeds maximum recursion limits (line 1)",
        ),
        (
            "special token of the wrong type",
            file("tokenizer_config.json", r#"{"bos_token": ["<s>"]}"#),
            "DIR/tokenizer_config.json: 'bos_token' must be a string or an object with a string 'content'; found a list of 1",
        ),
    ]
}
