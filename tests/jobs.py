"""Runs of the script itself on forked ranks: what they write, and hooks that break them.

A hook is called in every rank before the script starts. All that a test changes inside the script
is in the hooks, and what is said of files is in the functions after them.
"""

import ctypes
import functools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint.format_utils as format_utils
from transformers import AutoModelForCausalLM

import train_llm as script
from ranks import Ranks

TEXT = "All work and no play makes Jack a dull boy. "
RUN = ["-s", 32, "-b", 1, "--log-freq", 1, "--device", "cpu"]


def run_script(argv: list[str], hooks: tuple = ()) -> int:
    """What each rank does: the script as torchrun would start it, after the hooks."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    for hook in hooks:
        hook()
    return script.run(argv)


class Job(Ranks):
    """A run of the script on text.txt in `folder`, which keeps its results there, too."""

    def __init__(self, folder: Path, ranks: int, *flags, hooks: tuple = (), **env: str):
        (folder / "text.txt").write_text(TEXT * 400)
        argv = ["-d", folder / "text.txt", "--save-dir", folder, *RUN, *flags]
        function = functools.partial(run_script, [str(word) for word in argv], hooks)
        super().__init__(ranks, function, folder / "log", **env)

    def fail(self, message: str, nodes: int = 1) -> str:
        """The output of a job that fails and says `message` once, as its error.

        The other ranks are ended soon after one has failed, as torchrun would do it. `nodes` of
        one rank each do not see each other's turn, and each of them says it.
        """
        output = self.wait(grace_s=0.5)
        assert 1 in self.codes() and set(self.codes()) <= {1, -signal.SIGKILL}, self.codes()
        assert output.count("\nerror: ") == nodes and message in output, output
        assert "Traceback" not in output, output
        return output


# ---- Hooks -------------------------------------------------------------------------------------


def only_on(rank: int, hook) -> None:
    if os.environ["RANK"] == str(rank):
        hook()


def at_step(step: int, do) -> None:
    """Call `do(model)` in the beginning of 1-based `step`, whether the run was resumed or not."""
    train_step = script.train_step

    def changed(model, optimizer, *args):
        moments = next(iter(optimizer.state.values()), {"step": 0})
        if moments["step"] == step - 1:
            do(model)
        return train_step(model, optimizer, *args)

    script.train_step = changed


def send(number: int, model=None) -> None:
    """This rank gets a signal."""
    os.kill(os.getpid(), number)


def stop_in(step: int, number: int = signal.SIGTERM):
    """A hook: the rank is asked to stop in `step`."""
    return functools.partial(at_step, step, functools.partial(send, number))


def die_in(step: int):
    """A hook: the rank is killed in `step`."""
    return functools.partial(at_step, step, functools.partial(send, signal.SIGKILL))


def spoil(model) -> None:
    """The weights of the last norm are not finite."""
    model.model.norm.weight.data.to_local().fill_(float("nan"))


def spoil_head(model) -> None:
    """The weights of the head are others."""
    model.lm_head.weight.data.to_local().fill_(1.0)


def before_saving(do) -> None:
    """Call `do(path)` before a checkpoint is saved there."""
    save = script.dcp.save

    def changed(state, checkpoint_id: Path):
        do(checkpoint_id)
        return save(state, checkpoint_id=checkpoint_id)

    script.dcp.save = changed


def die_in_save(step: int) -> None:
    """The rank is killed in the first save of `step` or a later one."""

    def die(path: Path) -> None:
        if path.name >= f"step-{step:08d}":
            time.sleep(0.5)  # the other ranks begin
            send(signal.SIGKILL)

    before_saving(die)


def cannot_delete() -> None:
    """A disk on which no checkpoint can be deleted."""
    rmtree = shutil.rmtree

    def fail(path, ignore_errors=False, **options):
        if "step-" not in str(path):
            rmtree(path, ignore_errors, **options)
        elif not ignore_errors:
            raise PermissionError(f"cannot delete {path}")

    script.shutil.rmtree = fail


def without(*names: str) -> None:
    """A launcher that does not set these names in the environment."""
    for name in names:
        del os.environ[name]


def without_inductor() -> None:
    """--compile without C++: dynamo, autograd and its partitions are as with inductor."""
    backend = {"backend": "aot_eager_decomp_partition"}
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, **backend)


def be_node(folder: Path | None = None) -> None:
    """The rank is the only one of its node; it works in a folder that may be the node's own."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)


