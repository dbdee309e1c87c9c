"""What benchmarks/ measures and predicts, in its smallest form."""

import functools
import itertools
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig

import train_llm as script
from ranks import ROOT, Ranks, passes, run
from test_parity import build_model, fake_ranks

sys.path.insert(0, str(ROOT / "benchmarks"))
import plan

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 704, 4, 8, 4, 1024
SEQ_LENGTH, BATCH = 256, 2


def write_rows(folder: Path, model: str, ranks: int, *flags) -> None:
    """What benchmarks/plan.py writes to rows.json."""
    words = ["-m", model, "--json", folder / "rows.json", "--ranks", ranks, *flags]
    plan.main([str(word) for word in words])


def config_of(tied: bool, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=vocabulary,
        tie_word_embeddings=tied, pad_token_id=None,
    )  # fmt: skip


def measured(config: LlamaConfig, recompute=False, dtype="fp32", tp=2, micro=1) -> dict:
    """Peak bytes, as the allocator saw them, and collectives of a step of `micro` micro-batches."""
    mesh = script.build_mesh("cpu", tp)
    model = build_model(config, mesh, script.DTYPES[dtype], 0, recompute=recompute)
    optimizer = script.build_optimizer(model, 1e-3, 0.1)
    batches = [(torch.zeros(BATCH, SEQ_LENGTH, dtype=torch.int64),) * 2] * micro
    with CommDebugMode() as comm:
        script.train_step(model, optimizer, batches[:1], 1.0, mesh["dp"])
    with torch.profiler.profile(profile_memory=True) as profile:
        script.train_step(model, optimizer, batches, 1.0, mesh["dp"])
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


def close(predicted: dict, peak: int, found: dict) -> None:
    """The predicted peak is within 10 % of the measured one, the collectives are the same."""
    assert predicted["collectives"] == found["collectives"], (predicted, found)
    assert abs(peak / found["peak"] - 1) < 0.1, (peak, found)


def predicts(tied: bool, dtype: str) -> None:
    """The prediction is close to real tensors as rank 0 of a fake process group of 4 ranks.

    Gloo has buffers of its own, up to a quarter of a recomputed step's peak in this small model.
    """
    fake_ranks(4)
    real = []
    for recompute in (False, True):
        config = config_of(tied, VOCABULARY)
        real.append(measured(config, recompute, dtype))
        row = plan.predict(config, 2, SEQ_LENGTH, BATCH, dtype, recompute)
        close(row, row["peak"](BATCH), real[-1])
    # Recomputing has to make a difference that a wrong prediction would miss.
    assert real[1]["peak"] < 0.8 * real[0]["peak"], real


def predicts_gloo() -> None:
    """The same, without recomputation, for the first of 4 real ranks."""
    real = measured(config_of(False, VOCABULARY))
    if dist.get_rank() == 0:
        model = f"{HIDDEN},{INTERMEDIATE},{LAYERS},{HEADS},{KV_HEADS},{VOCABULARY}"
        command = [sys.executable, ROOT / "benchmarks" / "plan.py", "-m", model, "--ranks", 4]
        command += ["-s", SEQ_LENGTH, "-b", BATCH, "--dtype", "fp32", "--node-size", 2]
        with tempfile.NamedTemporaryFile() as file:
            code, output = run([*command, "--json", file.name], 120)
            assert code == 0, output
            rows = json.load(file)
        (row,) = (r for r in rows if r["tp"] == 2 and not r["recompute"])
        close(row, row["peak"], real)
    dist.barrier()


