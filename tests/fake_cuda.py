"""The script's CUDA path without a GPU, for test_cuda.py: fake_cuda.py LIBRARY CASE

Rank 0 of 2 dp x 2 tp, in a fake process group, on tensors of device "cuda" without data. Builds the
model, trains and evaluates, and prints as JSON every wait for the device and every collective.
LIBRARY is compiled from fake_cuda.cpp. CASE is one of

    train      6 steps, of which 1, 3 and 6 log
    recompute  the same with activation checkpointing
    broken     3 steps with a wait and a wrong group in each: the control
    gpu        2 steps of benchmarks/gpu.py
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

torch_lib = Path(importlib.util.find_spec("torch").origin).with_name("lib")
for library in (torch_lib / "libc10.so", torch_lib / "libtorch_cpu.so", sys.argv[1]):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # before torch asks for its devices

import numpy  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_llm as script  # noqa: E402

RANKS, TP, SEQ_LENGTH = 4, 2, 32
events = {"syncs": [], "collectives": [], "calls": []}
where = ["build"]  # what the script is doing


def sync(what: str) -> None:
    events["syncs"].append([where[-1], what])


class Stream:
    """In place of torch.cuda.Stream and Event, which this torch does not have."""

    def __init__(self, *args, **options):
        pass

    def record(self, stream=None):
        return self

    record_event = wait_stream = wait_event = wait = record

    def synchronize(self) -> None:
        sync("synchronize")


class Recorder(TorchDispatchMode):
    """Notes what waits for the device, and each collective with its group and devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # see the local tensors instead
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        on_cuda = any(isinstance(a, torch.Tensor) and a.is_cuda for a in args)
        if name == "_local_scalar_dense":
            if on_cuda:
                sync("item")
            return 0.0
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            to = torch.device(kwargs.get("device") or args[0].device).type
            if to != args[0].device.type:
                sync(f"copy to {to}")
        if name == "copy_" and on_cuda and not all(a.is_cuda for a in args[:2]):
            sync("copy")
        if name in ("nonzero", "masked_select", "equal") and on_cuda:
            sync(name)
        if name in ("index", "index_put_") and on_cuda:
            masks = any(i is not None and i.dtype == torch.bool for i in args[1])
            # Of a mask and one number on the host, torch makes masked_fill_, which does not wait.
            fill = name == "index_put_" and args[2].numel() == 1 and not args[2].is_cuda
            if masks and not fill:
                sync(name)
        if "c10d" in func.namespace and name != "wait_tensor":
            self.collective(name, args)
        return func(*args, **kwargs)

    def collective(self, name: str, args) -> None:
        tensors = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
        devices = {a.device.type for a in tensors if isinstance(a, torch.Tensor)}
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        if group is None:
            words = [a for a in args if isinstance(a, str)]
            group = dist.distributed_c10d._resolve_process_group(words[-1])
        else:
            group = dist.ProcessGroup.unbox(group)
        ranks = dist.get_process_group_ranks(group)
        events["collectives"].append([where[-1], name, ranks, sorted(devices)])


class OnCuda(TorchDispatchMode):
    """Makes the tensors that are asked for on CUDA fake ones of `fake`, and leaves meta alone."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_cuda = str(kwargs.get("device", "")).startswith("cuda")
        with self.fake if on_cuda else contextlib.nullcontext():
            return func(*args, **kwargs)


class Rows:
    """In place of a dataset: `len` sequences."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, rows):
        shape = (len(rows), SEQ_LENGTH) if isinstance(rows, list) else (SEQ_LENGTH,)
        return {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "counts": torch.ones(shape, dtype=torch.bool),
        }


def phase(name: str, function):
    """`function`, whose events are noted as those of `name`."""

    def noted(*args, **options):
        where.append(name)
        try:
            return function(*args, **options)
        finally:
            where.pop()

    return noted


def call(name: str, result=None):
    """A function that only notes that it was called."""

    def noted(*args, **options):
        events["calls"].append([name, str(args[:1])])
        return result

    return noted


