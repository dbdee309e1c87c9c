"""Every layout computes what plain transformers computes in one process."""

import copy
import functools
import io
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import train_llm as script
from ranks import passes

# Where a gradient is all rounding error, Adam's step is +-LR by chance: LR must stay small.
SEED, ROWS, LR, DECAY, CLIP = 7, 8, 1e-3, 0.1, 0.2
TOLERANCE = 1e-4


def llama(**changes) -> LlamaConfig:
    sizes = dict(
        vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    return LlamaConfig(**sizes | changes)


def plain_model(config: LlamaConfig, seed: int = SEED, device: str = "cpu") -> nn.Module:
    """The whole model, with weights drawn on `device` by transformers' own rules."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    if config.tie_word_embeddings:  # transformers draws them apart and ties them after
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.apply(model._init_weights)
    model.tie_weights()
    return model


def build_model(
    config, mesh, dtype, seed: int, folder=None, recompute=False, compile=False
) -> nn.Module:  # fmt: skip
    """The script's sharded model, with weights drawn from `seed` or read from `folder`."""
    model = script.shard_model(config, mesh, dtype, recompute, compile)
    script.init_weights(model, seed, only_buffers=folder is not None)
    if folder:
        script.load_weights(model, sorted(map(str, folder.glob("*.safetensors"))))
    return model


def plain_step(
    model, optimizer, ids: torch.Tensor, clip=CLIP, labels=None
) -> tuple[float, float, dict]:
    """Loss, gradient norm and clipped gradients of one step of ordinary PyTorch."""
    optimizer.zero_grad()
    labels = ids if labels is None else labels
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss.item(), norm.item(), grads


def plain_optimizer(model: nn.Module) -> torch.optim.AdamW:
    vectors = ("norm", "bias", "sinks")
    free = {n for n, _ in model.named_parameters() if any(word in n for word in vectors)}
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if n not in free],
            "weight_decay": DECAY,
        },
        {"params": [p for n, p in model.named_parameters() if n in free], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


def distance(a: torch.Tensor | float, b: torch.Tensor | float) -> float:
    """Relative error of `a` against the reference `b`."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


# Labels that count in each of the ROWS sequences, which are the last ones, as after a prompt. One
# of two dp ranks has five times as many as the other, and of two micro-batches one has none.
COUNTS = [25, 25, 0, 0, 0, 0, 5, 5]


def all_count(ids: torch.Tensor):
    """Rows, as `load_data` makes them of text."""
    import datasets

    columns = {"input_ids": ids.tolist(), "counts": torch.ones_like(ids, dtype=bool).tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def masked_labels(ids: torch.Tensor) -> torch.Tensor:
    """`ids`, (ROWS, S), but -100 where COUNTS says so."""
    position = torch.arange(ids.shape[1], device=ids.device)
    counts = torch.tensor(COUNTS, device=ids.device)[:, None]
    return torch.where(position >= ids.shape[1] - counts, ids, -100)


def compare(
    tp: int, config, seq_length=32, accumulation=1, dtype="fp32", folder=None, then=None,
    device="cpu", chunk=50, masked=False, steps=2, **build,
) -> dict:  # fmt: skip
    """Relative errors of the sharded model against the plain one, by what was compared.

    If `masked`, only the labels of `masked_labels` count. Weights come from the directory `folder`
    if it is given; `then(model)` is called at the end; the loss is computed in chunks of `chunk`
    tokens, and the last one is shorter; `build` goes to build_model. After two steps the weights
    show AdamW's moments, too.
    """
    size = torch.finfo(script.DTYPES[dtype]).bits // 8
    script.CHUNK_BYTES = chunk * -(-config.vocab_size // tp) * size
    mesh = script.build_mesh(device, tp)
    dp, dp_rank = mesh["dp"].size(), mesh["dp"].get_local_rank()
    model = build_model(config, mesh, script.DTYPES[dtype], SEED, folder, **build)
    if folder:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        plain = plain_model(config, device=device)
    plain.to(device)
    weights = dict(model.named_parameters())
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    for name, p in plain.named_parameters():
        assert torch.equal(weights[name].full_tensor(), p), f"initial {name} differs"
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), f"buffer {name} differs"

    optimizer = script.build_optimizer(model, LR, DECAY)
    grads = {}  # of the first step

    def keep_first(*_):
        if not grads:
            grads.update(
                {n: p.grad.full_tensor() for n, p in weights.items() if p.grad is not None}
            )

    optimizer.register_step_pre_hook(keep_first)
    data = torch.Generator().manual_seed(1)
    data = torch.randint(0, config.vocab_size, (steps, ROWS, seq_length), generator=data)
    reference = plain_optimizer(plain)
    errors = {}
    for step, ids in enumerate(data.to(device)):
        if step == 0 and dtype == "bf16":
            rounded = copy.deepcopy(plain).to(torch.bfloat16)
            rounded = plain_step(rounded, plain_optimizer(rounded), ids)
        labels = masked_labels(ids) if masked else ids
        loss, norm, plain_grads = plain_step(plain, reference, ids, labels=labels)
        micro = ROWS // dp // accumulation
        rows = script.micro_batches(list(range(ROWS)), micro, dp_rank, dp)
        assert len(rows) == accumulation
        batches = [(ids[r], labels[r]) for r in rows]
        mine, grad_norm = script.train_step(model, optimizer, batches, CLIP, mesh["dp"])
        dist.all_reduce(mine, group=mesh["dp"].get_group())
        errors[f"loss at step {step + 1}"] = distance(mine / dp, loss)
        errors[f"gradient norm at step {step + 1}"] = distance(grad_norm, norm)
        if step == 0:
            assert grads.keys() == plain_grads.keys()
            for name, grad in plain_grads.items():
                errors[f"gradient of {name}"] = distance(grads[name], grad)
            if dtype == "bf16":
                return errors, {
                    "loss at step 1": distance(rounded[0], loss),
                    "gradient norm at step 1": distance(rounded[1], norm),
                } | {f"gradient of {n}": distance(rounded[2][n], g) for n, g in plain_grads.items()}
    for name, p in plain.named_parameters():
        errors[f"{name} after {steps} steps"] = distance(weights[name].full_tensor(), p)
    if then:
        then(model)
    return errors


def parity(tp: int, config: LlamaConfig, **options) -> None:
    errors = compare(tp, config, **options)
    bad = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not bad, f"relative errors over {TOLERANCE}: {bad}"


def bf16() -> None:
    """Rounding may hurt the sharded model about as much as plain bf16 does, not more."""
    sharded, plain = compare(2, llama(), dtype="bf16")
    bad = {n: (e, plain[n]) for n, e in sharded.items() if not e < 1.5 * plain[n] + 2e-3}
    assert not bad, f"errors of the sharded and of the plain bf16 model: {bad}"


def gradient_norm(model: nn.Module, ids: torch.Tensor) -> float:
    """Norm of the gradients of a model on a tp mesh, after a backward pass."""
    with loss_parallel():
        model(ids, labels=ids, use_cache=False).loss.backward()
    grads = [p.grad for p in model.parameters() if isinstance(p, DTensor)]
    return nn.utils.get_total_norm(grads).full_tensor().item()


def tied_gradient_norms(tp_mesh, ids: torch.Tensor) -> list[float]:
    """A tied model's gradient norm: not tied again after TP; as apply_tp leaves it; plain."""
    config, norms = llama(tie_word_embeddings=True), []
    for tied in (False, True):
        model = plain_model(config)
        script.apply_tp(model, tp_mesh)
        if not tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        norms.append(gradient_norm(model, ids))
    plain = plain_model(config)
    return [*norms, plain_step(plain, plain_optimizer(plain), ids, clip=1e9)[1]]


def untied_head() -> None:
    """Control: a head that is not tied again after TP must show in the gradient."""
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    naive, mended, plain = tied_gradient_norms(script.build_mesh("cpu", 2)["tp"], ids)
    assert distance(mended, plain) < 1e-5 and distance(naive, plain) > 1e-3, (naive, mended, plain)


def broken_gradients() -> None:
    """Control: gradients that are not reduced over dp, or norms' not over tp, must show."""
    step = script.train_step

    def unreduced(model, *args):
        model.set_requires_all_reduce(False)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return step(model, *args)

    script.train_step = unreduced
    try:
        errors = compare(2, llama(), steps=1)
    finally:
        script.train_step = step
    assert errors["gradient norm at step 1"] > TOLERANCE


def broken_chunks() -> None:
    """Control: the labels of one chunk shifted by one, or a chunk left out, must show."""
    cross_entropy, calls = nn.functional.cross_entropy, []

    def shifted(logits, labels, **options):
        calls.append(len(labels))
        if len(labels) == 25 and calls.count(25) % 5 == 1:
            labels = labels.roll(1)
        return cross_entropy(logits, labels, **options)

    nn.functional.cross_entropy = shifted
    try:
        errors = compare(2, llama(), chunk=25, steps=1)
    finally:
        nn.functional.cross_entropy = cross_entropy
    assert calls.count(25) == 5 and errors["gradient norm at step 1"] > TOLERANCE


def fake_ranks(world_size: int) -> None:
    """Leave the group of real ranks, to be rank 0 of a fake one, in which nothing is sent."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def broken_counts() -> None:
    """Control: each rank's own number of labels, or labels of the prompt, must show."""
    all_reduce = dist.all_reduce

    def own_count(tensor, *args, **options):
        if tensor.is_floating_point():
            return all_reduce(tensor, *args, **options)
        return tensor.mul_(2)  # as if the other dp rank had as many

    dist.all_reduce = own_count
    try:
        own = compare(2, llama(), masked=True, steps=1)
    finally:
        dist.all_reduce = all_reduce
    step = script.train_step
    script.train_step = lambda model, optimizer, batches, *args: step(
        model, optimizer, [(ids, ids) for ids, _ in batches], *args
    )
    try:
        prompt = compare(2, llama(), masked=True, steps=1)
    finally:
        script.train_step = step
    for errors in (own, prompt):
        assert errors["gradient norm at step 1"] > TOLERANCE, errors


def muon() -> None:
    """torch.optim.Muon runs on the 2D DTensors as they are, with the losses of one process."""
    mesh = script.build_mesh("cpu", 2)
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    model, plain = build_model(llama(), mesh, torch.float32, SEED), plain_model(llama())

    def optimizer_of(model):
        return torch.optim.Muon([p for n, p in model.named_parameters() if "proj" in n], lr=0.01)

    optimizer, reference = optimizer_of(model), optimizer_of(plain)
    first = 4 * mesh["dp"].get_local_rank()
    mine, losses = ids[first : first + 4], []
    for _ in range(3):
        loss, _ = script.train_step(model, optimizer, [(mine, mine)], CLIP, mesh["dp"])
        dist.all_reduce(loss, group=mesh["dp"].get_group())
        losses.append((loss.item() / 2, plain_step(plain, reference, ids)[0]))
    # Muon's products are in bf16, so updates agree to about a hundredth, and losses to this:
    assert all(distance(*pair) < 1e-5 for pair in losses), losses
    assert losses[0][0] - losses[2][0] > 1e-2, losses


def uncovered_parameter() -> None:
    """Control: a plan without an entry must be refused with the parameter's name."""
    fake_ranks(4)
    plan = script.layer_plan
    for entry in ("input_layernorm", "self_attn.k_proj", "mlp.down_proj"):
        script.layer_plan = lambda layer, entry=entry: {
            name: style for name, style in plan(layer).items() if name != entry
        }
        try:
            build_model(llama(), script.build_mesh("cpu", 2), torch.float32, SEED)
        except ValueError as error:
            assert f"model.layers.0.{entry}.weight" in str(error), error
        else:
            raise AssertionError(f"a plan without {entry} was accepted")
        finally:
            script.layer_plan = plan


def collectives() -> None:
    """Each kind of collective, forward and forward + backward, as written beside the plan."""
    fake_ranks(4)

    def count(layers: int, tp: int, tied: bool, chunks: int = 1) -> tuple[dict, dict]:
        script.CHUNK_BYTES = 32 // chunks * 96 // tp * 4
        mesh = script.build_mesh("cpu", tp)
        config = llama(num_hidden_layers=layers, tie_word_embeddings=tied)
        model = build_model(config, mesh, torch.float32, SEED)
        ids = torch.zeros(1, 32, dtype=torch.int64)
        with CommDebugMode() as comm:
            loss = model(ids, labels=ids, use_cache=False).loss
            forward = dict(comm.get_comm_counts())
            loss.backward()
        counts = forward, comm.get_comm_counts()
        return tuple({op.__name__.split(".")[-1]: n for op, n in c.items()} for c in counts)

    # TP's are functional collectives, FSDP's are c10d's.
    per_layer = {
        "all_gather_into_tensor": (2, 4), "reduce_scatter_tensor": (2, 4), "all_reduce": (0, 2),
        "_allgather_base_": (1, 2), "_reduce_scatter_base_": (0, 1),
    }  # fmt: skip
    # Embedding: reduce-scatter, backward all-gather. Head: all-gather, backward reduce-scatter.
    # Loss: all-reduce of maximum, sum and target. Final norm: all-reduce of its gradient.
    ends = {
        "all_gather_into_tensor": (1, 2), "reduce_scatter_tensor": (1, 2), "all_reduce": (3, 4),
        "_allgather_base_": (2, 3), "_reduce_scatter_base_": (0, 2),
    }  # fmt: skip
    tied_ends = ends | {"_allgather_base_": (1, 1), "_reduce_scatter_base_": (0, 1)}
    for layers, tied in ((1, False), (3, False), (2, True)):
        measured = count(layers, 2, tied)
        for phase in (0, 1):
            for op, constant in (tied_ends if tied else ends).items():
                expected = constant[phase] + layers * per_layer[op][phase]
                assert measured[phase].get(op, 0) == expected, (op, phase, layers, tied, measured)
    # Each chunk of the loss has its three, and nothing else.
    one, four = count(2, 2, False), count(2, 2, False, chunks=4)
    assert [n["all_reduce"] + 9 for n in one] == [n.pop("all_reduce") for n in four]
    assert all(one[phase].items() >= four[phase].items() for phase in (0, 1)), (one, four)
    # With tp 1 only the loss's remain, within a group of one rank.
    assert count(2, 1, False)[1] == {
        "_allgather_base_": 7, "_reduce_scatter_base_": 4, "all_reduce": 3
    }  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Most bytes of CPU storages that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # see the local tensors instead
        out = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self.live[ref.cdata] = ref, storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def memory_at_build() -> None:
    """A rank holds its shards and at most one layer, or the embedding."""
    fake_ranks(4)
    for changes in ({"num_hidden_layers": 8}, {"vocab_size": 4096}):
        config = llama(hidden_size=96, intermediate_size=384, **changes)
        with LiveBytes() as memory:
            model = build_model(config, script.build_mesh("cpu", 2), torch.float32, SEED)
        shards = sum(p.to_local().nbytes for p in model.parameters())
        layer = sum(4 * p.numel() for p in model.model.layers[0].parameters())
        whole = sum(4 * p.numel() for p in model.parameters())
        embedding = 4 * model.lm_head.weight.numel()
        assert abs(shards - whole / 4) < 0.01 * whole
        rows = 16 * 4096  # torch numbers a matrix's rows, twice, to tell which ones are ours
        limit = shards + max(layer, embedding) + rows + 64 * 1024
        assert shards < memory.peak < limit < whole, (shards, memory.peak, limit, whole)


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        assert func is not torch.ops.aten._local_scalar_dense.default, "a device sync"
        return func(*args, **kwargs or {})


def no_sync() -> None:
    """A training step never reads a value from the device."""
    fake_ranks(4)
    mesh = script.build_mesh("cpu", 2)
    model = build_model(llama(), mesh, torch.float32, SEED)
    optimizer = script.build_optimizer(model, LR, DECAY)
    batch, dp_mesh = (torch.zeros(1, 32, dtype=torch.int64),) * 2, mesh["dp"]
    with NoSync():
        script.train_step(model, optimizer, [batch] * 2, CLIP, dp_mesh)
        try:
            torch.ones(()).item()
        except AssertionError:
            return
    raise AssertionError("the check sees no sync at all")


def sharded_batches() -> None:
    """tp peers train on the same rows, dp peers on disjoint ones, together the global batch."""
    mesh = script.build_mesh("cpu", 2)

    def seen(dp_rank: int) -> list:
        rows = script.global_batch_rows(5, 8, 100, SEED)
        mine = script.micro_batches(rows, 2, dp_rank, 2)
        gathered = [None] * 4
        dist.all_gather_object(gathered, [row for rows in mine for row in rows])
        return gathered

    def right(gathered: list) -> bool:
        (a, b), (c, d) = gathered[:2], gathered[2:]
        return a == b and c == d and sorted(a + c) == sorted(script.global_batch_rows(5, 8, 100, 7))

    assert right(seen(mesh["dp"].get_local_rank()))
    assert not right(seen(dist.get_rank() % 2)), "control: tp rank taken for dp rank"
    with pytest.raises(IndexError):  # control: global rank taken for dp rank
        script.micro_batches(list(range(8)), 2, 2, 2)


def hsdp_mesh():
    """Two replicas of the shards that one rank has, without TP, as docs/others.md makes it."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "shard", "tp"))
    mesh["replicate", "shard"]._flatten("dp")
    return mesh


def job_wide_loss(replicas: bool = False) -> None:
    """The loss in the metrics is the plain model's on the global batch, whatever the layout."""
    import argparse

    ids = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(2))
    rows = all_count(ids)
    data = {"train": rows, "validation": rows}
    args = argparse.Namespace(
        global_batch_size=8, seq_length=32, batch_size=2, total_steps=2, seed=SEED, dtype="fp32",
        lr=LR, warmup_steps=0, max_grad_norm=CLIP, log_freq=1, eval_freq=1, ckpt_freq=9,
        steps_per_epoch=2.0,
    )  # fmt: skip
    mesh = hsdp_mesh() if replicas else script.build_mesh("cpu", 2)

    def losses() -> list:
        model = build_model(llama(), mesh, torch.float32, SEED)
        file = io.StringIO()  # on every rank
        run = script.Run(model, script.build_optimizer(model, LR, DECAY), None, {}, 1, metrics=file)
        script.train(args, run, data, mesh)
        recorded = [json.loads(row) for row in file.getvalue().splitlines()]
        assert [row["step"] for row in recorded] == [1, 1, 2, 2]
        return [row.get("loss", row.get("val_loss")) for row in recorded]

    plain = plain_model(llama())
    reference = plain_optimizer(plain)
    expected = []
    for step in range(2):
        for group in reference.param_groups:
            group["lr"] = script.learning_rate(step, LR, 0, 2)
        batch = ids[script.global_batch_rows(step, 8, 16, SEED)]
        expected.append(plain_step(plain, reference, batch)[0])
        with torch.no_grad():
            expected.append(plain(ids, labels=ids).loss.item())
    measured = losses()
    assert distance(torch.tensor(measured), torch.tensor(expected)) < 1e-5, (measured, expected)

    all_reduce = dist.all_reduce

    def skip_losses(tensor, *args, **kwargs):  # control: each rank reports its own
        if tensor.ndim == 0 and tensor.is_floating_point():
            return None
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = skip_losses
    try:
        measured = losses()
    finally:
        dist.all_reduce = all_reduce
    assert distance(torch.tensor(measured), torch.tensor(expected)) > 1e-3


