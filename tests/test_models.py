"""Models of other families: loaded into shards, trained as plain transformers does, exported."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import jobs
import train_llm as script
from jobs import Job
from ranks import passes
from test_data import THINKS, ZEPHYR, llama2_tokenizer, turns
from test_parity import (
    TOLERANCE,
    LiveBytes,
    build_model,
    compare,
    plain_model,
    plain_optimizer,
    plain_step,
)

SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=12, num_key_value_heads=6, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# For mixtures of experts, whose types have different names for the same.
EXPERTS = dict.fromkeys(
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4
) | dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2)
EXPERTS |= dict(
    moe_intermediate_size=24, shared_expert_intermediate_size=24, n_shared_experts=1, n_group=2,
    topk_group=1, first_k_dense_replace=1, num_dense_layers=1, moe_layer_start_index=1,
    router_jitter_noise=0.0,
)  # fmt: skip
BYTES = ByT5Tokenizer(extra_ids=125)
FAMILIES = {
    "Llama": {}, "Mistral": {"sliding_window": 8}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "SmolLM3": {}, "Olmo2": {}, "Gemma2": {"head_dim": 4}, "Cohere": {},
    "Granite": {"logits_scaling": 4.0},
}  # fmt: skip


MIXTURES = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Glm4Moe", "GptOss", "Afmoe"]  # families.py: all


def config_of(family: str, **changes) -> transformers.PretrainedConfig:
    if family in MIXTURES:
        changes = EXPERTS | {"head_dim": 4} | changes
    return getattr(transformers, f"{family}Config")(**SIZES | FAMILIES.get(family, {}) | changes)


def shared_folder() -> Path:
    """A new directory that all ranks know."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return Path(name[0])


def saved(config, folder: Path, dtype=torch.float32) -> None:
    """Save a plain model with random weights, in several files, from rank 0."""
    if dist.get_rank() == 0:
        model = plain_model(config)
        for tensor in model.state_dict().values():
            if not tensor.any():  # a router's correction, which would not be missed
                tensor.copy_(torch.linspace(-0.01, 0.01, tensor.numel()).view_as(tensor))
        model.to(dtype).save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    dist.barrier()


