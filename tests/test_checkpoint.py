"""A run can be killed, stopped, moved to another layout and continued, with every flag."""

import contextlib
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import jobs
import train_llm as script
from jobs import Job, losses, same, saved
from ranks import ROOT, children, free_port, kill_all, run
from test_data import CHATML, rust_tokenizer
from test_parity import distance, llama, plain_model, plain_step

SHORT = ["--max-steps", 6, "--ckpt-freq", 2, "--keep-checkpoints", 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs of this module are, since a resumed run has to find the same text.txt."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def calm(folder) -> Path:
    """A run that nothing has interrupted."""
    Job(folder, 2, *SHORT, "-e", "calm").succeed()
    return folder / "calm"


@pytest.fixture(scope="module")
def killed(folder) -> Path:
    """The same run, of which one rank was killed in step 6."""
    job = Job(folder, 2, *SHORT, "-e", "killed", hooks=(on(1, jobs.die_in(6)),))
    job.wait()
    assert job.codes() == [1, -signal.SIGKILL]
    return folder / "killed"


def on(rank: int, hook):
    return functools.partial(jobs.only_on, rank, hook)


@pytest.mark.parametrize(
    ("broken", "hook"),
    [("nothing", None), ("moments", jobs.lose_moments), ("position", jobs.lose_position)],
)
def test_killed(folder, calm, killed, broken, hook):
    """A killed run goes on bit for bit; controls: without moments, or with other data, it shows."""
    copy = jobs.copy_of(killed, f"without {broken}")
    output = Job(folder, 2, *SHORT, "-e", copy.name, hooks=(hook,) if hook else ()).succeed()
    assert "resuming after step 4" in output, output
    assert same(saved(copy), saved(calm)) == (hook is None)
    assert (losses(copy) == losses(calm)) == (hook is None)


def test_save_over(folder):
    """Control: checkpoints that are written over the one before do not survive a kill."""
    over = functools.partial(jobs.save_over, 2)
    Job(folder, 2, *SHORT, "-e", "over", hooks=(over,)).wait()
    Job(folder, 2, *SHORT, "-e", "over").fail("can be used")


@pytest.mark.slow
def test_many_kills(folder, times: int = 4, steps: int = 32):
    """SIGKILLs of one rank or of all, every second one within a save, change no bit of the run."""
    flags = ["--tp", 2, "--max-steps", steps, "--ckpt-freq", 1, "-e"]
    Job(folder, 4, *flags, "not killed").succeed()
    chance, often = random.Random(0), folder / "often killed"
    for i in range(times):
        # After the first checkpoint: before it, rows of metrics are appended again.
        step, victim = 3 + i * (steps - 3) // (times + 1), chance.randrange(4)
        if i % 2:
            dies = on(victim, functools.partial(jobs.die_in_save, step))
            job = Job(folder, 4, *flags, often.name, hooks=(dies,))
            job.wait(grace_s=0.2)
            assert job.codes()[victim] == -signal.SIGKILL and jobs.is_saving(often)
        else:
            job = Job(folder, 4, *flags, often.name)
            jobs.reach(often, step, job)
            time.sleep(chance.random() * 0.1)
            job.kill([victim] if i % 4 else None)
            job.wait(grace_s=0.2)
    Job(folder, 4, *flags, often.name).succeed()
    assert same(saved(often), saved(folder / "not killed"))
    assert losses(often) == losses(folder / "not killed")
    assert jobs.checkpoints(often) == ["step-00000031", "step-00000032"]


def rows_of(text: Path) -> dict:
    """What the script trains on and validates with."""
    args = script.parse_args(["-d", str(text), "-s", "32"])
    return script.load_data(args, transformers.ByT5Tokenizer(extra_ids=125), 384)


@functools.cache
def plain_losses(text: Path, tied: bool) -> list[float]:
    """Losses of eight steps of plain transformers on the built-in model and the text."""
    data = rows_of(text)["train"]
    config = script.built_in_model()[0]
    config.tie_word_embeddings = tied
    plain = plain_model(config, seed=0)
    norms = [p for n, p in plain.named_parameters() if "norm" in n]
    rest = [p for n, p in plain.named_parameters() if "norm" not in n]
    groups = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = script.learning_rate(step, 1e-3, 0, 8)
        ids = data[script.global_batch_rows(step, 4, len(data), 0)]["input_ids"]
        found.append(plain_step(plain, optimizer, ids, clip=1.0)[0])
    return found


MOVES = [  # from and to (dp, tp), tied
    ((2, 2), (1, 2), False), ((1, 4), (2, 2), False), ((4, 1), (1, 3), False),
    ((2, 2), (4, 1), True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "tied"),
    [*MOVES[:2], *(pytest.param(*move, marks=pytest.mark.slow) for move in MOVES[2:])],
)
def test_moved(folder, old, new, tied):
    """A run that changes its layout half way computes what plain transformers computes."""
    place = folder / f"from {old} to {new}, tied {tied}"
    flags = ["-e", place.name, "--global-batch-size", 4, "--lr", 1e-3]
    flags += ["--max-steps", 8, "--ckpt-freq", 4, "--warmup-steps", 0]
    model = functools.partial(jobs.change_config, tie_word_embeddings=tied)
    hooks = model, on(0, jobs.stop_in(4))
    Job(folder, old[0] * old[1], "--tp", old[1], *flags, hooks=hooks).succeed()
    assert 3 <= jobs.last_step(place) <= 5
    output = Job(folder, new[0] * new[1], "--tp", new[1], *flags, hooks=(model,)).succeed()
    assert "resuming after step" in output, output
    assert f" ranks = {new[0]} dp x {new[1]} tp\n" in output, output
    found, expected = losses(place), plain_losses(folder / "text.txt", tied)
    assert distance(torch.tensor(found), torch.tensor(expected)) < 1e-5, (found, expected)


def test_refused_and_changed(folder, calm):
    """Another training is refused, with each old and new value; another schedule is not."""
    same_run = jobs.copy_of(calm, "same")
    before = saved(same_run)
    (folder / "other.txt").write_text("Another text altogether. " * 400)
    changes = {
        "--seed": (2, "seed: 0, not 2"),
        "-s": (16, "seq_length: 32, not 16"),
        "--global-batch-size": (4, "global_batch_size: 2, not 4"),
        "-d": (folder / "other.txt", "dataset: "),
    }
    flags = [word for flag, (value, _) in changes.items() for word in (flag, value)]
    wider = functools.partial(jobs.change_config, intermediate_size=384)
    output = Job(folder, 2, *SHORT, "-e", "same", *flags, hooks=(wider,)).fail("use another -e")
    for message in [*(text for _, text in changes.values()),
                    "model.intermediate_size: 768, not 384"]:  # fmt: skip
        assert message in output, output
    # The same command on a finished run does nothing; a larger --max-steps goes on.
    Job(folder, 2, *SHORT, "-e", "same").succeed()
    assert same(saved(same_run), before) and len(losses(same_run)) == 6
    Job(folder, 2, *SHORT, "-e", "same", "--max-steps", 5).fail("same is at step 6 already, of 5")
    Job(folder, 2, *SHORT, "-e", "same", "--max-steps", 8, "--lr", 0.1).succeed()
    assert len(losses(same_run)) == 8
    rates = [row["lr"] for row in jobs.rows(same_run) if "lr" in row]
    assert rates[6:] == pytest.approx([script.learning_rate(step, 0.1, 0, 8) for step in (6, 7)])


def test_other_number_of_ranks(folder, calm):
    """The global batch stays the checkpoint's where it was not typed, and that is said.

    It followed dp before: the checkpoint was refused on another number of ranks.
    """
    copy = jobs.copy_of(calm, "on one rank")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    output = Job(folder, 1, *SHORT, "-e", copy.name).succeed()
    assert "after step 4," in output
    assert "global batch: 2 = 1 sequences x 1 dp x 2 accumulation\n" in output, output
    assert losses(copy) == pytest.approx(losses(calm), rel=1e-5)
    Job(folder, 4, *SHORT, "-e", copy.name, "--max-steps", 8).fail(
        "--global-batch-size 2 is not a multiple of batch size x dp = 4; 4 is"
    )


def test_stopped(folder):
    """A signal to one rank: all save in this step, leave with 0, and the run goes on later."""
    flags = ["--tp", 2, "--max-steps", 12, "-e"]
    Job(folder, 2, *flags, "not stopped").succeed()
    stopped = folder / "stopped"
    for step, number, rank in (
        (3, signal.SIGTERM, 1), (5, signal.SIGINT, 0), (7, signal.SIGUSR1, 1),
        (9, signal.SIGHUP, 0),
    ):  # fmt: skip
        hooks = (on(rank, jobs.stop_in(step, number)),)
        output = Job(folder, 2, *flags, "stopped", hooks=hooks).succeed()
        assert "as asked" in output and jobs.last_step(stopped) == step, output
        assert f"step-{step:08d}" in jobs.complete(stopped)
    Job(folder, 2, *flags, "stopped").succeed()
    assert losses(stopped) == losses(folder / "not stopped")
    assert same(saved(stopped), saved(folder / "not stopped"))


def test_damaged(folder, calm):
    """The checkpoint before one that is not whole is taken; later ones are saved again."""
    damaged = jobs.copy_of(calm, "damaged")
    shard = damaged / "checkpoints" / "step-00000006" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    (damaged / "checkpoints" / "step-00000004" / ".metadata").write_bytes(b"")  # a power loss
    output = Job(folder, 2, *SHORT, "-e", "damaged").succeed()
    for step in (4, 6):
        assert f"checkpoint step-0000000{step} cannot be used" in output, output
    assert "after step 2," in output and same(saved(damaged), saved(calm))
    assert losses(damaged) == losses(calm)
    assert jobs.complete(damaged) == jobs.checkpoints(damaged) == jobs.checkpoints(calm)


def test_damaged_on_one_node(folder, calm):
    """A node that cannot read the checkpoints: refused, and nothing is changed."""
    jobs.copy_of(calm, "apart")
    hooks = (on(1, jobs.other_disk),)
    output = Job(folder, 2, *SHORT, "-e", "apart", hooks=hooks).wait(grace_s=0.5)
    assert output.count("\nerror: ") == output.count("no checkpoint in") == 1, output
    assert jobs.checkpoints(folder / "apart") == jobs.checkpoints(calm)


def nodes(*of_rank_1) -> tuple:
    """Hooks: each rank is a node of its own; more hooks for rank 1."""
    return (jobs.be_node, *(on(1, hook) for hook in of_rank_1))


@pytest.mark.parametrize("ranks_of_a_node", [2, 1])
def test_nodes_with_other_data(folder, ranks_of_a_node):
    """A rank that reads something else under the same name must not train with the others."""
    hooks = (jobs.be_node,) if ranks_of_a_node == 1 else ()
    Job(folder, 2, *SHORT, hooks=(*hooks, on(1, jobs.other_checksum))).fail(
        "model or data differ between nodes; dataset: ", nodes=3 - ranks_of_a_node
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        # These trained to the end, with wrong weights.
        (["--lr", 0.1], "lr: 0.003, not 0.1"),
        (["--weight-decay", 0], "weight_decay: 0.1, not 0.0"),
        # These hung.
        (["--max-steps", 7], "max_steps: 6, not 7"),
        (["--ckpt-freq", 3], "ckpt_freq: 2, not 3"),
        (["--log-freq", 3], "log_freq: 1, not 3"),
        (["--eval-freq", 3], "eval_freq: 0, not 3"),
        (["-b", 2], "batch_size: 1, not 2"),
        (["-e", "of one node"], "experiment_name: None, not of one node"),
        # These ended in SIGABRT within gloo.
        (["--tp", 2], "tp: 1, not 2"),
        (["--dtype", "bf16"], "dtype: None, not bf16"),
    ],
)  # fmt: skip
def test_nodes_with_other_flags(folder, flags, told):
    """Each node names the flag and both values, before anything is read or written."""
    hooks = nodes(functools.partial(jobs.more_flags, *flags))
    output = Job(folder, 2, *SHORT, hooks=hooks).fail(
        "flags differ between nodes; " + told, nodes=2
    )
    assert output.count(told) == 2 and "data: " not in output, output
    assert not (folder / "of one node").exists()


