"""What the README says is so: code, flags and links."""

import functools
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from ranks import ROOT, Ranks
from test_parity import LR, distance, llama, plain_model

README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "train_llm.py").read_text()


NAMES = ("running", "speed", "gpu", "troubleshooting", "others")
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
    assert marks >= 6


BLOCK, LOOP, DTENSOR = "def build_mesh(", "for step in torch.load(", "summands ="


def block_with(text: str, language: str = "python") -> str:
    """The one block of the README that has `text` in it."""
    (found,) = [block for block in blocks(language) if text in block]
    return found


def test_code_is_the_scripts():
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        if block in block_with(LOOP) or DTENSOR in block:
            continue
        imports, blank, code = block.rpartition("\n\n\ndef build_mesh(")
        if not blank:
            imports, _, code = block.rpartition("\n\n\n")
        assert f"{code}\n" in SCRIPT, block
        assert set(imports.splitlines()) <= set(SCRIPT.splitlines()), imports
    lines = block_with("SequenceParallel", "diff").splitlines()
    for line in lines:
        if line.startswith("+"):
            assert line[1:] in SCRIPT.splitlines(), line


def test_dtensor(tmp_path):
    """The first ten lines of DTensor print what the README says, on two ranks."""
    (tmp_path / "dtensor.py").write_text(block_with(DTENSOR))
    program = functools.partial(run_program, tmp_path / "dtensor.py")
    output = Ranks(2, program, tmp_path / "log").succeed()
    said = [line[2:] for line in block_with(DTENSOR).splitlines() if line.startswith("# ")]
    assert len(said) == 4 and "\n".join(said) in output, output


COPIED = {
    "tied Llama": llama(tie_word_embeddings=True, num_key_value_heads=4),
    "HSDP": llama(),  # 2 replicas of 2-way FSDP x 2-way TP
    "in chunks": llama(num_key_value_heads=4),
}


def changed(text: str, name: str) -> str:
    """The block and the loop, changed as the docs say for HSDP and for the loss in chunks."""
    if name == "HSDP":
        (diff,) = blocks("diff", (ROOT / "docs" / "others.md").read_text())
        for change in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff + "\n", re.MULTILINE):
            old, new = ("".join(line[1:] for line in part.splitlines(True)) for part in change)
            assert text.count(old) == 1, old
            text = text.replace(old, new)
    if name == "in chunks":
        begin, end = SCRIPT.index("CHUNK_BYTES = "), SCRIPT.index("# ---- Data")
        text = text.replace("\nimport os\n", f"\n{SCRIPT[begin:end]}\nimport os\n")
        text = text.replace("with loss_parallel():  # around forward and backward", "if True:")
        text = text.replace("part.detach().full_tensor()", "part.detach()")
        text = text.replace("\napply_fsdp(model", "\nchunk_loss(model)\napply_fsdp(model")
    return text


def run_program(program: Path) -> None:
    """What each rank does: a Python file with its arguments, as torchrun would start it."""
    sys.argv = [str(program), *(str(program.with_name(n)) for n in ("model", "data.pt", "trained"))]
    runpy.run_path(str(program), run_name="__main__")


def copied(folder: Path, text: str, ranks: int) -> Ranks:
    """Ranks that run a copier's program in a folder with a model and data."""
    (folder / "copied.py").write_text(text)
    return Ranks(ranks, functools.partial(run_program, folder / "copied.py"), folder / "log")


def micro_batches(steps: int, padded: int = 6) -> list[list[dict]]:
    """Steps of two micro-batches whose sequences end with padding and begin with a prompt.

    The first half of the sequences, which are one dp rank's, has five times as many labels.
    """
    found, random = [], torch.Generator().manual_seed(0)
    for i in range(2 * steps):
        ids = torch.randint(0, 96, (4, 32), generator=random)
        mask = (torch.arange(32) < 32 - padded).expand(4, 32)
        prompts = torch.tensor([6, 21, 6, 21] if i % 2 else [6, 26, 6, 26])  # one has no label
        counts = mask & (torch.arange(32) >= prompts[:, None])
        found.append({"input_ids": ids, "attention_mask": mask.long(),
                      "labels": torch.where(counts, ids, -100)})  # fmt: skip
    return [found[i : i + 2] for i in range(0, 2 * steps, 2)]


@pytest.mark.parametrize("name", COPIED)
def test_copied(tmp_path, name):
    """The README's block and loop, as they stand there, train as one process without them does."""
    plain_model(COPIED[name]).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    steps = micro_batches(3)
    torch.save(steps, tmp_path / "data.pt")
    text = changed(f"{block_with(BLOCK)}\n\n{block_with(LOOP)}\n", name)
    output = copied(tmp_path, text, 8 if name == "HSDP" else 4).succeed()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    expected = []
    for step in steps:
        batch = {key: torch.cat([part[key] for part in step]) for key in step[0]}
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected += [loss.item(), norm.item()]
        optimizer.step()
        optimizer.zero_grad()
    found = re.findall(r"^loss (\S+), gradient norm (\S+)$", output, re.MULTILINE)
    found = [float(number) for pair in found for number in pair]
    assert distance(torch.tensor(found), torch.tensor(expected)) < 1e-5, (found, expected)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained.dtype == torch.bfloat16 and (tmp_path / "trained/tokenizer_config.json").exists()
    weights = dict(trained.named_parameters())
    assert weights.keys() == start.keys()
    for name, p in model.named_parameters():  # the files are in bf16
        assert distance(weights[name].float(), p.detach()) < 3e-3, name


@pytest.mark.parametrize(
    ("before", "after"),
    [("with loss_parallel():  # around forward and backward", "if True:"),
     ("            part.backward()", "        part.backward()")],
)  # fmt: skip
def test_errors_of_a_copier(tmp_path, before, after):
    """A loop without loss_parallel, or with backward outside, fails as troubleshooting.md says."""
    plain_model(llama()).save_pretrained(tmp_path / "model")
    torch.save(micro_batches(1), tmp_path / "data.pt")
    loop = block_with(LOOP).replace(before, after)
    assert loop != block_with(LOOP)
    job = copied(tmp_path, f"{block_with(BLOCK)}\n\n{loop}\n", 2)
    output = job.wait(60)
    assert job.codes() == [1, 1], output
    phase = "forward" if "if True" in after else "backward"
    message = f"aten.nll_loss_{phase}.default"
    assert f"{message} got mixed torch.Tensor and DTensor" in " ".join(output.split())
    assert message in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_flags():
    """Every flag that the pages name exists."""
    sources = [SCRIPT, *((ROOT / "benchmarks" / f"{n}.py").read_text() for n in ("plan", "peers"))]
    known = {"--nproc-per-node", "--nodes", "--gpus-per-node", "--help", "--slow"}
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


def test_links():
    names = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in names
             for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]  # fmt: skip
    assert len(links) > 15
    for page, link in links:
        outside = link.startswith(("https://github.com/", "https://arxiv.org/abs/"))
        assert outside or (page.parent / link).is_file(), (page, link)