def predicts_chunks() -> None:
    """The predicted peak of a loss in four chunks is within 2 % of the measured one."""
    fake_ranks(4)
    peaks = []
    for tokens in (BATCH * SEQ_LENGTH // 4, BATCH * SEQ_LENGTH):
        script.CHUNK_BYTES = tokens * 4096 * 4
        config = config_of(True, vocabulary=8192)
        real = measured(config)["peak"]
        found = plan.predict(config, 2, SEQ_LENGTH, BATCH, "fp32", False)["peak"](BATCH)
        assert abs(found / real - 1) < 0.02, (tokens, found, real)
        peaks.append(real)
    assert peaks[0] < 0.9 * peaks[1], peaks
    # Of the head's size there are the sum of its gradients and the one of a chunk at most; the rest
    # is a chunk's logits, an eighth of a matrix, with their copies.
    head = 8192 // 2 * HIDDEN * 4
    script.CHUNK_BYTES = head // 8
    row = plan.predict(config, 2, SEQ_LENGTH, BATCH, "fp32", False)
    assert 2 * head < row["logits_and_loss"] < 3 * head, row


def predicts_micro_batches() -> None:
    """With four micro-batches, too; a step keeps sharded gradients between them, nothing else."""
    fake_ranks(4)
    config = config_of(False, VOCABULARY)
    for tp in (1, 2):
        peaks, rows = [], []
        for micro in (1, 4):
            real = measured(config, tp=tp, micro=micro)
            rows.append(plan.predict(config, tp, SEQ_LENGTH, BATCH, "fp32", False, micro))
            peaks.append(real["peak"])
            assert abs(rows[-1]["peak"](BATCH) / real["peak"] - 1) < 0.1, (tp, micro, rows, real)
        assert peaks[1] - peaks[0] < 1.5 * rows[0]["gradients"], (tp, peaks, rows)
        for dim in ("sent_tp", "sent_dp"):
            assert rows[1][dim] == pytest.approx(4 * rows[0][dim], rel=1e-3), (tp, rows)
        print(f"tp {tp}: measured {peaks}, predicted {[row['peak'](BATCH) for row in rows]}")


def arithmetic() -> None:
    """States and traffic of Llama 3.1 8B on 8 ranks, counted by hand."""
    fake_ranks(8)
    hidden, intermediate, layers, vocabulary, kv, s = 4096, 14336, 32, 128256, 1024, 512
    matrices = layers * (2 * hidden * (hidden + kv) + 3 * hidden * intermediate)
    matrices += 2 * vocabulary * hidden
    norms = (2 * layers + 1) * hidden
    config = plan.llama(*plan.PRESETS["llama-3.1-8b"])
    for tp, recompute in ((2, False), (2, True), (8, False)):
        row, dp = plan.predict(config, tp, s, 2, "bf16", recompute), 8 // tp
        parameters = 4 * (matrices // 8 + norms // dp)
        assert row["parameters"] == row["gradients"] == parameters
        assert row["optimizer"] == 2 * parameters
        # 2 bytes forward and, but for the head, again backward; 4 for the gradient's reduce-scatter
        gathered = 2 * (2 * (matrices // tp + norms) - vocabulary * hidden // tp - hidden)
        reduced = 4 * (matrices // tp + norms)
        assert row["sent_dp"] == (gathered + reduced) * (dp - 1) // dp
        # each layer gathers and scatters twice forward and twice backward, and a recomputed one
        # twice more, but for the last scatter, which nothing needs; both ends once each
        times = layers * (11 if recompute else 8) + 4
        residual = times * 2 * s * hidden * 2
        gradients = 2 * norms * 2  # all-reduce sends twice
        assert row["sent_tp"] == pytest.approx((residual + gradients) * (tp - 1) / tp, rel=0.002)
        # The formulas of choosing.md leave out norms, and that the head is gathered only once.
        states, size = 4 * row["parameters"], matrices + norms
        assert states == pytest.approx(16 * size / 8, rel=0.01)
        assert row["sent_dp"] == pytest.approx(8 * size / tp * (dp - 1) / dp, rel=0.02)
        if not recompute:
            sent = (8 * layers + 4) * 2 * s * hidden * 2 * (tp - 1) / tp
            assert row["sent_tp"] == pytest.approx(sent, rel=0.01)
            kept = (24 / tp + 2) * 2 * s * hidden * 2 * layers
            assert row["activations"] == pytest.approx(kept, rel=0.15)


CHECKS = {
    "untied": functools.partial(predicts, False, "fp32"),
    "tied": functools.partial(predicts, True, "bf16"),
    "chunks": predicts_chunks,
    "micro_batches": predicts_micro_batches,
    "arithmetic": arithmetic,
    "gloo": predicts_gloo,
}


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(1, "arithmetic"), *(pytest.param(ranks, name, marks=pytest.mark.slow) for ranks, name in
     ((1, "tied"), (1, "chunks"), (1, "micro_batches"), (1, "untied"), (4, "gloo")))],
)  # fmt: skip
def test_plan(request, world_size, name):
    passes(request, world_size, [name], name)


@pytest.mark.slow
def test_plan_of_a_cluster(tmp_path):
    """The program for 70B on 512 ranks: one layout fits the global batch, with one sequence."""
    flags = ["-s", 4096, "--global-batch-size", 64]
    main = functools.partial(write_rows, tmp_path, "llama-3.1-70b", 512, *flags)
    output = Ranks(1, main, tmp_path / "log").succeed()
    assert "| **peak** |" in output and "tokens/s per GPU" in output, output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["tp"] for row in rows} == {8} and all(row["best_batch"] == 1 for row in rows)


def benchmark(name: str, out: Path, *flags) -> dict:
    """What a benchmark writes to its JSON file."""
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--out", out, *flags]
    code, output = run(command, 1200)
    assert code == 0, output
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.slow
def test_layouts(tmp_path):
    result = benchmark("layouts", tmp_path, "--layouts", "1x1", "1x2", "--steps", 3)
    runs = [[row["loss"] for row in run["metrics"][:3]] for run in result["same_batch"].values()]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert (tmp_path / "layouts.md").read_text().count("\n| ") == 3
    assert len({round(loss, 4) for loss in runs[0]}) == 3, "each batch has another loss"


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("accelerate")
    names = ["one plain process", "transformers", "train_llm.py", "train_llm.py, all-to-all"]
    flags = ["--rounds", 1, "--steps", 8, "--peers", *names]
    peers = benchmark("peers", tmp_path, *flags)["peers"]
    assert list(peers) == names
    for (found,) in peers.values():
        assert found["losses"] == pytest.approx(peers["one plain process"][0]["losses"], rel=1e-4)
        assert found["peak_tensor_mib"] > 10
    alone = {name: found["cpu_ms_alone"] for name, (found,) in peers.items()}
    assert [name for name, ms in alone.items() if not ms] == names[3:], alone
    # All ranks of a sharded model compute together what the plain process does, and some more.
    plain, *others = list(alone.values())[:3]
    assert all(plain / 2 < ms < 4 * plain for ms in others), alone


@pytest.mark.slow
def test_gpu_smoke(tmp_path):
    """Its first parts; all of them, as rehearsed in docs/gpu.md, take ten minutes here."""
    result = benchmark("gpu", tmp_path, "--smoke", "--parts", "parity", "run")
    rows = result["rows"]
    assert not [row for row in rows if "failed" in row]
    jobs = Counter(row["job"] for row in rows)
    assert jobs["parity llama tied bf16"] == 3 and jobs["parity compile"] == 1, jobs
    assert jobs["run"] == 3, jobs
    error = {row["case"]: row["error"] for row in rows if "case" in row}
    assert max(error["llama"], error["tied"], error["compile"]) < 1e-4 < error["bf16"] < 0.1
    error = {row["run"]: row.get("relative_error") for row in rows if "run" in row}
    assert error["from its checkpoint"] == 0 and error["from its export"] < 1e-5


@pytest.mark.slow
def test_soak(tmp_path):
    """A mixture killed and moved under torchrun: the losses and weights of plain transformers.

    Each token goes to all experts. Of three, rounding may choose another one, by when it is killed.
    """
    flags = ["--steps", 24, "--ends", 2, "--seed", 25, "--experts-per-token", 12]
    result = benchmark("soak", tmp_path, *flags)
    assert len({(row["dp"], row["tp"]) for row in result["ends"]}) == 2
    assert all(row["resumed"] < row["last"] < 24 for row in result["ends"]), result["ends"]
    for found in result["compared"].values():
        assert found["in_all"] < 1e-5 and found["weights"] < 1e-4, result["compared"]
    assert result["compared"]["often"]["last_loss"] < 0.9 * math.log(263), "it does not learn"


@pytest.mark.slow
def test_traps(tmp_path):
    """Each trap does what traps.md says, and this script does not fall into it."""
    result = benchmark("traps", tmp_path)
    naive, mended, plain = result["tied"]
    assert abs(mended / plain - 1) < 1e-5 < 1e-3 < abs(naive / plain - 1)
    assert result["qk_norm"][1] < 1e-4 < 0.1 < result["qk_norm"][0]
    assert result["router"][1] < 1e-4 < 0.1 < result["router"][0]
    assert result["compiled_embedding"] == [False, True]
    naive, mended, plain = result["compiled_evaluation"]
    assert ("no attribute 'elem'" in naive) == (torch.__version__ < "2.15")  # which has mended it
    assert float(mended) == pytest.approx(float(plain), rel=1e-5)
    assert result["fresh_optimizer"] == [0, 2] and result["sampler"] == [True, False]
    naive, mended, plain = result["label_counts"]
    assert abs(mended / plain - 1) < 1e-5 < 1e-3 < abs(naive / plain - 1)


@pytest.mark.slow
def test_families():
    """Three families that pass and one that is refused, as docs/families.json has them."""
    published = json.loads((ROOT / "docs" / "families.json").read_text())["results"]
    names = ["llama", "olmo2", "mixtral", "gpt2"]
    code, output = run([sys.executable, ROOT / "benchmarks" / "families.py", *names], 120)
    assert code == 0
    for name in names:
        assert f"{name}: {published[name][:100]}" in output, output
    assert [published[name] == "ok" for name in names] == [True, True, True, False]