@pytest.mark.parametrize("older", [False, True])
def test_nodes_with_other_disks(folder, calm, older):
    """A relative --save-dir on each node's own disk is refused, also where results are older.

    Such a run ended with 0 before, with checkpoints that could not be read and half an export.
    """
    places = [folder / f"disks, {older}" / str(node) for node in range(2)]
    for place in places if older else []:
        shutil.copytree(calm, place / "results" / "run")
    hooks = [
        jobs.be_node,
        *(on(i, functools.partial(jobs.be_node, p)) for i, p in enumerate(places)),
    ]
    Job(folder, 2, *SHORT, "-e", "run", "--save-dir", "results", hooks=tuple(hooks)).fail(
        "results/run is not shared: its files differ between nodes", nodes=2
    )
    for place in places if older else []:
        assert jobs.checkpoints(place / "results" / "run") == jobs.checkpoints(calm)
        assert jobs.losses(place / "results" / "run") == jobs.losses(calm)


def test_full_disk(folder, calm):
    """A save and an export that fail say so, and lose nothing of what was saved before."""
    hooks = (on(1, functools.partial(jobs.full_disk_at, 4)),)
    Job(folder, 2, *SHORT, "-e", "full", hooks=hooks).fail("step-00000004 could not be saved")
    assert jobs.complete(folder / "full") == ["step-00000002"]
    hooks = (on(1, jobs.full_disk_in_export),)
    Job(folder, 2, *SHORT, "-e", "full", hooks=hooks).fail("File too large")
    assert same(saved(folder / "full"), saved(calm))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder / "full" / "export")


