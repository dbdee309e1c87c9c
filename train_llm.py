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
import fcntl
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import traceback
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint._consolidate_hf_safetensors as hf_files
import transformers
from datasets.utils.file_utils import xopen  # as the builders of datasets open files
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The unsharded fp32 model without memory for its weights."""
    with torch.device("meta"):  # from_config writes into the configuration
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def shard_model(
    config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype, recompute: bool, compile: bool
) -> PreTrainedModel:
    """The model sharded over `mesh`, on meta: it trains after `to_empty` and `init_weights`."""
    # transformers would ask the device in every forward pass whether positions restart within a
    # sequence, which is a sync (5.17 to 5.23). Ours never do.
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
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
                sizes, offsets = where.pop(p)
                shard = (slice(o, o + n) for n, o in zip(sizes, offsets, strict=True))
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


def build_optimizer(model: PreTrainedModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the peak rate `lr`, which decays matrices, but not norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear up to `peak`, then a cosine down to 10 % at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def train_step(model, optimizer, batches: list[tuple], max_grad_norm: float, dp_mesh) -> tuple:
    """One optimizer step on this rank's micro-batches, without a device sync.

    `batches` are pairs of ids and labels, each (B, S) int64; labels of -100 do not count. Returns
    scalars on the device: a loss whose mean over the dp ranks is the mean over all labels of the
    global batch, and the norm of the global gradient before clipping.
    """
    count = sum((labels[:, 1:] != -100).sum() for _, labels in batches)  # each predicts the next
    dist.all_reduce(count, group=dp_mesh.get_group())
    count = count / dp_mesh.size()  # because FSDP averages gradients over dp
    loss = torch.zeros((), device=count.device)
    for ids, labels in batches:
        part = model(ids, labels=labels, num_items_in_batch=count, use_cache=False).loss
        # FSDP reduces the gradients of every micro-batch, behind the computation. Unreduced, they
        # would be kept unsharded: 4 bytes for each parameter of a TP shard.
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
    """Mean loss per label over EVAL_SEQUENCES of `data`, or all it has; the same on every mesh."""
    rows = row_order(len(data), 0, 0)[:EVAL_SEQUENCES].tolist()
    rows += [-1] * (-len(rows) % (batch_size * dp_mesh.size()))  # all ranks need as many batches
    sums = torch.zeros(2, device=model.device)  # of losses and of labels
    model.eval()
    for batch in micro_batches(rows, batch_size, dp_mesh.get_local_rank(), dp_mesh.size()):
        ids, labels = load_batch(data, [max(0, row) for row in batch], model.device)
        labels[len(batch) - batch.count(-1) :] = -100  # the padding, which is last, does not count
        sums[0] += model(ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
        sums[1] += (labels[:, 1:] != -100).sum()
    model.train()
    dist.all_reduce(sums, group=dp_mesh.get_group())
    return (sums[0] / sums[1]).item()


def train(args, state: "TrainState", data: dict, mesh: DeviceMesh, run: "Run") -> dict:
    """Run the optimizer steps after `state.step`, to the end or until a rank is asked to stop.

    Returns the last row of metrics. Raises UserError if a gradient is not finite or a save fails.
    """
    dp_mesh, device, total = mesh["dp"], state.model.device, args.total_steps
    peaks = [group["lr"] for group in state.optimizer.param_groups]
    bar = tqdm(initial=state.step, total=total, unit="step", disable=dist.get_rank() != 0)
    first_bad = torch.zeros((), device=device)  # step whose gradient was not finite
    asked_to_stop, stop, row, clock = listen_to_signals(run.group), False, {}, Counter()

    def due(freq: int) -> bool:  # every `freq` steps, and after the last one
        return state.step == total or (freq > 0 and state.step > 0 and state.step % freq == 0)

    while True:
        if due(args.eval_freq) and not stop:  # a checkpoint that is due comes before it
            loss = evaluate(state.model, data["validation"], args.batch_size, dp_mesh)
            row |= write_row(run, {"step": state.step, "val_loss": loss})
        if stop or state.step == total:
            break
        begin = time.perf_counter()
        rows = global_batch_rows(state.step, args.global_batch_size, len(data["train"]), args.seed)
        rows = micro_batches(rows, args.batch_size, dp_mesh.get_local_rank(), dp_mesh.size())
        batches = [load_batch(data["train"], r, device) for r in rows]
        clock["data_s"] += time.perf_counter() - begin
        for group, peak in zip(state.optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(state.step, peak, args.warmup_steps, total)
        result = train_step(state.model, state.optimizer, batches, args.max_grad_norm, dp_mesh)
        state.step += 1
        bar.update()
        first_bad = torch.where((first_bad == 0) & ~result[1].isfinite(), state.step, first_bad)
        stop = asked_to_stop() and state.step < total
        log = state.step == 1 or due(args.log_freq)
        save = stop or due(args.ckpt_freq)
        # A step that does neither, and is not evaluated, does not wait for the device.
        if (log or save or due(args.eval_freq)) and first_bad.item():
            raise UserError(f"the gradient was not finite at step {first_bad:.0f}; not saved since")
        clock["steps"] += 1
        clock["step_s"] += time.perf_counter() - begin
        if log:
            row = write_row(run, step_row(args, state, mesh, result, clock))
            clock.clear()
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, "
                                "{peak_mem_gib:.2f} GiB".format(**row))  # fmt: skip
        if save and run.folder:
            save_checkpoint(state, run)
    bar.close()
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
        bytes_per_token = -(-weights[0].shape[0] // mesh.size()) * local.element_size()
        size = max(1, CHUNK_BYTES // bytes_per_token)
        losses, of_hidden, of_weights = [], [], []
        chunks = zip(local.flatten(0, 1).split(size), labels.flatten().split(size), strict=True)
        for part, targets in chunks:  # (n, D) and (n,)
            part = DTensor.from_local(part[None], mesh, [Replicate()], run_check=False)
            with torch.set_grad_enabled(train), loss_parallel():
                loss = loss_of(part.requires_grad_(train), weights, targets[None])
                losses.append(loss.detach().to_local())
                if train:
                    grad, *grads = torch.autograd.grad(loss, [part, *weights])
                    of_hidden.append(grad.to_local())  # a partial sum, over the rank's V/T
                    if of_weights:
                        grads = [a.float().add_(g) for a, g in zip(of_weights, grads, strict=True)]
                    of_weights = grads
                    del loss, grad, grads  # before the next chunk needs the memory
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


class OnlyLoss:
    """Stands for a model in its own forward, with functions in place of base model and head."""

    def __init__(self, model: nn.Module, hidden: DTensor, weights: tuple):
        self.original = model
        self.lm_head = lambda hidden: nn.functional.linear(hidden, *weights)
        setattr(self, model.base_model_prefix, lambda *_, **__: BaseModelOutputWithPast(hidden))

    def __getattr__(self, name: str):
        return getattr(self.original, name)


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

    def head_forward(hidden, labels=None, items=None):  # FSDP's hooks run around this call
        if labels is None:
            return logits_of(hidden)

        def loss_of(part, weights, labels):
            model_part, options = OnlyLoss(model, part, weights), {"num_items_in_batch": items}
            return kind.forward(model_part, labels=labels, shift_labels=labels, **options).loss

        weights = head.parameters()
        return ChunkedLoss.apply(loss_of, torch.is_grad_enabled(), hidden, labels, *weights)

    def forward(input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return whole(input_ids, **inputs)
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # each predicts the next one
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        hidden = base(input_ids, **inputs).last_hidden_state
        return CausalLMOutputWithPast(loss=head(hidden, labels=labels, items=items))

    head.forward, model.forward = head_forward, forward


# ---- Data --------------------------------------------------------------------------------------

TEXT_FILE = "path of a text file"  # the column of a dataset that stands for whole files
# Columns: of text files, and named as TRL names them.
SHAPES = ([TEXT_FILE], ["text"], ["prompt", "completion"], ["messages"])
# Formats of files, and options of their readers: bytes of JSON in which columns may change their
# type, and no index of a CSV, which surplus fields would make of its first columns.
KINDS = dict(text={}, parquet={}, arrow={}, json={"chunksize": 2**28}, csv={"index_col": False})
PIECE = 2**16  # characters; a longer text is tokenized in pieces
ROW = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")), counts=datasets.List(datasets.Value("bool"))
)
TOO_LITTLE = "not two sequences of {} tokens with labels that count; use more, or a shorter -s"


def load_data(args, tokenizer, vocab_size: int) -> dict[str, datasets.Dataset]:
    """Rows to train on and for validation: `input_ids`, and which of them `counts`, both (S,).

    Without a validation split the last twentieth, of shuffled documents, is held out. All is
    cached. `info.description` of the rows to train on says what was read. Raises UserError.
    """
    data, told, counted, checksum = {}, "", 0, 0
    with user_errors(f"-d {args.dataset_name or 'built in'}"):
        splits = read_splits(args.dataset_name, args.dataset_subset)
        names = [name for name in ("train", "validation") if name in splits] or list(splits)
        columns = {name: str(kind) for name, kind in splits[names[0]].features.items()}
        chosen = args.text_column if TEXT_FILE not in columns else None
        shapes = [[chosen]] if chosen else SHAPES
        fits = [shape for shape in shapes if columns.keys() >= {*shape}]
        if len(fits) != 1:
            raise ValueError("its columns should be text, prompt and completion, or messages, or "
                             f"--text-column should name the text; they are {columns}")  # fmt: skip
        used = names[:2] if "train" in names else names[:1]
        for key, name in zip(("train", "validation"), used, strict=False):
            documents = splits[name].select_columns(fits[0])
            full = documents.filter(lambda row: any(row.values())).shuffle(seed=0)
            told += (f"{len(full):,} documents of the split {name}, "
                     f"{len(documents) - len(full):,} empty ones skipped, ")  # fmt: skip
            options = {"documents": full, "tokenizer": tokenizer}
            options |= {"seq_length": args.seq_length, "vocab_size": vocab_size}
            rows = datasets.Dataset.from_generator(pack, features=ROW, gen_kwargs=options)
            data[key] = rows.with_format("torch")
        if "validation" not in data:
            rows = data["train"]
            border = max(0, len(rows) - max(1, len(rows) // 20))
            data["train"] = rows.select(range(border))
            data["validation"] = rows.select(range(border, len(rows)))
        if not all(map(len, data.values())):
            raise ValueError(TOO_LITTLE.format(args.seq_length))
    size = max(1, 2**20 // args.seq_length)  # rows at a time
    parts = (rows.with_format("numpy").iter(size) for rows in data.values())
    for batch in itertools.chain.from_iterable(parts):
        counted += batch["counts"][:, 1:].sum()
        checksum = zlib.crc32(batch["counts"], zlib.crc32(batch["input_ids"], checksum))
    tokens = sum(map(len, data.values())) * args.seq_length
    told += f"{tokens:,} tokens, {counted:,} labels that count, checksum {checksum:08x}"
    data["train"].info.description = told
    return data


def read_splits(name: str | None, subset: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a hub id, a directory or a file. A text file is one document, not read yet."""
    path, options = Path(name or sysconfig.get_paths()["stdlib"]), {}
    if not name:  # the top-level modules of the standard library
        kind, files = "text", {"train": sorted(map(str, path.glob("*.py")))}
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, dict) else {"train": saved}
    elif path.is_dir():
        if glob.escape(str(path.absolute())) != str(path.absolute()):
            raise ValueError("datasets takes its name for a pattern; call it without *, ? and [")
        builder = datasets.load_dataset_builder(str(path.absolute()), subset)
        kind, files = builder.name, builder.config.data_files
        options = {"sep": builder.config.sep} if kind == "csv" else {}  # a tab in .tsv
    else:
        kind, options = datasets.load.infer_module_for_data_files_list([path.name])  # by its ending
        if kind in (None, "harbor") and path.name.lower().endswith((".py", ".md")):
            kind = "text"
        files = {"train": [name]}
        if not (kind or path.exists() or path.is_absolute()):
            return datasets.load_dataset(name, subset)
        if not path.stat().st_size:
            raise ValueError("it is empty")
    if kind not in KINDS:
        raise ValueError("no .txt, .jsonl, .json, .csv, .tsv or .parquet, by its name")
    if kind == "text":  # a row for each file, with the path only; `text_parts` reads it
        splits, unpack = {}, datasets.StreamingDownloadManager().extract
        for split, paths in files.items():
            rows = []
            for path in map(os.path.abspath, paths):
                if path.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")):
                    raise ValueError(f"{path} is an archive; unpack it")
                stat = os.stat(path)
                changed = f"{stat.st_mtime_ns}, {stat.st_size}"  # for the cache
                rows.append({TEXT_FILE: unpack(path) if stat.st_size else "", "changed": changed})
            splits[split] = datasets.Dataset.from_list(rows)
        return splits
    # A path is that path, not a pattern.
    files = {split: list(map(glob.escape, found)) for split, found in files.items()}
    return datasets.load_dataset(kind, data_files=files, **KINDS[kind], **options)


