"""Calls of the operators, drawn at random, each with what its result is held to: for fuzz.py and soak.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from test_merge_backward import assert_matches_reference as assert_backward
from test_merge_backward import call_of

import condense_kernels as ck
from condense_kernels.ops.assign import reference as assign_reference
from condense_kernels.ops.merge import reference as merge_reference
from condense_kernels.testing import (
    KINDS,
    assert_matches_reference,
    assert_same_bits,
    exact_attention,
    make_inputs,
    similarity_bound,
    unit_roundoff,
)

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Around the widths of vectors, tiles and blocks of the C++ kernels.
EDGES = sorted({n + d for n in (8, 16, 32, 48, 64, 96, 128) for d in (-1, 0, 1)})


@dataclass
class Call:
    """An operator with its arguments, and whatever its result has to be."""

    operator: str
    arguments: dict[str, Any]
    check: Callable[[tuple], None]  # raises AssertionError
    shared: tuple[str, ...] = ()  # tensors without a batch axis in front
    packed: bool = False  # T tokens in front instead of B images
    function: Callable | None = None  # instead of condense_kernels' own

    def run(self, **changed: Any) -> tuple:
        return listed((self.function or getattr(ck, self.operator))(**{**self.arguments, **changed}))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}

    def of_image(self, b: int) -> tuple:
        tensors = self.tensors().items()
        return self.run(**{name: value[b : b + 1] for name, value in tensors if name not in self.shared})

    def words(self) -> str:
        return f"{self.operator}({', '.join(f'{name}={said(value)}' for name, value in self.arguments.items())})"


def listed(result: Any) -> tuple:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def said(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"
    return repr(value)


@dataclass
class Dice:
    """What a call is drawn with. The same seed draws the same call, on every machine."""

    seed: str
    random: Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def size(self, largest: int = 129) -> int:
        """Mostly small, at times next to what the kernels are cut into."""
        edges = [n for n in EDGES if n <= largest]
        return self.random.choice(edges) if edges and self.chance(0.15) else self.random.randint(1, min(largest, 24))

    def dtype(self) -> torch.dtype:
        return self.one(F32, F32, F32, BF16, F16, F64)

    def working(self) -> torch.dtype:
        return self.one(F32, F32, F32, F64)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def flags(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < self.one(0.2, 0.7, 0.95)

    def numbers(self, *shape: int, dtype: torch.dtype = F32, hostile: bool = True) -> torch.Tensor:
        """Normal ones, ones with many ties, zeros among them, of any magnitude, and at times what is no number."""
        kind = self.one("normal", "normal", "ties", "sparse", "tiny", "huge", "broken" if hostile else "normal")
        x = torch.randn(shape, generator=self.generator, dtype=F64)
        if kind == "ties":
            x = self.integers(-3, 4, *shape).double() / 2
        elif kind == "sparse":
            x = torch.where(self.flags(*shape), 0.0, x)
        elif kind in ("tiny", "huge") and hostile and dtype in (F32, BF16):
            x = x * (2.0**-132 if kind == "tiny" else 2.0**100)
        elif kind == "broken":
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=F64)
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.1, bad[self.integers(0, 5, *shape)], x)
        return self.laid_out(x.to(dtype))

    def scores(self, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=F64)
        if self.chance(0.4):
            x = (x * 3).floor() / 2  # ties, and zeros
        return self.laid_out(x.to(dtype))

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """The same values with other strides: channels first, every second one, from the midst of something larger."""
        way = self.one("dense", "dense", "reversed", "halved", "shifted", "repeated")
        if way == "reversed":
            return x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1))
        if way == "halved" and x.dim() > 1:
            wide = x.repeat_interleave(2, dim=-1)
            return wide[..., ::2]
        if way == "shifted":
            wide = torch.nn.functional.pad(x, (1, 2))
            return wide[..., 1 : x.shape[-1] + 1]
        if way == "repeated" and x.dim() > 1 and x.shape[0] > 0:
            return x[:1].expand(x.shape)
        return x


def within(what: str, actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """|actual - expected| <= bound; NaN and infinities have to be the same."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    off = torch.where(same, 0.0, (a - e).abs().nan_to_num(nan=torch.inf))
    wrong = ~(off <= torch.as_tensor(bound, dtype=F64).nan_to_num(nan=0.0, posinf=torch.inf))
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {a[at].item()} at {list(at)}, expected {e[at].item()}; {int(wrong.sum())} are off"
        )


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def as_the_reference(call: Call) -> Call:
    """Of the operators whose result has to be the reference's bit for bit."""

    def check(result: tuple) -> None:
        assert_same_bits(result, call.run(backend="reference"), call.operator)

    call.check = check
    return call


