#!/usr/bin/env python3
"""Train a Hugging Face causal LM with tensor parallelism (TP) and FSDP2 together.

    python train_llm.py                                # one process, with or without a GPU
    torchrun --nproc-per-node 8 train_llm.py --tp 4    # one node: dp 2 x tp 4
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_llm.py --tp 8                            # two nodes: dp 2 x tp 8

The ranks form a 2D mesh. 8 ranks with --tp 4:

             tp 0     tp 1     tp 2     tp 3
         +--------+--------+--------+--------+
    dp 0 | rank 0 | rank 1 | rank 2 | rank 3 |  a TP group: every layer in four TP shards
         +--------+--------+--------+--------+
    dp 1 | rank 4 | rank 5 | rank 6 | rank 7 |  the same TP shards, other sequences of the batch
         +--------+--------+--------+--------+

The ranks of a TP group (a row) work on the same sequences, each with its shard of every weight
matrix. The ranks of an FSDP group (a column) hold the same TP shard: FSDP splits it among them and
gathers it for one layer at a time. The layout changes speed and memory, never the loss.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

# ---- Tensor parallelism and FSDP: the part to copy, to the end of apply_fsdp --------------------

# B sequences per dp rank, S tokens, D hidden, F intermediate, H query or key-value heads x head
# size, V vocabulary, T tp size


def build_mesh(device_type: str, tp: int) -> DeviceMesh:
    """The (world size / tp, tp) mesh ("dp", "tp"): neighbouring ranks are in one TP group."""
    shape = (dist.get_world_size() // tp, tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "tp"))
    # One all-reduce for the gradient norm instead of two and a warning; not public in torch 2.13.
    mesh._flatten("dp_tp")
    return mesh


def layer_plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How TP treats each module of a decoder layer, in execution order, with local shapes.

    The residual stream is a DTensor sharded along S, so the model's code sees its global shape.
    """
    gather = {"input_kwarg_layouts": {"hidden_states": Shard(1)}}
    gather |= {"desired_input_kwarg_layouts": {"hidden_states": Replicate()}}
    to_residual = {"output_layouts": Shard(1), "use_local_output": False}
    by_heads = {"sequence_dim": 2, "use_local_output": True}  # heads are dimension 2 there
    plan = {
        "input_layernorm": SequenceParallel(),  # (B, S/T, D); its gradient (D,): all-reduce
        # (B, S/T, D) -> (B, S, D)  all-gather
        "self_attn": PrepareModuleInput(**gather),
        "self_attn.q_proj": ColwiseParallel(),  # (B, S, D) -> (B, S, H/T)
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": SequenceParallel(**by_heads),  # its gradient: all-reduce
        "self_attn.k_norm": SequenceParallel(**by_heads),
        # (B, S, H/T) -> partial sums (B, S, D) -> (B, S/T, D)  reduce-scatter
        "self_attn.o_proj": RowwiseParallel(**to_residual),
        "post_attention_layernorm": SequenceParallel(),  # as input_layernorm
        "pre_feedforward_layernorm": SequenceParallel(),
        # (B, S/T, D) -> (B, S, D)  all-gather
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),  # (B, S, D) -> (B, S, F/T)
        "mlp.up_proj": ColwiseParallel(),
        # (B, S, F/T) -> partial sums (B, S, D) -> (B, S/T, D)  reduce-scatter
        "mlp.down_proj": RowwiseParallel(**to_residual),
        "post_feedforward_layernorm": SequenceParallel(),
    }
    done = {name for name, p in layer.named_parameters() if isinstance(p, DTensor)}
    todo = {name for name, _ in layer.named_modules() if f"{name}.weight" not in done}
    return {name: style for name, style in plan.items() if name in todo}