def uneven_evaluation() -> None:
    """Validation loss does not depend on how many sequences each rank gets."""
    ids = torch.randint(0, 96, (7, 32), generator=torch.Generator().manual_seed(3))
    rows = all_count(ids)
    mesh = script.build_mesh("cpu", 1)
    model = build_model(llama(), mesh, torch.float32, SEED)
    with torch.no_grad():
        expected = plain_model(llama())(ids, labels=ids).loss.item()
    for batch_size in (1, 2, 3):
        measured = script.evaluate(model, rows, batch_size, mesh["dp"])
        assert distance(measured, expected) < 1e-5, (batch_size, measured, expected)


def step_peak(config, ids: torch.Tensor, micro_batches=1, tp=2, **build) -> int:
    """Most bytes above its start that a step takes on rank 0 of four, seen by the allocator.

    On rank 0 of a fake process group, since gloo's own buffers come and go with the load.
    """
    fake_ranks(4)
    mesh = script.build_mesh("cpu", tp)
    model = build_model(config, mesh, torch.float32, SEED, **build)
    optimizer, batches = script.build_optimizer(model, LR, DECAY), [(ids, ids)] * micro_batches
    script.train_step(model, optimizer, batches, CLIP, mesh["dp"])
    with torch.profiler.profile(profile_memory=True) as profile:
        script.train_step(model, optimizer, batches, CLIP, mesh["dp"])
    events = profile.profiler.kineto_results.events()  # the public ones lack the order
    memory = (e for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]")
    return max(itertools.accumulate(e.nbytes() for e in memory))