def test_export_of_a_checkpoint(folder, calm):
    """The model from a checkpoint, on another layout, over the files of another model.

    That one's tokenizer, chat template and adapter stayed before, and were loaded.
    """
    copy = jobs.copy_of(calm, "exported")
    export, files = copy / "export", sorted(path.name for path in (calm / "export").iterdir())
    for file in export.iterdir():
        file.unlink()
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
                 "merges.txt", "chat_template.jinja", "adapter_config.json",
                 "adapter_model.safetensors", "model.safetensors", "consolidated.safetensors",
                 "model-00001-of-00009.safetensors", "README.md"):  # fmt: skip
        (export / name).write_text("another model's")
    Job(folder, 4, *SHORT, "-e", "exported", "--tp", 2).succeed()
    assert losses(copy) == losses(calm)
    assert sorted(path.name for path in export.iterdir()) == sorted([*files, "README.md"])
    assert (export / "README.md").read_text() == "another model's"
    assert jobs.exported_as_saved(copy)


@pytest.mark.slow
def test_export_after_one_that_failed(folder, calm):
    """What a failed export on more ranks has left is not mixed with the next one (a silent mix)."""
    copy = jobs.copy_of(calm, "exported twice")
    hooks = (on(3, jobs.full_disk_in_export),)
    changed = [*SHORT, "-e", copy.name, "--max-steps", 8]
    Job(folder, 4, *changed, "--tp", 2, hooks=(on(0, jobs.stop_in(7)),)).succeed()
    spoiled = functools.partial(jobs.at_step, 8, jobs.spoil_head)
    Job(folder, 4, *changed, "--tp", 2, hooks=(spoiled, *hooks)).fail("File too large")
    left = [path.name for path in (copy / "export").iterdir()]
    assert left and "model.safetensors.index.json" not in left, left
    shutil.rmtree(copy / "checkpoints" / "step-00000008")  # back to the weights before
    Job(folder, 2, *changed).succeed()
    assert jobs.exported_as_saved(copy)


