"""A backend's result against the reference, step by step, each within a derived bound."""

import functools
import math
from typing import NamedTuple, cast

import torch

from ..ops.assign import reference as assign_reference
from ..ops.greedy_select import reference as greedy_reference
from ..ops.merge import reference as merge_reference
from ..ops.select_and_merge import Condensed
from ..ops.similarity import reference as similarity_reference
from ..ops.similarity.op import compute_dtype
from ..ops.similarity.reference import MASKED, NON_FINITE, TAKEN, VALID
from .inputs import Inputs, Stages


class Finding(NamedTuple):
    """One thing that was compared. It holds where error <= bound; an exact comparison counts differences, bound 0."""

    what: str
    error: float
    bound: float
    where: str  # the place of the largest error

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        return 0.0 if self.error == 0 else self.error / self.bound if self.bound > 0 else math.inf


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def similarity_bound(channels: int, dtype: torch.dtype, metric: str = "cosine") -> float:
    """How far a cosine in ``dtype`` arithmetic may be from the exact one; with metric "neg_l2", a distance, relatively.

    Three sums of ``channels`` products (the dot product and both squared norms, which enter under a root), each with
    relative error lambda * sqrt(channels) * eps: the errors of a sum are a random walk (Higham and Mary, 2019). At
    lambda = 4 the walk would have to be 4 deviations off with every rounding at its largest, about 12 as they come.
    Then come a root and a quotient for each norm and two products: 8 eps. |cos| <= 1 makes relative absolute.

    The tensor cores of a GPU, which the fp32 sum of the dot product may be made on, cut what lies below the last bit
    instead of rounding it. That is a drift, not a walk: with 8 products or more added at once, up to an ulp, 2 eps, for
    every 8 channels.

    A distance is the root of one sum of squares of differences. Nothing cancels, so every rounding is at most eps of
    the whole, and there is no need for a walk, which equal differences would not be: a difference counts twice, its
    square once, then at most 128 additions in a row and those of one sum for every 8 channels; the root halves all of
    that, and adds one for itself and one for the factor that scales back.
    """
    if metric == "neg_l2":
        return unit_roundoff(dtype) * ((3 + min(channels, 128) + channels / 8) / 2 + 2)
    drift = channels / 4 if dtype == torch.float32 else 0.0
    return unit_roundoff(dtype) * (2 * 4 * math.sqrt(channels) + 8 + drift)


