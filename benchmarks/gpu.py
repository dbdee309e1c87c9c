"""Everything that needs a GPU, in one command, on one GPU, with torch 2.11 or newer.

    python benchmarks/gpu.py            # about 20 minutes on an H200
    python benchmarks/gpu.py --smoke    # the same path on a CPU with tiny models

(a) Speed: the shapes of Llama 3.2 1B and 3B on one rank, sequences of 4096 in bf16, with and
    without --compile and --activation-checkpointing, beside a plain transformers loop.
(b) Layouts: rank 0 of 8 in a fake process group, for Llama 3.1 8B at 1024 tokens on 1x8, 2x4, 4x2
    and 8x1: real memory and computation, no communication. The largest batch in 80 GiB and the peak
    memory, beside what plan.py predicts.
(c) Parity: the tests' comparison with plain transformers, on CUDA, with one NCCL rank.

Each measurement runs in a process of its own, one after the other, and is written at once to
gpu.json; gpu-results.md has the tables. What fails is written down as failed and the next one runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, caption, environment, markdown
from plan import GIB, PRESETS, llama

SPEED = [  # model, batch size, who, flags
    (model, batch, who, flags)
    for model, batch in (("llama-3.2-1b", 8), ("llama-3.2-3b", 4))
    for who, flags in (
        ("plain transformers", ""), ("train_llm.py", ""), ("train_llm.py", "compile"),
        ("train_llm.py", "recompute"), ("train_llm.py", "compile recompute"),
    )
]  # fmt: skip
LAYOUTS = {"1x8": 18, "2x4": 14, "4x2": 10, "8x1": 7}  # the tutorial's largest batches, pure bf16
PARITY = ["llama", "tied", "gqa", "accumulation", "bf16", "recompute", "compile"]
TINY = llama(64, 128, 4, 8, 4, 512)


def config_of(model: str):
    return TINY if model == "tiny" else llama(*PRESETS[model])


def device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sync() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step, warm_up: int, steps: int) -> float:
    """Seconds per call of `step`, on an idle device."""
    for _ in range(warm_up):
        step()
    sync()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    sync()
    return (time.perf_counter() - begin) / steps


def matrix_product_flops() -> float:
    """FLOP/s of products of bf16 matrices on this device, measured."""
    import torch

    n = 8192 if torch.cuda.is_available() else 256
    a, b = (torch.randn(n, n, device=device_type(), dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / timed(lambda: a @ b, 5, 30)


def one_rank(backend: str, world_size: int = 1) -> None:
    """A process group of this process alone, as rank 0 of `world_size`."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, rank=0, world_size=world_size, store=store)


def trainer(model: str, seq_length: int, dtype: str, tp: int, flags: str):
    """A function of the batch size that trains a step of the script's model on random tokens."""
    import torch

    import train_llm as script

    config = config_of(model)
    mesh = script.build_mesh(device_type(), tp)
    recompute, compiled = "recompute" in flags, "compile" in flags
    sharded = script.shard_model(config, mesh, script.DTYPES[dtype], recompute, compiled)
    sharded.to_empty(device=device_type())
    with torch.no_grad():
        for p in sharded.parameters():
            p.to_local().normal_(0, 0.02)
        for buffer in sharded.buffers():  # rotary frequencies: any finite value costs the same
            buffer.fill_(0.5)
    optimizer = script.build_optimizer(sharded, 1e-3, 0.1)

    def step(batch: int) -> None:
        shape = (batch, seq_length)
        ids = torch.randint(0, config.vocab_size, shape, device=device_type())
        script.train_step(sharded, optimizer, [(ids, ids)], 1.0, mesh["dp"])

    return step, script.flops_per_token(sharded, seq_length)


