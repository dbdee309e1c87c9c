"""The script as users start it."""

import copy
import fcntl
import functools
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

import train_llm as script
from jobs import RUN, TEXT, Job, cache_in, complete, last_step, no_more_files, only_on
from ranks import ROOT, Ranks, run, torchrun

CONFIG = LlamaConfig(
    num_attention_heads=32, num_key_value_heads=8, intermediate_size=96, hidden_size=96,
    vocab_size=259, max_position_embeddings=512,
)  # fmt: skip


def problem(monkeypatch, command: str, world_size: int = 8, config=CONFIG) -> str:
    """What is said of this command line before anything is read; nothing if all is well."""
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    try:
        args = script.parse_args(command.split())
        script.check_args(args, config)
    except script.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--tp 3", "--tp 3 does not divide world size (8), attention heads (32); these do: "
         "[1, 2, 4, 8]"),
        ("--tp 16", "--tp 16 does not divide world size (8); these do: [1, 2, 4, 8]"),
        ("--tp 2 --global-batch-size 6", "batch size x dp = 16; 16 is"),
        ("--tp 2 -b 3 --global-batch-size 8", "batch size x dp = 12; 12 is"),
        ("-s 513", "--seq-length 513 is more than the model's 512"),
        *[(f"{flag} {value}", f"{flag} needs at least 1 and finite, not {value}")
          for flag in ("--tp", "--batch-size", "--global-batch-size", "--max-steps", "--num-epochs",
                       "--log-freq", "--ckpt-freq", "--keep-checkpoints") for value in (0, -1)],
        ("-s 1", "--seq-length needs at least 2 and finite, not 1"),
        ("--lr 0", "--lr needs at least 1e-12 and finite, not 0.0"),
        ("--lr nan", "--lr needs at least 1e-12 and finite, not nan"),
        ("--lr inf", "--lr needs at least 1e-12 and finite, not inf"),
        ("--max-grad-norm -1", "--max-grad-norm needs at least 1e-12 and finite, not -1.0"),
        ("--weight-decay -1", "--weight-decay needs at least 0 and finite, not -1.0"),
        ("--warmup-steps -1", "--warmup-steps needs at least 0 and finite, not -1"),
        ("--seed -1", "--seed needs at least 0 and finite, not -1"),
        ("--eval-freq -1", "--eval-freq needs at least 0 and finite, not -1"),
        ("--seed two", "--seed: invalid"),
        ("-d=", "--dataset-name needs a value, not ''"),
        ("-m=", "--model-name needs a value, not ''"),
        # Abbreviations were taken, which launch.sh does not know.
        ("--exp x", "unrecognized arguments: --exp x"),
        ("--tensor 2", "unrecognized arguments: --tensor 2"),
        ("--tensor-paralel 2", "unrecognized arguments: --tensor-paralel"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--dtype fp16", "invalid choice: 'fp16'"),
    ],
)  # fmt: skip
def test_bad_flag(monkeypatch, command, expected):
    assert expected in problem(monkeypatch, command)


def test_good_flags(monkeypatch):
    assert problem(monkeypatch, "--tp 2 -b 2 --global-batch-size 16 -s 512 --device cpu") == ""
    assert problem(monkeypatch, "--warmup-steps 0 --weight-decay 0 --eval-freq 0 --seed 0") == ""


def test_unfit_model(monkeypatch):
    """Dropout is refused, and a default length is not more than the model has."""
    config = copy.deepcopy(CONFIG)
    config.attention_dropout = 0.1
    assert "'attention_dropout': 0.1" in problem(monkeypatch, "", config=config)
    args = script.parse_args(["-m", "x"])
    script.check_args(args, CONFIG)
    assert args.seq_length == 512


