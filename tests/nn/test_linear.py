"""QuantizedLinear as a module, and quantize() on models of every kind."""

import copy
import io

import pytest
import torch
from torch import nn

from fastattn.models import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel
from fastattn.nn import QuantizedLinear, TransformerEncoderLayer, quantize

FORMS = {
    "int8": {"dtype": "int8"},
    "groups": {"dtype": "int8", "group_size": 32},
    "bfloat16": {"dtype": "bfloat16"},
}
every_form = pytest.mark.parametrize("form", FORMS)
torch.manual_seed(0)
X = torch.randn(2, 3, 70)


def made(form, **options):
    torch.manual_seed(1)
    layer = nn.Linear(70, 21, **options)
    return layer, QuantizedLinear.from_linear(layer, **FORMS[form])


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_by_what_it_dequantizes_to(form, bias):
    layer, q = made(form, bias=bias)
    torch.testing.assert_close(q(X), nn.functional.linear(X, q.dequantize(), layer.bias))
    torch.testing.assert_close(q.product(X), nn.functional.linear(X, q.dequantize()))
    assert q.bias is layer.bias


@every_form
def test_the_weight_is_the_nearest_that_the_form_has(form):
    layer, q = made(form)
    error = (q.dequantize() - layer.weight).abs()
    if form == "bfloat16":
        assert torch.equal(q.dequantize(), layer.weight.bfloat16().float())
    elif form == "int8":
        step = layer.weight.abs().amax(1, keepdim=True) / 127
        assert (error <= step * 0.5001).all() and (q.weight.abs().amax(1) == 127).all()
    else:
        for first in (0, 32, 64):
            part = layer.weight[:, first : first + 32]
            step = part.abs().amax(1, keepdim=True) / 127
            assert (error[:, first : first + 32] <= step * 0.5001).all()


def test_rows_of_zeros():
    layer = nn.Linear(40, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    for form in FORMS.values():
        q = QuantizedLinear.from_linear(layer, **form)
        assert (q.dequantize()[1] == 0).all() and q(torch.ones(40)).isfinite().all()


@every_form
def test_state_dict_copies_and_pickles(form):
    _, q = made(form)
    fresh = QuantizedLinear(70, 21, **FORMS[form])
    fresh.load_state_dict(q.state_dict())
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (fresh, copy.deepcopy(q), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), q(X)) and str(other) == str(q)


def test_a_float_weight_is_not_cut_to_integers():
    layer, q = made("int8")
    before = q.weight.clone()
    with pytest.raises(
        RuntimeError, match="weight must be int8, got float32: load it before quantize"
    ):
        q.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(q.weight, before)


@every_form
def test_a_change_of_dtype_leaves_the_weight(form):
    _, q = made(form)
    kept = [x.clone() for x in q.buffers()]
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        q.to(dtype)
        assert q.bias.dtype == dtype and q(X.to(dtype)).dtype == dtype
        for x, before in zip(q.buffers(), kept, strict=True):
            assert x.dtype == before.dtype and torch.equal(x, before)
    assert (
        q.to("meta").weight.is_meta
        and not QuantizedLinear(3, 4, device="meta").to_empty(device="cpu").weight.is_meta
    )


@every_form
def test_x_and_bias_learn_and_the_weight_does_not(form):
    layer, q = made(form)
    x = X.clone().requires_grad_()
    q(x).square().sum().backward()
    wanted = X.clone().requires_grad_()
    twin = nn.Linear(70, 21)
    with torch.no_grad():
        twin.weight.copy_(q.dequantize())
        twin.bias.copy_(layer.bias)
    twin(wanted).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)
    torch.testing.assert_close(q.bias.grad, twin.bias.grad)
    assert [name for name, _ in q.named_parameters()] == ["bias"]


def test_repr():
    _, q = made("groups")
    assert (
        str(q)
        == "QuantizedLinear(in_features=70, out_features=21, bias=True, dtype=int8, group_size=32)"
    )