def stored(folder: Path) -> dict[str, tuple]:
    """Shapes and types of all that the safetensors files of a folder hold, by name."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {n: (t.shape, t.dtype) for n, t in load_file(file).items()}
    return tensors


def family(config, tp: int, dtype=torch.float32) -> None:
    """Loads, has parity over three steps, and comes back from an export bit for bit."""
    folder, tied = shared_folder(), config.tie_word_embeddings
    saved(config, folder / "in", dtype)

    def export(model):
        whole = {
            n: t.full_tensor() if isinstance(t, DTensor) else t
            for n, t in model.state_dict().items()
        }
        script.export_model(model, ByT5Tokenizer(), torch.float32, folder / "out", "{}")
        dist.barrier()
        files = [load_file(file) for file in (folder / "out").glob("*.safetensors")]
        layers = [{n.split(".")[2] for n in names if ".layers." in n} for names in files]
        assert max(map(len, layers)) == 1, "no file has more than a layer"
        back, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
        assert not any(info.values()), info
        assert back.config.tie_word_embeddings == tied and back.dtype == torch.float32
        for n, p in back.state_dict().items():
            assert torch.equal(p, whole[n]), n
        if dtype == torch.float32:  # the names, shapes and types of plain transformers
            assert stored(folder / "out") == stored(folder / "in")
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


def memory_at_load(family: str = "Llama") -> None:
    """Loading takes no more than the shards and one layer, or the embedding."""
    folder = shared_folder()
    config = config_of(family, hidden_size=96, intermediate_size=384, num_hidden_layers=8)
    saved(config, folder)
    one_thread = mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1")  # all it sees
    with one_thread, LiveBytes() as memory:
        mesh = script.build_mesh("cpu", 2)
        model = build_model(config, mesh, torch.float32, 0, folder)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    layer = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    whole = sum(4 * p.numel() for p in model.parameters())
    assert shards < memory.peak < shards + layer + 64 * 1024 < whole, (shards, memory.peak, layer)


def bad_weights() -> None:
    """Missing, unexpected and misshapen tensors are named, on every rank."""
    folder = shared_folder()
    config = config_of("Llama")
    mesh = script.build_mesh("cpu", 2)
    if dist.get_rank() == 0:
        plain_model(config).save_pretrained(folder)
    dist.barrier()
    original = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    changes = {
        f"{{'missing_keys': {{'{norm}'}}}}": {k: v for k, v in original.items() if k != norm},
        "{'unexpected_keys': {'extra.weight'}}": original | {"extra.weight": torch.ones(1)},
        f"{{'mismatched_keys': {{('{norm}', ": original | {norm: torch.ones(7)},
        # Only the rank with the last row finds it, and all raise it.
        "{'mismatched_keys': {('lm_head.weight', ": original
        | {"lm_head.weight": torch.ones(config.vocab_size + 1, 48)},
    }
    for message, tensors in changes.items():
        dist.barrier()
        if dist.get_rank() == 0:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        dist.barrier()
        found = torch.tensor(0)
        try:
            build_model(config, mesh, torch.float32, 0, folder)
        except ValueError as error:
            assert message in str(error), error
            found += 1
        dist.all_reduce(found)
        assert found == dist.get_world_size(), f"accepted: {message}"


def refused() -> None:
    """What the plan cannot shard rightly is refused by name."""
    mesh = script.build_mesh("cpu", 2)
    for config, message in (
        (config_of("Phi3"), "model.layers.0.self_attn.qkv_proj.weight"),
        (config_of("Mixtral", num_local_experts=3, num_experts=3), "cannot shard experts.gate_up"),
        (config_of("Mixtral", experts_implementation="eager"), "eager cannot be sharded"),
        (config_of("Qwen2Moe", shared_expert_intermediate_size=25), "shared_expert.gate_proj"),
        (transformers.DeepseekV3Config(**SIZES | EXPERTS), "mlp.experts.gate_up_proj"),
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
EXTRA["memory_at_load_of_experts"] = functools.partial(memory_at_load, "Mixtral")
EXTRA["Llama_stored_in_bf16"] = functools.partial(
    family, config_of("Llama", tie_word_embeddings=True), 2, torch.bfloat16
)
CHECKS |= EXTRA
CHECKS |= {
    f"{name}_tp{tp}": functools.partial(family, config_of(name), tp)
    for name in MIXTURES for tp in (1, 2, 4)
}  # fmt: skip
TIED = ("Gemma2", "SmolLM3", "Olmo2", "Cohere")
GROUPS = {  # benchmarks/families.py tries every model type of the installed transformers
    2: [f"{name}_{'tied' if name in TIED else 'untied'}_tp2" for name in FAMILIES]
    + ["Qwen2Moe_tp2", "Mixtral_tp1"],
    8: ["GptOss_tp2"],  # two experts for each rank of a TP group, so FSDP shards each of them
    4: ["Llama_untied_tp2", *EXTRA, "Mixtral_tp4", "Glm4Moe_tp2", "Afmoe_tp2"],
    3: ["Qwen3_tied_tp3", "Gemma2_untied_tp3"],
}


@pytest.mark.parametrize(("world_size", "name"), [(w, name) for w in GROUPS for name in GROUPS[w]])
def test_on_ranks(request, world_size, name):
    passes(request, world_size, GROUPS[world_size], name)


def in_cache(folder: Path, hub: Path) -> None:
    """Put a model directory into a hub cache as org/model."""
    repository, revision = hub / "models--org--model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A tiny Llama in one file, with a tokenizer, in bf16."""
    config = config_of("Llama", vocab_size=384, eos_token_id=1, bos_token_id=None)
    plain_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values) -> None:
    """Set entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def one_rank(monkeypatch):
    """A process group and mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield script.build_mesh("cpu", 1)
    dist.destroy_process_group()


