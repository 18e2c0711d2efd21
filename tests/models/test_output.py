"""What models return, against transformers' outputs."""

import pickle

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree

from fastattn import models

from . import test_bert, test_gpt

CASES = {
    "BertModel": (test_bert.CONFIG, {}),
    "BertForMaskedLM": (test_bert.CONFIG, {"labels": test_bert.IDS}),
    "BertForSequenceClassification": (test_bert.CONFIG, {"labels": torch.tensor([0, 1, 1])}),
    "BertForTokenClassification": (test_bert.CONFIG, {}),
    "GPT2Model": (test_gpt.CONFIG, {"use_cache": False}),
    "GPT2LMHeadModel": (test_gpt.CONFIG, {"use_cache": False, "labels": test_gpt.IDS}),
}


@pytest.fixture(params=CASES)
def case(request, twins):
    config, options = CASES[request.param]
    theirs, ours = twins(request.param, getattr(models, request.param), config)
    return theirs, ours, {"input_ids": test_bert.IDS.clamp(max=97), **options}


def test_outputs_read_as_transformers(case):
    theirs, ours, inputs = case
    a, b = ours(**inputs), theirs(**inputs)
    names = list(b.keys())
    assert list(a.keys()) == names and list(a) == list(a.values()) and len(a) == len(names)
    for place, name in enumerate(names):
        assert a[place] is a[name] is getattr(a, name) and name in a
        assert a[place].shape == b[place].shape
    assert a[-1] is a.to_tuple()[-1] and a[:2] == a.to_tuple()[:2]
    assert dict(a) == dict(a.items()) and "attentions" not in a
    with pytest.raises(KeyError, match=f"{type(a).__name__} has {names[0]}.*, not attentions"):
        a["attentions"]
    with pytest.raises(IndexError):
        a[len(names)]


def test_tuples_and_switches_of_the_config(case):
    theirs, ours, inputs = case
    a, b = ours(**inputs, return_dict=False), theirs(**inputs, return_dict=False)
    assert type(a) is tuple and len(a) == len(b)
    first, *_ = ours(**inputs)
    assert torch.equal(first, a[0])
    ours.config.return_dict, ours.config.output_hidden_states = False, True
    assert type(ours(**inputs)) is tuple and len(ours(**inputs)) == len(a) + 1
    ours.config.output_attentions = True
    wanted = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    names = [name for name in wanted.keys() if name != "cross_attentions"]  # noqa: SIM118
    assert list(ours(**inputs, return_dict=True).keys()) == names
    with pytest.raises(
        TypeError, match=f"{type(ours).__name__}: return_dict must be True or False"
    ):
        ours(**inputs, return_dict="no")


def test_outputs_go_through_pytree_pickle_export_and_compile(case):
    _, ours, inputs = case
    out = ours(**inputs, output_hidden_states=True)
    doubled = pytree.tree_map(lambda x: x if x is None else 2 * x, out)
    assert type(doubled) is type(out) and torch.equal(doubled[0], 2 * out[0])
    with torch.no_grad():
        out = ours(**inputs)
        again = pickle.loads(pickle.dumps(out))
        assert type(again) is type(out) and torch.equal(again[0], out[0])
        exported = torch.export.export(ours, (), inputs).module()(**inputs)
        assert type(exported) is type(out) and torch.equal(exported[0], out[0])
        compiled = torch.compile(lambda: ours(**inputs)[0], fullgraph=True, backend="eager")
        assert torch.equal(compiled(), out[0])


def test_transformers_fields_are_accepted():
    for theirs, ours in (
        (transformers.BertConfig(), models.BertConfig),
        (transformers.GPT2Config(), models.GPT2Config),
    ):
        own = {
            k: v for k, v in theirs.to_dict().items() if not k.startswith(("model_", "summary_"))
        }
        own = {
            k: v for k, v in own.items() if k not in ("chunk_size_feed_forward", "_name_or_path")
        }
        config = ours(**own, num_labels=2)
        assert all(getattr(config, name) == value for name, value in own.items())
