"""The same training on different layouts: the same loss, other speed, memory and traffic.

    python benchmarks/layouts.py                        # 1x1 1x8 2x4 4x2 8x1 2x3, 10 minutes
    python benchmarks/layouts.py --layouts 1x1 2x2 --steps 5 --out /tmp/docs

Runs the script itself with torchrun on CPU ranks. Every layout trains on the same global batches.
Writes layouts.json and layouts.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, caption, compact_json, environment, markdown, torchrun

import train_llm as script

KEPT = {"step", "loss", "grad_norm", "tokens", "val_loss"}


def train(layout: str, batch_size: int, steps: int, folder: Path) -> list[dict]:
    """Metrics of the script on a layout, a row a step and one of the evaluation."""
    dp, tp = map(int, layout.split("x"))
    flags = ["--tp", tp, "-b", batch_size, "--max-steps", steps, "--log-freq", 1, "--device", "cpu"]
    flags += ["-e", f"{layout}-{batch_size}", "--save-dir", folder]
    torchrun(dp * tp, ROOT / "train_llm.py", *flags)
    metrics = folder / f"{layout}-{batch_size}" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key in KEPT} for row in rows]


def sent(layout: str, batch_size: int, seq_length: int) -> dict:
    """Bytes that a rank sends in a step over tp and over dp, from plan.py."""
    dp, tp = map(int, layout.split("x"))
    config = script.built_in_model()[0]
    sizes = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
    )  # fmt: skip
    with tempfile.NamedTemporaryFile() as rows:
        command = [sys.executable, ROOT / "benchmarks" / "plan.py", "--json", rows.name]
        command += ["-m", ",".join(map(str, sizes)), "--ranks", dp * tp, "--dtype", "fp32"]
        command += ["-s", seq_length, "-b", batch_size]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        row = next(r for r in json.load(rows) if r["tp"] == tp and not r["recompute"])
    return {name: row[name] for name in ("sent_tp", "sent_dp")}


def summary(result: dict) -> list[list]:
    """A table row per layout of the runs with the same global batch."""
    rows, reference = [], None
    for layout, run in result["same_batch"].items():
        losses = [row["loss"] for row in run["metrics"] if "loss" in row]
        reference = reference or losses
        apart = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
        rows.append([
            layout.replace("x", " x "), run["batch_size"], f"{losses[0]:.6f}", f"{losses[-1]:.6f}",
            f"{run['metrics'][-1]['val_loss']:.6f}", f"{apart:.1e}",
            f"{run['sent_tp'] / 1e6:.2f}", f"{run['sent_dp'] / 1e6:.2f}",
        ])  # fmt: skip
    return rows


HEAD = [
    "dp x tp", "-b", "first loss", "last loss", "validation loss", "largest difference to the "
    "first row", "MB sent over tp", "over dp",
]  # fmt: skip

EXPLAINED = (
    "The same weights, sequences and global batch of {global_batch_size}, so -b sequences for each "
    "dp rank. The last loss is that of step {steps}, differences are relative and the largest of "
    "all steps, and MB are those that a rank sends in a step, from plan.py."
)


def main(argv: list[str] | None = None) -> None:
    """Train on every layout, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layouts", nargs="+", default=["1x1", "1x8", "2x4", "4x2", "8x1", "2x3"], help="dp x tp")
    add("--global-batch-size", type=int, default=24, help="sequences a step")
    add("--steps", type=int, default=40)
    add("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    result = {
        "environment": environment(),
        "global_batch_size": args.global_batch_size, "same_batch": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for layout in args.layouts:
            batch_size = args.global_batch_size // int(layout.split("x")[0])
            run = {"batch_size": batch_size, **sent(layout, batch_size, 256)}
            run["metrics"] = train(layout, batch_size, args.steps, Path(folder))
            result["same_batch"][layout] = run
            print(layout, run["metrics"][-1], flush=True)
    (args.out / "layouts.json").write_text(compact_json(result) + "\n")
    text = f"{markdown(HEAD, summary(result))}\n\n{EXPLAINED.format(**vars(args))}\n\n"
    text += f"{caption(result['environment'])}\n"
    (args.out / "layouts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
