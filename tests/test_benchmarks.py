"""What benchmarks/ measures and predicts, in its smallest form."""

import functools
import itertools
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

import train_llm as script
from ranks import ROOT, passes, run

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 704, 6, 8, 4, 1024
SEQ_LENGTH, BATCH = 256, 2


def plan(model: str, ranks: int, *flags) -> list[dict]:
    """The rows that benchmarks/plan.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        rows, environment = Path(folder, "rows.json"), {"RANK": "", "WORLD_SIZE": ""}
        command = [sys.executable, ROOT / "benchmarks" / "plan.py", "-m", model, "--json", rows]
        code, output = run([*command, "--ranks", ranks, *flags], 120, **environment)
        assert code == 0 and "| **peak** |" in output and "tokens/s per GPU" in output, output
        return json.loads(rows.read_text())


def measured(tied: bool, recompute: bool, dtype: str) -> dict:
    """Peak bytes, as the allocator saw them, and collectives of a step on (2, 2) on this rank."""
    mesh = script.build_mesh("cpu", 2)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY,
        tie_word_embeddings=tied, pad_token_id=None,
    )  # fmt: skip
    model = script.build_model(config, mesh, script.DTYPES[dtype], 0, recompute=recompute)
    optimizer = script.build_optimizer(model, 0.1)
    ids = [torch.zeros(BATCH, SEQ_LENGTH, dtype=torch.int64)]
    with CommDebugMode() as comm:
        script.train_step(model, optimizer, ids, 1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        script.train_step(model, optimizer, ids, 1.0)
    events = profile.profiler.kineto_results.events()  # the public ones lack the order
    memory = (e for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]")
    step = max(itertools.accumulate(e.nbytes() for e in memory))
    states = [p.to_local() for p in model.parameters()]
    for state in optimizer.state.values():
        states += [state[key].to_local() for key in ("exp_avg", "exp_avg_sq")]
    return {
        "peak": step + sum(tensor.nbytes for tensor in states),
        "collectives": {op.__name__.split(".")[-1]: n for op, n in comm.get_comm_counts().items()},
    }


def predicts(tied: bool, dtype: str, fake: bool) -> None:
    """The predicted peak is within 10 % of the measured one, the collectives are the same.

    Gloo has buffers of its own, up to a quarter of a recomputed step's peak in this small model.
    So recomputation is compared on real tensors as rank 0 of a fake process group, which has none.
    """
    if fake:
        dist.destroy_process_group()
        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    real = [measured(tied, recompute, dtype) for recompute in (False, True)]
    if dist.get_rank() == 0:
        model = f"{HIDDEN},{INTERMEDIATE},{LAYERS},{HEADS},{KV_HEADS},{VOCABULARY}"
        rows = plan(model + ",tied" * tied, 4, "-s", SEQ_LENGTH, "-b", BATCH, "--dtype", dtype)
        rows = [row for row in rows if row["tp"] == 2]
        for row, found in zip(rows, real, strict=True):
            assert row["collectives"] == found["collectives"], (row, found)
            if fake or not row["recompute"]:
                assert abs(row["peak"] / found["peak"] - 1) < 0.1, (row, found)
        # Recomputing has to make a difference that a wrong prediction would miss.
        assert real[1]["peak"] < 0.8 * real[0]["peak"], real
    dist.barrier()


CHECKS = {
    "gloo": functools.partial(predicts, False, "fp32", False),
    "fake_untied": functools.partial(predicts, False, "fp32", True),
    "fake_tied": functools.partial(predicts, True, "bf16", True),
}
GROUPS = {4: ["gloo"], 1: ["fake_untied", "fake_tied"]}


@pytest.mark.parametrize(("world_size", "name"), [(w, name) for w in GROUPS for name in GROUPS[w]])
def test_plan_against_measurement(request, world_size, name):
    passes(request, world_size, GROUPS[world_size], name)


def test_plan_against_arithmetic():
    """States and traffic of Llama 3.1 8B, counted by hand."""
    hidden, intermediate, layers, vocabulary, kv, s = 4096, 14336, 32, 128256, 1024, 512
    matrices = layers * (2 * hidden * (hidden + kv) + 3 * hidden * intermediate)
    matrices += 2 * vocabulary * hidden
    norms = (2 * layers + 1) * hidden
    for row in plan("llama-3.1-8b", 8, "-s", s, "-b", 2):
        dp, tp = row["dp"], row["tp"]
        parameters = 4 * (matrices // 8 + norms // dp)
        assert row["parameters"] == row["gradients"] == parameters
        assert row["optimizer"] == 2 * parameters
        # 2 bytes forward and, but for the head, again backward; 4 for the gradient's reduce-scatter
        gathered = 2 * (2 * (matrices // tp + norms) - vocabulary * hidden // tp - hidden)
        reduced = 4 * (matrices // tp + norms)
        assert row["sent_dp"] == (gathered + reduced) * (dp - 1) // dp
        # each layer gathers and scatters twice forward and twice backward, and a recomputed one
        # twice more, but for the last scatter, which nothing needs; both ends once each
        times = layers * (11 if row["recompute"] else 8) + 4
        residual = times * 2 * s * hidden * 2
        gradients = 2 * norms * 2  # all-reduce sends twice
        assert row["sent_tp"] == pytest.approx((residual + gradients) * (tp - 1) / tp, rel=0.002)
    big = plan("llama-3.1-70b", 512, "-s", 4096, "--global-batch-size", 128)
    assert {row["tp"] for row in big} == {4, 8} and all(row["best_batch"] for row in big[1::2])