def exactly(operator: str, shared: tuple[str, ...] = (), **arguments: Any) -> Call:
    return as_the_reference(Call(operator, given(**arguments), lambda _: None, shared))


# The stages


def similarity(dice: Dice) -> Call:
    b, n, d, dtype = dice.one(0, 1, 1, 2, 3), dice.size(), dice.size(), dice.dtype()
    metric = dice.one("cosine", "cosine", "neg_l2")
    keys = dice.numbers(b, n, d, dtype=dtype, hostile=metric == "cosine")
    scores = dice.scores(b, n) if dice.chance(0.5) else None
    mask = dice.flags(b, n) if dice.chance(0.3) else None
    arguments = given(keys=keys, scores=scores, mask=mask, metric=metric, nearest=dice.chance(0.3))

    def check(result: tuple) -> None:
        expected = ck.similarity(**arguments, backend="reference")
        s, exact = result[0], expected[0].double()
        relative = similarity_bound(d, s.dtype, metric)
        bound = relative * (exact.abs() if metric == "neg_l2" else torch.ones_like(exact))
        within("s", s, exact, bound)
        assert_same_bits((s, result[3]), (s.mT, expected[3]), "s symmetric, tier")
        each = bound + exact.abs().amax(dim=-1, keepdim=True) * 2.0**-22
        within("sbar", result[1], expected[1], each.amax(dim=(1, 2)) + 8 * unit_roundoff(s.dtype) * expected[1].abs())
        within("g", result[2], expected[2], each.sum(dim=-1))
        if len(result) > 4:
            within("nearest", result[4], expected[4], bound.amax(dim=-1))

    return Call("similarity", arguments, check)


def selection(dice: Dice) -> dict[str, Any]:
    """Arguments of greedy_select on an s that is given."""
    b, n = dice.one(0, 1, 1, 2, 3), dice.size()
    s = dice.numbers(b, n, n, dtype=dice.working())
    tier = dice.laid_out(dice.integers(0, dice.one(2, 3, 4), b, n).to(torch.int8)) if dice.chance(0.4) else None
    prior = dice.numbers(b, n, dtype=dice.dtype()) if dice.chance(0.8) else None
    first = dice.one(None, None, "max_min", dice.numbers(b, n), dice.integers(-1, n, b))
    return given(
        s=s, prior=prior, k=dice.random.randint(0, n), tier=tier, first=first,
        sbar=dice.scores(b, dtype=s.dtype).contiguous() if prior is not None and dice.chance(0.5) else None,
        suppression=dice.one(0.0, 0.5, 1.0, 1.0, 2.5), candidates=dice.flags(b, n) if dice.chance(0.2) else None,
        combine=dice.one("sub", "sub", "mul"),
    )  # fmt: skip


def greedy_select(dice: Dice) -> Call:
    return exactly("greedy_select", **selection(dice))


def greedy_select_from_keys(dice: Dice) -> Call:
    b, n = dice.one(1, 1, 2), dice.size()
    keys, k = dice.numbers(b, n, dice.size(40), dtype=dice.dtype()), dice.random.randint(1, n)
    prior = dice.scores(b, n) if dice.chance(0.8) else None
    mask = dice.flags(b, n) if dice.chance(0.3) else None
    options = given(
        suppression=dice.one(0.5, 1.0), first=dice.one(None, None, "max_min"), combine=dice.one("sub", "mul")
    )

    def check(result: tuple) -> None:
        s, sbar, _, tier = ck.similarity(keys, prior, mask)
        scale = sbar if prior is not None else None
        assert_same_bits(result, (ck.greedy_select(s, prior, k, sbar=scale, tier=tier, **options),), "from keys")

    return Call("greedy_select", given(keys=keys, prior=prior, k=k, mask=mask, **options), check)


