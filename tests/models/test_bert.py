"""BERT against transformers' with the same weights: logits, losses, gradients, files."""

import json
import warnings

import pytest
import torch
import transformers

from fastattn import models
from fastattn.models.layers import ACTIVATIONS

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
        ("hidden_act", "xielu", "hidden_act must be one of gelu, .*, tanh, got 'xielu'"),
        ("num_attention_heads", 0, "num_attention_heads must be at least 1, got 0"),
        (
            "hidden_dropout_prob",
            -0.1,
            "hidden_dropout_prob must be finite and at least 0, got -0.1",
        ),
        ("problem_type", "guess", "problem_type must be one of regression, .*, got 'guess'"),
        ("num_labels", 3, "num_labels must be the length of id2label, got 3 and {0: "),
        ("is_decoder", True, "is_decoder must be False, got True"),
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
    for key, value in (("hidden_size", "32"), ("hidden_size", True), ("vocab_size", None)):
        with pytest.raises(TypeError, match=rf"^BertConfig: {key} must be int, got {value!r}"):
            models.BertConfig(**{key: value})


def test_wrong_inputs():
    model = models.BertModel(models.BertConfig.from_dict(CONFIG.to_dict()))
    E, far = torch.randn(3, 11, 16), torch.ones(3, 41, dtype=torch.int64)
    for args, options, error, sentence in (
        ((), {}, ValueError, "give either input_ids or inputs_embeds"),
        ((IDS[0],), {}, ValueError, r"input_ids must be \(B, S\), got \(11,\)"),
        ((IDS.tolist(),), {}, TypeError, "input_ids must be a tensor, got list"),
        ((IDS.float(),), {}, TypeError, "input_ids must be int32 or int64, got float32"),
        ((IDS + 90,), {}, ValueError, r"input_ids must be in \[0, 99\), got 1"),
        ((far,), {}, ValueError, "41 tokens are more than max_position_embeddings = 40"),
        ((None,), {"inputs_embeds": E}, ValueError, r"inputs_embeds must be \(B, S, 32\), got \(3, 11, 16"),
        ((IDS, MASK[:, 1:]), {}, ValueError, r"attention_mask must be \(B, Sk\) = \(3, 11\), .* got \(3, 10\)"),
        ((IDS, MASK[:, None, None]), {}, TypeError, "a 4-D attention_mask must be bool .* got int64"),
        ((IDS, torch.zeros(3, 1, 1, 9)), {}, ValueError, r"must broadcast to .* = \(3, 4, 11, 11\), got \(3, 1, 1, 9"),
        ((IDS, MASK.float().log()), {}, ValueError, "1 for a token and 0 for padding, got -inf"),
        ((IDS,), {"token_type_ids": TYPES + 1}, ValueError, r"token_type_ids must be in \[0, 2\), got 2"),
        ((IDS,), {"token_type_ids": TYPES[:, 1:]}, ValueError, r"token_type_ids must be \(B, S\) = \(3, 11\)"),
        ((IDS,), {"position_ids": torch.tensor([40] * 11)}, ValueError, r"position_ids must be in \[0, 40\), got 40"),
        ((IDS,), {"output_attentions": 1}, TypeError, "output_attentions must be True or False, got 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^BertModel: .*{sentence}"):
            model(*args, **options)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])  # fmt: skip
def test_wrong_labels(name):
    model = getattr(models, name)(models.BertConfig.from_dict(CONFIG.to_dict()))
    for labels, error in ((torch.zeros(4).long(), ValueError), ([1, 2, 3], TypeError),
                          (torch.zeros(3, 11, 2).long(), ValueError)):  # fmt: skip
        with pytest.raises(error, match=f"^{name}: labels "):
            model(IDS, labels=labels)
    if name != "BertForSequenceClassification":
        with pytest.raises(TypeError, match=f"^{name}: labels must be int32 or int64, got float32"):
            model(IDS, labels=IDS.float())
        assert model(IDS, labels=(IDS % 2).int()).loss.isfinite()


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_attentions(twins, name):
    theirs, ours = twins(name, getattr(models, name), CONFIG)
    options = {"output_attentions": True, "output_hidden_states": True}
    a, b = ours(**INPUTS, **options), theirs(**INPUTS, **options)
    assert list(a.keys()) == [name for name in b.keys() if name != "cross_attentions"]  # noqa: SIM118
    for x, y in zip(a.attentions, b.attentions, strict=True):
        close(x, y)
    close(a[0], ours(**INPUTS)[0])
    a[0].square().sum().backward()
    b[0].square().sum().backward()
    same_gradients(theirs, ours)


def test_masks_of_three_and_four_dimensions(twins):
    theirs, ours = twins("BertModel", models.BertModel, CONFIG)
    see = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(2)) > 0.3
    see |= torch.eye(11, dtype=torch.bool)
    added = torch.where(see, 0.0, torch.finfo(torch.float32).min)[:, None]
    wanted = theirs(IDS, attention_mask=added).last_hidden_state
    for mask in (see, see.long(), see.float(), see[:, None], added, added.expand(-1, 4, -1, -1)):
        close(ours(IDS, attention_mask=mask).last_hidden_state, wanted)
    close(ours(IDS, attention_mask=MASK.float())[0], theirs(IDS, attention_mask=MASK)[0])
    slopes = torch.randn(1, 4, 1, 11)  # whatever is added, a head
    close(ours(IDS, attention_mask=slopes)[0], theirs(IDS, attention_mask=slopes)[0])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(twins, act):
    theirs, ours = twins("BertForMaskedLM", models.BertForMaskedLM, CONFIG, hidden_act=act)
    close(ours(**INPUTS).logits, theirs(**INPUTS).logits)


def test_dtypes_under_autocast(twins):
    theirs, ours = twins("BertModel", models.BertModel, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(**INPUTS), theirs(**INPUTS)
    assert a.last_hidden_state.dtype is b.last_hidden_state.dtype is torch.float32
    assert a.pooler_output.dtype is b.pooler_output.dtype
    close(a.last_hidden_state, b.last_hidden_state, 0.03)


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
