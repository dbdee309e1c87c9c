"""Starts ranks on CPU with gloo, and other processes, so that none is left behind.

Ranks are forked from a server process that has imported the script once (preload.py): a rank
then takes a tenth of a second to start, where a new Python needs four seconds for its imports.
"""

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preload"])
# The server and its ranks have the environment of the moment in which the server starts. pyarrow's
# allocator would start a thread, and a process with threads should not fork.
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip
# Wait for the server at the end, so that its time counts as ours; Python has no public name for it.
atexit.register(multiprocessing.forkserver._forkserver._stop)
STARTED = weakref.WeakSet()  # all Ranks


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def be_rank(function, log: Path, env: dict) -> None:
    """What a forked process does: it ends with what `function` returns, or with 1 if it fails."""
    os.setsid()  # what it starts is in its process group, and is killed with it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with the server
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    code = 1
    try:
        code = function() or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        print(f"---- rank {env['RANK']}:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the script leaves: without Python's finalization


class Ranks:
    """`world_size` ranks that run `function`, which has to be picklable; `log` is their output."""

    def __init__(self, world_size: int, function, log: Path, **env: str):
        os.environ.update(ENVIRONMENT)
        self.log, port = Path(log), str(free_port())
        self.log.write_text("")
        self.processes = []
        STARTED.add(self)
        for rank in map(str, range(world_size)):
            words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world_size)}
            words |= {"LOCAL_WORLD_SIZE": str(world_size), "COLUMNS": "200"}
            words |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **env}
            self.processes.append(SERVER.Process(target=be_rank, args=(function, log, words)))
            self.processes[-1].start()

    def codes(self) -> list[int | None]:
        """Exit code of each rank: None while it runs, -9 if it was killed."""
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        return None in self.codes()

    def kill(self, ranks=None, number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float = 60, grace_s: float | None = None) -> str:
        """The output, once all have ended; they are killed if that takes too long.

        After one rank has failed the others have `grace_s`, if it is given.
        """
        deadline = time.monotonic() + timeout_s
        while self.running() and (left := deadline - time.monotonic()) > 0:
            alive = [process.sentinel for process in self.processes if process.exitcode is None]
            multiprocessing.connection.wait(alive, left)
            if grace_s is not None and any(self.codes()):
                deadline, grace_s = min(deadline, time.monotonic() + grace_s), None
        self.end()
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Kill what still runs, with all that it has started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def succeed(self, timeout_s: float = 60) -> str:
        """The output of ranks that all have to end with code 0."""
        output = self.wait(timeout_s, grace_s=5)
        assert set(self.codes()) == {0}, f"exit codes {self.codes()}\n{output}"
        return output


def run_checks(checks: dict, folder: str) -> None:
    """What each rank of a group does; it leaves a file for each check that has passed."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, check in checks.items():
        check()
        Path(folder, f"{name}.{os.environ['RANK']}").touch()
    dist.barrier()


@functools.cache
def run_group(module: str, world_size: int, names: tuple[str, ...], timeout_s: float) -> dict:
    """Run checks of a test module in one group of ranks; returns {name: "" or what went wrong}."""
    checks = {name: sys.modules[module].CHECKS[name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        function = functools.partial(run_checks, checks, folder)
        output = Ranks(world_size, function, Path(folder, "log")).wait(timeout_s, grace_s=5)
        done = [all(Path(folder, f"{name}.{rank}").exists() for rank in range(world_size))
                for name in names]  # fmt: skip
    failed = done.index(False) if False in done else len(names)
    results = dict.fromkeys(names[:failed], "")
    for name in names[failed:]:
        results[name] = f"not run, because {names[failed]} failed before it"
    if failed < len(names):
        results[names[failed]] = f"{names[failed]} on {world_size} ranks:\n{output[-20_000:]}"
    return results


def passes(request, world_size: int, names: list[str], name: str) -> None:
    """Fail with every rank's report unless check `name`, one of `names`, passed on its group."""
    import pytest

    report = run_group(request.module.__name__, world_size, tuple(names), 600)[name]
    if report:
        pytest.fail(report, pytrace=False)


def children(process: subprocess.Popen) -> list[int]:
    """Process ids of what a process has started, as torchrun its ranks."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    return [int(pid) for pid in subprocess.run(command, capture_output=True).stdout.split()]


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
