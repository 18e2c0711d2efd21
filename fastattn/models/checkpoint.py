"""Folders of transformers' format: config.json and safetensors, read and written.

safetensors only: a pickle can run code when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .output import ModelOutput

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm in checkpoints of 2018
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,),
}  # fmt: skip
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


C = TypeVar("C", bound="Config")
M = TypeVar("M", bound="PretrainedModel")


@dataclasses.dataclass
class Config:
    """A model's configuration under transformers' field names.

    Keys of a config.json that the model does not know stay in `extra`, and are written back.
    attribute_map: transformers' common names of a model's own fields, which a file or an attribute may
    use. only: fields, or keys of extra, that can have but one value here.
    """

    model_type: ClassVar[str]
    attribute_map: ClassVar[dict[str, str]] = {}
    only: ClassVar[dict[str, Any]] = {}

    _: dataclasses.KW_ONLY
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    use_cache: bool = True  # of generate; a forward pass caches when it is asked to
    is_encoder_decoder: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    problem_type: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: int | None = None
    # what a folder says of its weights
    architectures: list[str] | None = dataclasses.field(default=None, compare=False)
    dtype: str | None = dataclasses.field(default=None, compare=False)
    transformers_version: str | None = dataclasses.field(default=None, compare=False)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        for field in dataclasses.fields(self):
            self.check_field(field.name, str(field.type).split(" | "))
        for name, wanted in self.only.items():
            found = self.extra.get(name, getattr(self, name, wanted))
            if found != wanted:
                raise self.error(f"{name} must be {wanted!r}, got {found!r}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            rule = f"problem_type must be one of {', '.join(PROBLEM_TYPES)}"
            raise self.error(f"{rule}, got {self.problem_type!r}")
        if self.id2label is not None:  # a file's keys are strings
            self.id2label = {int(key): label for key, label in self.id2label.items()}
            if self.num_labels not in (None, len(self.id2label)):
                raise self.error(
                    f"num_labels must be the length of id2label, got {self.num_labels} and {self.id2label}"
                )
        if self.num_labels is None:
            self.num_labels = 2 if self.id2label is None else len(self.id2label)

    def check_field(self, name: str, kinds: list[str]) -> None:
        """A value of a kind that the field is declared with; sizes are positive, fractions finite."""
        value = getattr(self, name)
        if value is None and "None" in kinds:
            return
        kinds = [kind.partition("[")[0] for kind in kinds if kind != "None"]
        allowed: Any = tuple(t for kind in kinds for t in KINDS[kind])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise self.error(f"{name} must be {' or '.join(kinds)}, got {value!r}", TypeError)
        least = 0 if name.endswith(("_layers", "_layer")) else 1  # no layers are a bag of words
        if kinds == ["int"] and not name.endswith("_id") and value < least:
            raise self.error(f"{name} must be at least {least}, got {value}")
        if kinds == ["float"] and not 0 <= value < math.inf:
            raise self.error(f"{name} must be finite and at least 0, got {value}")

    def error(self, text: str, kind: type[Exception] = ValueError) -> Exception:
        return kind(f"{type(self).__name__}: {text}")

    def __getattr__(self, name: str) -> Any:
        if name in self.attribute_map:
            return getattr(self, self.attribute_map[name])
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.attribute_map.get(name, name), value)

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any]) -> C:
        kind = data.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"{cls.__name__}: config.json is of a {kind!r} model, not {cls.model_type!r}"
            )
        names = {"torch_dtype": "dtype", **cls.attribute_map}
        own: dict[str, Any] = {}
        for key, value in data.items():
            name = names.get(key, key)
            if name in own and own[name] != value:
                raise ValueError(
                    f"{cls.__name__}: {name} has two names and two values, {own[name]!r} and {value!r}"
                )
            own[name] = value
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {k: own.pop(k) for k in list(own) if k not in known}
        extra.pop("model_type", None)
        return cls(**own, extra=extra)

    @classmethod
    def from_pretrained(cls: type[C], folder: str | Path) -> C:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{cls.__name__}: there is no {path}")
        return cls.from_dict(read_json(path))

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
    def from_pretrained(
        cls: type[M],
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
    ) -> M:
        """The model of a folder, in eval mode. Weights that the folder lacks are fresh, and warned of.

        dtype: a floating dtype or its name; "auto", and None, are what config.json says, else the
        weights' own. torch_dtype is its older name. Raises FileNotFoundError without a config.json or
        safetensors, ValueError where files cannot be read or shapes differ.
        """
        config = cls.config_class.from_pretrained(folder)
        weights = read_weights(cls.__name__, Path(folder))
        chosen = dtype_of(cls.__name__, torch_dtype if dtype is None else dtype, config, weights)
        config.dtype = str(chosen).removeprefix("torch.")
        model = cls(config).to(chosen)
        report = model.adopt(weights)
        if report:
            warnings.warn(
                f"{cls.__name__}.from_pretrained({str(folder)!r}): {report}", stacklevel=2
            )
        return model.eval()

    def switch(self, name: str, given: bool | None) -> bool:
        """A switch of forward: as given, or as the config has it."""
        value = getattr(self.config, name) if given is None else given
        if not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be True or False, got {value!r}")
        return value

    def returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output, or the tuple of it where return_dict is False."""
        return output if self.switch("return_dict", return_dict) else output.to_tuple()

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


def dtype_of(
    owner: str, dtype: torch.dtype | str | None, config: Config, weights: dict[str, Tensor]
) -> torch.dtype:
    """The dtype that from_pretrained is asked for, by itself or by its name."""
    if dtype in (None, "auto"):
        floats = (w.dtype for w in weights.values() if w.is_floating_point())
        dtype = config.dtype or next(floats, torch.get_default_dtype())
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"{owner}: dtype must be 'auto' or a floating dtype such as torch.bfloat16 or 'bfloat16', "
            f"got {dtype!r}"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # of decoding, too
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_weights(owner: str, folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {})
        files = sorted({folder / shard for shard in shards.values()})
    elif list(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{owner}: {folder} has pickled weights only (*.bin), which can run code when loaded; convert "
            "them: transformers.AutoModel.from_pretrained(folder).save_pretrained(folder) writes safetensors"
        )
    else:
        raise FileNotFoundError(f"{owner}: there is neither {WEIGHTS} nor {INDEX} in {folder}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(str(file))
        except FileNotFoundError:
            raise FileNotFoundError(f"{owner}: {INDEX} names {file}, which is not there") from None
        except SafetensorError as error:
            raise ValueError(f"{owner}: {file} is not a safetensors file: {error}") from None
    return weights