def loaded(folder, mesh) -> dict[str, torch.Tensor]:
    """The weights of the script's model, loaded from `folder`, or from the cache."""
    config, _, files, _ = script.find_model(str(folder), False)
    model = script.shard_model(config, mesh, torch.float32, False, False)
    script.init_weights(model, 0, only_buffers=True)
    script.load_weights(model, files)
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def same_as_transformers(weights: dict, folder: Path) -> bool:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    return all(torch.equal(weights[n], p.float()) for n, p in plain.named_parameters())


def test_files_that_count(one_rank, model_folder, tmp_path, monkeypatch):
    """model.safetensors, or those that its index names; also of a hub id in the cache."""
    other = {
        name: torch.zeros_like(w)
        for name, w in load_file(model_folder / "model.safetensors").items()
    }
    for name in ("model.fp16", "consolidated", "model-00001-of-00002", "a"):
        save_file(other, model_folder / f"{name}.safetensors", {"format": "pt"})
    save_file({"q.lora_A.weight": torch.ones(2)}, model_folder / "adapter_model.safetensors")
    (model_folder / "adapter_config.json").write_text("{}")
    assert same_as_transformers(loaded(model_folder, one_rank), model_folder)

    sharded = tmp_path / "sharded"
    shutil.copytree(model_folder, sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / "model-00001-of-00002.safetensors").unlink()
    plain_model(config_of("Llama", vocab_size=384)).save_pretrained(sharded, max_shard_size="50KB")
    save_file(other, sharded / "model-00009-of-00009.safetensors", {"format": "pt"})
    assert same_as_transformers(loaded(sharded, one_rank), sharded)

    in_cache(sharded, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same_as_transformers(loaded("org/model", one_rank), sharded)

    next(sharded.glob("model-00002-of-*")).unlink()
    with pytest.raises(script.UserError, match=r"No such file.*model-0"):
        script.find_model(str(sharded), False)


def test_weights_that_transformers_ignores(one_rank, model_folder):
    file = model_folder / "model.safetensors"
    stored = load_file(file)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(2)}
    save_file(stored | buffer, file, {"format": "pt"})
    assert same_as_transformers(loaded(model_folder, one_rank), model_folder)
    save_file(
        stored | {"model.layers.0.self_attn.rotary.inv": torch.rand(2)}, file, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"weights do not fit .*unexpected_keys.*rotary\.inv"):
        loaded(model_folder, one_rank)


@pytest.mark.parametrize("each_expert", [True, False])
def test_experts_in_files(one_rank, tmp_path, each_expert):
    """A tensor for each expert, as on the hub, or all in one."""
    model = plain_model(config_of("Afmoe", vocab_size=384, eos_token_id=1))
    model.save_pretrained(tmp_path, save_original_format=each_expert)
    BYTES.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("model.layers.1.mlp.experts.3.up_proj.weight" in names) == each_expert
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) != each_expert
    assert same_as_transformers(loaded(tmp_path, one_rank), tmp_path)


def test_experts_that_do_not_fit(one_rank, tmp_path):
    """One that is missing, or smaller than the others, or one too many."""
    plain_model(config_of("Mixtral")).save_pretrained(tmp_path)
    file, last = tmp_path / "model.safetensors", "block_sparse_moe.experts.3.w1.weight"
    stored = load_file(file)
    name = f"model.layers.1.{last}"
    config = config_of("Mixtral")
    for bad in (
        {n: w for n, w in stored.items() if n != name},
        stored | {name: stored[name][:-1].clone()},
        stored | {name.replace(".3.", ".4."): stored[name].clone()},
    ):
        save_file(bad, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"do not fit .*model\.layers\.1\.mlp\.experts"):
            build_model(config, one_rank, torch.float32, 0, tmp_path)
    save_file(stored, file, {"format": "pt"})
    build_model(config, one_rank, torch.float32, 0, tmp_path)


