"""Paged decode by cuDNN through its Python frontend, at large shapes of `h100_decode.tsv`, to be run beside `cuda_attention`.

    pip install torch nvidia-cudnn-frontend==1.32.0
    python3 benches/peers/cudnn_paged.py
"""
import math
import statistics

import cudnn
import torch

print("cudnn", cudnn.backend_version())

def run(batch, keys, q_heads, kv_heads, layout, dim=128, page=16):
    blocks = batch * keys // page
    shape = (blocks, kv_heads, page, dim) if layout == "HND" else (blocks, page, kv_heads, dim)
    k, v = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    if layout == "NHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, 1, keys // page, 1)
    q = torch.randn(batch, q_heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    q_lens = torch.ones(batch, 1, 1, 1, dtype=torch.int32, device="cuda")
    kv_lens = torch.full((batch, 1, 1, 1), keys, dtype=torch.int32, device="cuda")

    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.BFLOAT16, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT
    )
    inputs = [q, k, v, table, q_lens, kv_lens]
    names = [graph.tensor_like(tensor) for tensor in inputs]
    result, _ = graph.sdpa(
        name="sdpa",
        q=names[0],
        k=names[1],
        v=names[2],
        is_inference=True,
        attn_scale=1 / math.sqrt(dim),
        use_causal_mask=False,
        use_padding_mask=True,
        seq_len_q=names[4],
        seq_len_kv=names[5],
        paged_attention_k_table=names[3],
        paged_attention_v_table=names[3],
        paged_attention_max_seq_len_kv=keys,
    )
    result.set_output(True).set_dim(out.size()).set_stride(out.stride()).set_data_type(types.BFLOAT16)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
    pack = dict(zip([*names, result], [*inputs, out]))

    graph.execute(pack, workspace)
    torch.cuda.synchronize()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.execute(pack, workspace)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 4 * 1e3)
    us = statistics.median(times)
    rate = 2 * batch * keys * kv_heads * dim * 2 / us / 1e3
    print(f"{q_heads}/{kv_heads} {batch}x{keys} {layout}: {us:.1f} us {rate:.0f} GB/s", flush=True)


print("cuDNN", cudnn.backend_version())
SHAPES = [(64, 4096, 32, 8), (64, 4096, 32, 32), (256, 2048, 32, 8), (64, 4096, 64, 8), (8, 8192, 32, 32)]
for numbers in SHAPES:
    for order in ("HND", "NHD"):
        run(*numbers, layout=order)