def _sum_bound(s_bound: float, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """g: n0 similarities, each off by s_bound and cut after 24 bits (fp32) or added with a rounding (fp64)."""
    cut = 2.0**-24 if dtype == torch.float32 else sizes * unit_roundoff(dtype)
    return sizes * (s_bound + cut) + sizes * unit_roundoff(dtype)


def _largest(what: str, error: torch.Tensor, bound: torch.Tensor | float) -> Finding:
    """The entry of ``error`` (absolute errors; NaN is a mismatch) that is worst against its bound."""
    if error.numel() == 0:
        return Finding(what, 0.0, 0.0, "")
    error = error.nan_to_num(nan=math.inf)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).broadcast_to(error.shape)
    share = torch.where(error == 0, 0.0, error / bound.clamp(min=5e-324))
    at = torch.unravel_index(share.argmax(), share.shape)
    return Finding(what, float(error[at]), float(bound[at]), str([int(i) for i in at]))


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|actual - expected| in fp64; 0 where both are NaN or the same infinity, infinite where only one is."""
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    return torch.where(same, 0.0, (a - e).abs().nan_to_num(nan=math.inf))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: equal, counting NaN equal to NaN and telling -0 from +0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return torch.zeros((), dtype=torch.bool, device=a.device)
    if not a.is_floating_point():
        return a == b
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _exact(what: str, actual: torch.Tensor, expected: torch.Tensor) -> Finding:
    equal = same_bits(actual, expected)
    if bool(equal.all()):
        return Finding(what, 0.0, 0.0, "")
    where = "another dtype or shape" if equal.dim() == 0 else str((~equal).nonzero()[0].tolist())
    return Finding(what, float((~equal).sum()), 0.0, where)


def replay(
    s: torch.Tensor,  # [N, N] fp64, the reference's
    utility: torch.Tensor,  # [N] fp64
    tier: torch.Tensor,  # [N]
    order: list[int],
    suppression: float,
) -> list[float]:
    """How far each pick's exact score lies below the best open token's: 0 is the sequential greedy in fp64.

    Infinite where the pick is no legal one: taken, of tier 3, or of a tier whose turn it is not.
    """
    tier, suppressor, gaps = tier.clone(), None, []
    for pick in order:
        turn = next((t for t in (VALID, NON_FINITE, MASKED) if bool((tier == t).any())), None)
        if turn is None or pick < 0:
            gaps.append(0.0 if turn is None and pick == -1 else math.inf)
            continue
        open_ = tier == turn
        if not bool(open_[pick]):
            gaps.append(math.inf)
        elif turn != VALID:  # by index
            gaps.append(0.0 if int(open_.nonzero()[0]) == pick else math.inf)
        else:
            score = utility if suppressor is None else utility - suppression * suppressor  # Eq. 2, Eq. 4
            gaps.append(float(score[open_].amax() - score[pick]))
            suppressor = s[pick] if suppressor is None else torch.maximum(suppressor, s[pick])
        tier[pick] = TAKEN
    return gaps


def _score_bound(
    utility: torch.Tensor,  # [N] fp64
    utility_error: torch.Tensor,  # [N] fp64
    s_bound: float,
    suppression: float,
    eps: float,
) -> float:
    """How far a pick's exact score may lie below the best: twice the largest error of a score.

    fl(u - fl(suppression * m)), |m| <= 1: m is off by s_bound, and two roundings of at most eps each.
    """
    rounding = eps * (utility.abs() + 2 * suppression)
    return 2 * float((utility_error + suppression * s_bound + rounding).amax())


def _utility(
    prior: torch.Tensor,  # [N] fp64
    prior_error: torch.Tensor,  # [N] fp64
    sbar: torch.Tensor,  # [] fp64
    sbar_error: float,
    tier: torch.Tensor,  # [N]
    is_scaled: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u = sbar / mean|prior| * prior in fp64 [N], and its error [N] when computed with unit roundoff eps."""
    if not is_scaled:  # u = prior
        return prior.nan_to_num(), prior_error
    utility = greedy_reference.scaled_prior(prior, sbar, tier)
    per_sbar = greedy_reference.scaled_prior(prior, torch.ones_like(sbar), tier).abs()  # |prior| / mean
    counted = (tier == VALID) | (tier == TAKEN)
    mean = prior[counted].abs().nan_to_num(nan=0.0, posinf=0.0).mean()
    off = torch.where(prior_error == 0, 0.0, prior_error / mean)  # infinite where the mean is 0: nothing can be said
    error = per_sbar * sbar_error + 4 * eps * utility.abs() + (sbar + utility.abs()) * off
    return utility.nan_to_num(), error.nan_to_num(nan=math.inf, posinf=math.inf)


def _compare_picks(inputs: Inputs, stages: Stages, exact: tuple, s_bound: float, eps: float) -> list[Finding]:
    """The backend's picks against the greedy on the reference's similarities, step by step, in fp64."""
    s, sbar, g, tier = exact
    gaps: dict[str, list] = {"anchors": [], "background": []}
    bounds: dict[str, list] = {"anchors": [], "background": []}
    for b in range(s.shape[0]):
        n0 = (tier[b] == VALID).sum()
        rest = tier[b].scatter(0, stages.anchors[b], TAKEN)
        g_error = _sum_bound(s_bound, n0.double(), compute_dtype(stages.s)).expand_as(g[b])
        sbar_error = s_bound + 4 * eps
        of_anchors, of_background = inputs.suppressions
        for name, order, prior, prior_error, now, suppression in (
            ("anchors", stages.anchors[b], inputs.scores[b].double(), torch.zeros_like(g[b]), tier[b], of_anchors),
            ("background", stages.background[b], g[b], g_error, rest, of_background),
        ):
            live = now == VALID
            is_scaled = inputs.scale_prior and suppression != 0
            utility, error = _utility(prior, prior_error, sbar[b], sbar_error, now, is_scaled, eps)
            gap = replay(s[b], utility, now, order.tolist(), suppression)
            bound = _score_bound(utility[live], error[live], s_bound, suppression, eps) if live.any() else 0.0
            gaps[name].append(gap)
            bounds[name].append([bound] * len(gap))
    as_fp64 = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
    return [
        _largest(f"{name}: pick order replayed in fp64", as_fp64(gaps[name]), as_fp64(bounds[name])) for name in gaps
    ]


