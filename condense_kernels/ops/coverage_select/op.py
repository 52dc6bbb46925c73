import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, as_count, check_choice, check_count, check_tensor
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from . import reference

COMBINE = ("mul", "add")


def check_options(weight, combine, candidates, axes, sizes, c) -> None:
    """What the dense and the packed operator share."""
    if weight is not None:
        check_tensor("weight", weight, axes, sizes, FLOATS, c)
    check_choice("combine", combine, COMBINE)
    if candidates is not None:
        check_tensor("candidates", candidates, axes, sizes, (torch.bool,), c)


def check(c, k, *, weight=None, combine="mul", candidates=None) -> None:
    sizes: dict[str, int] = {}
    check_tensor("c", c, "B M N", sizes, (torch.float32, torch.float64))
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")
    check_options(weight, combine, candidates, "B N", sizes, c)


def fake(c, k, **options):
    return c.new_empty((c.shape[0], k), dtype=torch.int64)


def on_reference(c, k, **options):
    return reference.coverage_select(c, k, **options)


def on_triton(c, k, **options):
    from .kernel import coverage_select as launch

    return launch(c, k, **options)


def flops(c, k, **options) -> int:
    """At most: every pick a difference, a comparison and an addition a row and token. Lazily it is a small part."""
    return 3 * c[0] * c[1] * c[2] * k


def look_at_options(weight, combine, candidates, axes) -> None:
    check_finite("weight", weight, axes, candidates)
    if weight is not None and combine == "mul":
        refuse("weight", weight, weight < 0, "numbers >= 0, as combine is 'mul'", axes, "Remedy: clamp, or 'add'.")


def look(c, k, *, weight=None, combine="mul", candidates=None) -> None:
    check_finite("c", c, ("image", "row", "token"))
    look_at_options(weight, combine, candidates, ("image", "token"))


def examples(b: int) -> list[Example]:
    c, weight = random(b, 9, 12) - 0.3, random(b, 12)
    return [
        Example((c, 5), {"weight": weight, "candidates": weight > 0.2}),
        Example((c, 12), {"weight": weight.half(), "combine": "add"}),
        Example((c.double(), 3)),
    ]


backends.register(
    Operator(
        "coverage_select",
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


@tracing.leaf()
def coverage_select(
    c: torch.Tensor,  # [B, M, N]
    k: int,
    *,
    weight: torch.Tensor | None = None,  # [B, N]
    combine: str = "mul",
    candidates: torch.Tensor | None = None,  # [B, N]
    backend: str = "auto",
) -> torch.Tensor:
    """Greedy facility location: k tokens that together cover as much as possible (Nemhauser et al. 1978).

    Token j covers row i to the degree c_ij, a set of picks to the largest c_ij of them, nothing to 0. Every step picks
    the token with the largest ``gain_j * weight_j``, or ``gain_j + weight_j``, where gain_j is the sum over the rows of
    max(0, c_ij - what the picks so far cover of row i). A tie goes to the lowest index. The first j picks are those of
    a call with k = j. SCOPE is this on cosines with attention as weight, MMTok with text rows above those of tokens.

    Args:
        c: [B, M, N] fp32 or fp64; the rows may be other things than tokens. NaN and infinities count as 0.
        k: picks per image, 0 <= k <= N.
        weight: [B, N] floating. A NaN is the lowest weight, an infinity the largest or lowest finite one. None: the
            gain alone counts.
        combine: "mul", where a negative weight counts as 0, or "add".
        candidates: [B, N] bool; a token that is False is never picked.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        order: [B, k] int64, distinct tokens in the order in which they were picked; -1 where no candidate was left.

        The arithmetic is fp32 (fp64 where c or weight is fp64), every operation rounded, and a gain is added up in one
        order: given the same c, the picks are the same bit for bit on every backend.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, k, combine or backend.
    """
    k = as_count("k", k)
    options = {"weight": weight, "combine": combine, "candidates": candidates}
    tracing.checked(check, c, k, **options)
    return backends.run("coverage_select", backend, (c, k), options)