def kept_tokens(dice: Dice, b: int, n: int, k: int) -> torch.Tensor:
    """[B, K] ascending and distinct."""
    order = torch.rand(b, n, generator=dice.generator).argsort(dim=1)
    return order[:, :k].sort(dim=1).values


def assign(dice: Dice) -> Call:
    b, n = dice.one(0, 1, 1, 2, 3), dice.size()
    k = dice.random.randint(1, n)
    s, indices = dice.numbers(b, n, n, dtype=dice.working()), kept_tokens(dice, b, n, k)
    tier = dice.integers(0, 3, b, n).to(torch.int8) if dice.chance(0.4) else None
    sources = dice.flags(b, n) if dice.chance(0.2) else None
    weight = dice.one(0.0, 0.0, 0.5, 1.0)
    positions = dice.numbers(b, n, dice.one(1, 2, 3), hostile=False) if weight else None
    arguments = given(
        s=s, indices=indices, tier=tier, sources=sources, spatial_weight=weight, positions=positions
    )  # fmt: skip

    def check(result: tuple) -> None:
        (rows,), expected = result, ck.assign(**arguments, backend="reference")
        if not weight:
            return assert_same_bits((rows,), (expected,), "assign")
        same = (rows < 0) == (expected < 0)
        if not bool(same.all()):
            raise AssertionError(
                f"assign: -1 where there is a row, or none where there is -1, at {(~same).nonzero()[0]}"
            )
        eps = unit_roundoff(s.dtype)
        for image in range(b):
            kept, valid = indices[image], torch.ones(n, dtype=torch.bool) if tier is None else tier[image] != 2
            clean = s[image].double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            distance = assign_reference.relative_distance(positions[image], kept, valid)
            score = clean[kept].T - weight * distance
            mine, best = (score.gather(1, row[image].clamp(min=0)[:, None])[:, 0] for row in (rows, expected))
            magnitude = clean[kept].abs().amax(dim=0) + 16 * weight
            within("score of the row", torch.where(rows[image] < 0, best, mine), best, 4 * eps * magnitude)

    return Call("assign", arguments, check)


def clusters(dice: Dice) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """indices [B, K] and assignment [B, N], with tokens of no row."""
    b, n = dice.one(0, 1, 1, 2, 3), dice.size()
    k = dice.random.randint(1, n)
    indices, rows = kept_tokens(dice, b, n, k), dice.integers(-1 if dice.chance(0.3) else 0, k, b, n)
    if dice.chance(0.8):
        rows.scatter_(1, indices, torch.arange(k).expand(b, k))
    return indices, rows, b, n


def merge(dice: Dice) -> Call:
    indices, rows, b, n = clusters(dice)
    features = dice.numbers(b, n, dice.size(), dtype=dice.dtype(), hostile=False)
    scores = dice.scores(b, n, dtype=dice.one(F32, features.dtype)) if dice.chance(0.8) else None
    mode = dice.one("mean", "mean", "sum", "lerp") if scores is not None else dice.one("mean", "sum")
    weight = given(centre_weight=dice.one(0.0, 0.25, 1.0) if mode == "lerp" else None)

    def check(result: tuple) -> None:
        options = {"mode": mode, **weight}
        a = None if scores is None else scores.double()
        merged, mass = merge_reference.merge(features.double(), a, indices, rows, **options)
        size, _ = merge_reference.merge(features.double().abs(), a, indices, rows, **options)
        working = F64 if F64 in (features.dtype, result[1].dtype) else F32
        terms, out = (2 * n + 8) * unit_roundoff(working), torch.finfo(result[0].dtype)
        within("merged", result[0], merged, terms * size + out.eps * merged.abs() + out.smallest_normal * out.eps)
        within("mass", result[1], mass, terms * mass.abs())

    arguments = {"features": features, "scores": scores, "indices": indices, "assignment": rows, "mode": mode, **weight}
    return Call("merge", arguments, check)


