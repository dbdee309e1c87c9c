"""What the README says is so: code, flags and links."""

import contextlib
import copy
import functools
import importlib.util
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import train_llm as script
from ranks import ROOT, Ranks, passes
from test_parity import LR, TOLERANCE, distance, llama, plain_model

README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "train_llm.py").read_text()


NAMES = ("running", "speed", "gpu", "troubleshooting", "others", "choosing")
PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in NAMES)]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)


def test_filled():
    """The marked parts are what docs/readme.py puts there."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    module, marks = importlib.util.module_from_spec(spec), 0
    spec.loader.exec_module(module)
    for page in module.PAGES:
        text = page.read_text()
        assert module.fill(text) == text, f"{page}: run python docs/readme.py"
        marks += text.count("<!-- end -->")
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- \S+\.(md|py|json)", text))
    assert marks >= 4


BLOCK, LOOP, DTENSOR = "def build_mesh(", "for epoch in range(EPOCHS)", "summands ="
CHUNKS, SHARDED = "chunk_loss(model)", "shard_model(config"


def block_with(text: str, language: str = "python") -> str:
    """The one block of the README that has `text` in it."""
    (found,) = [block for block in blocks(language) if text in block]
    return found


def added(diff: str) -> list[str]:
    """The lines that a diff adds."""
    return [line[1:] for line in diff.splitlines() if line.startswith("+")]


def test_code_is_the_scripts():
    """The block is filled from the script; the last step of the plan has its lines, too."""
    assert len(blocks("python")) == 5  # with the four that are run below
    lines = added(block_with("SequenceParallel", "diff"))
    assert len(lines) == 8 and set(lines) <= set(SCRIPT.splitlines()), lines


def test_dtensor(tmp_path):
    """The lines about DTensor print what the README says, on two ranks."""
    (tmp_path / "dtensor.py").write_text(block_with(DTENSOR))
    program = functools.partial(run_program, tmp_path / "dtensor.py", [])
    output = Ranks(2, program, tmp_path / "log").succeed()
    said = [line[2:] for line in block_with(DTENSOR).splitlines() if line.startswith("# ")]
    assert len(said) == 4 and "\n".join(said) in output, output


def steps() -> None:
    """The first two steps of the plan, each alone, have the loss and gradients of plain code."""
    first, second, _ = blocks("diff")
    ids = torch.randint(0, 96, (2, 31), generator=torch.Generator().manual_seed(0))
    plain, mesh = plain_model(llama()), script.build_mesh("cpu", 2)["tp"]
    loss = plain(ids, labels=ids).loss
    loss.backward()
    for with_second in (False, True):
        model, names = plain_model(llama()), dict(vars(script))
        for layer in model.model.layers:
            plan = eval("{" + "\n".join(added(first)) + "}", names)
            parallelize_module(layer, mesh, plan)
        if with_second:
            exec("\n".join(line.strip() for line in added(second)), names)
            parallelize_module(model.model.embed_tokens, mesh, names["ids_to_residual"])
            parallelize_module(model.lm_head, mesh, names["residual_to_logits"])
        with loss_parallel() if with_second else contextlib.nullcontext():
            found = model(ids, labels=ids).loss
            found.backward()
        found = found.full_tensor() if with_second else found
        assert abs(found.item() / loss.item() - 1) < 1e-6, with_second
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p, DTensor) else p.grad
            assert distance(grad, plain.get_parameter(name).grad) < TOLERANCE, (with_second, name)


def placements() -> None:
    """A weight has the placements that the README names, after TP and after FSDP."""
    model, mesh = plain_model(llama()), script.build_mesh("cpu", 2)
    weight, found = model.model.layers[0].mlp.up_proj, []
    script.apply_tp(model, mesh["tp"])
    found += [f"`{weight.weight.placements}`", str(tuple(weight.weight.to_local().shape))]
    script.apply_fsdp(model, mesh["dp"], torch.float32)
    found += [f"`{weight.weight.placements}`", str(tuple(weight.weight.to_local().shape))]
    (said,) = re.findall(r"`up_proj.weight` of 96 x 48 .*", README)
    assert re.findall(r"`\(.*?\)`|\(\d+, \d+\)", said) == found, found


def packed() -> None:
    """Documents in a row whose positions restart stay apart with the block, as the README says.

    `shard_model`, which the server of these ranks has called, has switched that off.
    """
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"labels": ids.clone(), "position_ids": torch.arange(24).remainder(8).expand(2, 24)}
    inputs["labels"][:, ::8] = -100
    apart = ids.unflatten(1, (3, 8)).flatten(0, 1)
    expected = plain_model(llama())(apart, labels=apart).loss.item()
    model, mesh = plain_model(llama()), script.build_mesh("cpu", 2)
    script.apply_tp(model, mesh["tp"])
    script.apply_fsdp(model, mesh["dp"], torch.float32)
    masks, losses = transformers.masking_utils, []
    spec = importlib.util.spec_from_file_location("transformers.untouched", masks.__file__)
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    for module in (untouched, masks):
        masks.find_packed_sequence_indices = module.find_packed_sequence_indices
        with loss_parallel():
            losses.append(model(ids, **inputs, use_cache=False).loss.full_tensor().item())
        script.shard_model(llama(), mesh, torch.float32, False, False)
    assert abs(losses[0] / expected - 1) < 1e-6 < 1e-3 < abs(losses[1] / expected - 1), losses


CHECKS = {"steps": steps, "placements": placements, "packed": packed}


@pytest.mark.parametrize("name", CHECKS)
def test_said(request, name):
    passes(request, 4, list(CHECKS), name)


CONFIGS = {"HSDP": llama(), "tied": llama(tie_word_embeddings=True, num_key_value_heads=4)}
OTHERS = llama(num_key_value_heads=4)
CASES = ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in
                   ("HSDP", "in chunks", "not whole", "compiled"))]  # fmt: skip


def changed(name: str, text: str) -> str:
    """The block and the loop, changed as README and docs say."""
    if name == "HSDP":  # 2 replicas of 2-way FSDP x 2-way TP
        (diff,) = blocks("diff", (ROOT / "docs" / "others.md").read_text())
        for change in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff + "\n", re.MULTILINE):
            old, new = ("".join(line[1:] for line in part.splitlines(True)) for part in change)
            assert text.count(old) == 1, old
            text = text.replace(old, new)
    between = block_with(CHUNKS).splitlines(True)
    between = between[:-2] if name == "in chunks" else between[-2:]  # with recomputation; compiled
    if name in ("in chunks", "compiled"):
        text = text.replace("\napply_fsdp(model", f"\n{''.join(between)}\napply_fsdp(model")
    if name == "not whole":
        begin, end = text.index("apply_tp(model"), text.index("optimizer = ")
        text = f"{text[:begin]}{block_with(SHARDED)}\n{text[end:]}"
        text = re.sub(r"\nmodel = AutoModel.*", "", text, count=1)
    if name in ("in chunks", "not whole"):
        text = text.replace("with loss_parallel():", "if True:")
        text = text.replace(".loss.full_tensor()", ".loss")
        text = text.replace("part.detach().full_tensor()", "part.detach()")
    return text


def run_program(program: Path, names: list[str]) -> None:
    """What each rank does: a Python file with its arguments, as torchrun would start it."""
    sys.argv = [str(program), *(str(program.with_name(name)) for name in names)]
    runpy.run_path(str(program), run_name="__main__")


def copied(folder: Path, text: str, ranks: int, out: str = "out") -> Ranks:
    """Ranks that run a copier's program in a folder with a model and data."""
    (folder / "loop.py").write_text(f"{block_with(BLOCK)}\n\n{text}\n")
    names = ["model", "train.jsonl", "eval.jsonl", out]
    program = functools.partial(run_program, folder / "loop.py", names)
    return Ranks(ranks, program, folder / "log")


