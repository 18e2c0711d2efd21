"""Folders: dtypes, configurations that come back equal, files that cannot be read."""

import json

import pytest
import torch
import transformers

from fastattn import models

from .test_bert import CONFIG, IDS


@pytest.fixture
def folder(tmp_path):
    models.BertModel(models.BertConfig.from_dict(CONFIG.to_dict())).bfloat16().save_pretrained(
        tmp_path
    )
    return tmp_path


def rewritten(folder, **changes):
    data = json.loads((folder / "config.json").read_text()) | changes
    data = {k: v for k, v in data.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize("changes", [
    {}, {"dtype": None}, {"dtype": "float16"}, {"dtype": None, "torch_dtype": "float16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"dtype": None}, {"dtype": "auto"}, {"dtype": "float32"}, {"dtype": torch.float16},
    {"torch_dtype": torch.float32},
], ids=str)  # fmt: skip
def test_dtypes_are_transformers(folder, changes, options):
    rewritten(folder, **changes)
    theirs = transformers.BertModel.from_pretrained(folder, **options)
    ours = models.BertModel.from_pretrained(folder, **options)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}
    assert ours.config.dtype == str(theirs.dtype).removeprefix("torch.")
    assert ours(IDS).last_hidden_state.dtype == theirs.dtype


@pytest.mark.parametrize("dtype", ["int8", "bf16", "nn", 3])
def test_dtypes_that_are_none(folder, dtype):
    with pytest.raises(ValueError, match=f"^BertModel: dtype must be 'auto' or .* got {dtype!r}"):
        models.BertModel.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("config", [
    models.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, num_labels=3,
                      id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}),
    models.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, use_cache=False,
                      output_hidden_states=True, eos_token_id=[1, 2], extra={"my_key": [1]}),
    models.GPT2Config(n_embd=32, n_layer=1, n_head=4, return_dict=False),
], ids=lambda c: type(c).__name__)  # fmt: skip
def test_configs_come_back_equal(config, tmp_path):
    name = "BertModel" if config.model_type == "bert" else "GPT2Model"
    getattr(models, name)(config).save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_labels == config.num_labels
    assert config.id2label is None or theirs.id2label == config.id2label


def test_files_that_cannot_be_read(folder):
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(
        ValueError, match=r"^BertModel: .*model.safetensors is not a safetensors file"
    ):
        models.BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(
        FileNotFoundError, match=r"^BertModel: .*index.json names .*gone.safetensors"
    ):
        models.BertModel.from_pretrained(folder)
    for path, reader in ((index, models.BertModel), (folder / "config.json", models.BertConfig)):
        for text, sentence in (
            ("{", "is not JSON: "),
            ("[1]", "must hold a JSON object, got list"),
        ):
            path.write_text(text)
            with pytest.raises(ValueError, match=rf"{path.name} {sentence}"):
                reader.from_pretrained(folder)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=rf"{path.name} is not JSON"):
            reader.from_pretrained(folder)
