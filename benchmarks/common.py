"""What the benchmarks share: where a result was measured, and how the script is started."""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def environment() -> dict:
    """Hardware, versions, commit and this command, to stand beside every result."""
    import datasets
    import torch
    import transformers

    commit = ""  # a copy without a repository, or a machine without git
    with contextlib.suppress(OSError):
        git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {hardware}"
    return {
        "command": command, "commit": commit or "unknown", "hardware": hardware,
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "datasets": datasets.__version__,
    }  # fmt: skip


def caption(env: dict) -> str:
    """The environment in a line of Markdown."""
    return (
        f"{env['hardware']}, Python {env['python']}, torch {env['torch']}, transformers "
        f"{env['transformers']}, commit {env['commit']}: `{env['command']}`"
    )


def launch(ranks: int, *command) -> dict:
    """How subprocess starts a Python command line on CPU ranks, with torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    words = [str(word) for word in [*words, "--master-port", port, *command]]
    return {"args": words, "cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}


def torchrun(ranks: int, *command, timeout_s: float = 3600) -> None:
    """Run a Python command line on CPU ranks; raises with its output if it fails."""
    how = launch(ranks, *command)
    done = subprocess.run(
        **how, timeout=timeout_s, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(how['args'])} ended with {done.returncode}\n{done.stdout}")


def compact_json(value, depth: int = 3) -> str:
    """JSON that breaks lines down to `depth` only, so that a result file stays short."""
    if depth and value and isinstance(value, dict):
        parts = (f"{json.dumps(key)}: {compact_json(v, depth - 1)}" for key, v in value.items())
        return "{\n" + ",\n".join(parts) + "\n}"
    if depth and value and isinstance(value, list):
        return "[\n" + ",\n".join(compact_json(v, depth - 1) for v in value) + "\n]"
    return json.dumps(value)


def markdown(head: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers are aligned right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, align, *rows])
