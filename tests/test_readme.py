"""What the README says is so: code, flags, commands, links and numbers."""

import importlib.util
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rank_groups import ROOT, free_port, run
from test_models import config_of
from test_parity import LR, distance, llama, plain_model

README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "train_llm.py").read_text()


PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text()
                   for name in ("running", "speed", "gpu", "troubleshooting"))]  # fmt: skip


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)


def program(name: str):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures():
    """The pictures are what docs/draw.py draws, memory.svg from the numbers in plan.md."""
    for picture in program("draw").PICTURES:
        name = f"docs/{picture.__name__}.svg"
        assert (ROOT / name).read_text() == picture(), f"{name}: run python docs/draw.py"
        assert f"({name})" in README


def test_filled():
    """The marked parts are what docs/readme.py puts there."""
    module, marks = program("readme"), 0
    for page in module.PAGES:
        text = page.read_text()
        assert module.fill(text) == text, f"{page}: run python docs/readme.py"
        marks += text.count("<!-- end -->")
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- \S+\.(md|py|json)", text))
    assert marks >= 6


BLOCK, LOOP = "def build_mesh(", "for batch in torch.load("


def block_with(text: str) -> str:
    """The one Python block of the README that has `text` in it."""
    (found,) = [block for block in blocks("python") if text in block]
    return found


def test_code_is_the_scripts():
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        if block in block_with(LOOP):
            continue
        imports, blank, code = block.rpartition("\n\n\ndef build_mesh(")
        if not blank:
            imports, _, code = block.rpartition("\n\n\n")
        assert f"{code}\n" in SCRIPT, block
        assert set(imports.splitlines()) <= set(SCRIPT.splitlines()), imports
    assert len(blocks("diff")) == 4
    for line in blocks("diff")[2].splitlines():
        if line.startswith("+"):
            assert line[1:] in SCRIPT.splitlines(), line


COPIED = {
    "tied Llama": llama(tie_word_embeddings=True, num_key_value_heads=4),
    "Qwen3": config_of("Qwen3"),
    "Llama, 3 key-value heads": llama(num_key_value_heads=3),
    "HSDP": llama(),  # 2 replicas of 2-way FSDP x 2-way TP
}


def with_hsdp(text: str) -> str:
    """The block and the loop, changed as the README's last diff says."""
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", blocks("diff")[3] + "\n", re.MULTILINE)
    assert len(changes) == 2
    for change in changes:
        old, new = ("".join(line[1:] for line in part.splitlines(True)) for part in change)
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", COPIED)
def test_copied(tmp_path, name):
    """The README's block and loop, as they stand there, train as one process without them does."""
    plain_model(COPIED[name]).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    data = torch.randint(0, 96, (3, 4, 32), generator=torch.Generator().manual_seed(0))
    torch.save(data, tmp_path / "data.pt")
    text, ranks = f"{block_with(BLOCK)}\n\n{block_with(LOOP)}\n", 4
    if name == "HSDP":
        text, ranks = with_hsdp(text), 8
    (tmp_path / "copied.py").write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
    command += ["--master-port", free_port(), tmp_path / "copied.py", tmp_path / "model"]
    code, output = run([*command, tmp_path / "data.pt", tmp_path / "trained"], 240)
    assert code == 0, output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for ids in data:
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    weights = dict(trained.named_parameters())
    assert weights.keys() == start.keys()
    for name, p in model.named_parameters():
        assert distance(weights[name] - start[name], p.detach() - start[name]) < 1e-2, name


