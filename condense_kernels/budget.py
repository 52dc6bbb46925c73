"""For callers who think in a budget: how many tokens to keep, of which a share is background; dense and packed."""

import functools
import math
import numbers
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ._dispatch import tracing
from ._dispatch.checks import (
    FLOATS,
    MAX_TOKENS,
    as_count,
    check_flag,
    check_num_tokens,
    check_tensor,
    is_int,
    number_on_host,
    shown,
)
from .ops.select_and_merge import Condensed, select_and_merge
from .ops.similarity import mean_similarity as estimate

DEFAULT_BACKGROUND_RATIO = 0.25
MAX_PACKED = torch.iinfo(torch.int32).max
WORTH_ESTIMATING = 1024  # tokens; of fewer, all cosines take about as long (docs/design/cpu.md)


@tracing.leaf(tuple, 2)
def split_budget(
    num_tokens: int, keep: int | float, background_ratio: float = DEFAULT_BACKGROUND_RATIO
) -> tuple[int, int]:
    """Return (num_anchors, num_background) for a budget, without any tensor: serving engines size buffers with it.

    ``keep`` is a count (int, 1 <= keep <= num_tokens) or a ratio (float, 0 < keep <= 1): 1 is one token, 1.0 all of
    them. A ratio keeps ``num_tokens * keep`` tokens, at least one; ``kept * background_ratio`` of those are background
    (1 - alpha in the paper's terms), the rest anchors. Both are rounded to the nearest, halves up, and a ratio is the
    decimal that was written, or the quotient: 0.29 of 50 is 14.5 and goes up to 15, though in floats it is less.

    Numbers may also be numpy's, or tensors without axes on the host.
    """
    num_tokens = as_count("num_tokens", num_tokens)
    if not is_int(num_tokens) or num_tokens < 1:
        raise ValueError(f"num_tokens: expected an int >= 1, got {shown(num_tokens)}. Remedy: int(num_tokens).")
    if not torch.compiler.is_compiling() and num_tokens > MAX_TOKENS:  # an open size is left open
        raise ValueError(f"num_tokens: expected at most {MAX_TOKENS} tokens an image, got {shown(num_tokens)}.")
    kept = count_of("keep", as_number("keep", keep), num_tokens)
    ratio = as_number("background_ratio", background_ratio)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(
            f"background_ratio: expected a number, got {type(ratio).__name__}: {ratio!r}. "
            "Remedy: float(background_ratio)."
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"background_ratio: expected a share in [0, 1], got {shown(ratio)}.")
    num_background = rounded(kept, ratio)
    return kept - num_background, num_background


def count_of(name: str, keep: int | float, num_tokens: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(
            f"{name}: expected an int count or a float ratio, got {type(keep).__name__}: {keep!r}. "
            f"Remedy: int({name}) or float({name})."
        )
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name}: expected a ratio in (0, 1], got {keep}. Remedy: an int is a count of tokens.")
        return torch.sym_max(1, rounded(num_tokens, keep))  # torch.export takes no max() of an open size
    if not 1 <= keep <= num_tokens:
        raise ValueError(
            f"{name}: expected 1 <= {name} <= {num_tokens} tokens, got {shown(keep)}. Remedy: 1.0 keeps all."
        )
    return keep


def rounded(count: int, ratio: float) -> int:
    """count * ratio to the nearest, halves up. In ints, which a graph with open sizes holds as well."""
    if torch.compiler.is_compiling():  # then a float may be symbolic until it is asked for
        ratio = torch.fx.experimental.symbolic_shapes.guard_scalar(ratio)
    p, q = as_fraction(ratio)
    return (2 * count * p + q) // (2 * q)


LARGEST = 1 << 30  # of a denominator: with counts up to 2**31, no product leaves int64


