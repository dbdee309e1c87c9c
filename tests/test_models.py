"""Models of other families: loaded into shards, trained as plain transformers does, exported."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import jobs
import train_llm as script
from jobs import Job
from ranks import passes
from test_parity import TOLERANCE, LiveBytes, build_model, compare, plain_model

SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=12, num_key_value_heads=6, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Llama": {}, "Mistral": {"sliding_window": 8}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "SmolLM3": {}, "Olmo2": {}, "Gemma2": {"head_dim": 4}, "Cohere": {},
    "Granite": {"logits_scaling": 4.0},
}  # fmt: skip


def config_of(family: str, **changes) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{family}Config")(**SIZES | FAMILIES.get(family, {}) | changes)


def shared_folder() -> Path:
    """A new directory that all ranks know."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def saved(config, folder: Path, dtype=torch.float32) -> None:
    """Save a plain model with random weights, in several files, from rank 0."""
    if dist.get_rank() == 0:
        plain_model(config).to(dtype).save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    dist.barrier()


def family(config, tp: int, dtype=torch.float32) -> None:
    """Loads, has parity over three steps, and comes back from an export bit for bit."""
    folder, tied = shared_folder(), config.tie_word_embeddings
    saved(config, folder / "in", dtype)

    def export(model):
        whole = {n: p.full_tensor() for n, p in model.named_parameters()}
        script.EXPORT_FILE_BYTES = 40_000
        script.export_model(model, ByT5Tokenizer(), torch.float32, folder / "out")
        dist.barrier()
        assert not (folder / "out" / "sharded").exists()
        assert len(list((folder / "out").glob("*.safetensors"))) > 1
        back, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
        assert not any(info.values()), info
        assert back.config.tie_word_embeddings == tied and back.dtype == torch.float32
        for n, p in back.named_parameters():
            assert torch.equal(p, whole[n]), n
        ids = torch.arange(32)[None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits.full_tensor()
            torch.testing.assert_close(logits, back(ids).logits, rtol=1e-4, atol=1e-4)

    errors = compare(tp, config, folder=folder / "in", then=export, steps=3)
    bad = {key: error for key, error in errors.items() if not error < TOLERANCE}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    assert not bad, bad


def memory_at_load() -> None:
    """Loading takes no more than the shards and one layer, or the embedding."""
    folder = shared_folder()
    config = config_of("Llama", hidden_size=96, intermediate_size=384, num_hidden_layers=8)
    saved(config, folder)
    with LiveBytes() as memory:
        mesh = script.build_mesh("cpu", 2)
        model = build_model(config, mesh, torch.float32, 0, folder)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    layer = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    whole = sum(4 * p.numel() for p in model.parameters())
    assert shards < memory.peak < shards + layer + 64 * 1024 < whole, (shards, memory.peak, layer)


def bad_weights() -> None:
    """Missing, unexpected and misshapen tensors are named."""
    folder = shared_folder()
    config = config_of("Llama")
    mesh = script.build_mesh("cpu", 2)
    if dist.get_rank() == 0:
        plain_model(config).save_pretrained(folder)
    dist.barrier()
    original = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    changes = {
        f"{norm} is missing, the model's (48,)": {k: v for k, v in original.items() if k != norm},
        "extra.weight is (1,), the model's missing": original | {"extra.weight": torch.ones(1)},
        f"{norm} is (7,), the model's (48,)": original | {norm: torch.ones(7)},
    }
    for message, tensors in changes.items():
        dist.barrier()
        if dist.get_rank() == 0:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        dist.barrier()
        try:
            build_model(config, mesh, torch.float32, 0, folder)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"accepted although {message}")


def refused() -> None:
    """What the plan cannot shard rightly is refused by name."""
    mesh = script.build_mesh("cpu", 2)
    for config, message in (
        (config_of("Phi3"), "model.layers.0.self_attn.qkv_proj.weight"),
        (config_of("Mixtral"), "model.layers.0.mlp.experts.gate_up_proj"),
        (config_of("Glm"), "model.layers.0.mlp.gate_up_proj.weight"),
        (config_of("Olmo2", num_key_value_heads=3), "k_norm spans all key-value heads"),
        (transformers.GPT2Config(n_embd=48, n_head=12, n_layer=1), "GPT2LMHeadModel does not keep"),
        (transformers.BertConfig(hidden_size=48, is_decoder=True), "BertLMHeadModel does not keep"),
    ):
        try:
            build_model(config, mesh, torch.float32, 0)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{type(config)} was accepted")