def plain_trainer(model: str):
    """The same for transformers alone: fp32 weights, bf16 autocast, fused AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(model)
    with torch.device(device_type()):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True)

    def step(batch: int, seq_length: int) -> None:
        ids = torch.randint(0, config.vocab_size, (batch, seq_length), device=device_type())
        with torch.autocast(device_type(), torch.bfloat16):
            loss = plain(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed(model: str, batch: int, who: str, flags: str, seq_length: int) -> dict:
    """(a): tokens/s, MFU and peak memory of one rank."""
    import torch

    import train_llm as script

    product = matrix_product_flops()
    one_rank("nccl" if torch.cuda.is_available() else "gloo")
    step, flops = trainer(model, seq_length, "bf16", 1, flags)
    if who != "train_llm.py":
        del step
        plain = plain_trainer(model)
        step = lambda batch: plain(batch, seq_length)  # noqa: E731
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step(batch)
    sync()
    first_step_s = time.perf_counter() - begin
    step_s = timed(lambda: step(batch), 3, 15)
    peak, memory, reached = None, None, flops * batch * seq_length / step_s
    if torch.cuda.is_available():
        peak = script.PEAK_BF16_FLOPS.get(torch.cuda.get_device_name())
        memory = torch.cuda.max_memory_allocated() / 2**30
    return {
        "tokens_per_s": batch * seq_length / step_s, "tflops": reached / 1e12,
        "mfu": reached / peak if peak else None, "of_matrix_product": reached / product,
        "matrix_product_tflops": product / 1e12, "first_step_s": first_step_s,
        "peak_gib": memory,
    }  # fmt: skip


def layout(model: str, name: str, seq_length: int, memory_gib: float) -> dict:
    """(b): the largest batch of rank 0 of 8, its speed, and predicted and measured peaks."""
    import torch

    dp, tp = map(int, name.split("x"))
    with open(os.devnull) as nothing:
        rows = Path(f"/tmp/plan-{os.getpid()}.json")
        sizes = "64,128,4,8,4,512" if model == "tiny" else model
        command = [sys.executable, ROOT / "benchmarks" / "plan.py", "-m", sizes, "--json", rows]
        command += ["--ranks", dp * tp, "-s", seq_length, "--memory-gib", memory_gib]
        subprocess.run([str(w) for w in command], check=True, stdin=nothing, capture_output=True)
    plan = next(r for r in json.loads(rows.read_text()) if r["tp"] == tp and not r["recompute"])
    rows.unlink()
    one_rank("fake", dp * tp)
    step, _ = trainer(model, seq_length, "bf16", tp, "")
    if not torch.cuda.is_available():
        return {"predicted_batch": plan["largest_batch"], "step_s": timed(lambda: step(1), 1, 1)}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * GIB / total))

    def fits(batch: int) -> bool:
        try:
            step(batch)
            step(batch)  # with the optimizer's state from the start
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    low, high = 0, max(2, plan["largest_batch"])
    while fits(high):
        low, high = high, high + max(1, high // 8)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    step(1)
    torch.cuda.reset_peak_memory_stats()
    step_s = timed(lambda: step(low), 2, 8)
    return {
        "largest_batch": low, "predicted_batch": plan["largest_batch"], "step_s": step_s,
        "tokens_per_s_of_8_without_communication": dp * low * seq_length / step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }  # fmt: skip


def parity(case: str) -> dict:
    """(c): the largest relative error of a case of tests/test_parity.py on this device."""
    import torch

    from test_parity import compare, llama

    one_rank("nccl" if torch.cuda.is_available() else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {
        "tied": {"config": llama(tie_word_embeddings=True)}, "accumulation": {"accumulation": 2},
        "gqa": {"config": llama(num_key_value_heads=4)}, "bf16": {"dtype": "bf16"},
        "recompute": {"recompute": True}, "compile": {"compile": True},
    }.get(case, {})  # fmt: skip
    errors = compare(1, **{"config": llama(), "device": device_type()} | options)
    if case == "bf16":
        errors, plain = errors
        worst = max(errors, key=lambda name: errors[name] / max(plain[name], 1e-3))
        return {"worst": worst, "error": errors[worst], "plain_bf16": plain[worst]}
    worst = max(errors, key=errors.get)
    return {"worst": worst, "error": errors[worst]}


def tables(result: dict) -> str:
    """The results as Markdown."""

    def number(run: dict, key: str, form: str = ".2f", scale: float = 1) -> str:
        value = run.get(key)
        return "failed" if "failed" in run else "-" if value is None else f"{value * scale:{form}}"

    rows = {"speed": [], "layout": [], "parity": []}
    for key, run in result["runs"].items():
        kind, *words = key.split("|")
        if kind == "speed":
            rows[kind].append([
                *words[:1], f"{words[2]} {words[3]}".strip(), words[1],
                number(run, "tokens_per_s", ",.0f"), number(run, "mfu", ".1f", 100),
                number(run, "of_matrix_product", ".1f", 100), number(run, "peak_gib", ".1f"),
                number(run, "first_step_s", ".1f"),
            ])  # fmt: skip
        elif kind == "layout":
            rows[kind].append([
                words[1], number(run, "largest_batch", "d"), number(run, "predicted_batch", "d"),
                LAYOUTS[words[1]], number(run, "peak_gib", ".1f"),
                number(run, "tokens_per_s_of_8_without_communication", ",.0f"),
            ])  # fmt: skip
        else:
            rows[kind].append([words[0], number(run, "error", ".1e"), run.get("worst", "")])
    heads = {
        "speed": ["model", "who", "-b", "tokens/s", "MFU, %", "of a matrix product, %",
                  "peak GiB", "first step, s"],
        "layout": ["dp x tp", "largest -b", "predicted", "in the tutorial", "peak GiB",
                   "tokens/s of 8 ranks without communication"],
        "parity": ["case", "largest relative error", "of"],
    }  # fmt: skip
    parts = [markdown(heads[kind], found) for kind, found in rows.items() if found]
    return "\n\n".join([*parts, caption(result["environment"])]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run every measurement in its own process and write what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny models, also without a GPU")
    add("--out", type=Path, default=ROOT / "docs")
    add("--memory-gib", type=float, default=80, help="cap for the layouts")
    add("--one", help="run this measurement here and print its JSON")
    args = parser.parse_args(argv)
    seq_length = 64 if args.smoke else 4096
    if args.one:
        kind, *words = args.one.split("|")
        if kind == "speed":
            run = speed(words[0], int(words[1]), words[2], words[3], seq_length)
        elif kind == "layout":
            run = layout(words[0], words[1], 64 if args.smoke else 1024, args.memory_gib)
        else:
            run = parity(words[0])
        print("\n" + json.dumps(run), flush=True)
        os._exit(0)
    if device_type() == "cpu" and not args.smoke:
        sys.exit("there is no GPU; --smoke runs the same path on a CPU with tiny models")
    if args.smoke:
        work = ["speed|tiny|2|plain transformers|", "speed|tiny|2|train_llm.py|recompute"]
        work += ["layout|tiny|2x4", "parity|llama"]
    else:
        work = [f"parity|{case}" for case in PARITY]
        work += [f"layout|llama-3.1-8b|{name}" for name in LAYOUTS]
        work += ["|".join(["speed", *map(str, entry)]) for entry in SPEED]
    result = {"environment": environment(), "runs": {}}
    for key in work:
        command = [sys.executable, __file__, "--one", key, "--memory-gib", str(args.memory_gib)]
        command += ["--smoke"] * args.smoke
        env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ  # as launch.sh does
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=env)
        try:
            run = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            run = {"failed": (done.stdout + done.stderr)[-2000:]}
        result["runs"][key] = run
        print(key, {k: v if k != "failed" else v[-300:] for k, v in run.items()}, flush=True)
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "gpu-results.md").write_text(tables(result))
    print(tables(result))


if __name__ == "__main__":
    main()