@functools.lru_cache
@tracing.constant_in_graphs
def as_fraction(ratio: float) -> tuple[int, int]:
    """What a ratio in [0, 1] was written as: the simplest fraction that is this float. 0.29 is 29 / 100.

    Where that is not so simple, the next smaller one that is: on the same side of all halves of counts up to 2**29.
    """
    half = Fraction(math.ulp(ratio)) / 2
    exact = simplest(Fraction(ratio) - half, Fraction(ratio) + half) if ratio > 0 else Fraction(0)
    near = exact.limit_denominator(LARGEST)
    if near > exact:  # then its left neighbour a / b among the fractions of such denominators: p * b - a * q = 1
        p, q = near.numerator, near.denominator
        b = pow(p, -1, q)
        b += (LARGEST - b) // q * q
        near = Fraction(p * b - 1, q * b)
    return near.numerator, near.denominator


def simplest(low: Fraction, high: Fraction) -> Fraction:
    """Of the fractions in [low, high], that with the smallest denominator: low > 0."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    return whole - 1 + 1 / simplest(1 / (high - whole + 1), 1 / (low - whole + 1))


def as_number(name: str, value: Any) -> Any:
    """The int or float that a number of numpy, or a tensor without axes, stands for; all else as it is."""
    value = as_count(name, value)
    if isinstance(value, (int, float, torch.SymInt)):
        return value
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
        return shortest(number_on_host(name, value), value.dtype)
    is_float = isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
    return float(str(value)) if is_float else value  # numpy writes as many digits as its precision needs


def shortest(value: float, dtype: torch.dtype) -> float:
    """The decimal of the fewest digits that is ``value`` in ``dtype``: 0.29, and not the 0.28999999 of float32."""
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((x for x in decimals if torch.tensor(x, dtype=dtype, device="cpu").item() == value), value)


@tracing.leaf(Condensed._make, 4)
def condense(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int | float = 64,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    grid: Sequence[int] | None = None,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    mask: torch.Tensor | None = None,  # [B, N]
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: float | torch.Tensor | None = None,  # or [B]
    exact: bool = True,
    backend: str = "auto",
) -> Condensed:
    """Condense every image to a budget: ``condense(features, scores, keep=64, grid=(24, 24)).merged``.

    Args:
        features: [B, N, D] fp32, fp16, bf16 or fp64: the tokens that are merged.
        scores: [B, N] floating, >= 0: importance.
        keep: a count of tokens (int), or a ratio in (0, 1] (float); rounded as :func:`split_budget` says.
        background_ratio: the share of background tokens among the kept, in [0, 1].
        grid: (H, W) or (T, H, W) with product N; this and the further options are those of :func:`select_and_merge`.
        exact: False estimates the mean similarity from 128 tokens an image, by :func:`mean_similarity`, where it is not
            given and that pays: from 1024 tokens on, if at most a quarter is kept. Most picks stay.

    Returns:
        The named tuple (merged [B, K, D], indices [B, K], assignment [B, N], mass [B, K]) of :func:`select_and_merge`.

    Raises:
        TypeError, ValueError: as :func:`select_and_merge` and :func:`split_budget`.
    """
    num_anchors, num_background = tracing.unrecorded(budget_of, features, keep, background_ratio)
    if torch.jit.is_tracing() and isinstance(keep, float):
        raise ValueError(
            f"keep: expected an int, as torch.jit.trace records the count of this size for all sizes, got {keep}. "
            f"Remedy: keep={num_anchors + num_background}, or torch.export, which records the ratio."
        )
    check_flag("exact", exact)
    kept, num_tokens = num_anchors + num_background, features.shape[1]
    if not exact and mean_similarity is None and num_tokens >= WORTH_ESTIMATING and 4 * kept <= num_tokens:
        mean_similarity = estimate(features if keys is None else keys, mask=mask, grid=grid, backend=backend)
    return select_and_merge(
        features,
        scores,
        num_anchors,
        num_background,
        keys=keys,
        grid=grid,
        positions=positions,
        mask=mask,
        suppression=suppression,
        spatial_weight=spatial_weight,
        background_suppression=background_suppression,
        scale_prior=scale_prior,
        mean_similarity=mean_similarity,
        backend=backend,
    )


def budget_of(features: torch.Tensor, keep: int | float, background_ratio: float) -> tuple[int, int]:
    check_tensor("features", features, "B N D", {}, FLOATS)
    tracing.checked(check_num_tokens, "features", features)
    return split_budget(features.shape[1], keep, background_ratio)


class VarlenBudget(NamedTuple):
    """The arguments of select_and_merge_varlen after features and scores, in its order."""

    cu_seqlens: torch.Tensor  # [S + 1] int32
    cu_anchors: torch.Tensor  # [S + 1] int32
    cu_background: torch.Tensor  # [S + 1] int32
    total_keep: int
    max_seqlen: int


def of_images(name: str, values: Any) -> list[Any]:
    """A number for each image, where nothing has to be waited for."""
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu" or values.dim() != 1:
            raise TypeError(
                f"{name}: expected numbers on the host, one for each image, got a tensor {list(values.shape)} on "
                f"{values.device}. Remedy: {name}.flatten().tolist(), which waits for the device."
            )
        return list(values.unbind())
    return list(values)  # an iterator would be used up by the checks


def check_seqlens(seqlens: Sequence[int]) -> None:
    for n in seqlens:
        if not is_int(n) or n < 0:
            raise ValueError(
                f"seqlens: expected ints >= 0, got {shown(n)} among them. Remedy: [int(n) for n in seqlens]."
            )
        if n > MAX_TOKENS:
            raise ValueError(
                f"seqlens: expected at most {MAX_TOKENS} tokens an image, got {shown(n)}. Remedy: condense windows or "
                "frames separately."
            )
    if sum(seqlens) > MAX_PACKED:
        raise ValueError(
            f"seqlens: expected a sum of at most {MAX_PACKED} tokens, as offsets are int32, got {sum(seqlens)}. "
            "Remedy: several batches."
        )


def varlen_budget(
    seqlens: Sequence[int] | torch.Tensor,
    keep: int | float | Sequence[int | float] | torch.Tensor = 64,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    device: torch.device | str | None = None,
) -> VarlenBudget:
    """Offsets for images of these lengths: ``select_and_merge_varlen(features, scores, *varlen_budget([576, 1200]))``.

    Args:
        seqlens: tokens of each image, ints from 0 to ``2**19``, together below ``2**31``; a list, or an array or tensor
            [S] on the host.
        keep: a count of tokens an image, which a shorter image keeps all of, or a ratio in (0, 1], as
            :func:`split_budget` has it. A list, or an array or tensor [S] on the host, has one for each image, where a
            count may be 0.
        background_ratio: the share of background tokens among the kept, in [0, 1].
        device: where features are; the copy there does not wait. None: torch's default device.

    Raises:
        TypeError, ValueError: as :func:`split_budget`; lengths that are no such numbers.
    """
    seqlens = [as_count("seqlens", n) for n in of_images("seqlens", seqlens)]
    check_seqlens(seqlens)
    one_each = (isinstance(keep, Sequence) and not isinstance(keep, str)) or getattr(keep, "ndim", 0) > 0
    keeps: list[Any] = of_images("keep", keep) if one_each else [keep] * len(seqlens)
    if len(keeps) != len(seqlens):
        raise ValueError(
            f"keep: expected one for each of the {len(seqlens)} images of seqlens, got {len(keeps)}. Remedy: a number "
            "by itself is for all of them."
        )

    def of_image(i: int, n: int) -> tuple[int, int]:
        name = f"keep[{i}]" if one_each else "keep"
        kept = as_number(name, keeps[i])
        nothing = one_each and type(kept) is int and kept == 0
        if n == 0 or nothing:
            return 0, 0
        return split_budget(n, count_of(name, min(kept, n) if isinstance(kept, int) else kept, n), background_ratio)

    budgets = [of_image(i, n) for i, n in enumerate(seqlens)]
    anchors, background = [a for a, _ in budgets], [b for _, b in budgets]
    device = torch.get_default_device() if device is None else torch.device(device)

    def running_sums(counts: Sequence[int]) -> torch.Tensor:
        sums = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cpu")
        if device.type == "cuda":
            sums = sums.pin_memory()
        return sums.to(device, non_blocking=True)

    total_keep, max_seqlen = sum(anchors) + sum(background), max(seqlens, default=0)
    return VarlenBudget(running_sums(seqlens), running_sums(anchors), running_sums(background), total_keep, max_seqlen)