CHECKS = {
    f"{name}_{'tied' if tied else 'untied'}_tp{tp}": functools.partial(
        family, config_of(name, tie_word_embeddings=tied), tp
    )
    for name in FAMILIES for tied in (False, True) for tp in (2, 3)
}  # fmt: skip
EXTRA = {check.__name__: check for check in (memory_at_load, bad_weights, refused)}
EXTRA["Llama_stored_in_bf16"] = functools.partial(
    family, config_of("Llama", tie_word_embeddings=True), 2, torch.bfloat16
)
CHECKS |= EXTRA
TIED = ("Gemma2", "SmolLM3", "Olmo2", "Cohere")
GROUPS = {  # benchmarks/families.py tries every model type of the installed transformers
    2: [f"{name}_{'tied' if name in TIED else 'untied'}_tp2" for name in FAMILIES],
    4: ["Llama_untied_tp2", *EXTRA],
    3: ["Qwen3_tied_tp3", "Gemma2_untied_tp3"],
}


@pytest.mark.parametrize(("world_size", "name"), [(w, name) for w in GROUPS for name in GROUPS[w]])
def test_on_ranks(request, world_size, name):
    passes(request, world_size, GROUPS[world_size], name)


def test_files_of_a_hub_id(monkeypatch, tmp_path):
    """Only transformers' own safetensors files are fetched, of all that a repository may have."""
    (tmp_path / "model.safetensors").touch()
    fetched = []
    for reader in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(reader, "from_pretrained", lambda name: None)

    def download(name, allow_patterns):
        files = ["config.json", "pytorch_model.bin", "consolidated.safetensors", *ours]
        files += ["original/model.safetensors", "model.fp16.safetensors"]
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        return tmp_path

    monkeypatch.setattr(script, "snapshot_download", download)
    for ours in (["model.safetensors"], ["model-00001-of-00002.safetensors"]):
        fetched.clear()
        assert script.find_model("no/such-directory", False)[2] == tmp_path
        assert fetched == ours


def test_own_model_and_data(tmp_path):
    """A user's model and text, from the command line into transformers' generate."""
    torch.manual_seed(0)
    config = config_of("Qwen3", vocab_size=384, eos_token_id=1)
    plain_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=125).save_pretrained(tmp_path / "model")
    flags = ["-s", 64, "--max-steps", 2, "--global-batch-size", 2, "--log-freq", 10]
    Job(tmp_path, 2, "--tp", 2, "-m", tmp_path / "model", *flags, "-e", "run").succeed()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert model.dtype == torch.bfloat16 and len(tokenizer) == 384
    prompt = tokenizer("All work", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=4).shape == (1, 12)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "export", "metrics.jsonl"]

    # The same by its hub id, as the cache keeps it, in several files without their index.
    repository, revision = tmp_path / "hub" / "models--org--model", "0" * 40
    snapshot = repository / "snapshots" / revision
    shutil.copytree(tmp_path / "model", snapshot)
    (snapshot / "model.safetensors").unlink()
    plain_model(config).to(torch.bfloat16).save_pretrained(snapshot, max_shard_size="50KB")
    (snapshot / "model.safetensors.index.json").unlink()
    assert len(list(snapshot.glob("model-*.safetensors"))) > 1
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    hooks = (functools.partial(use_hub_cache, str(tmp_path / "hub")),)
    Job(tmp_path, 2, "-m", "org/model", *flags, "-e", "hub", hooks=hooks).succeed()
    first, second = (jobs.rows(tmp_path / name)[0] for name in ("run", "hub"))
    assert first["tp"] == 2 and second["tp"] == 1
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)

    (tmp_path / "model" / "model.safetensors").unlink()
    Job(tmp_path, 2, "-m", tmp_path / "model", *flags).fail("no *.safetensors file")
    with pytest.raises((OSError, ValueError), match=r"config\.json|model type|model_type"):
        script.find_model(str(tmp_path), False)
    assert script.find_model(str(tmp_path / "model"), random_init=True)[2] is None


def use_hub_cache(folder: str) -> None:
    """A hook: what was downloaded is in `folder`."""
    huggingface_hub.constants.HF_HUB_CACHE = folder


def test_no_network(tmp_path):
    Job(tmp_path, 2, "-m", "no/such-model").fail("error: -m no/such-model:")