def test_foreign_names(folder, calm):
    """Only what the script has made is read, moved or deleted; export/ may be a link."""
    copy = jobs.copy_of(calm, "with foreign names")
    saves, disk = copy / "checkpoints", folder / "another disk"
    names = ["before-tuning-lr", "step-best", "unusable", "step-1"]
    for name in names:
        shutil.copytree(saves / "step-00000002", saves / name)
    (saves / "training-notes.txt").write_text("notes")
    shutil.rmtree(copy / "export")
    disk.mkdir()
    (disk / "README.md").write_text("about this model")
    (copy / "export").symlink_to(disk)
    output = Job(folder, 2, *SHORT, "-e", copy.name, "--max-steps", 10).succeed()
    assert "resuming after step 6" in output, output
    kept = [f"step-{step:08d}" for step in (6, 8, 10)]
    assert jobs.checkpoints(copy) == sorted([*names, "training-notes.txt", *kept])
    assert (disk / "README.md").exists() and (disk / "config.json").exists()
    assert (copy / "export").is_symlink()


def test_not_deleted(folder):
    """A run whose old checkpoints cannot be deleted goes on; the next save tries it again."""
    flags = [*SHORT, "-e", "full of old", "--keep-checkpoints", 1]
    Job(folder, 2, *flags, hooks=(on(0, jobs.cannot_delete),)).succeed()
    assert len(jobs.complete(folder / "full of old")) == 3
    first = folder / "full of old" / "checkpoints" / "step-00000002"
    (first / ".metadata").unlink()  # as a save or a deletion that was killed leaves it
    Job(folder, 2, *flags, "--max-steps", 8).succeed()
    assert jobs.checkpoints(folder / "full of old") == ["step-00000008"]


