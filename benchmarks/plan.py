"""Which layout fits your cluster? Memory and traffic of every tp, on a laptop, without weights.

    python benchmarks/plan.py -m llama-3.1-70b --ranks 512 -s 8192
    python benchmarks/plan.py -m DIRECTORY_OR_HUB_ID --ranks 8 --memory-gib 24

It runs rank 0 of the script's own model, plan and training step in a fake process group on fake
tensors, which have shapes but no data, and keeps account of every storage and every collective.
Models of 2 and 3 layers and two batch sizes give the rest, since memory and traffic are linear in
layers and tokens: on one line while the loss takes one chunk of tokens, on another after that.
Not in the account: what the allocator loses to fragments, and the buffers of CUDA and NCCL. The
largest batch and the longest sequence leave --reserve-gib for them.
"""

import argparse
import bisect
import copy
import functools
import gc
import json
import math
import multiprocessing
import os
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from common import ROOT, caption, environment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_llm as script

PRESETS = {  # the sizes that matter here, from the models' config.json
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, False),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256, False),
}
MIXTURES = {
    "qwen3-30b-a3b": transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=40960,
    ),
    "gpt-oss-20b": transformers.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
}  # fmt: skip
GIB = 2**30


def llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    tied: bool = False,
) -> transformers.LlamaConfig:  # fmt: skip
    """A Llama of these sizes."""
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=131072, pad_token_id=None,
        head_dim=128 if hidden > 2048 else hidden // heads,
    )  # fmt: skip


class Account(TorchDispatchMode):
    """Bytes alive now and at most, in each phase of a step, and what each collective sends.

    A ring sends (n - 1) / n of the whole tensor in an all-gather or a reduce-scatter over n ranks,
    twice that in an all-reduce (Thakur et al. 2005, Optimization of collective communication
    operations in MPICH).
    """

    def __init__(self, dp: int, tp: int):
        super().__init__()
        self.live, self.phase, self.peak, self.start, self.off = {}, "build", {}, {}, False
        self.sizes, self.sent = {"dp": dp, "tp": tp}, {"dp": 0.0, "tp": 0.0}
        self.collectives, self.gathered = {}, []

    def __enter__(self):
        # To find an output's shape, DTensor runs an operator on fakes of the global shape.
        self.original = infer = ShardingPropagator._propagate_tensor_meta_non_cached

        def infer_unseen(*args, **kwargs):
            self.off = True
            try:
                return infer(*args, **kwargs)
            finally:
                self.off = False

        ShardingPropagator._propagate_tensor_meta_non_cached = infer_unseen
        return super().__enter__()

    def __exit__(self, *error):
        ShardingPropagator._propagate_tensor_meta_non_cached = self.original
        return super().__exit__(*error)

    def now(self) -> int:
        """Bytes alive; FSDP frees and allocates in place, so sizes are read anew."""
        return sum(storage.nbytes() for ref in list(self.live.values()) if (storage := ref()))

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase, self.start[phase] = phase, self.now()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # see the local tensors instead
        out = func(*args, **kwargs or {})
        if self.off:
            return out
        if "c10d" in func.namespace:
            self.count(func, args, out)
        grown = False
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if id(storage) not in self.live:
                    grown = True
                    forget = functools.partial(self.live.pop, id(storage))
                    self.live[id(storage)] = weakref.ref(storage, forget)  # default of pop: the ref
        if grown:
            self.peak[self.phase] = max(self.peak.get(self.phase, 0), self.now())
        return out

    def count(self, func, args, out) -> None:
        """Add a collective: FSDP's are c10d's own, over dp; DTensor's are functional, over tp."""
        name = func.__name__.split(".")[0]
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            dim, whole, times = "dp", args[name == "_reduce_scatter_base_"], 1
            self.gathered += [whole.nbytes] if name == "_allgather_base_" else []
        elif name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            dim, times = "tp", 1 + (name == "all_reduce")
            whole = out if name == "all_gather_into_tensor" else args[0]
            if whole.numel() == 1:  # the gradient norm's, over both
                dim = None
        elif name == "allreduce_":  # the number of labels
            dim = None
        else:
            return
        self.collectives[name] = self.collectives.get(name, 0) + 1
        if dim:
            n = self.sizes[dim]
            self.sent[dim] += times * whole.nbytes * (n - 1) / n


