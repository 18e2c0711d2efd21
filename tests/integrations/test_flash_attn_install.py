"""install(): the name flash_attn, on request, in this process alone."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import pytest

from fastattn.integrations import flash_attn


@pytest.fixture
def installed():
    flash_attn.install()
    yield
    flash_attn.uninstall()


def test_nothing_happens_on_import():
    assert importlib.util.find_spec("flash_attn") is None and "flash_attn" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


def test_every_module_is_ours_under_both_names(installed):
    assert importlib.import_module("flash_attn") is flash_attn
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward

    from fastattn.integrations.flash_attn import flash_attn_interface

    assert _wrapped_flash_attn_forward is flash_attn_interface._flash_attn_forward
    ours = "fastattn.integrations.flash_attn"
    for name in [n for n in sys.modules if n.startswith(f"{ours}.")]:
        assert (
            importlib.import_module(name.removeprefix("fastattn.integrations."))
            is sys.modules[name]
        )
    assert importlib.util.find_spec("flash_attn") is not None
    assert importlib.util.find_spec("flash_attn.cute") is None
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.cute"):
        importlib.import_module("flash_attn.cute")


def test_metadata(installed):
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == flash_attn.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.version("torch")
    flash_attn.install()  # a second time changes nothing
    flash_attn.uninstall()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")
    assert importlib.util.find_spec("flash_attn") is None


def test_another_flash_attn_is_not_replaced(monkeypatch):
    other = importlib.util.module_from_spec(importlib.util.spec_from_loader("flash_attn", None))
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    with pytest.raises(
        RuntimeError, match="another flash_attn is imported already, from somewhere"
    ):
        flash_attn.install()
    assert sys.modules["flash_attn"] is other


FOUND = """
    import fastattn.integrations.flash_attn as flash_attn
    flash_attn.install()
    import torch
    import transformers.modeling_flash_attention_utils as utils
    has_gpu, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    assert utils.is_flash_attn_2_available()  # asks importlib, then torch.cuda, and remembers
    torch.cuda.is_available = has_gpu
"""


def test_transformers_finds_it():
    """All of its lookup, but for the question whether there is a GPU, which a CPU answers with no."""
    pytest.importorskip("transformers")
    run(FOUND, """
        assert utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["pkg_availability_check"]()
        (dense, varlen, _, pad, unpad), (process, _) = utils.lazy_import_flash_attention("flash_attention_2")
        assert dense is flash_attn.flash_attn_func and varlen is flash_attn.flash_attn_varlen_func
        assert pad.__module__ == unpad.__module__ == "fastattn.integrations.flash_attn.bert_padding"
        names = process.keywords["supports_mapping"]
        for name in "dropout_p window_size softcap deterministic learnable_sink block_table".split():
            assert names[name], name
    """)  # fmt: skip


def test_transformers_runs_it():
    """A padded batch with window, softcap and sinks, as its models call it."""
    pytest.importorskip("transformers")
    run(FOUND, """
        import fastattn as fa
        q, k, v = torch.randn(3, 2, 7, 4, 16)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        given = dict(is_causal=True, sliding_window=3, softcap=5.0, s_aux=torch.randn(4))
        given["attn_implementation"] = "flash_attention_2"
        padded, whole = (utils._flash_attention_forward(q, k, v, m, 7, **given) for m in (mask, None))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ours = dict(causal=True, window=(2, None), softcap=5.0, sinks=given["s_aux"])
        ours = fa.attention(q, k, v, mask=mask.bool()[:, None, None], **ours).transpose(1, 2)
        torch.testing.assert_close(padded, ours * mask[..., None, None])
        torch.testing.assert_close(whole[1], ours[1])
    """)  # fmt: skip


def test_a_transformers_model_runs_on_it():
    """Llama by transformers' own flash_attention_2 code, against its eager one; on a CPU the name can only
    be set past its check of the device."""
    pytest.importorskip("transformers")
    run(FOUND, """
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).eval()
        ids, mask = torch.randint(0, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        mask[0, :4] = 0
        eager = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=6)
        calls, varlen = [], flash_attn.flash_attn_varlen_func
        utils.lazy_import_flash_attention("flash_attention_2")
        utils._flash_varlen_fn = lambda *a, **k: calls.append(1) or varlen(*a, **k)
        model.config._attn_implementation = "flash_attention_2"
        ours = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=6)
        torch.testing.assert_close(ours[0][mask.bool()], eager[0][mask.bool()], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[1], eager[1]) and len(calls) >= 4
    """)  # fmt: skip


def run(*code):
    """In a process of its own: what transformers found out it keeps."""
    script = "\n".join(textwrap.dedent(part) for part in code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