@pytest.mark.parametrize(
    ("ranks", "gpus", "flags"),
    [(4, 2, []), (4, 0, ["--device", "cuda"]), (1, 0, ["--device", "cuda"])],
)
def test_fewer_gpus_than_ranks(monkeypatch, ranks, gpus, flags):
    """No rank may take the CPU while others take a GPU; nothing is joined before that is known.

    The message names --device cuda, which it did not, and the other device.
    """
    names = {"LOCAL_WORLD_SIZE": ranks, "WORLD_SIZE": ranks, "LOCAL_RANK": ranks - 1}
    names |= {"RANK": ranks - 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(
        script.UserError, match=f"--device cuda.* {gpus} GPUs .* {ranks} ranks.*cpu"
    ):
        script.init_distributed(script.parse_args(flags).device)


@pytest.mark.slow
def test_bad_input_under_torchrun():
    """One message of four ranks, and torchrun's own report."""
    code, output = torchrun(4, "--tp", 2, "-s", 99999, timeout_s=90)
    assert code == 1 and output.count("\nerror: --seq-length 99999 is") == 1, output
    assert output.count("\nerror:") == 1 and 'train_llm.py", line' not in output, output


def test_tp_across_nodes(tmp_path):
    """A tp group that does not stay inside a node is warned about, with the reason."""
    for ranks_per_node in ("1", "2"):
        output = Job(tmp_path, 2, "--tp", 2, "--max-steps", 1, LOCAL_WORLD_SIZE=ranks_per_node)
        said = "every layer waits for the network" in output.succeed()
        assert said == (ranks_per_node == "1")


def test_groups_have_one_thread(tmp_path):
    """Gloo's groups have one thread each, those of the mesh, too (OneThreadGloo)."""
    Ranks(2, threads_of_groups, tmp_path / "log").succeed()


def threads_of_groups() -> None:
    script.init_distributed("cpu")
    mesh = script.build_mesh("cpu", 2)
    for group in (dist.group.WORLD, mesh["dp"].get_group(), mesh["tp"].get_group(),
                  dist.new_group(backend="gloo")):  # fmt: skip
        assert group._get_backend(torch.device("cpu")).options._threads == 1
    dist.barrier()


def test_debug(tmp_path):
    """DEBUG=1 adds the traceback of a user's error, with its cause."""
    output = Job(tmp_path, 2, "-d", tmp_path / "nothing here", DEBUG="1").wait(grace_s=0.5)
    assert output.count("Traceback") > 1 and "FileNotFoundError" in output, output
    assert output.count("\ntrain_llm.UserError: -d ") == 1, output


def test_port_in_use(tmp_path):
    """It is this rank that cannot have it; that was called "another rank has failed" before."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        job = Job(tmp_path, 1, MASTER_PORT=str(taken.getsockname()[1]))
        output = job.wait()
    assert job.codes() == [1] and "another rank" not in output, output
    assert "DistNetworkError" in output and "EADDRINUSE" in output, output


def test_too_few_open_files(tmp_path):
    """The rank that lacks them says so, and no other one speaks for it."""
    hooks = (functools.partial(only_on, 1, no_more_files),)
    job = Job(tmp_path, 2, "--max-steps", 1, hooks=hooks)
    output = job.wait(grace_s=0.5)
    assert job.codes()[1] == 1 and "Too many open files" in output, output
    assert output.count("Traceback") == 1 and "another rank" not in output, output


def test_model_that_is_not_there(tmp_path):
    """It was taken for a hub id without a word: "Repo id must be in the form ..."."""
    output = Job(tmp_path, 2, "-m", tmp_path / "nope").fail("nope, which is not a directory here")
    assert "error: -m /" in output, output


def test_cache(tmp_path):
    """A cache that cannot be used is named; its faults were said to be those of -d before."""
    hook = functools.partial(cache_in, Path("/dev/null/cache"))
    Job(tmp_path, 1, "--max-steps", 1, hooks=(hook,)).fail("cached in /dev/null/cache: ")
    (tmp_path / "own.txt").write_text(TEXT * 400)
    flags = ["-d", tmp_path / "own.txt", "--max-steps", 1]
    hooks = (functools.partial(cache_in, tmp_path / "cache"),)
    Job(tmp_path, 1, *flags, hooks=hooks).succeed()
    for file in (tmp_path / "cache").rglob("*.arrow"):
        os.truncate(file, file.stat().st_size // 2)
    Job(tmp_path, 1, *flags, hooks=hooks).fail(f"cached in {tmp_path / 'cache'}: ")


@pytest.mark.slow
def test_closed_terminal(tmp_path):
    """A run whose terminal is closed saves and stops, though it cannot print any more."""

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    leader, terminal = pty.openpty()
    (tmp_path / "text.txt").write_text(TEXT * 400)
    command = [sys.executable, ROOT / "train_llm.py", "-d", tmp_path / "text.txt", *RUN]
    command += ["--max-steps", "9999", "--num-epochs", "9999", "-e", "run", "--save-dir", tmp_path]
    job = subprocess.Popen(
        [str(word) for word in command], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(terminal)
    deadline = time.monotonic() + 60
    while last_step(tmp_path / "run") < 5:
        assert job.poll() is None and time.monotonic() < deadline
        while select.select([leader], [], [], 0.05)[0]:
            os.read(leader, 4096)
    os.close(leader)  # the kernel sends SIGHUP, and each write is an error from now on
    assert job.wait(30) == 0
    assert len(complete(tmp_path / "run")) == 1 and 5 <= last_step(tmp_path / "run") < 9999


def test_too_little_data(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    flags = ["-d", tmp_path / "short.txt", "-s", 256]
    Job(tmp_path, 2, *flags).fail("fewer than 2 sequences of 256 tokens")


def test_one_process():
    code, output = run([sys.executable, ROOT / "train_llm.py", "--max-steps", 2], 120)
    assert code == 0 and "layout: 1 cpu ranks = 1 dp x 1 tp\n" in output, output
    assert "training loss" in output and "nothing written" in output


@pytest.mark.slow
def test_default_run(tmp_path):
    """What a newcomer types learns real text, on the layout of the README, without a warning."""
    steps = script.BUILT_IN_STEPS
    code, output = run(["bash", ROOT / "launch.sh", "-e", "first", "--save-dir", tmp_path], 400)
    assert code == 0, output
    assert "layout: 4 cpu ranks = 2 dp x 2 tp\nglobal batch: 8 = 4 sequences x 2 dp x 1 " in output
    assert not re.search(r"warn|error|traceback", output, re.IGNORECASE), output
    rows = [json.loads(line) for line in open(tmp_path / "first" / "metrics.jsonl")]
    *rows, evaluation = rows
    assert evaluation.keys() == {"step", "val_loss"} and evaluation["step"] == steps
    keys = "step epoch loss grad_norm lr tokens tokens_per_s step_s data_s mfu peak_mem_gib"
    assert all(row.keys() == {*keys.split(), "world_size", "dp", "tp"} for row in rows)
    assert [row["step"] for row in rows] == [1, *range(10, steps + 1, 10)]
    assert all(row["tokens"] == row["step"] * 2048 for row in rows)
    assert (rows[0]["world_size"], rows[0]["dp"], rows[0]["tp"]) == (4, 2, 2)
    assert 5.5 < rows[0]["loss"] < 6.5
    assert sum(row["loss"] for row in rows[-3:]) / 3 < 2.5 and evaluation["val_loss"] < 2.5
