"""Everything that needs a GPU, in one command of at most 8 minutes, on one H100 or H200.

    python benchmarks/gpu.py            # docs/gpu.md has the whole command line
    python benchmarks/gpu.py --smoke    # the same path on a CPU with tiny models

First of all what a product of bf16 matrices and a copy reach on this card. Then these parts, of
which --parts takes some only:

parity    the tests' comparison with plain transformers, with one NCCL rank
run       train_llm.py from start to end; again from its checkpoint; and once more from its export
1b, 3b    shapes of Llama 3.2, sequences of 4096, one rank: plain transformers, eager, compiled
profile   the largest costs of a compiled step of 3B, and one in which to wait for the device fails
layouts   Llama 3.1 8B, sequences of 1024, rank 0 of 8 in a fake process group: real memory and
          computation, no communication; at the largest batch that plan.py predicts, and around it

Each line of JOBS runs in a process of its own, and is stopped at its limit. What it has said till
then is written at once to gpu.json, and as tables to gpu-results.md; so is what fails.
"""

import argparse
import bisect
import concurrent.futures
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import ROOT, caption, environment, markdown
from plan import GIB, PRESETS, llama, predict
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import test_parity
import train_llm as script
from ranks import run

JOBS = {  # limits in seconds
    "parity": {"parity llama tied bf16": 60, "parity compile": 90},
    "run": {"run": 190},
    "1b": {"speed 1b plain": 50, "speed 1b eager": 50, "speed 1b compiled": 110},
    "3b": {"speed 3b plain": 50, "speed 3b eager": 50, "speed 3b compiled": 120},
    "profile": {"profile 3b": 100},
    "layouts": {f"layout {name}": 50 for name in ("1x8", "2x4", "4x2", "8x1")},
}
MODELS = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "8b": "llama-3.1-8b"}
BATCHES = {"1b": (2, 8), "3b": (1, 4)}
PARITY = {
    "llama": {}, "tied": {"config": test_parity.llama(tie_word_embeddings=True)},
    "bf16": {"dtype": "bf16"}, "compile": {"compile": True},
}  # fmt: skip
RESERVE_GIB = 2  # as plan.py leaves
TINY = llama(64, 128, 4, 8, 4, 512)
ROW = "gpu.py's row: "  # what a job says begins with it


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sync() -> None:
    if device_type() == "cuda":
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


def one_rank(backend: str = "", world_size: int = 1) -> None:
    """A process group of this process alone, as rank 0 of `world_size`."""
    backend = backend or ("nccl" if device_type() == "cuda" else "gloo")
    if device_type() == "cuda":
        torch.cuda.set_device(0)
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, rank=0, world_size=world_size, store=store)


def reduce_scatter_here() -> None:
    """A fake group's reduce-scatter gives this rank its own chunk, as in torch 2.13.

    Torch 2.11 leaves the output unset: NaNs and zeros, which a GPU multiplies faster.
    """

    def in_place(output, input, *args, **options) -> None:  # FSDP's, of torch 2.11
        output.copy_(input.flatten()[: output.numel()].view_as(output))

    def functional(tensor, op: str, ranks: int, group: str) -> torch.Tensor:  # DTensor's
        return tensor.chunk(ranks)[0].clone()

    dist.reduce_scatter_tensor = in_place
    torch.ops._c10d_functional.reduce_scatter_tensor = functional


def config_and_length(args, model: str) -> tuple:
    """A model's configuration, and the length of the sequences it is measured with."""
    if args.smoke:
        return TINY, 64
    return llama(*PRESETS[MODELS[model]]), 1024 if model == "8b" else 4096


def trainer(config, seq_length: int, tp: int, compile: bool = False):
    """A function of the batch size that trains a step of the script's model on random tokens.

    It returns the norm of the gradient, on the device.
    """
    mesh = script.build_mesh(device_type(), tp)
    model = script.shard_model(config, mesh, torch.bfloat16, False, compile)
    model.to_empty(device=device_type())
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().normal_(0, 0.02)
        for buffer in model.buffers():  # rotary frequencies: any finite value costs the same
            buffer.fill_(0.5)
    optimizer = script.build_optimizer(model, 1e-3, 0.1)

    def step(batch: int) -> torch.Tensor:
        shape = (batch, seq_length)
        ids = torch.randint(0, config.vocab_size, shape, device=device_type())
        return script.train_step(model, optimizer, [(ids, ids)], 1.0, mesh["dp"])[1]

    return step


