"""Start a group of ranks once and run many checks in it, on CPU with gloo.

A check is a function without arguments, named as its test is. It runs on every rank of a group of
processes; if it fails on a rank, the group ends, with the traceback of each rank, and the checks
after it count as not run.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def kill_all(processes: list[subprocess.Popen]) -> None:
    """Kill processes that lead a session of their own, with all they started."""
    for p in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def run(command: list, timeout_s: float, **env: str) -> tuple[int, str]:
    """Exit code and joined output of a command; AssertionError with the output if it hangs."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=os.environ | {"COLUMNS": "200"} | env,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        kill_all([process])
        output.seek(0)
        text = output.read()
    assert code is not None, f"still running after {timeout_s} s:\n{text}"
    return code, text


def torchrun(ranks: int, *args, timeout_s: float = 120, **env: str) -> tuple[int, str]:
    """Exit code and output of the script under torchrun with `ranks` ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    launch += ["--master-port", free_port(), ROOT / "train_llm.py"]
    return run(launch + list(args), timeout_s, **env)


@functools.cache
def run_group(module: str, world_size: int, names: tuple[str, ...], timeout_s: float) -> dict:
    """Run checks of a test module in one group of ranks; returns {name: "" or what went wrong}."""
    with tempfile.TemporaryDirectory() as folder:
        processes, port = [], free_port()
        for rank in range(world_size):
            env = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            }  # fmt: skip
            with open(f"{folder}/{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, module, folder, *names],
                        env=os.environ | {k: str(v) for k, v in env.items()},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() not in (None, 0) for p in processes):  # let the others report as well
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.1)
        kill_all(processes)
        results, failed = {}, None
        for name in names:
            files = [Path(folder, f"{rank}.{name}.json") for rank in range(world_size)]
            reports = [json.loads(f.read_text()) if f.exists() else None for f in files]
            if failed:
                results[name] = f"not run, because {failed} failed before it"
            elif all(report == "" for report in reports):
                results[name] = ""
            else:
                failed, lines = name, [f"{name} on {world_size} ranks"]
                for rank, report in enumerate(reports):
                    if report is None:
                        log = Path(folder, f"{rank}.log").read_text()[-3000:]
                        report = f"did not finish; its output ends:\n{log}"
                    lines.append(f"---- rank {rank}: {report or 'passed'}")
                results[name] = "\n".join(lines)
        return results


def passes(request: pytest.FixtureRequest, world_size: int, names: list[str], name: str) -> None:
    """Fail with every rank's report unless check `name`, one of `names`, passed on its group."""
    report = run_group(request.module.__name__, world_size, tuple(names), 600)[name]
    if report:
        pytest.fail(report, pytrace=False)


def main(module: str, folder: str, *names: str) -> None:
    """What each rank of a group does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    checks = __import__(module).CHECKS
    for name in names:
        report = Path(folder, f"{os.environ['RANK']}.{name}.json")
        try:
            checks[name]()
        except BaseException:
            report.write_text(json.dumps(traceback.format_exc()))
            raise
        report.write_text('""')
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
