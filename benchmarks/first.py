"""A newcomer's first commands, timed: python benchmarks/first.py

Clones this repository into an empty directory, with a Python that has no packages, and pastes the
first two commands of the README there. Writes first.json and first.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, caption, environment


def main(argv: list[str] | None = None) -> None:
    """Clone, run, write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--with-tests", action="store_true", help="also time bash tests/run.sh")
    args = parser.parse_args(argv)
    result = {"environment": environment(), "commands": {}}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/clone"], check=True)
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/empty"], check=True)
        path = f"{folder}/empty/bin:{os.environ['PATH']}"
        for command in ["bash launch.sh -e first"] + ["bash tests/run.sh"] * args.with_tests:
            begin = time.perf_counter()
            done = subprocess.run(
                command.split(), cwd=f"{folder}/clone", env=os.environ | {"PATH": path}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip
            text = done.stdout.replace(f"{folder}/clone", ".")
            lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
            noise = r"\s*\d+%|Tokeniz|Pack|Gener|WARNING: "  # progress bars, pip
            kept = [line for line in lines if not re.match(noise, line)]
            result["commands"][command] = {
                "seconds": round(time.perf_counter() - begin), "output": kept,
            }  # fmt: skip
            print(command, result["commands"][command], flush=True)
    (args.out / "first.json").write_text(json.dumps(result, indent=1) + "\n")
    run = result["commands"]["bash launch.sh -e first"]
    shown = "\n".join(run["output"])
    text = f"```\n{shown}\n```\n\n{run['seconds']} s with the installation. "
    (args.out / "first.md").write_text(f"{text}{caption(result['environment'])}\n")


if __name__ == "__main__":
    main()
