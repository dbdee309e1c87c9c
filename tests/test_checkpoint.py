"""A run can be killed, stopped, moved to another layout and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ranks import ROOT, free_port, kill_all, run


@pytest.mark.parametrize(
    "check",
    [
        "controls", "resume_pairs", "refusals", "signals", "faults",
        pytest.param("kills", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_forks(tmp_path, check):
    code, output = run([sys.executable, ROOT / "tests" / "forks.py", check, tmp_path], 300)
    assert code == 0, output


@pytest.fixture
def job(tmp_path):
    """A short run under torchrun that may restart once: its process, and a way to wait for it."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "--max-restarts",
        "1",
        "--master-port",
        str(free_port()),
        str(ROOT / "train_llm.py"),
    ]
    command += ["-d", str(tmp_path / "text.txt"), "-s", "32", "-b", "1", "--max-steps", "40"]
    command += ["--log-freq", "1", "--ckpt-freq", "2", "-e", "run", "--save-dir", str(tmp_path)]
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    processes = []

    def start(until_step: int) -> subprocess.Popen:
        with open(log, "w") as output:
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            )
        deadline = time.monotonic() + 90
        while not (metrics.exists() and f'"step": {until_step},' in metrics.read_text()):
            assert processes[-1].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        return processes[-1]

    def steps() -> list[int]:
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        return [row["step"] for row in rows if "loss" in row]

    yield start, log.read_text, steps
    kill_all(processes)


def workers(agent: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that torchrun has started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True)
    return [int(pid) for pid in children.stdout.split()]


def test_restart(job):
    """torchrun starts the ranks again after one was killed, and they go on from a checkpoint."""
    start, log, steps = job
    agent = start(8)
    os.kill(workers(agent)[1], signal.SIGKILL)
    assert agent.wait(120) == 0, log()
    assert "resuming" in log() and steps() == list(range(1, 41))


def test_stop_torchrun(job):
    """SIGTERM to torchrun: the ranks save within its 30 seconds, and the next run goes on."""
    start, log, steps = job
    agent = start(8)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(30) == 1, log()  # torchrun's own code for a signal
    assert "as asked" in log(), log()
    last = steps()[-1]
    assert last < 40
    agent = start(40)
    assert agent.wait(60) == 0, log()
    assert f"after step {last}," in log() and steps() == list(range(1, 41))
