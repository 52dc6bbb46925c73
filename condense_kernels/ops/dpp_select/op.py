import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    FLOATS,
    as_count,
    check_count,
    check_not_empty,
    check_num_tokens,
    check_tensor,
    check_weight,
)
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..similarity import reference as similarity
from . import reference

EPS = 1e-5


def check_options(sizes, like, tokens, quality, tier, candidates, eps, damping) -> None:
    """What the forms have in common; ``tokens`` are the axes of a number for each token."""
    if quality is not None:
        check_tensor("quality", quality, tokens, sizes, FLOATS, like)
    if tier is not None:
        check_tensor("tier", tier, tokens, sizes, (torch.int8,), like)
    if candidates is not None:
        check_tensor("candidates", candidates, tokens, sizes, (torch.bool,), like)
    check_weight("eps", eps)
    check_weight("damping", damping)


def check(s, quality, k, *, tier=None, candidates=None, eps=EPS, damping=0.0) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "B N N", sizes, (torch.float32, torch.float64))
    check_num_tokens("s", s)
    check_options(sizes, s, "B N", quality, tier, candidates, eps, damping)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")


def check_from_keys(keys, quality, k, *, tier=None, candidates=None, eps=EPS, damping=0.0) -> None:
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, "B N Dk", sizes, FLOATS)
    check_not_empty("keys", keys, 1, "token")
    check_num_tokens("keys", keys)
    check_not_empty("keys", keys, 2, "channel")
    check_options(sizes, keys, "B N", quality, tier, candidates, eps, damping)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")


def fake(tokens, quality, k, **_):
    return tokens.new_empty((tokens.shape[0], k), dtype=torch.int64)


def on_reference(s, quality, k, **options):
    return reference.dpp_select(s, quality, k, **options)


def from_keys_on_reference(keys, quality, k, **options):
    s = similarity.similarity(keys)[0].to(reference.working_dtype(keys, quality))
    return reference.dpp_select(s, quality, k, **options)


def on_triton(s, quality, k, **options):
    from .kernel import dpp_select as launch

    return launch(s, quality, k, **options)


def from_keys_on_triton(keys, quality, k, **options):
    from .kernel import dpp_select_from_keys as launch

    return launch(keys, quality, k, **options)


def flops_of_picks(b: int, n: int, k: int) -> int:
    """A pick: products with the earlier ones, a quotient, a square and its difference, a comparison a token."""
    return b * n * k * (k - 1) + 4 * b * n * k


def flops(s, quality, k, **_) -> int:
    return flops_of_picks(s[0], s[1], k)


def flops_from_keys(keys, quality, k, **_) -> int:
    """The cosines of the picks with all tokens, as if each were computed once."""
    b, n, dk = keys
    return flops_of_picks(b, n, k) + 2 * b * n * k * dk


def look_at_options(quality, tier, axes) -> None:
    check_finite("quality", quality, axes, None if tier is None else tier == similarity.VALID)
    if tier is not None:
        refuse("tier", tier, (tier < 0) | (tier > 3), "values in [0, 4)", axes, "Remedy: see the page.")


def look(s, quality, k, *, tier=None, **_) -> None:
    check_finite("s", s, ("image", "token", "token"))
    look_at_options(quality, tier, ("image", "token"))


def look_from_keys(keys, quality, k, *, tier=None, **_) -> None:
    check_finite("keys", keys, ("image", "token", "channel"), None if tier is None else tier == similarity.VALID)
    look_at_options(quality, tier, ("image", "token"))


def examples(b: int) -> list[Example]:
    x, quality = random(b, 12, 15) - 0.5, random(b, 12)
    s = x @ x.mT
    tier, candidates = (quality < 0.2).to(torch.int8), quality < 0.9
    return [
        Example((s, quality, 5), {"tier": tier, "candidates": candidates, "eps": 1e-4, "damping": 1e-6}),
        Example((s.double(), quality.half(), 0)),
        Example((s, None, 12)),
    ]