def examples(folder: Path, config, least: int = 9) -> dict[str, list]:
    """Write a model and data: rows of `least` to 32 tokens, of which other numbers count."""
    plain_model(config).to(torch.bfloat16).save_pretrained(folder / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "model")
    random, data = torch.Generator().manual_seed(0), {}
    for name, number in (("train", 21), ("eval", 5)):
        rows = data[name] = []
        for size in torch.randint(least, 33, (number,), generator=random).tolist():
            ids = torch.randint(0, 96, (size,), generator=random).tolist()
            prompt = int(torch.randint(1, size, (1,), generator=random)) if rows else size
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def setting(name: str) -> int:
    """What the loop sets `name` to."""
    names, values = re.search(r"^(TP, .*) = (.*)$", block_with(LOOP), re.MULTILINE).groups()
    return int(dict(zip(names.split(", "), values.split(", "), strict=True))[name])


def losses_of(model, rows: list[dict]) -> tuple[torch.Tensor, list[int]]:
    """The summed loss of each row alone, by plain transformers, and its number of labels."""
    sums, counts = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(ids, use_cache=False).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        counts.append(int((labels != -100).sum()))
    return torch.stack(sums), counts


def expected(model, data: dict, dp: int, mistake: str = "") -> list[float]:
    """What one plain process finds: losses, gradient norms, and evaluations, in order.

    The model is trained in place. A mistake of those that are easily made changes it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    batch, micro, epochs = map(setting, ("BATCH", "ACCUMULATION", "EPOCHS"))
    rows, size = data["train"], dp * batch * micro
    padded = rows + [{**rows[0], "labels": [-100] * len(rows[0]["labels"])}] * (-len(rows) % dp)
    total, found, step = epochs * math.ceil(len(padded) / size), [], 0
    for epoch in range(epochs):
        random = torch.Generator().manual_seed(0 if mistake == "no set_epoch" else epoch)
        order = torch.randperm(len(padded), generator=random).tolist()
        for begin in range(0, len(order), size):
            step_rows = [padded[i] for i in order[begin : begin + size]]
            # linear warmup over none of so few steps, then a cosine to 0
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / total))
            sums, counts = losses_of(model, step_rows)
            loss = sums.sum() / sum(counts)
            if mistake == "mean over each rank's labels":
                ranks = [slice(i, None, dp) for i in range(dp)]
                loss = sum(sums[r].sum() / max(1, sum(counts[r])) for r in ranks) / dp
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            found += [loss.item(), norm.item()]
            if step % SAVED == 0 or step == total:
                with torch.no_grad():
                    sums, counts = losses_of(model, data["eval"])
                found.append((sums.sum() / sum(counts)).item())
    return found


SAVED = 3  # steps, in the place of 100
# Anywhere in a line, because another rank's progress bar may stand before it.
NUMBERS = re.compile(r"step (\d+): (?:loss ([\d.]+), gradient norm ([\d.]+)|evaluation ([\d.]+))")


def for_test(text: str) -> str:
    """The loop with a rate that moves a tiny model, and more checkpoints."""
    assert text.count("100, 1e-5\n") == 1
    return text.replace("100, 1e-5\n", f"{SAVED}, {LR}\n")


@pytest.mark.parametrize("name", CASES)
def test_copied(tmp_path, name):
    """The README's block and loop train, evaluate and save as one process without them does."""
    dp = 4 if name == "HSDP" else 2
    data = examples(tmp_path, CONFIGS.get(name, OTHERS), 32 if name == "compiled" else 9)
    loop = for_test(block_with(LOOP))
    text = changed(name, loop)
    assert (text == loop) == (name == "tied")
    output = copied(tmp_path, text, 2 * dp).succeed(300 if name == "compiled" else 60)
    found = [float(number) for _, *line in NUMBERS.findall(output) for number in line if number]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    start = copy.deepcopy(model)
    right = expected(model, data, dp)
    assert distance(torch.tensor(found), torch.tensor(right)) < 1e-5, (found, right)
    dcp_to_torch_save(sorted((tmp_path / "out").glob("step-*"))[-1], tmp_path / "last.pt")
    last = torch.load(tmp_path / "last.pt", weights_only=False)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert trained.dtype == torch.bfloat16
    assert (tmp_path / "out/model/tokenizer_config.json").exists()
    for key, p in model.named_parameters():
        assert distance(last["model"][key], p.detach()) < TOLERANCE, key
        assert torch.equal(trained.get_parameter(key), last["model"][key].bfloat16()), key
    if name == "tied":
        for mistake in ("no set_epoch", "mean over each rank's labels"):
            wrong = expected(copy.deepcopy(start), data, dp, mistake)
            assert distance(torch.tensor(found), torch.tensor(wrong)) > 1e-3, mistake
        check_continued(tmp_path, loop, output, last)


