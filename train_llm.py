#!/usr/bin/env python3
"""Train a Hugging Face causal LM with tensor parallelism (TP) and FSDP2 together.

    python train_llm.py                                # one process, with or without a GPU
    torchrun --nproc-per-node 8 train_llm.py --tp 4    # one node: dp 2 x tp 4
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 \\
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
gathers it for one layer at a time. With the same --global-batch-size, the layout changes only
speed and memory, not the loss.

What to read: layer_plan, apply_tp, apply_fsdp, train_step, main. The rest can be skipped.
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
import tempfile
import textwrap
import time
import traceback
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
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
from transformers import core_model_loading as hf_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig, safe_open, safe_save_file
from transformers.utils.hub import get_checkpoint_shard_files

# ---- Tensor parallelism and FSDP: the part to copy, to the end of apply_fsdp --------------------

# B sequences per dp rank, S tokens, D hidden, F intermediate, H all heads, V vocabulary, T tp size


def build_mesh(device_type: str, tp: int) -> DeviceMesh:
    """The (world size / tp, tp) mesh ("dp", "tp"): neighbouring ranks are in one TP group."""
    shape = (dist.get_world_size() // tp, tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "tp"))
    # So DTensor all-reduces the gradient norm once, not twice; not public in torch 2.13.
    mesh._flatten("dp_tp")
    return mesh


def layer_plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How TP treats each module of a decoder layer, in execution order, with local shapes.

    The residual stream is a DTensor sharded along S, so the model's code sees its global shape.
    """
    # ColwiseParallel() takes the whole and returns a part, RowwiseParallel() the other way round.
    part, full = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}  # layers use keywords
    to_residual = {"output_layouts": Shard(1), "use_local_output": False}
    by_heads = {"sequence_dim": 2, "use_local_output": True}  # heads are dimension 2 there
    plan = {
        "input_layernorm": SequenceParallel(),  # (B, S/T, D); its gradient (D,): all-reduce
        # (B, S/T, D) -> (B, S, D)  all-gather
        "self_attn": PrepareModuleInput(input_kwarg_layouts=part, desired_input_kwarg_layouts=full),
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
    # Only modules that this layer has and `replicate_kv` has not sharded. Skip this at first.
    done = {name for name, p in layer.named_parameters() if isinstance(p, DTensor)}
    todo = {name for name, _ in layer.named_modules() if f"{name}.weight" not in done}
    return {name: style for name, style in plan.items() if name in todo}


def replicate_kv(attention: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Keep all key-value heads on every rank, where T does not divide them. Skip this at first."""
    size, group = attention.head_dim, attention.num_key_value_groups  # query heads per kv head
    if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() != size:
        raise ValueError("k_norm spans all key-value heads: --tp has to divide their number")
    queries = attention.q_proj.weight.shape[0] // size // tp_mesh.size()  # of this rank
    first = tp_mesh.get_local_rank() * queries

    def one_per_query(module, args, out):  # (B, S, all H) -> (B, S, H/T), no view, to free the rest
        heads = out.to_local(grad_placements=[Partial()]).unflatten(-1, (-1, size))
        return heads.repeat_interleave(group, 2).narrow(2, first, queries).flatten(2).contiguous()

    for projection in (attention.k_proj, attention.v_proj):  # their gradients: all-reduce
        distribute_module(projection, tp_mesh)
        projection.register_forward_hook(one_per_query)
    attention.num_key_value_groups = 1


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on `tp_mesh`, in place; all ranks hold the same before.

    Raises ValueError if T cannot shard the model, and names parameters that have no plan.
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
        # FSDP shards dimension 0, but not where TP has sharded it unevenly (a vocabulary that T
        # does not divide): DTensor computes wrong offsets, and checkpoints fail (torch 2.13).
        tp, dp = p.device_mesh.size(), dp_mesh.size()
        if p.placements[0].is_shard(0) and p.shape[0] % tp:
            return Shard(1)
        return Shard(2) if p.ndim == 3 and p.shape[0] % (tp * dp) else None  # few experts

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


# ---- Training ----------------------------------------------------------------------------------

EVAL_SEQUENCES = 128


def build_optimizer(model: PreTrainedModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW at the peak rate `lr`; weight decay for matrices, not for norms and biases."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    vectors = [p for name, p in params.items() if p.ndim == 1 or name.endswith("_bias")]
    matrices = [p for name, p in params.items() if p.ndim > 1 and not name.endswith("_bias")]
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

    `batches` are pairs of ids and labels, each (B, S) int64; labels of -100 do not count.
    `shard_model` has put the loss into the model, with loss_parallel (`chunk_loss`): the sum over
    labels, divided by `num_items_in_batch`. Returns scalars on the device: a loss whose mean over
    the dp ranks is that of all labels of the global batch, and its gradient's norm, not clipped.
    """
    count = sum((labels[:, 1:] != -100).sum() for _, labels in batches)  # each predicts the next
    dist.all_reduce(count, group=dp_mesh.get_group())
    count = count / dp_mesh.size()  # because FSDP averages gradients over dp
    loss = torch.zeros((), device=count.device)
    for ids, labels in batches:
        part = model(ids, labels=labels, num_items_in_batch=count, use_cache=False).loss
        # FSDP reduces the gradients of every micro-batch, while it computes. Unreduced, they
        # would be kept unsharded: 4 bytes for each parameter of a TP shard.
        part.backward()
        loss += part.detach()
    params = [p for p in model.parameters() if p.grad is not None]
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
        labels[len(batch) - batch.count(-1) :] = -100  # what fills the last batch does not count
        sums[0] += model(ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
        sums[1] += (labels[:, 1:] != -100).sum()
    model.train()
    dist.all_reduce(sums, group=dp_mesh.get_group())
    dist.barrier()  # of hosts: a rank that failed is noticed here, not in a wait for the device
    return (sums[0] / sums[1]).item()


def train(args, run: "Run", data: dict, mesh: DeviceMesh) -> dict:
    """Run the optimizer steps after `run.step`, to the end or until a rank is asked to stop.

    Returns the last row of metrics. Raises UserError if a gradient is not finite or a save fails.
    """
    model, optimizer, dp_mesh, total = run.model, run.optimizer, mesh["dp"], args.total_steps
    bar = tqdm(initial=run.step, total=total, unit="step", disable=dist.get_rank() != 0)
    first_bad = torch.zeros((), device=model.device)  # step whose gradient was not finite, or 0
    stop, row, clock = False, {}, Counter()

    def due(freq: int) -> bool:  # every `freq` steps, and after the last one
        return run.step == total or (freq > 0 and run.step > 0 and run.step % freq == 0)

    while True:
        if due(args.eval_freq) and not stop:  # after the checkpoint of the same step
            loss = evaluate(model, data["validation"], args.batch_size, dp_mesh)
            row |= run.log({"step": run.step, "val_loss": loss})
        if stop or run.step == total:
            break
        begin = time.perf_counter()
        rows = global_batch_rows(run.step, args.global_batch_size, len(data["train"]), args.seed)
        rows = micro_batches(rows, args.batch_size, dp_mesh.get_local_rank(), dp_mesh.size())
        batches = [load_batch(data["train"], r, model.device) for r in rows]
        clock["data_s"] += time.perf_counter() - begin
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, args.lr, args.warmup_steps, total)
        result = train_step(model, optimizer, batches, args.max_grad_norm, dp_mesh)
        run.step += 1
        bar.update()
        first_bad = torch.where((first_bad == 0) & ~result[1].isfinite(), run.step, first_bad)
        stop = asked_to_stop() and run.step < total
        log = run.step == 1 or due(args.log_freq)
        save = stop or due(args.ckpt_freq)
        # Only a step that does one of these, or is evaluated, waits for the device.
        if (log or save or due(args.eval_freq)) and first_bad.item():
            raise UserError(f"the gradient was not finite at step {first_bad:.0f}; not saved since")
        clock["steps"] += 1
        clock["step_s"] += time.perf_counter() - begin
        if log:
            row = run.log(step_row(args, run, mesh, result, clock))
            clock.clear()
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, "
                                "{peak_mem_gib:.2f} GiB".format(**row))  # fmt: skip
        if save and run.folder:
            run.save()
    bar.close()
    return row


# ---- The sharded model: built on meta, then drawn or loaded ------------------------------------


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The unsharded fp32 model without memory for its weights."""
    config = copy.deepcopy(config)  # from_config writes into it
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def shard_model(
    config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype, recompute: bool, compile: bool
) -> PreTrainedModel:
    """The model sharded over `mesh`, on meta: it trains after `init_weights`."""
    # transformers would ask the device in every forward pass whether positions restart within a
    # sequence, which is a sync (5.17 to 5.24). Ours never do.
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
    model = meta_model(config)
    apply_experts(model, mesh["tp"])
    apply_tp(model, mesh["tp"])
    chunk_loss(model)
    if compile:
        # Checkpointing around a compiled layer fails on DTensors (torch 2.13 and 2.14: "expected
        # all tensors_saved_with_vc_check to be Tensors"); the compiler's own recompute does not.
        # With a budget of 0 it keeps a layer's input only.
        torch._functorch.config.activation_memory_budget = 0.0 if recompute else 1.0
        for layer in model.base_model.layers:
            layer.compile()
    elif recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    apply_fsdp(model, mesh["dp"], dtype)
    return model


@torch.no_grad()
def init_weights(model: PreTrainedModel, seed: int, only_buffers: bool = False) -> None:
    """Draw the weights, the same for every mesh, unless `only_buffers`, and compute the buffers.

    Every rank draws the unsharded model from `seed`, one module at a time, and keeps its shard.
    """
    device, done = next(model.parameters()).device_mesh.device_type, set()
    if not only_buffers:
        model.to_empty(device=device)
    torch.manual_seed(seed)
    unsharded, sharded_modules, modules = meta_model(model.config), [], []
    model.apply(sharded_modules.append)  # in transformers' order: children before parents
    unsharded.apply(modules.append)
    for module, sharded in zip(modules, sharded_modules, strict=True):
        if only_buffers and not module._buffers:
            continue
        module.to_empty(device=device, recurse=False)
        unsharded._init_weights(module)  # public only for all modules at once
        for name, p in sharded.named_parameters(recurse=False):
            if p not in done and not only_buffers:  # a tied head keeps the embedding's weights
                # The function that torch's checkpoints ask, too; the public distribute_tensor finds
                # the same shard, but copies the whole matrix to do it (torch 2.13).
                shard = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
                part = tuple(slice(first, first + n) for n, first in zip(*shard, strict=True))
                p.to_local().copy_(module.get_parameter(name)[part])
                done.add(p)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(sharded, name, buffer)
        module.to_empty(device="meta", recurse=False)


@torch.no_grad()
def load_weights(model: PreTrainedModel, files: list[str]) -> None:
    """Read safetensors `files`, of any stored dtype, as the shards of `model`, until now on meta.

    transformers reads this rank's part of each tensor, and stacks those of experts. Raises
    ValueError unless they are the model's weights, and those that are tied are equal.
    """
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, device = head.weight is embed.weight, next(model.buffers()).device  # with its index
    backend = "pread" if device.type == "cpu" else "mmap"  # shards would stay views of the file
    readers = [safe_open(file, framework="pt", backend=backend) for file in files]
    stored = {name: file.get_slice(name) for file in readers for name in file.offset_keys()}
    # Where a rank has no rows of a tensor, as of gpt-oss's `sinks`, it would fail (5.23 and 5.24).
    reader = hf_loading.DtensorShardOperation
    rows = reader._compute_contiguous_slice
    reader._compute_contiguous_slice = lambda *args: rows(*args) or [(0, 0)]
    mapping = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping)
    found, _ = hf_loading.convert_and_load_state_dict_in_model(model, stored, config)
    ranks = [found] * dist.get_world_size()  # a part of a tensor may be wrong on one rank alone
    dist.all_gather_object(ranks, found)
    for other in ranks:
        found.mismatched_keys |= other.mismatched_keys
        found.conversion_errors |= other.conversion_errors
    if not (found.mismatched_keys or found.conversion_errors):  # what failed is still on meta
        model.tie_weights(found.missing_keys, recompute_mapping=False)  # as from_pretrained goes on
    model._adjust_missing_and_unexpected_keys(found)  # without what transformers ignores
    if wrong := {kind: keys for kind, keys in vars(found).items() if keys}:
        raise ValueError(f"weights do not fit the model: {wrong}")
    if tied and head.weight is not embed.weight:
        raise ValueError("config.json ties embedding and head, which differ in the files")


# ---- Head and loss in chunks: to copy, too, for long sequences and large vocabularies ----------

CHUNK_BYTES = 2**28  # at most, of the logits of one chunk on one rank, in the compute dtype


class ChunkedLoss(torch.autograd.Function):
    """The sum of `loss_of(part, labels)` over chunks of tokens of `hidden`, (1, N, D).

    The gradients of a chunk are taken right after its loss, and are all that is kept. No logits
    are kept, and no product with the head is computed twice (Hsu et al. 2024, Liger kernel).
    """

    @staticmethod
    def forward(ctx, loss_of, chunks: list, hidden: DTensor, *weights: DTensor):
        losses, part_grads = [], []
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]  # of their gradients
        for part, labels in chunks:
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(part, labels)
            part_grad, *grads = torch.autograd.grad(loss, [part, *weights])
            losses.append(loss.detach())
            part_grads.append(part_grad.to_local())  # a partial sum, over this rank's V/T
            for total, grad in zip(sums, grads, strict=True):
                total += grad
            del loss, grads, grad  # before the next chunk needs the memory
        hidden_grad = DTensor.from_local(torch.cat(part_grads, 1), hidden.device_mesh, [Partial()])
        ctx.grads = hidden_grad, *(t.to(w.dtype) for t, w in zip(sums, weights, strict=True))
        return sum(losses)

    @staticmethod
    def backward(ctx, grad_of_loss: torch.Tensor):
        for grad in ctx.grads:
            grad.to_local().mul_(grad_of_loss)
        return None, None, *ctx.grads


def chunk_loss(model: nn.Module) -> None:
    """Let `model(ids, labels=ids).loss` compute logits and loss in chunks, in place.

    Call it after `apply_tp`, which shards the head, and before `apply_fsdp`. The loss is a local
    scalar, not a DTensor. Without labels the model returns its logits as before.
    """
    base, head, whole = model.base_model, model.get_output_embeddings(), model.forward
    logits_of = head.forward
    head._forward_hooks.clear()  # ColwiseParallel's expects logits; the head will return a loss
    # Each chunk goes through the model's own forward and loss function, so that scaled or
    # soft-capped logits stay as they are: in a copy of the model whose base does nothing.
    alone = copy.copy(model)
    alone._modules, alone.lm_head = {}, logits_of  # functions in place of modules
    given = lambda inputs_embeds, **_: MoeModelOutputWithPast(inputs_embeds)  # noqa: E731
    setattr(alone, model.base_model_prefix, given)

    def head_forward(hidden, labels=None, items=None):  # FSDP's hooks run around this call
        if labels is None:
            return logits_of(hidden)

        def loss_of(part, labels):
            options = {"labels": labels, "shift_labels": labels, "num_items_in_batch": items}
            return alone.forward(inputs_embeds=part, **options).loss.to_local()

        hidden, labels = hidden.flatten(0, 1)[None], labels.flatten()[None]  # (1, B S, D), (1, B S)
        logits = math.ceil(head.weight.shape[0] / hidden.device_mesh.size())  # a token's, on a rank
        size = max(1, CHUNK_BYTES // (logits * hidden.itemsize))
        chunks = list(zip(hidden.split(size, 1), labels.split(size, 1), strict=True))
        with loss_parallel():
            if torch.is_grad_enabled():
                return ChunkedLoss.apply(loss_of, chunks, hidden, *head.parameters())
            return sum(loss_of(part, targets) for part, targets in chunks)

    def forward(input_ids=None, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return whole(input_ids, **inputs)
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # each predicts the next one
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        hidden = base(input_ids, **inputs).last_hidden_state
        return CausalLMOutputWithPast(loss=head(hidden, labels=labels, items=items))

    head.forward, model.forward = head_forward, forward


# ---- Mixtures of experts: to copy, too ----------------------------------------------------------

# The ranks of a TP group share a layer's N experts. Each runs the unchanged mixture with the whole
# router and its own experts, to a summand of the output in which the others' experts are zero:
#     (B, S/T, D) -> all-gather (B, S, D) -> N/T experts (B, S, D) -> reduce-scatter (B, S/T, D)

EXPERT_MODELS = {  # transformers' types that were compared with one process, every gradient
    "afmoe", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "gpt_oss", "granitemoe", "hunyuan_v1_moe", "minimax_m2", "mixtral", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_moe",
}  # fmt: skip
EXPERT_WEIGHTS = {  # how TP shards them, by name; one without a rule is refused
    r"experts\.(gate_up_proj|down_proj)(_bias)?": Shard(0),  # (N, ...): N/T experts
    r"shared_\w+\.(gate|up)_proj\.weight": Shard(0),  # as in a dense mlp
    r"shared_\w+\.down_proj\.weight": Shard(1),
    # Whole on every rank, each with the gradient of its own summand, which are added up.
    r"(gate|router|shared_expert_gate)\.(\w+\.)?\w*(weight|bias)|expert_bias": Replicate(),
    r"sinks": Shard(0),  # one for each head, in the attention of gpt-oss
}


def on_shards(module: nn.Module, owners: dict[str, nn.Module], tp_mesh: DeviceMesh) -> None:
    """Shard the weights of `owners`, parts of `module`, which then runs on local tensors."""
    forward, sharded = module.forward, []
    for path, owner in owners.items():
        for key, p in list(owner.named_parameters(recurse=False)):
            name = f"{path}.{key}".removeprefix(".")
            rules = [rule for end, rule in EXPERT_WEIGHTS.items() if re.fullmatch(end, name)]
            if not rules or (rules[0].is_shard() and p.shape[rules[0].dim] % tp_mesh.size()):
                raise ValueError(f"--tp {tp_mesh.size()} cannot shard {name} {tuple(p.shape)}")
            part = dist.tensor.distribute_tensor(p, tp_mesh, rules[:1], src_data_rank=None)
            owner.register_parameter(key, nn.Parameter(part, p.requires_grad))
            sharded.append((owner, key))

    def run(*args, **kwargs):
        for owner, key in sharded:
            p = getattr(owner, key)
            grad = Partial() if p.placements[0].is_replicate() else p.placements[0]
            vars(owner)[key] = p.to_local(grad_placements=[grad])  # found before the parameter
        try:
            return forward(*args, **kwargs)
        finally:
            for owner, key in sharded:
                del vars(owner)[key]

    module.forward = run


def split_experts(mixture: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Let a layer's mixture run on this rank's experts: (B, S/T, D) -> (B, S/T, D)."""
    on_shards(mixture, dict(mixture.named_modules()), tp_mesh)
    forward, experts = mixture.forward, mixture.experts
    if experts.config._experts_implementation == "eager":  # wrong on a part of the experts
        raise ValueError("experts_implementation eager cannot be sharded; grouped_mm can")
    number = experts.num_experts // tp_mesh.size()  # of a rank's experts
    # transformers' own switch (5.23): an expert whose index is `num_experts` is on another rank.
    experts._is_expert_parallel, experts.num_experts = tp_mesh.size() > 1, number

    def own_experts(experts, args):
        tokens, index, weights = args  # (B S, D), and the experts of each and their weights
        other = index // number != tp_mesh.get_local_rank()
        return tokens, (index % number).masked_fill(other, number), weights.masked_fill(other, 0)

    def run(x):
        x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        result = forward(x)
        out, *rest = result if isinstance(result, tuple) else [result]
        out = DTensor.from_local(out, tp_mesh, [Partial()]).redistribute(placements=[Shard(1)])
        return (out, *rest) if rest else out  # with the router's scores, in gpt-oss

    experts.register_forward_pre_hook(own_experts)
    mixture.forward = run


def apply_experts(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Shard what `apply_tp` has no plan for in a mixture of experts, in place, before it."""
    by_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
    plan = {"self_attn.query_layernorm": by_heads, "self_attn.key_layernorm": by_heads}
    plan |= {"self_attn.gate_proj": ColwiseParallel()}
    plan |= {"pre_mlp_layernorm": SequenceParallel(), "post_mlp_layernorm": SequenceParallel()}
    for layer in model.base_model.layers if model.config.model_type in EXPERT_MODELS else []:
        names = {name for name, _ in layer.named_modules()} & plan.keys()
        parallelize_module(layer, tp_mesh, {n: plan[n] for n in names}, src_data_rank=None)
        if hasattr(layer.self_attn, "sinks"):
            on_shards(layer.self_attn, {"": layer.self_attn}, tp_mesh)
        for module in layer.children():
            if hasattr(module, "experts"):
                split_experts(module, tp_mesh)


# ---- Data --------------------------------------------------------------------------------------

# Columns, named as TRL names them. A row whose last one is empty is skipped.
SHAPES = (["text"], ["prompt", "completion"], ["messages"])
FEATURES = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")),
                              "counts": datasets.List(datasets.Value("bool"))})  # fmt: skip
# A text of more than 65,536 characters is tokenized in such pieces, which end where a line does.
PIECE = re.compile(r"(?s).{1,65536}[^\n]{0,65536}\n?")


def load_data(args, tokenizer, vocab_size: int) -> dict[str, datasets.Dataset]:
    """Rows for training and validation: `input_ids`, and which of them `counts`, both (S,).

    Without a validation split the last twentieth, of shuffled documents, is held out. All is
    cached. `info.description` of the training rows says what was read. Raises UserError.
    """
    data, told, labels, checksum = {}, "", 0, 0
    options = {"tokenizer": tokenizer, "seq_length": args.seq_length, "vocab_size": vocab_size}
    about = f"-d {args.dataset_name or 'built in'}, cached in {datasets.config.HF_DATASETS_CACHE}"
    with user_errors(about, Exception):
        splits = read_splits(args)
        if "train" not in splits:
            splits = {"train": next(iter(splits.values()))}
        options["least"] = 1 if "validation" in splits else 2
        for name in [name for name in ("train", "validation") if name in splits]:
            rows = select_text(splits[name], args.text_column)
            # Eight at a time, because a row may be a large file.
            documents = rows.filter(bool, input_columns=rows.column_names[-1], batch_size=8)
            empty = len(rows) - len(documents)
            told += f"{len(documents):,} documents in {name}, {empty:,} empty, "
            options["documents"] = documents.shuffle(seed=0)
            data[name] = datasets.Dataset.from_generator(pack, FEATURES, gen_kwargs=options)
    if "validation" not in data:
        parts = data["train"].train_test_split(max(1, len(data["train"]) // 20), shuffle=False)
        data = {"train": parts["train"], "validation": parts["test"]}
    for rows in data.values():
        for batch in rows.with_format("numpy").iter(max(1, 2**20 // args.seq_length)):
            labels += batch["counts"][:, 1:].sum()
            checksum = zlib.crc32(batch["counts"], zlib.crc32(batch["input_ids"], checksum))
    told += f"{labels:,} labels that count, checksum {checksum:08x}"
    if "messages" in documents.column_names and "strftime_now" in str(tokenizer.chat_template):
        told += ", in which the chat template has put the date on which they were first read"
    data["train"].info.description = told
    return {key: rows.with_format("torch") for key, rows in data.items()}


def read_splits(args) -> dict[str, datasets.Dataset]:
    """The splits of a hub id, a directory or a file. A text file is one document."""
    name, subset, options = args.dataset_name, args.dataset_subset, {}
    path = Path(name or sysconfig.get_paths()["stdlib"]).absolute()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, dict) else {"train": saved}
    if not name:  # the top-level modules of the standard library
        files = sorted(glob.escape(str(file)) for file in path.glob("*.py"))
        name, options = "text", {"data_files": files}
    elif path.is_file():
        name, options = datasets.load.infer_module_for_data_files_list([str(path)])  # by its ending
        if name not in ("json", "csv", "parquet", "arrow"):
            name, options = "text", {}
        options = options | {"data_files": glob.escape(str(path))}  # no pattern
    elif path.exists():  # by its whole path, because `text` is a builder's name, too
        name = str(path)
        if glob.escape(name) != name:
            raise ValueError("datasets takes its name for a pattern; call it without *, ? and [")
    builder = datasets.load_dataset_builder(name, subset, **options)
    files = itertools.chain(*(builder.config.data_files or {}).values())
    local = list(filter(os.path.exists, files))
    for file in local:
        refuse_pointer(file)
    if local and not any(map(os.path.getsize, local)):
        raise ValueError("it is empty")
    # CSV: fields as they stand there, and no index made of surplus ones. JSON: bytes in which a
    # column may change its type. Text: files that are in memory at once.
    columns = dict.fromkeys(("text", "prompt", "completion", args.text_column), str)
    csv = {"index_col": False, "keep_default_na": False, "converters": columns}
    text = {"sample_by": "document", "encoding": "utf-8-sig", "writer_batch_size": 8}
    readers = {"csv": csv, "json": {"chunksize": 2**28}, "text": text}
    return datasets.load_dataset(name, subset, **options, **readers.get(builder.name, {}))


def refuse_pointer(file: str) -> None:
    """Raise ValueError if git has left a pointer in the place of a large file."""
    with open(file, "rb") as opened:
        if opened.read(64).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a pointer of Git LFS: get the file with git lfs pull")


def select_text(split: datasets.Dataset, text_column: str | None) -> datasets.Dataset:
    """Only the columns to train on. Raises ValueError if it is not clear which they are."""
    if text_column:
        split = split.select_columns(text_column).rename_columns({text_column: "text"})
    kinds = {name: str(kind) for name, kind in split.features.items()}
    strings = {name for name, kind in kinds.items() if kind.endswith("string')")} - {"messages"}
    lists = {name for name, kind in kinds.items() if "List(" in kind[:10]} & {"messages"}
    fits = [shape for shape in SHAPES if {*shape} <= strings | lists]
    if len(fits) != 1:
        raise ValueError("its columns should be text, prompt and completion, or messages, or "
                         f"--text-column should name the text; they are {kinds}")  # fmt: skip
    tools = ["tools"] if "messages" in fits[0] and "tools" in kinds else []
    return split.select_columns(tools + fits[0])


def examples(documents: datasets.Dataset, tokenizer):
    """Yield texts, the spans of them that count, and whether they begin and end a document.

    Spans are pairs of positions, or None where all of a text counts.
    """
    for row in documents:
        if "messages" in row:
            yield from chats(tokenizer=tokenizer, **row)
        elif "prompt" in row:
            prompt, text = row["prompt"] or "", (row["prompt"] or "") + row["completion"]
            yield text, [(len(prompt), len(text))], True, True
        else:
            for piece in PIECE.finditer(row["text"]):
                yield piece[0], None, piece.start() == 0, piece.end() == len(row["text"])


def chats(messages: list[dict], tokenizer, tools: list | None = None):
    """Yield what `examples` does of a chat, in which the assistant's turns count.

    A template may render earlier turns in another way once a new one follows, as where it drops
    reasoning. The new turn then begins a chat of its own: each is trained as the last one.
    """
    tools = json.loads(tools) if isinstance(tools, str) else tools or None
    render = functools.partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    if tools and "tools" not in tokenizer.get_chat_template(tools=tools):
        raise ValueError("there are tools beside messages, but the chat template takes none")
    text, spans = "", []
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        has_text = isinstance(fields.get("content"), str) or fields.get("tool_calls")
        if not (isinstance(fields.get("role"), str) and has_text):
            raise ValueError(f"a message should have role and content as strings: {message}"[:200])
        if fields["role"] != "assistant" or i == 0:  # nothing comes before a first turn
            continue
        prompt = render(messages[:i], add_generation_prompt=True)
        whole = render(messages[: i + 1])
        # The answer begins after the prompt, which may open a thought that the answer lacks.
        start = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071
        if start < len(prompt) and not whole.startswith(render(messages[:i])):
            raise ValueError("the chat template changes the turns before an answer, which hides it")
        if not whole.startswith(text):
            yield text, spans, False, False  # the template has what begins and ends a chat
            spans = []
        text, spans = whole, [*spans, (start, len(whole))]
    if spans:
        yield text, spans, False, False


def pack(documents, tokenizer, seq_length: int, vocab_size: int, least: int):
    """Yield rows of `seq_length` tokens: one document after the other, cut where a row is full.

    Raises ValueError if there are not `least` rows, or where a token is not the model's.
    """
    alone = tokenizer("x", return_special_tokens_mask=True)
    bos = alone.input_ids[: [*alone.special_tokens_mask, 0].index(0)]  # or nothing
    eos, ids, counts, found = [tokenizer.eos_token_id], [], [], 0
    parts, options = examples(documents, tokenizer), {"add_special_tokens": False, "verbose": False}
    while batch := list(itertools.islice(parts, 16)):  # tokenizers in Rust have threads
        options["return_offsets_mapping"] = batch[0][1] is not None  # all have spans, or none
        tokenized = tokenizer([text for text, *_ in batch], **options)
        for i, (_, spans, begins, ends) in enumerate(batch):
            tokens, count = tokenized.input_ids[i], [True] * len(tokenized.input_ids[i])
            if spans is not None:  # where a token begins decides
                starts = [start for start, _ in tokenized.offset_mapping[i]]
                count = [any(a <= start < b for a, b in spans) for start in starts]
            if begins and tokens[: len(bos)] != bos:
                tokens, count = bos + tokens, [spans is None] * len(bos) + count
            if ends and tokens[-1:] != eos:
                tokens, count = tokens + eos, [*count, True]
            if (largest := max(tokens, default=0)) >= vocab_size:
                name = tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(f"{name!r} is token {largest}, the model has only {vocab_size}")
            ids.extend(tokens)
            counts.extend(count)
        whole = len(ids) // seq_length * seq_length
        for i in range(0, whole, seq_length):
            row = slice(i, i + seq_length)
            if any(counts[row][1:]):  # nothing predicts the first token
                found += 1
                yield {"input_ids": ids[row], "counts": counts[row]}
        del ids[:whole], counts[:whole]
    if found < least:
        raise ValueError(f"fewer than {least} sequences of {seq_length} tokens have labels that "
                         "count, which in messages are those of the role assistant; use more "
                         "data, or a shorter -s")  # fmt: skip


@functools.lru_cache(maxsize=2)
def row_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits the rows: a permutation, (num_rows,) int64."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + 1000003 * epoch))


def global_batch_rows(step: int, global_batch_size: int, num_rows: int, seed: int) -> list[int]:
    """The rows of 0-based `step` on every layout: each row once an epoch, epochs without a gap."""
    positions = range(step * global_batch_size, (step + 1) * global_batch_size)
    return [row_order(num_rows, seed, p // num_rows)[p % num_rows].item() for p in positions]


def micro_batches(rows: list[int], batch_size: int, dp_rank: int, dp: int) -> list[list[int]]:
    """This dp rank's part of a global batch, `batch_size` rows for each forward pass."""
    return torch.tensor(rows).view(-1, dp, batch_size)[:, dp_rank].tolist()


def load_batch(data: datasets.Dataset, rows: list[int], device: torch.device) -> tuple:
    """Ids and labels, both (B, S) int64 on `device`, copied without waiting for it."""
    batch = data[rows]
    pair = batch["input_ids"], batch["input_ids"].masked_fill(~batch["counts"], -100)
    if device.type == "cuda":
        pair = (tensor.pin_memory() for tensor in pair)
    return tuple(tensor.to(device, non_blocking=True) for tensor in pair)


# ---- Metrics -----------------------------------------------------------------------------------

PEAK_BF16_FLOPS = {  # dense, from the datasheets
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def flops_per_token(model: PreTrainedModel, seq_length: int) -> int:
    """FLOPs to train on one token, without recomputation (PaLM, Chowdhery et al. 2022, B).

    Of a mixture those of the experts that a token goes to.
    """
    layers, embed = model.base_model.layers, model.get_input_embeddings().weight
    active = next((module.top_k for module in model.modules() if hasattr(module, "top_k")), 0)
    weights = sum(p.numel() * active // len(p) if p.ndim == 3 else p.numel()
                  for p in model.parameters())  # fmt: skip
    weights -= 0 if model.get_output_embeddings().weight is embed else embed.numel()  # a look-up
    return 6 * weights + 12 * len(layers) * layers[0].self_attn.o_proj.in_features * seq_length


def step_row(args, run: "Run", mesh: DeviceMesh, result: tuple, clock: Counter) -> dict:
    """The whole job's numbers after a step; `clock` has this rank's seconds since the last row."""
    (loss, grad_norm), device, dp, tp = result, run.model.device, mesh["dp"], mesh["tp"]
    dist.all_reduce(loss, group=dp.get_group())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the resident set
    peak_bytes, peak_flops = peak_bytes * (1 if sys.platform == "darwin" else 1024), None
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        peak_flops = PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))
    worst = torch.tensor([peak_bytes / 2**30, clock["data_s"] / clock["steps"]])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    tokens, step_s = args.global_batch_size * args.seq_length, clock["step_s"] / clock["steps"]
    flops = flops_per_token(run.model, args.seq_length) * tokens / step_s / mesh.size()
    return {
        "step": run.step, "epoch": round(run.step / args.steps_per_epoch, 4),
        "loss": loss.item() / dp.size(), "grad_norm": grad_norm.item(),
        "lr": run.optimizer.param_groups[0]["lr"], "tokens": run.step * tokens,
        "tokens_per_s": round(tokens / step_s, 1), "step_s": round(step_s, 5),
        "data_s": round(worst[1].item(), 5), "peak_mem_gib": round(worst[0].item(), 3),
        "mfu": round(flops / peak_flops, 4) if peak_flops and args.dtype == "bf16" else None,
        "world_size": mesh.size(), "dp": dp.size(), "tp": tp.size(),
    }  # fmt: skip


# ---- Checkpoints, stopping, export --------------------------------------------------------------

# What an earlier export, or another model, may have left in the directory of this one.
EXPORTED = ("*.safetensors*", "*token*", "*.model", "vocab.*", "merges.txt", "chat_template*",
            "adapter_*", "generation_config.json")  # fmt: skip
PARENT = os.getppid()  # torchrun, if it has started this rank
ASKED = []  # the signals that have asked this rank to stop


@dataclasses.dataclass
class Run:
    """A model in training, and the folder that keeps what comes of it; without one nothing is."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    folder: Path | None
    settings: dict  # that a checkpoint has to share
    keep: int  # newest checkpoints
    step: int = 0  # optimizer steps done
    metrics: io.TextIOBase | None = None  # metrics.jsonl, open on rank 0 only

    def lock(self) -> None:
        """Hold metrics.jsonl open. Raises UserError if another job does, or a node has its own."""
        path = self.folder / "metrics.jsonl"
        if dist.get_rank() == 0:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.metrics = open(path, "a")
            try:
                fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            except BlockingIOError:
                raise UserError(f"another job trains in {self.folder}; use another -e") from None
            except OSError as error:
                say(f"warning: {self.folder} cannot be locked against a second job: {error}")
            os.utime(path)  # a node that sees another time has a file of its own
        dist.barrier()
        time_of_file = None
        with contextlib.suppress(FileNotFoundError), open(path) as file:  # NFS asks its server now
            time_of_file = int(os.fstat(file.fileno()).st_mtime)
        agree(f"{self.folder} is not shared: its files", {"time of metrics.jsonl": time_of_file})

    def log(self, row: dict) -> dict:
        """Append `row` to metrics.jsonl, if there is one; returns it."""
        if self.metrics:
            with user_errors("metrics"):
                print(json.dumps(row), file=self.metrics, flush=True)
        return row

    def tensors(self) -> dict:
        """What is saved: the shards themselves, not copies, because loading is in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "moments": optimizer["state"]}  # rates follow from the step

    def checkpoints(self) -> list[Path]:
        """All of them, oldest first; torch writes .metadata last, and that makes one complete."""
        place = self.folder / "checkpoints"  # glob would hide a lack of permission
        names = [name for name in os.listdir(place) if re.fullmatch(r"step-\d{8}", name)]  # ours
        return [place / name for name in sorted(names)]

    def save(self) -> None:
        """Save a checkpoint, then delete what is older than the newest `keep` complete ones."""
        path = self.folder / "checkpoints" / f"step-{self.step:08d}"
        with user_errors(f"checkpoint {path.name} could not be saved"):
            state = self.tensors()
            if self.metrics:  # on rank 0
                # Nothing that is there already may look complete; of a link, only the link goes.
                (path if path.is_symlink() else path / ".metadata").unlink(missing_ok=True)
                facts = {"step": self.step, "settings": self.settings}
                facts["metrics_bytes"] = self.metrics.seek(0, os.SEEK_END)
                state["facts"] = json.dumps(facts)  # one string: dcp.load fills names it is given
            dcp.save(state, checkpoint_id=path)
        if self.metrics:
            saved = [old for old in self.checkpoints() if old <= path]
            oldest = [old for old in saved if (old / ".metadata").exists()][-self.keep :][0]
            for old in saved[: saved.index(oldest)]:
                shutil.rmtree(old, ignore_errors=True)  # a link stays

    def resume(self) -> None:
        """Go on from the newest checkpoint that every rank can read, if there are any.

        Raises UserError if it is another training's, or if none of them can be read.
        """
        found = [None]
        if self.metrics:
            found = [[path for path in self.checkpoints() if (path / ".metadata").exists()]]
        dist.broadcast_object_list(found)  # every rank takes what rank 0 sees
        for path in reversed(found[0]):
            stored = {"facts": ""}
            try:
                dcp.load(stored, checkpoint_id=path)
                facts = json.loads(stored["facts"])
                if self.settings["global_batch_size"] is None:  # not typed; `main` reads it there
                    self.settings["global_batch_size"] = facts["settings"]["global_batch_size"]
                if wrong := changes(facts["settings"], self.settings):
                    raise UserError(f"{self.folder} was another run, use another -e; {wrong}")
                dcp.load(self.tensors(), checkpoint_id=path)
            except dcp.CheckpointException as error:  # on all ranks, or on none
                reason, _ = next(iter(error.failures.values()))
                say(f"warning: checkpoint {path.name} cannot be used: {reason}")
                continue
            self.step = facts["step"]
            say(f"resuming after step {self.step}, from {path}")
            if self.metrics:  # later rows come again
                size = min(facts["metrics_bytes"], self.metrics.seek(0, os.SEEK_END))
                self.metrics.truncate(size)
            return
        if found[0]:
            raise UserError(f"no checkpoint in {self.folder} can be used; move them away")