def _distances(
    inputs: Inputs, b: int, kept: torch.Tensor, valid: torch.Tensor, eps: float
) -> tuple[torch.Tensor, float]:
    """d / dmax of image ``b`` [N, K] in fp64, and how far it may be off in arithmetic of unit roundoff eps."""
    if inputs.spatial_weight == 0:
        return torch.zeros(len(valid), len(kept), dtype=torch.float64, device=valid.device), 0.0
    if inputs.grid is not None:
        at = assign_reference.grid_positions(inputs.grid)
    else:
        positions = cast(torch.Tensor, inputs.positions)  # there are some, as spatial_weight is not 0
        at = positions if positions.dim() == 2 else positions[b]
    boxed = at[valid & at.isfinite().all(dim=-1)]
    boxed = boxed.double() if boxed.is_floating_point() else boxed[:0].double()  # integers are exact
    extent = float((boxed.amax(dim=0) - boxed.amin(dim=0)).amax()) if len(boxed) else 0.0
    # About 8 roundings and one an axis, at d <= dmax; far from 0, the coordinates' own in fp64.
    offset = 4 * float(boxed.abs().amax()) / extent if extent > 0 else 0.0
    error = eps * (8 + at.shape[1]) + unit_roundoff(torch.float64) * offset
    return assign_reference.relative_distance(at, kept, valid), error


def _compare_assignment(
    inputs: Inputs, stages: Stages, result: Condensed, exact: tuple, s_bound: float, eps: float
) -> list[Finding]:
    """Given the backend's kept tokens: the chosen row's exact score against the best row's (Eq. 6, 7), and ties."""
    s, tier, weight = exact[0], exact[3], inputs.spatial_weight
    gap = torch.zeros_like(tier, dtype=torch.float64)
    untied, bound = torch.zeros_like(gap), torch.zeros_like(gap)
    for b, (kept, row) in enumerate(zip(result.indices, result.assignment, strict=True)):
        distance, distance_error = _distances(inputs, b, kept, tier[b] != MASKED, eps)
        rows = torch.arange(len(kept), dtype=torch.int64, device=kept.device)
        closed = (tier[b][kept] == MASKED)[None]  # the row of a masked token takes nobody
        score = (s[b][:, kept] - weight * distance).masked_fill(closed, -math.inf)
        chosen = row.clamp(0, len(kept) - 1)[:, None]
        # Twice the error of a score: that of s and of the distance, and the roundings of product and difference.
        bound[b] = 2 * (s_bound + weight * distance_error + eps * (1 + 2 * weight))
        owner = torch.full_like(row, -1).scatter(0, kept, rows)
        owner[(tier[b] == MASKED) | bool(closed.all())] = -1
        free = (owner < 0) & (tier[b] != MASKED) & ~closed.all()  # the others have no choice
        legal = torch.where(free, (row >= 0) & (row < len(kept)), row == owner)
        gap[b] = torch.where(free, score.amax(dim=1) - score.gather(1, chosen)[:, 0], 0.0)
        gap[b][~legal] = math.inf
        near, own_s = rows < chosen, stages.s[b][:, kept]
        twin = (own_s == own_s.gather(1, chosen)) & (distance == distance.gather(1, chosen)) & ~closed
        untied[b] = (free & (near & twin).any(dim=1)).double()
    return [
        _largest("assignment: chosen row against the best", gap, bound),
        _largest("assignment: a tie goes to the lowest row", untied, 0.0),
    ]


def _compare_merge(inputs: Inputs, condensed: Condensed) -> list[Finding]:
    """Given the backend's rows: Eq. 8, and the rows that are copied bit for bit."""
    x, a = inputs.features.double(), inputs.scores.double()
    indices, assignment = condensed.indices, condensed.assignment
    merged, mass = merge_reference.merge(x, a, indices, assignment)
    eps = unit_roundoff(compute_dtype(inputs.features, inputs.scores))
    members = torch.zeros_like(mass).scatter_add(1, assignment.clamp(min=0), (assignment >= 0).double())
    # n_k products, additions and a quotient, relative to sum a|x| / mass; then one rounding to the features' dtype.
    magnitude, _ = merge_reference.merge(x.abs(), a, indices, assignment)
    out = torch.finfo(inputs.features.dtype)
    bound = (2 * members + 4)[..., None] * eps * magnitude + out.eps / 2 * merged.abs() + out.smallest_normal * out.eps
    bits = _BITS[inputs.features.dtype]  # gathered as such: torch.gather can change a NaN of 16 bits
    own = inputs.features.view(bits).gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    copied = merge_reference.is_copied(indices, assignment, mass)
    return [
        _largest("merged", _difference(condensed.merged, merged), bound.nan_to_num(nan=0.0, posinf=0.0)),
        _largest(
            "mass", _difference(condensed.mass, mass), ((members + 1) * eps * mass).nan_to_num(nan=0.0, posinf=0.0)
        ),
        _exact("rows of one token or zero mass", condensed.merged[copied].view(bits), own[copied]),
    ]