def merge_backward(dice: Dice) -> Call:
    indices, rows, b, n = clusters(dice)
    features = dice.numbers(b, n, dice.size(), dtype=dice.dtype(), hostile=False)
    call = call_of(features, dice.scores(b, n), indices, rows, dice.random.getrandbits(30))

    def check(result: tuple) -> None:
        assert_backward(call, "cpp")
        assert_same_bits(result, call.run("cpp"), "merge_backward again")

    return Call("merge_backward", vars(call), check, function=torch.ops.condense.merge_backward)


def gather_merge(dice: Dice) -> Call:
    b, n, k, m = dice.one(0, 1, 2), dice.size(), dice.size(24), dice.random.randint(0, 9)
    x, neighbours = dice.numbers(b, n, dice.size(), dtype=dice.dtype(), hostile=False), dice.integers(-1, n, b, k, m)
    weights = dice.numbers(b, k, m, hostile=False) if dice.chance(0.7) else None

    def check(result: tuple) -> None:
        wide = None if weights is None else weights.double()
        exact = ck.gather_merge(x.double(), neighbours, wide, backend="reference")
        size = ck.gather_merge(x.double().abs(), neighbours, None if wide is None else wide.abs(), backend="reference")
        out, eps = torch.finfo(x.dtype), unit_roundoff(F64 if x.dtype == F64 and weights is None else F32)
        within("merged", result[0], exact, (m + 2) * eps * size + out.eps * exact.abs() + out.smallest_normal * out.eps)

    return Call("gather_merge", given(x=x, neighbours=neighbours, weights=weights), check)


def attention_scores(dice: Dice) -> Call:
    b, kv, m, d = dice.one(1, 1, 2), dice.one(1, 2), dice.size(40), dice.one(3, 8, 16, 17, 64)
    n, heads, dtype = dice.size(70), kv * dice.one(1, 2), dice.dtype()
    causal = dice.chance(0.2)
    n = m if causal else n
    queries = dice.laid_out(2 * torch.randn(b, heads, m, d, generator=dice.generator).to(dtype))
    keys = dice.laid_out(torch.randn(b, kv, n, d, generator=dice.generator).to(dtype))
    options = given(
        rows=dice.one(None, dice.integers(-1, m, b, 5), dice.integers(0, m, 3)),
        mask=dice.flags(b, n) if dice.chance(0.3) else None, causal=causal, scale=dice.one(None, 0.3),
    )  # fmt: skip

    def check(result: tuple) -> None:
        exact = exact_attention(queries, keys, **options)
        within("scores", result[0], exact.scores, exact.bound)

    function = torch.ops.condense.attention_scores
    shared = ("rows",) if options.get("rows") is not None and options["rows"].dim() == 1 else ()
    return Call("attention_scores", {"queries": queries, "keys": keys, **options}, check, shared, function=function)


# Selections of other methods, which are the reference's bit for bit, given s


def dpp_select(dice: Dice) -> Call:
    b, n = dice.one(0, 1, 1, 2), dice.size(65)
    x = dice.numbers(b, n, dice.size(24), hostile=False).double()
    s = dice.laid_out((x @ x.mT).to(dice.working())) if dice.chance(0.7) else dice.numbers(b, n, n)
    return exactly(
        "dpp_select", s=s, quality=dice.scores(b, n, dtype=dice.one(F32, BF16)) if dice.chance(0.6) else None,
        k=dice.random.randint(0, n), tier=dice.integers(0, 3, b, n).to(torch.int8) if dice.chance(0.3) else None,
        candidates=dice.flags(b, n) if dice.chance(0.2) else None, damping=dice.one(0.0, 0.0, 0.5),
    )  # fmt: skip


