"""What trains the wrong thing without a word, reproduced: python benchmarks/traps.py (4 CPU ranks).

Each is reproduced with tiny models in fp32 beside plain transformers in one process, and what it
does is written to traps.json and traps.md.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from common import ROOT, caption, environment, markdown, torchrun


def qk_norm(mesh, ids) -> tuple[str, str, str]:
    """Qwen3's q_norm left out of the plan: each rank has the gradient of its own heads only."""
    import torch

    import train_llm as script
    from test_models import config_of
    from test_parity import distance, gradient_norm, plain_model, plain_step

    config = config_of("Qwen3", num_key_value_heads=4)
    plain = plain_model(config)
    grads = plain_step(plain, torch.optim.SGD(plain.parameters(), 0.0), ids, clip=1e9)[2]
    name, layer_plan = "model.layers.0.self_attn.q_norm.weight", script.layer_plan
    errors = []
    for mended in (False, True):
        model = plain_model(config)
        if not mended:
            script.layer_plan = lambda layer: {
                n: style for n, style in layer_plan(layer).items() if "q_norm" not in n
            }
        try:
            script.apply_tp(model, mesh)
        except ValueError as error:  # this script refuses what another one would train
            assert "q_norm" in str(error)
        finally:
            script.layer_plan = layer_plan
        gradient_norm(model, ids)
        grad = model.get_parameter(name).grad
        errors.append(distance(grad.full_tensor() if mended else grad, grads[name]))
    return errors


def router(mesh, ids) -> list[float]:
    """Each rank runs its own experts, and keeps what its router gets from them as the gradient."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate

    import train_llm as script
    from test_models import config_of
    from test_parity import distance, gradient_norm, plain_model, plain_step

    config = config_of("Mixtral")
    plain = plain_model(config)
    grads = plain_step(plain, torch.optim.SGD(plain.parameters(), 0.0), ids, clip=1e9)[2]
    name, to_local = "model.layers.0.mlp.gate.weight", DTensor.to_local

    def without_sum(weight, grad_placements=None):
        if isinstance(weight, torch.nn.Parameter) and weight.placements[0].is_replicate():
            grad_placements = [Replicate()]
        return to_local(weight, grad_placements=grad_placements)

    errors = []
    for mended in (False, True):
        model = plain_model(config)
        script.apply_experts(model, mesh)
        script.apply_tp(model, mesh)
        DTensor.to_local = to_local if mended else without_sum
        try:
            gradient_norm(model, ids)
        finally:
            DTensor.to_local = to_local
        grad = model.get_parameter(name).grad
        errors.append(distance(grad.full_tensor() if mended else grad.to_local(), grads[name]))
    return errors


def compiled_embedding(mesh) -> tuple[bool, bool]:
    """Whether a TP embedding gets a gradient from a compiled layer, by what enters the layer: a
    local tensor, or a DTensor."""
    import torch
    from torch import nn
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    class Layer(nn.Module):  # compiling a module of torch.nn itself does nothing
        def forward(self, x):
            return x.sin()

    found = []
    for local in (True, False):
        embed, layer = nn.Embedding(96, 48), Layer()
        plan = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=local
        )
        parallelize_module(embed, mesh, plan)
        layer.compile()
        out = layer(embed(torch.arange(32)[None]))
        if out.requires_grad:
            out.sum().backward()
        found.append(embed.weight.grad is not None)
    return found


def compiled_evaluation(mesh, ids) -> list[str]:
    """What a compiled model does without autograd if the embedding's reduce-scatter is still
    pending when it enters the first layer, and as apply_tp leaves it."""
    import torch
    from torch._inductor.utils import fresh_cache  # each compiles as for the first time

    import train_llm as script
    from test_parity import llama, plain_model

    found = []
    for mended in (False, True):
        model = plain_model(llama())
        script.apply_tp(model, mesh)
        if not mended:
            model.get_input_embeddings()._forward_hooks.popitem()  # apply_tp's last one: the copy
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile()
        try:
            with fresh_cache(), torch.no_grad(), script.loss_parallel():
                loss = model(ids, labels=ids, use_cache=False).loss
            found.append(f"{loss.full_tensor().item():.6f}")
        except AttributeError as error:
            found.append(f"AttributeError: {error}")
    with torch.no_grad():
        found.append(f"{plain_model(llama())(ids, labels=ids).loss.item():.6f}")
    return found


def label_counts() -> list[float]:
    """First gradient norm, if each rank divides by its own number of labels; as here; plain."""
    import torch
    import torch.distributed as dist

    import test_parity as parity
    import train_llm as script

    mesh, config = script.build_mesh("cpu", 2), parity.llama()
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    labels, dp_mesh, all_reduce = parity.masked_labels(ids), mesh["dp"], dist.all_reduce
    rows = slice(4 * dp_mesh.get_local_rank(), 4 * dp_mesh.get_local_rank() + 4)
    found = []
    for own in (True, False):
        model = parity.build_model(config, mesh, torch.float32, 0)
        optimizer = script.build_optimizer(model, 0.0, 0.0)
        if own:
            dist.all_reduce = lambda count, **options: count.mul_(dp_mesh.size())
        _, norm = script.train_step(model, optimizer, [(ids[rows], labels[rows])], 1.0, dp_mesh)
        dist.all_reduce = all_reduce
        found.append(norm.item())
    plain = parity.plain_model(config, seed=0)
    optimizer = parity.plain_optimizer(plain)
    return [*found, parity.plain_step(plain, optimizer, ids, labels=labels)[1]]


def fresh_optimizer(folder: str) -> tuple[int, int]:
    """Moments that DCP loads into a fresh optimizer, given itself and through get_state_dict."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = fresh()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    dcp.save({"optimizer": optimizer}, checkpoint_id=f"{folder}/naive")
    state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state[1]}, checkpoint_id=f"{folder}/right")
    _, naive = fresh()
    dcp.load({"optimizer": naive}, checkpoint_id=f"{folder}/naive")
    model, right = fresh()
    weights, moments = get_state_dict(model, right)
    dcp.load({"optimizer": moments}, checkpoint_id=f"{folder}/right")
    set_state_dict(model, right, model_state_dict=weights, optim_state_dict=moments)
    return len(naive.state), len(right.state)


