"""Small random twins: transformers' model and ours with the same weights."""

import copy
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def twins(tmp_path):
    """(their class name, our class, their config) -> both, ours read from the folder that theirs wrote."""

    def make(name, ours, config, **changes):
        torch.manual_seed(0)
        config = copy.deepcopy(config)  # transformers changes the configs that it is given
        for key, value in changes.items():
            setattr(config, key, value)
        config._attn_implementation = "eager"
        theirs = getattr(transformers, name)(config).eval()
        with torch.no_grad():  # fresh biases and norms are 0 and 1, which would hide mistakes
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / name
        theirs.save_pretrained(folder)
        return theirs, ours.from_pretrained(folder)

    return make


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def same_gradients(theirs, ours, tolerance=5e-5):
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name not in own:
            assert name in ours.tied
            continue
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            close(own[name].grad, parameter.grad, tolerance)
