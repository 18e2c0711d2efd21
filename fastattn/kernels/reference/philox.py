"""Philox4x32-10 (Salmon et al., SC 2011) in int64 arithmetic: the one source of dropout masks.

A weight is kept where its 32-bit word is at least floor(p * 2^32), so the same seed and counters
drop the same weights on every backend, bit for bit.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Four 32-bit words (in int64) for each counter; the counters broadcast, seed is a 64-bit key."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & LOW, seed >> 32 & LOW
    for _ in range(ROUNDS):
        # the product is exact modulo 2^64, and both halves are masked, so int64's sign is harmless
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & LOW) ^ c1 ^ key0,
            high & LOW,
            (low >> 32 & LOW) ^ c3 ^ key1,
            low & LOW,
        )
        key0, key1 = key0 + WEYL[0] & LOW, key1 + WEYL[1] & LOW
    return [c0, c1, c2, c3]


def keep_mask(rows: Tensor, planes: Tensor, columns: int, philox: Tensor, p: float) -> Tensor:
    """True where dropout keeps: (*broadcast(rows, planes), columns).

    The counter is (column // 4, row, plane, offset); its four words serve column % 4.
    """
    quads = torch.arange((columns + 3) // 4, device=rows.device)
    offset = philox[1] & LOW
    words = philox4x32((quads, rows[..., None], planes[..., None], offset), philox[0])
    flat = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :columns]
    return flat >= int(p * 2**32)


def keep_scale(p: float) -> float:
    """What a kept weight is multiplied by: p = 1 drops everything, so 0."""
    return 1 / (1 - p) if p < 1 else 0.0
