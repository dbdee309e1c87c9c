"""One training, by one plain process, by transformers' own DistributedConfig, and by this script.

    python benchmarks/peers.py                    # dp 2 x tp 2 on 4 CPU ranks, 20 minutes

The same tiny Llama, weights, data and global batch for all. Each round starts every peer once, in
turn, so that what else the machine does hits all of them; the table has medians over the rounds,
and the least and the largest ratio of a round. CPU-ms is the processor time of all ranks in a step,
which a busy machine changes less than wall time. More columns and rows say where it goes: rank 0 of
all peers in one process with a fake process group, where communication costs nothing and each takes
a step in turn, and this script with TP's reduce-scatter as an all-to-all and a sum, since gloo's is
an all-reduce of which each rank drops the most. Writes peers.json and peers.md.
"""

import argparse
import json
import os
import random
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
ALL_TO_ALL = ", all-to-all"  # it would change nothing without communication


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
    """A function that trains a step on this rank's part of a global batch, model and optimizer."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import train_llm as script
    from test_parity import build_model

    if ALL_TO_ALL in name:
        torch.distributed._functional_collectives.reduce_scatter_single = scatter_by_all_to_all
    if name.startswith("train_llm.py"):
        mesh = script.build_mesh("cpu", 2)
        compiled = "--compile" in name
        model = build_model(config(), mesh, torch.float32, SEED, folder, compile=compiled)
        optimizer = script.build_optimizer(model, LR, 0.0)
        rank, dp = mesh["dp"].get_local_rank(), mesh["dp"].size()

        def step(ids):
            return script.train_step(model, optimizer, [(ids[rank::dp],) * 2], 1.0, mesh["dp"])

        return step, model, optimizer
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
    return lambda ids: plain_step(model, optimizer, ids[rank::dp], clip), model, optimizer


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


def global_batches(steps: int):
    """Token ids for the warm-up and so many steps, (steps, GLOBAL_BATCH, SEQ_LENGTH)."""
    import torch

    data = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 384, (WARM_UP + steps, GLOBAL_BATCH, SEQ_LENGTH), generator=data)


def work_alone(names: list[str], folder: Path, steps: int) -> None:
    """Write each peer's CPU-ms per step, as rank 0 of ranks that do not exist, times the ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import masking_utils

    os.environ["WORLD_SIZE"] = "4"  # DistributedConfig reads it
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    original, peers, times = masking_utils.find_packed_sequence_indices, {}, {}
    for name in names:  # this script replaces that function for its whole process
        masking_utils.find_packed_sequence_indices = original
        peers[name] = peer(name, folder)[0], masking_utils.find_packed_sequence_indices
        times[name] = []
    for ids in global_batches(steps):
        random.shuffle(names)  # so that caches are not always as one other peer leaves them
        for name in names:
            step, masking_utils.find_packed_sequence_indices = peers[name]
            begin = time.process_time()
            step(ids)
            times[name].append((time.process_time() - begin) * 1000 * PEERS[name])
    result = {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
    Path(folder, "result.json").write_text(json.dumps(result))
    os._exit(0)


def work(name: str, folder: Path, steps: int) -> None:
    """What each rank does: train, and let rank 0 write what was measured to `folder`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    step, model, optimizer = peer(name, folder)
    batches = global_batches(steps + 1)
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


RATIO = "of transformers' (least to most)"
HEAD = [
    "", "CPU-ms per step", RATIO, "without communication", RATIO, "peak MiB of tensors per rank",
    RATIO, "tokens/s", "first step, s", "loss after 10 steps",
]  # fmt: skip


def summary(peers: dict[str, list]) -> list[list]:
    """A table row per peer, of medians over the rounds; ratios are taken within a round."""

    def median(runs: list[dict], key: str, digits: int) -> str:
        return f"{statistics.median(run[key] for run in runs):,.{digits}f}"

    def ratio(runs: list[dict], key: str) -> str:
        pairs = zip(runs, peers["transformers"], strict=True)
        ratios = sorted(run[key] / other[key] for run, other in pairs)
        text = f"{statistics.median(ratios):.2f}"
        return text + f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" * (ratios[0] < ratios[-1])

    rows = []
    for name, runs in peers.items():
        row = [name]
        for key, digits in {"cpu_ms_per_step": 0, "cpu_ms_alone": 0, "peak_tensor_mib": 1}.items():
            row += [median(runs, key, digits), ratio(runs, key)] if runs[0][key] else ["", ""]
        row += [median(runs, "tokens_per_s", 0), median(runs, "first_step_s", 1)]
        rows.append([*row, f"{runs[0]['losses'][9]:.6f}"])
    return rows


def where(peers: dict[str, list]) -> str:
    """The shares of each peer's time in the last round, as a table."""
    found = {name: runs[-1]["shares"] for name, runs in peers.items()}
    rows = [[name, *(f"{share:.0%}" for share in each.values())] for name, each in found.items()]
    return markdown(["time of rank 0's main thread", *next(iter(found.values()))], rows)


def main(argv: list[str] | None = None) -> None:
    """Run all peers in turn, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="measured steps of a start")
    add("--peers", nargs="+", default=list(PEERS))
    add("--out", type=Path, default=ROOT / "docs")
    add("--work", metavar="FOLDER", help="be a rank of one of --peers, and write to this folder")
    add("--work-alone", metavar="FOLDER", help="be rank 0 of all --peers in a fake process group")
    args = parser.parse_args(argv)
    if args.work:
        return work(*args.peers, Path(args.work), args.steps)
    if args.work_alone:
        return work_alone(args.peers, Path(args.work_alone), args.steps)
    import torch
    from transformers import AutoModelForCausalLM

    env, peers = environment(), {name: [] for name in args.peers}
    with tempfile.TemporaryDirectory() as folder:

        def start(ranks: int, flag: str, *names: str) -> dict:
            torchrun(ranks, __file__, flag, folder, "--steps", args.steps, "--peers", *names)
            return json.loads(Path(folder, "result.json").read_text())

        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
        for i in range(args.rounds):
            alone = start(1, "--work-alone", *(n for n in args.peers if ALL_TO_ALL not in n))
            for name, runs in peers.items():
                run = start(PEERS[name], "--work", name) | {"cpu_ms_alone": alone.get(name)}
                runs.append(run)
                print(i, name, run["cpu_ms_per_step"], run["cpu_ms_alone"], flush=True)
    (args.out / "peers.json").write_text(compact_json({"environment": env, "peers": peers}) + "\n")
    text = "\n\n".join([markdown(HEAD, summary(peers)), where(peers), caption(env)]) + "\n"
    (args.out / "peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
