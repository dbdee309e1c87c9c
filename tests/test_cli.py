"""The script as users start it."""

import copy
import json
import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig

import train_llm as script
from rank_groups import ROOT, run, torchrun

CONFIG = LlamaConfig(
    num_attention_heads=32, num_key_value_heads=8, intermediate_size=96, hidden_size=96,
    vocab_size=259, max_position_embeddings=512,
)  # fmt: skip


def problems(monkeypatch, command: str, world_size: int = 8) -> str:
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    args = script.parse_args(command.split())
    tokenizer = ByT5Tokenizer(extra_ids=0)  # 259 ids
    return refused(args, CONFIG, tokenizer)


def refused(args, config, tokenizer) -> str:
    """What check_args says of this command line."""
    try:
        script.check_args(args, config, torch.device("cpu"), tokenizer)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--tp 3", "--tp 3 does not divide world size (8), attention heads (32); these do: "
         "[1, 2, 4, 8]"),
        ("--tp 16", "--tp 16 does not divide world size (8); these do: [1, 2, 4, 8]"),
        ("--export-only", "--export-only needs the -e NAME of a run"),
        ("--tp 2 --global-batch-size 6", "batch size x dp = 16; 16 is"),
        ("--tp 2 -b 3 --global-batch-size 8", "batch size x dp = 12; 12 is"),
        ("-s 513", "--seq-length 513 is more than the model's 512"),
        ("--device cuda", "0 GPUs for its"),
        ("-s 1", "--seq-length 1 leaves nothing to predict"),
        *[(f"{flag} {value}", f"{flag} must be more than 0, not {value}")
          for flag in ("--tp", "--batch-size", "--global-batch-size", "--seq-length",
                       "--max-steps", "--num-epochs", "--log-freq") for value in (0, -1)],
        ("--lr 0", "--lr must be more than 0"),
        ("--lr nan", "--lr must be more than 0, not nan"),
        ("--lr inf", "--lr must be more than 0, not inf"),
        ("--max-grad-norm -1", "--max-grad-norm must be more than 0"),
        ("--weight-decay -1", "--weight-decay must be 0 or more"),
        ("--warmup-steps -1", "--warmup-steps must be 0 or more"),
        ("--seed -1", "--seed must be 0 or more"),
        ("--eval-freq -1", "--eval-freq must be 0 or more"),
    ],
)  # fmt: skip
def test_bad_flag(monkeypatch, command, expected):
    assert expected in problems(monkeypatch, command)


def test_good_flags(monkeypatch):
    assert problems(monkeypatch, "--tp 2 -b 2 --global-batch-size 16 -s 512 --device cpu") == ""
    # tp 8 does not divide a vocabulary of 259: dp has to divide the hidden size 96
    assert problems(monkeypatch, "--tp 8", 24) == ""
    assert "vocabulary (259)" in problems(monkeypatch, "--tp 8", 40)


def test_unfit_model(monkeypatch):
    """A tokenizer without an end token, and dropout; more ids than the vocabulary are no error."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    args = script.parse_args([])
    large, config = ByT5Tokenizer(extra_ids=125), copy.deepcopy(CONFIG)
    assert refused(args, config, large) == ""
    config.attention_dropout = 0.1
    endless = ByT5Tokenizer(extra_ids=0)
    endless.eos_token = None
    first, second = refused(args, config, endless).splitlines()
    assert "no end token" in first and "'attention_dropout': 0.1" in second


def test_uneven_length_needs_torch_2_13(monkeypatch):
    command = "--tp 2 -s 33 --global-batch-size 8 -b 1"
    assert problems(monkeypatch, command) == ""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu128"))
    assert problems(monkeypatch, command) == (
        "--tp 2 does not divide --seq-length 33, which needs torch 2.13"
    )
    assert problems(monkeypatch, command.replace("33", "32")) == ""


def test_all_problems_at_once():
    """One message, from rank 0, naming everything; no traceback but torchrun's own."""
    code, output = torchrun(2, "--tp", 3, "-s", 99999, "--lr", -1, timeout_s=60)
    assert code != 0
    for message in ("--tp 3 does not divide", "--seq-length 99999 is", "--lr must be"):
        assert output.count(message) == 1, output
    assert 'train_llm.py", line' not in output


def test_tp_across_nodes(monkeypatch):
    """A tp group that does not stay inside a node is warned about, with the reason."""
    args = script.parse_args(["--tp", "4"])
    args.total_steps, args.global_batch_size = 1, 8
    args.device, args.dtype = "cpu", "fp32"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(script.built_in_config())
    for ranks_per_node, warned in ((8, False), (4, False), (2, True), (6, True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_per_node))
        text = script.announce(args, model, {}, {"dp": 2, "tp": 4})
        assert ("every layer waits for the network" in text) == warned
        assert "on 8 cpu ranks = 2 dp x 4 tp" in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--tensor-paralel", "unrecognized arguments"), ("--device", "invalid choice"),
     ("--dtype", "invalid choice")],
)  # fmt: skip
def test_unknown_flag(flag, message):
    code, output = torchrun(2, flag, 2, timeout_s=60)
    assert code != 0 and output.count(message) == 1, output
    assert 'train_llm.py", line' not in output


def test_too_little_data(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    code, output = torchrun(2, "-d", tmp_path / "short.txt", timeout_s=60)
    assert code != 0 and output.count("error:") == 1, output
    assert "not one sequence of 256 tokens" in output and 'train_llm.py", line' not in output


def test_one_process():
    code, output = run([sys.executable, ROOT / "train_llm.py", "--max-steps", 2], 120)
    assert code == 0 and "on 1 cpu ranks = 1 dp x 1 tp" in output, output
    assert "training loss" in output and "nothing written" in output


def test_default_run(tmp_path):
    """What a newcomer types learns real text, on the layout of the README, without a warning."""
    flags = ["-e", "first", "--save-dir", tmp_path]
    code, output = run(["bash", ROOT / "launch.sh", *flags], 400)
    assert code == 0, output
    assert "on 4 cpu ranks = 2 dp x 2 tp; global batch 8 = 4 sequences x 2 dp x 1 accumul" in output
    assert not re.search(r"warn|error|traceback", output, re.IGNORECASE), output
    rows = [json.loads(line) for line in open(tmp_path / "first" / "metrics.jsonl")]
    *rows, evaluation = rows
    assert evaluation.keys() == {"step", "val_loss"} and evaluation["step"] == script.BUILT_IN_STEPS
    keys = "step epoch loss grad_norm lr tokens tokens_per_s step_s data_s mfu peak_mem_gib"
    assert all(row.keys() == {*keys.split(), "world_size", "dp", "tp"} for row in rows)
    assert [row["step"] for row in rows] == [1, *range(10, script.BUILT_IN_STEPS + 1, 10)]
    assert all(row["tokens"] == row["step"] * 2048 for row in rows)
    assert (rows[0]["world_size"], rows[0]["dp"], rows[0]["tp"]) == (4, 2, 2)
    assert 5.5 < rows[0]["loss"] < 6.5
    assert sum(row["loss"] for row in rows[-5:]) / 5 < 2.5 and evaluation["val_loss"] < 2.5
