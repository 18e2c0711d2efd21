"""Folders of transformers' format: config.json and safetensors, read and written.

safetensors only: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in checkpoints of 2018

C = TypeVar("C", bound="Config")
M = TypeVar("M", bound="PretrainedModel")


@dataclasses.dataclass
class Config:
    """A model's configuration under transformers' field names.

    Keys of a config.json that the model does not know stay in `extra`, and are written back.
    """

    model_type: ClassVar[str]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any]) -> C:
        kind = data.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"{cls.__name__}: config.json is of a {kind!r} model, not {cls.model_type!r}"
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {k: v for k, v in data.items() if k not in known and k != "model_type"}
        return cls(**{k: v for k, v in data.items() if k in known}, extra=extra)

    @classmethod
    def from_pretrained(cls: type[C], folder: str | Path) -> C:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{cls.__name__}: there is no {path}")
        return cls.from_dict(json.loads(path.read_text()))

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self.extra, **own, "model_type": self.model_type}


class PretrainedModel(torch.nn.Module):
    """A model that reads and writes folders of transformers' format.

    base: the attribute that holds the headless model; its weights carry that prefix in a model with a
    head, and none by themselves, and either is accepted. tied: weights that may be another's.
    """

    config_class: ClassVar[type[Config]]
    base: ClassVar[str]
    tied: ClassVar[dict[str, str]] = {}
    config: Any

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path, *, dtype: torch.dtype | None = None) -> M:
        """The model of a folder, in eval mode. Weights that the folder lacks are fresh, and warned of.

        Raises FileNotFoundError without a config.json or safetensors, ValueError where shapes differ.
        """
        model = cls(cls.config_class.from_pretrained(folder))
        report = model.adopt(read_weights(Path(folder)))
        if report:
            warnings.warn(
                f"{cls.__name__}.from_pretrained({str(folder)!r}): {report}", stacklevel=2
            )
        return model.to(dtype).eval() if dtype else model.eval()

    def shared(self) -> set[str]:
        """The names of weights that are another's, and so are not in a file by themselves."""
        own = self.state_dict(keep_vars=True)
        return {a for a, b in self.tied.items() if own[a] is own[b]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, tied weights once."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        shared = self.shared()
        state = {k: v.contiguous() for k, v in self.state_dict().items() if k not in shared}
        dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        config = {**self.config.to_dict(), "architectures": [type(self).__name__], "dtype": dtype}
        text = json.dumps(config, indent=2, sort_keys=True)
        save_file(state, str(path / WEIGHTS), metadata={"format": "pt"})
        (path / "config.json").write_text(text + "\n")

    def adopt(self, weights: dict[str, Tensor]) -> str:
        """Takes over what fits by name; returns a sentence about the rest, or nothing."""
        own = self.state_dict()
        weights = self.renamed(weights, set(own))
        wrong = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if own[name].shape != weights[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint has other shapes: {', '.join(wrong)}"
            )
        missing = sorted(own.keys() - weights.keys() - self.shared())
        unused = sorted(weights.keys() - own.keys())
        # a file may hold a shared weight under both names: the one that it is saved under counts
        taken = {k: v for k, v in weights.items() if k in own}
        for name, source in self.tied.items():
            if name in self.shared() and source in taken:
                taken.pop(name, None)
        self.load_state_dict(taken, strict=False)
        parts = []
        if missing:
            parts.append(f"not in the checkpoint and freshly initialised: {', '.join(missing)}")
        if unused:
            parts.append(f"in the checkpoint and not used: {', '.join(unused)}")
        return "; ".join(parts)

    def renamed(self, weights: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
        """Old names made new, and the base model's prefix added or taken off, as this model has it."""
        result = {}
        for name, weight in weights.items():
            for old, new in OLD_NAMES.items():
                name = name.removesuffix(old) + new if name.endswith(old) else name
            if name not in own:
                prefixed, bare = f"{self.base}.{name}", name.removeprefix(f"{self.base}.")
                name = prefixed if prefixed in own else bare if bare in own else name
            if not name.endswith(
                (".position_ids", ".attn.bias", ".attn.masked_bias")
            ):  # old buffers
                result[name] = weight
        return result


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        files = sorted({folder / shard for shard in index["weight_map"].values()})
    elif list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has pickled weights only (*.bin), which can run code when loaded; convert them: "
            "transformers.AutoModel.from_pretrained(folder).save_pretrained(folder) writes safetensors"
        )
    else:
        raise FileNotFoundError(f"there is neither {WEIGHTS} nor {INDEX} in {folder}")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(str(file))
    return weights