def test_another_head_under_tied_embeddings(one_rank, model_folder):
    """transformers does not tie them then; an equal head is one, as is a head alone."""
    change(model_folder / "config.json", tie_word_embeddings=True)
    file = model_folder / "model.safetensors"
    stored = load_file(file)
    with pytest.raises(ValueError, match=r"ties embedding and head, which differ"):
        loaded(model_folder, one_rank)
    short = {"lm_head.weight": stored["lm_head.weight"][:-1].clone()}
    save_file(stored | short, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit .*mismatched_keys.*lm_head\.weight"):
        loaded(model_folder, one_rank)
    same = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | same, file, {"format": "pt"})
    assert same_as_transformers(loaded(model_folder, one_rank), model_folder)
    only_head = {n: w for n, w in (stored | same).items() if "embed_tokens" not in n}
    save_file(only_head, file, {"format": "pt"})
    assert same_as_transformers(loaded(model_folder, one_rank), model_folder)


def test_dtype_of_the_export(model_folder):
    assert script.find_model(str(model_folder), False)[0].dtype == torch.bfloat16
    change(model_folder / "config.json", dtype=None)
    assert script.find_model(str(model_folder), False)[0].dtype == torch.float32
    change(model_folder / "config.json", dtype="float16")
    assert script.find_model(str(model_folder), False)[0].dtype == torch.float16


@pytest.mark.parametrize("sampling", [{"do_sample": True, "temperature": 0.6},
                                      {"do_sample": False, "temperature": 0.6}])  # fmt: skip
def test_export_keeps_the_generation_config(one_rank, model_folder, tmp_path, sampling):
    """Byte for byte, also one that transformers refuses to save."""
    content = json.dumps({"eos_token_id": [1, 2]} | sampling)
    (model_folder / "generation_config.json").write_text(content)
    config, tokenizer, _, generation = script.find_model(str(model_folder), False)
    model = script.shard_model(config, one_rank, torch.float32, False, False)
    script.init_weights(model, 0)
    script.export_model(model, tokenizer, config.dtype, tmp_path / "export", generation)
    assert (tmp_path / "export" / "generation_config.json").read_text() == content
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def exported(model_folder: Path, folder: Path, *flags) -> Path:
    """The export of a run of two steps on that model."""
    steps = ["-s", 32, "--max-steps", 2]
    Job(folder, 1, "-m", model_folder, *steps, "-e", "run", *flags).succeed()
    return folder / "run" / "export"


def test_settings_that_are_not_of_the_export(model_folder, tmp_path):
    """They change nothing in training, and the export is a plain model without them."""
    losses = []
    own_code = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    outputs = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    for changes, flags in (({}, []), (own_code | outputs, []), (quantized, ["--random-init"])):
        changed = tmp_path / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(model_folder, changed)
        change(changed / "config.json", **changes)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        export = exported(changed, tmp_path, *flags)
        config = json.loads((export / "config.json").read_text())
        for name in ("quantization_config", "auto_map"):
            assert name not in config
        assert not config.get("output_attentions") and not config.get("output_hidden_states")
        assert config.get("return_dict", True)
        back, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        assert not any(info.values()) and back.dtype == torch.bfloat16
        losses += [] if flags else [jobs.losses(tmp_path / "run")]
    assert losses[0] == losses[1]


def test_generation_settings_in_the_configuration(model_folder, tmp_path):
    """As older models have them: the export has those that plain load and save keep."""
    (model_folder / "generation_config.json").unlink()
    change(model_folder / "config.json", max_length=333, do_sample=True, top_k=7)
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "plain")
    export = exported(model_folder, tmp_path)
    plain, ours = (
        transformers.GenerationConfig.from_pretrained(folder).to_dict()
        for folder in (tmp_path / "plain", export)
    )
    assert ours["max_length"] == 333 and ours["do_sample"] and ours["top_k"] == 7
    assert ours == plain


def test_header_of_the_export(model_folder, tmp_path):
    """transformers up to 4.44 and other readers ask for the format."""
    files = list(exported(model_folder, tmp_path).glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_export_has_at_least_16_bits(model_folder, dtype):
    change(model_folder / "config.json", dtype=dtype)
    assert script.find_model(str(model_folder), True)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [
    {"pad_token_id": 5},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                         "long_factor": [1.5, 2.0], "short_factor": [1.0, 1.25],
                         "original_max_position_embeddings": 16}},
])  # fmt: skip
def test_first_step_of_a_configuration(model_folder, tmp_path, changes):
    """Loss and gradient norm are those of plain transformers: with a padding token, longrope."""
    change(model_folder / "config.json", **changes)
    first_step(model_folder, tmp_path, BYTES(jobs.TEXT).input_ids[:-1], length=44)


