"""What models return: dataclasses that read as transformers' outputs do.

By attribute, out.logits; by name, out["logits"]; by place among what is not None, out[0]; unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=type)


class ModelOutput:
    def to_tuple(self) -> tuple[Any, ...]:
        """What is not None, in order."""
        return tuple(x for x in vars(self).values() if x is not None)

    def keys(self) -> tuple[str, ...]:
        return tuple(name for name, x in vars(self).items() if x is not None)

    def values(self) -> tuple[Any, ...]:
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.values(), strict=True))

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has {', '.join(self.keys())}, not {key}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


def exported(cls: T) -> T:
    """A dataclass that torch.export and torch.utils._pytree know, by a name that files can hold."""
    torch.export.register_dataclass(cls, serialized_type_name=f"fastattn.models.{cls.__name__}")
    return cls
