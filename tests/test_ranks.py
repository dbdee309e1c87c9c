"""The harness itself: what fails in a rank is seen, and no process is left."""

import os
import subprocess
import time
from pathlib import Path

import torch.distributed as dist

from ranks import Ranks, run_group


def wait_for_the_other() -> None:
    dist.barrier()


def fail_on_1() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("on purpose")
    wait_for_the_other()


CHECKS = {"right": wait_for_the_other, "wrong": fail_on_1, "after": wait_for_the_other}


def test_group():
    """A check that fails on one rank fails with that rank's traceback, and ends the group."""
    results = run_group("test_ranks", 2, tuple(CHECKS), 30)
    assert results["right"] == ""
    assert "---- rank 1:\nTraceback" in results["wrong"] and "on purpose" in results["wrong"]
    assert results["after"] == "not run, because wrong failed before it"


def hang() -> None:
    print("child", subprocess.Popen(["sleep", "600"]).pid, flush=True)
    time.sleep(600)


def test_time_limit(tmp_path):
    """Ranks that hang are killed, with what they have started."""
    job = Ranks(2, hang, tmp_path / "log")
    while (tmp_path / "log").read_text().count("child") < 2:
        time.sleep(0.1)
    children = [line.split()[1] for line in job.wait(0.1).splitlines()]
    assert job.codes() == [-9, -9] and len(children) == 2
    for pid in children:
        state = Path("/proc", pid, "stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


def show_server() -> None:
    print(Path("/proc", str(os.getppid()), "status").read_text())


def test_one_thread(tmp_path):
    """The server forks safely, because it has no second thread."""
    assert "\nThreads:\t1\n" in Ranks(1, show_server, tmp_path / "log").succeed()