def check_continued(folder: Path, loop: str, output: str, last: dict) -> None:
    """From the checkpoint of step 3, in the middle of an epoch, all goes on bit for bit."""
    shutil.copytree(folder / "out/step-00000003", folder / "again/step-00000003")
    (folder / "again/step-00000004").mkdir()  # as a save that was interrupted leaves it
    going_on = copied(folder, loop, 4, "again").succeed()
    before, found = (list(NUMBERS.finditer(text)) for text in (output, going_on))
    assert [line[0] for line in found] == [line[0] for line in before if int(line[1]) > 3]
    dcp_to_torch_save(sorted((folder / "again").glob("step-*"))[-1], folder / "again.pt")
    again = torch.load(folder / "again.pt", weights_only=False)
    torch.testing.assert_close(again["model"], last["model"], rtol=0, atol=0)
    torch.testing.assert_close(again["optim"]["state"], last["optim"]["state"], rtol=0, atol=0)
    assert (again["scheduler"], again["step"]) == (last["scheduler"], last["step"])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [("with loss_parallel():  # around", "if True:  # around",
      "aten.nll_loss_forward.default got mixed torch.Tensor and DTensor"),
     ("                part.backward()", "            part.backward()",
      "aten.nll_loss_backward.default got mixed torch.Tensor and DTensor"),
     ("apply_fsdp(model", "from train_llm import chunk_loss\nchunk_loss(model)\napply_fsdp(model",
      "KeyError: <OpOverload(op='aten._log_softmax'"),
     ("rows, dp, dp_rank,", "rows, dist.get_world_size(), dist.get_rank(),",
      "a TP group needs the same sequences")],
)  # fmt: skip
def test_errors_of_a_copier(tmp_path, before, after, message):
    """What is easily done wrong in the loop fails as troubleshooting.md says."""
    examples(tmp_path, llama())
    loop = block_with(LOOP)
    assert loop.count(before) == 1
    job = copied(tmp_path, loop.replace(before, after), 2)
    output = job.wait(60)
    assert job.codes() == [1, 1], output
    assert message in " ".join(output.split())
    assert message.split(" got ")[0] in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_flags():
    """Every flag that the pages name exists."""
    files = [ROOT / "benchmarks" / f"{name}.py" for name in ("plan", "peers", "gpu", "soak")]
    sources = [SCRIPT, *(file.read_text() for file in files)]
    known = {"--nproc-per-node", "--nodes", "--gpus-per-node", "--help", "--slow", "--standalone"}
    known |= {"--no-deps", "--no-index", "--no-compile", "--only-binary", "--target"}  # pip's
    known |= {"--python-version", "--short"}  # pip's and git's
    known |= set(re.findall(r'"(--[a-z][a-z-]+)"', "".join(sources)))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "".join(PAGES)))
    assert used and used <= known, used - known


