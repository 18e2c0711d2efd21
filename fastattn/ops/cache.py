"""Keys and values of past tokens, dense or in pages, and attention of new tokens over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from . import checks, dispatch, inference
from .attention import Options, asks_nothing, prepare, run
from .rotary import rotary as rotate


class Pages:
    """The memory of paged caches that were forked from one: pages, and how many rows use each."""

    def __init__(
        self, pages: int, shape: tuple[int, int], dims: tuple[int, int], options: Any
    ) -> None:
        self.key, self.value = (torch.zeros(pages, *shape, d, **options) for d in dims)
        self.users = [0] * pages

    def take(self) -> int:
        """A page that nobody uses. Forks that diverge may need more than one cache has: then it grows."""
        if 0 not in self.users:
            more = max(len(self.users), 1)
            self.key, self.value = (
                torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for x in (self.key, self.value)
            )
            self.users += [0] * more
        page = self.users.index(0)
        self.users[page] = 1
        return page

    def copy(self, page: int) -> int:
        """A page of one's own with what a shared one holds."""
        new = self.take()
        self.key[new], self.value[new] = self.key[page], self.value[page]
        self.users[page] -= 1
        return new


class KVCache:
    """Room for max_length tokens of `batch` sequences, each with its own length.

    Dense (page_size None): key (B, Hkv, max_length, D) and value (B, Hkv, max_length, Dv).
    Paged: key (pages, page_size, Hkv, D), value likewise, and page_table (B, max_pages) int32, whose
    row b lists the pages of sequence b in order. Pages are taken when a token needs one, given back by
    trim and reset, and shared after fork until somebody writes to them; any page_size serves.
    lengths (B,) int32 are the tokens held. Not differentiable: what is appended is copied in place.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_length: int,
        page_size: int | None = None,
        value_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "max_length": max_length}
        optional = {"page_size": page_size, "value_head_dim": value_head_dim}
        sizes |= {name: size for name, size in optional.items() if size is not None}
        checks.is_int("KVCache", "batch", batch, low=0)
        for name, size in sizes.items():
            checks.is_int("KVCache", name, size, low=1)
        if dtype is not None and dtype not in registry.ALL_FLOATS:
            raise TypeError(f"KVCache: dtype must be {checks.FLOATS}, got {checks.shown(dtype)}")
        self.max_length, self.page_size = max_length, page_size
        self._held = [0] * batch  # the lengths on the host, so that no check waits for a device
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        dims = (head_dim, value_head_dim or head_dim)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if page_size is None:
            shape = (batch, kv_heads, max_length)
            self._key, self._value = (torch.zeros(*shape, d, **options) for d in dims)
            self.page_table: Tensor | None = None
        else:
            max_pages = -(-max_length // page_size)
            self._pool = Pages(batch * max_pages, (page_size, kv_heads), dims, options)
            self._pages: list[list[int]] = [[] for _ in range(batch)]
            self.page_table = torch.zeros(batch, max_pages, dtype=torch.int32, device=device)

    @property
    def key(self) -> Tensor:
        """(B, Hkv, max_length, D), or pages (pages, page_size, Hkv, D)."""
        return self._key if self.page_size is None else self._pool.key

    @property
    def value(self) -> Tensor:
        """(B, Hkv, max_length, Dv), or pages (pages, page_size, Hkv, Dv)."""
        return self._value if self.page_size is None else self._pool.value

    def __repr__(self) -> str:
        kind = "dense" if self.page_size is None else f"pages of {self.page_size}"
        return f"KVCache(lengths={self._held}, max_length={self.max_length}, {kind})"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, known without asking the device."""
        return max(self._held, default=0)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool] | None = None,
        *,
        new_lengths: Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Adds S tokens to every sequence, in place. key (B, Hkv, S, D), value (B, Hkv, S, Dv).

        rotary: (cos, sin) or (cos, sin, interleaved), by which keys are turned at the positions that
        they take. new_lengths (B,): only the first new_lengths[b] tokens of row b count. Raises
        ValueError, with nothing changed, when a sequence would pass max_length.
        """
        self._check_tokens(key, value)
        S = key.shape[2]
        counts = [S] * len(self._held)
        if new_lengths is not None:
            counts = integers("KVCache.append", "new_lengths", new_lengths)
        self._check_counts(counts, S)
        tables = None if rotary is None else self._checked_tables(rotary, counts)
        arguments = (self, key, value, counts, tables)
        call = dispatch.request("cache_append", key, [], arguments, name="KVCache.append")
        with torch.no_grad():
            dispatch.run(call, backend)
        self._set_lengths([h + n for h, n in zip(self._held, counts, strict=True)])

    def trim(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forgets the tokens of each sequence from lengths on: an int for all, or (B,)."""
        if isinstance(lengths, int):
            lengths = [lengths] * len(self._held)
        wanted = integers("KVCache.trim", "lengths", lengths)
        if len(wanted) != len(self._held) or any(
            not 0 <= n <= h for n, h in zip(wanted, self._held, strict=False)
        ):
            raise ValueError(
                f"KVCache.trim: lengths must be at most those held, {self._held}, got {wanted}"
            )
        if self.page_size is not None:
            for b, n in enumerate(wanted):
                needed = -(-n // self.page_size)
                for page in self._pages[b][needed:]:
                    self._pool.users[page] -= 1
                del self._pages[b][needed:]
        self._set_lengths(wanted)

    def reset(self) -> None:
        """Forgets everything; the memory is kept."""
        self.trim(0)

    def fork(self, indices: Sequence[int] | Tensor) -> KVCache:
        """A cache whose row r continues row indices[r] of this one; rows may repeat or be left out.

        Dense rows are copied. Pages are shared, and copied when either side writes to them.
        """
        rows = integers("KVCache.fork", "indices", indices)
        if any(not 0 <= i < len(self._held) for i in rows):
            raise ValueError(f"KVCache.fork: indices must be in [0, {len(self._held)}), got {rows}")
        new = object.__new__(KVCache)
        new.max_length, new.page_size = self.max_length, self.page_size
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        new.lengths = self.lengths.index_select(0, chosen)
        new._held = [self._held[i] for i in rows]
        if self.page_size is None or self.page_table is None:
            new._key, new._value = (x.index_select(0, chosen) for x in (self._key, self._value))
            new.page_table = None
            return new
        new._pool = self._pool
        new.page_table = self.page_table.index_select(0, chosen)
        new._pages = [list(self._pages[i]) for i in rows]
        for page in (page for pages in new._pages for page in pages):
            self._pool.users[page] += 1
        return new

    def __copy__(self) -> KVCache:
        return self.fork(range(len(self._held)))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        new = self.fork(range(len(self._held)))
        if self.page_size is not None:
            shared = [page for pages in new._pages for page in pages]
            new._take_own_pool()
            for page in shared:
                self._pool.users[page] -= 1
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle, whose pool counts users that may not have come along."""
        self.__dict__.update(state)
        if self.page_size is not None:
            self._take_own_pool()

    def _take_own_pool(self) -> None:
        """Copies the pages held into memory that no other cache knows."""
        assert self.page_table is not None
        old, size = self._pool, self.page_table.numel()
        _, rows, kv_heads, D = old.key.shape
        options = {"dtype": old.key.dtype, "device": old.key.device}
        self._pool = Pages(size, (rows, kv_heads), (D, old.value.shape[-1]), options)
        for b, pages in enumerate(self._pages):
            for slot, page in enumerate(pages):
                pages[slot] = new = self._pool.take()
                self._pool.key[new], self._pool.value[new] = old.key[page], old.value[page]
                self.page_table[b, slot] = new

    def __del__(self) -> None:
        for page in (page for pages in getattr(self, "_pages", ()) for page in pages):
            self._pool.users[page] -= 1

    def _check_tokens(self, key: Tensor, value: Tensor) -> None:
        checks.is_tensor("KVCache.append", key=key, value=value)
        B, S = len(self._held), key.shape[2] if key.dim() == 4 else -1
        kv_heads = self.key.shape[1 if self.page_size is None else 2]
        for name, x, store in (("key", key, self.key), ("value", value, self.value)):
            shape = (B, kv_heads, S, store.shape[-1])
            checks.has_shape("KVCache.append", name, x, shape, layout="(B, Hkv, S, D)")
            if x.dtype != store.dtype:
                raise TypeError(
                    f"KVCache.append: {name} must have the cache's dtype {checks.dtype_name(store.dtype)}, "
                    f"got {checks.dtype_name(x.dtype)}"
                )

    def _check_counts(self, counts: list[int], S: int) -> None:
        B = len(self._held)
        if len(counts) != B or any(not 0 <= n <= S for n in counts):
            raise ValueError(
                f"KVCache.append: new_lengths must be {B} ints in [0, {S}], got {counts}"
            )
        for b, (held, new) in enumerate(zip(self._held, counts, strict=True)):
            if held + new > self.max_length:
                raise ValueError(
                    f"KVCache.append: sequence {b} holds {held} of max_length {self.max_length} tokens "
                    f"and cannot take {new} more; make a longer cache, trim or reset"
                )

    def _checked_tables(self, rotary: Any, counts: list[int]) -> tuple[Tensor, Tensor, bool]:
        """(cos, sin, interleaved) that reach as far as the new tokens do."""
        name = "KVCache.append"
        if not isinstance(rotary, (tuple, list)) or len(rotary) not in (2, 3):
            raise TypeError(
                f"{name}: rotary must be (cos, sin) or (cos, sin, interleaved), "
                f"got {checks.shown(rotary)}"
            )
        cos, sin, *interleaved = rotary
        checks.is_tensor(name, cos=cos, sin=sin)
        checks.is_float(name, cos=cos, sin=sin)
        checks.has_dims(name, "cos", cos, 2, layout="(P, R / 2)")
        checks.has_shape(name, "sin", sin, cos.shape, layout="cos's shape")
        if 2 * cos.shape[1] > self.key.shape[-1]:
            raise ValueError(
                f"{name}: cos has more than D / 2 columns: {checks.described(cos=cos)}, {self!r}"
            )
        end = max((h + n for h, n in zip(self._held, counts, strict=True) if n), default=0)
        if end > len(cos):
            raise ValueError(
                f"{name}: cos has {len(cos)} rows and the new tokens reach position {end - 1}"
            )
        turned = interleaved[0] if interleaved else False
        checks.is_flag(name, interleaved=turned)
        return cos, sin, turned

    def take_pages(self, counts: list[int]) -> None:
        """Of a paged cache: pages of its own under the next counts[b] tokens of every sequence."""
        if self.page_size is None:
            return
        for b, (held, n) in enumerate(zip(self._held, counts, strict=True)):
            for slot in range(held // self.page_size, -(-(held + n) // self.page_size) if n else 0):
                self._writable_page(b, slot)

    def _write(self, key: Tensor, value: Tensor, counts: list[int]) -> None:
        uniform = len(set(self._held)) <= 1 and len(set(counts)) <= 1
        if self.page_size is None and uniform and counts:
            start, n = self._held[0], counts[0]
            self.key[:, :, start : start + n] = key[:, :, :n]
            self.value[:, :, start : start + n] = value[:, :, :n]
            return
        for b, n in enumerate(counts):
            if self.page_size is None:
                at = slice(self._held[b], self._held[b] + n)
                self.key[b, :, at], self.value[b, :, at] = key[b, :, :n], value[b, :, :n]
            else:
                self._write_pages(b, key[b, :, :n].transpose(0, 1), value[b, :, :n].transpose(0, 1))

    def _write_pages(self, b: int, key: Tensor, value: Tensor) -> None:
        """key, value (n, Hkv, D) behind what sequence b holds, page by page."""
        assert self.page_size is not None
        at, done = self._held[b], 0
        while done < len(key):
            slot, inside = divmod(at + done, self.page_size)
            page = self._pages[b][slot]
            n = min(self.page_size - inside, len(key) - done)
            self.key[page, inside : inside + n] = key[done : done + n]
            self.value[page, inside : inside + n] = value[done : done + n]
            done += n

    def _writable_page(self, b: int, slot: int) -> int:
        """The page of sequence b at a slot of its table: taken if new, copied if others read it too."""
        assert self.page_table is not None
        pages = self._pages[b]
        if slot < len(pages) and self._pool.users[pages[slot]] == 1:
            return pages[slot]
        if slot < len(pages):
            pages[slot] = self._pool.copy(pages[slot])
        else:
            pages.append(self._pool.take())
        self.page_table[b, slot] = pages[slot]
        return pages[slot]

    def _set_lengths(self, lengths: list[int]) -> None:
        self._held = lengths
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))


def append_plain(
    cache: KVCache,
    key: Tensor,
    value: Tensor,
    counts: list[int],
    tables: tuple[Tensor, Tensor, bool] | None,
) -> None:
    """KVCache.append after its checks, in plain PyTorch and the rotary operator."""
    if tables is not None:
        cos, sin, interleaved = tables
        at = cache.lengths[:, None] + torch.arange(key.shape[2], device=cache.lengths.device)
        at = at.clamp(max=max(len(cos) - 1, 0))  # of tokens that do not count
        key = rotate(key, cos, sin, positions=at, interleaved=interleaved)
    cache.take_pages(counts)
    cache._write(key, value, counts)


registry.register(
    "cache_append", "reference", registry.Kernel(append_plain, frozenset(), registry.ALL_FLOATS)
)


def attention_decode(
    query: Tensor,
    cache: KVCache,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of the newest tokens, query (B, Hq, Sq, D), over all that the cache holds.

    The last query stands at the cache's last token: append first, then decode. Causal and window
    count from there, a sequence at a time. mask and bias broadcast to (B, Hq, Sq, max_length).
    Other options, result and errors as in attention. The cache gets no gradient.
    """
    name = "attention_decode"
    checks.is_tensor(name, query=query)
    checks.has_dims(name, "query", query, 4, layout="(B, Hq, Sq, D)")
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name}: cache must be a KVCache, got {type(cache).__name__}")
    if query.shape[0] != len(cache.lengths):
        raise ValueError(
            f"{name}: query and cache disagree on B: {checks.described(query=query)}, {cache!r}"
        )
    options = Options(
        causal,
        window,
        mask,
        bias,
        cache.lengths,
        alibi_slopes,
        softcap,
        sinks,
        0.0,
        scale,
        return_lse,
    )
    if cache.page_table is None:
        if backend is None and asks_nothing(options):
            out = inference.attend(query, cache.key, cache.value, causal, cache.lengths)
            if out is not None:
                return out
        tensors, spec = prepare(name, query, cache.key, cache.value, options)
        out, lse, _ = run(name, tensors, spec._replace(diagonal_at_length=True), None, backend)
    else:
        out, lse = attend_pages(
            name,
            query,
            cache.key,
            cache.value,
            cache.page_table,
            options,
            cache.max_length,
            backend,
        )
    return (out, lse) if return_lse else out