def test_link_to_an_archive(folder, calm):
    """A checkpoint that is a link keeps all its files when it is old; it lost .metadata before."""
    copy, archive = jobs.copy_of(calm, "with a link"), folder / "archive"
    old = copy / "checkpoints" / "step-00000002"
    shutil.move(old, archive)
    old.symlink_to(archive)
    files = sorted(archive.iterdir())
    flags = ["--max-steps", 8, "--ckpt-freq", 2, "--keep-checkpoints", 1]
    Job(folder, 2, *flags, "-e", copy.name).succeed()
    assert jobs.checkpoints(copy) == ["step-00000002", "step-00000008"]
    assert sorted(archive.iterdir()) == files and archive / ".metadata" in files


def test_no_permission(folder, calm):
    """Checkpoints that cannot be listed are not the same as none.

    The run began anew before, and had emptied metrics.jsonl when it failed to save.
    """
    copy = jobs.copy_of(calm, "locked up")
    before, place = (copy / "metrics.jsonl").read_bytes(), copy / "checkpoints"
    place.chmod(0)
    flags, hooks = ["--ckpt-freq", 3, "-e", copy.name], (jobs.without_privileges,)
    Job(folder, 2, "--max-steps", 6, *flags, hooks=hooks).fail("Permission denied")
    place.chmod(0o755)
    assert jobs.checkpoints(copy) == jobs.checkpoints(calm)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_second_job(folder, calm):
    """A second job of the same name is told so, and changes nothing."""
    copy = jobs.copy_of(calm, "in use")
    before = (copy / "metrics.jsonl").read_bytes()
    with open(copy / "metrics.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Job(folder, 2, *SHORT, "-e", "in use", "--max-steps", 8).fail("another job trains in")
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert jobs.checkpoints(copy) == jobs.checkpoints(calm)


def test_lost_checkpoints(folder, calm):
    """Without a complete checkpoint a run begins anew, after the rows that are there."""
    copy = jobs.copy_of(calm, "without metadata")
    before = (copy / "metrics.jsonl").read_bytes()
    for path in (copy / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    Job(folder, 2, *SHORT, "-e", copy.name).succeed()
    assert (copy / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["loss"] for row in jobs.rows(copy) if "loss" in row] == 2 * losses(calm)
    assert same(saved(copy), saved(calm))


def test_first_save_interrupted(folder):
    """A run that is killed in its first save begins anew, though its metrics have steps."""
    flags = [*SHORT, "-e", "early"]
    Job(folder, 2, *flags, hooks=(on(1, functools.partial(jobs.die_in_save, 2)),)).wait(grace_s=5)
    assert jobs.complete(folder / "early") == [] != jobs.checkpoints(folder / "early")
    Job(folder, 2, *flags).succeed()
    steps = [row["step"] for row in jobs.rows(folder / "early") if "loss" in row]
    assert steps == [1, 2, *range(1, 7)]


def test_cut_metrics(folder, calm):
    """Rows after the checkpoint, also one that was cut as the disk filled up, come once."""
    copy = jobs.copy_of(calm, "cut")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text[: text.index('"step": 5') + 30])
    Job(folder, 2, *SHORT, "-e", "cut").succeed()
    assert losses(copy) == losses(calm)


def test_foreign_metrics(folder, calm):
    """Lines in metrics.jsonl that the script has not written stay as they are.

    All after the first of them was deleted before, and after a character of two bytes rows were
    cut within.
    """
    foreign = 'a note\n\n{"step": 1, "loss": 0}\r\n{"note": "größer"}\n'.encode()
    place = folder / "annotated"
    place.mkdir()
    (place / "metrics.jsonl").write_bytes(foreign)
    Job(folder, 2, *SHORT, "-e", "annotated", hooks=(on(1, jobs.die_in(6)),)).wait()
    Job(folder, 2, *SHORT, "-e", "annotated").succeed()
    text = (place / "metrics.jsonl").read_bytes()
    assert text.startswith(foreign)
    (place / "metrics.jsonl").write_bytes(text[len(foreign) :])
    assert losses(place) == losses(calm)


@pytest.mark.parametrize(
    "missing",
    [["LOCAL_RANK", "LOCAL_WORLD_SIZE"],  # a launcher with one process on each node
     # RANK alone, which an earlier job has left in the shell: a traceback before.
     ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]],
)  # fmt: skip
def test_incomplete_environment(folder, missing):
    hooks = (functools.partial(jobs.without, *missing),)
    assert "1 dp x 1 tp" in Job(folder, 1, "--max-steps", 1, hooks=hooks).succeed()


