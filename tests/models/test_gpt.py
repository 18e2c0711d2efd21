"""GPT-2 against transformers' with the same weights: logits, loss, gradients, tokens, files."""

import math
import warnings

import pytest
import torch
import transformers

from fastattn import models
from fastattn.models.gpt import keep_top_k, keep_top_p

from .conftest import close, same_gradients

CONFIG = transformers.GPT2Config(
    vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, bos_token_id=98, eos_token_id=98,
)  # fmt: skip
IDS = torch.randint(1, 98, (3, 11), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(IDS)
LEFT[1, :4], LEFT[2, :9] = 0, 0


@pytest.fixture
def pair(twins):
    return twins("GPT2LMHeadModel", models.GPT2LMHeadModel, CONFIG)


@pytest.mark.parametrize("changes", [
    {}, {"n_inner": 50, "activation_function": "gelu"}, {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
], ids=str)  # fmt: skip
def test_logits_loss_and_gradients(twins, changes):
    theirs, ours = twins("GPT2LMHeadModel", models.GPT2LMHeadModel, CONFIG, **changes)
    labels = torch.where(IDS % 4 == 0, -100, IDS)
    a, b = (
        ours(IDS, labels=labels, output_hidden_states=True),
        theirs(IDS, labels=labels, output_hidden_states=True),
    )
    close(a.logits, b.logits)
    close(a.loss, b.loss)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x, y)
    a.loss.backward()
    b.loss.backward()
    same_gradients(theirs, ours)


def test_a_cache_has_no_gradients(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="keys and values in a cache have no gradient"):
        ours(IDS, use_cache=True, labels=IDS).loss.backward()
    ours.transformer.h[0].attn.dropout_p = 0.1
    with pytest.raises(ValueError, match="a cache and attention dropout do not go together"):
        ours.train().generate(IDS)


def test_untied_heads(twins, tmp_path):
    theirs, ours = twins(
        "GPT2LMHeadModel", models.GPT2LMHeadModel, CONFIG, tie_word_embeddings=False
    )
    assert not torch.equal(ours.lm_head.weight, ours.transformer.wte.weight)
    close(ours(IDS).logits, theirs(IDS).logits)
    ours.save_pretrained(tmp_path / "again")
    again = models.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_padding_on_the_left(pair):
    theirs, ours = pair
    positions = (LEFT.cumsum(-1) - 1).clamp(min=0)
    a = ours(IDS, attention_mask=LEFT, position_ids=positions).logits
    b = theirs(IDS, attention_mask=LEFT, position_ids=positions).logits
    close(a[LEFT.bool()], b[LEFT.bool()])


def test_base_model(twins):
    theirs, ours = twins("GPT2Model", models.GPT2Model, CONFIG)
    close(ours(IDS).last_hidden_state, theirs(IDS).last_hidden_state)


def test_cached_steps_equal_one_pass(pair):
    _, ours = pair
    whole = ours(IDS).logits
    first = ours(IDS[:, :4], use_cache=True)
    second = ours(IDS[:, 4:9], past_key_values=first.past_key_values)
    third = ours(IDS[:, 9:], past_key_values=second.past_key_values)
    close(torch.cat([first.logits, second.logits, third.logits], 1), whole, 1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left-padded"])
def test_greedy_tokens_are_transformers(pair, use_cache, mask):
    theirs, ours = pair
    a = ours.generate(IDS, attention_mask=mask, max_new_tokens=20, use_cache=use_cache)
    mask = torch.ones_like(IDS) if mask is None else mask
    b = theirs.generate(
        IDS, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=98
    )
    assert torch.equal(a, b)


def test_generation_stops_and_pads(pair):
    theirs, ours = pair
    tokens = theirs.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    eos = int(tokens[0, 14])  # row 0 meets it after three or fewer new tokens
    options = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 0}
    b = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, **options)
    assert torch.equal(ours.generate(IDS, **options), b)
    alone = ours.generate(IDS[:1], **options)
    assert alone.shape[1] < 23 and alone[0, -1] == eos


def test_sampling_filters_are_transformers():
    logits = torch.randn(5, 50) * 3
    for k in (1, 7, 50, 80):
        wanted = transformers.TopKLogitsWarper(min(k, 50))(None, logits)
        assert torch.equal(keep_top_k(logits, k), wanted)
    for p in (0.01, 0.5, 0.9, 1.0):
        assert torch.equal(keep_top_p(logits, p), transformers.TopPLogitsWarper(p)(None, logits))