def attend_pages(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    page_table: Tensor,
    options: Options,
    max_length: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over options.key_lengths tokens of pages (pages, page_size, Hkv, D), the last query at the
    last of them. mask and bias reach max_length tokens; None: all that page_table has room for."""
    width = page_table.shape[1] * key.shape[1]
    # what a dense cache of this table would look like, for the checks: no memory is made
    like_key, like_value = (
        x[:1, :1].transpose(1, 2).expand(len(page_table), -1, max_length or width, -1)
        for x in (key, value)
    )
    tensors, spec = prepare(name, query, like_key, like_value, options)
    mask, bias = (as_wide_as_pages(x, width) for x in (tensors.mask, tensors.bias))
    key, value = (x.to(tensors.query.dtype) for x in (key, value))  # autocast's, if it is on
    tensors = tensors._replace(key=key, value=value, mask=mask, bias=bias, page_table=page_table)
    out, lse, _ = run(name, tensors, spec._replace(diagonal_at_length=True), None, backend)
    return out, lse


def as_wide_as_pages(x: Tensor | None, width: int) -> Tensor | None:
    """A mask or bias (..., max_length) that reaches the end of the last page."""
    if x is None or x.shape[-1] in (1, width):
        return x
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def integers(operator: str, name: str, given: Any) -> list[int]:
    """The entries of a sequence or a tensor (B,)."""
    values = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(values, Sequence) or not all(isinstance(n, int) for n in values):
        raise TypeError(f"{operator}: {name} must be ints, (B,), got {checks.shown(given)}")
    return list(values)