def recompute_memory() -> None:
    """Recomputing layers saves most of what they keep; compile and recompute together do, too."""
    config = llama(num_hidden_layers=6, max_position_embeddings=512)
    ids = torch.zeros(2, 512, dtype=torch.int64)
    eager = step_peak(config, ids)
    again = step_peak(config, ids, recompute=True)
    both = step_peak(config, ids, recompute=True, compile=True)
    assert again < 0.5 * eager and both < 0.5 * eager, (eager, again, both)
    print(f"a step's peak: {eager:,} bytes, recomputed {again:,}, and compiled {both:,}")


def accumulation_memory() -> None:
    """More micro-batches keep the sharded gradients of those before, and nothing else."""
    config = llama(hidden_size=192, intermediate_size=768, num_hidden_layers=6)
    ids = torch.zeros(1, 32, dtype=torch.int64)
    shards = sum(p.numel() for p in plain_model(config).parameters())  # 4 bytes on each of 4 ranks
    for tp in (1, 2):
        one, four = (step_peak(config, ids, micro, tp) for micro in (1, 4))
        print(f"tp {tp}, a step's peak: {one:,} bytes, with 4 micro-batches {four:,}")
        # Unsharded gradients, as set_requires_gradient_sync(False) keeps them, are 4 P / tp.
        assert four < one + 1.2 * shards, (tp, one, four, shards)