def test_sampling_follows_the_generator_and_the_filters(pair):
    _, ours = pair
    draw = lambda seed, **options: ours.generate(  # noqa: E731
        IDS,
        do_sample=True,
        max_new_tokens=6,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), ours.generate(IDS, max_new_tokens=6))
    assert torch.equal(draw(1, temperature=1e-4), ours.generate(IDS, max_new_tokens=6))


def test_saved_folder_is_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    close(again(IDS).logits, theirs(IDS).logits, 1e-6)


def test_wrong_use(pair):
    _, ours = pair
    for wrong, sentence in (
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an int of at least 1, got 2.5"),
        ({"temperature": math.nan}, "temperature must be a positive number or None, got nan"),
        ({"temperature": "hot"}, "temperature must be a positive number or None, got 'hot'"),
        ({"attention_mask": LEFT.flip(1)}, "attention_mask must end in 1 in every row"),
        ({"attention_mask": LEFT.flip(1).bool()}, "pad on the left"),
        (
            {"attention_mask": LEFT[:, 1:]},
            r"attention_mask must be \(B, S\) = \(3, 11\), got \(3, 10\)",
        ),
        ({"max_new_tokens": 60}, "11 prompt tokens and 60 new ones are more than n_positions = 64"),
        ({"temperature": 0.0}, "temperature must be a positive number or None, got 0.0"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 or None for all, got -1"),
        ({"top_k": 1.5}, "top_k must be at least 1, or 0 or None for all, got 1.5"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\] or None, got 1.5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ours.generate(IDS, **wrong)
    E = torch.randn(3, 11, 16)
    for args, options, error, sentence in (
        ((), {}, ValueError, "give either input_ids or inputs_embeds"),
        ((IDS[0],), {}, ValueError, r"input_ids must be \(B, S\), got \(11,\)"),
        ((IDS + 90,), {}, ValueError, r"input_ids must be in \[0, 99\), got"),
        ((None,), {"inputs_embeds": E}, ValueError, r"inputs_embeds must be \(B, S, 32\)"),
        ((IDS,), {"attention_mask": LEFT[:, :5]}, ValueError, r"attention_mask must be \(B, Sk\) = \(3, 11\), .*got \(3, 5\)"),
        ((IDS,), {"token_type_ids": IDS[:, 1:]}, ValueError, r"token_type_ids must be \(B, S\) = \(3, 11\)"),
        ((IDS,), {"position_ids": IDS + 60}, ValueError, r"position_ids must be in \[0, 64\)"),
        ((IDS, None, LEFT.tolist()), {}, TypeError, "attention_mask must be a tensor, got list"),
        ((IDS,), {"use_cache": "yes"}, TypeError, "use_cache must be True or False, got 'yes'"),
        ((IDS,), {"past_key_values": [1]}, TypeError, "past_key_values must be 2 KVCache, .* got list"),
        ((IDS,), {"use_cache": True, "output_attentions": True}, ValueError, "output_attentions and a cache do not"),
        ((IDS[:, :1].expand(3, 65),), {}, ValueError, "65 tokens are more than n_positions = 64"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^GPT2Model: .*{sentence}"):
            ours(*args, **options)
    for options, sentence in (
        ({"labels": IDS[:, 1:]}, r"labels must be \(3, 11\), got \(3, 10\)"),
        ({"labels": IDS, "logits_to_keep": 1}, "labels need every logit"),
        ({"logits_to_keep": -1}, "logits_to_keep must be an int of at least 0 .* got -1"),
        ({"logits_to_keep": LEFT.bool()}, r"logits_to_keep must be .* got bool \(3, 11\)"),
    ):
        with pytest.raises(ValueError, match=f"^GPT2LMHeadModel: {sentence}"):
            ours(IDS, **options)
    for key, value, sentence in (
        ("add_cross_attention", True, "add_cross_attention must be False, got True"),
        ("n_head", 0, "n_head must be at least 1, got 0"),
        ("num_attention_heads", 5, "n_embd must be a multiple of n_head, got 768 and 5"),
        (
            "activation_function",
            "swoosh",
            "activation_function must be one of gelu, .* got 'swoosh'",
        ),
    ):
        with pytest.raises(ValueError, match=f"^GPT2Config: {sentence}"):
            models.GPT2Config.from_dict({key: value})


def test_config_has_transformers_names():
    data = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = models.GPT2Config.from_dict({**data, "max_position_embeddings": 32})
    theirs = transformers.GPT2Config(**data, max_position_embeddings=32)
    for name in ("n_embd", "n_layer", "n_head", "n_positions", *data):
        assert getattr(config, name) == getattr(theirs, name), name
    config.hidden_size = 48
    assert config.n_embd == 48 and config.to_dict()["n_embd"] == 48
    with pytest.raises(ValueError, match="n_embd has two names and two values, 24 and 48"):
        models.GPT2Config.from_dict({"hidden_size": 24, "n_embd": 48})
    with pytest.raises(AttributeError, match="GPT2Config has no 'hidden_dim'"):
        _ = config.hidden_dim


@pytest.mark.parametrize("act", ["relu", "silu", "quick_gelu"])
def test_activations(twins, act):
    theirs, ours = twins("GPT2LMHeadModel", models.GPT2LMHeadModel, CONFIG, activation_function=act)
    close(ours(IDS).logits, theirs(IDS).logits)


def test_attentions_token_types_and_logits_to_keep(pair):
    theirs, ours = pair
    types = IDS.flip(1)
    for keep in (0, 1, 4, 99, torch.tensor([2, 5])):
        options = {"token_type_ids": types, "logits_to_keep": keep, "output_attentions": True}
        a = ours(IDS, attention_mask=torch.ones_like(IDS), **options)
        b = theirs(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
        close(a.logits, b.logits)
        assert list(a.keys()) == [name for name in b.keys() if name != "cross_attentions"]  # noqa: SIM118
        for x, y in zip(a.attentions, b.attentions, strict=True):
            close(x, y)
    a = ours(IDS, output_attentions=True, labels=IDS)
    b = theirs(IDS, output_attentions=True, labels=IDS)
    a.loss.backward()
    b.loss.backward()
    same_gradients(theirs, ours)


def test_masks_of_three_and_four_dimensions(pair):
    theirs, ours = pair
    see = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(2)) > 0.3
    see |= torch.eye(11, dtype=torch.bool)
    added = torch.where(see, 0.0, torch.finfo(torch.float32).min)[:, None]
    close(ours(IDS, attention_mask=added).logits, theirs(IDS, attention_mask=added).logits)
    close(ours(IDS, attention_mask=see[:, None]).logits, theirs(IDS, attention_mask=added).logits)
    causal = torch.where(see.tril(), 0.0, torch.finfo(torch.float32).min)[:, None]
    close(ours(IDS, attention_mask=see.long()).logits, theirs(IDS, attention_mask=causal).logits)
    past = ours(IDS[:, :7], attention_mask=causal[:, :, :7, :7], use_cache=True).past_key_values
    last = ours(IDS[:, 7:], past, attention_mask=causal[:, :, 7:])
    close(last.logits, ours(IDS, attention_mask=causal).logits[:, 7:])


def test_generation_under_autocast(pair):
    _, ours = pair
    cold = ours.transformer.new_cache(3, 20)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens = ours.generate(IDS, max_new_tokens=6, use_cache=True)
        assert torch.equal(tokens, ours.generate(IDS, max_new_tokens=6, use_cache=False))
        assert ours.transformer.new_cache(1, 2)[0].key.dtype == torch.bfloat16
        close(ours(IDS, past_key_values=cold).logits, ours(IDS).logits, 0.01)
    assert cold[0].key.dtype == torch.float32
    with torch.no_grad():
        assert ours(IDS[:, :1], past_key_values=cold).logits.dtype == torch.float32


def test_options_that_are_off_or_idle(pair):
    _, ours = pair
    wanted = ours.generate(IDS, max_new_tokens=3)
    assert torch.equal(
        ours.generate(IDS, max_new_tokens=3, top_k=0, top_p=None, temperature=None), wanted
    )
    with pytest.warns(UserWarning, match="temperature and top_k act only with do_sample=True"):
        ours.generate(IDS, max_new_tokens=3, temperature=0.5, top_k=2)
    draw = lambda **options: ours.generate(  # noqa: E731
        IDS, do_sample=True, generator=torch.Generator().manual_seed(1), max_new_tokens=4, **options
    )
    assert torch.equal(draw(top_k=0, temperature=None), draw())
    float_mask = ours.generate(IDS, LEFT.float(), max_new_tokens=3)
    assert torch.equal(float_mask, ours.generate(IDS, LEFT, max_new_tokens=3))


def test_a_cache_in_compiled_models(pair):
    _, ours = pair
    wanted = ours.generate(IDS, max_new_tokens=20)
    torch._dynamo.reset()
    ours.transformer.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4):
        assert torch.equal(ours.generate(IDS, max_new_tokens=20), wanted)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a cache's lengths are Python ints"):
        compiled(IDS, use_cache=True)
    torch._dynamo.reset()


def test_compiles_fullgraph_and_runs_in_bf16(pair):
    _, ours = pair
    wanted = ours(IDS, labels=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        close(compiled(IDS, labels=IDS).loss, wanted.loss, 1e-6)
    close(ours.bfloat16()(IDS).logits.float(), wanted.logits, 0.05)
