"""What is trained on: packing, caching and the order of the data."""

import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import train_llm as script
from ranks import Ranks

TEXTS = [f"document {i} " * (1 + i % 7) for i in range(60)]


@pytest.fixture
def jsonl(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    return str(path)


def joined(rows) -> list[int]:
    return list(itertools.chain.from_iterable(rows["input_ids"]))


def test_packing(jsonl):
    """Rows are the documents' bytes one after the other, each ended once, none lost or padded."""
    data = script.load_data(jsonl, None, None, ByT5Tokenizer(extra_ids=125), 32)
    rows = torch.cat([data["train"][:]["input_ids"], data["validation"][:]["input_ids"]])
    assert rows.dtype == torch.int64 and rows.shape[1] == 32
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    assert len(rows) == total // 32
    assert len(data["validation"]) == len(rows) // 20
    stream = rows.flatten().tolist()
    documents = bytes(i - 3 if i > 1 else 0 for i in stream).split(b"\0")  # ByT5: byte + 3, end 1
    assert set(documents[:-1]) <= {text.encode() for text in TEXTS}
    missing = set(TEXTS) - {document.decode() for document in documents}
    assert len(missing) <= 1, "only the last document may be cut"


def test_own_validation_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(f"{split} text " * 50)
    data = script.load_data(str(tmp_path), None, None, ByT5Tokenizer(), 16)
    for split in ("train", "validation"):
        text = bytes(i - 3 for i in joined(data[split]) if i > 2).decode()
        assert text.startswith(f"{split} text {split}")


def show_cache(data: str, tokenizer: Path) -> None:
    """What each process does: tokenize, or find it done, and print the files of the cache."""
    rows = script.load_data(data, None, None, AutoTokenizer.from_pretrained(tokenizer), 16)
    print(*sorted({"\n" + file["filename"] for part in rows.values() for file in part.cache_files}))


@pytest.mark.parametrize("kind", ["python", "rust"])
def test_tokenized_once(jsonl, tmp_path, kind):
    """A second process finds what the first one tokenized."""
    tokenizer = ByT5Tokenizer()
    if kind == "rust":
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {word: i for i, word in enumerate({*" ".join(TEXTS).split(), "<end>", "<unk>"})}
        rust = Tokenizer(models.WordLevel(words, "<unk>"))
        rust.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    show = functools.partial(show_cache, jsonl, tmp_path / "tokenizer")
    outputs = [Ranks(1, show, tmp_path / "log").succeed() for _ in range(2)]
    files = [[line for line in output.splitlines() if ".arrow" in line] for output in outputs]
    assert files[0] and files[0] == files[1]
    assert "Tokenizing" in outputs[0] and "Tokenizing" not in outputs[1]


def test_too_short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(ValueError, match="not one sequence of 64 tokens for train and validation"):
        script.load_data(str(path), None, None, ByT5Tokenizer(), 64)


def test_text_column(tmp_path):
    """The column is "text", or the one with strings, or asked for with the columns listed."""
    path = tmp_path / "data.csv"

    def load(header: str, column: str | None = None) -> str:
        path.write_text(header + "\n" + "".join(f"one{i},two{i},{i}\n" for i in range(90)))
        rows = script.load_data(str(path), None, column, ByT5Tokenizer(), 16)["train"]
        return bytes(i - 3 for i in joined(rows) if i > 2).decode()

    assert "two" in load("title,text,id") and "one" not in load("title,text,id")
    assert "one" in load("body,title,id", "body") and "two" not in load("body,title,id", "body")
    for header, column in (("body,title,id", None), ("body,title,id", "id"), ("a,text,b", "c")):
        names = [name for name in header.split(",")[:2]]
        message = f"--text-column has to name one of its columns with text: {names}"
        with pytest.raises(ValueError, match=re.escape(message)):
            load(header, column)
    path.write_text("a,number\n" + "".join(f"one{i},{i}\n" for i in range(90)))
    rows = script.load_data(str(path), None, None, ByT5Tokenizer(), 16)["train"]
    assert "one" in bytes(i - 3 for i in joined(rows) if i > 2).decode()


def test_every_row_once_an_epoch():
    rows = [row for step in range(30) for row in script.global_batch_rows(step, 7, 70, seed=1)]
    epochs = [rows[i : i + 70] for i in (0, 70, 140)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(70))
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows != [r for step in range(30) for r in script.global_batch_rows(step, 7, 70, seed=2)]
    # A batch over the end of an epoch: 4 x 20 = 80 rows of 70.
    rows = [row for step in range(4) for row in script.global_batch_rows(step, 20, 70, seed=1)]
    assert sorted(rows[:70]) == list(range(70)) and rows[70:] == epochs[1][:10]


@pytest.mark.parametrize(("dp", "batch_size"), [(1, 12), (1, 3), (2, 6), (2, 1), (3, 2), (4, 3)])
def test_order_does_not_depend_on_layout(dp, batch_size):
    rows = script.global_batch_rows(3, 12, 100, seed=0)
    ranks = [script.micro_batches(rows, batch_size, rank, dp) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {12 // dp // batch_size}
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    assert sorted(row for batches in ranks for batch in batches for row in batch) == sorted(rows)


def test_learning_rate():
    rates = [script.learning_rate(step, 2.0, 10, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 2.0 and rates[-1] == pytest.approx(0.2)
    assert rates[59] == pytest.approx(1.1) and rates[9:] == sorted(rates[9:], reverse=True)


def test_built_in_data_is_the_standard_library():
    data = script.load_data(None, None, None, ByT5Tokenizer(extra_ids=125), 256)
    text = bytes(i - 3 for i in joined(data["train"][:400]) if i > 2).decode(errors="ignore")
    assert "import" in text and "def " in text
    assert len(data["validation"]) == (len(data["train"]) + len(data["validation"])) // 20