@pytest.mark.parametrize(
    ("before", "after"),
    [("    with loss_parallel():  # around forward and backward\n        loss =",
      "    if True:\n        loss ="),
     ("        loss.backward()", "    loss.backward()")],
)  # fmt: skip
def test_errors_of_a_copier(tmp_path, before, after):
    """A loop without loss_parallel, or with backward outside, fails as troubleshooting.md says."""
    plain_model(llama()).save_pretrained(tmp_path / "model")
    torch.save(torch.zeros(1, 2, 32, dtype=torch.int64), tmp_path / "data.pt")
    loop = block_with(LOOP).replace(before, after)
    assert loop != block_with(LOOP)
    (tmp_path / "copied.py").write_text(f"{block_with(BLOCK)}\n\n{loop}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    command += ["--master-port", free_port(), tmp_path / "copied.py", tmp_path / "model"]
    code, output = run([*command, tmp_path / "data.pt", tmp_path / "trained"], 60)
    phase = "forward" if "if True" in after else "backward"
    message = f"aten.nll_loss_{phase}.default"
    assert code == 1 and f"{message} got mixed torch.Tensor and DTensor" in " ".join(output.split())
    assert message in (ROOT / "docs" / "troubleshooting.md").read_text()


RUN_BY = {  # each command in the README, and what runs it
    "bash launch.sh -e first": "test_cli.test_default_run",
    "bash tests/run.sh": ".ci/run",
    "pip install -r requirements.txt": "launch.sh in .ci/run",
    "torchrun --nproc-per-node 8 train_llm.py --tp 4": "benchmarks/layouts.py; 4 ranks in test_cli",
    "python benchmarks/plan.py -m llama-3.1-8b --ranks 8 -s 4096": "test_benchmarks",
    "torchrun --nproc-per-node 8 train_llm.py --tp 4 -m DIRECTORY -d FILE.jsonl -e NAME":
        "test_models.test_own_model_and_data, on 2 ranks",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch.sh --tp 8 -m DIRECTORY -e NAME":
        "test_launch.test_two_hosts, on 2 x 1 ranks",
    "sbatch --nodes 2 --gpus-per-node 8 launch.sh --tp 8 -m DIRECTORY -e NAME":
        "test_launch.test_slurm, on one node without GPUs, with a script that does not train",
}  # fmt: skip


def test_commands_and_flags():
    """Every command is known to run, and every flag exists."""
    for block in [block for page in PAGES for block in blocks("bash", page)]:
        for command in [] if block.startswith("python -c") else block.splitlines():
            assert command in RUN_BY, command
    known = {"--nproc-per-node", "--nodes", "--gpus-per-node", "--help", "--slow"}
    for script in ("train_llm.py", "benchmarks/plan.py", "benchmarks/peers.py"):
        code, text = run([sys.executable, ROOT / script, "--help"], 60)
        assert code == 0
        known |= set(re.findall(r"--[a-z][a-z-]+", text))
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


def test_numbers_come_from_results():
    """Every decimal number in the prose is in a result that is committed."""
    filled = {"running.md", "speed.md", "gpu.md", "troubleshooting.md"}
    results = "".join(
        path.read_text() for path in (ROOT / "docs").iterdir()
        if path.suffix in (".json", ".md") and path.name not in filled
    )  # fmt: skip
    prose = re.sub(r"^```.*?^```$|`[^`]*`", "", "".join(PAGES), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(torch|transformers|Python|Llama|Slurm) [\d.]+|abs/[\d.]+", "", prose)
    numbers = re.findall(r"(?<![\w./-])\d+[.,]\d+(?![\w.]*[\w])", prose)
    assert len(numbers) > 60
    for number in numbers:
        assert number in results, number


def test_error_messages_exist():
    """The messages in the table of failures are the script's."""
    sources = " ".join((SCRIPT + (ROOT / "launch.sh").read_text()).split())
    sources = sources.replace('" "', "").replace('" f"', "")
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page.split("| What you see |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) >= 12
    for message in messages:
        parts = re.split(r"\.\.\.|-?-?\w+ \d+|\d+|[\[\]{}':;`]", message)  # what varies is between
        words = [part.strip() for part in parts if len(part.strip()) > 9]
        assert any(part in sources for part in words), message