def coverage_select(dice: Dice) -> Call:
    b, m, n = dice.one(0, 1, 1, 2), dice.size(65), dice.size(65)
    return exactly(
        "coverage_select", c=dice.numbers(b, m, n, dtype=dice.working()), k=dice.random.randint(0, n),
        weight=dice.scores(b, n) if dice.chance(0.5) else None, combine=dice.one("mul", "add"),
        candidates=dice.flags(b, n) if dice.chance(0.2) else None,
    )  # fmt: skip


def dpc_knn(dice: Dice) -> Call:
    b, n = dice.one(0, 1, 1, 2), dice.size(65)
    at = dice.numbers(b, n, 2, hostile=False).double()
    s = dice.laid_out((-torch.cdist(at, at)).to(dice.working())) if dice.chance(0.7) else dice.numbers(b, n, n)
    return exactly(
        "dpc_knn", s=s, k=dice.random.randint(1, n), k_nn=dice.random.randint(1, n), scale=dice.one(1.0, 0.5, 0.0),
        tier=dice.integers(0, 3, b, n).to(torch.int8) if dice.chance(0.3) else None,
    )  # fmt: skip


# All of it


def select_and_merge(dice: Dice) -> Call:
    n = dice.size()
    k = dice.random.randint(1, n)
    num_anchors = dice.random.randint(0, k)
    inputs = make_inputs(
        dice.one(*KINDS), batch=dice.one(1, 1, 2, 3), num_tokens=n, channels=dice.size(), num_anchors=num_anchors,
        num_background=k - num_anchors, dtype=dice.dtype(), seed=dice.random.getrandbits(30),
    )  # fmt: skip
    names = ("features", "scores", "num_anchors", "num_background")
    arguments = {**dict(zip(names, inputs.args, strict=True)), **given(**inputs.options)}
    for name in ("features", "scores", "keys"):
        if name in arguments:
            same = arguments[name].clone()
            arguments[name] = moved if torch.equal(moved := dice.laid_out(same), same) else same
    if dice.chance(0.3):
        needed = ck.workspace_bytes(**arguments)
        arguments["workspace"] = torch.empty(needed, dtype=torch.uint8)
    shared = ("positions",) if inputs.positions is not None and inputs.positions.dim() == 2 else ()
    check = lambda result: assert_matches_reference(ck.ops.Condensed(*result), inputs, backend="cpp")  # noqa: E731
    return Call("select_and_merge", arguments, check, (*shared, "workspace"))


def select_and_merge_given_the_mean(dice: Dice) -> Call:
    """It is the stages in a row on s, which is what Inputs.run_stages are."""
    call = select_and_merge(dice)
    call.arguments.pop("workspace", None)
    call.arguments["mean_similarity"] = dice.scores(call.arguments["features"].shape[0], dtype=F32).contiguous()
    options = {name: value for name, value in call.arguments.items() if name in ("grid", "positions", "spatial_weight")}

    def check(result: tuple) -> None:
        a = call.arguments
        keys = a.get("keys", a["features"])
        s = ck.similarity(keys, a["scores"], a.get("mask"))[0]
        g, tier = ck.global_similarity(keys, a["scores"], a.get("mask"))
        sbar = a["mean_similarity"].to(s) if a.get("scale_prior", True) else None
        weak = a.get("suppression", 1.0), a.get("background_suppression", a.get("suppression", 1.0))
        anchors = ck.greedy_select(s, a["scores"], a["num_anchors"], sbar=sbar, tier=tier, suppression=weak[0])
        rest = tier.scatter(1, anchors, 3)
        background = ck.greedy_select(s, g, a["num_background"], sbar=sbar, tier=rest, suppression=weak[1])
        indices = torch.cat([anchors, background], dim=1).sort(dim=1).values
        assignment = ck.assign(s, indices, tier=tier, **options)
        merged, mass = ck.merge(a["features"], a["scores"], indices, assignment)
        assert_same_bits(result, (merged, indices, assignment, mass), "given the mean")

    call.check = check
    return call
