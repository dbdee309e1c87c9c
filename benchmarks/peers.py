"""One training, by one plain process, by transformers' own DistributedConfig, and by this script.

    python benchmarks/peers.py                    # dp 2 x tp 2 on 4 CPU ranks, 20 minutes

The same tiny Llama, weights, data and global batch for all. Each round starts every peer once, in
turn, so that what else the machine does hits all of them; the table has medians over the rounds.
CPU-ms is the processor time of all ranks in a step, which a busy machine changes less than wall
time. Two more columns and rows say where it goes: rank 0 alone in a fake process group, where
communication costs nothing, and this script with TP's reduce-scatter as an all-to-all and a sum,
since gloo's is an all-reduce of which each rank drops the most. Writes peers.json and peers.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, caption, compact_json, environment, markdown, torchrun

PEERS = {  # name: ranks
    "one plain process": 1,
    "transformers": 4,
    "train_llm.py": 4,
    "train_llm.py --compile": 4,
    "train_llm.py, all-to-all": 4,
    "train_llm.py --compile, all-to-all": 4,
}
SEQ_LENGTH, GLOBAL_BATCH, LR, SEED = 256, 8, 1e-3, 0
WARM_UP = 3


def config():
    """The tiny Llama: 3.4 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=384, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        pad_token_id=None,
    )  # fmt: skip


def plain_step(model, optimizer, ids, clip) -> tuple:
    """Loss and gradient norm of a step of a loop of one's own around a transformers model."""
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = clip(model)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


def scatter_by_all_to_all(tensor, reduce_op, scatter_dim, group, tag=""):
    """What torch's functional reduce-scatter returns (of a sum), with fewer bytes than gloo's."""
    import torch
    import torch.distributed._functional_collectives as functional

    ranks = group[0].size(group[1])
    parts = torch.cat(tensor.chunk(ranks, scatter_dim))
    parts = functional.all_to_all_single(parts, None, None, group)
    return torch.stack(parts.chunk(ranks)).sum(0)


def peer(name: str, folder: Path):
    """A function that trains a step on a global batch, the model, its optimizer, dp rank and dp."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import train_llm as script
    from test_parity import build_model

    if "all-to-all" in name:
        torch.distributed._functional_collectives.reduce_scatter_single = scatter_by_all_to_all
    if name.startswith("train_llm.py"):
        mesh = script.build_mesh("cpu", 2)
        compiled = "--compile" in name
        model = build_model(config(), mesh, torch.float32, SEED, folder, compile=compiled)
        optimizer = script.build_optimizer(model, LR, 0.0)
        rank, dp = mesh["dp"].get_local_rank(), mesh["dp"].size()
        return (
            lambda ids: script.train_step(model, optimizer, [(ids, ids)], 1.0, mesh["dp"]),
            model,
            optimizer,
            rank,
            dp,
        )
    options, rank, dp = {}, 0, 1
    clip = lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
    if name == "transformers":
        from transformers import Trainer
        from transformers.distributed import DistributedConfig

        options = {"distributed_config": DistributedConfig(tp_size=2, fsdp_size=2)}
        rank, dp = dist.get_rank() // 2, 2
        # Its norms are on another mesh than its matrices, which torch cannot clip together.
        clip = lambda model: Trainer._mixed_mesh_grad_norm(None, model, 1.0)  # noqa: E731
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()
    groups = {}
    for p in model.parameters():
        groups.setdefault(getattr(p, "device_mesh", None), []).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": params} for params in groups.values()], lr=LR, betas=(0.9, 0.95),
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    return lambda ids: plain_step(model, optimizer, ids, clip), model, optimizer, rank, dp


def shares(profile) -> dict:
    """Where a step's time on the main thread goes, in shares of the whole."""
    kinds = {
        "waiting for TP": ("wait_tensor",), "FSDP, mostly waiting": ("FSDP::",),
        "matrix products, attention": ("aten::mm", "aten::addmm", "aten::bmm", "dot_product"),
        "DTensor": ("PythonSubclass", "Redistribute", "TorchTensor", "_wrap_tensor_autograd"),
        "compiled code": ("CompiledFxGraph", "CompiledFunction", "Torch-Compiled"),
    }  # fmt: skip
    found = dict.fromkeys([*kinds, "other"], 0.0)
    for event in profile.key_averages():
        parts = (kind for kind, words in kinds.items() if any(word in event.key for word in words))
        found[next(parts, "other")] += event.self_cpu_time_total
    return {kind: time / sum(found.values()) for kind, time in found.items()}