def replicate_kv(attention: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Keep all key-value heads on every rank, where T does not divide their number."""
    group, size = attention.num_key_value_groups, attention.head_dim  # queries per head, head size
    if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() != size:
        raise ValueError("k_norm spans all key-value heads: --tp has to divide their number")
    queries = attention.q_proj.weight.shape[0] // size // tp_mesh.size()  # of this rank
    first = tp_mesh.get_local_rank() * queries

    def one_per_query(module, args, out):  # (B, S, all H) -> (B, S, H/T)
        heads = out.to_local(grad_placements=[Partial()]).unflatten(-1, (-1, size))
        heads = heads[:, :, first // group : (first + queries - 1) // group + 1]
        return heads.repeat_interleave(group, 2).narrow(2, first % group, queries).flatten(2)

    for projection in (attention.k_proj, attention.v_proj):  # their gradients: all-reduce
        distribute_module(projection, tp_mesh)
        projection.register_forward_hook(one_per_query)
    attention.num_key_value_groups = 1


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on `tp_mesh`, in place; all ranks hold the same before.

    Raises ValueError if T cannot shard the model, or naming the parameters without a plan.
    """
    base = model.base_model
    if not (hasattr(base, "layers") and hasattr(base, "norm") and hasattr(model, "lm_head")):
        raise ValueError(f"{type(model).__name__} does not keep its modules where Llama does")
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embed.weight
    ids_to_residual = RowwiseParallel(  # (B, S) -> partial (B, S, D) -> (B, S/T, D)  reduce-scatter
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    )
    # (B, S/T, D) -> (B, S, D) -> (B, S, V/T)  all-gather; loss_parallel takes sharded logits
    residual_to_logits = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    plans = {embed: ids_to_residual, base.norm: SequenceParallel(), head: residual_to_logits}
    for layer in base.layers:
        if (getattr(model.config, "num_key_value_heads", None) or 0) % tp_mesh.size():
            replicate_kv(layer.self_attn, tp_mesh)
        plans[layer] = layer_plan(layer)
    for module, plan in plans.items():
        parallelize_module(module, tp_mesh, plan, src_data_rank=None)
    # A copy waits for the reduce-scatter. The compiler's cache does not tell a pending one from a
    # finished one inside a DTensor, and runs the wrong code (torch 2.13, pytorch issue 180614).
    embed.register_forward_hook(lambda module, args, out: out.clone())
    if tied:  # each became a Parameter of its own with the same shard; they would drift apart
        head.weight = embed.weight
    if missing := [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise ValueError(f"the tensor-parallel plan does not cover {', '.join(missing)}")


def apply_fsdp(model: nn.Module, dp_mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard all parameters over `dp_mesh`, in place, after `apply_tp`; compute in `dtype`."""

    def placement(p: DTensor) -> Shard | None:
        # FSDP shards dimension 0. Where TP has sharded that dimension unevenly (a vocabulary that
        # T does not divide), DTensor computes wrong offsets for FSDP's shards and checkpoints fail
        # (torch 2.13): there FSDP shards dimension 1.
        uneven = p.placements[0].is_shard(0) and p.shape[0] % p.device_mesh.size()
        return Shard(1) if uneven else None

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": dp_mesh, "mp_policy": policy, "shard_placement_fn": placement}
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embed.weight:
        fully_shard(embed, **options)
        # Backward starts with the head, so it stays gathered.
        fully_shard([model.base_model.norm, head], reshard_after_forward=False, **options)
    fully_shard(model, **options)  # the rest: nothing, or tied embedding, norm, head in one unit


# ---- The sharded model: built on meta, then drawn or loaded ------------------------------------

# Our sequences never restart their positions. transformers would ask the device in every forward
# pass whether they do, which is a sync (5.17 to 5.23).
transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None


def built_in_config() -> PretrainedConfig:
    """A small Llama for a byte vocabulary; tp 2, 3, 4, 6 and 8 divide all its sizes."""
    return transformers.LlamaConfig(
        vocab_size=384, hidden_size=192, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=24, initializer_range=0.05, pad_token_id=None, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The unsharded fp32 model without memory for its weights."""
    with torch.device("meta"):  # from_config writes into the configuration
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def shard_model(
    config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype, recompute: bool, compile: bool
) -> PreTrainedModel:
    """The model sharded over `mesh`, on meta: it trains after `to_empty` and `init_weights`."""
    model = meta_model(config)
    apply_tp(model, mesh["tp"])
    chunk_loss(model)
    if compile:
        # Checkpointing around a compiled layer fails on DTensors (torch 2.13: "expected all
        # tensors_saved_with_vc_check to be Tensors"); the compiler's own recompute does not. It
        # has no public name yet: with a budget of 0 it keeps a layer's input only.
        torch._functorch.config.activation_memory_budget = 0.0 if recompute else 1.0
        for layer in model.base_model.layers:
            layer.compile()
    elif recompute:
        enable = getattr(model, "activation_checkpointing_enable", None)  # new in transformers 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    apply_fsdp(model, mesh["dp"], dtype)
    return model


@torch.no_grad()
def init_weights(model: PreTrainedModel, seed: int, only_buffers: bool = False) -> None:
    """Draw the weights, the same for every mesh, and compute the buffers.

    Every rank draws the unsharded model from `seed`, one module at a time, and keeps its shard.
    """
    # The function that torch's checkpoints ask, too; the public distribute_tensor finds the same
    # shard, but copies the whole matrix to do it (torch 2.13).
    where = {p: compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
             for p in model.parameters()}  # fmt: skip
    torch.manual_seed(seed)
    unsharded = meta_model(model.config)
    for module, sharded in zip(unsharded.modules(), model.modules(), strict=True):
        if only_buffers and not module._buffers:
            continue
        module.to_empty(device=model.device, recurse=False)
        unsharded._init_weights(module)  # public only for all modules at once
        for name, p in sharded.named_parameters(recurse=False):
            if p in where:  # a tied head keeps the embedding's weights
                shard = (slice(o, o + n) for n, o in zip(*where.pop(p), strict=True))
                p.to_local().copy_(module.get_parameter(name)[tuple(shard)])
        for name, buffer in sharded.named_buffers(recurse=False):
            buffer.copy_(module.get_buffer(name))
        module.to_empty(device="meta", recurse=False)


def load_weights(model: PreTrainedModel, files: list[str]) -> None:
    """Read safetensors `files` into the shards of `model`, of any stored dtype.

    Raises ValueError unless they hold the model's weights, and those that are tied are equal.
    """
    reader = dcp.HuggingFaceStorageReader(str(Path(files[0]).parent))
    reader.fs.ls = lambda folder: files  # not all that the folder holds
    stored = {name: tuple(t.size) for name, t in reader.read_metadata().state_dict_metadata.items()}
    params = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))  # with a tied head
    keys = SimpleNamespace(missing_keys=set(), unexpected_keys=stored.keys() - every.keys())
    model._adjust_missing_and_unexpected_keys(keys)  # without what transformers ignores, too (5.23)
    ours = {name: tuple(p.shape) for name, p in every.items() if name in params or name in stored}
    wrong = [
        f"{name} is {stored.get(name, 'missing')}, the model's {ours.get(name, 'missing')}"
        for name in sorted(ours.keys() | keys.unexpected_keys)
        if stored.get(name) != ours.get(name)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} weights do not fit: {'; '.join(wrong[:5])}")
    tied = {name: torch.empty_like(every[name]) for name in ours.keys() - params.keys()}
    dcp.load({n: p.detach() for n, p in params.items()} | tied, storage_reader=reader)
    for name, weight in tied.items():
        if not torch.equal(weight, every[name].detach()):
            same = [n for n, p in every.items() if p is every[name]]
            raise ValueError(f"config.json ties {' and '.join(same)}, which differ in the files")


# ---- Training ----------------------------------------------------------------------------------

EVAL_SEQUENCES = 128


class UserError(Exception):
    """What only the user can mend. Every rank raises it at the same point, and rank 0 prints it."""


@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds; torch.distributed.checkpoint calls the two methods."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps done

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        options = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **options)


def build_optimizer(model: PreTrainedModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but not norms and biases. `train` sets the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear up to `peak`, then a cosine down to 10 % at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def train_step(model, optimizer, batches: list[torch.Tensor], max_grad_norm: float) -> tuple:
    """One optimizer step on this rank's micro-batches, each (B, S) int64, without a device sync.

    Returns the mean loss per token over this dp rank's sequences, and the norm of the global
    gradient before clipping: scalars on the device.
    """
    targets = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
    loss = torch.zeros((), device=batches[0].device)
    for i, ids in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # FSDP averages over dp once
        part = model(ids, labels=ids, num_items_in_batch=targets, use_cache=False).loss
        part.backward()
        loss += part.detach()
    params = list(model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in params]).full_tensor()
    nn.utils.clip_grads_with_norm_(params, max_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


@torch.no_grad()
def evaluate(model, data: datasets.Dataset, batch_size: int, dp_mesh: DeviceMesh) -> float:
    """Mean loss per token over EVAL_SEQUENCES of `data`, or all it has; the same on every mesh."""
    rows = row_order(len(data), 0, 0)[:EVAL_SEQUENCES].tolist()
    targets = len(rows) * (len(data[0]["input_ids"]) - 1)
    rows += [-1] * (-len(rows) % (batch_size * dp_mesh.size()))  # all ranks need as many batches
    loss = torch.zeros((), device=model.device)
    model.eval()
    for batch in micro_batches(rows, batch_size, dp_mesh.get_local_rank(), dp_mesh.size()):
        ids, _ = load_batch(data, [max(0, row) for row in batch], model.device)
        labels = ids.clone()
        labels[len(batch) - batch.count(-1) :] = -100  # the padding, which is last, does not count
        loss += model(ids, labels=labels, num_items_in_batch=targets, use_cache=False).loss
    model.train()
    dist.all_reduce(loss, group=dp_mesh.get_group())
    return loss.item()


def train(args, state: TrainState, data: dict, meter: "Meter", checkpoints: "Checkpoints") -> dict:
    """Run the optimizer steps after `state.step`, to the end or until asked to stop.

    Returns the last row of metrics. Raises UserError if a gradient is not finite or a save fails.
    """
    dp_mesh, total, row = meter.mesh["dp"], args.total_steps, {}
    bar = tqdm(initial=state.step, total=total, unit="step", disable=dist.get_rank() != 0)
    first_bad = torch.zeros((), device=state.model.device)  # step whose gradient was not finite
    meter.start(state.step)
    while True:
        done = state.step == total
        if done or (state.step and state.step % (args.eval_freq or total) == 0):
            checkpoints.finish()  # what is trained is safe before anything that can fail
            begin = time.perf_counter()
            loss = evaluate(state.model, data["validation"], args.batch_size, dp_mesh)
            row |= meter.write({"step": state.step, "val_loss": loss})
            meter.begin += time.perf_counter() - begin  # evaluation is not training time
        if done:
            break
        begin = time.perf_counter()
        rows = global_batch_rows(state.step, args.global_batch_size, len(data["train"]), args.seed)
        rows = micro_batches(rows, args.batch_size, dp_mesh.get_local_rank(), dp_mesh.size())
        batches = [load_batch(data["train"], r, state.model.device)[0] for r in rows]
        meter.data_s += time.perf_counter() - begin
        lr = learning_rate(state.step, args.lr, args.warmup_steps, total)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = train_step(state.model, state.optimizer, batches, args.max_grad_norm)
        state.step += 1
        bar.update()
        first_bad = torch.where((first_bad == 0) & ~grad_norm.isfinite(), state.step, first_bad)
        stop = checkpoints.agree_to_stop()
        save = stop or state.step == total or state.step % args.ckpt_freq == 0
        log = state.step in (1, total) or state.step % args.log_freq == 0
        if (log or save) and (bad := int(first_bad.item())):
            checkpoints.finish()
            now = f"at step {state.step} its norm is {grad_norm.item()}, the loss {loss.item()}"
            raise UserError(f"the gradient was not finite at step {bad}; {now}; not saved since")
        if log:
            row = meter.write(meter.row(state.step, loss, grad_norm, lr))
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, "
                                "{peak_mem_gib:.2f} GiB".format(**row))  # fmt: skip
        if save:
            checkpoints.save(state, meter.layout)
        if stop and state.step < total:
            break
    bar.close()
    checkpoints.finish()
    return row