def trace(config, tp: int, shape: tuple, dtype: str, recompute: bool, micro: int) -> Account:
    """The account of rank 0 of the current (fake) process group for one training step.

    The step has `micro` micro-batches of `shape`, which is (B, S).
    """
    mesh = script.build_mesh("cpu", tp)
    model = script.shard_model(config, mesh, script.DTYPES[dtype], recompute, False)
    account, layers = Account(mesh["dp"].size(), tp), model.base_model.layers

    def watch(layer, entering: str, leaving: str | None) -> None:
        """Change the phase when the gradient of the layer's output arrives, and after forward."""

        def after(module, args, out):
            if account.phase == "forward":
                out.register_hook(lambda _: account.enter(entering))
                if leaving:
                    account.enter(leaving)

        layer.register_forward_hook(after)

    for layer in list(layers)[1:-1]:
        watch(layer, "backward, between", None)
    watch(layers[0], "backward, first layer", None)
    watch(layers[-1], "backward, last layer", "head and loss")
    with FakeTensorMode(allow_non_fake_inputs=True), account:
        model.to_empty(device="cpu")
        optimizer = script.build_optimizer(model, 1e-3, 0.1)
        optimizer.register_step_pre_hook(lambda *_: account.enter("optimizer"))
        model.register_forward_pre_hook(lambda *_: account.enter("forward"))
        ids = torch.zeros(shape, dtype=torch.int64)
        script.train_step(model, optimizer, [(ids, ids)] * micro, 1.0, mesh["dp"])
        account.enter("end")
    account.parameters = sum(p.to_local().nbytes for p in model.parameters())  # gradients: as many
    account.moments = 2 * account.parameters
    account.unit = max(account.gathered, default=0)  # with dp 1 nothing is gathered
    return account


def at(traces: dict, value, layers: int, batch: float) -> float:
    """A value, linear in layers and in batch, from traces of 2 and 3 layers and of two batches."""
    v = {key: value(account) for key, account in traces.items()}
    few, more = sorted({batch for _, batch in traces})
    per_layer, per_row = v[3, few] - v[2, few], (v[2, more] - v[2, few]) / (more - few)
    both = (v[3, more] - v[2, more] - per_layer) / (more - few)
    m, n = layers - 2, batch - few
    return v[2, few] + m * per_layer + n * per_row + m * n * both