def work(name: str, folder: Path, steps: int, alone: bool) -> None:
    """What each rank does: train, and let rank 0 write what was measured to `folder`.

    If `alone`, this is rank 0 of a group in which the other ranks do not exist.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if alone:
        os.environ["WORLD_SIZE"] = str(PEERS[name])  # DistributedConfig reads it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PEERS[name])
    else:
        dist.init_process_group("gloo")
    step, model, optimizer, rank, dp = peer(name, folder)
    data = torch.Generator().manual_seed(SEED)
    shape = (WARM_UP + steps + 1, GLOBAL_BATCH, SEQ_LENGTH)
    batches = torch.randint(0, 384, shape, generator=data)[:, rank::dp]
    losses, norms, first_step_s = [], [], None
    for i, ids in enumerate(batches[:-1]):
        if i == WARM_UP:
            dist.barrier()
            begin, cpu = time.perf_counter(), time.process_time()
        start = time.perf_counter()
        loss, norm = step(ids)
        first_step_s = first_step_s or time.perf_counter() - start
        losses.append(loss)
        norms.append(norm)
    cpu_ms = (time.process_time() - cpu) / steps * 1000
    step_s = (time.perf_counter() - begin) / steps
    if alone:
        result = {"cpu_ms_per_step": cpu_ms * PEERS[name]}
        Path(folder, "result.json").write_text(json.dumps(result))
        os._exit(0)
    with torch.profiler.profile(profile_memory=True) as profile:
        step(batches[-1])
    events = profile.profiler.kineto_results.events()  # the public ones lack the order
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)

    def local(t):
        return t.to_local() if hasattr(t, "to_local") else t

    states = [local(p) for p in model.parameters()]
    for state in optimizer.state.values():
        states += [local(state["exp_avg"]), local(state["exp_avg_sq"])]
    mine = [cpu_ms, sum(t.nbytes for t in states) + most, [float(local(x)) for x in losses]]
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        cpu, peak, losses = zip(*ranks, strict=True)
        result = {
            "cpu_ms_per_step": sum(cpu), "tokens_per_s": GLOBAL_BATCH * SEQ_LENGTH / step_s,
            "peak_tensor_mib": max(peak) / 2**20, "first_step_s": first_step_s,
            "losses": [sum(x) / len(x) for x in zip(*losses, strict=True)],
        }  # fmt: skip
        result["shares"] = shares(profile)
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


HEAD = [
    "", "CPU-ms per step", "of transformers'", "without communication", "of transformers'",
    "peak MiB of tensors per rank", "of transformers'", "tokens/s", "first step, s",
    "loss after 10 steps",
]  # fmt: skip


def summary(result: dict) -> list[list]:
    """A table row per peer, of medians."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in result["rounds"] if run["peer"] == name)

    rows = []
    for name in dict.fromkeys(run["peer"] for run in result["rounds"]):
        losses = next(run["losses"] for run in result["rounds"] if run["peer"] == name)
        row = [name]
        for key, digits in {"cpu_ms_per_step": 0, "cpu_ms_alone": 0, "peak_tensor_mib": 1}.items():
            value = median(name, key)
            row += [f"{value:,.{digits}f}", f"{value / median('transformers', key):.2f}"]
        rate, first = median(name, "tokens_per_s"), median(name, "first_step_s")
        rows.append([*row, f"{rate:,.0f}", f"{first:.1f}", f"{losses[9]:.6f}"])
    return rows


def where(result: dict) -> str:
    """The shares of each peer's time, as a table."""
    runs = {run["peer"]: run["shares"] for run in result["rounds"]}
    kinds = list(next(iter(runs.values())))
    rows = [[name, *(f"{share[kind]:.0%}" for kind in kinds)] for name, share in runs.items()]
    return markdown(["time of rank 0's main thread", *kinds], rows)


def main(argv: list[str] | None = None) -> None:
    """Run all peers in turn, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="measured steps of a start")
    add("--peers", nargs="+", default=list(PEERS))
    add("--out", type=Path, default=ROOT / "docs")
    add("--work", nargs=2, metavar=("PEER", "FOLDER"), help="be a rank of a peer")
    add("--alone", action="store_true", help="be its rank 0 in a fake process group")
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work[0], Path(args.work[1]), args.steps, args.alone)
    import torch
    from transformers import AutoModelForCausalLM

    result = {"environment": environment(), "rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
        for i in range(args.rounds):
            for name in args.peers:
                command = [__file__, "--work", name, folder, "--steps", args.steps]
                torchrun(PEERS[name], *command)
                run = json.loads(Path(folder, "result.json").read_text())
                torchrun(1, *command, "--alone")
                alone = json.loads(Path(folder, "result.json").read_text())["cpu_ms_per_step"]
                result["rounds"].append({"round": i, "peer": name, "cpu_ms_alone": alone} | run)
                cpu = run["cpu_ms_per_step"]
                print(i, name, f"{cpu:.0f} CPU-ms, {alone:.0f} without communication", flush=True)
    (args.out / "peers.json").write_text(compact_json(result) + "\n")
    parts = [markdown(HEAD, summary(result)), where(result), caption(result["environment"])]
    text = "\n\n".join(parts) + "\n"
    (args.out / "peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