def test_file_in_the_way(folder):
    Job(folder, 2, "--max-steps", 2, "-e", "text.txt").fail("text.txt")


def test_not_finite(folder):
    """A gradient that is not finite ends the run before anything of it is saved or evaluated."""
    hooks = (functools.partial(jobs.at_step, 5, jobs.spoil),)
    flags = ["-e", "nan", "--max-steps", 10, "--log-freq", 7, "--ckpt-freq", 2, "--eval-freq", 5]
    Job(folder, 2, *flags, hooks=hooks).fail("not finite at step 5; not saved since")
    assert jobs.checkpoints(folder / "nan") == ["step-00000002", "step-00000004"]
    assert not any("val_loss" in row for row in jobs.rows(folder / "nan"))


BF16, RECOMPUTE, ACCUMULATE = ["--dtype", "bf16"], ["--activation-checkpointing"], ["-b", 1]
WHOLE = {  # flags that change how a run computes, each with what it may differ by from plain
    "recompute, accumulation": ([*RECOMPUTE, *ACCUMULATE], 1e-5)
}
SLOW = {
    "bf16": (BF16, 2e-2),
    "recompute": (RECOMPUTE, 1e-5),
    "compile": (["--compile"], 1e-4),
    "all three": (["--compile", *RECOMPUTE, *ACCUMULATE], 1e-4),
    "compile, bf16": (["--compile", *BF16], 2e-2),
    "compile, tp 1": (["--compile", "--tp", 1, *ACCUMULATE], 1e-4),
    "compile, tp 4": (["--compile", "--tp", 4, "-b", 4], 1e-4),
}
INDUCTOR = ("all three", "compile, bf16")  # the others do without its C++, which takes a minute


def whole_run(folder: Path, name: str, flags: list) -> tuple[dict, torch.nn.Module]:
    """Numbers and exported model of a run to the end, over evaluations, a stop and a resume."""
    every = ["--tp", 2, "--global-batch-size", 4, "--max-steps", 6, "--lr", 1e-3]
    every += ["--eval-freq", 2, "--ckpt-freq", 3, "-b", 2, *flags, "-e", name]
    place, hooks = folder / name, () if name in INDUCTOR else (jobs.without_inductor,)
    stops = on(0, jobs.stop_in(3))
    assert "as asked" in Job(folder, 4, *every, hooks=(*hooks, stops)).succeed(200)
    assert jobs.last_step(place) < 6 and not (place / "export").exists()
    output = Job(folder, 4, *every, hooks=hooks).succeed(200)
    assert "resuming after step" in output and "results in" in output, output
    table = {key: [row[key] for row in jobs.rows(place) if key in row]
             for key in ("loss", "grad_norm", "val_loss")}  # fmt: skip
    assert [len(values) for values in table.values()] == [6, 6, 3], jobs.rows(place)
    return table, AutoModelForCausalLM.from_pretrained(place / "export")