def examples_from_keys(b: int) -> list[Example]:
    keys, quality = random(b, 12, 5) - 0.5, random(b, 12)
    tier, candidates = (quality < 0.2).to(torch.int8), quality < 0.9
    return [
        Example((keys, quality, 5), {"tier": tier, "candidates": candidates, "eps": 1e-4, "damping": 1e-6}),
        Example((keys.double(), quality, 0)),
        Example((keys.bfloat16(), None, 4)),
    ]


backends.register(
    Operator(
        "dpp_select",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        is_traced=always,
    )
)
backends.register(
    Operator(
        "dpp_select_from_keys",
        check=check_from_keys,
        reference=from_keys_on_reference,
        triton=from_keys_on_triton,
        fake=fake,
        flops=flops_from_keys,
        examples=examples_from_keys,
        look=look_from_keys,
        is_traced=always,
    )
)


@tracing.leaf()
def dpp_select(
    s: torch.Tensor | None = None,  # [B, N, N]
    quality: torch.Tensor | None = None,  # [B, N]
    k: int | None = None,
    *,
    tier: torch.Tensor | None = None,  # [B, N]
    candidates: torch.Tensor | None = None,  # [B, N]
    eps: float = EPS,
    damping: float = 0.0,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    backend: str = "auto",
) -> torch.Tensor:
    """Greedy selection of the k tokens that span the largest volume: MAP inference of a determinantal point process.

    With the kernel ``L_ij = quality_i s_ij quality_j``, every step picks the token that multiplies the determinant of
    the picks' kernel most, ``gain_i = L_ii - sum of c_i^2``, by an incremental Cholesky factorisation: a pick p adds
    ``c_i = (L_pi - sum of c_p c_i) / sqrt(gain_p)`` (Chen, Zhang, Zhou 2018). A tie goes to the lowest index.

    Args:
        s: [B, N, N] fp32 or fp64; row s[pick] is what a pick is compared with the others by. NaN and infinities count
            as 0. Without ``keys``.
        quality: [B, N] floating; NaN and infinities count as 0. None: s is the kernel L itself.
        k: picks per image, 0 <= k <= N. The first picks of a call with a larger k are those of one with a smaller.
        tier: [B, N] int8; tier 0 is picked by gain, then tier 1 by index, then tier 2 by index, tier 3 never. None:
            all tokens are in tier 0.
        candidates: [B, N] bool; False is never picked. None: all are.
        eps: finite, >= 0; a token whose gain is at most eps * L_ii is spanned by the picks as far as rounding can tell.
            Such tokens come when all others of tier 0 are picked, by quality (L_ii without one), then by index.
        damping: finite, >= 0; added to the gain under the square root.
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64 instead of s, which is then their cosines: the result is that of
            ``similarity(keys)[0]`` as s. Where N is large, the rows of most tokens are never computed.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        order: [B, k] int64, distinct tokens in the order in which they were picked; -1 where nothing was left.

        The arithmetic is fp32 (fp64 where an input is fp64), every operation rounded alone, in the order written
        above: given the same s and quality, the picks are the same bit for bit on every backend.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, k, eps, damping or backend; s and keys both or neither.
    """
    k = as_count("k", k)
    options = {"tier": tier, "candidates": candidates, "eps": eps, "damping": damping}
    if (s is None) == (keys is None):
        raise ValueError(
            f"s, keys: expected one of the two, got {'neither' if s is None else 'both'}. Remedy: "
            "keys= for cosines, s for any other similarity."
        )
    if s is None:
        tracing.checked(check_from_keys, keys, quality, k, **options)
        return backends.run("dpp_select_from_keys", backend, (keys, quality, k), options)
    tracing.checked(check, s, quality, k, **options)
    return backends.run("dpp_select", backend, (s, quality, k), options)
