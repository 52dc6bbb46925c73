import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, as_count, check_count, check_tensor, check_weight
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from . import reference


def check(s, prior, k, *, sbar=None, tier=None, suppression=1.0) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "B N N", sizes, (torch.float32, torch.float64))
    check_tensor("prior", prior, "B N", sizes, FLOATS, s)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")
    if sbar is not None:
        check_tensor("sbar", sbar, "B", sizes, (torch.float32, torch.float64), s)
    if tier is not None:
        check_tensor("tier", tier, "B N", sizes, (torch.int8,), s)
    check_weight("suppression", suppression)


def fake(s, prior, k, *, sbar=None, tier=None, suppression=1.0):
    return s.new_empty((s.shape[0], k), dtype=torch.int64)


def on_reference(s, prior, k, *, sbar=None, tier=None, suppression=1.0):
    return reference.greedy_select(s, prior, k, sbar=sbar, tier=tier, suppression=suppression)


def on_triton(s, prior, k, *, sbar=None, tier=None, suppression=1.0):
    from .kernel import greedy_select as launch

    return launch(s, prior, k, sbar=sbar, tier=tier, suppression=suppression)


def flops(s, prior, k, *, sbar=None, tier=None, suppression=1.0) -> int:
    """Each pick: a maximum, a product, a difference and a comparison a token."""
    return 4 * prior[0] * prior[1] * k


def look(s, prior, k, *, sbar=None, tier=None, suppression=1.0) -> None:
    check_finite("s", s, ("image", "token", "token"))
    check_finite("prior", prior, ("image", "token"), None if tier is None else (tier == 0) | (tier == 3))
    check_finite("sbar", sbar, ("image",))
    apart = (s - s.mT).abs() > 1e-3
    refuse("s", s, apart, "a symmetric matrix", ("image", "token", "token"), "Remedy: condense_kernels.similarity.")
    if tier is not None:
        refuse("tier", tier, (tier < 0) | (tier > 3), "values in [0, 4)", ("image", "token"), "Remedy: see the page.")


def examples(b: int) -> list[Example]:
    s, prior, sbar = random(b, 12, 12), random(b, 12), random(b)
    s = (s + s.mT) / 2
    tier = (prior < 0.2).to(torch.int8)
    return [
        Example((s, prior, 5), {"sbar": sbar, "tier": tier, "suppression": 0.5}),
        Example((s.double(), prior.half(), 0)),
        Example((s, prior, 12), {"suppression": 0.0}),
    ]


backends.register(
    Operator(
        "greedy_select",
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
def greedy_select(
    s: torch.Tensor,  # [B, N, N]
    prior: torch.Tensor,  # [B, N]
    k: int,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N]
    suppression: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Greedy selection of k tokens that suppresses what is similar to those already picked (Eq. 2 and 4).

    Every step picks the token with the largest ``u_i - suppression * max_j s_ij`` over the tokens j picked so far;
    the first step has no suppression term. A tie goes to the lowest index.

    Args:
        s: [B, N, N] fp32 or fp64, symmetric similarities; NaN and infinities count as 0.
        prior: [B, N] floating; the utility u, or with ``sbar`` what u is made of. A NaN utility counts as the lowest.
        k: picks per image, 0 <= k <= N.
        sbar: [B] fp32 or fp64; where given and suppression is not 0, u = sbar / mean|prior| * prior, the mean over
            tiers 0 and 3.
        tier: [B, N] int8; tier 0 is picked by score, then tier 1 by index, then tier 2 by index, tier 3 never.
            None: all tokens are in tier 0.
        suppression: finite, >= 0; 0 gives plain top-k of the prior, whatever sbar is.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        order: [B, k] int64, distinct tokens in the order in which they were picked; -1 where only tier 3 was left.

        The arithmetic is fp32 (fp64 where s or prior is fp64), two roundings a score: given the same s and u, the
        picks are the same bit for bit on every backend.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, k, suppression or backend.
    """
    k = as_count("k", k)
    tracing.checked(check, s, prior, k, sbar=sbar, tier=tier, suppression=suppression)
    options = {"sbar": sbar, "tier": tier, "suppression": suppression}
    return backends.run("greedy_select", backend, (s, prior, k), options)
