"""BERT against transformers' with the same weights: logits, losses, gradients, files."""

import json
import warnings

import pytest
import torch
import transformers

from fastattn import models

from .conftest import close, same_gradients

CONFIG = transformers.BertConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
IDS = torch.randint(1, 99, (3, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 7:], MASK[2, 3:] = 0, 0
TYPES = (torch.arange(11) > 5).long().expand(3, 11)
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
TOKEN_LABELS = torch.where(MASK.bool() & (IDS % 3 == 0), IDS % 5, -100)


def test_encoder_and_pooler(twins):
    theirs, ours = twins("BertModel", models.BertModel, CONFIG)
    a, b = ours(**INPUTS, output_hidden_states=True), theirs(**INPUTS, output_hidden_states=True)
    close(a.last_hidden_state, b.last_hidden_state)
    close(a.pooler_output, b.pooler_output)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x, y)
    embeds, positions = torch.randn(3, 11, 32), torch.arange(11).flip(0)[None]
    a = ours(inputs_embeds=embeds, position_ids=positions)
    close(
        a.last_hidden_state, theirs(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    )


HEADS = {
    "masked LM": ("BertForMaskedLM", {}, torch.where(TOKEN_LABELS >= 0, IDS, -100)),
    "classes": ("BertForSequenceClassification", {"num_labels": 5}, torch.tensor([0, 4, 2])),
    "several": ("BertForSequenceClassification", {"num_labels": 5}, torch.eye(5)[:3]),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}, torch.randn(3)),
    "tokens": ("BertForTokenClassification", {"num_labels": 5}, TOKEN_LABELS),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_heads(twins, head, act):
    name, changes, labels = HEADS[head]
    theirs, ours = twins(name, getattr(models, name), CONFIG, hidden_act=act, **changes)
    a, b = ours(**INPUTS, labels=labels), theirs(**INPUTS, labels=labels)
    close(a.logits, b.logits)
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    same_gradients(theirs, ours)


def test_untied_heads(twins, tmp_path):
    theirs, ours = twins(
        "BertForMaskedLM", models.BertForMaskedLM, CONFIG, tie_word_embeddings=False
    )
    close(ours(**INPUTS).logits, theirs(**INPUTS).logits)
    ours.save_pretrained(tmp_path / "again")
    again = models.BertForMaskedLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**INPUTS).logits, ours(**INPUTS).logits)


def test_labels_of_a_classification(twins):
    _, ours = twins(
        "BertForSequenceClassification", models.BertForSequenceClassification, CONFIG, num_labels=1
    )
    flat = ours(**INPUTS, labels=torch.tensor([0.0, 1.0, 2.0])).loss
    assert torch.equal(ours(**INPUTS, labels=torch.tensor([[0.0], [1.0], [2.0]])).loss, flat)
    assert torch.equal(ours(**INPUTS, labels=torch.tensor([0, 1, 2])).loss, flat)
    with pytest.raises(ValueError, match=r"regression problem must be .* = \(3, 1\), got \(3, 2\)"):
        ours(**INPUTS, labels=torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_saved_folder_is_transformers(twins, name, tmp_path):
    theirs, ours = twins(name, getattr(models, name), CONFIG)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    close(again(**INPUTS)[0], theirs(**INPUTS)[0], 1e-6)


def test_unknown_keys_of_a_config_are_kept(tmp_path):
    config = models.BertConfig.from_dict({**CONFIG.to_dict(), "my_key": [1, 2]})
    assert config.extra["my_key"] == [1, 2] and config.hidden_size == 32
    models.BertModel(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["my_key"] == [1, 2]


def test_heads_and_base_models_read_each_other(twins, tmp_path):
    _, masked = twins("BertForMaskedLM", models.BertForMaskedLM, CONFIG)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.warns(
        UserWarning, match=r"freshly initialised: pooler.dense.bias.*not used: cls.predict"
    ):
        base = models.BertModel.from_pretrained(tmp_path / "masked")
    close(base(**INPUTS).last_hidden_state, masked.bert(**INPUTS).last_hidden_state, 1e-6)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(
        UserWarning, match=r"freshly initialised: classifier.bias, classifier.weight"
    ):
        head = models.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    close(head.bert(**INPUTS).last_hidden_state, base(**INPUTS).last_hidden_state, 1e-6)


def test_sharded_and_pickled_folders(twins, tmp_path):
    theirs, ours = twins("BertModel", models.BertModel, CONFIG)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = models.BertModel.from_pretrained(tmp_path / "shards")
    close(again(**INPUTS).last_hidden_state, ours(**INPUTS).last_hidden_state, 1e-7)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        models.BertModel.from_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights only"):
        models.BertModel.from_pretrained(tmp_path / "bin")
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        models.BertModel.from_pretrained(tmp_path / "nowhere")


def test_wrong_shapes_and_configs(twins, tmp_path):
    _, ours = twins("BertModel", models.BertModel, CONFIG)
    ours.config.vocab_size = 50
    ours.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"other shapes: embeddings.word_embeddings.weight \(99, 32\) instead of"
    ):
        models.BertModel.from_pretrained(tmp_path)
    for key, value, sentence in (
        (
            "hidden_act",
            "relu",
            "hidden_act must be one of gelu, gelu_new, gelu_pytorch_tanh, got 'relu'",
        ),
        (
            "num_attention_heads",
            5,
            "hidden_size must be a multiple of num_attention_heads, got 32 and 5",
        ),
        ("position_embedding_type", "relative_key", "position_embedding_type must be 'absolute'"),
        ("model_type", "gpt2", "config.json is of a 'gpt2' model, not 'bert'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            models.BertConfig.from_dict({**CONFIG.to_dict(), key: value})


def test_wrong_inputs():
    model = models.BertModel(models.BertConfig.from_dict(CONFIG.to_dict()))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must be \(B, S\), got \(11,\)"):
        model(IDS[0])
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(B, S\) = \(3, 11\), got \(3, 10\)"
    ):
        model(IDS, MASK[:, 1:])


def test_dropout_acts_in_training_only():
    config = models.BertConfig.from_dict(
        {**CONFIG.to_dict(), "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    )
    model = models.BertModel(config)
    assert not torch.equal(model(IDS).last_hidden_state, model(IDS).last_hidden_state)
    model.eval()
    assert torch.equal(model(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_compiles_fullgraph_and_runs_in_bf16(twins):
    _, ours = twins("BertForMaskedLM", models.BertForMaskedLM, CONFIG)
    wanted = ours(**INPUTS, labels=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        close(compiled(**INPUTS, labels=IDS).loss, wanted.loss, 1e-6)
    close(ours.bfloat16()(**INPUTS).logits.float(), wanted.logits, 0.05)
