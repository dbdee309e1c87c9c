"""What is trained on: reading, labels, packing, caching and the order of the data."""

import copy
import functools
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import time
import zipfile

import datasets
import pyarrow
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import train_llm as script
from ranks import ROOT, Ranks

TEXTS = [f"document, {i} " * (1 + i % 7) for i in range(60)]  # with commas, for .tsv
_, BYTES = script.built_in_model()  # id is byte + 3, the end token 1
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (  # its generation prompt lacks the line end that follows it in a chat
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKS = (  # as Qwen3's: only answers after the last question have a thought
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + CHATML.replace("{{ m.content", "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
                     "<think>\n\n</think>\n\n{% endif %}{{ m.content")
)  # fmt: skip
R1 = (  # its generation prompt opens a thought, which answers of a chat have lost
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML


def load(name, tokenizer=BYTES, length=16, vocab_size=None, **flags) -> dict:
    words = [word for key, value in flags.items() for word in (f"--{key}".replace("_", "-"), value)]
    args = script.parse_args(["-d", str(name), "-s", str(length), *words])
    return script.load_data(args, tokenizer, vocab_size or len(tokenizer))


def stream(data, column: str = "input_ids") -> list[int]:
    """The tokens, or labels, of all rows."""
    rows = itertools.chain(data["train"], data["validation"])
    return list(itertools.chain.from_iterable(row[column].tolist() for row in rows))


def told(data) -> str:
    return data["train"].info.description


def text_of(ids) -> str:
    return bytes(i - 3 for i in ids if 2 < i < 259).decode(errors="ignore")


def shorter_pieces(characters: int) -> re.Pattern:
    pattern = script.PIECE.pattern
    assert pattern.count("65536") == 2
    return re.compile(pattern.replace("65536", str(characters)))


def write_jsonl(path, rows) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rust_tokenizer(first: str | None = "<s>", template: str | None = None):
    """A byte tokenizer with a post-processor that begins a text with `first`, as Llama 3's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    rust = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(special)
    if first:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, special.index(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def llama2_tokenizer(template: str | None = None):
    """As Llama 2's: it puts a space before every text, and begins it with <s>."""
    vocab, merges = {"<unk>": 0, "<s>": 1, "</s>": 2}, []
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for character in ["▁", "\n", *map(chr, range(33, 127))]:
        vocab[character] = len(vocab)
    for word in ("▁hello", "▁yes", "▁the", "▁fox", "▁user"):
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            vocab.setdefault(word[: i + 1], len(vocab))
    options = {"chat_template": template, "add_bos_token": True}
    return LlamaTokenizer(vocab=vocab, merges=merges, **options)


@pytest.fixture
def jsonl(tmp_path) -> str:
    return write_jsonl(tmp_path / "data.jsonl", [{"text": text, "id": 1} for text in TEXTS])


def test_packing(jsonl):
    """Rows are the documents' bytes one after the other, each ended once, none lost or padded."""
    data = load(jsonl, length=32)
    rows = torch.cat([data["train"][:]["input_ids"], data["validation"][:]["input_ids"]])
    assert rows.dtype == torch.int64 and rows.shape[1] == 32
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    assert len(rows) == total // 32
    assert len(data["validation"]) == len(rows) // 20
    documents = bytes(i - 3 if i > 1 else 0 for i in rows.flatten().tolist()).split(b"\0")
    assert set(documents[:-1]) <= {text.encode() for text in TEXTS}
    missing = set(TEXTS) - {document.decode() for document in documents}
    assert len(missing) <= 1, "only the last document may be cut"
    ids, labels = script.load_batch(data["train"], [3, 1], torch.device("cpu"))
    assert torch.equal(ids, rows[[3, 1]]) and torch.equal(labels, ids)


def test_own_validation_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(f"{split} text " * 50)
    data = load(tmp_path)
    for split in ("train", "validation"):
        ids = itertools.chain.from_iterable(data[split]["input_ids"])
        assert text_of(i.item() for i in ids).startswith(f"{split} text {split}")


CACHE = """
import sys, train_llm
from transformers import AutoTokenizer, masking_utils
assert masking_utils.find_packed_sequence_indices.__module__ == masking_utils.__name__, "patched"
for name in sys.argv[2:]:
    args = train_llm.parse_args(["-d", sys.argv[1], "-s", "16"])
    data = train_llm.load_data(args, AutoTokenizer.from_pretrained(name), 384)
    print(*sorted({file["filename"] for rows in data.values() for file in rows.cache_files}))
    print(data["train"].info.description)
"""


@pytest.mark.slow
def test_tokenized_once(jsonl, tmp_path):
    """A second process finds what the first one read and tokenized, and says the same of it."""
    jsonl.write_text(jsonl.read_text() + '{"text": ""}\n\n')
    BYTES.save_pretrained(tmp_path / "python")
    rust_tokenizer().save_pretrained(tmp_path / "rust")
    command = [sys.executable, "-c", CACHE, jsonl, tmp_path / "python", tmp_path / "rust"]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        for _ in range(2)
    ]
    assert runs[0].stdout.split() and runs[0].stdout == runs[1].stdout
    assert runs[1].stdout.count("60 documents in train, 1 empty") == 2
    assert "Generating" in runs[0].stderr and "Generating" not in runs[1].stderr


def test_changed_file_is_read_again(jsonl):
    before = stream(load(jsonl))
    write_jsonl(jsonl, [{"text": text.upper()} for text in TEXTS])
    assert stream(load(jsonl)) != before


def test_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(script.UserError, match="fewer than 2 sequences of 64 tokens"):
        load(tmp_path / "short.txt", length=64)


def test_text_column(tmp_path):
    """The column is "text", or asked for with the columns and their types listed."""
    rows = [{"title": f"one{i}", "text": f"two{i}", "id": i} for i in range(90)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert "two" in text_of(stream(load(path))) and "one" not in text_of(stream(load(path)))
    chosen = text_of(stream(load(path, text_column="title")))
    assert "one" in chosen and "two" not in chosen
    (tmp_path / "a.txt").write_text("one text " * 50)
    assert "one text" in text_of(stream(load(tmp_path / "a.txt", text_column="text")))
    for column in ("body", "id"):
        with pytest.raises(script.UserError, match=r"data\.jsonl, .*(columns|string)"):
            load(path, text_column=column)


@pytest.mark.parametrize("rest", [{}, {"conversations": [{"from": "human", "value": "x"}]},
                                  {"data": {"text": "x"}}])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lone_column_of_strings_is_not_the_text(tmp_path, rest, kind):
    rows = [{"id": f"conversation-{i}"} | rest for i in range(90)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    if kind == "parquet":
        path = tmp_path / "chat.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(script.UserError) as error:
        load(path)
    for word in ("--text-column", "'id': \"Value('string')\"", *rest):
        assert word in str(error.value)


def test_folder_means_its_files(tmp_path):
    """Text files of a folder are documents as one by one, with their line ends."""
    text = "".join(f"line {i}\n\n" for i in range(200))
    (tmp_path / "folder").mkdir()
    for path in ("folder/0.txt", "v[1].txt", "UPPER.TXT", "NOTES.MD", "code.py"):
        (tmp_path / path).write_text(text)
    (tmp_path / "v1.txt").write_text("another text " * 500)
    with gzip.open(tmp_path / "packed.txt.gz", "wt") as file:
        file.write(text)
    (tmp_path / "mark.txt").write_text(text.replace("\n", "\r\n"), "utf-8-sig")
    expected = [byte + 3 for byte in text.encode()] + [1]
    names = ("folder", "v[1].txt", "UPPER.TXT", "NOTES.MD", "code.py", "packed.txt.gz", "mark.txt")
    for name in names:
        found = stream(load(tmp_path / name))
        assert found == expected[: len(found)] and len(expected) - len(found) < 16, name


def test_folder_named_as_a_format(tmp_path, monkeypatch):
    """It is read, and not all of the current directory, as datasets does with `text` or `json`."""
    write_jsonl(tmp_path / "json" / "a.jsonl", [{"text": "in it " * 20}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "beside it " * 20}])
    monkeypatch.chdir(tmp_path)
    words = text_of(stream(load("json")))
    assert "in it" in words and "beside" not in words


def test_formats_agree(tmp_path):
    """The same documents in every format give the same rows."""
    rows = [{"text": text} for text in TEXTS]
    expected = stream(load(write_jsonl(tmp_path / "plain.jsonl", rows)))
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_csv(tmp_path / "a.tsv", sep="\t")
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv" / "a.tsv").write_bytes((tmp_path / "a.tsv").read_bytes())
    (tmp_path / "code.py.jsonl").write_bytes((tmp_path / "plain.jsonl").read_bytes())
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "bom.jsonl").write_text((tmp_path / "plain.jsonl").read_text(), "utf-8-sig")
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write((tmp_path / "plain.jsonl").read_text())
    names = ("a.csv", "a.tsv", "a.parquet", "saved", "saved_splits", "array.json", "bom.jsonl")
    for name in (*names, "packed.jsonl.gz", "tsv", "code.py.jsonl"):
        assert stream(load(tmp_path / name)) == expected, name


def test_numbers_in_a_table_are_text(tmp_path):
    """As they stand there, also where all are numbers, or only those after 10,000 words."""
    numbers = [f"{i % 7:03}" for i in range(60)] + ["1.10", "1e5", "+7", "None", "nan"]
    tokenizer = rust_tokenizer(None)
    for file, columns, words in (
        ("a.csv", "prompt,completion", []), ("late.csv", "prompt,completion", ["yes"] * 10_000),
        ("a.tsv", "n\ttext", []), ("own.csv", "n,own", []),
    ):  # fmt: skip
        separator = "\t" if "tsv" in file else ","
        lines = [f"12.50{separator}{word}\n" for word in [*words, *numbers]]
        (tmp_path / file).write_text(f"{columns}\n{''.join(lines)}")
        flags = {"text_column": "own"} if "own" in columns else {}
        found = tokenizer.decode(stream(load(tmp_path / file, tokenizer, **flags))).split("</s>")
        before = "12.50" if "prompt" in columns else ""
        expected = [before + word for word in [*words, *numbers]]
        assert set(found[1:-1]) <= set(expected) and len(found) > len(expected) - 9, file
        assert {before + "1.10", before + "003"} <= set(found), file


def test_zip_in_another_folder(tmp_path):
    (tmp_path / "packed").mkdir()
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])
    for name in ("packed/a.zip", "packed/a.jsonl.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.write(plain, "docs.jsonl")
        assert stream(load(tmp_path / name)) == stream(load(plain))


def test_pretty_and_large_strings(tmp_path):
    """JSON over many lines, line ends of Windows, strings of 64-bit offsets, empty files beside."""
    rows = [{"text": text} for text in TEXTS]
    expected = stream(load(write_jsonl(tmp_path / "folder" / "a.jsonl", rows)))
    (tmp_path / "folder" / "b.jsonl").write_text("")
    (tmp_path / "pretty.json").write_text(json.dumps(rows, indent=2))
    lines = (tmp_path / "folder" / "a.jsonl").read_text().replace("\n", "\r\n")
    (tmp_path / "crlf.jsonl").write_bytes(lines.encode("utf-8-sig"))
    features = datasets.Features({"text": datasets.Value("large_string")})
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "large.parquet")
    for name in ("folder", "pretty.json", "crlf.jsonl", "large.parquet"):
        assert stream(load(tmp_path / name)) == expected, name