def text_parts(documents: datasets.Dataset, tokenizer):
    """Yield each text, and whether its tokens count, begin a document, and end one."""
    for row in documents:
        first, *last = row.values()
        if list(row) == ["messages"]:
            yield from turns(first, tokenizer)
        elif not all(isinstance(value or "", str) for value in row.values()):
            raise ValueError(f"{' and '.join(row)} should be strings, not {str(row)[:100]}")
        elif last:
            if not last[0]:
                raise ValueError(f"the completion is empty in {str(row)[:100]}")
            yield from ((first or "", False, True, False), (last[0], True, False, True))
        elif TEXT_FILE in row:
            with user_errors(first), io.TextIOWrapper(xopen(first, "rb"), "utf-8-sig") as file:
                yield from pieces(file)
        else:
            yield from pieces(io.StringIO(first))


def pieces(file: TextIO):
    """Yield what `text_parts` does of a text that may be long, cut where lines end."""
    parts = itertools.chain(iter(lambda: file.read(PIECE) + file.readline(PIECE), ""), [""])
    for i, (part, following) in enumerate(itertools.pairwise(parts)):
        yield part, True, i == 0, not following


def turns(messages: list[dict], tokenizer):
    """Yield the texts of a conversation as its chat template renders it; the assistant's count."""
    before, render = "", functools.partial(tokenizer.apply_chat_template, tokenize=False)
    messages = messages if isinstance(messages, list) else [messages]
    for i, message in enumerate(messages):
        fields = dict.fromkeys(("role", "content")) | (message if isinstance(message, dict) else {})
        if not (isinstance(fields["role"], str) and isinstance(fields["content"], str)):
            raise ValueError(f"a message should have role and content as strings: {message}"[:200])
        if fields["role"] == "assistant":
            prompt = render(messages[:i], add_generation_prompt=True)
            whole = render(messages[: i + 1])
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise ValueError("the chat template changes earlier turns, which hides the labels")
            yield prompt[len(before) :], False, False, False
            yield whole[len(prompt) :], True, False, False
            before = whole