@pytest.fixture(scope="module")
def plain_run(folder) -> tuple[dict, torch.nn.Module]:
    """A whole run without such flags; its validation loss is plain transformers' of its export."""
    table, model = whole_run(folder, "plain", [])
    ids = rows_of(folder / "text.txt")["validation"][:]["input_ids"]
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert len(ids) <= script.EVAL_SEQUENCES and abs(table["val_loss"][-1] / expected - 1) < 1e-5
    return table, model


@pytest.mark.parametrize(
    "name", [*WHOLE, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_whole_run(folder, plain_run, name):
    """Each flag from the first step to the export computes what the plain run does."""
    flags, tolerance = (WHOLE | SLOW)[name]
    table, model = whole_run(folder, name, flags)
    errors = {
        key: max(abs(a / b - 1) for a, b in zip(values, plain_run[0][key], strict=True))
        for key, values in table.items()
    }
    # Of fp32 weights, also where they are computed in bf16 and the head is still gathered.
    assert jobs.exported_as_saved(folder / name)
    weights = dict(plain_run[1].named_parameters())
    errors["weights"] = max(distance(p, weights[n]) for n, p in model.named_parameters())
    last = ", ".join(f"{key} {values[-1]:.6f}" for key, values in table.items())
    print(name, "|", last, "|", {key: f"{error:.1e}" for key, error in errors.items()})
    assert all(error <= tolerance for error in errors.values()), errors


def write_examples(folder: Path, kind: str) -> list:
    """A file of prompts or of chats, and a model whose tokenizer has a chat template; as flags."""
    tokenizer = rust_tokenizer(template=CHATML)
    plain_model(llama(vocab_size=len(tokenizer) + 4)).save_pretrained(folder / "chatty")
    tokenizer.save_pretrained(folder / "chatty")
    rows = []
    for i in range(120):
        question, answer = f"what is {i}? " * (1 + i % 3), f"it is {i} " * (1 + i % 5)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": chat * (1 + i % 2)})
        if kind == "prompts":
            rows[-1] = {"prompt": question, "completion": answer}
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["-m", folder / "chatty", "-d", folder / f"{kind}.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "chats"])
def test_whole_run_on_examples(folder, kind):
    """Prompts and chats to the export: the same losses on another layout, and transformers' own."""
    flags = [*write_examples(folder, kind), "-s", 64, "--lr", 1e-3, "--global-batch-size", 4]
    flags += ["--max-steps", 4, "--ckpt-freq", 2, "--eval-freq", 2]
    Job(folder, 4, *flags, "--tp", 2, "-b", 2, "-e", f"{kind} once").succeed()
    stopped = (on(0, jobs.stop_in(3)),)
    output = Job(folder, 4, *flags, "--tp", 2, "-e", f"{kind} twice", hooks=stopped).succeed()
    assert "120 documents" in output and "labels that count" in output, output
    Job(folder, 2, *flags, "--tp", 1, "-e", f"{kind} twice").succeed()
    once, twice = (losses(folder / f"{kind} {word}") for word in ("once", "twice"))
    assert distance(torch.tensor(twice), torch.tensor(once)) < 1e-5, (once, twice)
    args = script.parse_args([str(word) for word in flags])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "chatty")
    rows = script.load_data(args, tokenizer, len(tokenizer))["validation"][:]
    model = AutoModelForCausalLM.from_pretrained(folder / f"{kind} twice" / "export")
    with torch.no_grad():
        logits = model(rows["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = rows["input_ids"].masked_fill(~rows["counts"], -100)[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    found = [row["val_loss"] for row in jobs.rows(folder / f"{kind} twice") if "val_loss" in row]
    assert (labels == -100).any() and distance(found[-1], expected) < 1e-5, (found, expected)


@pytest.mark.slow
def test_torchrun_restarts_and_stops(tmp_path):
    """torchrun starts the ranks again after one was killed, and they save on SIGTERM to it."""
    flags = ["--max-steps", 30, "--ckpt-freq", 2, "-e", "run"]
    (tmp_path / "text.txt").write_text(jobs.TEXT * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    command += ["--max-restarts", 1, "--standalone", ROOT / "train_llm.py"]
    command += ["-d", tmp_path / "text.txt", "--save-dir", tmp_path, *jobs.RUN, *flags]
    log, place = tmp_path / "torchrun", tmp_path / "run"
    # Without it the ranks would find the keys of those before them (docs/running.md).
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "w") as output:
        agent = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, start_new_session=True,
            env=env,
        )  # fmt: skip

    def reach(step: int) -> None:
        deadline = time.monotonic() + 90
        while jobs.last_step(place) < step:
            assert agent.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)

    try:
        reach(4)
        os.kill(children(agent)[1], signal.SIGKILL)
        reach(9)
        assert "resuming" in log.read_text(), log.read_text()
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 1, log.read_text()  # torchrun's own code for a signal
    finally:
        kill_all([agent])
    assert "as asked" in log.read_text(), log.read_text()
    last = jobs.last_step(place)
    assert 9 <= last < 30
    assert f"after step {last}," in Job(tmp_path, 2, *flags).succeed()
    assert len(losses(place)) == 30


@pytest.mark.slow
def test_torchrun_killed(tmp_path):
    """Ranks whose torchrun was killed do not train on: they save and leave."""
    (tmp_path / "text.txt").write_text(jobs.TEXT * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    command += [ROOT / "train_llm.py", "-d", tmp_path / "text.txt", "--save-dir", tmp_path]
    command += [*jobs.RUN, "--max-steps", 2000, "--ckpt-freq", 1000, "-e", "run"]
    with open(tmp_path / "torchrun", "w") as output:
        agent = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, start_new_session=True
        )
    deadline, ranks = time.monotonic() + 90, []
    try:
        while jobs.last_step(tmp_path / "run") < 5:
            assert time.monotonic() < deadline, (tmp_path / "torchrun").read_text()
            time.sleep(0.05)
        ranks = children(agent)
        agent.kill()
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, (tmp_path / "torchrun").read_text()
            time.sleep(0.05)
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kill_all([agent])
    assert "stopped as asked" in (tmp_path / "torchrun").read_text()
    assert len(jobs.complete(tmp_path / "run")) == 1 and jobs.last_step(tmp_path / "run") < 1000


FAILS = """
import os, runpy, sys, torch, transformers
forward = transformers.LlamaForCausalLM.forward

def fail(self, *args, **kwargs):
    if not torch.is_grad_enabled() and os.environ["RANK"] in os.environ["FAILING"]:
        raise KeyError("evaluation")
    return forward(self, *args, **kwargs)

transformers.LlamaForCausalLM.forward = fail
sys.path.insert(0, os.environ["ROOT"])
runpy.run_path(os.environ["ROOT"] + "/train_llm.py", run_name="__main__")
"""


@pytest.mark.parametrize(("ranks", "failing"), [(2, "1"), (2, "0 1")])
@pytest.mark.slow
def test_failed_evaluation(tmp_path, ranks, failing):
    """An exception on one rank or on all: its traceback once, and not a step is lost."""
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "text.txt").write_text(jobs.TEXT * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    command += ["--master-port", free_port(), tmp_path / "fails.py", "-d", tmp_path / "text.txt"]
    flags = [*jobs.RUN[:4], "--max-steps", 4, "-e", "run"]
    command += ["--save-dir", tmp_path, *flags]
    code, output = run(command, 120, FAILING=failing, ROOT=str(ROOT))
    assert code == 1 and output.count("KeyError: 'evaluation'") == 1, output
    assert output.count("\nTraceback") == 2, output  # and torchrun's own
    assert "resuming after step 4" in Job(tmp_path, 2, *flags, "--log-freq", 10).succeed()
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows if "loss" in row] == [1, 4]
    assert [row["step"] for row in rows if "val_loss" in row] == [4]
    assert (tmp_path / "run" / "export" / "config.json").exists()