def first_step(model_folder: Path, folder: Path, ids, length: int, labels=None, *flags) -> None:
    """Check the first step of a run on rows of `ids`, repeated, against plain transformers."""
    script_flags = ["-m", model_folder, "-s", length, "--max-steps", 1, "-e", "first", *flags]
    Job(folder, 1, *script_flags).succeed()
    row = jobs.rows(folder / "first")[0]
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loss, norm, _ = plain_step(
        plain, plain_optimizer(plain), torch.tensor([ids]), clip=1e9,
        labels=None if labels is None else torch.tensor([labels]),
    )  # fmt: skip
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


CASES = {  # a file's row, and the template
    "pair": ({"prompt": "the fox:", "completion": " yes hello"}, None),
    "chat": ({"messages": turns("the fox", "hello yes")}, ZEPHYR),
    "thoughts": ({"messages": turns("the fox", "hello", "the", "yes")}, THINKS),
}


@pytest.mark.parametrize("case", CASES)
def test_first_step_on_prompts_and_chats(model_folder, tmp_path, case):
    """Loss and gradient norm are plain transformers' on the whole text's tokens and labels.

    With Llama 2's kind of tokenizer, whose tokens of parts are not those of the whole.
    """
    row, template = CASES[case]
    tokenizer = llama2_tokenizer(template)
    for file in model_folder.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(model_folder)
    change(model_folder / "config.json", max_position_embeddings=512)
    render = functools.partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    if case == "pair":
        parts = [tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]]
        answers = [" yes hello</s>"]
    elif case == "chat":
        parts, answers = [render(row["messages"])], ["\nhello yes</s>"]
    else:
        parts = [render(row["messages"][:2]), render(row["messages"])]
        answers = [f"<think>\n\n</think>\n\n{answer}<|im_end|>\n" for answer in ("hello", "yes")]
    ids_of_row, labels = [], []
    for ids, answer in zip(parts, answers, strict=True):
        before, whole = (tokenizer(text).input_ids for text in ("x", "x" + answer))
        count = len(whole) - len(before)
        assert ids[-count:] == whole[-count:]
        ids_of_row += ids
        labels += [-100] * (len(ids) - count) + ids[-count:]
    (tmp_path / "rows.jsonl").write_text(40 * (json.dumps(row) + "\n"))
    data = ["-d", tmp_path / "rows.jsonl"]
    first_step(model_folder, tmp_path, ids_of_row, len(labels), labels, *data)


def test_models_that_are_refused(model_folder):
    """One message each that says what it is, and what to do."""
    find, file = functools.partial(script.find_model, str(model_folder)), "model.safetensors"

    def message(random_init: bool = False) -> str:
        with pytest.raises(script.UserError) as error:
            find(random_init)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"-m {model_folder}: ")
        return str(error.value)

    (model_folder / file).rename(model_folder / "pytorch_model.bin")
    assert "no model.safetensors; save it again" in message()
    assert find(True)[2] is None
    (model_folder / file).write_bytes(b"not safetensors")
    assert "header" in message().lower() and file in message()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 4976\n"
    (model_folder / file).write_text(pointer)
    assert f"{file} is a pointer of Git LFS" in message()
    config = (model_folder / "config.json").read_text()
    (model_folder / "config.json").write_text(config[:-20])
    assert "config.json" in message(True)
    for other, words in (
        (transformers.Gemma3Config(), "gemma3 is not a language model alone, like Llama"),
        (transformers.Mistral3Config(), "mistral3 is not a language model alone, like Llama"),
        (transformers.Qwen2_5_VLConfig(), "qwen2_5_vl is not a language model alone, like Llama"),
        (transformers.MambaConfig(), "mamba is not a language model alone, like Llama"),
    ):
        other.save_pretrained(model_folder)
        assert words in message(True)
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "config.json").write_text(config)
    (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer)[:-9])
    assert message(True)