def changes(first: dict, other: dict) -> str:
    """The settings that differ, with both values; another version may have other names."""
    differ = [name for name in other if name in first and first[name] != other[name]]
    return "; ".join(f"{name}: {first[name]}, not {other[name]}" for name in differ)


def asked_to_stop() -> bool:
    """Was any rank asked, or has one lost its torchrun? All ranks call this once a step."""
    orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
    vote = torch.tensor(len(ASKED) + orphan)  # on the CPU: it waits for hosts, not for devices
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return vote.item() > 0


@torch.no_grad()
def export_model(model, tokenizer, dtype: torch.dtype, folder: Path, generation: str) -> None:
    """Write a directory that `from_pretrained` loads, in `dtype`; other files in it stay.

    It has a file for each decoder layer. All ranks gather one weight after the other, and each
    keeps those of one layer, which it writes. `generation` is generation_config.json's text.
    """
    rank, ranks, mine, index = dist.get_rank(), dist.get_world_size(), {}, {}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (old for pattern in EXPORTED for old in folder.glob(pattern)):
            old.unlink()
    dist.barrier()
    once = dict(model.named_parameters()) | dict(model.named_buffers())  # without a tied head
    state = {name: t for name, t in model.state_dict().items() if name in once}
    parts = itertools.groupby(state, lambda name: name.partition(".layers.")[2].split(".")[0])
    files = [list(names) for _, names in parts]
    for i, names in enumerate(files):
        dist.barrier()  # of hosts, as in `evaluate`
        for name in names:
            weight = state[name]
            if once[name].requires_grad:  # a correction that is not trained is not rounded
                weight = weight.to(dtype)
            if isinstance(weight, DTensor):
                weight = weight.redistribute(placements=[Replicate(), weight.placements[1]])  # dp
                weight = weight.full_tensor()  # tp
            if i % ranks == rank:
                mine[name], file = weight.cpu(), f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        if mine and (i % ranks == ranks - 1 or i == len(files) - 1):  # all write at the same time
            # A tensor for each expert, as on the hub.
            mine = hf_loading.revert_weight_conversion(model, mine)
            mine = {name: weight.contiguous() for name, weight in mine.items()}
            index |= dict.fromkeys(mine, file)
            with user_errors(file, Exception):  # safetensors has a class of its own
                safe_save_file(mine, folder / file, {"format": "pt"})
            mine = {}
    indices = [{}] * ranks
    dist.all_gather_object(indices, index)
    if rank == 0:
        size = sum(t.numel() for t in state.values()) * dtype.itemsize
        index = {name: file for part in indices for name, file in part.items()}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "generation_config.json").write_text(generation)
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = dtype, [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---- Command line and job ----------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUILT_IN_STEPS = 180


class OneThreadGloo(dist.ProcessGroupGloo):
    """Gloo with one thread per group. Its default of two corrupts the heap within hours of TP on
    CPU: both write to one string without a lock (torch 2.13 to 2.15)."""

    def __init__(self, store, rank: int, size: int, timeout: timedelta, **_):  # 2.14 has more
        # The options that torch would choose, which it shows only of a finished group.
        options = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout).options
        options._threads = 1
        super().__init__(store, rank, size, options)


