#!/usr/bin/env python3
"""Train a Hugging Face causal LM with tensor parallelism (TP) and FSDP2 together.

    python train_llm.py                                # one process, with or without a GPU
    torchrun --nproc-per-node 8 train_llm.py --tp 4    # one node: dp 2 x tp 4
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_llm.py --tp 8                            # two nodes: dp 2 x tp 8

The ranks form a 2D mesh. 8 ranks with --tp 4:

             tp 0     tp 1     tp 2     tp 3
         +--------+--------+--------+--------+
    dp 0 | rank 0 | rank 1 | rank 2 | rank 3 |  one copy of every layer, cut four ways by TP
         +--------+--------+--------+--------+
    dp 1 | rank 4 | rank 5 | rank 6 | rank 7 |  the same cuts, other sequences of the batch
         +--------+--------+--------+--------+

The ranks of a row work on the same sequences, each with its part of every weight matrix. The ranks
of a column hold the same part: FSDP shards it over them and gathers it one layer at a time.
The layout changes speed and memory, never the loss.
"""

import argparse
import copy
import functools
import hashlib
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
import time
import traceback
import typing
from datetime import timedelta
from pathlib import Path

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
from transformers.utils.hub import snapshot_download

# ---- Mesh and plan -----------------------------------------------------------------------------


def check_layout(config: PretrainedConfig, world_size: int, tp: int) -> None:
    """Raise ValueError, naming the tp values that work, unless tp cuts this model evenly."""
    sizes = {"world size": world_size, "attention heads": config.num_attention_heads}
    sizes["intermediate size"] = getattr(config, "intermediate_size", None) or 0
    if bad := [f"{name} ({size})" for name, size in sizes.items() if size % tp]:
        works = [t for t in range(1, world_size + 1) if not any(s % t for s in sizes.values())]
        raise ValueError(f"--tp {tp} does not divide {', '.join(bad)}; these do: {works}")
    vocabulary, hidden, dp = config.vocab_size, config.hidden_size, world_size // tp
    if vocabulary % tp and hidden % dp:  # see fsdp_dim in apply_fsdp
        problem = f"--tp {tp} does not divide the vocabulary ({vocabulary}); then dp {dp} has to"
        raise ValueError(f"{problem} divide the hidden size ({hidden})")


# The part to copy begins here and ends with apply_fsdp.
# B sequences per dp rank, S tokens, D hidden, F intermediate, H query or key-value heads x head
# size, V vocabulary, T tp size


