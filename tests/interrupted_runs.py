"""Jobs that are killed, stopped and resumed: python tests/interrupted_runs.py CHECK FOLDER

Imports the script once and forks the ranks of each job, so that starting a job takes a second.
Runs in a process of its own, because forking is safe only before threads have been started.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed.checkpoint.format_utils as format_utils
import transformers

import train_llm as script
from rank_groups import free_port

FOLDER = Path()
TEXT = "All work and no play makes Jack a dull boy. "


class Job:
    """Ranks of one run of the script's main, as forked processes."""

    def __init__(self, ranks: int, *flags, before=None):
        self.log = FOLDER / "log"
        self.log.write_text("")
        self.pids, self.codes = [], {}
        port = free_port()
        argv = ["-d", FOLDER / "text.txt", "-s", 32, "-b", 1, "--save-dir", FOLDER, *flags]
        for rank in range(ranks):
            if pid := os.fork():
                self.pids.append(pid)
                continue
            output = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in env.items()})
            code = 1
            try:
                if before:
                    before(rank)
                code = script.run(script.parse_args([str(word) for word in argv]))
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def running(self) -> bool:
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        for pid in pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, timeout_s: float = 60) -> str:
        """The output, once all ranks have ended; they are killed if that takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline:
                self.kill(self.pids)
            time.sleep(0.01)
        return self.log.read_text()

    def succeed(self, timeout_s: float = 60) -> str:
        """The output of a job that has to end with code 0 on every rank."""
        output = self.wait(timeout_s)
        assert set(self.codes.values()) == {0}, f"exit codes {self.codes}\n{output}"
        return output

    def fail(self, message: str) -> None:
        """The job has to end with code 1 on every rank and say `message` once, as its error."""
        output = self.wait()
        assert set(self.codes.values()) == {1}, f"exit codes {self.codes}\n{output}"
        assert output.count("error:") == 1 and message in output, output
        assert "Traceback" not in output, output


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in open(FOLDER / name / "metrics.jsonl")]


def last_step(name: str) -> int:
    """The last step in the metrics so far."""
    try:
        lines = open(FOLDER / name / "metrics.jsonl").read().split("\n")
        return json.loads(lines[-2])["step"]
    except (OSError, IndexError):
        return 0


def until(condition, job: Job) -> None:
    """Wait for a condition while the job runs."""
    deadline = time.monotonic() + 60
    while not condition():
        assert job.running() and time.monotonic() < deadline, job.wait(0)
        time.sleep(0.001)


def reach(name: str, step: int, job: Job) -> None:
    """Wait until the metrics have `step`."""
    until(lambda: last_step(name) >= step, job)


def saved(name: str) -> dict:
    """All tensors of the newest checkpoint, whole, by name."""
    newest = max((FOLDER / name / "checkpoints").glob("step-*"))
    format_utils.dcp_to_torch_save(newest, FOLDER / "whole.pt")
    state = torch.load(FOLDER / "whole.pt", weights_only=False)
    leaves = torch.utils._pytree.tree_flatten_with_path(state)[0]
    return {str(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(name: str) -> list[float]:
    """Loss of each step; every step has to be there once, in order."""
    found = [row for row in rows(name) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1)), found
    return [row["loss"] for row in found]


def kill_often(tp: int, name: str, flags: tuple, kills: int) -> int:
    """Run to the end over `kills` SIGKILLs; returns how many of them hit a save."""
    during_save = 0
    chance = random.Random(0)
    total, saving = int(flags[1]), FOLDER / name / "checkpoints"
    for i in range(kills):
        job = Job(4, "--tp", tp, "-e", name, *flags)
        reach(name, 1 + i * total // (kills + 1), job)
        if i % 2:
            until(lambda: any(saving.glob("writing-*")), job)
            time.sleep(chance.random() * 0.02)
            during_save += any(saving.glob("writing-*"))
        else:
            time.sleep(chance.random() * 0.1)
        job.kill([chance.choice(job.pids)] if i % 4 < 2 else job.pids)
        job.wait(10)
    Job(4, "--tp", tp, "-e", name, *flags).succeed()
    return during_save


def kills(times: int = 25) -> None:
    """SIGKILLs, many of them during a save, change no bit of the result."""
    flags = ("--max-steps", 60, "--ckpt-freq", 1, "--log-freq", 1)
    Job(4, "--tp", 2, "-e", "calm", *flags).succeed()
    during_save = kill_often(2, "killed", flags, times)
    assert during_save >= times * 2 // 5, during_save
    assert same(saved("killed"), saved("calm"))
    assert losses("killed") == losses("calm")
    left = sorted(path.name for path in (FOLDER / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000059", "step-00000060"], left
    print(f"survived {times} kills, {during_save} of them during a save")


def controls() -> None:
    """Without the moments, with another data position, or saved in place, the check above fails."""
    flags = ("--max-steps", 8, "--ckpt-freq", 2, "--log-freq", 1)
    Job(2, "-e", "calm", *flags).succeed()

    def interrupted(name: str, before) -> None:
        def die_after_4(rank):
            before(rank)
            decide = script.Checkpoints.agree_to_stop

            def decide_or_die(self):
                if last_step(name) >= 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                return decide(self)

            script.Checkpoints.agree_to_stop = decide_or_die

        Job(2, "-e", name, *flags, before=die_after_4).wait()
        Job(2, "-e", name, *flags, before=before).succeed()

    def no_moments(rank):
        load = script.dcp.load
        script.dcp.load = lambda state, **options: load(weights_alone(state), **options)

    def weights_alone(state: dict) -> dict:
        whole = state["state"].state_dict()
        return {"state": {"model": whole["model"]}}

    def no_position(rank):
        order = script.global_batch_rows
        first = []
        script.global_batch_rows = lambda step, *args: (
            first.append(step) or order(step - first[0], *args)
        )

    interrupted("right", lambda rank: None)
    assert same(saved("right"), saved("calm")) and losses("right") == losses("calm")
    for name, broken in (("moments", no_moments), ("position", no_position)):
        interrupted(name, broken)
        assert not same(saved(name), saved("calm")), f"{name}: no difference"

    # In place: a rank is killed while it writes over the only checkpoint.
    def in_place(rank):
        save = script.dcp.async_save

        def save_in_place(state, storage_writer, **options):
            place = storage_writer.path.with_name("step-00000002")
            if storage_writer.path.name > "writing-00000002":
                (place / f"__{rank}_0.distcp").write_bytes(b"half")
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            return save(state, storage_writer=storage_writer, **options)

        script.dcp.async_save = save_in_place

    Job(2, "-e", "in place", *flags, before=in_place).wait()
    Job(2, "-e", "in place", *flags).fail("can be used")


def resume_pairs() -> None:
    """A run that changes its layout half way computes what plain transformers computes."""
    from transformers import ByT5Tokenizer

    from test_parity import distance, plain_model, plain_step

    pairs = [((2, 2), (4, 1)), ((2, 2), (1, 2)), ((1, 4), (2, 2)), ((4, 1), (1, 3))]
    built_in = script.built_in_config
    for tied in (False, True):

        def config():
            config = built_in()
            config.tie_word_embeddings = tied  # noqa: B023
            return config

        script.built_in_config = config
        data = script.load_data(
            str(FOLDER / "text.txt"), None, None, ByT5Tokenizer(extra_ids=125), 32
        )
        torch.set_num_threads(1)
        plain = plain_model(config(), seed=0)
        names = {n for n, p in plain.named_parameters() if "norm" in n}
        groups = [
            {"params": [p for n, p in plain.named_parameters() if n not in names]},
            {"params": [p for n, p in plain.named_parameters() if n in names], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
        expected = []
        for step in range(8):
            for group in optimizer.param_groups:
                group["lr"] = script.learning_rate(step, 1e-3, 0, 8)
            batch = data["train"][script.global_batch_rows(step, 4, len(data["train"]), 0)]
            expected.append(plain_step(plain, optimizer, batch["input_ids"], clip=1.0)[0])
        for i, (old, new) in enumerate(pairs):
            name = f"pair {i} {tied}"
            flags = ["-e", name, "--global-batch-size", 4, "--log-freq", 1, "--lr", 1e-3]
            flags += ["--max-steps", 8, "--ckpt-freq", 4, "--warmup-steps", 0]

            def stop_at_4(rank):
                decide = script.Checkpoints.agree_to_stop
                script.Checkpoints.agree_to_stop = lambda self: (
                    setattr(self, "stopping", last_step(name) == 3),  # noqa: B023
                    decide(self),
                )[1]

            Job(old[0] * old[1], "--tp", old[1], *flags, before=stop_at_4).succeed()
            assert 3 <= last_step(name) <= 5
            output = Job(new[0] * new[1], "--tp", new[1], *flags).succeed()
            assert f"saved on {old[0]} dp x {old[1]} tp\n" in output, output
            assert f" ranks = {new[0]} dp x {new[1]} tp;" in output, output
            error = distance(torch.tensor(losses(name)), torch.tensor(expected))
            assert error < 1e-5, (name, losses(name), expected)


def refusals() -> None:
    """Another training under the same name is refused, with each old and new value."""
    flags = ["-e", "run", "--max-steps", 3, "--log-freq", 1, "--ckpt-freq", 2]
    Job(2, *flags, "--seed", 1).succeed()
    before = saved("run")
    (FOLDER / "other.txt").write_text("Another text altogether. " * 400)
    changes = {
        ("--seed", 2): "seed: 1 then, 2 now",
        ("-s", 16): "seq_length: 32 then, 16 now",
        ("--global-batch-size", 4): "global_batch_size: 2 then, 4 now",
        ("--max-steps", 2): "total_steps: 3 then, 2 now",
        ("--lr", 0.1): "lr: 0.003 then, 0.1 now",
        ("-d", FOLDER / "other.txt"): "dataset: ",
    }
    for change, message in changes.items():
        Job(2, *flags, "--seed", 1, *change).fail(message)

    def wider(rank):
        config = script.built_in_config()
        config.intermediate_size = 384
        script.built_in_config = lambda: config

    Job(2, *flags, "--seed", 1, before=wider).fail("model.intermediate_size: 768 then, 384 now")
    assert same(saved("run"), before) and len(losses("run")) == 3
    # The same command on a finished run does nothing; a larger --max-steps goes on.
    Job(2, *flags, "--seed", 1).succeed()
    assert same(saved("run"), before)
    output = Job(2, *flags, "--seed", 1, "--max-steps", 6).succeed()
    assert "extended from 3 to 6 steps, which the cosine now spans" in output, output
    assert len(losses("run")) == 6


def signals() -> None:
    """SIGTERM, SIGINT or SIGUSR1 to one rank: all save, leave with 0, and the run goes on later."""
    flags = ["--tp", 2, "--max-steps", 30, "--log-freq", 1]
    Job(4, "-e", "calm", *flags).succeed()
    for number, rank in ((signal.SIGTERM, 3), (signal.SIGINT, 0), (signal.SIGUSR1, 1)):
        name = number.name
        job = Job(4, "-e", name, *flags)
        reach(name, 5, job)
        begin = time.monotonic()
        job.kill([job.pids[rank]], number)
        output = job.succeed()
        assert time.monotonic() - begin < 30
        assert "as asked" in output and 5 <= last_step(name) < 30, output
        Job(4, "-e", name, *flags).succeed()
        assert losses(name) == losses("calm") and same(saved(name), saved("calm"))


def faults() -> None:
    """Damage, missing files, a full disk and a gradient that is not finite."""
    flags = ["-e", "run", "--max-steps", 6, "--log-freq", 1, "--ckpt-freq", 2]
    flags += ["--keep-checkpoints", 3]
    Job(2, *flags).succeed()
    calm, checkpoints = saved("run"), FOLDER / "run" / "checkpoints"
    shard = checkpoints / "step-00000006" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    (checkpoints / "step-00000004" / ".metadata").unlink()
    output = Job(2, *flags).succeed()
    assert "checkpoint step-00000006 cannot be used" in output, output
    assert "checkpoint step-00000004 cannot be used: not every rank finds" in output, output
    assert "after step 2," in output and losses("run") and same(saved("run"), calm)
    assert "Traceback" not in output, output
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [
        f"{kind}step-0000000{i}"
        for kind in ("", "unusable-")
        for i in (2, 4, 6)
        if kind == "" or i > 2
    ], names

    def lost(rank):  # a disk of this node's own, without the checkpoints
        if rank == 1:
            exists = Path.exists
            Path.exists = lambda self: self.name != ".metadata" and exists(self)

    Job(2, *flags, before=lost).fail("can be used")
    shutil.rmtree(FOLDER / "run")

    def small_files(rank):
        save = script.dcp.async_save

        def save_with_limit(state, storage_writer, **options):
            if storage_writer.path.name == "writing-00000004" and rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            return save(state, storage_writer=storage_writer, **options)

        script.dcp.async_save = save_with_limit

    Job(2, *flags, before=small_files).fail("step 4 could not be saved")
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]

    def export_fails(rank):
        export = script.export_model

        def export_with_limit(*args):
            if rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return export(*args)

        script.export_model = export_with_limit

    Job(2, *flags, before=export_fails).fail("File too large")
    assert same(saved("run"), calm) and not (FOLDER / "run" / "export").exists()
    # A model from a checkpoint, on another layout, without training.
    metrics = (FOLDER / "run" / "metrics.jsonl").read_bytes()
    output = Job(4, *flags, "--tp", 2, "--export-only").succeed()
    assert "exported after 6 steps" in output, output
    assert metrics == (FOLDER / "run" / "metrics.jsonl").read_bytes()
    exported = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "run" / "export")
    for name, p in exported.named_parameters():
        assert any(torch.equal(p, t) for n, t in calm.items() if name in n), name
    Job(2, *flags, "-e", "new", "--export-only").fail("new has no checkpoint")
    Job(2, "--max-steps", 2, "-e", "text.txt").fail("text.txt")  # a file is in the way

    def explode(rank):
        step = script.train_step

        def bad_step(model, optimizer, *args):
            if len(optimizer.state) and next(iter(optimizer.state.values()))["step"] == 4:
                model.model.norm.weight.data.to_local().fill_(float("nan"))
            return step(model, optimizer, *args)

        script.train_step = bad_step

    sparse = ["-e", "nan", "--max-steps", 10, "--log-freq", 7, "--ckpt-freq", 2]
    Job(2, *sparse, before=explode).fail("not finite at step 5; at step 6")
    names = sorted(path.name for path in (FOLDER / "nan" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


WHOLE = {  # flags that change how a run computes, each with what it may differ by from plain
    "plain": ([], 0.0),
    "recompute": (["--activation-checkpointing"], 1e-5),
    "accumulation": (["-b", 1], 1e-5),
    "recompute, accumulation": (["--activation-checkpointing", "-b", 1], 1e-5),
    "bf16": (["--dtype", "bf16"], 2e-2),
    "compile": (["--compile"], 1e-4),
}
COMPILED = {
    "compile, recompute": (["--compile", "--activation-checkpointing"], 1e-4),
    "compile, accumulation": (["--compile", "-b", 1], 1e-4),
    "all three": (["--compile", "--activation-checkpointing", "-b", 1], 1e-4),
    "compile, bf16": (["--compile", "--dtype", "bf16"], 2e-2),
    "compile, tp 1": (["--compile", "--tp", 1, "-b", 1], 1e-4),
    "compile, tp 4": (["--compile", "--tp", 4, "-b", 4], 1e-4),
}


def whole_runs(cases: dict = WHOLE) -> None:
    """Each flag from the first step to the export, over an evaluation, a checkpoint and a resume.

    The plain run is held to plain transformers, the others to the plain run.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(FOLDER / "inductor")
    every = ["--tp", 2, "--global-batch-size", 4, "--max-steps", 6, "--log-freq", 1, "--lr", 1e-3]
    every += ["--eval-freq", 2, "--ckpt-freq", 3, "-b", 2]
    reference = None
    for name, (flags, tolerance) in {"plain": ([], 0.0), **cases}.items():
        job = Job(4, *every, *flags, "-e", name, before=lambda rank: stop_after(name, 3))  # noqa: B023
        assert "as asked" in job.succeed(timeout_s=200)
        assert last_step(name) < 6 and not (FOLDER / name / "export").exists()
        output = Job(4, *every, *flags, "-e", name).succeed(timeout_s=200)
        assert "resuming after step" in output and "results in" in output, output
        table = {
            key: [row[key] for row in rows(name) if key in row] for key in ("loss", "grad_norm")
        }
        table["val_loss"] = [row["val_loss"] for row in rows(name) if "val_loss" in row]
        assert [len(values) for values in table.values()] == [6, 6, 3], rows(name)
        exported = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name / "export")
        if reference is None:
            reference, weights = table, dict(exported.named_parameters())
            held_to_transformers(exported, table["val_loss"][-1])
        errors = {
            key: max(abs(a / b - 1) for a, b in zip(values, reference[key], strict=True))
            for key, values in table.items()
        }
        errors["weights"] = max(
            ((p - weights[n]).norm() / weights[n].norm()).item()
            for n, p in exported.named_parameters()
        )
        last = ", ".join(f"{key} {values[-1]:.6f}" for key, values in table.items())
        print(name, "|", last, "|", {key: f"{e:.1e}" for key, e in errors.items()}, flush=True)
        assert all(error <= tolerance for error in errors.values()), (name, errors)


def compiled_runs() -> None:
    """The same for compiled layers with every flag they meet, and on other layouts."""
    whole_runs(COMPILED)


def stop_after(name: str, step: int) -> None:
    """Ask a run to stop once its metrics have `step`, as a signal would."""
    decide = script.Checkpoints.agree_to_stop
    script.Checkpoints.agree_to_stop = lambda self: (
        setattr(self, "stopping", last_step(name) >= step),
        decide(self),
    )[1]


def held_to_transformers(model, val_loss: float) -> None:
    """The validation loss is plain transformers' for the exported model, over the held-out rows."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=125)
    data = script.load_data(str(FOLDER / "text.txt"), None, None, tokenizer, 32)["validation"]
    ids = data[:]["input_ids"]
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert len(ids) <= script.EVAL_SEQUENCES and abs(val_loss / expected - 1) < 1e-5


if __name__ == "__main__":
    FOLDER = Path(sys.argv[2])
    (FOLDER / "text.txt").write_text(TEXT * 400)
    globals()[sys.argv[1]]()