def test_validation_split_of_a_row(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "x" * 17}])
    assert len(load(tmp_path)["validation"]) == 1


def test_pointers_of_git(tmp_path):
    """What git leaves in the place of a large file is named, and so is that file."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 4976\n"
    for name in ("a.jsonl", "a.parquet", "a.txt", "folder/train.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(pointer)
        path = tmp_path / name if "/" not in name else tmp_path / "folder"
        with pytest.raises(script.UserError, match=rf"{name} is a pointer of Git LFS"):
            load(path)


def test_words_that_mean_nothing_to_pandas(tmp_path):
    """NA, null and None are answers as others are; once such rows were dropped as empty."""
    words = ("NA", "null", "None", "nan", "")
    rows = "".join(f"what?,{words[i % 5]}\n" for i in range(200))
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{rows}")
    data = load(tmp_path / "a.csv")
    assert "160 documents in train, 40 empty" in told(data)
    assert all(f"what?{word}" in text_of(stream(data)) for word in words[:4])


def test_damaged_archive_and_tokenizer(tmp_path):
    """Errors that libraries raise as plain exceptions are one message, with the file."""
    packed = bytearray(gzip.compress(b"a line of text\n" * 2000))
    packed[30:60] = bytes(30)
    (tmp_path / "text.txt.gz").write_bytes(packed)
    with pytest.raises(script.UserError, match=r"text\.txt\.gz, cached in [^\n]*decompressing"):
        load(tmp_path / "text.txt.gz")
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(script.UserError, match=r"data\.jsonl, .*UNK"):
        load(path, tokenizer)


def test_surplus_fields(tmp_path):
    """A row of a CSV with more fields than the header does not shift the others."""
    rows = "".join(f"text {i},{i},surplus\n" for i in range(90))
    (tmp_path / "a.csv").write_text(f"text,id\n{rows}")
    words = text_of(stream(load(tmp_path / "a.csv")))
    assert "text 7" in words and "surplus" not in words


@pytest.mark.parametrize("split", ["validation", "test"])
def test_folder_without_train(tmp_path, split):
    write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text} for text in TEXTS])
    assert "60 documents in train, 0 empty" in told(load(tmp_path))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_empty_documents_are_skipped(tmp_path, kind):
    """Empty and null ones, whose number is told, leave no end token behind."""
    rows = [row for text in TEXTS for row in ({"text": text}, {"text": ""}, {"text": None})]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    if kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("n,text\n" + "".join(f'1,"{text}"\n2,\n3,\n' for text in TEXTS))
    data = load(path)
    plain = load(write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS]))
    assert stream(data) == stream(plain)
    assert "60 documents in train, 120 empty" in told(data)
    assert "60 documents in train, 0 empty" in told(plain)


def test_only_the_text_is_read(tmp_path):
    """Other columns may change their type after the first ten megabytes, not from file to file."""
    rows = [{"text": "x" * 4000, "meta": None}] * 3000 + [{"text": "x", "meta": "x"}]
    data = load(write_jsonl(tmp_path / "late.jsonl", rows), rust_tokenizer(), 4096)
    assert "3,001 documents" in told(data)
    write_jsonl(tmp_path / "two" / "a.jsonl", [{"text": text, "a": 1} for text in TEXTS])
    write_jsonl(tmp_path / "two" / "b.jsonl", [{"text": text, "b": [2]} for text in TEXTS])
    with pytest.raises(script.UserError, match=r"two, cached in [^\n]*$"):
        load(tmp_path / "two")


def test_each_document_begins_and_ends_once(tmp_path, monkeypatch):
    """As the tokenizer itself does it; literal tokens are not doubled, pieces are no documents."""
    monkeypatch.setattr(script, "PIECE", shorter_pieces(20))
    long = "".join(f"line {i}\n" for i in range(50))
    texts = ["plain", "<s>with its own", "ended</s>", "<s>both</s>", long] * 9
    path = write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    for first in ("<s>", None):
        tokenizer = rust_tokenizer(first)
        words = tokenizer.decode(stream(load(path, tokenizer)))
        documents = words.split("</s>")[:-1]
        start = "<s>" if first else ""
        expected = {start + "plain", "<s>with its own", start + "ended", "<s>both", start + long}
        assert set(documents) == expected
    # A tokenizer that ends a text by itself, as ByT5 does.
    words = stream(load(path, ByT5Tokenizer(extra_ids=125)))
    assert all(words[i + 1] != 1 for i, token in enumerate(words[:-1]) if token == 1)


def test_long_text_is_tokenized_in_pieces(tmp_path, monkeypatch):
    """At line ends, or anywhere in a text without any; all of it comes back."""
    sizes = []

    class Watched(type(BYTES)):
        def __call__(self, texts, **options):
            sizes.extend(map(len, [texts] if isinstance(texts, str) else texts))
            return super().__call__(texts, **options)

    watched = copy.deepcopy(BYTES)
    watched.__class__ = Watched
    monkeypatch.setattr(script, "PIECE", shorter_pieces(100))
    for name, text in (("lines", "a line of text\n" * 400), ("none", "no line end " * 400)):
        (tmp_path / f"{name}.txt").write_text(text)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text}])
        for ending in ("txt", "jsonl"):
            sizes.clear()
            found = stream(load(tmp_path / f"{name}.{ending}", watched))
            expected = [byte + 3 for byte in text.encode()] + [1]
            assert found == expected[: len(found)] and len(expected) - len(found) < 16
            assert max(sizes) <= 200 and len(sizes) > 20
            if name == "lines":
                assert {size % 15 for size in sizes[1:]} == {0}


@pytest.mark.parametrize("make", [llama2_tokenizer, rust_tokenizer])
def test_tokens_of_a_long_text(tmp_path, make):
    """Of up to 65,536 characters they are transformers'; then each piece is a text of its own."""
    tokenizer, words = make(), "hello yes the fox, says\n"
    for length in (65_000, 80_000):
        text = (words * (length // len(words) + 1))[:length]
        (tmp_path / "a.txt").write_text(text)
        found = stream(load(tmp_path / "a.txt", tokenizer))
        if length < 2**16:
            expected = tokenizer(text).input_ids
        else:
            cut = text.index("\n", 2**16) + 1  # where a line ends
            rest = tokenizer(text[cut:], add_special_tokens=False).input_ids
            expected = tokenizer(text[:cut]).input_ids + rest
        expected.append(tokenizer.eos_token_id)
        assert found == expected[: len(found)] and len(expected) - len(found) < 16


def test_literal_special_tokens(tmp_path):
    """In a text they are what the tokenizer makes of them."""
    tokenizer, text = rust_tokenizer(), "a<|im_start|>b</s>c<|im_end|> and more of it"
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    assert all(one_row(tmp_path / "a.jsonl", {"text": text}, tokenizer, ids))


def test_tokenizer_that_ends_texts(tmp_path):
    """add_eos_token: one end token, not two, as for chats of a template with one."""
    tokenizer = rust_tokenizer()
    single = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=single
    )
    ids = tokenizer("a text").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert all(one_row(tmp_path / "a.jsonl", {"text": "a text"}, tokenizer, ids))
    tokenizer.chat_template, chat = R1, turns("a", "yes")
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    one_row(tmp_path / "b.jsonl", {"messages": chat}, tokenizer, ids)


@pytest.mark.slow
def test_many_small_documents(tmp_path):
    """100,000 of them are read and tokenized in seconds: 9 on two busy cores."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100_000)])
    begin = time.process_time()
    data = load(path, rust_tokenizer(), 512)
    assert "100,000 documents" in told(data) and time.process_time() - begin < 60


def read_splits(folder: str) -> None:
    """Read a directory; the most memory of its tables stays below 100 MB."""
    script.read_splits(script.parse_args(["-d", folder]))
    assert 10**7 < pyarrow.default_memory_pool().max_memory() < 10**8


def test_few_text_files_are_in_memory(tmp_path):
    """Not the 1,000 rows that datasets writes at once by default: here 160 MB, twice."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"file {i}\n" * 500_000)
    read = functools.partial(read_splits, str(tmp_path / "texts"))
    Ranks(1, read, tmp_path / "log").succeed()


def test_bad_files_get_one_message(tmp_path):
    """In one line, with the file."""
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    files = {
        "cp1252.txt": "“quoted”\n".encode("cp1252") * 99,
        "utf16.txt": ("text\n" * 99).encode("utf-16"),
        "broken.jsonl": (good + '{"text": "no end').encode(),
        "surrogate.jsonl": (good + '{"text": "\\ud83d"}\n').encode(),
        "list.jsonl": (good + '["text"]\n').encode(),
        "number.jsonl": (good + '{"text": 5}\n').encode(),
        "list_of_lists.json": b'[["text"]]',
        "picture.bin": b"\x89PNG",
        "texts.txt.tar": b"an archive",
        "texts.txt.zip": b"PK, an archive",
        "texts.xml": b"<text/>",
        "header.csv": b"text\n",
        "newline.jsonl": b"\n",
        "broken.parquet": b"PAR1 and so on",
        "broken.csv": b"text\n" + b'"no end\n' * 9,
        "broken.jsonl.gz": gzip.compress(good.encode())[:-20],
        "empty.txt": b"",
        "empty.jsonl": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(script.UserError) as error:
            load(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"-d {tmp_path / name}, cached in ") and "\n" not in message
    folders = {
        "d[1]": ("a.txt", good, "takes its name for a pattern"),  # it would read d1
        "script": ("script.py", good, "scripts are no longer supported"),
        "empty": ("a.jsonl", "", "it is empty"),
    }
    (tmp_path / "d1").mkdir()
    (tmp_path / "d1" / "a.txt").write_text(good)
    for folder, (file, content, words) in folders.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
        with pytest.raises(script.UserError, match=rf"^-d [^\n]*{words}[^\n]*$"):
            load(tmp_path / folder)
    (tmp_path / "folder").mkdir()
    for name in ("good.txt", "cp1252.txt"):
        (tmp_path / "folder" / name).write_bytes(files.get(name, b"good"))
    with pytest.raises(script.UserError, match=r"folder, cached in [^\n]*'utf-8' codec"):
        load(tmp_path / "folder")
    for name in ("nothing.jsonl", "nothing", ".txt"):
        with pytest.raises(script.UserError):
            load(tmp_path / name)


def test_id_beyond_the_vocabulary(tmp_path):
    """More ids than the model has are no error, unless one is in the text."""
    tokenizer = rust_tokenizer()
    tokenizer.add_tokens(["<img>"])
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    size = len(tokenizer) - 1
    load(path, tokenizer, vocab_size=size)
    write_jsonl(path, [{"text": text} for text in [*TEXTS, "an <img> here"]])
    with pytest.raises(script.UserError, match=f"'<img>' is token {size}, .*{size}"):
        load(path, tokenizer, vocab_size=size)


def counted(data, tokenizer) -> list[str]:
    """The stretches of tokens that count, as text."""
    pairs = zip(stream(data), stream(data, "counts"), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    stretches = [[*pairs] for counts, pairs in groups if counts]
    return [tokenizer.decode([token for token, _ in stretch]) for stretch in stretches]


def test_prompt_and_completion(tmp_path):
    """The completion counts, with one end token."""
    rows = [{"prompt": f"question {i}? ", "completion": f"answer {i}"} for i in range(80)]
    rows += [
        {"prompt": "", "completion": "without a prompt</s>"},
        {"prompt": None, "completion": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = rust_tokenizer()
    data = load(path, tokenizer, length=24)
    expected = {f"answer {i}</s>" for i in range(80)} | {"without a prompt</s>"}
    assert len(expected & set(counted(data, tokenizer))) > 40
    whole = "".join(text.replace("</s>", "") for text in counted(data, tokenizer))
    assert "question" not in whole and "<s>" not in whole
    text = tokenizer.decode(stream(data))
    assert text.startswith("<s>question") and "? answer" in text
    labels = sum(rows[:]["counts"][:, 1:].sum().item() for rows in data.values())
    assert "81 documents" in told(data) and "1 empty" in told(data)
    assert f"{labels:,} labels that count" in told(data)
    ids, batch = script.load_batch(data["train"], [0, 2], torch.device("cpu"))
    assert ids.shape == batch.shape == (2, 24) and ids.dtype == batch.dtype == torch.int64
    assert (batch == -100).any() and torch.equal(ids[batch != -100], batch[batch != -100])


def test_rows_without_a_label_are_dropped(tmp_path):
    """Also those whose only label is that of their first token, which nothing predicts."""
    rows = [{"prompt": "p" * 61, "completion": "ab"}] * 20  # 64 tokens each with the end token
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), length=16)
    assert {row["input_ids"].tolist().count(ord("p") + 3) for row in data["train"]} == {13}
    assert len(data["train"]) + len(data["validation"]) == 20
    rows = [{"prompt": "p" * 63, "completion": "a</s>"}] * 20  # the end token begins a row
    tokenizer = rust_tokenizer(None)
    data = load(write_jsonl(tmp_path / "b.jsonl", rows), tokenizer, length=13)
    assert all(row["counts"][1:].any() for row in data["train"])


def test_chat(tmp_path):
    """The assistant's turns count, with what ends them."""
    rows = []
    for i in range(30):
        turns = [
            ("system", "be short"),
            ("user", f"a{i}?"),
            ("assistant", f"A{i}"),
            ("user", "b?"),
            ("assistant", "B"),
            ("user", "c?"),
            ("assistant", f"C{i}"),
        ]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    rows.append({"messages": []})
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    tokenizer = rust_tokenizer(template=CHATML)
    data = load(path, tokenizer, length=512)
    assert "31 documents in train, 1 empty" in told(data)
    text = tokenizer.decode(stream(data))
    assert "<s>" not in text and "</s>" not in text, "the template has no such tokens"
    order = [int(i) for i in re.findall(r"user\na(\d+)\?", text)]
    expected = [f"{word}<|im_end|>\n" for i in order for word in (f"A{i}", "B", f"C{i}")]
    found = counted(data, tokenizer)
    assert found == expected[: len(found)] and len(found) > 60
    conversation = tokenizer.apply_chat_template(rows[order[0]]["messages"], tokenize=False)
    assert text.startswith(conversation)


def turns(*texts: str) -> list[dict]:
    """A chat that begins with a question."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def one_row(path, row, tokenizer, expected: list[int]) -> list[bool]:
    """Which tokens count in a file that repeats `row`, whose tokens have to be `expected`."""
    write_jsonl(path, [row] * 40)
    data = load(path, tokenizer, len(expected))
    assert {tuple(ids) for ids in data["train"][:]["input_ids"].tolist()} == {tuple(expected)}
    return data["train"][0]["counts"].tolist()


@pytest.mark.parametrize("row", [
    {"prompt": "the fox:", "completion": " yes"}, {"prompt": "the fox: ", "completion": "yes"},
    {"prompt": "the fox\n", "completion": "hello yes"}, {"prompt": "the fo", "completion": "x"},
])  # fmt: skip
@pytest.mark.parametrize("make", [llama2_tokenizer, rust_tokenizer])
def test_pair_has_the_tokens_of_its_text(tmp_path, make, row):
    """Those that transformers makes of prompt and completion together; the rest counts."""
    tokenizer = make()
    whole = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
    counts = one_row(tmp_path / "pair.jsonl", row, tokenizer, whole)
    first, prompt = counts.index(True), tokenizer(row["prompt"]).input_ids
    assert all(counts[first:])
    # A token of both belongs to the prompt, in which it begins.
    assert len(os.path.commonprefix([whole, prompt])) <= first <= len(prompt)  # noqa: RUF071
    assert row["completion"].endswith(tokenizer.decode(whole[first:-1]).strip())


@pytest.mark.parametrize("messages", [turns("the fox", "hello yes"), turns("a", "b", "c", "yes"),
                                      turns("a", "[INST]<s></s>", " x ", "\n\n yes")])  # fmt: skip
@pytest.mark.parametrize("template", [CHATML, ZEPHYR, R1])
@pytest.mark.parametrize("make", [llama2_tokenizer, rust_tokenizer])
def test_chat_has_the_tokens_of_transformers(tmp_path, make, template, messages):
    """Also the labels, where the template tells transformers which are the assistant's."""
    tokenizer = make(template=template)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    counts = one_row(tmp_path / "chat.jsonl", {"messages": messages}, tokenizer, expected)
    groups = itertools.groupby(zip(expected, counts, strict=True), key=lambda pair: pair[1])
    found = [tokenizer.decode([token for token, _ in group]) for count, group in groups if count]
    end = "<|im_end|>\n" if template == CHATML else "</s>"
    assert len(found) == len(messages) // 2
    for text, answer in zip(found, messages[1::2], strict=True):
        assert text.strip() == (answer["content"] + end).strip()
    if template == CHATML:
        answers = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
        answers += "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        marked = template.replace("{{ m.content }}<|im_end|>\n", answers)
        reference = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert reference["input_ids"] == expected
        assert reference["assistant_masks"] == [int(count) for count in counts]


def test_template_that_drops_earlier_thoughts(tmp_path):
    """Each answer is an example of its own, as the template renders it when it is the last one."""
    tokenizer, chat = rust_tokenizer(template=THINKS), turns("a", "hello", "b", "yes")
    first, both = (
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        for messages in (chat[:2], chat)
    )
    assert both[: len(first)] != first, "the template does not do what this is about"
    row = {"messages": chat}
    counts = one_row(tmp_path / "chat.jsonl", row, tokenizer, first + both)
    for answer, ids in (("hello", first), ("yes", both)):
        mine, counts = counts[: len(ids)], counts[len(ids) :]
        text = tokenizer.decode([i for i, count in zip(ids, mine, strict=True) if count])
        assert text == f"<think>\n\n</think>\n\n{answer}<|im_end|>\n"
    # Chats of one turn are not refused beside it, nor changed.
    rows = [{"messages": chat}] + [{"messages": chat[:2]}] * 79
    data = load(write_jsonl(tmp_path / "mixed.jsonl", rows), tokenizer, 256)
    assert "80 documents in train" in told(data)
    text = tokenizer.decode(stream(data))
    assert text.count(tokenizer.decode(both)[:-1]) == 1


def test_tools(tmp_path):
    """Those of a row are passed to its template, which has to take them."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tokenizer, chat = rust_tokenizer(template=TOOLS), turns("a", "hello")
    ids = [
        tokenizer.apply_chat_template(chat, tools=tools, tokenize=True, return_dict=False)
        for tools in ([tool], None)
    ]
    assert ids[0] != ids[1]
    row = {"tools": [tool], "messages": chat}
    counts = one_row(tmp_path / "a.jsonl", row, tokenizer, ids[0])
    assert sum(counts) == len(tokenizer("hello<|im_end|>\n", add_special_tokens=False).input_ids)
    for nothing in ([], None):  # beside a row that has some, which gives the column its type
        rows = [row] + [{"tools": nothing, "messages": chat}] * 60
        data = load(write_jsonl(tmp_path / "b.jsonl", rows), tokenizer, 256)
        assert tokenizer.decode(stream(data)).count('"name"') == 1
    with pytest.raises(script.UserError, match="there are tools beside messages, but the chat"):
        load(tmp_path / "a.jsonl", rust_tokenizer(template=CHATML))


def test_tool_calls(tmp_path):
    """An answer may be a call without content, with arguments of its own."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls | tojson }}")
    tokenizer = rust_tokenizer(template=template)
    rows = []
    for arguments in ({"a": 1}, {"b": "x"}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        calls = {"role": "assistant", "content": None, "tool_calls": [call]}
        answered = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "yes"}]
        rows.append({"messages": [*turns("a"), calls, *answered]})
    data = load(write_jsonl(tmp_path / "a.jsonl", rows * 20), tokenizer, 512)
    text, found = tokenizer.decode(stream(data)), set(counted(data, tokenizer))
    for row in rows:
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) in text
        assert json.dumps(row["messages"][1]["tool_calls"]) + "<|im_end|>\n" in found
    assert "yes<|im_end|>\n" in found and not any("tool\n" in answer for answer in found)