def more_flags(*flags) -> None:
    """The rank is started with more flags than the others."""
    parse = script.parse_args
    script.parse_args = lambda argv: parse([*argv, *map(str, flags)])


def without_privileges() -> None:
    """Permissions hold for root, too: all capabilities are dropped."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def cache_in(folder: Path) -> None:
    """Where datasets keeps its cache."""
    script.datasets.config.HF_DATASETS_CACHE = folder


def change_config(**changes) -> None:
    """The built-in model with other sizes."""
    config, tokenizer = script.built_in_model()
    for name, value in changes.items():
        setattr(config, name, value)
    script.built_in_model = lambda: (config, tokenizer)


def lose_moments() -> None:
    """A resumed run has its weights, but not AdamW's moments."""
    load = script.dcp.load

    def load_weights(state: dict, **options):
        state.pop("moments", None)
        load(state, **options)

    script.dcp.load = load_weights


def lose_position() -> None:
    """A resumed run begins with the first rows of the data again."""
    order, first = script.global_batch_rows, []

    def from_zero(step: int, *args):
        first.append(step)
        return order(step - first[0], *args)

    script.global_batch_rows = from_zero


def small_files(size: int) -> None:
    """No file of this rank can be larger, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_more_files() -> None:
    """This rank cannot open one file more."""
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))


def full_disk_at(step: int) -> None:
    """The disk has no room left when `step` is saved."""
    before_saving(lambda path: path.name.endswith(f"{step:08d}") and small_files(100_000))


def full_disk_in_export() -> None:
    """The disk has no room left when the model is exported."""
    export = script.export_model

    def export_with_limit(*args):
        small_files(100_000)
        return export(*args)

    script.export_model = export_with_limit


def save_over(step: int) -> None:
    """Each later checkpoint is written over that of `step`, and the rank is killed meanwhile."""

    def die(path: Path) -> None:
        place = path.with_name(f"step-{step:08d}")
        if path.name > place.name:
            (place / f"__{os.environ['RANK']}_0.distcp").write_bytes(b"half")
            time.sleep(0.5)
            send(signal.SIGKILL)

    before_saving(die)


def other_checksum() -> None:
    """This rank has read other data."""
    script.zlib.crc32 = lambda *_: 1


def other_disk() -> None:
    """This rank does not see what others have saved."""

    def read_metadata(self):
        raise FileNotFoundError(f"there is no {self.path / '.metadata'}")

    script.dcp.FileSystemReader.read_metadata = read_metadata


# ---- What a run has written --------------------------------------------------------------------


def checkpoints(run: Path) -> list[str]:
    """Names of all that is in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def complete(run: Path) -> list[str]:
    """Names of those that are complete."""
    return sorted(path.parent.name for path in (run / "checkpoints").glob("*/.metadata"))


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return checkpoints(run) != complete(run)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*/.metadata")).parent


def saved(run: Path) -> dict:
    """All tensors of the newest checkpoint, whole, by name."""
    format_utils.dcp_to_torch_save(newest(run), run / "whole.pt")
    state = torch.load(run / "whole.pt", weights_only=False)
    leaves = torch.utils._pytree.tree_flatten_with_path(state)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves
            if isinstance(leaf, torch.Tensor)}  # fmt: skip


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in open(run / "metrics.jsonl")]


def exported_as_saved(run: Path) -> bool:
    """Whether every exported weight is the newest checkpoint's, bit for bit."""
    tensors = saved(run)
    exported = AutoModelForCausalLM.from_pretrained(run / "export").named_parameters()
    return all(torch.equal(p, tensors[f"model.{name}"]) for name, p in exported)


def losses(run: Path) -> list[float]:
    """Loss of each step; every step has to be there once, in order."""
    found = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1)), found
    return [row["loss"] for row in found]


def last_step(run: Path) -> int:
    """The last step in the metrics so far."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().split("\n")[-2])["step"]
    except (OSError, IndexError):
        return 0


def until(condition, job: Ranks) -> None:
    """Wait for a condition while the job runs."""
    deadline = time.monotonic() + 60
    while not condition():
        assert job.running() and time.monotonic() < deadline, job.wait(0)
        time.sleep(0.005)


def reach(run: Path, step: int, job: Ranks) -> None:
    """Wait until the metrics have `step`."""
    until(lambda: last_step(run) >= step, job)


def copy_of(run: Path, name: str) -> Path:
    """The same run under another name, to be damaged or continued."""
    return Path(shutil.copytree(run, run.with_name(name)))