def plain_trainer(config, seq_length: int):
    """The same for transformers alone: fp32 weights, bf16 autocast, fused AdamW."""
    with torch.device(device_type()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch: int) -> None:
        ids = torch.randint(0, config.vocab_size, (batch, seq_length), device=device_type())
        with torch.autocast(device_type(), torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(step, batch: int, steps: int) -> dict:
    """Seconds and peak memory of `step(batch)`, or that it does not fit."""
    torch.compiler.reset()  # a second shape would be compiled as a dynamic one, which is slower
    on_cuda, found = device_type() == "cuda", {"fits": True}
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found["first_step_s"] = timed(lambda: step(batch), 0, 1)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()  # without what the compiler has tried
        found["step_s"] = timed(lambda: step(batch), 1, steps)
    except torch.OutOfMemoryError:
        found = {"fits": False}
    peak_gib = torch.cuda.max_memory_allocated() / GIB if on_cuda else None
    return found | {"peak_gib": peak_gib}


def slower(args) -> int:
    """Times a limit: a CPU, which may do other things, takes longer."""
    return 5 if args.smoke else 1


def written(args, **words) -> dict:
    """The row with these values that is in gpu.json already, or nothing."""
    rows = json.loads((args.out / "gpu.json").read_text())["rows"]
    return next((row for row in rows if words.items() <= row.items()), {})


# ---- Jobs: each yields rows --------------------------------------------------------------------


def card(args):
    """What this machine is, and what it reaches."""
    on_cuda = device_type() == "cuda"
    n = 8192 if on_cuda else 256
    a, b = (torch.randn(n, n, device=device_type(), dtype=torch.bfloat16) for _ in "ab")
    large = torch.zeros(2**30 if on_cuda else 2**20, dtype=torch.int32, device=device_type())
    product_s, copy_s = timed(lambda: a @ b, 5, 30), timed(large.clone, 5, 30)
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if on_cuda else None
    yield {
        "memory_gib": memory, "matrix_product_tflops": 2 * n**3 / product_s / 1e12,
        "copied_gb_per_s": 2 * large.nbytes / copy_s / 1e9,  # read and written
        "allocator": os.environ["PYTORCH_ALLOC_CONF"], "environment": environment(),
    }  # fmt: skip


def plan(args):
    """plan.py's predictions for what is measured after it; runs on the CPU."""
    work = [("1b", "1x1"), ("3b", "1x1")]
    work += [("8b", key.split()[1]) for key in JOBS["layouts"]]
    pool = multiprocessing.get_context("fork").Pool(maxtasksperchild=1)  # each in its own process
    yield from pool.imap(functools.partial(prediction, args), work)


def prediction(args, work: tuple) -> dict:
    """The largest batch that should fit, and the peak memory of those that are to be measured."""
    model, layout = work
    dp, tp = map(int, layout.split("x"))
    one_rank("fake", dp * tp)
    config, seq_length = config_and_length(args, model)
    peak = predict(config, tp, seq_length, 1, "bf16", False)["peak"]
    room = (args.memory_gib - RESERVE_GIB) * GIB
    most = 4 if args.smoke else bisect.bisect_right(range(1, 2**16), room, key=peak)
    batches = BATCHES.get(model, sorted({1, most - 1, most, most + 1} - {0}))
    return {
        "model": model, "layout": layout, "memory_gib": args.memory_gib, "largest_batch": most,
        "batches": batches, "predicted_gib": [round(peak(n) / GIB, 3) for n in batches],
    }  # fmt: skip


def parity(args, *cases: str):
    """The largest relative error of cases of tests/test_parity.py on this device."""
    one_rank()
    for case in cases:
        options = {"config": test_parity.llama(), "device": device_type()} | PARITY[case]
        errors, plain = test_parity.compare(1, **options), {}
        if case == "bf16":  # beside the error of plain transformers in bf16
            errors, plain = errors
        worst = max(errors, key=lambda name: errors[name] / max(plain.get(name, 1), 1e-3))
        row = {"case": case, "error": errors[worst], "of": worst}
        yield row | {"error_of_plain_bf16": plain.get(worst)}


def whole_run(args):
    """The script: a run, the same from its middle as if killed there, and one from its export."""
    steps, middle = (4, 2) if args.smoke else (40, 20)
    with tempfile.TemporaryDirectory() as folder:

        def train(name: str, *flags) -> tuple[list[dict], str]:
            command = [sys.executable, ROOT / "train_llm.py", "--save-dir", folder, "-e", name]
            command += ["--log-freq", 1, "-s", 256, *flags]
            code, output = run(command, 60 * slower(args))  # three of these are less than the job
            assert code == 0, output
            text = Path(folder, name, "metrics.jsonl").read_text()
            return list(map(json.loads, text.splitlines())), output

        def losses(rows: list[dict]) -> torch.Tensor:
            return torch.tensor([row["val_loss" if "val_loss" in row else "loss"] for row in rows])

        flags = ["--max-steps", steps, "--ckpt-freq", middle]
        rows, _ = train("first", *flags)
        names = ("loss", "tokens_per_s", "peak_mem_gib")
        yield {"run": "from the start"} | {name: rows[-2][name] for name in names} | rows[-1]
        shutil.rmtree(Path(folder, "first", "checkpoints", f"step-{steps:08d}"))
        again, output = train("first", *flags)
        assert f"resuming after step {middle}," in output, output
        error = test_parity.distance(losses(again), losses(rows))
        yield {"run": "from its checkpoint", "relative_error": error} | again[-1]
        export = Path(folder, "first", "export")
        other, _ = train("second", "-m", export, "-b", 4, "--max-steps", 1, "--lr", 1e-12)
        error = test_parity.distance(other[-1]["val_loss"], rows[-1]["val_loss"])
        yield {"run": "from its export", "relative_error": error} | other[-1]


def speed(args, model: str, who: str):
    """Tokens/s, MFU and peak memory of one rank."""
    config, seq_length = config_and_length(args, model)
    one_rank()
    if who == "plain":
        step = plain_trainer(config, seq_length)
    else:
        step = trainer(config, seq_length, 1, compile=who == "compiled")
    flops = script.flops_per_token(script.meta_model(config), seq_length)
    name = torch.cuda.get_device_name() if device_type() == "cuda" else ""
    peak_flops = script.PEAK_BF16_FLOPS.get(name)
    planned = written(args, job="plan", model=model)
    for i, batch in enumerate(BATCHES[model]):
        row = {"batch": batch} | measured(step, batch, 8)
        if who == "eager" and planned:
            row["predicted_gib"] = planned["predicted_gib"][i]
        if row["fits"]:
            tokens_per_s = batch * seq_length / row["step_s"]
            mfu = tokens_per_s * flops / peak_flops if peak_flops else None
            row |= {"tokens_per_s": tokens_per_s, "mfu": mfu}
        yield row


def layout(args, name: str):
    """Peak memory and speed of rank 0 of a layout, at the batches of `plan` for it."""
    dp, tp = map(int, name.split("x"))
    planned = written(args, job="plan", layout=name)
    one_rank("fake", dp * tp)
    reduce_scatter_here()
    if device_type() == "cuda":  # its context counts, too
        free, total = torch.cuda.mem_get_info()
        room = args.memory_gib * GIB - (total - free)
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    config, seq_length = config_and_length(args, "8b")
    step = trainer(config, seq_length, tp)
    for batch, predicted_gib in zip(planned["batches"], planned["predicted_gib"], strict=True):
        row = {"batch": batch} | measured(step, batch, 2) | {"predicted_gib": predicted_gib}
        if row["fits"]:
            tokens = dp * batch * seq_length
            row["tokens_per_s_of_8_without_communication"] = tokens / row["step_s"]
            row["grad_norm"] = step(batch).item()  # finite, or the speed is that of NaNs
        yield row
        if not row["fits"]:  # nor does a larger one
            return


def profile(args, model: str):
    """Where the time of a compiled step goes, and a step that fails if it waits for the device."""
    config, seq_length = config_and_length(args, model)
    on_cuda = device_type() == "cuda"
    one_rank()
    step = trainer(config, seq_length, 1, compile=True)
    compiled, (batch, more) = f"speed {model} compiled", BATCHES[model]
    if written(args, job=compiled, batch=more, fits=True):
        batch = more
    step_s = timed(lambda: step(batch), 2, 4)
    with torch.profiler.profile() as profiled:  # of the CPU, and of CUDA if there is one
        step(batch)
        sync()
    # Operators, with the time that their own kernels take.
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(getattr(event, own) for event in events)
    for event in sorted(events, key=lambda event: -getattr(event, own))[:5]:
        yield {
            "batch": batch, "cost": event.key[:80], "calls": event.count,
            "ms": getattr(event, own) / 1e3, "share": getattr(event, own) / total,
        }  # fmt: skip
    yield {"batch": batch, "cost": "all", "ms": total / 1e3, "step_ms": step_s * 1e3}
    # What set_sync_debug_mode may not see, as in torch.distributed. `sync` is another call.
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    calls = {e.key: e.count for e in profiled.key_averages() if e.key in waits}
    yield {"batch": batch, "cost": "waiting for the device, by the profile", "calls": calls}
    data = test_parity.all_count(torch.zeros(1, seq_length, dtype=torch.int64))
    sync()
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    step(batch)
    script.load_batch(data, [0], torch.device(device_type()))
    if on_cuda:
        torch.cuda.set_sync_debug_mode("default")
    yield {"batch": batch, "cost": "waiting for the device", "calls": 0}


KINDS = {
    "card": card, "plan": plan, "parity": parity, "run": whole_run, "speed": speed,
    "layout": layout, "profile": profile,
}  # fmt: skip


# ---- The command -------------------------------------------------------------------------------


def do(args, job: str, limit_s: float, **env: str) -> tuple[list[dict], float]:
    """The rows of a job in a process of its own, with one more if it fails, and its seconds."""
    command = [sys.executable, __file__, "--one", job, "--out", args.out]
    command += ["--memory-gib", args.memory_gib] + ["--smoke"] * args.smoke
    begin = time.perf_counter()
    try:
        code, output = run(command, limit_s, **env)
    except AssertionError as error:  # it was too slow
        code, output = None, str(error)
    lines = [line for line in output.splitlines() if line.startswith(ROW)]
    rows = [{"job": job} | json.loads(line.removeprefix(ROW)) for line in lines]
    if code != 0:
        rows.append({"job": job, "failed": output[-3000:]})
    return rows, time.perf_counter() - begin


def tables(result: dict) -> str:
    """The rows as Markdown, a table for each kind of job."""

    def text(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "" if value is None else str(value)[-300:].replace("\n", "<br>")

    parts = []
    for kind in KINDS:
        rows = [row for row in result["rows"] if row["job"].split()[0] == kind]
        head = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            parts.append(markdown(head, [[text(row.get(key)) for key in head] for row in rows]))
    job_s = ", ".join(f"{job} {seconds:.0f}" for job, seconds in result["job_s"].items())
    return "\n\n".join([*parts, f"Seconds: {job_s}.", caption(result["environment"])]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Do the jobs of all parts that are asked for, and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny models, also without a GPU")
    add("--parts", nargs="+", choices=list(JOBS), default=list(JOBS), help="only these")
    add("--out", type=Path, default=ROOT / "docs", help="directory of the results")
    add("--commit", help="what is measured, where git cannot tell")
    add("--memory-gib", type=float, default=80, help="of the GPU, for the layouts, if it has more")
    add("--limit-s", type=float, default=460, help="for all together")
    add("--one", help="do this job here")
    args = parser.parse_args(argv)
    args.out, begin, result = args.out.absolute(), time.perf_counter(), {"rows": [], "job_s": {}}
    if args.one:
        kind, *words = args.one.split()
        for row in KINDS[kind](args, *words):
            print(f"\n{ROW}{json.dumps(row)}", flush=True)
        os._exit(0)  # as the script ends
    if device_type() == "cpu" and not args.smoke:
        sys.exit("there is no GPU; --smoke runs the same path on a CPU with tiny models")
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(job: str, rows: list[dict], job_s: float) -> None:
        result["rows"] += rows
        result["job_s"][job] = round(job_s, 1)
        for row in rows:
            print({key: v[-500:] if key == "failed" else v for key, v in row.items()})
        print(f"{job}: {job_s:.1f} s", flush=True)
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "gpu-results.md").write_text(tables(result))

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as launch.sh does
    rows, job_s = do(args, "card", 60 * slower(args))
    if "failed" in rows[-1]:  # perhaps the driver cannot do that
        print(rows[-1]["failed"])
        os.environ["PYTORCH_ALLOC_CONF"] = ""
        rows, job_s = do(args, "card", 60 * slower(args))
    if "failed" in rows[-1]:
        sys.exit(rows[-1]["failed"])
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    result["environment"] = rows[0].pop("environment") | {"command": command}
    if args.commit:
        result["environment"]["commit"] = args.commit
    args.memory_gib = min(args.memory_gib, rows[0]["memory_gib"] or args.memory_gib)
    keep("card", rows, job_s)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # no GPU, so beside the first parts
        planning = None
        if {"1b", "3b", "layouts"} & {*args.parts}:
            planning = pool.submit(do, args, "plan", 120 * slower(args), CUDA_VISIBLE_DEVICES="")
        for part in (part for part in JOBS if part in args.parts):
            if planning and part in ("1b", "3b", "layouts"):
                keep("plan", *planning.result())
                planning = None
            for job, limit_s in JOBS[part].items():
                left_s = args.limit_s * slower(args) - (time.perf_counter() - begin)
                keep(job, *do(args, job, max(1, min(limit_s * slower(args), left_s))))


if __name__ == "__main__":
    main()