def init_distributed(device_type: str | None) -> torch.device:
    """Join the job torchrun describes, or make one of this process alone; returns its device."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if os.environ.get("WORLD_SIZE", "1") == "1" and not alone.keys() <= os.environ.keys():
        os.environ |= alone | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # RANK may be left over
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # some launchers set only RANK
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dist.distributed_c10d.ProcessGroupGloo = OneThreadGloo
    if device_type == "cpu" or (gpus == 0 and device_type is None):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    if gpus < ranks:
        raise UserError(f"--device cuda needs a GPU for each rank: a node has {gpus} GPUs for its "
                        f"{ranks} ranks; start fewer ranks, or use --device cpu")  # fmt: skip
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return device


class UserError(Exception):
    """What the user can mend, in one line; DEBUG=1 in the environment adds its traceback."""


USER_ERRORS = (UserError, OSError, EOFError, ValueError, ImportError, NotImplementedError,
               dcp.CheckpointException)  # fmt: skip


@contextlib.contextmanager
def user_errors(what: str, *more: type):
    """Turn USER_ERRORS, and errors of `more` classes, into a UserError that begins with `what`."""
    try:
        yield
    except (*USER_ERRORS, *more) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):  # of one rank or of many
            cause, _ = next(iter(error.failures.values()))
        elif isinstance(error, datasets.exceptions.DatasetGenerationError):
            cause = error.__cause__ or error
        text = textwrap.shorten(str(cause) or repr(cause), 600)
        raise UserError(f"{what}: {text}") from error


def say(text: str) -> None:
    """Print on rank 0 alone; a terminal that is gone is no error."""
    with contextlib.suppress(OSError):
        if dist.get_rank() == 0:
            print(text, file=sys.stderr, flush=True)


def agree(what: str, mine: dict) -> None:
    """Raise UserError on every rank unless all of them have the same settings."""
    ranks = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    for rank in ranks:
        if wrong := changes(ranks[0], rank):
            raise UserError(f"{what} differ between nodes; {wrong}")


def first_on_node(make):
    """`make()`, on the first rank of each node and then on the others, which find its cache."""
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))  # to tokenize a dataset
    first = os.environ["LOCAL_RANK"] == "0"  # the one with a progress bar
    result = make() if first else None
    dist.barrier(group)
    return result if first else make()


def built_in_model() -> tuple:
    """Configuration and tokenizer of a small Llama for bytes; T of 2, 3, 4, 6, 8 divides it."""
    sizes = {"vocab_size": 384, "hidden_size": 192, "intermediate_size": 768}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 24, "initializer_range": 0.05}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
    config = transformers.LlamaConfig(**sizes, **tokens, dtype=torch.float32)
    names = bytes_to_unicode()  # GPT-2's, of the 256 bytes
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {names[byte]: byte + 3 for byte in names}
    special = {"pad_token": "<pad>", "bos_token": None, "eos_token": "</s>", "unk_token": "<unk>"}
    return config, transformers.GPT2Tokenizer(vocab=vocab, merges=[], **special)


def find_model(name: str | None, random_init: bool) -> tuple:
    """Configuration, tokenizer, safetensors files and text of generation_config.json of a model.

    `name` is a hub id or a directory; downloads what is not in the cache. Raises UserError.
    """
    if not name:
        config, tokenizer = built_in_model()
        generation = transformers.GenerationConfig.from_model_config(config)
        return config, tokenizer, None, generation.to_json_string()
    options = {"_raise_exceptions_for_missing_entries": False}  # None for a file that is not there
    find = functools.partial(transformers.utils.cached_file, name, **options)
    place = "" if os.path.isdir(name) else ", which is not a directory here, so a hub id"
    with user_errors(f"-m {name}{place}", Exception):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.get_text_config() is not config or not getattr(config, "num_attention_heads", 0):
            raise ValueError(f"{config.model_type} is not a language model alone, like Llama")
        if find("tokenizer.model") and not find("tokenizer.json"):
            transformers.utils.requires_backends(transformers.AutoTokenizer, "sentencepiece")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no end token to put between documents")
        if path := find("generation_config.json"):
            generation = Path(path).read_text()  # as it stands there, valid or not
        else:  # older models have such settings in config.json
            options = {"config_file_name": "config.json", "_from_model_config": True}
            settings = transformers.GenerationConfig.from_pretrained(name, **options)
            generation = settings.to_json_string()
        if hasattr(config, "quantization_config") and not random_init:
            raise ValueError("its weights are quantized; take what they were made from")
        config.dtype = config.dtype or torch.float32
        config.dtype = config.dtype if config.dtype.itemsize > 1 else torch.bfloat16
        config.update({"output_attentions": False, "output_hidden_states": False})
        config.return_dict = True
        for key in ("quantization_config", "auto_map"):  # not true of what will be exported
            vars(config).pop(key, None)
        with tempfile.TemporaryDirectory() as folder:  # what cannot be saved is not trained
            config.save_pretrained(folder)
        meta_model(config)  # nor is what cannot be built
        files = None if random_init else find_weights(name, find)
    return config, tokenizer, files, generation


def find_weights(name: str, find) -> list[str]:
    """The safetensors files of a model, which can all be opened."""
    files = [find("model.safetensors")]  # which comes first, as in transformers
    if not files[0] and (index := find("model.safetensors.index.json")):
        files, _ = get_checkpoint_shard_files(name, index)
    if not files[0]:
        raise ValueError("there is no model.safetensors; save it again with transformers, or use "
                         "--random-init")  # fmt: skip
    for file in files:
        refuse_pointer(file)
        with user_errors(file, Exception):
            weights = safe_open(file, framework="pt")
            kinds = {weights.get_slice(name).get_dtype() for name in weights.offset_keys()}
            if any("8" in kind for kind in kinds):  # I8, U8, F8_E4M3
                raise ValueError("its weights are quantized; take what they were made from")
    return files


def check_layout(config: PretrainedConfig, world_size: int, tp: int) -> None:
    """Raise UserError, naming the tp values that work, unless tp divides what it shards."""
    sizes = {"world size": world_size, "attention heads": config.num_attention_heads}
    sizes["intermediate size"] = getattr(config, "intermediate_size", None) or 0
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    sizes["experts"] = next((getattr(config, n) for n in names if getattr(config, n, None)), 0)
    if bad := [f"{name} ({size})" for name, size in sizes.items() if size % tp]:
        works = [t for t in range(1, world_size + 1) if not any(s % t for s in sizes.values())]
        raise UserError(f"--tp {tp} does not divide {', '.join(bad)}; these do: {works}")


def check_args(args, config: PretrainedConfig) -> None:
    """Fill in the length if it was not typed; raise UserError with the first bad size."""
    check_layout(config, dist.get_world_size(), args.tp)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    args.seq_length = args.seq_length or min(1024 if args.model_name else 256, limit)
    if args.seq_length > limit:
        raise UserError(f"--seq-length {args.seq_length} is more than the model's {limit}")
    check_batch(args, args.global_batch_size)
    # Numbers drawn at random, and a router's loss, which depends on how a batch is divided.
    changing = re.compile("drop|jitter|output_router_logits")
    if bad := {k: v for k, v in config.to_dict().items() if changing.search(k) and v}:
        raise UserError(f"config.json has {bad}; only 0 is the same training on every layout")


def check_batch(args, size: int | None) -> int:
    """The global batch size, by default of one forward pass; UserError if it is no multiple."""
    unit = args.batch_size * dist.get_world_size() // args.tp
    size = size or unit
    if size % unit:
        raise UserError(f"--global-batch-size {size} is not a multiple of batch size x dp = {unit};"
                        f" {math.ceil(size / unit) * unit} is")  # fmt: skip
    return size


def main(args: argparse.Namespace) -> None:
    """Train as `args` says; every rank calls this once."""
    begin, device = time.perf_counter(), init_distributed(args.device)
    agree("flags", vars(args))
    if dist.get_rank() != 0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()  # the hub's, too
        transformers.logging.set_verbosity_error()
    found = first_on_node(lambda: find_model(args.model_name, args.random_init))
    config, tokenizer, weights, generation = found
    check_args(args, config)
    data = first_on_node(lambda: load_data(args, tokenizer, config.vocab_size))
    told = data["train"].info.description
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")

    mesh, recompute = build_mesh(device.type, args.tp), args.activation_checkpointing
    dp = mesh["dp"].size()
    with user_errors(f"-m {args.model_name or 'built in'}"):
        model = shard_model(config, mesh, DTYPES[args.dtype], recompute, args.compile)
        init_weights(model, args.seed, only_buffers=weights is not None)
        if weights:
            with user_errors("its files", Exception):
                load_weights(model, weights)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)

    settings = {name: getattr(args, name) for name in ("seq_length", "global_batch_size", "seed")}
    settings["dataset"] = told
    unrelated = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    settings |= {f"model.{k}": v for k, v in config.to_dict().items() if k not in unrelated}
    settings = json.loads(json.dumps(settings))  # as it comes back from a checkpoint
    agree("model or data", settings)
    folder = Path(args.save_dir, args.experiment_name) if args.experiment_name else None
    run = Run(model, optimizer, folder, settings, args.keep_checkpoints)
    if folder:
        with user_errors(f"-e {args.experiment_name}"):
            run.lock()
            run.resume()
    args.global_batch_size = size = check_batch(args, settings["global_batch_size"])
    settings["global_batch_size"] = size
    args.steps_per_epoch = len(data["train"]) / size
    steps = math.ceil((args.num_epochs or 1) * len(data["train"]) / size)
    args.total_steps = steps = min(steps, args.max_steps or steps)
    args.warmup_steps = steps // 20 if args.warmup_steps is None else args.warmup_steps
    if run.step > steps:
        raise UserError(f"{folder} is at step {run.step} already, of {steps}")
    if int(os.environ.get("LOCAL_WORLD_SIZE", args.tp)) % args.tp:
        say("warning: TP groups span nodes, so every layer waits for the network between them")
    parameters, passes = sum(p.numel() for p in model.parameters()), size // args.batch_size // dp
    say(f"data: {told}")
    say(f"model: {config.model_type}, {parameters:,} parameters, computed in {args.dtype}")
    say(f"layout: {mesh.size()} {device.type} ranks = {dp} dp x {args.tp} tp")
    say(f"global batch: {size} = {args.batch_size} sequences x {dp} dp x {passes} accumulation")
    say(f"length: {steps} steps, {steps * size * args.seq_length:,} tokens")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays
            signal.signal(number, lambda number, frame: ASKED.append(number))  # to save and stop
    row = train(args, run, data, mesh)
    done = run.step == steps
    if folder and done:
        with user_errors("the export failed"):
            export_model(model, tokenizer, config.dtype, folder / "export", generation)
    names = {"loss": "training loss", "val_loss": "validation loss"}
    losses = "".join(f"{names[key]} {row[key]:.3f}, " for key in names if key in row)
    where = f"results in {folder}" if folder else "nothing written, -e NAME keeps results"
    how = "" if done else "stopped as asked, the same command goes on: "
    say(f"{how}{losses}{run.step} steps, {time.perf_counter() - begin:.0f} s; {where}")
    dist.destroy_process_group()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError with the first thing that is wrong in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)

    def error(message: str):  # argparse's own would end the first rank before it has spoken
        raise UserError(message)

    parser.error = error
    add = parser.add_argument
    add("--tp", "-tp", "--tensor-parallel", type=int, default=1, help="ranks of a TP group (1)")
    add("-m", "--model-name", help="hub id or directory of a Hugging Face causal LM (built in)")
    add("--random-init", action="store_true", help="only configuration and tokenizer of -m")
    add("-d", "--dataset-name", help="hub id, directory or file (Python's standard library)")
    add("--dataset-subset", help="configuration of a hub dataset (none)")
    add("--text-column", help="column with the text, where that is not clear (text)")
    add("-s", "--seq-length", type=int, help="tokens per sequence (256; 1024 with -m)")
    add("-b", "--batch-size", type=int, help="sequences per dp rank and pass (4; 1 with -m)")
    add("--global-batch-size", type=int, help="sequences per optimizer step (batch size x dp)")
    add("--num-epochs", type=int, help="passes over the data (1)")
    add("--max-steps", type=int, help=f"most optimizer steps ({BUILT_IN_STEPS} if all built in)")
    add("--lr", type=float, help="peak learning rate (0.003; 0.00003 with -m)")
    add("--warmup-steps", type=int, help="linear warmup (a twentieth of all steps)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, of matrices (0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm (1.0)")
    add("--seed", type=int, default=0, help="of initial weights and data order (0)")
    add("--dtype", choices=list(DTYPES), help="of computation, not weights (bf16 on CUDA, or fp32)")
    add("--compile", action="store_true", help="torch.compile each layer: a slow first step")
    add("--activation-checkpointing", action="store_true", help="recompute layers in backward")
    add("-e", "--experiment-name", help="keep results under this name (keep none)")
    add("--save-dir", default="outputs", help="where experiments go (outputs)")
    add("--log-freq", type=int, default=10, help="steps between metrics (10)")
    add("--eval-freq", type=int, default=0, help="steps between evaluations (0: one at the end)")
    add("--ckpt-freq", type=int, default=500, help="steps between checkpoints (500)")
    add("--keep-checkpoints", type=int, default=2, help="how many of the newest stay (2)")
    add("--device", choices=["cuda", "cpu"], help="(cuda when there is one)")
    args = parser.parse_args(argv)
    smallest = {"warmup_steps": 0, "weight_decay": 0, "seed": 0, "eval_freq": 0, "seq_length": 2}
    for name, value in vars(args).items():
        least = smallest.get(name, 1 if type(value) is int else 1e-12)
        if value == "" or (type(value) in (int, float) and not least <= value < 2**63):
            wanted = "a value" if value == "" else f"at least {least} and finite"
            raise UserError(f"--{name.replace('_', '-')} needs {wanted}, not {value!r}")
    args.batch_size = args.batch_size or (1 if args.model_name else 4)
    args.lr = args.lr or (3e-5 if args.model_name else 3e-3)
    if not (args.model_name or args.dataset_name or args.num_epochs or args.max_steps):
        args.max_steps = BUILT_IN_STEPS
    return args


def run(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code.

    Most errors happen on many ranks. Each waits its turn, so that torchrun ends the others once
    one has spoken.
    """
    try:
        main(parse_args(argv))
        return 0
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from torchrun
        # Gloo has no class of its own for a rank that is gone (torch 2.13 to 2.15).
        if ASKED and "onnection" in str(error):  # torchrun is ending this job, and says why
            return 1
        time.sleep(1 + int(os.environ.get("LOCAL_RANK", "0")))
        known = isinstance(error, UserError) and "DEBUG" not in os.environ
        with contextlib.suppress(OSError):
            text = f"error: {error}" if known else traceback.format_exc()
            print(f"\n{text}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    # Without Python's finalization: a gloo thread that drops the last reference to a tensor while
    # it runs would now and then abort the process, with all work done (torch 2.13).
    os._exit(run())
