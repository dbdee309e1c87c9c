"""The CUDA path without a GPU: what waits for the device, and which group and device talk."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from ranks import ROOT, run

pytestmark = pytest.mark.slow
DP, TP, WORLD = [0, 2], [0, 1], [0, 1, 2, 3]  # the groups of rank 0 in 2 dp x 2 tp


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """What torch's autograd needs to run on fake CUDA tensors, compiled."""
    if torch.version.cuda or not shutil.which("g++"):
        pytest.skip("for a torch without CUDA, and needs g++")
    file = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    home, source = Path(torch.__file__).parent, ROOT / "tests" / "fake_cuda.cpp"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", file]
    command += ["-I", home / "include", "-L", home / "lib"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return file


def events(library: Path, case: str) -> dict:
    """What fake_cuda.py says of a case."""
    code, output = run([sys.executable, ROOT / "tests" / "fake_cuda.py", library, case], 300)
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


def waits_in_steps(found: dict) -> set:
    """Waits for the device while the script trains and votes; those of logs are not among them."""
    return {(where, what) for where, what in found["syncs"] if where.startswith(("step", "vote"))}


def collectives(found: dict) -> set:
    """Kinds of collectives as (where, name, ranks, devices)."""
    return {
        (where.split()[0], name, *map(tuple, (ranks, devices)))
        for where, name, ranks, devices in found["collectives"]
    }


def of(where: str, ranks: list[int], device: str, *names: str) -> set:
    return {(where, name, tuple(ranks), (device,)) for name in names}


MODEL = [
    (TP, "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"),
    (DP, "_allgather_base_"),
]
STEP = {kind for ranks, *names in MODEL for kind in of("step", ranks, "cuda", *names)}
STEP |= of("step", DP, "cuda", "_reduce_scatter_base_")
STEP |= of("step", WORLD, "cuda", "all_reduce")  # the gradient norm, on the flattened mesh
STEP |= of("step", DP, "cuda", "allreduce_")  # the number of labels


@pytest.mark.parametrize("case", ["train", "recompute"])
def test_path(library, case):
    """Only a step that logs or saves waits; every collective has its device and its group."""
    found = events(library, case)
    assert found["devices"] == ["cuda:0"] and found["row"]["mfu"] is not None
    # The device is chosen before NCCL could make a context on another one.
    assert [name for name, _ in found["calls"][:2]] == ["set_device", "init_process_group"]
    assert found["calls"][1][1] == "cpu:gloo,cuda:nccl"
    assert Counter(name for name, _ in found["calls"])["pin_memory"] == 2 * (6 * 2 + 3)
    # Steps 1, 3 and 6 log, and ask first whether all gradients were finite.
    assert waits_in_steps(found) == {(f"step {step}", "item") for step in (1, 3, 6)}
    assert Counter(map(tuple, found["syncs"]))["log", "item"] == 3 * 2  # loss and gradient norm
    assert {what for where, what in found["syncs"] if where == "evaluate"} == {"item"}
    expected = STEP | of("vote", WORLD, "cpu", "allreduce_")
    expected |= of("log", DP, "cuda", "allreduce_") | of("log", WORLD, "cpu", "allreduce_")
    expected |= {kind for ranks, *names in MODEL for kind in of("evaluate", ranks, "cuda", *names)}
    expected |= of("evaluate", DP, "cuda", "allreduce_") | of("evaluate", WORLD, "cpu", "barrier")
    assert collectives(found) == expected


def test_control(library):
    """A wait and a collective of the wrong group in every step are seen."""
    found = events(library, "broken")
    assert ("step 2", "item") in waits_in_steps(found)
    assert of("step", WORLD, "cuda", "allreduce_") <= collectives(found)


def test_gpu_benchmark(library):
    """The steps that benchmarks/gpu.py times do not wait for the device either."""
    found = events(library, "gpu")
    assert not waits_in_steps(found) and collectives(found) == STEP