def test_predicted_batches():
    """The largest batches of the tutorial's model and length are those of plan.md."""
    table = (ROOT / "docs" / "plan.md").read_text().split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    largest = {row[0]: row[-2] for row in rows if row[2] == "no"}
    layouts = ["1 x 8", "2 x 4", "4 x 2", "8 x 1"]
    predicted = ", ".join(largest[layout] for layout in layouts)
    gpu = (ROOT / "docs" / "gpu.md").read_text()
    assert f"on {', '.join(layouts)} | not yet | 18, 14, 10, 7" in gpu
    assert f"plan.py predicts {predicted} |" in gpu, predicted


def test_numbers():
    """What the README takes from docs/plan.md and docs/layouts.md is there."""
    table = (ROOT / "docs" / "plan.md").read_text().split("\n\n")[5]
    assert table.count("\n") == 9, table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    longest = {(row[0], row[2]): row[-1] for row in rows}
    assert f"sequences of {longest['8 x 1', 'no']} tokens with FSDP alone, " in README
    assert f"{longest['8 x 1', 'yes']} with recomputation, " in README
    assert f"{longest['1 x 8', 'yes']} with recomputation and `--tp 8`" in README
    rows = (ROOT / "docs" / "layouts.md").read_text().split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in rows]
    layouts = ", ".join(row[0] for row in rows[:-1])
    assert f"on {layouts} and {rows[-1][0]} ranks" in README
    assert f"difference of {max((row[5] for row in rows), key=float)} (" in README


def test_links():
    names = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in names
             for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]  # fmt: skip
    assert len(links) > 15
    for page, link in links:
        outside = link.startswith(("https://github.com/", "https://arxiv.org/abs/"))
        assert outside or (page.parent / link).is_file(), (page, link)