def chunk_memory() -> None:
    """The loss of chunks of 128 tokens takes the memory of 128 tokens' logits, not of 2048."""
    for tied in (False, True):
        config = llama(vocab_size=32_000, max_position_embeddings=512, tie_word_embeddings=tied)
        ids = torch.zeros(4, 512, dtype=torch.int64)
        peaks = []
        for tokens in (2048, 128):
            script.CHUNK_BYTES = tokens * 16_000 * 4
            peaks.append(step_peak(config, ids))
        logits = 2048 * 16_000 * 4
        assert peaks[0] > 2 * logits and peaks[1] < 0.5 * logits, peaks
        print(f"tied {tied}, a step's peak: {peaks[0]:,} bytes, in chunks {peaks[1]:,}")


TIED = {"tie_word_embeddings": True}
CASES = {  # what parity is asked for, with the configuration first
    "llama": (llama(),),
    "tied": (llama(**TIED),),
    "gqa_biases": (llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),),
    "odd_vocabulary": (llama(vocab_size=101),),
    "odd_vocabulary_tied": (llama(vocab_size=101, **TIED),),
    "odd_length_one_chunk": (llama(), {"seq_length": 31, "chunk": 1000}),
    "accumulation": (llama(), {"accumulation": 2}),
    "masked": (llama(), {"masked": True, "steps": 3}),
    "masked_accumulation": (llama(**TIED), {"masked": True, "accumulation": 2, "steps": 3}),
    "kv_heads_2": (llama(num_key_value_heads=2, attention_bias=True),),
    "kv_heads_3": (llama(num_key_value_heads=3),),
    "recompute_tied": (llama(**TIED), {"recompute": True}),
    "compile": (llama(num_key_value_heads=4), {"compile": True}),
    "compile_tied": (llama(num_key_value_heads=4, **TIED), {"compile": True}),
    "compile_recompute": (
        llama(num_key_value_heads=4, **TIED), {"compile": True, "recompute": True}
    ),
    "compile_few_kv_heads": (llama(num_key_value_heads=1), {"compile": True}),
}  # fmt: skip
CHECKS = {
    f"{case}_tp{tp}": functools.partial(parity, tp, config, **dict(*options))
    for case, (config, *options) in CASES.items() for tp in (1, 2, 3, 4)
}  # fmt: skip
REAL = [
    bf16, untied_head, broken_gradients, broken_chunks, broken_counts, muon, sharded_batches,
    job_wide_loss, uneven_evaluation,
]  # fmt: skip
FAKE = [uncovered_parameter, collectives, memory_at_build, no_sync]
MEMORY = [recompute_memory, chunk_memory, accumulation_memory]
CHECKS |= {check.__name__: check for check in [*REAL, *FAKE, *MEMORY]}
CHECKS["replicas_loss"] = functools.partial(job_wide_loss, True)

GROUPS = {  # world size: checks, in the order they run
    1: ["llama_tp1", *(check.__name__ for check in FAKE)],
    2: ["llama_tp2", "tied_tp1"],
    4: [f"{case}_tp2" for case in CASES if "compile" not in case and case != "kv_heads_2"]
    + ["llama_tp1", "tied_tp1", "odd_vocabulary_tied_tp4",
       "masked_tp1", "masked_tp4", "kv_heads_2_tp4", "kv_heads_3_tp4"]
    + [check.__name__ for check in REAL] + ["replicas_loss"],
    6: ["odd_vocabulary_tied_tp3", "odd_length_one_chunk_tp3", "kv_heads_2_tp3"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(world_size, name) for world_size in GROUPS for name in GROUPS[world_size]],
)
def test_on_ranks(request, world_size, name):
    passes(request, world_size, GROUPS[world_size], name)


SLOW = {
    4: [f"{case}_tp2" for case in CASES if "compile" in case],
    1: [check.__name__ for check in MEMORY],
}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), [(w, name) for w in SLOW for name in SLOW[w]])
def test_compiled(request, world_size, name):
    passes(request, world_size, SLOW[world_size], name)
