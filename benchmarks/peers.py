"""One training, by one plain process, by transformers' own DistributedConfig, and by this script.

    python benchmarks/peers.py                    # dp 2 x tp 2 on 4 CPU ranks, 8 minutes

The same tiny Llama, weights, data and global batch for all. Each round starts every peer once, in
turn, so that what else the machine does hits all of them; the table has medians over the rounds.
CPU-ms is the processor time of all ranks in a step, which a busy machine changes less than wall
time. Writes peers.json and peers.md.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, caption, environment, markdown, torchrun

PEERS = {  # name: ranks
    "one plain process": 1,
    "transformers": 4,
    "train_llm.py": 4,
    "train_llm.py --compile": 4,
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


def peer(name: str, folder: Path):
    """A function that trains a step on a global batch, the model, its optimizer, dp rank and dp."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import train_llm as script

    if name.startswith("train_llm.py"):
        mesh = script.build_mesh("cpu", 2)
        compiled = "--compile" in name
        model = script.build_model(config(), mesh, torch.float32, SEED, folder, compile=compiled)
        optimizer = script.build_optimizer(model, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = LR
        rank, dp = mesh["dp"].get_local_rank(), mesh["dp"].size()
        return (
            lambda ids: script.train_step(model, optimizer, [ids], 1.0),
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


def work(name: str, folder: Path, steps: int) -> None:
    """What each rank does: train, and let rank 0 write what was measured to `folder`."""
    import torch
    import torch.distributed as dist

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
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = [cpu_ms, sum(t.nbytes for t in states) + most, rss, [float(local(x)) for x in losses]]
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        cpu, peak, rss, losses = zip(*ranks, strict=True)
        result = {
            "cpu_ms_per_step": sum(cpu), "tokens_per_s": GLOBAL_BATCH * SEQ_LENGTH / step_s,
            "peak_tensor_mib": max(peak) / 2**20, "peak_rss_mib": max(rss) / 2**20,
            "first_step_s": first_step_s,
            "losses": [sum(x) / len(x) for x in zip(*losses, strict=True)],
        }  # fmt: skip
        result["shares"] = shares(profile)
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


HEAD = [
    "", "CPU-ms per step", "of transformers'", "tokens/s", "peak MiB of tensors per rank",
    "of transformers'", "peak MiB of the process", "first step, s", "loss after 10 steps",
]  # fmt: skip


def summary(result: dict) -> list[list]:
    """A table row per peer, of medians."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in result["rounds"] if run["peer"] == name)

    rows = []
    for name in dict.fromkeys(run["peer"] for run in result["rounds"]):
        keys = ("cpu_ms_per_step", "tokens_per_s", "peak_tensor_mib", "peak_rss_mib")
        cpu, rate, peak, rss = (median(name, key) for key in keys)
        losses = next(run["losses"] for run in result["rounds"] if run["peer"] == name)
        base = "transformers"
        rows.append([
            name, f"{cpu:,.0f}", f"{cpu / median(base, keys[0]):.2f}", f"{rate:,.0f}",
            f"{peak:.1f}", f"{peak / median(base, keys[2]):.2f}", f"{rss:,.0f}",
            f"{median(name, 'first_step_s'):.1f}", f"{losses[9]:.6f}",
        ])  # fmt: skip
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
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work[0], Path(args.work[1]), args.steps)
    import torch
    from transformers import AutoModelForCausalLM

    result = {"environment": environment(), "rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
        for i in range(args.rounds):
            for name in args.peers:
                torchrun(PEERS[name], __file__, "--work", name, folder, "--steps", args.steps)
                run = json.loads(Path(folder, "result.json").read_text())
                result["rounds"].append({"round": i, "peer": name} | run)
                print(i, name, f"{run['cpu_ms_per_step']:.0f} CPU-ms", flush=True)
    (args.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = [markdown(HEAD, summary(result)), where(result), caption(result["environment"])]
    text = "\n\n".join(parts) + "\n"
    (args.out / "peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