def test_quantized_weights_are_refused(model_folder):
    """By that word; without them the configuration is one as any other."""
    file, find = model_folder / "model.safetensors", script.find_model
    stored = load_file(file)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        small = {n: w.to(dtype) if w.ndim > 1 else w for n, w in stored.items()}
        save_file(small, file, {"format": "pt"})
        with pytest.raises(script.UserError, match="its weights are quantized"):
            find(str(model_folder), False)
    save_file(stored, file, {"format": "pt"})
    for method in ("fp8", "gptq", "bitsandbytes"):
        change(model_folder / "config.json", quantization_config={"quant_method": method})
        with pytest.raises(script.UserError, match="its weights are quantized"):
            find(str(model_folder), False)
        assert not hasattr(find(str(model_folder), True)[0], "quantization_config")


def test_cut_file_is_named(model_folder):
    """One of six, as a download that was broken off leaves it."""
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    (model_folder / "model.safetensors").unlink()
    plain.save_pretrained(model_folder, max_shard_size="30KB")
    files = sorted(model_folder.glob("*.safetensors"))
    assert len(files) > 5
    files[3].write_bytes(files[3].read_bytes()[:-99])
    with pytest.raises(script.UserError, match=rf"{files[3].name}: .*not fully covered"):
        script.find_model(str(model_folder), False)


@pytest.mark.parametrize(
    "change_of_config", [{"hidden_act": "brand_new"}, {"head_dim": 0}, {"pad_token_id": 9999}]
)
def test_model_that_cannot_be_built(model_folder, change_of_config):
    """What transformers fails on in building the model is one message, before anything is read."""
    change(model_folder / "config.json", **change_of_config)
    with pytest.raises(script.UserError, match=r"^-m [^\n]+$"):
        script.find_model(str(model_folder), True)


