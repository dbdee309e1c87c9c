"""A run can be killed, stopped, moved to another layout and continued."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from rank_groups import ROOT, free_port, kill_all, run


@pytest.mark.parametrize(
    "check",
    [
        "controls", "resume_pairs", "refusals", "signals", "faults", "whole_runs",
        pytest.param("compiled_runs", marks=pytest.mark.slow),
        pytest.param("kills", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_interrupted(tmp_path, check):
    code, output = run(
        [sys.executable, ROOT / "tests" / "interrupted_runs.py", check, tmp_path], 600
    )
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


FAILS = """
import os, runpy, sys, transformers
forward = transformers.LlamaForCausalLM.forward

def fail(self, *args, **kwargs):
    if not self.training and os.environ["RANK"] in os.environ["FAILING"]:
        raise KeyError("evaluation")
    return forward(self, *args, **kwargs)

transformers.LlamaForCausalLM.forward = fail
sys.path.insert(0, os.environ["ROOT"])
runpy.run_path(os.environ["ROOT"] + "/train_llm.py", run_name="__main__")
"""


@pytest.mark.parametrize("failing", ["0 1 2", "2"])
def test_failed_evaluation(tmp_path, failing):
    """An exception on all ranks or on one: its traceback once, and not a step is lost."""
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 3]
    command += ["--master-port", free_port(), tmp_path / "fails.py", "-d", tmp_path / "text.txt"]
    command += ["-s", 32, "-b", 1, "--max-steps", 4, "-e", "run", "--save-dir", tmp_path]
    env = {"ROOT": str(ROOT)}
    code, output = run(command, 120, FAILING=failing, **env)
    assert code == 1 and output.count("KeyError: 'evaluation'") == 1, output
    saved = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert f"the newest checkpoint is {saved}; this goes on from it:" in output, output
    script = ROOT / "train_llm.py"  # as which fails.py runs it
    again = shlex.join(["torchrun", "--nproc-per-node", "3", *map(str, [script, *command[8:]])])
    assert again in output, output
    code, output = run(command, 120, FAILING="nobody", **env)
    assert code == 0 and "resuming after step 4" in output, output
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows if "loss" in row] == [1, 4]
    assert [row["step"] for row in rows if "val_loss" in row] == [4]
    assert (tmp_path / "run" / "export" / "config.json").exists()
