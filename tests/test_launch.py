"""launch.sh: help, two hosts as two network namespaces, and a real Slurm on this machine."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ranks import ROOT, free_port, kill_all, run, torchrun

TEXT = "All work and no play makes Jack a dull boy. "
LAUNCH = ROOT / "launch.sh"


def losses(folder: Path) -> dict:
    """Loss of each step in a run's metrics; every step has to be there once."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(found) == sum("loss" in row for row in rows), "a step is there twice"
    return found


def wait_for_step(folder: Path, step: int, processes: list, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, "the run does not get on"
        assert all(p.poll() is None for p in processes), "the run has ended"
        time.sleep(0.02)


@pytest.fixture
def flags(tmp_path) -> list:
    """Flags of a short run."""
    (tmp_path / "text.txt").write_text(TEXT * 400)
    flags = ["--tp", 2, "-d", tmp_path / "text.txt", "-s", 32, "-b", 1, "--log-freq", 1]
    return [*flags, "--ckpt-freq", 2, "--save-dir", tmp_path]


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = [LAUNCH, ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
    code, output = run(["shellcheck", "-x", *files], 60)
    assert code == 0, output


def test_help():
    code, output = run(["bash", LAUNCH, "--help"], 60)
    assert code == 0 and "sbatch --nodes 2 launch.sh" in output and "JOIN_TIMEOUT" in output
    assert output.startswith("Train from a fresh clone")


def test_missing_node():
    """A node that does not come is named, within the timeout."""
    node = {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "JOIN_TIMEOUT": "3"}
    code, output = run(["bash", LAUNCH], 60, MASTER_PORT=str(free_port()), **node)
    assert code == 1 and output.count("error:") == 1, output
    assert "no node with NODE_RANK [1, 2] within 3 s" in output and "Traceback" not in output
    node |= {"NODE_RANK": "1"}
    code, output = run(["bash", LAUNCH], 60, MASTER_PORT=str(free_port()), **node)
    assert code == 1 and output.count("error:") == 1, output
    assert "node 0 cannot be reached at 127.0.0.1" in output and "Traceback" not in output
    code, output = run(["bash", LAUNCH], 60, NNODES="2")
    assert code == 1 and "MASTER_ADDR: is needed with NNODES" in output, output


@pytest.fixture
def hosts(tmp_path):
    """Two network namespaces with an address each; starts a command on one of them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip")
    names = [f"train{os.getpid()}{side}" for side in "ab"]
    links = [f"v{os.getpid()}{side}" for side in "ab"]

    def ip(*words, check=True):
        return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)

    for name in names:
        if ip("netns", "add", name, check=False).returncode:
            pytest.skip("this machine does not allow network namespaces")
    ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    for i, (name, link) in enumerate(zip(names, links, strict=True)):
        ip("link", "set", link, "netns", name)
        ip("-n", name, "addr", "add", f"10.83.0.{i + 1}/24", "dev", link)
        for device in (link, "lo"):
            ip("-n", name, "link", "set", device, "up")
    started, port = [], free_port()

    def start(node: int, flags: list) -> subprocess.Popen:
        env = {
            "NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "10.83.0.1", "NPROC": "2",
            "MASTER_PORT": str(port), "JOIN_TIMEOUT": "20", "LOG_DIR": str(tmp_path / f"log{node}"),
            "GLOO_SOCKET_IFNAME": links[node],
        }  # fmt: skip
        command = ["ip", "netns", "exec", names[node], "bash", LAUNCH, *flags]
        with open(tmp_path / f"host{node}.txt", "a") as output:
            started.append(subprocess.Popen(
                [str(word) for word in command], env=os.environ | env, stdout=output,
                stderr=output, start_new_session=True,
            ))  # fmt: skip
        return started[-1]

    def kill(node: int) -> None:
        for pid in ip("netns", "pids", names[node]).stdout.split():
            os.kill(int(pid), 9)

    yield start, kill
    for node in (0, 1):
        kill(node)
    kill_all(started)
    for name in names:
        ip("netns", "del", name)


def test_two_hosts(hosts, tmp_path, flags):
    """The same losses as one host; a host that dies ends the other; both go on from there."""
    start, kill = hosts
    folder = tmp_path / "two"
    output = lambda: (tmp_path / "host0.txt").read_text()[-5000:]  # noqa: E731
    code, text = torchrun(4, *flags, "-e", "one", "--max-steps", 60)
    assert code == 0, text
    both = [start(node, [*flags, "-e", "two", "--max-steps", 60]) for node in (0, 1)]
    wait_for_step(folder, 5, both)
    kill(1)
    begin = time.monotonic()
    assert both[0].wait(80) != 0, output()
    assert time.monotonic() - begin < 70
    assert output().count("error: this node's ranks have ended") == 1, output()
    assert max(losses(folder)) < 60
    both = [start(node, [*flags, "-e", "two", "--max-steps", 60]) for node in (0, 1)]
    assert [p.wait(120) for p in both] == [0, 0], output()
    assert "resuming after step" in output(), output()
    assert losses(folder) == losses(tmp_path / "one")
    assert "training loss" not in (tmp_path / "host1.txt").read_text(), "rank 0 speaks alone"