def pack(documents, tokenizer, seq_length: int, vocab_size: int):
    """Yield rows of `seq_length` tokens: one document after the other, cut where a row is full."""
    alone = tokenizer("x", return_special_tokens_mask=True)
    begin = alone.input_ids[: [*alone.special_tokens_mask, 0].index(0)]  # BOS, or nothing
    end, ids, counts = [tokenizer.eos_token_id], [], []  # and what has not filled a row yet
    parts, empty = text_parts(documents, tokenizer), True
    while batch := list(itertools.islice(parts, 16)):  # tokenizers in Rust have threads
        texts = [text for text, *_ in batch]
        tokenized = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for tokens, (_, count, begins, ends) in zip(tokenized, batch, strict=True):
            if begins and tokens[: len(begin)] != begin:
                tokens = begin + tokens
            if ends and tokens[-1:] != end:
                tokens = tokens + end
            if (largest := max(tokens, default=0)) >= vocab_size:
                name = tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(f"{name!r} is token {largest}, the model has only {vocab_size}")
            ids.extend(tokens)
            counts.extend([count] * len(tokens))
        stop = len(ids) // seq_length * seq_length
        for i in range(0, stop, seq_length):
            if any(counts[i + 1 : i + seq_length]):
                empty = False
                row = slice(i, i + seq_length)
                yield {"input_ids": ids[row], "counts": counts[row]}
        del ids[:stop], counts[:stop]
    if empty:
        raise ValueError(TOO_LITTLE.format(seq_length))


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
    ids, counts = batch["input_ids"], batch["counts"]
    if device.type == "cuda":
        ids, counts = ids.pin_memory(), counts.pin_memory()
    ids, counts = ids.to(device, non_blocking=True), counts.to(device, non_blocking=True)
    return ids, ids.masked_fill(~counts, -100)


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


