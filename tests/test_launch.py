"""launch.sh: one node, several on this machine, two network namespaces, and a real Slurm."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from pathlib import Path

import pytest

from ranks import ROOT, children, free_port, kill_all, run, torchrun

TEXT = "All work and no play makes Jack a dull boy. "
LAUNCH = ROOT / "launch.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # with the Python of these tests


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
    assert code == 0 and "sbatch --nodes 2 launch.sh" in output and "STOP_TIMEOUT" in output
    assert output.startswith("Train from a fresh clone")


def test_python(tmp_path):
    """Too old packages are not taken, links are followed, and a .venv without pip is completed."""
    bash = lambda file, words, **env: run(["bash", "-c", f"source {file}; {words}"], 60, **env)  # noqa: E731
    fits = f"fits {sys.executable} tqdm"
    assert bash(LAUNCH, fits)[0] == 0
    for old in ("torch-2.12.1", "transformers-5.22.0"):
        (tmp_path / old / f"{old}.dist-info").mkdir(parents=True)
        name, version = old.split("-")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / old / f"{old}.dist-info" / "METADATA").write_text(metadata)
        assert bash(LAUNCH, fits, PYTHONPATH=str(tmp_path / old))[0] != 0, old
    for name in ("random", "signal"):  # a file of the user's, not a module
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not a module of Python')")
    assert bash(LAUNCH, f"cd {tmp_path}; {fits}")[0] == 0
    (tmp_path / "link").symlink_to(LAUNCH)
    (tmp_path / "linked").symlink_to("link")
    assert bash(tmp_path / "linked", 'echo "$here"') == (0, f"{ROOT}\n")
    clone = tmp_path / "clone"
    venv.create(clone / ".venv", with_pip=False)
    shutil.copy(LAUNCH, clone)
    (clone / "requirements.txt").write_text("")
    words = f"cd {tmp_path}; fits() {{ false; }}; find_python requirements.txt tqdm; "
    words += 'cd /; "$python" -m pip --version'
    code, output = bash(clone / "launch.sh", words, PATH=PATH)
    assert code == 0 and "pip" in output and str(clone) in output.splitlines()[-1], output


@pytest.mark.parametrize(
    ("flags", "kept"),
    [("-e NAME", True), ("-eNAME", True), ("--tp 2 --experiment-name NAME", True),
     ("--experiment-name=NAME --tp 2", True), ("--eval-freq 5", False), ("", False)],
)  # fmt: skip
def test_back_into_the_queue(flags, kept):
    """A job whose time is over goes on later, however its results are named."""
    words = """
        srun() { :; }
        scontrol() { if [[ $1 == requeue ]]; then echo requeued; else echo PreemptTime=2026; fi; }
        SLURM_JOB_ID=1 slurm_batch """
    code, output = run(["bash", "-c", f"source {LAUNCH}; {words} {flags}"], 20)
    said = (
        "requeued\n" if kept else "error: the time is over, and nothing was kept without -e NAME\n"
    )
    assert (code, output) == (0 if kept else 1, said)


STUB = r"""
import os, signal, sys, time
signal.alarm(150)  # no rank stays longer, whatever becomes of the test
rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
told = lambda name: os.path.exists(os.path.join(os.path.dirname(__file__), name))
def wait_for(name):
    while not told(name):
        time.sleep(0.05)
def say(text):  # in one piece, which print does not write
    os.write(1, f"{text}\n".encode())