def test_code_of_its_own_is_refused_at_once(model_folder, monkeypatch):
    """Nobody is asked, and nothing of it runs."""
    (model_folder / "configuration_x.py").write_text("raise SystemExit('it ran')")
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change(model_folder / "config.json", model_type="brand_new", auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(script.UserError, match="custom code"):
        script.find_model(str(model_folder), False)
    tokens = {"AutoTokenizer": ["tokenization_x.X", None]}
    change(model_folder / "config.json", model_type="llama")
    change(model_folder / "tokenizer_config.json", auto_map=tokens)
    assert script.find_model(str(model_folder), False)[0].model_type == "llama"


def test_package_that_a_tokenizer_needs(model_folder, monkeypatch):
    for file in model_folder.glob("*token*"):
        file.unlink()
    (model_folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    packages = transformers.utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(packages, "sentencepiece", (lambda: False, packages["sentencepiece"][1]))
    with pytest.raises(script.UserError, match="requires the SentencePiece library"):
        script.find_model(str(model_folder), True)


def test_flash_attention_that_is_not_installed(model_folder):
    change(model_folder / "config.json", attn_implementation="flash_attention_2")
    with pytest.raises(script.UserError, match=r"^-m \S+: FlashAttention2 .*installed"):
        script.find_model(str(model_folder), False)


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

    # The same by its hub id, as the cache keeps it, in several files.
    shutil.copytree(tmp_path / "model", tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    sharded = plain_model(config).to(torch.bfloat16)
    sharded.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    in_cache(tmp_path / "sharded", tmp_path / "hub")
    hooks = (functools.partial(use_hub_cache, str(tmp_path / "hub")),)
    Job(tmp_path, 2, "-m", "org/model", *flags, "-e", "hub", hooks=hooks).succeed()
    first, second = (jobs.rows(tmp_path / name)[0] for name in ("run", "hub"))
    assert first["tp"] == 2 and second["tp"] == 1
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)

    (tmp_path / "model" / "model.safetensors").unlink()
    Job(tmp_path, 2, "-m", tmp_path / "model", *flags).fail("no model.safetensors")
    with pytest.raises(script.UserError, match=r"config\.json|model type|model_type"):
        script.find_model(str(tmp_path), False)
    assert script.find_model(str(tmp_path / "model"), random_init=True)[2] is None


def test_mixture_of_experts(tmp_path):
    """Stopped on one layout and resumed on another one, the same training; it comes back."""
    config = config_of("Afmoe", vocab_size=384, eos_token_id=1)
    plain_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    flags = ["-m", tmp_path / "model", "-s", 33, "--global-batch-size", 4, "--max-steps", 4]
    flags += ["--lr", 0.001, "--ckpt-freq", 2]
    Job(tmp_path, 1, *flags, "-e", "whole").succeed()
    two_ranks = ["--tp", 2, "--activation-checkpointing", *flags, "-e", "run"]
    Job(tmp_path, 2, *two_ranks, hooks=(jobs.stop_in(2),)).succeed()
    assert jobs.complete(tmp_path / "run") == ["step-00000002"]
    Job(tmp_path, 4, "--tp", 2, *flags, "-e", "run").succeed()
    assert jobs.losses(tmp_path / "run") == pytest.approx(jobs.losses(tmp_path / "whole"), rel=1e-5)
    one, other = (stored(tmp_path / name / "export") for name in ("whole", "run"))
    assert one == other and one.keys() == stored(tmp_path / "model").keys()
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "export", output_loading_info=True
    )
    assert not any(info.values()) and back.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "tolerance"), [(["--compile"], 1e-5), (["--dtype", "bf16"], 1e-2)]
)
def test_mixture_compiled_and_in_bf16(tmp_path, flags, tolerance):
    """The losses of one rank in fp32, and a directory that loads."""
    plain_model(config_of("Qwen3Moe", vocab_size=384, eos_token_id=1)).save_pretrained(
        tmp_path / "model"
    )
    BYTES.save_pretrained(tmp_path / "model")
    shared = ["-m", tmp_path / "model", "-s", 33, "--global-batch-size", 4, "--max-steps", 4]
    shared += ["--lr", 0.001, "--eval-freq", 2]
    Job(tmp_path, 1, *shared, "-e", "plain").succeed()
    Job(tmp_path, 2, "--tp", 2, *flags, *shared, "-e", "run").succeed(300)  # to compile
    found, expected = (jobs.losses(tmp_path / name) for name in ("run", "plain"))
    assert found == pytest.approx(expected, rel=tolerance)
    if "bf16" in flags:
        assert found != pytest.approx(expected, rel=1e-6), "it was computed in fp32"
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "export", output_loading_info=True
    )
    assert not any(info.values()) and back.dtype == torch.float32


def test_flops_of_active_experts():
    """A token goes to 2 of 4 experts: gate, up and down of each, 24 wide, in each of two layers."""
    flops = [
        script.flops_per_token(script.meta_model(config_of("Qwen3Moe", num_experts_per_tok=k)), 32)
        for k in (1, 2)
    ]
    assert flops[1] - flops[0] == 6 * 2 * (3 * 48 * 24)


def test_mixtures_that_are_refused(tmp_path):
    """What does not divide the experts, and what would depend on the layout."""
    plain_model(config_of("Afmoe", vocab_size=384)).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    run = functools.partial(Job, tmp_path, 3, "-m", tmp_path / "model")
    run("--tp", 3).fail("--tp 3 does not divide experts (4); these do: [1]")
    file = tmp_path / "model" / "config.json"
    change(file, router_jitter_noise=0.01)
    run().fail("config.json has {'router_jitter_noise': 0.01}; only 0 is")
    change(file, router_jitter_noise=0.0, output_router_logits=True)
    run().fail("config.json has {'output_router_logits': True}; only 0 is")


def use_hub_cache(folder: str) -> None:
    """A hook: what was downloaded is in `folder`."""
    huggingface_hub.constants.HF_HUB_CACHE = folder


def test_no_network(tmp_path):
    Job(tmp_path, 2, "-m", "no/such-model").fail(
        "error: -m no/such-model, which is not a directory here"
    )