def step_row(args, state: "TrainState", mesh: DeviceMesh, result: tuple, clock: Counter) -> dict:
    """What the whole job has reached with the `result` of this step.

    `clock` has the `steps` since the last row, the seconds that they took, `step_s`, and of these
    the ones that this rank waited for batches, `data_s`.
    """
    (loss, grad_norm), device, dp, tp = result, state.model.device, mesh["dp"], mesh["tp"]
    dist.all_reduce(loss, group=dp.get_group())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the resident set
    peak_bytes *= 1 if sys.platform == "darwin" else 1024
    peak_flops = None
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        peak_flops = PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))
    worst = torch.tensor([peak_bytes / 2**30, clock["data_s"] / clock["steps"]])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    peak_mem_gib, data_s = worst.tolist()
    tokens, step_s = args.global_batch_size * args.seq_length, clock["step_s"] / clock["steps"]
    mfu = None
    if peak_flops and args.dtype == "bf16":
        flops = flops_per_token(state.model, args.seq_length) * tokens
        mfu = round(flops / step_s / (dp.size() * tp.size()) / peak_flops, 4)
    return {
        "step": state.step, "epoch": round(state.step / args.steps_per_epoch, 4),
        "loss": loss.item() / dp.size(), "grad_norm": grad_norm.item(),
        "lr": state.optimizer.param_groups[0]["lr"], "tokens": state.step * tokens,
        "tokens_per_s": round(tokens / step_s, 1), "step_s": round(step_s, 5),
        "data_s": round(data_s, 5), "mfu": mfu, "peak_mem_gib": round(peak_mem_gib, 3),
        "world_size": dp.size() * tp.size(), "dp": dp.size(), "tp": tp.size(),
    }  # fmt: skip


# ---- Checkpoints, stopping, export --------------------------------------------------------------

MAY_CHANGE = {"lr", "warmup_steps", "weight_decay", "max_grad_norm", "total_steps", "dtype"}
EXPORT_FILE_BYTES = 5 * 10**9
PARENT = os.getppid()  # torchrun, if it has started this rank
ASKED = []  # the signals that have asked this rank to stop


@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds; learning rates are not in it, they follow from the step."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps done

    def tensors(self) -> dict:
        """The shards themselves, not copies: torch.distributed.checkpoint loads in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "moments": optimizer["state"]}


@dataclasses.dataclass
class Run:
    """What is kept of a run, and where; without a folder nothing is."""

    folder: Path | None
    keep: int  # newest checkpoints
    facts: dict  # layout and settings, for the checkpoints
    group: dist.ProcessGroup | None = None  # gloo's, to wait for other hosts, not for devices
    metrics: TextIO | None = None  # metrics.jsonl, open on rank 0 only


def write_row(run: Run, row: dict) -> dict:
    """Append `row` to metrics.jsonl, if there is one; returns it."""
    if run.metrics:
        with user_errors("metrics"):
            print(json.dumps(row), file=run.metrics, flush=True)
    return row


def checkpoints(folder: Path, complete: bool) -> list[Path]:
    """A run's checkpoints, oldest first; .metadata, which torch writes last, makes one complete."""
    paths = sorted(folder.glob("checkpoints/step-" + 8 * "[0-9]"))  # nothing else there is ours
    return [path for path in paths if not complete or (path / ".metadata").exists()]


def save_checkpoint(state: TrainState, run: Run) -> None:
    """Save the state, then delete what is older than the newest checkpoints that are kept.

    A checkpoint that cannot be deleted is warned about. Raises UserError if the state is not saved.
    """
    path = run.folder / "checkpoints" / f"step-{state.step:08d}"
    # One string: dcp.load fills only names that it is given, and these are not known then.
    facts = json.dumps(run.facts | {"step": state.step})
    with user_errors(f"checkpoint {path.name} could not be saved"):
        whole = {"facts": facts, **state.tensors()}
        dcp.save(whole, checkpoint_id=path, process_group=run.group)
    if run.metrics:  # on rank 0
        oldest = checkpoints(run.folder, complete=True)[-run.keep :][0]
        for old in checkpoints(run.folder, complete=False):
            try:
                if old < oldest:
                    (old / ".metadata").unlink(missing_ok=True)
                    shutil.rmtree(old)
            except OSError as error:
                say(f"warning: {old} could not be deleted: {error}")