say(f"rank {rank} of {os.environ['WORLD_SIZE']}, restart {restart}, {sys.argv[1:]}")
"""


class Launched:
    """A running launch.sh, with what it has printed."""

    def __init__(self, command: list, clone: Path, env: dict):
        self.clone, self.output = clone, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(word) for word in command], env=os.environ | env, cwd=clone, stdout=self.output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def text(self) -> str:
        return os.pread(self.output.fileno(), 10**6, 0).decode()

    def says(self, text: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def ends(self, timeout_s: float = 60) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text()}") from None

    def kill(self) -> None:
        """With its ranks, each of which has a session of its own."""
        ranks = children(self.process)
        kill_all([self.process])
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


class Launcher:
    """A copy of launch.sh with another script beside it, and what it has started."""

    def __init__(self, clone: Path):
        self.clone, self.port, self.started = clone, str(free_port()), []
        clone.mkdir()
        for name in ("launch.sh", "requirements.txt"):
            shutil.copy(ROOT / name, clone)

    def write(self, code: str) -> Path:
        (self.clone / "train_llm.py").write_text(STUB + textwrap.dedent(code))
        return self.clone

    def __call__(self, code: str, *words, before=(), **env) -> Launched:
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "PATH": PATH} | env
        command = [*before, "bash", self.clone / "launch.sh", *words]
        self.started.append(Launched(command, self.write(code), env))
        return self.started[-1]


@pytest.fixture
def launch(tmp_path):
    """Starts a launch.sh of its own; ends what is left."""
    launcher = Launcher(tmp_path / "clone")
    yield launcher
    for job in launcher.started:
        job.kill()


def test_one_node(launch):
    """4 ranks as 2 x 2, also from a folder with a file that is named as a module of Python."""
    for name in ("random", "signal"):
        (launch.clone / name).with_suffix(".py").write_text("raise SystemExit('not a module')")
    job = launch("import random, tempfile", "-s", "8", NPROC="")
    assert job.ends() == 0, job.text()
    said = [f"rank {rank} of 4, restart 0, ['--tp', '2', '-s', '8']" for rank in range(4)]
    assert sorted(job.text().splitlines()) == said
    job = launch("", NPROC="3")  # which 2 does not divide
    assert job.ends() == 0 and job.text().count("of 3, restart 0, []\n") == 3, job.text()


@pytest.mark.slow
def test_restart(launch):
    """With MAX_RESTARTS a rank that dies takes the others with it, and all begin again."""
    code = """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        if restart == "0":
            os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else wait_for("never")
        say(f"ranks {int(total)}")
        os._exit(0)
    """
    job = launch(code, NPROC="2", MAX_RESTARTS="1")
    assert job.ends() == 0 and job.text().count("ranks 2\n") == 2, job.text()


@pytest.mark.slow
def test_missing_node(launch):
    """Nodes do not wait for another one forever; here they do for seconds instead of minutes."""
    env = {"NNODES": "3", "PET_RDZV_CONF": "timeout=3"}
    both = [launch("", NODE_RANK=str(node), **env) for node in (0, 1)]
    alone = launch("", NODE_RANK="1", MASTER_PORT=str(free_port()), **env)
    for job in both:
        assert job.ends() == 1 and "DistStoreError" in job.text(), job.text()
        assert "rank " not in job.text().replace("local_rank ", ""), job.text()
    assert "2/3 clients joined" in both[0].text()
    assert alone.ends() == 1 and "timed out after 3000ms" in alone.text(), alone.text()
    for name in ("MASTER_ADDR", "NODE_RANK"):
        job = launch("", **({"NNODES": "2", "NODE_RANK": "0"} | {name: ""}))
        assert job.ends() == 1 and f"{name}: is needed with NNODES" in job.text(), job.text()


def test_error_is_said_once(launch):
    """An error that every node has, as a wrong flag, is not tried again; ranks are in order."""
    both = [
        launch("print(f'error: {rank}'); sys.exit(1)", NNODES="2", NODE_RANK=str(node), NPROC="1",
               MASTER_ADDR="localhost")
        for node in (1, 0)
    ]  # fmt: skip
    for node, job in zip((1, 0), both, strict=True):
        assert job.ends() == 1 and job.text().count(f"error: {node}\n") == 1, job.text()


@pytest.mark.slow
def test_nohup(launch):
    """A terminal that closes ends a run, but not under nohup."""
    code = "wait_for('end')"
    job = launch(code, before=["nohup"], NPROC="1")
    job.says("rank 0 of")
    os.killpg(job.process.pid, signal.SIGHUP)
    time.sleep(1)
    (job.clone / "end").touch()
    assert job.ends(20) == 0 and "closing signal" not in job.text(), job.text()
    (job.clone / "end").unlink()
    job = launch(code, before=["env", "--default-signal=HUP"], NPROC="1")
    job.says("rank 0 of")
    os.killpg(job.process.pid, signal.SIGHUP)
    assert job.ends(20) != 0 and "closing signal SIGHUP" in job.text(), job.text()


@pytest.mark.slow
def test_time_to_save(launch):
    """Ranks that need more than 30 s for a step and a checkpoint have them."""
    code = """
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(33), print("saved", flush=True), sys.exit()))
        print("ready", flush=True)
        wait_for("never")
    """  # noqa: E501
    job = launch(code, NPROC="1")
    job.says("ready")
    job.process.terminate()
    job.ends()
    assert "saved" in job.text(), job.text()


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
            "NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "10.83.0.1", "NPROC": "1",
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": links[node],
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
    code, text = torchrun(2, *flags, "-e", "one", "--max-steps", 30)
    assert code == 0, text
    both = [start(node, [*flags, "-e", "two", "--max-steps", 30]) for node in (0, 1)]
    wait_for_step(folder, 5, both)
    kill(1)
    assert both[0].wait(80) != 0, output()
    assert "onnection" in (tmp_path / "host0.txt").read_text(), output()
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
    path = f"{PATH}:/usr/sbin"
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

    def call(*words, cwd=ROOT, **variables) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=env | variables, cwd=cwd, text=True,
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
def test_slurm(slurm, launch):
    """A job is told to save and goes back into the queue, is preempted, and ends as if neither.

    With a script in place of the real one: that one's signals have a test of their own.
    """
    code = """
        saved, asked = os.path.join(os.path.dirname(__file__), "saved"), []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: asked.append(1))
        step = int(open(saved).read()) if told("saved") else 0
        while step < 150 and not asked:
            step += 1
            if rank == "0":
                print(f"step {step}", flush=True)
            time.sleep(0.1)
        wait_for("saved") if rank == "1" else open(saved, "w").write(str(step))
    """
    output = launch.write(code) / "job.txt"
    words = ["--output", output, "launch.sh", "-erun"]
    told = slurm("sbatch", "-c", os.cpu_count(), *words, cwd=launch.clone, NPROC="2")
    job = told.split()[-1]

    def steps() -> list[int]:
        text = output.read_text() if output.exists() else ""
        return [int(step) for step in re.findall(r"^step (\d+)\n", text, re.MULTILINE)]

    def wait_for(what, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            state = slurm("scontrol", "show", "job", job)
            assert time.monotonic() < deadline, output.read_text() + state
            time.sleep(0.2)

    restarts = lambda: int(re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", job))[1])  # noqa: E731
    wait_for(lambda: len(steps()) >= 10)
    slurm("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    wait_for(lambda: restarts() == 1)
    first = len(steps())
    wait_for(lambda: len(steps()) >= first + 10)
    slurm("sbatch", "-p", "high", "-c", os.cpu_count(), "-o", "/dev/null", "--wrap=sleep 1")
    wait_for(lambda: restarts() == 2)
    assert 10 <= first < len(steps()) < 150
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job))
    assert steps() == list(range(1, 151))