def patch() -> None:
    """What CUDA and NCCL would do, as far as the script and FSDP ask for it."""
    cuda, the_stream = torch.cuda, Stream()
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = lambda *_: the_stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_device, cuda.device_count, cuda.is_initialized = lambda: 0, lambda: 2, lambda: True
    cuda.set_device = call("set_device")
    cuda.synchronize = lambda *_: sync("synchronize")
    cuda.max_memory_allocated = lambda *_: 2**30
    cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    torch.Tensor.pin_memory = lambda self, *_: call("pin_memory", self)()
    start = dist.init_process_group

    def init_process_group(backend, **options):
        events["calls"].append(["init_process_group", backend])
        start("fake", store=FakeStore(), rank=0, world_size=RANKS)

    dist.init_process_group = init_process_group
    # Module.to_empty cannot replace parameters that are fake.
    meta_model, to_empty = script.meta_model, torch.nn.Module.to_empty

    def real_meta_model(config):
        with unset_fake_temporarily():
            return meta_model(config)

    def to_cuda_only(self, *, device, recurse=True):
        return self if device == "meta" else to_empty(self, device=device, recurse=recurse)

    script.meta_model, torch.nn.Module.to_empty = real_meta_model, to_cuda_only
    script.row_order = lambda number, seed, epoch: numpy.arange(number)
    script.evaluate = phase("evaluate", script.evaluate)
    script.step_row = phase("log", script.step_row)
    script.asked_to_stop = phase("vote", script.asked_to_stop)
    step = script.train_step

    def train_step(*args):
        where[-1] = f"step {len(steps) + 1}"
        steps.append(None)
        return step(*args)

    steps = []
    script.train_step = train_step


def break_it() -> None:
    """A step that waits for the device, and adds something up over all ranks."""
    clip = script.nn.utils.clip_grads_with_norm_

    def waiting_clip(parameters, max_norm, norm):
        norm.item()
        dist.all_reduce(norm)
        clip(parameters, max_norm, norm)

    script.nn.utils.clip_grads_with_norm_ = waiting_clip


def train(case: str, device: torch.device, fake: FakeTensorMode) -> None:
    steps = 3 if case == "broken" else 6
    flags = ["--tp", TP, "-s", SEQ_LENGTH, "-b", 2, "--global-batch-size", 8, "--log-freq", 3]
    args = script.parse_args([str(flag) for flag in [*flags, "--max-steps", steps]])
    data = {"train": Rows(64), "validation": Rows(9)}
    args.total_steps, args.warmup_steps, args.steps_per_epoch, args.dtype = steps, 0, 8.0, "bf16"
    mesh = script.build_mesh(device.type, args.tp)
    config, dtype = script.built_in_model()[0], script.DTYPES[args.dtype]
    with OnCuda(fake):
        model = script.shard_model(config, mesh, dtype, case == "recompute", False)
    with fake, Recorder():
        script.init_weights(model, args.seed)
        optimizer = script.build_optimizer(model, 1e-3, args.weight_decay)
        run = script.Run(model, optimizer, None, {}, 2)
        events["row"] = script.train(args, run, data, mesh)
    events["devices"] = sorted({str(p.device) for p in model.parameters()})


def measure(fake: FakeTensorMode) -> None:
    """The part of gpu.py that is not the script's, with what it asks of CUDA."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    def zeros(low, high, shape, device):
        return torch.zeros(shape, dtype=torch.int64, device=device)

    gpu.device_type, torch.randint = lambda: "cuda", zeros
    mesh = script.build_mesh("cuda", TP)
    with OnCuda(fake):
        model = script.shard_model(gpu.TINY, mesh, torch.bfloat16, True, False)
    script.build_mesh, script.shard_model = lambda *_: mesh, lambda *_: model
    with fake, Recorder():
        step = gpu.trainer(gpu.TINY, 64, TP)
        step(2)
        step(2)


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    patch()
    case, device = sys.argv[2], script.init_distributed(None)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    if case == "broken":
        break_it()
    if case == "gpu":
        measure(fake)
    else:
        train(case, device, fake)
    print(json.dumps(events))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