def test_chat_that_begins_with_the_assistant(tmp_path):
    """It trains; the first turn, which nothing asks for, does not count."""
    tokenizer = rust_tokenizer(template=CHATML)
    chat = [{"role": "assistant", "content": "welcome"}, *turns("a", "yes")]
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    counts = one_row(tmp_path / "chat.jsonl", {"messages": chat}, tokenizer, expected)
    answer = [i for i, count in zip(expected, counts, strict=True) if count]
    assert tokenizer.decode(answer) == "yes<|im_end|>\n"


def test_template_with_the_date(tmp_path):
    """The description says so, because a later day with another cache reads other tokens."""
    today = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns("a", "yes")}] * 40)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    for template, path, said in (
        (today + CHATML, chat, True), (CHATML, chat, False), (today + CHATML, text, False)
    ):  # fmt: skip
        tokenizer = rust_tokenizer(template=template)
        assert ("chat template has put the date" in told(load(path, tokenizer))) is said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "messages": []}, "its columns should be text, prompt and completion, or"),
        ({"text": "a", "prompt": "a", "completion": "b"}, "its columns should be text, prompt"),
        ({"messages": [{"from": "human", "value": "x"}]}, "a message should have role and content"),
        ({"messages": ["x"]}, "a message should have role and content"),
        ({"messages": [{"content": "x"}, *turns("a")]}, "a message should have role and content"),
        ({"messages": "x"}, r"they are {'messages': \"Value\('string'\)\"}"),
        ({"messages": 5}, r"they are {'messages': \"Value\('int64'\)\"}"),
        (
            {"messages": [{"role": "gpt", "content": "x"}, {"role": "user", "content": "x"}]},
            "which in messages are those of the role assistant",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "a message should have role and content",
        ),
        ({"prompt": "a", "completion": ""}, "fewer than 2 sequences of 16 tokens"),
        ({"prompt": "a", "completion": None}, "its columns should be text, prompt and completion"),
        ({"prompt": ["a"], "completion": "b"}, "its columns should be text, prompt and completion"),
        ({"prompt": "b", "completion": ["a"]}, "its columns should be text, prompt and completion"),
    ],
)
def test_bad_examples(tmp_path, row, message):
    path = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(script.UserError, match=rf"bad\.jsonl, .*{message}"):
        load(path, rust_tokenizer(template=CHATML))


