"""What the README says is so: code, flags, commands, links and numbers."""

import importlib.util
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rank_groups import ROOT, free_port, run
from test_parity import LR, llama, plain_model

README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "train_llm.py").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)


def test_filled():
    """The marked parts are what docs/readme.py puts there."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fill(README) == README, "run python docs/readme.py"
    assert README.count("<!-- end -->") == len(re.findall(r"<!-- \S+\.(md|py|json)", README)) >= 7


def test_code_is_the_scripts():
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        imports, blank, code = block.rpartition("\n\n\ndef build_mesh(")
        if not blank:
            imports, _, code = block.rpartition("\n\n\n")
        assert f"{code}\n" in SCRIPT, block
        assert set(imports.splitlines()) <= set(SCRIPT.splitlines()), imports
    assert len(blocks("diff")) == 3
    for line in blocks("diff")[2].splitlines():
        if line.startswith("+"):
            assert line[1:] in SCRIPT.splitlines(), line


COPIED = """
import sys

from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

dist.init_process_group("gloo")
mesh = build_mesh("cpu", tp=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
apply_tp(model, mesh["tp"])
apply_fsdp(model, mesh["dp"], torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = torch.load(sys.argv[2])
for batch in data:
    ids = batch[mesh["dp"].get_local_rank() :: mesh["dp"].size()]
    with loss_parallel():
        model(ids, labels=ids, use_cache=False).loss.backward()
    nn.utils.clip_grads_with_norm_(
        model.parameters(),
        0.5,
        nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor(),
    )
    optimizer.step()
    optimizer.zero_grad()
weights = {name: p.full_tensor() for name, p in model.named_parameters()}
if dist.get_rank() == 0:
    torch.save(weights, sys.argv[3])
dist.barrier()
"""


@pytest.mark.parametrize(
    ("tied", "kv_heads"), [(True, 4), pytest.param(False, 3, marks=pytest.mark.slow)]
)
def test_block_in_another_script(tmp_path, tied, kv_heads):
    """Pasted into a plain loop, the block trains as one process without it does."""
    config = llama(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    plain_model(config).save_pretrained(tmp_path / "model")
    data = torch.randint(0, 96, (3, 4, 32), generator=torch.Generator().manual_seed(0))
    torch.save(data, tmp_path / "data.pt")
    block = blocks("python")[0]
    (tmp_path / "pasted.py").write_text(block + "\n\n" + COPIED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 4]
    command += ["--master-port", free_port(), tmp_path / "pasted.py", tmp_path / "model"]
    code, output = run([*command, tmp_path / "data.pt", tmp_path / "weights.pt"], 120)
    assert code == 0, output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for ids in data:
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.load(tmp_path / "weights.pt")
    assert weights.keys() == start.keys()
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name])
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-4, atol=1e-5)


RUN_BY = {  # each command in the README, and what runs it
    "bash launch.sh -e first": "test_cli.test_default_run",
    "bash tests/run.sh": ".ci/run",
    "pip install -r requirements.txt": "launch.sh in .ci/run",
    "torchrun --nproc-per-node 8 train_llm.py --tp 4": "benchmarks/layouts.py; 4 ranks in test_cli",
    "python benchmarks/plan.py -m llama-3.1-8b --ranks 8 -s 1024": "test_benchmarks",
    "torchrun --nproc-per-node 8 train_llm.py --tp 4 -m DIRECTORY -d FILE.jsonl -e NAME":
        "test_models.test_own_model_and_data, on 2 ranks",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch.sh --tp 8 -m DIRECTORY -e NAME":
        "test_launch.test_two_hosts, on 2 x 2 ranks",
    "sbatch --nodes 2 --gpus-per-node 8 launch.sh --tp 8 -m DIRECTORY -e NAME":
        "test_launch.test_slurm, on one node without GPUs",
}  # fmt: skip


def test_commands_and_flags():
    """Every command is known to run, and every flag exists."""
    for block in blocks("bash"):
        for command in [] if block.startswith("python -c") else block.splitlines():
            assert command in RUN_BY, command
    known = {"--nproc-per-node", "--nodes", "--gpus-per-node", "--help", "--slow"}
    for script in ("train_llm.py", "benchmarks/plan.py", "benchmarks/peers.py"):
        code, text = run([sys.executable, ROOT / script, "--help"], 60)
        assert code == 0
        known |= set(re.findall(r"--[a-z][a-z-]+", text))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert used and used <= known, used - known


def test_predicted_batches():
    """The largest batches of the tutorial's model and length are those of plan.md."""
    table = (ROOT / "docs" / "plan.md").read_text().split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    largest = {row[0]: row[-1] for row in rows if row[1] == "no"}
    layouts = ["1 x 8", "2 x 4", "4 x 2", "8 x 1"]
    predicted = ", ".join(largest[layout] for layout in layouts)
    assert f"on {', '.join(layouts)} | not yet | 18, 14, 10, 7" in README
    assert f"plan.py predicts {predicted} |" in README


def test_links():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://github.com/") or (ROOT / link).is_file(), link


def test_numbers_come_from_results():
    """Every decimal number in the prose is in a result that is committed."""
    results = "".join(
        path.read_text() for path in (ROOT / "docs").iterdir() if path.suffix in (".json", ".md")
    )
    prose = re.sub(r"^```.*?^```$|`[^`]*`", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(torch|transformers|Python|Llama|Slurm) [\d.]+", "", prose)  # versions
    numbers = re.findall(r"(?<![\w./-])\d+[.,]\d+(?![\w.]*[\w])", prose)
    assert len(numbers) > 100
    for number in numbers:
        assert number in results, number


def test_error_messages_exist():
    """The messages in the table of failures are the script's."""
    sources = " ".join((SCRIPT + (ROOT / "launch.sh").read_text()).split())
    sources = sources.replace('" "', "").replace('" f"', "")
    table = README.split("| What you see |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) >= 12
    for message in messages:
        parts = re.split(r"\.\.\.|-?-?\w+ \d+|\d+|[\[\]{}':;`]", message)  # what varies is between
        words = [part.strip() for part in parts if len(part.strip()) > 9]
        assert any(part in sources for part in words), message