@pytest.mark.parametrize("options, sentence", [
    (dict(dtype="int4"), "dtype must be int8 or bfloat16, got 'int4'"),
    (dict(dtype=torch.float16), "dtype must be int8 or bfloat16, got torch.float16"),
    (dict(dtype=None), "dtype must be int8 or bfloat16, got None"),
    (dict(group_size=48), "group_size must be a multiple of 32, got 48"),
    (dict(dtype="bfloat16", group_size=32), "group_size is of scales, which only int8 has, got 'bfloat16'"),
])  # fmt: skip
def test_wrong_forms(options, sentence):
    layer = nn.Linear(4, 4)
    for call in (
        lambda: QuantizedLinear.from_linear(layer, **options),
        lambda: quantize(nn.Sequential(layer), **options),
        lambda: QuantizedLinear(4, 4, **options),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert sentence in str(raised.value)


# ---- whole models -------------------------------------------------------------------------------


def close(found, wanted, share=0.02):
    assert (found - wanted).abs().max() <= share * wanted.abs().max()


class Conv1D(nn.Module):
    """transformers'."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


@every_form
def test_conv1d_has_its_weight_turned(form):
    model = nn.Sequential(Conv1D(9, 70))
    wanted = model(X)
    assert quantize(model, **FORMS[form]).swapped == ["0"]
    close(model(X), wanted)


def small_gpt():
    torch.manual_seed(3)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=40, n_embd=64, n_layer=2, n_head=4)
    ).eval()


@every_form
def test_gpt2_with_its_tied_head(form):
    model, ids = small_gpt(), torch.arange(20).view(2, 10)
    wanted, embedding = model(ids).logits, model.transformer.wte.weight
    report = quantize(model, **FORMS[form])
    assert len(report.swapped) == 9 and "lm_head" in report.swapped and not report.kept
    assert report.bytes_after < report.bytes_before * 0.55
    assert isinstance(model.lm_head, QuantizedLinear) and model.transformer.wte.weight is embedding
    close(model(ids).logits, wanted)
    cached = model.generate(ids, max_new_tokens=5)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, use_cache=False))


@every_form
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_bert(form, kind):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    model, ids = kind(config).eval(), torch.arange(20).view(2, 10)
    wanted = model(ids)[0]
    report = quantize(model, **FORMS[form])
    assert len(report.swapped) == (13 if kind is BertModel else 14) and not report.kept
    close(model(ids)[0], wanted)


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    ids = torch.arange(20).view(2, 10)
    small = dict(vocab_size=96, n_positions=40, n_embd=64, n_layer=2, n_head=4)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)).eval()  # fmt: skip
    for model, layers in ((gpt, 9), (bert, 13)):
        with torch.no_grad():
            wanted = model(ids)[0]
            report = quantize(model)
            assert len(report.swapped) == layers and not report.kept
            close(model(ids)[0], wanted)


def test_what_is_named_stays():
    model = small_gpt()
    report = quantize(model, skip=["lm_head", "h.0", "attn.c_proj"])
    assert sorted(report.swapped) == [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]
    assert set(report.kept.values()) == {"is named in skip"} and len(report.kept) == 6
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(
        ValueError, match="skip names 'lmhead', and no module of the model is called so"
    ):
        quantize(model, skip="lmhead")


def test_what_stays_and_why():
    class Special(nn.Linear):
        pass

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 2)

    hooked, wild, own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *arguments: None)
    wild.weight.data[0, 0] = torch.nan
    own.forward = own.forward
    model = nn.ModuleDict({
        "special": Special(4, 4), "adapter": Adapter(), "hooked": hooked, "wild": wild, "own": own,
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "encoder": nn.TransformerEncoderLayer(8, 2, 16), "ours": TransformerEncoderLayer(8, 2, 16),
        "meta": nn.Linear(4, 4, device="meta"), "plain": nn.Linear(4, 4),
    })  # fmt: skip
    model["quantized"] = QuantizedLinear(4, 4)
    report = quantize(model)
    assert report.swapped == ["plain"]
    assert report.kept == {
        "special": "is a class of its own, which may do more than a Linear",
        "adapter.base_layer": "belongs to an adapter, which may merge itself into the weight",
        "adapter.lora_A": "belongs to an adapter, which may merge itself into the weight",
        "hooked": "has hooks, which a swap would lose",
        "wild": "has a weight that is not finite",
        "own": "has a forward of its own",
        "parametrized": "computes its weight from others",
        "encoder.self_attn.out_proj": "is a class of its own, which may do more than a Linear",
        "ours.self_attn.out_proj": "is a class of its own, which may do more than a Linear",
        **{f"{name}.linear{i}": "belongs to a TransformerEncoderLayer, which reads the weight itself"
           for name in ("encoder", "ours") for i in (1, 2)},
        "meta": "has no numbers to round: its weight is torch.float32 on meta",
    }  # fmt: skip
    assert "1 linear layers in int8" in str(report) and "kept hooked: it has hooks" in str(report)


def test_a_layer_in_two_places_is_one_layer_after():
    layer = nn.Linear(4, 4)
    model = nn.ModuleList([nn.Sequential(layer), nn.Sequential(layer)])
    assert quantize(model).swapped == ["0.0", "1.0"]
    assert model[0][0] is model[1][0]


def test_a_layer_alone_is_no_model():
    with pytest.raises(
        ValueError, match=r"the model is itself a Linear; use QuantizedLinear\.from_linear"
    ):
        quantize(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="a Tanh is no linear layer"):
        QuantizedLinear.from_linear(nn.Tanh())


def test_training_mode_and_gradients_through_a_model():
    model = small_gpt().train()
    model.requires_grad_(False)
    quantize(model)
    assert model.lm_head.training
    embeds = torch.randn(1, 5, 64, requires_grad=True)
    model.eval()(inputs_embeds=embeds).logits.square().sum().backward()
    assert embeds.grad.abs().sum() > 0