def exact_similarity(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference's s, sbar, g (fp64) and tier, on the CPU."""
    inputs = inputs.to("cpu")
    keys = inputs.features if inputs.keys is None else inputs.keys
    s, sbar, g, tier = similarity_reference.similarity(keys, inputs.scores, inputs.mask)
    return s, sbar if inputs.mean_similarity is None else inputs.mean_similarity.double(), g, tier


def compare(result: Condensed, inputs: Inputs, *, backend: str = "auto", exact: tuple | None = None) -> list[Finding]:
    """Compare a result of select_and_merge, and the stages of ``backend`` that led to it, with the reference.

    In order: the similarities and their means against fp64; the selection, which given the same similarities must be
    the reference's bit for bit; the pick order replayed on the exact similarities; the assignment given the backend's
    own kept tokens; the merge given its own assignment; and the result against the stages in a row, bit for bit.
    ``exact`` is exact_similarity(inputs), for callers who compare several results for the same inputs.
    """
    stages = inputs.run_stages(backend)
    *tensors, condensed = stages
    stages = Stages._make([*(t.cpu() for t in tensors), Condensed(*(t.cpu() for t in condensed))])
    result, inputs = Condensed(*(t.cpu() for t in result)), inputs.to("cpu")
    keys = inputs.features if inputs.keys is None else inputs.keys
    exact = exact_similarity(inputs) if exact is None else exact
    dtype = compute_dtype(keys, inputs.scores)
    eps, s_bound = unit_roundoff(dtype), similarity_bound(keys.shape[2], dtype)
    n0 = (exact[3] == VALID).sum(dim=1).double()
    findings = [
        _largest("s", _difference(stages.s, exact[0]), s_bound),
        _largest("sbar", _difference(stages.sbar, exact[1]), s_bound + 4 * eps),
        _largest("g", _difference(stages.g, exact[2]), _sum_bound(s_bound, n0, dtype)[:, None]),
        _exact("tier", stages.tier, exact[3]),
    ]
    of_anchors, of_background = inputs.suppressions
    sbar = stages.sbar if inputs.scale_prior else None
    rest = stages.tier.scatter(1, stages.anchors.clamp(min=0), TAKEN)
    anchors = greedy_reference.greedy_select(
        stages.s, inputs.scores, inputs.num_anchors, sbar=sbar, tier=stages.tier, suppression=of_anchors
    )
    background = greedy_reference.greedy_select(
        stages.s, stages.g, inputs.num_background, sbar=sbar, tier=rest, suppression=of_background
    )
    findings += [
        _exact("anchors: selection given the backend's s", stages.anchors, anchors),
        _exact("background: selection given the backend's s", stages.background, background),
        *_compare_picks(inputs, stages, exact, s_bound, eps),
    ]
    kept = torch.cat([stages.anchors, stages.background], dim=1).sort(dim=1).values
    findings.append(_exact("indices: the picks, ascending", result.indices, kept))
    if findings[-1].ok:  # else there is nothing sensible to look up
        findings += _compare_assignment(inputs, stages, result, exact, s_bound, eps)
        findings += _compare_merge(inputs, result)
    for name, whole, staged in zip(Condensed._fields, result, stages.condensed, strict=True):
        findings.append(_exact(f"{name}: the stages in a row", whole, staged))
    return findings


def assert_matches_reference(result: Condensed, inputs: Inputs, *, backend: str = "auto") -> None:
    """Raise AssertionError, saying what is off and where, unless ``compare`` finds everything within its bound."""
    wrong = [finding for finding in compare(result, inputs, backend=backend) if not finding.ok]
    lines = [f"  {f.what}: {f.error:.3g} is above {f.bound:.3g}, at {f.where}" for f in wrong]
    if wrong:
        raise AssertionError(f"backend {backend!r} does not match the reference:\n" + "\n".join(lines))


def compare_alone(result: Condensed, inputs: Inputs, *, backend: str = "auto") -> Finding:
    """The last image of the batch, on its own: the same bits (the contract's batch independence)."""
    alone, last = inputs.image(inputs.scores.shape[0] - 1).run(backend), [t[-1:].cpu() for t in result]
    differing = [_exact(name, a.cpu(), b) for name, a, b in zip(Condensed._fields, alone, last, strict=True)]
    worst = max(differing, key=lambda finding: finding.error)
    return worst._replace(what=f"{worst.what}: an image alone against in a batch")


def assert_same_bits(actual: tuple, expected: tuple, what: str = "result") -> None:
    """Raise AssertionError unless two results are equal bit for bit (NaN equals NaN, -0 is not +0)."""
    names = getattr(actual, "_fields", [str(i) for i in range(len(actual))])
    for name, a, e in zip(names, actual, expected, strict=True):
        finding = _exact(name, a.cpu(), e.cpu())
        if not finding.ok:
            raise AssertionError(f"{what}.{name}: {int(finding.error)} entries differ, the first at {finding.where}")