# ---- Head and loss in chunks: to copy, too, for long sequences and large vocabularies ----------

CHUNK_BYTES = 2**28  # at most, of the logits of one chunk on one rank, in the compute dtype


class ChunkedLoss(torch.autograd.Function):
    """The loss of hidden states, with the logits of one chunk of tokens at a time.

    The gradient of a chunk is taken right after its loss, so that nothing is kept for the backward
    pass and no product with the head is computed twice (Hsu et al. 2024, Liger kernel). The chunks'
    gradients of the head are added up in fp32.
    """

    @staticmethod
    def forward(ctx, loss_of, train: bool, hidden: DTensor, labels: torch.Tensor, *weights):
        """The sum of `loss_of(hidden, weights, labels)` over chunks of tokens.

        `hidden` is (B, S, D), replicated over the TP group; `labels` is (B, S).
        """
        mesh, local = hidden.device_mesh, hidden.to_local()
        width = -(-weights[0].shape[0] // mesh.size()) * local.element_size()  # of a token's logits
        size, losses, of_hidden, of_weights = max(1, CHUNK_BYTES // width), [], [], []

        def add(part: torch.Tensor, targets: torch.Tensor) -> None:  # (n, D) and (n,)
            part = DTensor.from_local(part[None], mesh, [Replicate()], run_check=False)
            with torch.set_grad_enabled(train), loss_parallel():
                loss = loss_of(part.requires_grad_(train), weights, targets[None])
                grad, *grads = torch.autograd.grad(loss, [part, *weights]) if train else [None]
            losses.append(loss.detach().to_local())
            if train:
                of_hidden.append(grad.to_local())  # a partial sum, over the rank's V/T
                sums = zip(of_weights, grads, strict=True) if of_weights else ()
                of_weights[:] = [a.float().add_(b) for a, b in sums] or grads

        chunks = zip(local.flatten(0, 1).split(size), labels.flatten().split(size), strict=True)
        for part, targets in chunks:
            add(part, targets)
        if train:
            of_hidden = torch.cat(of_hidden, 1).view_as(local)
            of_weights = [g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True)]
            ctx.grads = DTensor.from_local(of_hidden, mesh, [Partial()]), *of_weights
        return sum(losses)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        for of_input in ctx.grads:
            of_input.to_local().mul_(grad)
        of_hidden, *of_weights = ctx.grads
        return None, None, of_hidden, None, *of_weights


def chunk_loss(model: nn.Module) -> None:
    """Let `model(ids, labels=ids).loss` compute logits and loss in chunks, in place.

    Call it after `apply_tp`, which shards the head, and before `apply_fsdp`. Each chunk goes
    through the model's own forward, so scaled or soft-capped logits and the model's own loss
    function stay as they are. The loss is a local scalar, not a DTensor. Without labels the model
    returns its logits as before.
    """
    base, head, whole = model.base_model, model.get_output_embeddings(), model.forward
    logits_of, kind = head.forward, type(model)  # FSDP will change the type
    head._forward_hooks.clear()  # ColwiseParallel's expects logits; the head will return a loss

    def loss_of(hidden, weights, labels, **items):
        """The model's own forward, in which functions stand for the base model and the head."""
        rest = kind.__new__(kind)
        rest.__dict__ = model.__dict__ | {
            "_modules": {},
            "lm_head": lambda hidden: nn.functional.linear(hidden, *weights),
            model.base_model_prefix: lambda *_, **__: BaseModelOutputWithPast(hidden),
        }
        return kind.forward(rest, labels=labels, shift_labels=labels, **items).loss

    def head_forward(hidden, labels=None, num_items=None):  # FSDP's hooks run around this call
        if labels is None:
            return logits_of(hidden)
        part_loss = functools.partial(loss_of, num_items_in_batch=num_items)
        weights = head.parameters()
        return ChunkedLoss.apply(part_loss, torch.is_grad_enabled(), hidden, labels, *weights)

    def forward(input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return whole(input_ids, **inputs)
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # each predicts the next one
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        hidden = base(input_ids, **inputs).last_hidden_state
        return CausalLMOutputWithPast(loss=head(hidden, labels=labels, num_items=items))

    head.forward, model.forward = head_forward, forward


# ---- Data --------------------------------------------------------------------------------------

PIECE = 2**16  # characters; a longer text is tokenized in pieces, 64 of them at a time


def load_data(args, tokenizer, vocab_size: int) -> dict[str, datasets.Dataset]:
    """Rows to train on and for validation: `input_ids`, and `labels` where not all tokens count.

    Without a validation split the last twentieth, of shuffled documents, is held out. All is
    cached. `info.description` of the rows to train on says what was read. Raises UserError.
    """
    data, told = {}, []
    with user_errors(f"-d {args.dataset_name or 'built in'}"):
        sources = find_sources(args.dataset_name, args.dataset_subset)
        first = "train" if "train" in sources else next(iter(sources))
        own = first == "train" and "validation" in sources
        for name in (first, "validation") if own else (first,):
            options = {"column": args.text_column, "tokenizer": tokenizer, "source": sources[name]}
            parts = datasets.Dataset.from_generator(read_parts, gen_kwargs=options)
            document = torch.tensor(parts["document"])  # of each part, -1 of those without text
            number, empty = document.max().item() + 1, (document < 0).sum().item()
            if not own:  # shuffle the documents
                order = datasets.Dataset.from_dict({"document": range(max(1, number))}).shuffle(0)
                place = torch.tensor(order["document"]).argsort()[document]
                parts = parts.select(place.argsort(stable=True))
            rows = pack(parts, tokenizer, args.seq_length, vocab_size)
            data["validation" if data else "train"] = rows
            told.append(f"{number:,} documents of the split {name}, {empty:,} empty ones skipped")
        if not own:
            border = max(0, len(rows) - max(1, len(rows) // 20))
            data["train"] = rows.select(range(border))
            data["validation"] = rows.select(range(border, len(rows)))
        if short := [split for split, rows in data.items() if not len(rows)]:
            raise ValueError(f"not one sequence of {args.seq_length} tokens with one that counts "
                             f"for {' and '.join(short)}; use more, or a shorter -s")  # fmt: skip
    told.append(f"{sum(map(len, data.values())) * args.seq_length:,} tokens")
    if "labels" in rows.features:
        batches = itertools.chain(*(rows.iter(1000) for rows in data.values()))
        counted = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches)
        told.append(f"{counted:,} labels that count")
    data["train"].info.description = ", ".join(told)
    return data


def find_sources(name: str | None, subset: str | None) -> dict[str, tuple]:
    """For each split its format, and its files if they are text or JSON, or else its Dataset."""
    path = Path(name or sysconfig.get_paths()["stdlib"])
    kind, options = datasets.load.infer_module_for_data_files_list([path.name])  # by its endings
    if path.suffix in (".py", ".md"):
        kind, options = "text", {}
    if not name:  # the top-level modules of the standard library
        options = {"path": "text", "data_files": f"{glob.escape(str(path))}/*.py"}
    elif path.is_dir() or not (kind or path.exists()):
        options = {"path": str(path.absolute()) if path.exists() else name, "name": subset}
    elif kind:
        options = options | {"path": kind, "data_files": glob.escape(name)}
    else:
        raise ValueError("it should end in .txt, .jsonl, .json, .csv, .tsv or .parquet")
    builder = datasets.load_dataset_builder(**options)
    if path.exists() and builder.name in ("text", "json"):
        return {s: (builder.name, files) for s, files in builder.config.data_files.items()}
    builder.download_and_prepare()
    return {split: ("rows", rows) for split, rows in builder.as_dataset().items()}


def read_rows(kind: str, source):
    """Yield where each row is, and the row: a dict, or its JSON; of a text file, the open file."""
    if kind == "rows":
        yield from ((f"row {number}", row) for number, row in enumerate(source, 1))
        return
    unpack = datasets.DownloadManager(download_config=datasets.DownloadConfig(force_extract=True))
    for file in source:
        with user_errors(file), open(unpack.extract(file), encoding="utf-8-sig") as lines:
            if kind == "text":
                yield file, {"text": lines}
                continue
            is_array = lines.read(1) == "["
            lines.seek(0)
            rows = enumerate(json.load(lines) if is_array else lines, 1)
            yield from ((f"{file}, row {number}", row) for number, row in rows if row != "\n")


def read_parts(source: tuple, column: str | None, tokenizer):
    """Yield the texts of all documents, and the number of the document that each is from."""
    names, number = ("document", "text", "counts", "begins", "ends"), 0
    for place, row in read_rows(*source):
        empty = True
        with user_errors(place):
            row = json.loads(row) if isinstance(row, str) else row
            for part in document_parts(row, column, tokenizer):
                yield dict(zip(names, (number, *part), strict=True))
                empty = False
        if empty:
            yield dict(zip(names, (-1, "", True, False, False), strict=True))
        number += not empty


def document_parts(row: dict, column: str | None, tokenizer):
    """Yield each text of a row, and whether its tokens count, begin a document, and end one."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} instead of an object with columns")
    shapes = [[column]] if column else [["text"], ["prompt", "completion"], ["messages"]]
    fits = [names for names in shapes if row.keys() >= {*names}]
    if len(fits) != 1:
        columns = {name: type(value).__name__ for name, value in row.items()}
        raise ValueError("the columns should be text, or prompt and completion, or messages, or "
                         f"--text-column should name the text; they are {columns}")  # fmt: skip
    values = [row[name] for name in fits[0]]
    if not any(values):
        return
    if fits[0] == ["messages"]:
        yield from turns(values[0], tokenizer)
    elif not (values[-1] and all(isinstance(v or "", (str, io.TextIOBase)) for v in values)):
        raise ValueError(f"{' and '.join(fits[0])} should be strings, the last one not empty")
    elif len(values) == 2:
        yield from ((values[0] or "", False, True, False), (values[1], True, False, True))
    else:
        text = values[0] if isinstance(values[0], io.TextIOBase) else io.StringIO(values[0])
        piece, begins = text.read(PIECE) + text.readline(PIECE), True
        while piece:
            following = text.read(PIECE) + text.readline(PIECE)
            yield piece, True, begins, not following
            piece, begins = following, False


def turns(messages: list[dict], tokenizer):
    """Yield the texts of a conversation as its chat template renders it; the assistant's count."""
    before, render = "", functools.partial(tokenizer.apply_chat_template, tokenize=False)
    for i, message in enumerate(messages if isinstance(messages, list) else [messages]):
        fields = dict.fromkeys(("role", "content")) | (message if isinstance(message, dict) else {})
        if not (isinstance(fields["role"], str) and isinstance(fields["content"], str)):
            raise ValueError(f"message {i + 1} should have a role and a content that are strings")
        if fields["role"] == "assistant":
            prompt = render(messages[:i], add_generation_prompt=True)
            whole = render(messages[: i + 1])
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise ValueError("the chat template changes earlier turns, which hides the labels")
            yield prompt[len(before) :], False, False, False
            yield whole[len(prompt) :], True, False, False
            before = whole


def pack(parts: datasets.Dataset, tokenizer, seq_length: int, vocab_size: int):
    """Rows of `seq_length` tokens: one document after the other, cut where a row is full."""
    alone = tokenizer("x", return_special_tokens_mask=True)
    begin = alone.input_ids[: [*alone.special_tokens_mask, 0].index(0)]  # BOS, or nothing
    end, ids, labels = [tokenizer.eos_token_id], [], []  # what has not filled a row yet
    names = ["input_ids"] if all(parts["counts"]) else ["input_ids", "labels"]

    def tokenize(batch: dict) -> dict:
        tokenized = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
        flags = (batch[name] for name in ("counts", "begins", "ends"))
        for tokens, counts, begins, ends in zip(tokenized, *flags, strict=True):
            if begins and tokens[: len(begin)] != begin:
                tokens = begin + tokens
            if ends and tokens[-1:] != end:
                tokens = tokens + end
            if (largest := max(tokens, default=0)) >= vocab_size:
                name = tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(f"{name!r} is token {largest}, the model has only {vocab_size}")
            ids.extend(tokens)
            labels.extend(tokens if counts else [-100] * len(tokens))
        starts = range(0, len(ids) - seq_length + 1, seq_length)
        rows = [slice(i, i + seq_length) for i in starts]
        rows = [row for row in rows if set(labels[row][1:]) != {-100}]  # a label predicts nothing
        made = {"input_ids": [ids[row] for row in rows], "labels": [labels[row] for row in rows]}
        del ids[: len(starts) * seq_length], labels[: len(starts) * seq_length]
        return {name: made[name] for name in names}

    features = datasets.Features(dict.fromkeys(names, datasets.List(datasets.Value("int32"))))
    options = {"batch_size": 64, "remove_columns": parts.column_names, "desc": "Tokenizing"}
    return parts.map(tokenize, batched=True, features=features, **options).with_format("torch")


@functools.lru_cache(maxsize=2)
def row_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits the rows: a permutation, (num_rows,) int64."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + 1000003 * epoch))


def global_batch_rows(step: int, global_batch_size: int, num_rows: int, seed: int) -> list[int]:
    """The rows of 0-based `step`, whatever the layout.

    Batches run through epoch 0, 1, 2, ... without a gap: each row is used once an epoch, and the
    batch at the border has rows of both epochs.
    """
    positions = range(step * global_batch_size, (step + 1) * global_batch_size)
    return [row_order(num_rows, seed, p // num_rows)[p % num_rows].item() for p in positions]


def micro_batches(rows: list[int], batch_size: int, dp_rank: int, dp: int) -> list[list[int]]:
    """This dp rank's part of a global batch, `batch_size` rows for each forward pass."""
    starts = range(dp_rank * batch_size, len(rows), dp * batch_size)
    return [rows[start : start + batch_size] for start in starts]


def load_batch(data: datasets.Dataset, rows: list[int], device: torch.device) -> tuple:
    """Ids and labels, both (B, S) int64 on `device`, copied without waiting for it."""
    batch = data[rows]
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch["input_ids"], batch.get("labels", batch["input_ids"])


# ---- Metrics -----------------------------------------------------------------------------------

PEAK_BF16_FLOPS = {  # dense, from the datasheets
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def flops_per_token(model: PreTrainedModel, seq_length: int) -> int:
    """FLOPs that training on one token needs: 6 per weight of a matrix product, and attention's.

    Recomputation does not count, causality does not halve attention, and looking up an embedding
    is free (Chowdhery et al. 2022, PaLM, appendix B).
    """
    config, embed = model.config, model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if model.get_output_embeddings().weight is embed else embed.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return 6 * weights + 12 * config.num_hidden_layers * width * seq_length


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Datasheet FLOP/s of a device for products of bf16 matrices, None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return PEAK_BF16_FLOPS.get(name) if dtype == "bf16" else None


def peak_memory_gib(device: torch.device) -> float:
    """The most this rank has held, in GiB: device memory on CUDA, resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Measures the whole job between two rows of metrics.jsonl, and writes them to `file`."""

    def __init__(self, args, model: PreTrainedModel, mesh: DeviceMesh, file: Path | None):
        self.args, self.mesh, self.device = args, mesh, model.device
        self.file = file if dist.get_rank() == 0 else None
        self.layout = {"world_size": mesh.size(), "dp": mesh.shape[0], "tp": mesh.shape[1]}
        self.tokens = args.global_batch_size * args.seq_length  # of a step
        self.flops = flops_per_token(model, args.seq_length) * self.tokens
        self.peak = peak_flops(model.device, args.dtype)

    def start(self, step: int) -> None:
        """Measure from here, after `step` optimizer steps."""
        self.step, self.begin, self.data_s = step, time.perf_counter(), 0.0

    def row(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> dict:
        """What the job has reached at `step`, and how fast since the row before.

        The only place where the training loop waits for the device, so its clock sees work done.
        """
        dist.all_reduce(loss, group=self.mesh["dp"].get_group())
        worst = torch.tensor([peak_memory_gib(self.device), self.data_s])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        (peak_mem_gib, data_s), loss, grad_norm = worst.tolist(), loss.item(), grad_norm.item()
        steps, seconds = step - self.step, time.perf_counter() - self.begin
        mfu = self.flops * steps / seconds / self.mesh.size() / self.peak if self.peak else None
        self.start(step)
        return {
            "step": step, "epoch": round(step / self.args.steps_per_epoch, 4),
            "loss": loss / self.layout["dp"], "grad_norm": grad_norm, "lr": lr,
            "tokens": step * self.tokens,
            "tokens_per_s": round(steps * self.tokens / seconds, 1),
            "step_s": round(seconds / steps, 5), "data_s": round(data_s / steps, 5),
            "mfu": mfu and round(mfu, 4), "peak_mem_gib": round(peak_mem_gib, 3),
            **self.layout,
        }  # fmt: skip

    def write(self, row: dict) -> dict:
        """Append `row` to the file, if there is one; returns it."""
        if self.file:
            with open(self.file, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row


# ---- Checkpoints, stopping, export --------------------------------------------------------------


class Checkpoints:
    """Saves the state while the training goes on, resumes from it, stops all ranks together.

    A checkpoint is written as writing-STEP and renamed to step-STEP once every rank has written
    its shards: it is complete or absent. Without a `folder` nothing is kept. SIGTERM, SIGINT or
    SIGUSR1 to any rank is a request to save and stop.
    """

    def __init__(self, folder: Path | None, keep: int, settings: dict):
        self.folder, self.keep = folder and folder / "checkpoints", keep
        self.metrics = folder and folder / "metrics.jsonl"
        self.settings = json.loads(json.dumps(settings))  # as it comes back from run.json
        self.rank0, self.stopping = dist.get_rank() == 0, False
        self.saving = self.vote = None  # a future, and a collective with its tensor
        self.publisher = ThreadPoolExecutor(1)
        # Collectives of the saving thread must not mix with those of the training.
        self.group = dist.new_group(backend="gloo") if folder else None

    def agree_to_stop(self) -> bool:
        """Whether any rank had been asked to stop when this was called last.

        Every rank calls it at every step. The answer is one step old, so that no rank waits for
        it. A failed save is such a request, too: the next `save` or `finish` raises the error.
        """
        agreed = False
        if self.vote:
            self.vote[0].wait()
            agreed = self.vote[1].item() > 0  # on CPU
        failed = bool(self.saving and self.saving.done() and self.saving.exception())
        wish = torch.tensor(int(self.stopping or failed))
        self.vote = dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True), wish
        return agreed

    def save(self, state: TrainState, layout: dict) -> None:
        """Copy the state and start to write it, once the checkpoint before it is written."""
        if not self.folder:
            return
        self.finish()
        part = self.folder / f"writing-{state.step:08d}"
        run = {"step": state.step, **layout, "settings": self.settings}
        run["metrics_bytes"] = self.metrics.stat().st_size if self.metrics.exists() else 0
        # The writer copies the shards to the host before it returns. The default one would ask for
        # a CUDA stream in its thread, where the device is 0 on every rank (torch 2.13).
        writer = dcp.FileSystemWriter(part)
        self.saving = dcp.async_save(
            {"state": state}, storage_writer=writer, process_group=self.group
        )
        if self.rank0:
            self.saving = self.publisher.submit(self.publish, part, run, self.saving)

    def publish(self, part: Path, run: dict, written: Future) -> None:
        """Name a checkpoint once every rank has written, and delete the ones beyond `keep`."""
        try:
            written.result()
            (part / "run.json").write_text(json.dumps(run, indent=1))
            part.rename(part.with_name(f"step-{run['step']:08d}"))
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old.rename(old.with_name(old.name.replace("step", "deleting"))))
        except (OSError, dcp.CheckpointException) as error:
            free = f"{shutil.disk_usage(self.folder).free / 2**30:.2f} GiB free"
            shutil.rmtree(part, ignore_errors=True)
            text = f"step {run['step']} could not be saved, {free}: {explain(error)}"
            raise OSError(text) from error

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; raises UserError if it has failed."""
        with together():
            if self.saving and (error := self.saving.exception()) and self.rank0:
                raise error  # every rank knows that it failed, rank 0 says why
        self.saving = None

    def resume(self, state: TrainState) -> dict:
        """Load the newest checkpoint that every rank can read; its run.json, {} if there is none.

        Raises UserError if it is of another training, or if none can be read.
        """
        found = [{}]
        with together():
            if self.folder and self.rank0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob("*ing-*"):  # writing- and deleting-
                    shutil.rmtree(left)
                for file in sorted(self.folder.glob("step-*/run.json"), reverse=True):
                    found[0][file.parent] = file.read_text()
        dist.broadcast_object_list(found)
        for path, text in found[0].items():
            run = json.loads(text)
            self.check_settings(run)
            try:
                with together():
                    if not (path / ".metadata").exists():
                        raise OSError("not every rank finds its .metadata")
                dcp.load({"state": state}, checkpoint_id=path)
            except (UserError, dcp.CheckpointException) as error:  # on all ranks or none
                if self.rank0:
                    print(f"checkpoint {path.name} cannot be used: {explain(error)}", flush=True)
            else:
                state.step = run["step"]
                return run
        if found[0]:
            raise UserError(f"no checkpoint in {self.folder} can be used; move them away")
        return {}

    def check_settings(self, run: dict) -> None:
        """Raise UserError naming each setting in which `run` is another training than this one."""
        old, new = run["settings"], dict(self.settings)
        if run["step"] == old["total_steps"] < new["total_steps"]:
            # A finished run may be made longer; warmup follows the length unless it is given.
            new |= {key: old[key] for key in ("total_steps", "warmup_steps")}
        if differ := [f"{k}: {old.get(k)} then, {new[k]} now" for k in new if old.get(k) != new[k]]:
            place = self.folder.parent
            raise UserError(f"{place} was another run, use another -e; " + "; ".join(differ))

    def go_on(self, run: dict) -> None:
        """Move newer checkpoints than `run` aside, with their metrics, and listen to signals."""
        with together():
            if self.folder and self.rank0:
                for path in self.folder.glob("step-*"):
                    if path.name > f"step-{run.get('step', 0):08d}":
                        path.replace(path.with_name(f"unusable-{path.name}"))
                if self.metrics.exists():
                    size = self.metrics.stat().st_size
                    os.truncate(self.metrics, min(size, run.get("metrics_bytes", 0)))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))


@torch.no_grad()
def export_model(
    model: PreTrainedModel, tokenizer, dtype: torch.dtype, folder: Path, generation: str | None
) -> None:
    """Write a directory that `from_pretrained` loads, every rank its own shards, in `dtype`.

    The model's own generation_config.json is in the file `generation`.
    """
    part = folder.with_name("writing-export")
    state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    sizes = itertools.accumulate(p.numel() * p.itemsize for p in state.values())
    numbers = [size // EXPORT_FILE_BYTES for size in sizes]
    files = {n: sorted(set(numbers)).index(i) + 1 for n, i in zip(state, numbers, strict=True)}
    writer = dcp.HuggingFaceStorageWriter(
        str(part), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(part / "sharded")
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = dtype, [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if generation:  # as it is, valid or not
            shutil.copyfile(generation, part / "generation_config.json")
        else:
            model.generation_config.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)


# ---- Command line and job ----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPORT_FILE_BYTES = 5 * 10**9
BUILT_IN_STEPS = 180
LIBRARIES = {  # whose exceptions mean a file, not a bug of the script
    "datasets", "huggingface_hub", "jinja2", "lzma", "pyarrow", "safetensors", "tokenizers", "zlib",
    "_lzma",
}  # fmt: skip
DATA_TIMEOUT = timedelta(hours=4)  # how long the other ranks wait for a dataset to be tokenized


def init_distributed(device_type: str | None) -> torch.device:
    """Join the job torchrun describes, or make one of this process alone; returns its device."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    local_rank = int(os.environ["LOCAL_RANK"])
    backend, device = "gloo", torch.device("cpu")
    if device_type != "cpu" and local_rank < torch.cuda.device_count():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Ranks that torchrun started again must not read what the ones before left in the store; with
    # --master-port, not c10d's rendezvous, it is the same store and they would hang (torch 2.13).
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def explain(error: Exception) -> str:
    """The message of an exception; of one that many ranks raised at once, one rank's."""
    return str(error.failures.popitem()[1][0] if hasattr(error, "failures") else error)


@contextlib.contextmanager
def user_errors(what: str):
    """Turn what the block raises because of a user's files or values into a UserError on `what`."""
    try:
        yield
    except Exception as error:
        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            cause = error.__cause__
        # Libraries have no common class for a bad file; some raise a plain Exception.
        library = type(cause).__module__.partition(".")[0]
        known = (UserError, OSError, ValueError, EOFError, ImportError, dcp.CheckpointException)
        cast = isinstance(cause, TypeError) and "Couldn't cast" in str(cause)  # of datasets
        if not (
            isinstance(cause, known) or library in LIBRARIES or type(cause) is Exception or cast
        ):
            raise
        text = textwrap.shorten(explain(cause), 600)
        raise UserError(f"{what}: {text}") from error


@contextlib.contextmanager
def together(what: str = "", group: dist.ProcessGroup | None = None):
    """If files or values make the block fail on any rank, all ranks raise UserError after it."""
    problems, seen = [], [None] * dist.get_world_size()
    try:
        yield
    except (OSError, ValueError, UserError, dcp.CheckpointException) as error:
        problems = [explain(error) if isinstance(error, UserError) else f"{what}{explain(error)}"]
    dist.all_gather_object(seen, problems, group)
    if any(seen):
        raise UserError("\nerror: ".join(dict.fromkeys(itertools.chain(*seen))))


def first_on_node(what: str, make):
    """`make()`, called on one rank of each node and then on the others, which find its cache."""
    group = dist.new_group(backend="gloo", timeout=DATA_TIMEOUT)
    for turn in ("0", "not 0"):
        with together(f"{what}: ", group):
            if (os.environ["LOCAL_RANK"] == "0") == (turn == "0"):
                result = make()
    return result


def find_model(name: str | None, random_init: bool) -> tuple:
    """Configuration, tokenizer, safetensors files and generation_config.json of a model.

    `name` is a hub id or a directory; downloads what is not in the cache. Raises UserError.
    """
    if not name:
        return built_in_config(), transformers.ByT5Tokenizer(extra_ids=125), None, None
    # None for a file that is not there; without this flag that is an error like a lost connection.
    find = functools.partial(cached_file, name, _raise_exceptions_for_missing_entries=False)
    with user_errors(f"-m {name}"):
        if find("adapter_config.json") and not find("config.json"):
            raise ValueError(
                "it is a LoRA adapter: merge it into its model with peft, and save that"
            )
        config = AutoConfig.from_pretrained(name)
        if config.get_text_config() is not config:
            raise ValueError(f"{config.model_type} is several models in one: save its language "
                             "model alone with transformers, and use that")  # fmt: skip
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
        if missing := [size for size in sizes if not getattr(config, size, None)]:
            raise ValueError(f"a model like Llama has {', '.join(missing)} in its config.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        generation = find("generation_config.json")
        if random_init:
            return config, tokenizer, None, generation
        files = [find("model.safetensors")]  # first, as transformers does
        if not files[0] and (index := find("model.safetensors.index.json")):
            files = {*json.loads(Path(index).read_text())["weight_map"].values()}
            files = [find(file) for file in sorted(files)]
        if not all(files):
            raise ValueError(
                "no model.safetensors, or not all files of model.safetensors.index.json; load it "
                "with transformers and save_pretrained it, or use --random-init"
            )
        stored = load_state_dict(files[0], map_location="meta").values()
        config.dtype = config.dtype or next(t.dtype for t in stored if t.is_floating_point())
    return config, tokenizer, files, generation


def check_layout(config: PretrainedConfig, world_size: int, tp: int) -> None:
    """Raise ValueError, naming the tp values that work, unless tp divides what it shards."""
    sizes = {"world size": world_size, "attention heads": config.num_attention_heads}
    sizes["intermediate size"] = getattr(config, "intermediate_size", None) or 0
    if bad := [f"{name} ({size})" for name, size in sizes.items() if size % tp]:
        works = [t for t in range(1, world_size + 1) if not any(s % t for s in sizes.values())]
        raise ValueError(f"--tp {tp} does not divide {', '.join(bad)}; these do: {works}")
    vocabulary, hidden, dp = config.vocab_size, config.hidden_size, world_size // tp
    if vocabulary % tp and hidden % dp:  # see placement in apply_fsdp
        raise ValueError(f"--tp {tp} does not divide the vocabulary ({vocabulary}); then dp {dp} "
                         f"has to divide the hidden size ({hidden})")  # fmt: skip


def check_args(args, config: PretrainedConfig, device: torch.device, tokenizer) -> None:
    """Raise ValueError with all that is wrong with the command line, and what would work."""
    limit, old = getattr(config, "max_position_embeddings", math.inf), torch.__version__ < (2, 13)
    drop = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float) and v}
    gpus, ranks = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE", 1)
    wrong = {
        f"--device cuda, but a node has {gpus} GPUs for its {ranks} ranks; use a rank per GPU, or "
        "--device cpu": args.device == "cuda" and device.type == "cpu",
        "--export-only needs the -e NAME of a run": args.export_only and not args.experiment_name,
        f"--seq-length {args.seq_length} is more than the model's {limit}": args.seq_length > limit,
        "--seq-length 1 leaves nothing to predict; 2 or more does": args.seq_length == 1,
        f"--tp {args.tp} does not divide --seq-length {args.seq_length}, which needs torch 2.13":
            old and args.tp > 0 and args.seq_length % args.tp,
        "the tokenizer has no end token to put between documents": tokenizer.eos_token_id is None,
        f"config.json has {drop}; only 0 is the same training on every layout": drop,
    }  # fmt: skip
    for name, value in vars(args).items():
        least = 0 if name in ("warmup_steps", "weight_decay", "seed", "eval_freq") else 1e-12
        flag, needs = name.replace("_", "-"), "more than 0" if least else "0 or more"
        number = type(value) in (int, float)
        wrong[f"--{flag} must be {needs}, not {value}"] = number and not least <= value < math.inf
    problems = [message for message, applies in wrong.items() if applies]
    if min(args.tp, args.batch_size, args.global_batch_size or 1) > 0:
        try:
            check_layout(config, dist.get_world_size(), args.tp)
        except ValueError as error:
            problems.append(str(error))
        unit = args.batch_size * max(1, dist.get_world_size() // args.tp)
        if (size := args.global_batch_size or unit) % unit:
            problems.append(f"--global-batch-size {size} is not a multiple of batch size x dp = "
                            f"{unit}; {math.ceil(size / unit) * unit} is")  # fmt: skip
    if problems:
        raise ValueError("\nerror: ".join(problems))


def announce(args, model: nn.Module, run: dict, layout: dict) -> str:
    """The text before the training: what is resumed, if `run` is not empty, and what follows."""
    dp, tp, text = layout["dp"], layout["tp"], ""
    steps, size = args.total_steps, args.global_batch_size
    if run:
        text = f"resuming after step {run['step']}, saved on {run['dp']} dp x {run['tp']} tp\n"
        if (old := run["settings"]["total_steps"]) < steps:
            rate = learning_rate(run["step"], args.lr, args.warmup_steps, steps)
            text += (f"extended from {old} to {steps} steps, which the cosine now spans: the "
                     f"learning rate goes from {0.1 * args.lr:.3g} to {rate:.3g}\n")  # fmt: skip
    if int(os.environ.get("LOCAL_WORLD_SIZE", tp)) % tp:
        text += "warning: TP groups span nodes, so every layer waits for the network between them\n"
    return text + (
        f"{model.config.model_type}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args.dtype}, on {dp * tp} {args.device} ranks = {dp} dp x {tp} tp; global batch "
        f"{size} = {args.batch_size} sequences x {dp} dp x {size // (args.batch_size * dp)} "
        f"accumulation; {steps} steps, {steps * size * args.seq_length:,} tokens"
    )


def derive_args(args, num_rows: int, device: torch.device) -> None:
    """Fill in what follows from the data, the device and the number of ranks."""
    args.device = device.type
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dp = dist.get_world_size() // args.tp
    args.global_batch_size = args.global_batch_size or args.batch_size * dp
    args.steps_per_epoch = num_rows / args.global_batch_size
    if not (args.model_name or args.dataset_name or args.num_epochs or args.max_steps):
        args.max_steps = BUILT_IN_STEPS
    steps = math.ceil((args.num_epochs or 1) * num_rows / args.global_batch_size)
    args.total_steps = min(steps, args.max_steps or steps)
    if args.warmup_steps is None:
        args.warmup_steps = args.total_steps // 20


def run_settings(args, config: PretrainedConfig, rows: datasets.Dataset) -> dict:
    """What has to stay the same for a checkpoint to be the same training."""
    names = (
        "seq_length global_batch_size seed lr warmup_steps weight_decay max_grad_norm total_steps"
    )
    settings = {name: getattr(args, name) for name in names.split()}
    sample = [rows[i]["input_ids"].tolist() for i in range(0, len(rows), 1 + len(rows) // 8)]
    digest = hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:8]
    settings["dataset"] = f"{args.dataset_name or 'built in'}, {len(rows)} sequences, {digest}"
    unrelated = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    model = {f"model.{k}": v for k, v in config.to_dict().items() if k not in unrelated}
    return settings | model


def main(args: argparse.Namespace) -> None:
    """Train as `args` says; every rank calls this once."""
    begin, device = time.perf_counter(), init_distributed(args.device)
    rank0 = dist.get_rank() == 0
    if not rank0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()  # the hub's, too
    config, tokenizer, weights, generation = first_on_node(
        f"-m {args.model_name}", lambda: find_model(args.model_name, args.random_init)
    )
    with together():
        check_args(args, config, device, tokenizer)
    data = first_on_node(
        f"-d {args.dataset_name}", lambda: load_data(args, tokenizer, config.vocab_size)
    )
    derive_args(args, len(data["train"]), device)

    mesh = build_mesh(device.type, args.tp)
    with together(), user_errors(f"-m {args.model_name or 'built in'}"):
        recompute, dtype = args.activation_checkpointing, DTYPES[args.dtype]
        model = shard_model(config, mesh, dtype, recompute, args.compile)
        model.to_empty(device=device)
        init_weights(model, args.seed, only_buffers=weights is not None)
        if weights:
            load_weights(model, weights)
    state = TrainState(model, build_optimizer(model, args.weight_decay))

    folder = Path(args.save_dir, args.experiment_name) if args.experiment_name else None
    settings = run_settings(args, config, data["train"])
    checkpoints = Checkpoints(folder, args.keep_checkpoints, settings)
    run = checkpoints.resume(state)
    meter = Meter(args, model, mesh, checkpoints.metrics)
    if rank0:
        print(announce(args, model, run, meter.layout), file=sys.stderr, flush=True)
    if not args.export_only:
        checkpoints.go_on(run)
        row = train(args, state, data, meter, checkpoints)
    elif not run:
        raise UserError(f"--export-only: {folder} has no checkpoint")
    if folder and (args.export_only or state.step == args.total_steps):
        with together("the export failed: "):
            dtype = config.dtype or torch.float32
            export_model(model, tokenizer, dtype, folder / "export", generation)

    if rank0:
        where = f"results in {folder}" if folder else "nothing written, -e NAME keeps results"
        text = f"{state.step} steps, {time.perf_counter() - begin:.0f} s; {where}"
        if args.export_only:
            text = f"exported after {text}"
        elif state.step < args.total_steps:
            text = f"stopped as asked after {text}; the same command goes on from a checkpoint"
        elif "loss" in row:
            text = f"training loss {row['loss']:.3f}, validation loss {row['val_loss']:.3f}; {text}"
        print(text, file=sys.stderr, flush=True)
    dist.destroy_process_group()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and one message if it cannot be parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    if os.environ.get("RANK", "0") != "0":  # torchrun ends rank 0 when another rank exits
        parser._print_message = lambda *message: time.sleep(10)
    add, flag = parser.add_argument, {"action": "store_true"}
    # fmt: off
    add("--tp", "-tp", "--tensor-parallel", type=int, default=1,
        help="ranks that share one copy of each layer; the rest is data parallel (1)")
    add("-m", "--model-name", help="hub id or directory of a Hugging Face causal LM (built in)")
    add("--random-init", **flag, help="only configuration and tokenizer of -m; train from scratch")
    add("-d", "--dataset-name", help="hub id, local directory, or .txt, .jsonl, .json, .parquet or "
        ".csv file, with columns text, or prompt and completion, or messages (the source code of "
        "Python's standard library)")
    add("--dataset-subset", help="configuration of a hub dataset (none)")
    add("--text-column", help="column with the text, if it has another name (text)")
    add("-s", "--seq-length", type=int, help="tokens per sequence (256; 1024 with -m)")
    add("-b", "--batch-size", type=int, help="sequences per dp rank and forward pass; lower it if "
        "you run out of memory (4; 1 with -m)")
    add("--global-batch-size", type=int, help="sequences per optimizer step over all ranks; gives "
        "the gradient accumulation (batch size x dp)")
    add("--num-epochs", type=int, help="passes over the data (1)")
    add("--max-steps", type=int, help=f"optimizer steps at most ({BUILT_IN_STEPS} if all built in)")
    add("--lr", type=float, help="peak learning rate (0.003; 0.00003 with -m)")
    add("--warmup-steps", type=int, help="linear warmup (a twentieth of all steps)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices only (0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm (1.0)")
    add("--seed", type=int, default=0, help="of initial weights and data order (0)")
    add("--dtype", choices=list(DTYPES), help="of computation, not weights (bf16 on CUDA, or fp32)")
    add("--compile", **flag, help="torch.compile each layer: a slow first step, fast ones after it")
    add("--activation-checkpointing", **flag, help="recompute each layer in the backward pass "
        "instead of keeping its activations")
    add("-e", "--experiment-name", help="keep results under this name (keep none)")
    add("--save-dir", default="outputs", help="where experiments go (outputs)")
    add("--export-only", **flag, help="write export/ from the newest checkpoint of -e, and end")
    add("--log-freq", type=int, default=10, help="steps between metrics (10)")
    add("--eval-freq", type=int, default=0, help="steps between evaluations (0: one at the end)")
    add("--ckpt-freq", type=int, default=500, help="steps between checkpoints (500)")
    add("--keep-checkpoints", type=int, default=2, help="how many of the newest stay (2)")
    add("--device", choices=["cuda", "cpu"], help="(cuda when there is one)")
    # fmt: on
    args = parser.parse_args(argv)
    defaults = (1024, 1, 3e-5) if args.model_name else (256, 4, 3e-3)
    for name, value in zip(("seq_length", "batch_size", "lr"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def report(error: Exception, args: argparse.Namespace) -> None:
    """Say what ended this rank and how the run goes on: one traceback, of the first rank to fail.

    torchrun prints that one. Those of other ranks go to files in its log directory.
    """
    folder, text = Path(args.save_dir, args.experiment_name or "") / "checkpoints", "nothing saved"
    if args.experiment_name and (saved := sorted(folder.glob("step-*"))):
        ranks = os.environ.get("LOCAL_WORLD_SIZE")
        command = [*(["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]), *sys.argv]
        text = f"the newest checkpoint is {saved[-1]}; this goes on from it:\n{shlex.join(command)}"
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        raise RuntimeError(text) from error
    except RuntimeError as told:
        # Gloo has no exception of its own for a rank that is gone (torch 2.13).
        if isinstance(error, dist.DistError) or "onnection" in str(error):
            if os.environ["RANK"] == "0":
                reason = str(error).splitlines()[0]
                print(f"\nerror: rank 0 has lost another one: {reason}; {text}", file=sys.stderr)
        elif not file:
            traceback.print_exc()
        elif dist.distributed_c10d._get_default_store().add("failed", 1) == 1:  # not public
            return get_error_handler().record_exception(told)
        else:
            Path(file).with_name("traceback.txt").write_text(traceback.format_exc())
    time.sleep(2)  # torchrun takes the rank that ends first for the cause


def run(args: argparse.Namespace) -> int:
    """The exit code of a run; what ended it is printed."""
    try:
        main(args)
    except UserError as error:
        if dist.get_rank() == 0:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends rank 0 as soon as another rank has failed
        return 1
    except Exception as error:
        report(error, args)
        return 1
    return 0


if __name__ == "__main__":
    code = run(parse_args())
    # Leave without Python's finalization. A gloo thread that drops the last reference to a tensor
    # after it has begun would now and then abort the process, with all work done (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