def work(folder: str) -> None:
    """What each rank does; rank 0 writes the results to `folder`."""
    import torch
    import torch.distributed as dist
    from torch.utils.data import DistributedSampler

    import train_llm as script
    from test_parity import tied_gradient_norms

    dist.init_process_group("gloo")
    mesh = script.build_mesh("cpu", 2)["tp"]
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    result = {"tied": tied_gradient_norms(mesh, ids), "qk_norm": qk_norm(mesh, ids)}
    result["router"] = router(mesh, ids)
    result["compiled_embedding"] = compiled_embedding(mesh)
    result["compiled_evaluation"] = compiled_evaluation(mesh, ids)
    result["label_counts"] = label_counts()
    result["fresh_optimizer"] = fresh_optimizer(folder)
    sampler = DistributedSampler(range(1000), num_replicas=2, rank=0)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(1)
    result["sampler"] = [first == second, first == list(sampler)]
    if dist.get_rank() == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


def table(result: dict) -> str:
    """The results as Markdown."""
    tied, qk, counts = result["tied"], result["qk_norm"], result["label_counts"]
    router = result["router"]
    has = {True: "a gradient", False: "no gradient (None)"}
    same = {True: "the same", False: "another"}
    rows = [
        ["tied embedding and head not tied again after TP: first gradient norm",
         *(f"{norm:.5f}" for norm in tied)],
        ["QK-norm left out of the plan: error of its gradient", f"{qk[0]:.2f}", f"{qk[1]:.0e}",
         "0"],
        ["a mixture's router, its gradient not summed over the ranks' experts: error of it",
         f"{router[0]:.2f}", f"{router[1]:.0e}", "0"],
        ["plain local tensors between compiled layers: the embedding gets",
         has[result["compiled_embedding"][0]], has[result["compiled_embedding"][1]], has[True]],
        ["compiled layers after an embedding whose reduce-scatter is pending: validation loss",
         *(f"`{word}`" if "Error" in word else word for word in result["compiled_evaluation"])],
        ["each rank divides by its own number of labels: first gradient norm",
         *(f"{norm:.5f}" for norm in counts)],
        ["`dcp.load` into a fresh AdamW: parameters with moments", result["fresh_optimizer"][0],
         result["fresh_optimizer"][1], 2],
        ["`DistributedSampler` in the second epoch: order of the first",
         same[result["sampler"][0]], same[result["sampler"][1]], same[False]],
    ]  # fmt: skip
    return markdown(["silent bug", "with it", "this script", "one plain process"], rows)


def main(argv: list[str] | None = None) -> None:
    """Spring all traps, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--work", metavar="FOLDER", help="be a rank")
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work)
    with tempfile.TemporaryDirectory() as folder:
        torchrun(4, __file__, "--work", folder)
        result = json.loads(Path(folder, "result.json").read_text())
    result = {"environment": environment()} | result
    (args.out / "traps.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"{table(result)}\n\n{caption(result['environment'])}\n"
    (args.out / "traps.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
