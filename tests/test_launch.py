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
            "MASTER_PORT": str(port), "JOIN_TIMEOUT": "12", "LOG_DIR": str(tmp_path / f"log{node}"),
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


@pytest.mark.slow
def test_two_hosts(hosts, tmp_path, flags):
    """The same losses as one host; a host that dies ends the other; both go on from there."""
    start, kill = hosts
    folder = tmp_path / "two"
    output = lambda: (tmp_path / "host0.txt").read_text()[-5000:]  # noqa: E731
    code, text = torchrun(4, *flags, "-e", "one", "--max-steps", 30)
    assert code == 0, text
    both = [start(node, [*flags, "-e", "two", "--max-steps", 30]) for node in (0, 1)]
    wait_for_step(folder, 5, both)
    kill(1)
    begin = time.monotonic()
    assert both[0].wait(80) != 0, output()
    assert time.monotonic() - begin < 70
    said = (tmp_path / "host0.txt").read_text()
    assert said.count("\nerror:") == said.count("error: rank 0 has lost another") == 1, output()
    assert max(losses(folder)) < 30
    both = [start(node, [*flags, "-e", "two", "--max-steps", 30]) for node in (0, 1)]
    assert [p.wait(120) for p in both] == [0, 0], output()
    assert "resuming after step" in (tmp_path / "host0.txt").read_text(), output()
    assert losses(folder) == losses(tmp_path / "one")
    assert "training loss" not in (tmp_path / "host1.txt").read_text(), "rank 0 speaks alone"


SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of this machine alone; runs one of its commands and returns the output."""
    programs = ("slurmctld", "slurmd", "sbatch")
    path = os.environ["PATH"] + ":/usr/sbin"
    if os.geteuid() or not all(shutil.which(program, path=path) for program in programs):
        pytest.skip("needs root and Slurm (slurm-wlm)")
    host, folder = os.uname().nodename.split(".")[0], tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    ports = [free_port(), free_port()]
    text = SLURM.format(host=host, folder=folder, ports=ports, cpus=os.cpu_count())
    conf.write_text(text)
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": path}
    daemons = []
    with open(folder / "daemons.txt", "w") as log:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            ))  # fmt: skip
            time.sleep(1)

    def call(*words, **variables) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=env | variables, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    deadline = time.monotonic() + 30
    while "idle" not in call("sinfo", "-h", "-o", "%T"):
        assert time.monotonic() < deadline, (folder / "daemons.txt").read_text()[-3000:]
        time.sleep(0.5)
    yield call
    subprocess.run(["scancel", "--full", "--user", "root"], env=env)
    time.sleep(1)
    kill_all(daemons)


@pytest.mark.slow
def test_slurm(slurm, tmp_path, flags):
    """A job is told to save and goes back into the queue, is preempted, and ends as if neither."""
    flags = [*flags, "--max-steps", 400, "--ckpt-freq", 1000]
    code, text = torchrun(2, *flags, "-e", "calm")
    assert code == 0, text
    folder, output = tmp_path / "run", tmp_path / "job.txt"
    told = slurm("sbatch", "-c", os.cpu_count(), "--output", output, LAUNCH, *flags, "-e", "run",
                 NPROC="2", OMP_NUM_THREADS="1")  # fmt: skip
    job = told.split()[-1]

    def state() -> dict:
        words = slurm("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def resumed(times: int, timeout_s: float = 90) -> int:
        """Wait until the job has gone on so often; the step after which it did."""
        deadline = time.monotonic() + timeout_s
        while output.read_text().count("resuming after step") < times:
            assert time.monotonic() < deadline, output.read_text()[-5000:] + str(state())
            time.sleep(0.2)
        return int(output.read_text().split("resuming after step ")[-1].split(",")[0])

    wait_for_step(folder, 20, [])
    slurm("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    first = resumed(1)
    wait_for_step(folder, first + 20, [])
    slurm(
        "sbatch", "-p", "high", "-c", os.cpu_count(), "-o", tmp_path / "high.txt", "--wrap=sleep 1"
    )
    second = resumed(2)
    assert 20 <= first < second < 400 and state()["Restarts"] == "2", state()
    deadline = time.monotonic() + 90
    while (now := state())["JobState"] != "COMPLETED":
        assert time.monotonic() < deadline and now["JobState"] in ("RUNNING", "COMPLETING"), (
            output.read_text()[-5000:] + str(now)
        )
        time.sleep(0.2)
    assert losses(folder) == losses(tmp_path / "calm")
