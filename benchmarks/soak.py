"""A mixture of experts, killed again and again and moved between layouts, beside plain processes.

    python benchmarks/soak.py                                  # half an hour on 2 cores
    python benchmarks/soak.py --steps 40 --ends 3 --out /tmp/docs

Trains a tiny Qwen3 MoE from the same weights on the same batches four times: transformers alone;
the same, which adds up each gradient in two halves; the script on 2 dp x 2 tp to the end; and the
script on CPU ranks of other layouts, with other flags, which is killed or asked to stop at random,
until it is done. Ends with an error if a process is left behind, if a start does not go on from the
newest checkpoint that there should be, or if a run that was asked to stop has not saved its last
step. Writes soak.json and soak.md.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
import transformers
from common import ROOT, caption, compact_json, environment, launch, markdown
from torch import nn

import jobs
import train_llm as script
from test_parity import distance, plain_optimizer

GLOBAL_BATCH, SEQ_LENGTH, LR, CKPT_FREQ, EXPERTS = 12, 64, 1e-3, 5, 12
LAYOUTS = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (2, 3), (3, 2)]  # dp, tp
WAYS = ["", "accumulation", "--activation-checkpointing", "--compile"]
CHANCES = [3, 2, 2, 1]  # of these; a start that compiles takes minutes
KILLS = ["SIGKILL to a rank", "SIGKILL to torchrun and all ranks"]
STOPS = ["SIGTERM to torchrun", "SIGUSR1 to a rank", "SIGKILL to torchrun alone"]


def write_inputs(folder: Path, experts_per_token: int) -> None:
    """A tiny model that --tp 1, 2, 3 and 4 can shard, and source files of Python as documents."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=263, hidden_size=96, moe_intermediate_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=6, head_dim=8,
        num_experts=EXPERTS, num_experts_per_tok=experts_per_token, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, max_position_embeddings=SEQ_LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    script.built_in_model()[1].save_pretrained(folder / "model")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]
    with open(folder / "data.jsonl", "w") as data:
        data.writelines(json.dumps({"text": file.read_text("utf-8")}) + "\n" for file in files)


def flags_of(folder: Path, steps: int, name: str) -> list[str]:
    """The command line of every start of a run."""
    flags = ["-m", folder / "model", "-d", folder / "data.jsonl", "-s", SEQ_LENGTH, "--lr", LR]
    flags += ["--global-batch-size", GLOBAL_BATCH, "--max-steps", steps, "--log-freq", 1]
    flags += ["--num-epochs", 1000, "--ckpt-freq", CKPT_FREQ, "--eval-freq", 50]
    flags += ["--device", "cpu", "--save-dir", folder, "-e", name]
    return list(map(str, flags))


class Start:
    """The script under torchrun on a layout; `way` is one of WAYS."""

    def __init__(self, layout: tuple[int, int], flags: list, log: Path, way: str = ""):
        dp, tp = layout
        size = GLOBAL_BATCH // dp // (2 if way == "accumulation" else 1)
        flags = [*flags, "--tp", tp, "-b", size] + [way] * way.startswith("--")
        self.log, how = log, launch(dp * tp, ROOT / "train_llm.py", *flags)
        with open(log, "w") as output:
            self.agent = psutil.Popen(**how, stdout=output, stderr=output)

    def until(self, condition, timeout_s: float) -> None:
        """Wait for a condition, or for torchrun to end."""
        deadline = time.monotonic() + timeout_s
        while self.agent.poll() is None and not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"still waiting after {timeout_s} s\n{self.log.read_text()}")
            time.sleep(0.01)

    def end(self, how: str, chance: random.Random) -> None:
        """End it as `how` says, and wait until all its processes are gone."""
        self.agent.suspend()  # so that it starts no more of them
        processes = [self.agent, *self.agent.children(recursive=True)]
        ranks = self.agent.children()
        targets = {
            "a rank": [chance.choice(ranks)],
            "torchrun": [self.agent],
            "torchrun alone": [self.agent],
            "torchrun and all ranks": [self.agent, *ranks],
        }
        name, target = how.split(" to ")
        for process in targets[target]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.Signals[name])
        with contextlib.suppress(psutil.NoSuchProcess):
            self.agent.resume()
        if left := psutil.wait_procs(processes, timeout=120)[1]:
            raise RuntimeError(f"left behind after {how}: {left}\n{self.log.read_text()}")


