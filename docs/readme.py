"""Fills README.md and the pages here from the script and from results: python docs/readme.py

What stands between `<!-- FILE -->` and `<!-- end -->` is the text of that Markdown file here; for
`plan.md N` its N-th table; for `train_llm.py FIRST LAST` the script from one function to the end of
another.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script(first: str, last: str) -> str:
    """The script's text from function `first` to the end of function `last`, after its imports."""
    text = (ROOT / "train_llm.py").read_text()
    begin = text.index(f"\ndef {first}(") + 1
    end = re.compile(r"\n\n\n").search(text, text.index(f"\ndef {last}(")).start()
    imports = re.findall(
        r"^(?:import torch|import torch\.distributed as dist|from torch import nn|from torch"
        r"\.distributed\.(?:device_mesh|fsdp|tensor|tensor\.parallel)"
        r" import (?:[^(\n]+|\([^)]+\)))$",
        text,
        re.MULTILINE,
    )
    return "```python\n" + "\n".join(imports) + f"\n\n\n{text[begin:end]}\n```"


def families() -> str:
    """The model types that train right, and those that are refused, from families.json."""
    found = json.loads((ROOT / "docs" / "families.json").read_text())
    right = ", ".join(f"`{name}`" for name, result in found["results"].items() if result == "ok")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{right} ({versions}, {len(found['results'])} model types tried)"


def source(words: str) -> str:
    """The text that belongs between the marks `words`."""
    name, *rest = words.split()
    if name == "train_llm.py":
        return script(*rest)
    if name == "families.json":
        return families()
    text = (ROOT / "docs" / name).read_text().strip()
    if rest:  # a table of plan.md, with what is said of all
        tables = re.split(r"\n\n(?=\*\*)", text)
        text = f"{tables[int(rest[0]) - 1]}\n\n{text.splitlines()[-1]}"
    return text


def fill(page: str) -> str:
    """A page with all marked parts as they should be."""
    return re.sub(
        r"<!-- (\S+\.(?:md|py|json)[^>]*?) -->\n.*?<!-- end -->",
        lambda m: f"<!-- {m[1]} -->\n{source(m[1])}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


PAGES = [ROOT / "README.md", ROOT / "docs" / "running.md", ROOT / "docs" / "speed.md"]

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