def changes(old: dict, new: dict, allowed: bool) -> str:
    """The settings that differ, of those that may change in a run or of those that may not."""
    both = [name for name in new if name in old]  # another version may have other names
    differ = [k for k in both if old[k] != new[k] and (k in MAY_CHANGE) == allowed]
    return "; ".join(f"{k}: {old[k]} then, {new[k]} now" for k in differ)


def resume(state: TrainState, run: Run) -> dict:
    """Load the newest checkpoint that every rank can read; its facts, {} if there is none.

    Raises UserError if it is of another training, if none of them can be read, or if this rank has
    other data or another model than rank 0.
    """
    found = [checkpoints(run.folder, complete=True) if run.folder else [], run.facts["settings"]]
    dist.broadcast_object_list(found)  # every rank takes what rank 0 sees
    paths, first = found
    if wrong := changes(first, run.facts["settings"], allowed=False):
        raise UserError(f"this node has another model or other data than the first one; {wrong}")
    for path in reversed(paths):
        try:
            with user_errors(f"checkpoint {path.name} cannot be used"):
                dcp.load(stored := {"facts": ""}, checkpoint_id=path)
                facts = json.loads(stored["facts"])
                wrong = changes(facts["settings"], run.facts["settings"], allowed=False)
                if not wrong:
                    dcp.load(state.tensors(), checkpoint_id=path)
        except UserError as error:
            say(f"warning: {error}")
            continue
        if wrong:
            raise UserError(f"{run.folder} was another run, use another -e; {wrong}")
        state.step = facts["step"]
        return facts
    if paths:
        raise UserError(f"no checkpoint in {run.folder} can be used; move them away")
    return {}


def lock(run: Run) -> None:
    """On rank 0, open metrics.jsonl and hold it; raises UserError if another job does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.metrics = open(run.folder / "metrics.jsonl", "a+")
    try:
        fcntl.flock(run.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        raise UserError(f"another job trains in {run.folder}; use another -e") from None
    except OSError as error:
        say(f"warning: {run.folder} cannot be locked against a second job: {error}")


def clean_up(run: Run, old: dict, ckpt_freq: int) -> None:
    """On rank 0, remove what came after the checkpoint `old` from the run's folder.

    Raises UserError if checkpoints are gone that metrics tell of.
    """
    run.metrics.seek(0)
    text, done, size = run.metrics.read(), old.get("step", 0), 0
    # A first checkpoint may have been interrupted, but steps that come after a second one may not.
    if not old and any(int(n) > 2 * ckpt_freq for n in re.findall(r'"step": (\d+)', text)):
        raise UserError(f"{run.folder} has steps, but no checkpoint with .metadata; move it away")
    for line in text.splitlines(keepends=True):  # up to one that is newer, or was cut
        row = re.fullmatch(r'{"step": (\d+), .*}\n', line)
        if not row or (int(row[1]), "val_loss" in line) > (done, False):  # evaluated after saving
            break
        size += len(line)
    run.metrics.truncate(size)
    for path in checkpoints(run.folder, complete=True):
        if int(path.name[5:]) > done:  # it could not be loaded
            aside = path.with_name(f"unusable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def listen_to_signals(group: dist.ProcessGroup | None):
    """Take SIGTERM, SIGINT, SIGUSR1 and SIGHUP as a request to save and stop.

    Returns a function that all ranks call once a step: was any of them asked? A rank whose
    torchrun is gone asks, too.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup
            signal.signal(number, lambda number, frame: ASKED.append(number))
    vote = torch.zeros((), dtype=torch.int32)

    def any_asked() -> bool:
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        vote.fill_(len(ASKED) + orphan)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=group)
        return vote.item() > 0

    return any_asked


