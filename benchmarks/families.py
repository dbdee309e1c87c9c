"""Which causal LMs of the installed transformers train right under the plan, unchanged.

    python benchmarks/families.py [model_type ...]

For each model type: a tiny random model, saved by transformers, is loaded on (dp, tp) = (1, 2),
trained three steps beside plain transformers (every gradient and weight within 1e-4), exported,
and reloaded by transformers bit for bit. A mixture of experts also on (2, 1) and (2, 2). Writes
docs/families.json; CPU only, two to eight minutes.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from ranks import Ranks
from test_models import EXPERTS, SIZES, family
from train_llm import EXPERT_MODELS

MOST_PARAMETERS = 20_000_000  # a configuration that ignores the small sizes is not tried


def tiny_config(model_type: str) -> transformers.PretrainedConfig:
    """A configuration of a few hundred thousand parameters without dropout."""
    config = AutoConfig.for_model(model_type, **SIZES, **EXPERTS, head_dim=4)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"not tried: {parameters:,} parameters at the smallest")
    return config


def check(model_type: str, tp: int, folder: Path) -> None:
    """One rank's part; what went wrong, or nothing, is written to a file of its own."""
    report = folder / f"{model_type}.{os.environ['RANK']}"
    try:
        config = tiny_config(model_type)
        dist.init_process_group("gloo")
        family(config, tp)
        report.write_text("ok")
    except BaseException as error:
        text = re.sub(r"\S*/(tmp\w+)/in\b", "FOLDER", " ".join(str(error).split()))
        report.write_text(text if type(error) is ValueError else f"{type(error).__name__}: {text}")
        raise


def result(model_type: str, folder: Path, ranks: int = 2, tp: int = 2) -> str:
    """ "ok", or what went wrong, of some forked ranks."""
    reports = [folder / f"{model_type}.{rank}" for rank in range(ranks)]
    for report in reports:
        report.unlink(missing_ok=True)
    function = functools.partial(check, model_type, tp, folder)
    Ranks(ranks, function, folder / f"{model_type}.log").wait(60, grace_s=0.5)
    texts = [report.read_text() if report.exists() else "did not finish" for report in reports]
    return next((text for text in texts if text != "ok"), "ok")


def main(model_types: list[str]) -> None:
    """Try all, print each, write the file."""
    folder, results = Path("/tmp/families"), {}
    folder.mkdir(exist_ok=True)
    for model_type in model_types or sorted(CAUSAL_LMS):
        layouts = [(2, 2), (2, 1), (4, 2)] if model_type in EXPERT_MODELS else [(2, 2)]
        found = (result(model_type, folder, *layout) for layout in layouts)
        results[model_type] = next((text for text in found if text != "ok"), "ok")
        print(f"{model_type}: {results[model_type][:150]}", flush=True)
    if model_types:
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "results": results}, indent=1)
    (ROOT / "docs" / "families.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
