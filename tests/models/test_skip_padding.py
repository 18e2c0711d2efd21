"""BERT with config.skip_padding: at tokens what it is without, at padding 0, and gradients that agree."""

import pytest
import torch
import transformers

import fastattn as fa
from fastattn import models

from .conftest import close, same_gradients
from .test_bert import CONFIG, IDS, TYPES

MASKS = {
    "right": [11, 7, 3],
    "left": [-11, -7, -3],
    "one token": [1, 11, -1],
    "an empty row": [11, 0, 5],
    "no token": [0, 0, 0],
    "no padding": [11, 11, 11],
}


def mask_of(lengths):
    """1 where the first n tokens are, or the last -n."""
    at = torch.arange(11)
    return torch.stack([(at >= 11 + n) if n < 0 else at < n for n in lengths]).long()


def holes():
    return (torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) > 0.4).long()


ALL_MASKS = {**{name: mask_of(lengths) for name, lengths in MASKS.items()}, "holes": holes()}


@pytest.fixture
def pair(twins):
    """Our model with its padding skipped, and transformers' of the same weights."""

    def make(name="BertModel", **changes):
        theirs, ours = twins(name, getattr(models, name), CONFIG, **changes)
        ours.config.skip_padding = True
        return theirs, ours

    return make


def same_at_tokens(a, b, mask):
    """a is b at tokens, and 0 at padding."""
    kept = mask.bool()
    if kept.any():
        close(a[kept], b[kept])
    assert not a[~kept].any()


@pytest.mark.parametrize("name", ALL_MASKS)
def test_encoder(pair, name):
    theirs, ours = pair()
    mask = ALL_MASKS[name]
    inputs = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": TYPES}
    a, b = ours(**inputs, output_hidden_states=True), theirs(**inputs, output_hidden_states=True)
    same_at_tokens(a.last_hidden_state, b.last_hidden_state, mask)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        same_at_tokens(x, y, mask)
    first = mask[:, 0].bool()
    if first.any():
        close(a.pooler_output[first], b.pooler_output[first])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
@pytest.mark.parametrize("mask", ["right", "holes", "an empty row"])
def test_heads_losses_and_gradients(pair, name, mask):
    theirs, ours = pair(name, num_labels=5)
    mask = ALL_MASKS[mask]
    labels = torch.where(mask.bool(), IDS % 5, -100)
    a, b = (model(IDS, mask, labels=labels) for model in (ours, theirs))
    same_at_tokens(a.logits, b.logits, mask)
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    same_gradients(theirs, ours)


def test_a_class_of_a_text_and_its_gradients(pair):
    theirs, ours = pair("BertForSequenceClassification", num_labels=5)
    labels = torch.tensor([0, 4, 2])
    a, b = (model(IDS, ALL_MASKS["right"], labels=labels) for model in (ours, theirs))
    close(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    same_gradients(theirs, ours)


def test_attention_drops_the_same_weights(pair):
    """Dropout counts sequences and tokens within them, as an unpadded batch does."""
    _, ours = pair(attention_probs_dropout_prob=0.4)
    ours.train()
    for embedding_dropout in (m for m in ours.modules() if isinstance(m, torch.nn.Dropout)):
        embedding_dropout.p = 0.0
    out = {}
    for skip in (True, False):
        ours.config.skip_padding = skip
        torch.manual_seed(5)
        out[skip] = ours(IDS, ALL_MASKS["right"]).last_hidden_state
    same_at_tokens(out[True], out[False], ALL_MASKS["right"])
    ours.eval()
    plain = ours(IDS, ALL_MASKS["right"]).last_hidden_state
    assert (out[False] - plain).abs().max() > 0.01


def test_padding_is_not_computed(pair, monkeypatch):
    """Garbage at padding, NaN even, reaches nothing; attention sees tokens alone."""
    _, ours = pair()
    mask, embeds = ALL_MASKS["holes"], torch.randn(3, 11, 32)
    wanted = ours(inputs_embeds=embeds, attention_mask=mask)
    embeds[mask == 0] = torch.nan
    seen = []
    varlen = fa.models.bert.attention_varlen
    monkeypatch.setattr(
        "fastattn.models.bert.attention_varlen",
        lambda query, *rest, **options: seen.append(len(query)) or varlen(query, *rest, **options),
    )
    found = ours(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert seen == [int(mask.sum())] * 2


def test_without_a_mask_nothing_is_padding(pair):
    theirs, ours = pair()
    a, b = ours(IDS, output_attentions=True), theirs(IDS, output_attentions=True)
    close(a.last_hidden_state, b.last_hidden_state)
    close(a.attentions[1], b.attentions[1])


def test_masks_that_say_more_than_padding(pair):
    _, ours = pair()
    mask = ALL_MASKS["right"]
    wanted = ours(IDS, mask).last_hidden_state
    assert torch.equal(ours(IDS, mask.bool()[:, None, None]).last_hidden_state, wanted)
    for other in (
        mask[:, None].expand(3, 11, 11),
        torch.zeros(3, 1, 11, 11),
        torch.zeros(1, 1, 1, 11),
    ):
        with pytest.raises(
            ValueError, match=r"^BertModel: skip_padding needs an attention_mask of "
        ):
            ours(IDS, other)
    with pytest.raises(
        ValueError, match=r"^BertModel: output_attentions and skip_padding do not go"
    ):
        ours(IDS, mask, output_attentions=True)


def test_compiled(pair):
    _, ours = pair("BertForMaskedLM")
    ours.eval()
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager")
        for mask in ("right", "holes", "an empty row"):
            close(compiled(IDS, ALL_MASKS[mask]).logits, ours(IDS, ALL_MASKS[mask]).logits)
        torch._dynamo.reset()
        whole = torch.compile(ours, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="tokens a mask keeps is data"):
            whole(IDS, ALL_MASKS["right"])
    torch._dynamo.reset()


def test_config_is_saved_and_read(pair, tmp_path):
    theirs, ours = pair()
    ours.save_pretrained(tmp_path)
    again = models.BertModel.from_pretrained(tmp_path)
    assert again.config.skip_padding is True
    mask = ALL_MASKS["right"]
    assert torch.equal(again(IDS, mask).last_hidden_state, ours(IDS, mask).last_hidden_state)
    hub = transformers.BertModel.from_pretrained(tmp_path).eval()
    close(hub(IDS, mask).last_hidden_state, theirs(IDS, mask).last_hidden_state)
    with pytest.raises(TypeError, match=r"^BertConfig: skip_padding must be bool, got 1"):
        models.BertConfig(skip_padding=1)