@torch.no_grad()
def export_model(
    model: PreTrainedModel, tokenizer, dtype: torch.dtype, folder: Path, generation: str | None
) -> None:
    """Write a directory that `from_pretrained` loads, in `dtype`; foreign files in it stay.

    Every rank writes its shards, and then puts some of the files together. `generation` is the
    model's own generation_config.json, if it has one, which is copied as it is, valid or not.
    """
    shards = folder / "shards"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if shards.exists():  # torch would mix the shards of an export that failed with these
            shutil.rmtree(shards)
        for ending in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json"):
            for old in folder.glob(f"model{ending}"):
                old.unlink()
    dist.barrier()
    state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    sizes = itertools.accumulate(p.numel() * p.itemsize for p in state.values())
    numbers = [size // EXPORT_FILE_BYTES for size in sizes]
    files = {n: sorted(set(numbers)).index(i) + 1 for n, i in zip(state, numbers, strict=True)}
    writer = dcp.HuggingFaceStorageWriter(str(shards), files, save_distributed=True)
    dcp.save(state, storage_writer=writer)
    hf_files.consolidate_safetensors_files_on_every_rank(str(shards), str(folder), files)
    if dist.get_rank() == 0:
        shutil.rmtree(shards)
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = dtype, [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if generation:
            shutil.copyfile(generation, folder / "generation_config.json")
        else:
            model.generation_config.save_pretrained(folder)


# ---- Command line and job ----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUILT_IN_STEPS = 180
DATA_TIMEOUT = timedelta(hours=4)  # how long the other ranks wait for a dataset to be tokenized
GRACE_S = 5.0  # how long a rank that fails waits for the one that will say why


class OneThreadGloo(dist.ProcessGroupGloo):
    """Gloo with one thread for each group, which init_process_group cannot be asked for.

    Two threads write the name of the last collective to one string without a lock, and corrupt the
    heap within hours of TP on CPU (torch 2.13 and 2.14).
    """

    def __init__(self, store, rank: int, world_size: int, timeout: timedelta, **_):  # 2.14 has more
        gloo, names = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
        devices = [gloo.create_device(interface=name) for name in names if name]
        options = gloo._Options()
        options._devices = devices or [gloo.create_default_device()]
        options._threads, options._timeout = 1, timeout
        super().__init__(store, rank, world_size, options)


def init_distributed(device_type: str | None) -> torch.device:
    """Join the job torchrun describes, or make one of this process alone; returns its device.

    Raises UserError if a node has some GPUs, but fewer than ranks.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # some launchers set only RANK
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend, device = "gloo", torch.device("cpu")
    if device_type == "cuda" or (gpus and device_type != "cpu"):
        if gpus < ranks:
            raise UserError(f"a node has {gpus} GPUs for its {ranks} ranks; start a rank for each "
                            "GPU, or use --device cpu")  # fmt: skip
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.distributed_c10d.ProcessGroupGloo = OneThreadGloo
    dist.init_process_group(backend)
    return device


class UserError(Exception):
    """What only the user can mend, in one line; `run` prints it without a traceback."""


def say(text: str) -> None:
    """Print on rank 0 alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors(what: str):
    """Turn what the block raises because of a user's files or values into a UserError on `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generating and error.__cause__ else error
        # A library's own class means a file; Python's and torch's only if they are among these, or
        # come from datasets or from the template of chats.
        library = type(cause).__module__.partition(".")[0] not in ("builtins", "torch")
        known = isinstance(cause, (OSError, EOFError, ValueError, ImportError, NotImplementedError))
        *_, (frame, _) = traceback.walk_tb(cause.__traceback__)
        place = frame.f_globals.get("__name__", "").partition(".")[0]
        known = known or place in ("datasets", "<template>")
        saved = isinstance(cause, dcp.CheckpointException)
        if not (library or known or saved or type(cause) is Exception):
            raise
        if saved:  # by one rank or by many
            cause, _ = next(iter(cause.failures.values()))
        raise UserError(f"{what}: {textwrap.shorten(str(cause), 600)}") from error


def first_on_node(make):
    """`make()`, on the first rank of each node and then on the others, which find its cache."""
    group = dist.new_group(backend="gloo", timeout=DATA_TIMEOUT)
    first = os.environ["LOCAL_RANK"] == "0"
    result = make() if first else None
    dist.barrier(group)
    return result if first else make()


def built_in_config() -> PretrainedConfig:
    """A small Llama for a byte vocabulary; tp 2, 3, 4, 6 and 8 divide all its sizes."""
    return transformers.LlamaConfig(
        vocab_size=384, hidden_size=192, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=24, initializer_range=0.05, pad_token_id=None, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip


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
            raise ValueError("it is a LoRA adapter; merge it into its model with peft, save that")
        config = AutoConfig.from_pretrained(name)
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
        whole = config.get_text_config() is config and all(getattr(config, n, 0) for n in sizes)
        if not whole:
            raise ValueError(f"{config.model_type} is not a language model like Llama; if it has "
                             "one as a part, save that alone with transformers")  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        generation = find("generation_config.json")
        if random_init:
            return config, tokenizer, None, generation
        names, index = {"model.safetensors"}, find("model.safetensors.index.json")
        if index and not find("model.safetensors"):  # which comes first, as in transformers
            names = {*json.loads(Path(index).read_text())["weight_map"].values()}
        files = [find(file) for file in sorted(names)]
        if not all(files):
            raise ValueError(f"there is no {', '.join(sorted(names)[:3])}; save it again with "
                             "transformers, or use --random-init")  # fmt: skip
        stored = load_state_dict(files[0], map_location="meta").values()
        config.dtype = config.dtype or next(t.dtype for t in stored if t.is_floating_point())
    return config, tokenizer, files, generation


def check_layout(config: PretrainedConfig, world_size: int, tp: int) -> None:
    """Raise UserError, naming the tp values that work, unless tp divides what it shards."""
    sizes = {"world size": world_size, "attention heads": config.num_attention_heads}
    sizes["intermediate size"] = getattr(config, "intermediate_size", None) or 0
    if bad := [f"{name} ({size})" for name, size in sizes.items() if size % tp]:
        works = [t for t in range(1, world_size + 1) if not any(s % t for s in sizes.values())]
        raise UserError(f"--tp {tp} does not divide {', '.join(bad)}; these do: {works}")
    vocabulary, hidden, dp = config.vocab_size, config.hidden_size, world_size // tp
    if vocabulary % tp and hidden % dp:  # see placement in apply_fsdp
        raise UserError(f"--tp {tp} does not divide the vocabulary ({vocabulary}); then dp {dp} "
                        f"has to divide the hidden size ({hidden})")  # fmt: skip


def check_args(args, config: PretrainedConfig, tokenizer) -> None:
    """Fill in the sizes that were not typed; raise UserError with the first that cannot work."""
    check_layout(config, dist.get_world_size(), args.tp)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    unit = args.batch_size * dist.get_world_size() // args.tp
    name = args.experiment_name
    parts = Path(name or "").parts
    args.seq_length = args.seq_length or min(1024 if args.model_name else 256, limit)
    args.global_batch_size = args.global_batch_size or unit
    if args.seq_length > limit:
        raise UserError(f"--seq-length {args.seq_length} is more than the model's {limit}")
    if args.seq_length % args.tp and torch.__version__ < (2, 13):
        raise UserError(f"below torch 2.13 --tp {args.tp} has to divide --seq-length")
    if args.global_batch_size % unit:
        works = math.ceil(args.global_batch_size / unit) * unit
        raise UserError(f"--global-batch-size {args.global_batch_size} is not a multiple of batch "
                        f"size x dp = {unit}; {works} is")  # fmt: skip
    if name is not None and (not parts or parts[0] == os.sep or ".." in parts):
        raise UserError(f"-e {name} is not a name within --save-dir")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token to put between documents")
    drop = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float) and v}
    if drop:
        raise UserError(f"config.json has {drop}; only 0 is the same training on every layout")


def run_facts(args, config: PretrainedConfig, rows: datasets.Dataset) -> dict:
    """The layout, and the settings that make a checkpoint this training's."""
    settings = {"dataset": f"{args.dataset_name or 'built in'}, {rows.info.description}"}
    for name in ("seq_length", "global_batch_size", "seed", *sorted(MAY_CHANGE)):
        settings[name] = getattr(args, name)
    unrelated = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    settings |= {f"model.{k}": v for k, v in config.to_dict().items() if k not in unrelated}
    facts = {"dp": dist.get_world_size() // args.tp, "tp": args.tp, "settings": settings}
    return json.loads(json.dumps(facts))  # as it comes back from a checkpoint


def main(args: argparse.Namespace) -> None:
    """Train as `args` says; every rank calls this once."""
    begin, device = time.perf_counter(), init_distributed(args.device)
    if dist.get_rank() != 0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()  # the hub's, too
    found = first_on_node(lambda: find_model(args.model_name, args.random_init))
    config, tokenizer, weights, generation = found
    check_args(args, config, tokenizer)
    data = first_on_node(lambda: load_data(args, tokenizer, config.vocab_size))

    # What follows from the data and the device.
    args.device = device.type
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    args.steps_per_epoch = len(data["train"]) / args.global_batch_size
    if not (args.model_name or args.dataset_name or args.num_epochs or args.max_steps):
        args.max_steps = BUILT_IN_STEPS
    steps = math.ceil((args.num_epochs or 1) * args.steps_per_epoch)
    args.total_steps = steps = min(steps, args.max_steps or steps)
    if args.warmup_steps is None:
        args.warmup_steps = steps // 20

    mesh = build_mesh(device.type, args.tp)
    with user_errors(f"-m {args.model_name or 'built in'}"):
        recompute, dtype = args.activation_checkpointing, DTYPES[args.dtype]
        model = shard_model(config, mesh, dtype, recompute, args.compile)
        model.to_empty(device=device)
        init_weights(model, args.seed, only_buffers=weights is not None)
        if weights:
            load_weights(model, weights)
    state = TrainState(model, build_optimizer(model, args.lr, args.weight_decay))

    folder = Path(args.save_dir, args.experiment_name) if args.experiment_name else None
    facts, gloo = run_facts(args, config, data["train"]), dist.new_group(backend="gloo")
    run = Run(folder, args.keep_checkpoints, facts, gloo)
    with user_errors(f"-e {args.experiment_name}"):
        if folder and dist.get_rank() == 0:
            lock(run)
        old = resume(state, run)
        if state.step > steps:
            raise UserError(f"{folder} is at step {state.step} already, of {steps}")
        if run.metrics:
            clean_up(run, old, args.ckpt_freq)
    if old:
        changed = changes(old["settings"], run.facts["settings"], allowed=True) or "no settings"
        say(f"resuming after step {old['step']}, saved on {old['dp']} dp x {old['tp']} tp; "
            f"changed: {changed}")  # fmt: skip
    if int(os.environ.get("LOCAL_WORLD_SIZE", args.tp)) % args.tp:
        say("warning: TP groups span nodes, so every layer waits for the network between them")
    say(f"data: {data['train'].info.description}")
    dp, size = mesh["dp"].size(), args.global_batch_size
    say(f"{config.model_type}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args.dtype}, on {mesh.size()} {device.type} ranks = {dp} dp x {args.tp} tp; global "
        f"batch {size} = {args.batch_size} sequences x {dp} dp x {size // args.batch_size // dp} "
        f"accumulation; {steps} steps, {steps * size * args.seq_length:,} tokens")  # fmt: skip

    row = train(args, state, data, mesh, run)
    where = f"results in {folder}" if folder else "nothing written, -e NAME keeps results"
    text = f"{state.step} steps, {time.perf_counter() - begin:.0f} s; {where}"
    if state.step < steps:
        again = "; the same command goes on from there" if folder else ""
        say(f"stopped as asked after {text}{again}")
    else:
        if folder:
            with user_errors("the export failed"):
                dtype = config.dtype or torch.float32
                export_model(model, tokenizer, dtype, folder / "export", generation)
        loss = f"training loss {row['loss']:.3f}, " if "loss" in row else ""
        say(f"{loss}validation loss {row['val_loss']:.3f}; {text}")
    dist.destroy_process_group()


def at_least(least: float, kind: type = int):
    """A type for argparse: a finite number of this kind that is not below `least`."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and finite")
        return value

    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError with the first thing that is wrong in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def error(message: str):  # argparse's own would end each rank with a message
        raise UserError(message)

    parser.error = error
    add, flag = parser.add_argument, {"action": "store_true"}
    count, positive = at_least(1), at_least(1e-12, float)
    # fmt: off
    add("--tp", "-tp", "--tensor-parallel", type=count, default=1,
        help="ranks that share one copy of each layer; the rest is data parallel (1)")
    add("-m", "--model-name", help="hub id or directory of a Hugging Face causal LM (built in)")
    add("--random-init", **flag, help="only configuration and tokenizer of -m; train from scratch")
    add("-d", "--dataset-name", help="hub id, directory or file with texts, or prompts and "
        "completions, or chats (the source code of Python's standard library)")
    add("--dataset-subset", help="configuration of a hub dataset (none)")
    add("--text-column", help="column with the text, where that is not clear (text)")
    add("-s", "--seq-length", type=at_least(2), help="tokens per sequence (256; 1024 with -m)")
    add("-b", "--batch-size", type=count, help="sequences per dp rank and forward pass; lower it "
        "if you run out of memory (4; 1 with -m)")
    add("--global-batch-size", type=count, help="sequences per optimizer step over all ranks; "
        "gives the gradient accumulation (batch size x dp)")
    add("--num-epochs", type=count, help="passes over the data (1)")
    add("--max-steps", type=count, help=f"most optimizer steps ({BUILT_IN_STEPS} if all built in)")
    add("--lr", type=positive, help="peak learning rate (0.003; 0.00003 with -m)")
    add("--warmup-steps", type=at_least(0), help="linear warmup (a twentieth of all steps)")
    add("--weight-decay", type=at_least(0, float), default=0.1, help="AdamW's, of matrices (0.1)")
    add("--max-grad-norm", type=positive, default=1.0, help="clip the gradient to this norm (1.0)")
    add("--seed", type=at_least(0), default=0, help="of initial weights and data order (0)")
    add("--dtype", choices=list(DTYPES), help="of computation, not weights (bf16 on CUDA, or fp32)")
    add("--compile", **flag, help="torch.compile each layer: a slow first step, fast ones after it")
    add("--activation-checkpointing", **flag, help="recompute each layer in the backward pass")
    add("-e", "--experiment-name", help="keep results under this name (keep none)")
    add("--save-dir", default="outputs", help="where experiments go (outputs)")
    add("--log-freq", type=count, default=10, help="steps between metrics (10)")
    add("--eval-freq", type=at_least(0), default=0, help="steps between evaluations (0: one only)")
    add("--ckpt-freq", type=count, default=500, help="steps between checkpoints (500)")
    add("--keep-checkpoints", type=count, default=2, help="how many of the newest stay (2)")
    add("--device", choices=["cuda", "cpu"], help="(cuda when there is one)")
    # fmt: on
    args = parser.parse_args(argv)
    if "" in vars(args).values():
        raise UserError("a flag has an empty value; is a variable of the shell not set?")
    args.batch_size = args.batch_size or (1 if args.model_name else 4)
    args.lr = args.lr or (3e-5 if args.model_name else 3e-3)
    return args


def run(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code; what ended the run is said once.

    Bad input fails on every rank alike. So the first rank of each node speaks at once, and another
    one waits until torchrun has ended it; if that does not happen, it has failed alone and speaks.
    """
    try:
        main(parse_args(argv))
        return 0
    except (Exception, dcp.CheckpointException) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends a rank that waits
        known, first = isinstance(error, UserError), os.environ.get("LOCAL_RANK", "0") == "0"
        # Gloo has no exception of its own for a rank that is gone (torch 2.13).
        lost = isinstance(error, RuntimeError) and "onnection" in str(error)
        lost = lost or isinstance(error, dist.DistError)
        if lost or not first:
            time.sleep(GRACE_S)
        text = traceback.format_exc()
        if known or lost:
            text = f"error: {'another rank has failed: ' if lost else ''}{error}"
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if not file or (known and first):
            print(f"\n{text}", file=sys.stderr, flush=True)
        elif not (lost and ASKED):  # else torchrun is ending this job, and has said why
            message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
        return 1


def tolerant(method):
    """A stream's method whose failure, on a full disk or a closed pipe, ends no training."""

    def call(*args):
        with contextlib.suppress(OSError, ValueError):
            return method(*args)

    return call


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # all is printed there, by tqdm, too
    sys.stderr.write, sys.stderr.flush = tolerant(sys.stderr.write), tolerant(sys.stderr.flush)
    code = run()
    # Leave without Python's finalization. A gloo thread that drops the last reference to a tensor
    # after it has begun would now and then abort the process, with all work done (torch 2.13).
    os._exit(code)