def build_mesh(device_type: str, tp: int) -> DeviceMesh:
    """The (world size / tp, tp) mesh ("dp", "tp"): ranks next to each other share a tp group."""
    shape = (dist.get_world_size() // tp, tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "tp"))
    # One all-reduce for the gradient norm instead of two and a warning; not public in torch 2.13.
    mesh._flatten("dp_tp")
    return mesh


def layer_plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How TP treats each module of a decoder layer, in execution order, with local shapes.

    The residual stream is a DTensor cut along S, so the model's code sees its global shape.
    """
    cut, whole = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
    to_residual = {"output_layouts": Shard(1), "use_local_output": False}
    plan = {
        "input_layernorm": SequenceParallel(),  # (B, S/T, D); its gradient (D,): all-reduce
        # (B, S/T, D) -> (B, S, D)  all-gather
        "self_attn": PrepareModuleInput(input_kwarg_layouts=cut, desired_input_kwarg_layouts=whole),
        "self_attn.q_proj": ColwiseParallel(),  # (B, S, D) -> (B, S, H/T)
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),  # cut by heads
        "self_attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
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


def keep_kv_whole(attention: nn.Module, tp_mesh: DeviceMesh) -> None:
    """If T does not divide the key-value heads: all on every rank, which picks its queries' own."""
    groups, size = attention.num_key_value_groups, attention.head_dim  # queries per head, head size
    if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() != size:
        raise ValueError("k_norm spans all key-value heads: --tp has to divide their number")
    queries = attention.q_proj.weight.shape[0] // size // tp_mesh.size()
    query = tp_mesh.get_local_rank() * queries  # the first of this rank's

    def pick(module, args, out):  # (B, S, all H) -> (B, S, H/T)
        heads = out.to_local(grad_placements=[Partial()]).unflatten(-1, (-1, size))
        heads = heads[:, :, query // groups : (query + queries - 1) // groups + 1]
        return heads.repeat_interleave(groups, 2).narrow(2, query % groups, queries).flatten(2)

    for projection in (attention.k_proj, attention.v_proj):  # their gradients: all-reduce
        distribute_module(projection, tp_mesh)
        projection.register_forward_hook(pick)
    attention.num_key_value_groups = 1


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Turn every parameter into a DTensor on `tp_mesh`, in place; all ranks hold the same before.

    Raises ValueError if T cannot cut the model, or naming the parameters that the plan leaves out.
    """
    base = model.base_model
    if not (hasattr(base, "layers") and hasattr(base, "norm") and hasattr(model, "lm_head")):
        raise ValueError(f"{type(model).__name__} does not keep its modules where Llama does")
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embed.weight
    ids_to_residual = RowwiseParallel(  # (B, S) -> partial (B, S, D) -> (B, S/T, D)  reduce-scatter
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    )
    # (B, S/T, D) -> (B, S, D) -> (B, S, V/T)  all-gather; for loss_parallel the logits stay cut
    residual_to_logits = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    plans = {embed: ids_to_residual, base.norm: SequenceParallel(), head: residual_to_logits}
    for layer in base.layers:
        if (getattr(model.config, "num_key_value_heads", None) or 0) % tp_mesh.size():
            keep_kv_whole(layer.self_attn, tp_mesh)
        plans[layer] = layer_plan(layer)
    for module, plan in plans.items():
        parallelize_module(module, tp_mesh, plan, src_data_rank=None)
    # A copy waits for the reduce-scatter. torch.compile's cache takes a pending one for a plain
    # tensor and the other way round, and runs the wrong code for it (2.13, pytorch issue 180614).
    embed.register_forward_hook(lambda module, args, out: out.clone())
    if tied:  # each became a Parameter of its own: the same rows, but they would drift apart
        head.weight = embed.weight
    if missing := [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise ValueError(f"the tensor-parallel plan does not cover {', '.join(missing)}")


def apply_fsdp(model: nn.Module, dp_mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard all parameters over `dp_mesh`, in place, after `apply_tp`; compute in `dtype`."""

    def fsdp_dim(p: DTensor) -> Shard | None:
        # FSDP cuts dimension 0, except where TP cut it unevenly (a vocabulary): there DTensor
        # mistakes which rows a rank holds, and checkpoints fail (torch 2.13).
        uneven = p.placements[0].is_shard(0) and p.shape[0] % p.device_mesh.size()
        return Shard(1) if uneven else None

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": dp_mesh, "mp_policy": policy, "shard_placement_fn": fsdp_dim}
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embed.weight:
        fully_shard(embed, **options)
        # Backward starts with the head, so it stays gathered.
        fully_shard([model.base_model.norm, head], reshard_after_forward=False, **options)
    fully_shard(model, **options)  # the rest: nothing, or tied embedding, norm, head in one unit


# ---- Model -------------------------------------------------------------------------------------

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
    """The fp32 model without memory for its weights."""
    with torch.device("meta"):  # from_config writes into the configuration
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def shard_model(
    config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype, recompute: bool, compile: bool
) -> PreTrainedModel:
    """The model on `mesh`, still without memory, ready to train once `to_empty` and filled."""
    model = meta_model(config)
    apply_tp(model, mesh["tp"])
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
def build_model(
    config: PretrainedConfig, mesh: DeviceMesh, dtype: torch.dtype, seed: int,
    weights: Path | None = None, recompute: bool = False, compile: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The sharded model with fp32 parameters, read from the directory `weights` or drawn.

    Drawn weights are the same for every mesh: every rank draws the unsharded model from `seed`, one
    module at a time, and keeps its shard of each. Raises ValueError if the weights do not fit.
    """
    model, whole = shard_model(config, mesh, dtype, recompute, compile), meta_model(config)
    model.to_empty(device=mesh.device_type)
    torch.manual_seed(seed)
    drawn = set()
    for module, sharded in zip(whole.modules(), model.modules(), strict=True):
        if weights and not module._buffers:
            continue
        module.to_empty(device=mesh.device_type, recurse=False)
        whole._init_weights(module)  # public only for all modules at once
        for name, weight in module.named_parameters(recurse=False):
            param = sharded.get_parameter(name)
            if param not in drawn:  # a tied head keeps the embedding's weights
                param.to_local().copy_(local_shard(weight, param))
                drawn.add(param)
        for name, value in module.named_buffers(recurse=False):
            sharded.get_buffer(name).copy_(value)
        module.to_empty(device="meta", recurse=False)
    if weights:
        load_weights(model, weights)
    return model


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Read the safetensors files in `folder` into the shards of `model`, of any stored dtype.

    Raises ValueError if tensors are missing, unexpected or of another shape.
    """
    reader, params = dcp.HuggingFaceStorageReader(str(folder)), dict(model.named_parameters())
    stored = {name: tuple(t.size) for name, t in reader.read_metadata().state_dict_metadata.items()}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # with tied ones
    problems = [
        *(f"{name} is missing" for name in sorted(params.keys() - stored)),
        *(f"{name} is not in the model" for name in sorted(stored.keys() - known)),
        *(f"{name} is {stored[name]}, not {tuple(p.shape)}" for name, p in params.items()
          if stored.get(name, p.shape) != p.shape),
    ]  # fmt: skip
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights in {folder}: {'; '.join(problems[:5])}{more}")
    dcp.load({name: p.detach() for name, p in params.items()}, storage_reader=reader)


def find_model(name: str, random_init: bool) -> tuple[PretrainedConfig, typing.Any, Path | None]:
    """Configuration, tokenizer and weights' directory of a hub id or a local directory.

    Downloads what is not in the cache. Raises OSError or ValueError if something is missing.
    """
    config = AutoConfig.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if random_init:
        return config, tokenizer, None
    if not (folder := Path(name)).is_dir():
        files = ["model.safetensors", "model-*.safetensors"]  # a repository may have other formats
        folder = Path(snapshot_download(name, allow_patterns=files))
    if not any(folder.glob("*.safetensors")):
        raise ValueError("no *.safetensors file; --random-init needs none")
    return config, tokenizer, folder


@torch.no_grad()
def export_model(
    model: PreTrainedModel, tokenizer, dtype: torch.dtype, folder: Path, group: dist.ProcessGroup
) -> None:
    """Write a directory that `from_pretrained` loads, every rank its own shards, in `dtype`."""
    part, rank0 = folder.with_name("writing-export"), dist.get_rank() == 0
    state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    sizes = itertools.accumulate(p.numel() * p.itemsize for p in state.values())
    files = {name: 1 + size // EXPORT_FILE_BYTES for name, size in zip(state, sizes, strict=True)}
    files = {name: sorted(set(files.values())).index(file) + 1 for name, file in files.items()}
    writer = dcp.HuggingFaceStorageWriter(
        str(part), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer, process_group=group)
    if rank0:
        shutil.rmtree(part / "sharded")
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = dtype, [type(model).__name__.removeprefix("FSDP")]
        for thing in (config, model.generation_config, tokenizer):
            thing.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)


def local_shard(whole: torch.Tensor, param: DTensor) -> torch.Tensor:
    """The slice of `whole` that this rank holds of `param`, a DTensor of that shape on (dp, tp).

    TP cuts into equal chunks, the last one shorter, and FSDP cuts a chunk in the same way. A view:
    torch's `distribute_tensor` copies the whole matrix on its way to the same slice (2.13).
    """
    for mesh_dim in (1, 0):
        if not (placement := param.placements[mesh_dim]).is_replicate():
            length, dim = whole.shape[placement.dim], placement.dim
            step = math.ceil(length / param.device_mesh.size(mesh_dim))
            start = min(length, step * param.device_mesh.get_local_rank(mesh_dim))
            whole = whole.narrow(dim, start, min(step, length - start))
    return whole


# ---- Data --------------------------------------------------------------------------------------

FORMATS = {
    ".txt": "text", ".py": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
    ".csv": "csv",
}  # fmt: skip


def load_data(name: str | None, subset: str | None, column: str | None, tokenizer, seq_length: int):
    """Token sequences (S,) in the splits "train" and "validation", tokenized once and cached.

    Documents are joined, each with the end token after it, and cut every S tokens; what is left at
    the end of a split is dropped. Raises OSError or ValueError if `name` is missing or too short,
    or if it is not clear which `column` is the text.
    """
    files = name or f"{sysconfig.get_paths()['stdlib']}/*.py"  # built in: its top-level modules
    if kind := FORMATS.get(Path(files).suffix):
        options = {"sample_by": "document"} if kind == "text" else {}
        splits = datasets.load_dataset(kind, data_files=files, **options)
    else:
        splits = datasets.load_dataset(name, subset)

    def pack(documents: datasets.Dataset) -> datasets.Dataset:
        texts = [n for n, f in documents.features.items() if "string" in getattr(f, "dtype", "")]
        choice = [column] if column else ["text"] if "text" in texts else texts
        if len(choice) != 1 or choice[0] not in texts:
            raise ValueError(f"--text-column has to name one of its columns with text: {texts}")

        def tokenize(batch: dict) -> dict:
            ids = tokenizer(batch[choice[0]], add_special_tokens=False, verbose=False).input_ids
            return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

        left = []

        def cut(batch: dict) -> dict:
            left.extend(itertools.chain(*batch["input_ids"]))
            stop = len(left) // seq_length * seq_length
            rows = [left[i : i + seq_length] for i in range(0, stop, seq_length)]
            del left[:stop]
            return {"input_ids": rows}

        options = {"batched": True, "remove_columns": documents.column_names}
        ids = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
        # Fast tokenizers have threads of their own, and one document needs no other process.
        processes = 0 if tokenizer.is_fast else min(os.cpu_count(), len(documents) - 1)
        options |= {"num_proc": processes or None, "features": ids, "desc": "Tokenizing"}
        tokens = documents.map(tokenize, **options)
        return tokens.map(cut, batched=True, features=ids, desc="Packing").with_format("torch")

    if "validation" in splits:
        data = {split: pack(splits[split]) for split in ("train", "validation")}
    else:  # hold out the last twentieth of the shuffled documents
        rows = pack(splits["train"].shuffle(seed=0))
        held_out = max(1, len(rows) // 20)
        data = {
            "train": rows.select(range(len(rows) - held_out)),
            "validation": rows.select(range(max(0, len(rows) - held_out), len(rows))),
        }
    if empty := [split for split, rows in data.items() if not len(rows)]:
        raise ValueError(
            f"not one sequence of {seq_length} tokens for {' and '.join(empty)}; "
            "use more text or a shorter --seq-length"
        )
    return data


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
    if device.type != "cuda" or dtype != "bf16":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """The most this rank has held, in GiB: device memory on CUDA, resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- Experiment: metrics, checkpoints, stopping -------------------------------------------------


def explain(error: Exception) -> str:
    """The message of an exception; of one that many ranks raised at once, one rank's."""
    return str(error.failures.popitem()[1][0] if hasattr(error, "failures") else error)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Experiment:
    """What a run keeps in `folder`; nothing if that is None. All ranks have one and call it alike.

    A checkpoint is written beside the training, as checkpoints/writing-STEP, and renamed to
    step-STEP once every rank has written its shards: it is complete or absent.
    """

    def __init__(self, folder: Path | None, settings: dict, keep: int, control: dist.ProcessGroup):
        self.folder, self.keep, self.control = folder, keep, control
        self.settings = json.loads(json.dumps(settings))  # as it comes back from run.json
        self.rank0, self.stopping = dist.get_rank() == 0, False
        self.saving = self.vote = self.problem = None
        if folder:
            self.checkpoints = folder / "checkpoints"
            # Collectives of the saving thread must not mix with those of the training.
            self.save_group = dist.new_group(backend="gloo")

    def record(self, row: dict) -> None:
        """Append a row to metrics.jsonl."""
        if self.folder and self.rank0:
            try:
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self.problem = self.problem or f"metrics could not be written: {error}"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> None:
        """Copy the state after step `run["step"]` and start to write it, with `run` as JSON."""
        if not self.folder:
            return
        self.finish_save()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        part = self.checkpoints / f"writing-{run['step']:08d}"
        self.saving = part, run | {"settings": self.settings}, dcp.async_save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=part, process_group=self.save_group,
        )  # fmt: skip

    def finish_save(self, wait: bool = True) -> None:
        """Make a checkpoint that is written visible, and delete the ones beyond `keep`.

        With `wait`, no rank returns before it is.
        """
        if self.saving and (wait or self.saving[2].done()):
            self.publish()
        if wait and self.folder:
            dist.barrier(self.control)

    def publish(self) -> None:
        """Rename the checkpoint that is being written, once every rank has written its part."""
        (part, run, future), self.saving = self.saving, None
        try:
            future.result()  # done on rank 0 only after every rank has written
            if self.rank0:
                (part / "run.json").write_text(json.dumps(run, indent=1))
                part.rename(part.with_name(f"step-{run['step']:08d}"))
                for old in sorted(self.checkpoints.glob("step-*"))[: -self.keep]:
                    part = old.rename(old.with_name(old.name.replace("step", "deleting")))
                    shutil.rmtree(part)
        except (OSError, dcp.CheckpointException) as error:
            if self.rank0:  # all have the exception, one speaks
                reason = explain(error)
                free = shutil.disk_usage(self.folder).free / 2**30
                problem = f"step {run['step']} could not be saved, {free:.2f} GiB free: {reason}"
                self.problem = self.problem or problem
                shutil.rmtree(part, ignore_errors=True)

    def decide(self) -> tuple[bool, bool]:
        """What all ranks agree on, one call late so that nobody waits: stop? and has any a problem?

        Call it once a step.
        """
        agreed = 0
        if self.vote:
            self.vote[0].wait()
            agreed = self.vote[1].item()
        wish = torch.tensor(2 if self.problem else int(self.stopping))
        self.vote = dist.all_reduce(wish, dist.ReduceOp.MAX, self.control, async_op=True), wish
        return agreed == 1, agreed == 2

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR1, to any rank, as a request to save and stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Load the newest checkpoint that all ranks can read; returns its run.json, {} if none.

        Raises ValueError if its settings are not this run's, or if none can be read.
        """
        if not self.folder:
            return {}
        try:
            if self.rank0:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                for left in self.checkpoints.glob("*ing-*"):  # writing- and deleting-
                    shutil.rmtree(left)
        except OSError as error:
            self.problem = str(error)
        stop_if([self.problem] if self.problem else [], self.control)
        seen = [None] * dist.get_world_size()
        found = {path.name: read_json(path / "run.json") if (path / ".metadata").exists() else {}
                 for path in self.checkpoints.glob("step-*")}  # fmt: skip
        dist.all_gather_object(seen, found, self.control)
        names = sorted(set().union(*seen), reverse=True)
        for name in names:
            run, problem = seen[0].get(name), "not every rank finds its run.json and .metadata"
            if all(found.get(name) for found in seen):
                self.check_settings(run)
                weights, moments = get_state_dict(model, optimizer)
                state, path = {"model": weights, "optimizer": moments}, self.checkpoints / name
                try:
                    dcp.load(state, checkpoint_id=path, process_group=self.control)
                except dcp.CheckpointException as error:  # on all ranks, if any of them fails
                    problem = explain(error)
                else:
                    options = {"model_state_dict": weights, "optim_state_dict": moments}
                    set_state_dict(model, optimizer, **options)
                    break
            if self.rank0:
                print(f"checkpoint {name} cannot be used: {problem}", file=sys.stderr, flush=True)
        else:
            run = {}
            if names:
                raise ValueError(f"no checkpoint in {self.checkpoints} can be used; move them away")
        return run

    def clean_up(self, step: int) -> None:
        """Set aside what is newer than `step`, where the run goes on: checkpoints and metrics.

        The evaluation at `step` goes, too, since the run evaluates there again.
        """
        if not (self.folder and self.rank0):
            return
        try:
            for path in self.checkpoints.glob("step-*"):
                if path.name > f"step-{step:08d}":
                    path.replace(path.with_name(f"unusable-{path.name}"))
            metrics, part = self.folder / "metrics.jsonl", self.folder / "metrics.part"
            if metrics.exists():
                lines = [line for line in metrics.read_text().splitlines(True) if line[-1] == "\n"]
                rows = [json.loads(line) for line in lines]
                kept = [line for line, row in zip(lines, rows, strict=True)
                        if row["step"] < step + ("loss" in row)]  # fmt: skip
                part.write_text("".join(kept))
                part.replace(metrics)
        except OSError as error:
            self.problem = str(error)

    def check_settings(self, run: dict) -> None:
        """Raise ValueError naming each setting in which `run` is another training than this one."""
        old, new = run["settings"], dict(self.settings)
        if run["step"] == old["total_steps"] < new["total_steps"]:
            # A finished run may be made longer; warmup follows the length unless it is given.
            new |= {key: old[key] for key in ("total_steps", "warmup_steps")}
        if differ := [f"{k}: {old.get(k)} then, {new[k]} now" for k in new if old.get(k) != new[k]]:
            raise ValueError(f"{self.folder} was another run, use another -e; " + "; ".join(differ))


# ---- Training ----------------------------------------------------------------------------------


def build_optimizer(model: PreTrainedModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but not norms and biases. `train` sets the learning rate."""
    matrices, vectors = [], []
    for p in model.parameters():
        (matrices if p.ndim > 1 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear up to `peak`, then a cosine down to 10 % at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def load_batch(data: datasets.Dataset, rows: list[int], device: torch.device) -> torch.Tensor:
    """Sequences (B, S) int64 on `device`, copied without waiting for it."""
    batch = data[rows]["input_ids"]
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def train_step(model, optimizer, batches: list[torch.Tensor], max_grad_norm: float) -> tuple:
    """One optimizer step on this rank's micro-batches, each (B, S) int64, without a device sync.

    Returns the mean loss per token over this dp rank's sequences, and the norm of the global
    gradient before clipping: scalars on the device.
    """
    targets = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
    loss = torch.zeros((), device=batches[0].device)
    for i, ids in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)  # FSDP averages over dp once
        with loss_parallel():
            # Only the loss is kept: a variable would keep the logits through backward and beyond.
            part = model(ids, labels=ids, num_items_in_batch=targets, use_cache=False).loss
            part.backward()
        loss += part.detach().to_local()
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
        ids = load_batch(data, [max(0, row) for row in batch], model.device)
        labels = ids.clone()
        labels[[row < 0 for row in batch]] = -100  # cross-entropy ignores these
        with loss_parallel():
            part = model(ids, labels=labels, num_items_in_batch=targets, use_cache=False).loss
        loss += part.to_local()
    model.train()
    dist.all_reduce(loss, group=dp_mesh.get_group())
    return loss.item()


def metrics_row(args, model, mesh: DeviceMesh, step: int, since: dict, loss, grad_norm) -> dict:
    """What the job reached at `step`, and how fast it has been `since` the last row.

    The only place where the training loop waits for the device, so its clock sees the work done.
    """
    (dp, tp), world_size = mesh.shape, dist.get_world_size()
    dist.all_reduce(loss, group=mesh["dp"].get_group())
    worst = torch.tensor([peak_memory_gib(loss.device), since["data_s"]], device=loss.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    (peak_mem_gib, data_s), loss, grad_norm = worst.tolist(), loss.item() / dp, grad_norm.item()
    steps, seconds = step - since["step"], time.perf_counter() - since["time"]
    tokens, mfu = args.global_batch_size * args.seq_length, None
    if peak := peak_flops(model.device, args.dtype):
        flops = flops_per_token(model, args.seq_length) * tokens * steps
        mfu = round(flops / seconds / world_size / peak, 4)
    return {
        "step": step, "epoch": round(step * args.global_batch_size / since["rows"], 4),
        "loss": loss, "grad_norm": grad_norm, "lr": since["lr"], "tokens": step * tokens,
        "tokens_per_s": round(steps * tokens / seconds, 1), "step_s": round(seconds / steps, 5),
        "data_s": round(data_s / steps, 5), "mfu": mfu, "peak_mem_gib": round(peak_mem_gib, 3),
        "world_size": world_size, "dp": dp, "tp": tp,
    }  # fmt: skip


def train(
    args, model, optimizer, data: dict, mesh: DeviceMesh, experiment: Experiment, start_step=0
) -> dict:
    """Run the optimizer steps after `start_step`, to the end or until asked to stop.

    Returns the last row of metrics, with "val_loss" after the last step. Raises ValueError on every
    rank if a gradient is not finite or a file cannot be written.
    """
    experiment.clean_up(start_step)
    dp_mesh, num_rows, total = mesh["dp"], len(data["train"]), args.total_steps
    bar = tqdm(initial=start_step, total=total, unit="step", disable=dist.get_rank() != 0)
    since = {"step": start_step, "time": time.perf_counter(), "data_s": 0.0, "rows": num_rows}
    first_bad = torch.zeros((), device=model.device)  # step whose gradient was not finite
    step, row = start_step, {}
    while True:
        last = step == total
        if step and (last or (args.eval_freq and step % args.eval_freq == 0)):
            experiment.finish_save()  # what is trained is safe before anything that can fail
            begin = time.perf_counter()
            val_loss = evaluate(model, data["validation"], args.batch_size, dp_mesh)
            experiment.record({"step": step, "val_loss": val_loss})
            since["time"] += time.perf_counter() - begin
            row |= {"val_loss": val_loss} if last else {}
        if last:
            break
        step += 1
        begin = time.perf_counter()
        rows = global_batch_rows(step - 1, args.global_batch_size, num_rows, args.seed)
        rows = micro_batches(rows, args.batch_size, dp_mesh.get_local_rank(), dp_mesh.size())
        batches = [load_batch(data["train"], r, model.device) for r in rows]
        since["data_s"] += time.perf_counter() - begin
        since["lr"] = learning_rate(step - 1, args.lr, args.warmup_steps, total)
        for group in optimizer.param_groups:
            group["lr"] = since["lr"]
        loss, grad_norm = train_step(model, optimizer, batches, args.max_grad_norm)
        first_bad = torch.where((first_bad == 0) & ~grad_norm.isfinite(), step, first_bad)
        bar.update()
        stop, failed = experiment.decide()
        experiment.finish_save(wait=False)
        save = step == total or stop or step % args.ckpt_freq == 0
        log = step in (1, total) or step % args.log_freq == 0
        if (log or save) and (bad := int(first_bad.item())):
            experiment.finish_save()
            raise ValueError(
                f"the gradient was not finite at step {bad}; at step {step} its norm is "
                f"{grad_norm.item()}, the loss {loss.item()}. Nothing was saved since"
            )
        if log:
            row = metrics_row(args, model, mesh, step, since, loss, grad_norm)
            experiment.record(row)
            loss, rate, memory = row["loss"], row["tokens_per_s"], row["peak_mem_gib"]
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s, {memory:.2f} GiB")
            since |= {"step": step, "time": time.perf_counter(), "data_s": 0.0}
        if save:
            tokens = step * args.global_batch_size * args.seq_length
            run = {"step": step, "tokens": tokens, "dp": mesh.shape[0], "tp": mesh.shape[1]}
            experiment.save(model, optimizer, run)
        if failed or (stop and step < total):
            break
    bar.close()
    experiment.finish_save()
    experiment.decide()  # the last vote is still on its way; the one after it knows of this save
    if experiment.decide()[1]:
        raise ValueError(experiment.problem or "")
    return row | {"step": step}


# ---- The job -----------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EVAL_SEQUENCES = 128
EXPORT_FILE_BYTES = 5 * 10**9
BUILT_IN_STEPS = 180
DATA_TIMEOUT = timedelta(hours=4)  # how long the other ranks wait for a dataset to be tokenized


def init_distributed(device_type: str | None) -> torch.device:
    """Join the job torchrun describes, or make one of this process alone; returns its device."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(alone if "RANK" not in os.environ else {})
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type != "cpu" and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
    else:
        backend, device = "gloo", torch.device("cpu")
    # Ranks that torchrun started again must not read what the ones before left in the store; with
    # --master-port, not c10d's rendezvous, it is the same store and they would hang (torch 2.13).
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


def stop_if(problems: list[str], group: dist.ProcessGroup) -> None:
    """Exit every rank with code 1 if any has problems; rank 0 prints each of them once."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems, group)
    if any(gathered):
        if dist.get_rank() == 0:
            found = dict.fromkeys(filter(None, itertools.chain(*gathered)))
            print("", *found, sep="\nerror: ", file=sys.stderr, flush=True)
        dist.barrier(group)  # torchrun ends rank 0 as soon as another rank has failed
        sys.exit(1)


def check_args(args, config: PretrainedConfig, device: torch.device, tokenizer) -> list[str]:
    """Everything that is wrong with the command line, with values that would work."""
    problems, world_size, path = [], dist.get_world_size(), Path(args.dataset_name or "")
    limit, config_values = config.max_position_embeddings, config.to_dict().items()
    for name, value in vars(args).items():
        least = 0 if name in ("warmup_steps", "weight_decay", "seed", "eval_freq") else 1e-12
        if type(value) in (int, float) and not least <= value < math.inf:
            needs = "more than 0" if least else "0 or more"
            problems.append(f"--{name.replace('_', '-')} must be {needs}, not {value}")
    for name, known in {"device": ["cpu", "cuda"], "dtype": list(DTYPES)}.items():
        if getattr(args, name) not in [None, *known]:
            problems.append(f"--{name} {getattr(args, name)} is not one of {', '.join(known)}")
    if args.device == "cuda" and device.type == "cpu":
        problems.append(
            f"--device cuda, but a node has {torch.cuda.device_count()} GPUs for its "
            f"{os.environ.get('LOCAL_WORLD_SIZE', 1)} ranks; use a rank per GPU, or --device cpu"
        )
    if (path.suffix in FORMATS or path.is_absolute()) and not path.exists():
        problems.append(f"--dataset-name {path} does not exist")
    elif path.is_file() and path.stat().st_size == 0:
        problems.append(f"--dataset-name {path} is empty")
    if args.export_only and not args.experiment_name:
        problems.append("--export-only needs the -e NAME of a run")
    if args.seq_length > limit:
        problems.append(f"--seq-length {args.seq_length} is more than the model's {limit}")
    if (ids := len(tokenizer)) > config.vocab_size:
        problems.append(f"the tokenizer has {ids} ids, the model's vocabulary {config.vocab_size}")
    if tokenizer.eos_token_id is None:
        problems.append("the tokenizer has no end token to put between documents")
    if drop := {k: v for k, v in config_values if "drop" in k and isinstance(v, float) and v}:
        problems.append(f"config.json has {drop}; only 0 is the same training on every layout")
    if min(args.tp, args.batch_size, args.global_batch_size or 1) > 0:
        try:
            check_layout(config, world_size, args.tp)
        except ValueError as error:
            problems.append(str(error))
        unit = args.batch_size * max(1, world_size // args.tp)
        if (size := args.global_batch_size or unit) % unit:
            problems.append(f"--global-batch-size {size} is not a multiple of batch size x dp = "
                            f"{unit}; {math.ceil(size / unit) * unit} is")  # fmt: skip
    return problems


def first_on_node(what: str, make, group: dist.ProcessGroup):
    """`make()`, called on one rank of each node and then on the others, which find its cache.

    If it raises OSError or ValueError, all ranks stop with its message on `what`.
    """
    for turn in (True, False):
        problems = []
        if turn == (os.environ["LOCAL_RANK"] == "0"):
            try:
                result = make()
            except (OSError, ValueError) as error:
                problems.append(f"{what}: {error}")
        stop_if(problems, group)
    return result


def announce(args, model: nn.Module, mesh: DeviceMesh, run: dict) -> str:
    """What is going to happen, after what a checkpoint's `run` has done before."""
    (dp, tp), text, steps = mesh.shape, "", args.total_steps
    if run:
        text = f"resuming after step {run['step']}, saved on {run['dp']} dp x {run['tp']} tp\n"
        if (old := run["settings"]["total_steps"]) < steps:
            rate = learning_rate(run["step"], args.lr, args.warmup_steps, steps)
            text += f"extended from {old} to {steps} steps, which the cosine now spans: "
            text += f"the learning rate goes from {0.1 * args.lr:.3g} to {rate:.3g}\n"
    if int(os.environ.get("LOCAL_WORLD_SIZE", tp)) % tp:
        text += "warning: tp groups span nodes, so every layer waits for the network between them\n"
    return text + (
        f"{model.config.model_type}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{args.dtype}, on {dp * tp} {mesh.device_type} ranks = {dp} dp x {tp} tp; global batch "
        f"{args.global_batch_size} = {args.batch_size} sequences x {dp} dp x "
        f"{args.global_batch_size // (args.batch_size * dp)} accumulation; {steps} steps, "
        f"{steps * args.global_batch_size * args.seq_length:,} tokens"
    )


def run_settings(args, config: PretrainedConfig, rows: datasets.Dataset) -> dict:
    """What has to stay the same for a checkpoint to be the same training."""
    names = (
        "seq_length global_batch_size seed lr warmup_steps weight_decay max_grad_norm total_steps"
    )
    sample = [rows[i]["input_ids"].tolist() for i in range(0, len(rows), 1 + len(rows) // 8)]
    digest = hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:8]
    settings = {name: getattr(args, name) for name in names.split()}
    settings["dataset"] = f"{args.dataset_name or 'built in'}, {len(rows)} sequences, {digest}"
    unrelated = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    model = {f"model.{k}": v for k, v in config.to_dict().items() if k not in unrelated}
    return settings | model


def main(args: argparse.Namespace) -> None:
    """Train as `args` says; every rank calls this once. Exits with 1 if flags or data are bad."""
    begin, device = time.perf_counter(), init_distributed(args.device)
    rank0 = dist.get_rank() == 0
    control = dist.new_group(backend="gloo", timeout=DATA_TIMEOUT)
    if not rank0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()  # the hub's, too
    config, tokenizer, weights = built_in_config(), transformers.ByT5Tokenizer(extra_ids=125), None
    if args.model_name:
        find = functools.partial(find_model, args.model_name, args.random_init)
        config, tokenizer, weights = first_on_node(f"-m {args.model_name}", find, control)
    stop_if(check_args(args, config, device, tokenizer), control)

    mesh = build_mesh(device.type, args.tp)
    dp = mesh["dp"].size()
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    args.global_batch_size = args.global_batch_size or args.batch_size * dp
    name = args.dataset_name
    load = functools.partial(
        load_data, name, args.dataset_subset, args.text_column, tokenizer, args.seq_length
    )
    data = first_on_node(f"dataset {name or 'built in'}", load, control)
    if not (args.model_name or name or args.num_epochs or args.max_steps):
        args.max_steps = BUILT_IN_STEPS
    steps = math.ceil((args.num_epochs or 1) * len(data["train"]) / args.global_batch_size)
    args.total_steps = min(steps, args.max_steps or steps)
    if args.warmup_steps is None:
        args.warmup_steps = args.total_steps // 20

    folder = Path(args.save_dir, args.experiment_name) if args.experiment_name else None
    settings = run_settings(args, config, data["train"])
    experiment, problems = Experiment(folder, settings, args.keep_checkpoints, control), []
    try:
        recompute, dtype = args.activation_checkpointing, DTYPES[args.dtype]
        model = build_model(config, mesh, dtype, args.seed, weights, recompute, args.compile)
        optimizer = build_optimizer(model, args.weight_decay)
        run = experiment.resume(model, optimizer)
        if rank0:
            print(announce(args, model, mesh, run), file=sys.stderr, flush=True)
        if args.export_only and not run:
            raise ValueError(f"--export-only: {folder} has no checkpoint")
        experiment.listen()
        if args.export_only:
            row = {"step": run["step"]}
        else:
            row = train(args, model, optimizer, data, mesh, experiment, run.get("step", 0))
        if folder and (args.export_only or row["step"] == args.total_steps):
            dtype = config.dtype or torch.float32
            try:
                export_model(model, tokenizer, dtype, folder / "export", control)
            except (OSError, dcp.CheckpointException) as error:
                problems.append(f"the export failed: {explain(error)}")
    except ValueError as error:  # one that all ranks raise
        problems.append(str(error))
    stop_if(problems, control)

    if rank0:
        where = f"results in {folder}" if folder else "nothing written, -e NAME keeps results"
        text = f"{row['step']} steps, {time.perf_counter() - begin:.0f} s; {where}"
        if args.export_only:
            text = f"exported after {text}"
        elif row["step"] < args.total_steps:
            text = f"stopped as asked after {text}; the same command goes on from a checkpoint"
        elif "loss" in row:
            text = f"training loss {row['loss']:.3f}, validation loss {row['val_loss']:.3f}; {text}"
        print(text, file=sys.stderr, flush=True)
    dist.destroy_process_group()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and one message if it cannot be parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    if os.environ.get("RANK", "0") != "0":  # rank 0 speaks, and needs time before torchrun ends it
        parser._print_message = lambda *message: time.sleep(10)
    add, flag = parser.add_argument, {"action": "store_true"}
    # fmt: off
    add("--tp", "-tp", "--tensor-parallel", type=int, default=1,
        help="ranks that share one copy of each layer; the rest is data parallel (1)")
    add("-m", "--model-name", help="hub id or directory of a Hugging Face causal LM (built in)")
    add("--random-init", **flag, help="only configuration and tokenizer of -m; train from scratch")
    add("-d", "--dataset-name", help="hub id, local directory, or .txt, .jsonl, .json, .parquet or "
        ".csv file (the source code of Python's standard library)")
    add("--dataset-subset", help="configuration of a hub dataset (none)")
    add("--text-column", help="column with the text, where that is not clear (text)")
    add("-s", "--seq-length", type=int, help="tokens per sequence (256; 1024 with -m)")
    add("-b", "--batch-size", type=int, help="sequences per dp rank and forward pass; lower it if "
        "you run out of memory (4; 1 with -m)")
    add("--global-batch-size", type=int, help="sequences per optimizer step over all ranks; "
        "gradient accumulation follows from it (batch size x dp)")
    add("--num-epochs", type=int, help="passes over the data (1)")
    add("--max-steps", type=int, help="end after so many optimizer steps, if the epochs do not end "
        f"before (none; {BUILT_IN_STEPS} for the built-in data)")
    add("--lr", type=float, help="peak learning rate (0.003; 0.00003 with -m)")
    add("--warmup-steps", type=int, help="linear warmup (a twentieth of all steps)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, on matrices only (0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm (1.0)")
    add("--seed", type=int, default=0, help="of initial weights and data order (0)")
    add("--dtype", help="bf16 or fp32, for computing; weights stay fp32 (bf16 on CUDA, else fp32)")
    add("--compile", **flag, help="torch.compile each layer: a slow first step, fast ones after it")
    add("--activation-checkpointing", **flag, help="compute each layer again in the backward pass "
        "instead of keeping its activations")
    add("-e", "--experiment-name", help="keep results under this name (keep none)")
    add("--save-dir", default="outputs", help="where experiments go (outputs)")
    add("--export-only", **flag, help="write export/ from the newest checkpoint of -e, and end")
    add("--log-freq", type=int, default=10, help="steps between metrics (10)")
    add("--eval-freq", type=int, default=0, help="steps between evaluations (0: one at the end)")
    add("--ckpt-freq", type=int, default=500, help="steps between checkpoints (500)")
    add("--keep-checkpoints", type=int, default=2, help="how many of the newest stay (2)")
    add("--device", help="cuda or cpu (cuda when there is one)")
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
    folder = Path(args.save_dir, args.experiment_name or "") / "checkpoints"
    saved = sorted(folder.glob("step-*")) if args.experiment_name else []
    text = "nothing was saved"
    if saved:
        ranks = os.environ.get("LOCAL_WORLD_SIZE")
        command = [*(["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]), *sys.argv]
        text = f"the newest checkpoint is {saved[-1]}; this goes on from it:\n{shlex.join(command)}"
    # Gloo has no exception of its own for a rank that is gone (torch 2.13).
    if isinstance(error, dist.DistError) or "onnection" in str(error):
        if os.environ["RANK"] == "0":
            reason = str(error).splitlines()[0]
            print(f"\nerror: rank 0 has lost another one: {reason}; {text}", file=sys.stderr)
        time.sleep(2)  # torchrun takes the rank that ends first for the cause
        return
    try:
        raise RuntimeError(text) from error
    except RuntimeError as told:
        if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            traceback.print_exc()
        elif dist.distributed_c10d._get_default_store().add("failed", 1) == 1:  # not public
            get_error_handler().record_exception(told)
        else:
            Path(file).with_name("traceback.txt").write_text(traceback.format_exc())
            time.sleep(2)


if __name__ == "__main__":
    args = parse_args()
    try:
        main(args)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        report(error, args)
        code = 1
    # Leave without Python's finalization. A gloo thread that drops the last reference to a tensor
    # after it has begun would now and then abort the process, with all work done (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