def to_the_end(start: Start) -> None:
    """Wait for a start that has to finish the run."""
    if start.agent.wait(3600):
        raise RuntimeError(start.log.read_text())


def processes_of(folder: Path) -> list[psutil.Process]:
    """Running processes with the folder in their command line."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(folder) in " ".join(process.info["cmdline"] or [])]


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, or 0."""
    return max((int(name.removeprefix("step-")) for name in jobs.complete(run)), default=0)


def check_resumed(start: Start, step: int) -> None:
    """Raise RuntimeError unless a start has gone on from the checkpoint of `step`, or without."""
    log = start.log.read_text()
    if "cannot be used" in log or (step and f"resuming after step {step}," not in log):
        raise RuntimeError(f"it has not gone on from step {step}\n{log}")


def often_ended(folder: Path, steps: int, ends: int, seed: int) -> list[dict]:
    """Train the run `often`; returns how each of its starts has ended."""
    chance, run, rows = random.Random(seed), folder / "often", []
    for number in range(ends):
        layout, (way,) = chance.choice(LAYOUTS), chance.choices(WAYS, CHANCES)
        # Every sixth should die before its first step. The very first does not: without a
        # checkpoint, rows of metrics are written again.
        at_start = number % 6 == 5
        how = chance.choice(KILLS if at_start else KILLS + STOPS)
        before, first = newest(run), jobs.last_step(run)
        goal = first + chance.randint(6, 2 * steps // (ends + 1))
        if goal >= steps:
            break
        start = Start(layout, flags_of(folder, steps, "often"), folder / f"log-{number}", way)
        if at_start:
            moment = time.monotonic() + chance.uniform(2, 15)
            start.until(lambda: time.monotonic() > moment and start.agent.children(), 60)  # noqa: B023
        else:
            start.until(lambda: jobs.last_step(run) >= goal, 900)  # noqa: B023
            time.sleep(chance.uniform(0, 0.4))
        ended = start.agent.poll()
        if ended is not None:
            if ended or jobs.last_step(run) < steps:
                raise RuntimeError(f"ended by itself with {ended}\n{start.log.read_text()}")
            break  # it was faster than its end
        start.end(how, chance)
        after, last = newest(run), jobs.last_step(run)
        trained = last > first
        least = max(before, (last - 1) // CKPT_FREQ * CKPT_FREQ)  # saved before the last row
        if after < least or (how in STOPS and after != last) or processes_of(folder):
            raise RuntimeError(f"{how}: checkpoints {before}, {after}, at step {last}, "
                               f"{processes_of(folder)}\n{start.log.read_text()}")  # fmt: skip
        if trained:
            check_resumed(start, before)
        rows.append({
            "dp": layout[0], "tp": layout[1], "way": way, "end": how, "resumed": before,
            "last": last, "checkpoint": after, "trained": trained,
            "in_save": trained and jobs.is_saving(run),
        })  # fmt: skip
        print(number, rows[-1], flush=True)
    before = newest(run)
    start = Start((2, 2), flags_of(folder, steps, "often"), folder / "log-last")
    to_the_end(start)
    check_resumed(start, before)
    return rows


def plain(folder: Path, steps: int, parts: int) -> tuple[list[float], nn.Module, list]:
    """Transformers in one process, which adds up gradients in `parts`.

    Returns the losses, the model, and for each step the experts of each layer's tokens.
    """
    args = script.parse_args(flags_of(folder, steps, "plain"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    data = script.load_data(args, tokenizer, 263)["train"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    model.train()
    optimizer, losses, routes = plain_optimizer(model), [], []
    layers, chosen = model.model.layers, []
    for layer in layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, out: chosen.append(out[2]))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = script.learning_rate(step, LR, steps // 20, steps)
        rows = script.global_batch_rows(step, GLOBAL_BATCH, len(data), args.seed)
        loss = 0.0
        for ids in data[rows]["input_ids"].chunk(parts):
            logits = model(ids, use_cache=False).logits[:, :-1]
            part = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / parts
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        routes.append([torch.cat(chosen[n :: len(layers)]).sort()[0] for n in range(len(layers))])
        chosen.clear()
    return losses, model, routes


def first_other_route(one: list, other: list) -> int | None:
    """The first 1-based step in which a token goes to another expert, if there is one."""
    for step, layers in enumerate(zip(one, other, strict=True), start=1):
        if not all(map(torch.equal, *layers)):
            return step
    return None


def compare(losses: list[float], model: nn.Module, reference: tuple) -> dict:
    """Relative differences of the losses, and of all weights together."""
    apart = [abs(a / b - 1) for a, b in zip(losses, reference[0], strict=True)]
    same = next((n for n, difference in enumerate(apart) if difference > 1e-5), len(apart))
    weights = [torch.cat([p.detach().flatten() for _, p in sorted(m.named_parameters())])
               for m in (model, reference[1])]  # fmt: skip
    return {
        "same_steps": same, "in_these": max(apart[:same]), "in_all": max(apart),
        "weights": distance(*weights), "last_loss": losses[-1],
    }  # fmt: skip


HEAD = [
    "beside transformers alone", "steps until losses differ by 1e-5", "largest difference in these",
    "in all steps", "difference of the exported weights", "last loss",
]  # fmt: skip
NAMES = {
    "often": "this script, ended and moved", "calm": "this script, 2 dp x 2 tp, to the end",
    "halves": "transformers, each gradient added up in two halves",
}  # fmt: skip


def summary(result: dict) -> str:
    """The results as Markdown."""
    ends, first, last = result["ends"], *result["memory_gib"]
    kinds = Counter(row["end"] for row in ends)
    layouts = sorted({(row["dp"], row["tp"]) for row in ends})
    again = sum(row["last"] - row["checkpoint"] for row in ends if row["trained"])
    words = [
        f"{len(ends)} ends: " + ", ".join(f"{n} by {kind}" for kind, n in kinds.most_common()),
        f"{sum(row['in_save'] for row in ends)} of them within a save and "
        f"{sum(not row['trained'] for row in ends)} before the first step",
        f"dp x tp were {', '.join(f'{dp} x {tp}' for dp, tp in layouts)}",
        f"{sum(row['way'] == '--compile' for row in ends)} of these starts compiled",
        f"{again} of {result['steps']:,} steps had to be done again",
    ]
    rows = []
    for name, text in NAMES.items():
        row = result["compared"][name]
        numbers = (f"{row[key]:.0e}" for key in ("in_these", "in_all", "weights"))
        rows.append([text, row["same_steps"], *numbers, f"{row['last_loss']:.4f}"])
    text = "; ".join(words) + f".\n\n{markdown(HEAD, rows)}\n\nDifferences are relative. "
    if result["first_other_route"]:
        text += (
            f"In step {result['first_other_route']} the two runs of transformers send a token to "
            "different experts for the first time. "
        )
    text += (
        "The largest resident set of a rank in the run that was never ended was "
        f"{first[1]:.3f} GiB up to step {first[0]:,}, and {last[1]:.3f} up to step {last[0]:,}."
    )
    return f"{text}\n\n{caption(result['environment'])}\n"


def soak(folder: Path, steps: int, ends: int, seed: int, experts_per_token: int) -> dict:
    """Train four times, and compare."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    script.datasets.config.HF_DATASETS_CACHE = folder / "cache"
    write_inputs(folder, experts_per_token)
    *reference, routes = plain(folder, steps, 1)
    *halves, other_routes = plain(folder, steps, 2)
    found, result = {"halves": halves}, {}
    result["first_other_route"] = first_other_route(routes, other_routes)
    to_the_end(Start((2, 2), flags_of(folder, steps, "calm"), folder / "log-calm"))
    rows = [row for row in jobs.rows(folder / "calm") if "loss" in row]
    moments = rows[len(rows) // 10], rows[-1]
    result["memory_gib"] = [(row["step"], row["peak_mem_gib"]) for row in moments]
    result["ends"] = often_ended(folder, steps, ends, seed)
    for name in ("calm", "often"):
        exported = transformers.AutoModelForCausalLM.from_pretrained(folder / name / "export")
        found[name] = jobs.losses(folder / name), exported
    result["compared"] = {name: compare(*pair, reference) for name, pair in found.items()}
    return result


def main(argv: list[str] | None = None) -> None:
    """Write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=400)
    add("--ends", type=int, default=24, help="how often the run is killed or asked to stop")
    add("--seed", type=int, default=0, help="of layouts, flags, ends and their moments")
    add("--experts-per-token", type=int, default=3, help=f"with all {EXPERTS} none can be another")
    add("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        try:
            how = args.steps, args.ends, args.seed, args.experts_per_token
            result |= soak(Path(name), *how)
        finally:
            for process in processes_of(Path(name)):
                process.kill()
    (args.out / "soak.json").write_text(compact_json(result, 2) + "\n")
    text = summary(result)
    (args.out / "soak.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