def shallow(config, layers: int):
    """The same model with fewer layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def chunk_tokens(config, tp: int, dtype: str) -> int:
    """The most tokens of a rank whose logits are one chunk."""
    return script.CHUNK_BYTES // (-(-config.vocab_size // tp) * script.DTYPES[dtype].itemsize)


def predict(
    config, tp: int, seq_length: int, batch: int, dtype: str, recompute: bool, micro: int = 1
) -> dict:
    """What one rank of the current process group needs in a training step, in bytes.

    "peak" is a function of the batch size: bytes alive at the worst moment. It may be a fraction,
    for a part of the tokens. The step has `micro` micro-batches of `batch`; from the second on, the
    gradients of those before are there, so that all after it need the memory of the second.
    """
    layers, chunk = config.num_hidden_layers, chunk_tokens(config, tp, dtype)

    @functools.cache
    def traced(one_chunk: bool) -> dict:
        """Traces by layers and batch: of one chunk of tokens, or of 3 and of 4."""
        if one_chunk:
            points = {1: (1, seq_length), 2: (2, seq_length)}
        else:  # of fewer tokens than `seq_length`, because every chunk takes time
            lengths = [-(-n * chunk // (16 * tp)) * 8 * tp for n in (3, 4)]
            points = {2 * length / seq_length: (2, length) for length in lengths}
        return {
            (n, key): trace(shallow(config, n), tp, shape, dtype, recompute, min(micro, 2))
            for n in (2, 3) for key, shape in points.items()
        }  # fmt: skip

    def traces(batch: float) -> dict:
        """The ones on the line of `batch`; two chunks count as three, whose sum is in fp32, too."""
        return traced(batch * seq_length <= chunk)

    def value(get, batch: float = batch, layers: int = layers) -> int:
        return round(at(traces(batch), get, layers, batch))

    def peak(batch: float) -> int:
        def in_phase(phase: str, layers: int = layers) -> int:
            # In the traced first step there are no moments before the optimizer steps.
            held = phase != "optimizer"
            return value(lambda a: a.peak[phase] + held * a.moments, batch, layers)

        ends = "backward, last layer", "backward, first layer"
        # 2 layers have none between, so its growth is the faster one of its neighbours'.
        three = {b: a.peak["backward, between"] + a.moments
                 for (n, b), a in traces(batch).items() if n == 3}  # fmt: skip
        few, more = sorted(three)
        growth = max(in_phase(phase) - in_phase(phase, 3) for phase in ends)
        between = three[few] + (batch - few) * (three[more] - three[few]) / (more - few) + growth
        return round(max(between, *map(in_phase, ("forward", "head and loss", *ends, "optimizer"))))

    return {
        "dp": dist.get_world_size() // tp, "tp": tp, "recompute": recompute, "peak": peak,
        "batch_size": batch, "micro_batches": micro,
        "parameters": value(lambda a: a.parameters), "gradients": value(lambda a: a.parameters),
        "optimizer": value(lambda a: a.moments), "largest_unit": value(lambda a: a.unit),
        # Gradients of the micro-batches before are there at both times.
        "activations": value(lambda a: a.start["head and loss"] - a.start["forward"]),
        "logits_and_loss": value(lambda a: a.peak["head and loss"] - a.start["head and loss"]),
        "collectives": {
            name: value(lambda a, name=name: a.collectives[name])
            for name in next(iter(traces(batch).values())).collectives
        },
        **{f"sent_{dim}": value(lambda a, dim=dim: a.sent[dim] * micro / min(micro, 2))
           for dim in ("tp", "dp")},
    }  # fmt: skip


def row_of(tp: int, recompute: bool, config, args) -> dict:
    """The row of one tp, without or with recomputation; run in a process of its own.

    "tokens_per_s" is an estimate per GPU at "best_batch", the largest batch that fits: the longer
    of computing and of FSDP's traffic, which hide each other, and after it TP's traffic, which
    nothing hides. It rests on the rates in `args`, not on a measurement.
    """
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    gc.disable()  # it would look at a step's tensors again and again, and find no garbage
    s, dp, micro = args.seq_length, args.ranks // tp, args.micro_batches
    batch = args.batch_size or args.sequences // dp
    row = predict(config, tp, s, batch, args.dtype, recompute, micro)
    peak, chunk = row["peak"], chunk_tokens(config, tp, args.dtype)
    room = (args.memory_gib - args.reserve_gib) * GIB
    # A step's memory depends on the tokens of a rank, in one sequence or in several. What fits is
    # looked for on the line of many chunks first, since the one of one chunk needs other traces.
    unit = math.gcd(s, 128)
    many = chunk // unit + 1
    ends = (many, 2**32) if peak(many * unit / s) <= room else (0, many - 1)
    tokens = unit * bisect.bisect_right(range(1, 2**32 + 1), room, *ends,
                                        key=lambda n: peak(n * unit / s))  # fmt: skip
    row |= {"peak": peak(batch), "tokens_per_s": 0.0, "largest_batch": tokens // s}
    row["longest_sequence"] = tokens // 128 * 128
    most = args.global_batch_size // dp if args.global_batch_size else 2**24
    row["best_batch"] = best = min(most, row["largest_batch"])
    if best:
        # Each of the tp FSDP groups has its share of a node's network cards.
        between = args.dp_gbs * args.node_size / tp if args.ranks > args.node_size else math.inf
        dp_gbs = min(args.tp_gbs, between)
        compute_s = args.flops * (1 + recompute / 3) * best * s / tp / (args.tflops * 1e12)
        # Each micro-batch computes and sends as much as the others.
        tp_s = row["sent_tp"] / micro * best / batch / (args.tp_gbs * 1e9)
        step_s = max(compute_s, row["sent_dp"] / micro / (dp_gbs * 1e9)) + tp_s
        row["tokens_per_s"] = best * s / tp / step_s
    return row


def legal_tps(config, ranks: int, most: int) -> list[int]:
    """Every tp up to `most` that divides this model on so many ranks."""
    found = []
    for tp in range(1, min(ranks, most) + 1):
        try:
            script.check_layout(config, ranks, tp)
            found.append(tp)
        except script.UserError:
            pass
    return found


def recommend(rows: list[dict], args) -> str:
    """The layout to take, and why."""
    fits = [row for row in rows if row["best_batch"]]
    if not fits:
        least = min(rows, key=lambda row: row["peak"])
        return (
            f"Nothing fits {args.memory_gib:g} GiB: with -b {least['batch_size']} the least is "
            f"{least['peak'] / GIB:.1f} GiB, with --tp {least['tp']}. Use more ranks, a shorter "
            "sequence, or a larger global batch."
        )

    def flags(row: dict) -> str:
        again = " --activation-checkpointing" * row["recompute"]
        return f"--tp {row['tp']} -b {row['best_batch']}{again}"

    best, *others = sorted(fits, key=lambda row: -row["tokens_per_s"])
    text = f"{flags(best)}: about {best['tokens_per_s']:,.0f} tokens/s per GPU"
    if others:
        text += f"; next {flags(others[0])} with {others[0]['tokens_per_s']:,.0f}"
    no_room = sorted({row["tp"] for row in rows if not row["largest_batch"]} - {best["tp"]})
    text += f". Without room for one sequence: tp {no_room}" if no_room else ""
    return text + (
        f". Estimated from {args.tflops:g} TFLOP/s, {args.tp_gbs:g} GB/s in a node and "
        f"{args.dp_gbs:g} GB/s between nodes per GPU, each layout with the largest batch that fits "
        f"and leaves {args.reserve_gib:g} GiB."
    )


def table(rows: list[dict]) -> str:
    """The rows as Markdown, in GiB; what is sent is per rank and step."""
    head = [
        "dp x tp", "-b", "recompute", "parameters", "gradients", "optimizer", "largest unit",
        "activations", "logits, loss", "**peak**", "sent over tp", "over dp", "largest -b",
        "longest -s with -b 1",
    ]  # fmt: skip
    names = [
        "parameters", "gradients", "optimizer", "largest_unit", "activations", "logits_and_loss",
        "peak",
    ]  # fmt: skip
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        gib = [f"{row[name] / GIB:.2f}" for name in names]
        sent = [f"{row[name] / GIB:.2f}" for name in ("sent_tp", "sent_dp")]
        layout = f"{row['dp']} x {row['tp']}"
        again = "yes" if row["recompute"] else "no"
        most = [f"{row[name]:,}" for name in ("largest_batch", "longest_sequence")]
        lines.append([layout, str(row["batch_size"]), again, *gib, *sent, *most])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(args) -> tuple[str, list[dict]]:
    """The table of one model and cluster with a recommendation, as Markdown, and its rows."""
    if args.model in PRESETS:
        config = llama(*PRESETS[args.model])
    elif args.model in MIXTURES:
        config = MIXTURES[args.model]
    elif args.model.count(",") >= 5:
        *sizes, last = args.model.split(",")
        sizes = [int(size) for size in (sizes if last == "tied" else [*sizes, last])]
        config = llama(*sizes, tied=last == "tied")
    else:
        config = transformers.AutoConfig.from_pretrained(args.model)
    tps = legal_tps(config, args.ranks, args.node_size)
    if args.global_batch_size:
        least = args.batch_size or 1
        tps = [tp for tp in tps if args.ranks // tp * least <= args.global_batch_size]
    if not tps:
        sys.exit(f"no tp up to {args.node_size} divides this model on {args.ranks} ranks")
    args.sequences = args.global_batch_size or args.ranks // min(tps)
    args.flops = script.flops_per_token(script.meta_model(config), args.seq_length)
    gc.freeze()  # what was imported is not looked at again, here and in the processes
    work = [(tp, recompute, config, args) for tp in tps for recompute in (False, True)]
    with multiprocessing.get_context("fork").Pool(min(len(tps), os.cpu_count())) as pool:
        rows = pool.starmap(row_of, work, chunksize=2)  # rows of a tp share caches of shapes
    each = f"{args.batch_size} per dp rank" if args.batch_size else f"{args.sequences} a step"
    what = f"{args.model} on {args.ranks} ranks, sequences of {args.seq_length} tokens, {each}"
    text = f"**{what}, {args.dtype}, GiB per rank**\n\n{table(rows)}\n\n"
    return text + recommend(rows, args), rows


PUBLISHED = [  # what docs/plan.md has
    "-m llama-3.1-8b --ranks 8 -s 1024",
    "-m llama-3.1-8b --ranks 8 -s 4096",
    "-m llama-3.1-70b --ranks 512 -s 8192 --global-batch-size 512",
    "-m llama-3.1-405b --ranks 16384 -s 8192 --global-batch-size 2048",
    "-m qwen3-30b-a3b --ranks 8 -s 4096",
    "-m qwen3-30b-a3b --ranks 16 -s 4096",
    "-m gpt-oss-20b --ranks 8 -s 4096",
    "-m gpt-oss-20b --ranks 16 -s 4096",
]


def main(argv: list[str] | None = None) -> None:
    """Print the table of one model and cluster, and a recommendation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-m", "--model", default="llama-3.1-8b", help=f"{', '.join(PRESETS | MIXTURES)}, a "
        "directory, a hub id, or HIDDEN,INTERMEDIATE,LAYERS,HEADS,KV_HEADS,VOCABULARY[,tied]"
    )  # fmt: skip
    add("--ranks", type=int, default=8, help="GPUs in all")
    add("--node-size", type=int, default=8, help="GPUs of a node: tp groups stay inside it")
    add("--memory-gib", type=float, default=80, help="of one GPU")
    add("-s", "--seq-length", type=int, default=4096)
    add("--reserve-gib", type=float, default=2, help="of it, for the allocator, CUDA and NCCL")
    add("-b", "--batch-size", type=int, help="sequences per dp rank (so many that a step has as "
        "many tokens on every layout)")  # fmt: skip
    add("--global-batch-size", type=int, help="sequences per step (one on each rank); leaves out "
        "layouts that need more")  # fmt: skip
    add("--micro-batches", type=int, default=1, help="of a dp rank and step: accumulation")
    add("--tflops", type=float, default=400, help="what a GPU reaches (400, an H100)")
    add("--tp-gbs", type=float, default=450, help="GB/s a GPU sends inside a node (450, NVLink 4)")
    add("--dp-gbs", type=float, default=50, help="GB/s a GPU sends between nodes (50, 400 Gbit/s)")
    add("--dtype", default="bf16", choices=list(script.DTYPES))
    add("--json", type=Path, help="also write the rows here")
    add("--publish", action="store_true", help="write the README's tables to docs/plan.md")
    args = parser.parse_args(argv)
    if not args.publish:
        text, rows = report(args)
        print(text)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    parts = []
    for command in PUBLISHED:
        begin = time.perf_counter()
        text, _ = report(parser.parse_args(command.split()))
        seconds = time.perf_counter() - begin
        print(text, flush=True)
        parts.append(f"{text}\n\n`python benchmarks/plan.py {command}`, {seconds:.1f} s")
    (ROOT / "docs" / "plan.md").write_text("\n\n".join([*parts, caption(environment())]) + "\n")


if __name__ == "__main__":
    main()
