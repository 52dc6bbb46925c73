"""Every result against the exact definition, before it is timed: from scratch, in fp64, a step at a time.

A choice has to be as good as the best one within what rounding the similarities can change; a value has to be within
its rounding. A gate raises Mismatch, which names the output. Of a batch, the first and the last image are looked at:
that the others do not depend on their neighbours is what the tests say.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from condense_kernels.ops.assign.reference import grid_positions, relative_distance
from condense_kernels.ops.merge.reference import merge, merge_backward
from condense_kernels.testing import similarity_bound, unit_roundoff

ROWS = 2048  # of S at a time, so that long inputs fit
EPS = unit_roundoff(torch.float32)


class Mismatch(AssertionError):
    """A result that is not the definition's."""


def hold(output: str, error: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Raise unless ``error`` is at most ``bound`` everywhere; NaN is not."""
    bad = ~(error <= bound)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        limit = bound[at] if isinstance(bound, torch.Tensor) and bound.dim() else bound
        raise Mismatch(f"{output}: off by {float(error[at]):.3g} at {list(at)}, expected at most {float(limit):.3g}")


def equal(output: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    hold(output, (actual != expected).float(), 0.0)


def ends(batch: int) -> Iterator[int]:
    yield from sorted({0, batch - 1})


def check_attention(scores: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> None:  # [B, H, N], [B, H, N, d]
    """An exponent is off by the roundings of a logit and of the normaliser; 2**-20 is for exponentials and sums."""
    d = queries.shape[-1]
    for b in ends(len(queries)):
        for h in ends(queries.shape[1]):
            q, k = queries[b, h].double() * d**-0.5, keys[b, h].double()
            expected = torch.stack([(strip @ k.T).softmax(dim=-1).sum(dim=0) for strip in q.split(ROWS)]).sum(dim=0)
            largest = max(float((strip.abs() @ k.abs().T).max()) for strip in q.split(ROWS))
            bound = 2 * (d + 4) * EPS * (largest + 1) + 2.0**-20
            hold(f"scores, image {b}, head {h}", (scores[b, h] * len(q) - expected).abs() / expected, bound)


class Exact:
    """One image's similarities and means in fp64, each computed when first asked for; S is never kept whole."""

    def __init__(self, keys: torch.Tensor):  # [N, D]
        self.z = F.normalize(keys.double(), dim=-1)
        self.bound = similarity_bound(keys.shape[1], torch.float32)  # of a similarity computed in fp32

    def columns(self, indices: torch.Tensor) -> torch.Tensor:  # [K] -> [N, K]
        return self.z @ self.z[indices].T

    @functools.cached_property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """sbar [] and g [N], from the blocks of S on and above the diagonal."""
        n, total, g = len(self.z), self.z.new_zeros(()), self.z.new_zeros(len(self.z))
        for start in range(0, n, ROWS):
            end = min(start + ROWS, n)
            s = self.z[start:end] @ self.z[start:].T
            g[start:end] += s.sum(dim=1)
            g[end:] += s[:, end - start :].sum(dim=0)
            total += 2 * s.abs().sum() - s[:, : end - start].abs().sum()
        return total / n**2, g


@functools.lru_cache(maxsize=4)  # the sides of a case come one after the other and share their inputs
def exact(keys: torch.Tensor, b: int) -> Exact:  # [B, N, D]; tensors hash by identity
    return Exact(keys[b])


# Selection loops: the score of every token given the picks so far, without anything carried from pick to pick.

Definition = Callable[[list[int]], torch.Tensor]  # picks -> [N]


def condense_definition(s: torch.Tensor, utility: torch.Tensor) -> Definition:
    """Eq. 2 and 4."""
    return lambda picks: utility - s[picks].amax(dim=0) if picks else utility


def divprune_definition(s: torch.Tensor) -> Definition:
    distance = 1 - s
    nearest = (distance + torch.diag(torch.full_like(s[0], torch.inf))).amin(dim=1)
    return lambda picks: distance[picks].amin(dim=0) if picks else nearest


def cdpruner_definition(s: torch.Tensor, relevance: torch.Tensor) -> Definition:
    """By how much a token multiplies the determinant of the picks' kernel: a Schur complement."""
    kernel = relevance[:, None] * s * relevance

    def gain(picks: list[int]) -> torch.Tensor:
        across = kernel[picks]  # [picks, N]
        return kernel.diag() - (across * torch.linalg.solve(across[:, picks], across)).sum(dim=0)

    return lambda picks: gain(picks) if picks else kernel.diag()


def idpruner_definition(s: torch.Tensor, importance: torch.Tensor, balance: float = 0.5) -> Definition:
    scaled = balance * (importance - importance.min()) / (importance.max() - importance.min())
    return lambda picks: scaled - (1 - balance) * s[picks].amax(dim=0) if picks else scaled


def check_picks(order: torch.Tensor, definition: Definition, error: torch.Tensor) -> None:  # [k], of one image
    """Each pick has the best score of those that are left; ``error`` [N] is what a score may be off."""
    picks = order.tolist()
    if len(set(picks)) != len(picks):
        raise Mismatch(f"order: expected distinct tokens, got {len(set(picks))} of {len(picks)}")
    for i, pick in enumerate(picks):
        score = definition(picks[:i])
        lead = score - score[pick]
        lead[picks[:i]] = -torch.inf
        hold(f"order, pick {i}", lead, error + error[pick])


# The operators and what does the same.


def check_loop(order: torch.Tensor, keys: torch.Tensor, define: Callable, scores: torch.Tensor | None = None) -> None:
    """A selection loop [B, k] on the similarities of ``keys`` [B, N, D]; ``define`` makes an image's definition."""
    for b in ends(len(keys)):
        one = exact(keys, b)
        s = one.columns(torch.arange(len(one.z), device=keys.device))
        prior = () if scores is None else (scores[b].double(),)
        error = one.bound * (prior[0].square() if define is cdpruner_definition else torch.ones_like(s[0]))
        check_picks(order[b], define(s, *prior), error)


EVERY_PICK = 1024  # tokens up to which every pick of a coverage is looked at; of more, 32 spread over the loop


def check_coverage(order: torch.Tensor, keys: torch.Tensor, saliency: torch.Tensor) -> None:
    """Each pick [B, k] adds as much coverage of keys [B, N, D], times its saliency [B, N], as any would.

    A gain is off by what N similarities are, and their sum.
    """
    for b in ends(len(keys)):
        one, picks = exact(keys, b), order[b].tolist()
        n, k = len(one.z), len(picks)
        if len(set(picks)) != k:
            raise Mismatch(f"order: expected distinct tokens, got {len(set(picks))} of {k}")
        s, weight = one.columns(torch.arange(n, device=keys.device)), saliency[b].double()
        error = n * (one.bound + n * EPS) * weight
        for i in range(0, k, 1 if n <= EVERY_PICK else max(k // 32, 1)):
            covered = s[:, picks[:i]].amax(dim=1).clamp(min=0) if i else torch.zeros_like(weight)
            score = (s - covered[:, None]).clamp_(min=0).sum(dim=0) * weight
            score[picks[:i]] = -torch.inf
            hold(f"order, pick {i}", score - score[picks[i]], error + error[picks[i]])


def check_density_peaks(order: torch.Tensor, features: torch.Tensor, k_nn: int, scale: float) -> None:  # [B, k]
    """Each pick's score, log(distance) + density, may be the largest of those that are left.

    A squared distance is off by what a product of features loses, 2**-21 of their squares. Densities that are closer
    than that may come in another order, which makes another token the next denser one.
    """
    for b in ends(len(features)):
        x = features[b].double()
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") * scale
        off = 2.0**-21 * float(x.square().sum(dim=1).max()) * scale**2
        density = -d.topk(k_nn, dim=-1, largest=False).values.square().mean(dim=-1)
        apart, farthest = d.clone().fill_diagonal_(torch.inf), d.amax(dim=-1, keepdim=True)
        denser = density - density[:, None]  # [i, j]: by how much j is
        nearest = torch.where(denser > -2 * off, apart, torch.inf).minimum(farthest).amin(dim=-1)
        certain = torch.where(denser > 2 * off, apart, torch.inf).minimum(farthest).amin(dim=-1)
        low = (nearest.square() - off).clamp(min=0).sqrt().log() + density - off
        high = (certain.square() + off).sqrt().log() + density + off
        picks = order[b].tolist()
        if len(set(picks)) != len(picks):
            raise Mismatch(f"order: expected distinct tokens, got {len(set(picks))} of {len(picks)}")
        for i, pick in enumerate(picks):
            hold(f"order, pick {i}", low.amax() - high[pick], 2.0**-18)  # fp32 of an exponential and a product
            low[pick] = -torch.inf


def check_gram(s: torch.Tensor, keys: torch.Tensor, rounding: float = 0.0) -> None:  # [B, N, N], [B, N, D]
    """Some rows of the first and last image; ``rounding`` is that of a 16-bit result."""
    for b in ends(len(keys)):
        one = exact(keys, b)
        some = torch.linspace(0, len(one.z) - 1, min(64, len(one.z)), device=s.device).long()
        hold("s", (s[b, some] - one.columns(some).T).abs(), one.bound + rounding)


def check_distances(s: torch.Tensor, keys: torch.Tensor, cancels: bool = False) -> None:  # [B, N, N], [B, N, D]
    """Negated distances, some rows of the first and last image: relatively or, where they come from products, which
    cancel, their squares beside those of the norms."""
    for b in ends(len(keys)):
        z = keys[b].double()
        some = torch.linspace(0, len(z) - 1, min(16, len(z)), device=s.device).long()
        expected = torch.stack([(z - z[i]).square().sum(dim=1) for i in some.tolist()])
        if cancels:
            squares = z.square().sum(dim=1)
            bound = 2 * similarity_bound(keys.shape[2], torch.float32) * (squares[some, None] + squares)
            hold("squared distances", (s[b, some].double().square() - expected).abs(), bound)
        else:
            distance = expected.sqrt()
            bound = similarity_bound(keys.shape[2], torch.float32, "neg_l2") * distance
            hold("distances", (s[b, some].double() + distance).abs(), bound)


def check_nearest(nearest: torch.Tensor, s: torch.Tensor) -> None:  # [B, N], [B, N, N]
    for b in ends(len(s)):
        others = s[b].clone().fill_diagonal_(-torch.inf)
        equal("nearest", nearest[b], others.amax(dim=1))


def check_means(sbar: torch.Tensor, g: torch.Tensor, keys: torch.Tensor) -> None:  # [B], [B, N], [B, N, D]
    for b in ends(len(keys)):
        one = exact(keys, b)
        hold("sbar", (sbar[b] - one.means[0]).abs()[None], one.bound + 4 * EPS)
        hold("g", (g[b] - one.means[1]).abs(), len(one.z) * (one.bound + 2 * EPS))


def check_top_k(result: tuple, features: torch.Tensor, scores: torch.Tensor, k: int) -> None:
    merged, indices = result
    expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(dim=-1).values
    equal("indices", indices, expected)
    equal("features", merged, features.take_along_dim(expected[..., None], dim=1))


def check_assignment(assignment, s_kept, indices, grid, bound: float) -> None:  # [N], [N, K] fp64, [K]
    """Eq. 6 and 7 of one image."""
    at = grid_positions(list(grid))
    valid = torch.ones(len(at), dtype=torch.bool)
    distance = relative_distance(at, indices.cpu(), valid).to(s_kept.device)
    affinity = s_kept - distance
    chosen = affinity.gather(1, assignment[:, None])[:, 0]
    gap = affinity.amax(dim=1) - chosen
    gap[indices] = (assignment[indices] != torch.arange(len(indices), device=s_kept.device)).double()  # its own row
    hold("assignment", gap, 2 * (bound + 16 * EPS))


def check_merged(merged, mass, features, scores, indices, assignment, **mode) -> None:  # of one image
    """Eq. 8: products, additions and a quotient relative to the sum of magnitudes, then one rounding. A blend has three
    operations more."""
    args = indices.cpu()[None], assignment.cpu()[None]
    x, a = features.cpu().double()[None], scores.cpu().double()[None]
    expected, expected_mass = merge(x, a, *args, **mode)
    magnitude, _ = merge(x.abs(), a, *args, **mode)
    members = assignment.cpu().bincount(minlength=len(indices)).double()
    bound = (2 * members + (7 if mode else 4))[:, None] * EPS * magnitude[0] + unit_roundoff(features.dtype) * expected[
        0
    ].abs()
    hold("mass", (mass.cpu() - expected_mass[0]).abs(), (members + 1) * EPS * expected_mass[0])
    hold("merged", (merged.cpu() - expected[0]).abs(), bound)


def check_gathered(merged, features, neighbours, weights) -> None:  # of one image, every neighbour a token
    """A product and an addition a neighbour relative to the sum of magnitudes, then one rounding."""
    copies, w = features.cpu().double()[neighbours.cpu()], weights.cpu().double()[..., None]
    expected, magnitude = (w * copies).sum(dim=1), (w * copies).abs().sum(dim=1)
    bound = 2 * neighbours.shape[1] * EPS * magnitude + unit_roundoff(features.dtype) * expected.abs()
    hold("merged", (merged.cpu() - expected).abs(), bound)


def replay(
    s_kept: torch.Tensor,  # [N, K] fp64
    utility: torch.Tensor,  # [N] fp64
    kept: torch.Tensor,  # [K]
    picks: int,
    free: torch.Tensor,  # [N] bool, picked tokens are taken out
) -> torch.Tensor:  # [picks]
    """By how much the best kept token lies below the best of all, pick after pick: the order of picks is not known."""
    suppressor, gaps = None, []
    for _ in range(picks):
        score = (utility if suppressor is None else utility - suppressor).masked_fill(~free, -torch.inf)
        at = score[kept].argmax()
        gaps.append(score.amax() - score[kept[at]])
        free[kept[at]] = False
        suppressor = s_kept[:, at] if suppressor is None else torch.maximum(suppressor, s_kept[:, at])
    return torch.stack(gaps) if gaps else utility.new_zeros(0)


def check_condensed(result: tuple, features: torch.Tensor, scores: torch.Tensor, shape) -> None:
    """select_and_merge, by whichever way: the kept set, the assignment to it, the merge given that."""
    merged, indices, assignment, mass = result
    for b in ends(len(features)):
        one, kept = exact(features, b), indices[b]
        if not bool((kept.diff() > 0).all()) or len(kept) != shape.kept:
            raise Mismatch(f"indices: expected {shape.kept} ascending positions in image {b}")
        sbar, g = one.means
        s_kept, n = one.columns(kept), len(one.z)
        free = torch.ones(n, dtype=torch.bool, device=features.device)
        for name, prior, off, picks in (
            ("anchors", scores[b].double(), 0.0, shape.num_anchors),
            ("background", g, n * one.bound, shape.num_background),
        ):
            mean = prior.abs().mean()
            utility = sbar / mean * prior
            # Twice what a score may be off: utility (through sbar, prior and roundings) and similarity.
            largest = (prior / mean).abs().amax()
            bound = 2 * ((largest + 1) * (one.bound + 8 * EPS) + sbar / mean * off)
            hold(f"indices, {name} by pick", replay(s_kept, utility, kept, picks, free), float(bound))
        check_assignment(assignment[b], s_kept, kept, shape.grid, one.bound)
        check_merged(merged[b], mass[b], features[b], scores[b], kept, assignment[b])


def check_visionzip(result: tuple, features: torch.Tensor, scores: torch.Tensor, dominant: int, contextual: int):
    merged, indices, rows = result
    for b in ends(len(features)):
        one, n = exact(features, b), scores.shape[1]
        top = set(scores[b].topk(dominant).indices.tolist())
        rest = [i for i in range(n) if i not in top]
        centres = rest[:: len(rest) // contextual][:contextual]
        equal("indices", indices[b].cpu(), torch.tensor(sorted(top) + centres))
        equal("rows", rows[b, indices[b]].cpu(), torch.arange(dominant + contextual))
        others = torch.tensor([i for i in rest if i not in set(centres)], device=features.device)
        s = one.columns(indices[b, dominant:])[others]
        chosen = rows[b, others] - dominant
        hold("rows", s.amax(dim=1) - s.gather(1, chosen[:, None])[:, 0], 2 * one.bound)
        x = features[b].double()
        expected = x[indices[b]]
        for c in range(contextual):
            if bool((chosen == c).any()):
                expected[dominant + c] += x[others[chosen == c]].mean(dim=0)
        hold("merged", (merged[b] - expected).abs(), n * EPS * x.abs().amax())


def check_gradients(  # of one image, each argument but the first two [1, ...]
    grad_features, grad_scores, grad_merged, grad_mass, features, scores, merged, mass, indices, assignment
) -> None:
    """Relative to the sum of magnitudes, with merged taken as it is and a mass that was summed in fp32, then one
    rounding."""
    arguments = [t.cpu() for t in (grad_merged, grad_mass, features, scores, merged, mass, indices, assignment)]
    of_features, of_scores = (grad[0] for grad in merge_backward(*arguments))
    gradient, moved, x, _, mean, total, _, rows = (t[0].double() for t in arguments)
    rows = rows.long()
    magnitude = ((x.abs() + mean.abs()[rows]) * gradient.abs()[rows]).sum(dim=-1) / total[rows] + moved.abs()[rows]
    unit, members = unit_roundoff(features.dtype), rows.bincount(minlength=len(total)).double()[rows]
    bound = (unit + (members + 4) * EPS)[:, None] * of_features.abs()
    hold("grad_features", (grad_features.cpu() - of_features).abs(), bound)
    bound = (members + x.shape[-1] + 8) * EPS * magnitude + unit * of_scores.abs()
    hold("grad_scores", (grad_scores.cpu() - of_scores).abs(), bound)