def test_chats_that_cannot_be_labelled(tmp_path):
    turns = [{"role": role, "content": "x y"} for role in ("user", "assistant") * 2]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)
    last = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else 'earlier' }}")
    refuses = "{{ raise_exception('roles have to alternate') }}"
    for template, message in (
        (None, "chat.template"), (last, "changes the turns before"), (refuses, "have to alternate"),
        (CHATML.replace("m.content", "m.content + 1"), "can only concatenate str"),
    ):  # fmt: skip
        with pytest.raises(script.UserError, match=f"chat.jsonl, .*{message}"):
            load(path, rust_tokenizer(template=template))
    no_answer = write_jsonl(tmp_path / "user.jsonl", [{"messages": turns[:1]}] * 99)
    with pytest.raises(script.UserError, match="those of the role assistant"):
        load(no_answer, rust_tokenizer(template=CHATML))


def test_a_bug_keeps_its_traceback():
    """Only what means a bad file or value becomes the user's error."""
    for error in (KeyError("ours"), TypeError("ours"), AttributeError("ours")):
        with pytest.raises(type(error)), script.user_errors("-d x"):
            raise error
    for error in (OSError("no\n  disk"), UnicodeDecodeError("utf-8", b"", 0, 1, "bad"),
                  ImportError("flash_attn"), json.JSONDecodeError("x", "", 0), ValueError(),
                  EOFError()):  # fmt: skip
        with pytest.raises(script.UserError, match=r"^-d x: [^\n]+$"), script.user_errors("-d x"):
            raise error


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
    data = script.load_data(script.parse_args(["-s", "256"]), BYTES, len(BYTES))
    ids = itertools.chain.from_iterable(data["train"][:400]["input_ids"].tolist())
    text = text_of(ids)
    assert "import" in text and "def " in text
    assert len(data["validation"]) == (len(data["train"]) + len(data["validation"])) // 20
