"""Every method of condense_kernels.methods: golden vectors, and what all of them promise."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import condense_kernels as ck
import condense_kernels.methods as methods
from condense_kernels.methods import METHODS
from condense_kernels.methods.registry import CLS, NONE, TEXT

GOLDEN = Path(__file__).parent / "golden"
ALL = pytest.mark.parametrize("name", METHODS)
spec = importlib.util.spec_from_file_location("golden_write", GOLDEN / "write.py")
write = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write)


def tensors(case: dict, dtype: torch.dtype = torch.float64) -> dict:
    """The arguments of a golden case, a batch of one."""
    given = {}
    for key in ("features", "scores", *write.ARRAYS):
        if key in case:
            value = torch.from_numpy(np.array(case[key]))[None]
            given[key] = value.to(dtype) if value.is_floating_point() else value
    return given


def called(name: str, given: dict, **options):
    """A method that draws is given what is drawn."""
    given = dict(given)
    noise = given.pop("noise", None)
    if noise is None:
        return METHODS[name].call(**given, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: noise)
        return METHODS[name].call(**given, **options)


@ALL
def test_golden_vectors(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert golden["method"] == name and len(golden["cases"]) >= 4
    for case in golden["cases"]:
        found = called(name, tensors(case), keep=case["keep"], grid=case["grid"], **case["options"])
        assert found.indices[0].tolist() == case["indices"]
        assert found.assignment[0].tolist() == case["assignment"]
        torch.testing.assert_close(found.merged[0], torch.tensor(case["merged"], dtype=torch.float64))
        torch.testing.assert_close(found.mass[0].double(), torch.tensor(case["mass"], dtype=torch.float64))


@ALL
def test_golden_vectors_are_those_of_the_restatement(name):
    assert (GOLDEN / f"{name}.json").read_text() == write.text_of(name, write.restatements()[name])


def some(name: str, n: int = 24, keep: int = 6, images: int = 2, d: int = 5) -> dict:
    """Arguments of a method, fp32."""
    import numpy as np

    rng, arrays = np.random.default_rng(0), write.taken().get(name, ((), [{}]))[0]
    made = {"features": write.clustered, "scores": lambda rng, n, d: rng.random(n)}
    given = {key: np.stack([make(rng, n, d) for _ in range(images)]) for key, make in made.items()}
    given |= {a: np.stack([write.ARRAYS[a](rng, n, d, keep) for _ in range(images)]) for a in arrays}
    found = {key: torch.from_numpy(value) for key, value in given.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


@ALL
def test_an_image_alone_and_in_a_batch(name):
    given = some(name, images=3)
    together = called(name, given, keep=6, grid=write.GRID)
    for b in range(3):
        alone = called(name, {key: value[b : b + 1] for key, value in given.items()}, keep=6, grid=write.GRID)
        for x, y in zip(alone, together, strict=True):
            torch.testing.assert_close(x[0], y[b], rtol=1e-6, atol=1e-6)
        assert torch.equal(alone.indices[0], together.indices[b])


@ALL
@pytest.mark.parametrize("kind", ["equal", "zero", "zeros", "nan", "twice", "alike", "negative scores", "equal scores"])
@pytest.mark.parametrize("keep", [1, 6, 24])
def test_always_k_distinct_tokens_in_picture_order(name, kind, keep):
    given = some(name, keep=keep)
    x, scores = given["features"], given["scores"]
    {
        "equal": lambda: x.copy_(x[:, :1].expand_as(x)),
        "zero": lambda: x[:, 3].zero_(),
        "zeros": x.zero_,
        "nan": lambda: x.fill_(torch.nan),
        "twice": lambda: x[:, 12:].copy_(x[:, :12]),
        "alike": lambda: x.sign_(),
        "negative scores": scores.neg_,
        "equal scores": lambda: scores.fill_(0.25),
    }[kind]()
    found = called(name, given, keep=keep, grid=write.GRID)
    assert found.merged.shape == (2, keep, 5) and found.mass.shape == (2, keep)
    assert (found.indices.diff(dim=1) > 0).all() and found.indices.min() >= 0 and found.indices.max() < 24
    assert found.assignment.shape == (2, 24)
    rows = torch.arange(keep).expand(2, -1)
    assert torch.equal(found.assignment.gather(1, found.indices), rows)
    assert found.assignment.min() >= -1 and found.assignment.max() < keep


@ALL
def test_bf16_is_computed_in_fp32(name):
    given = some(name)
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    found = called(name, halves, keep=6, grid=write.GRID)
    widened = {key: value.float() if value.is_floating_point() else value for key, value in halves.items()}
    expected = called(name, widened, keep=6, grid=write.GRID)
    assert found.merged.dtype == torch.bfloat16
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.merged.float(), expected.merged, rtol=2e-2, atol=2e-2)


# Those whose arithmetic is exact on the tokens below, so that ties are ties in any order of summation.
EXACT = "condensevlm_attention divprune farthest_points fastervlm flashvid idpruner rediprune scope topk_merge"


@pytest.mark.parametrize("name", EXACT.split())
def test_ties_are_those_of_the_restatement(name):
    """Tokens of +-1, whose cosines are exact: many equal ones, a zero token, ties in the scores."""
    import numpy as np

    n, keep, rng = 60, 17, np.random.default_rng(0)
    for _ in range(3):
        features = rng.choice([-1.0, 1.0], size=(20, 16))[rng.integers(20, size=n)]
        features[7] = 0
        given = {"features": features, "scores": rng.integers(1, 5, size=n) / 4}
        given |= {"noise": rng.permutation(n) / n} if "noise" in write.taken().get(name, ((), []))[0] else {}
        expected = write.restatements()[name](keep=keep, **given)
        found = called(name, {key: torch.from_numpy(value)[None] for key, value in given.items()}, keep=keep)
        assert found.indices[0].tolist() == np.asarray(expected[1]).tolist()
        assert found.assignment[0].tolist() == np.asarray(expected[2]).tolist()


class Calls(TorchDispatchMode):
    """Counts what is dispatched, and refuses what makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal.default")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        assert not any(word in str(function) for word in self.WAITS), function
        return function(*args, **(kwargs or {}))


@ALL
def test_no_loop_over_tokens_and_no_host_synchronisation(name):
    counts = []
    for n, keep, grid in ((24, 6, (4, 6)), (64, 16, (8, 8))):
        given = some(name, n=n, keep=keep)
        with Calls() as calls:
            METHODS[name].call(**{k: v for k, v in given.items() if k != "noise"}, keep=keep, grid=grid)
        counts.append(calls.count)
    assert counts[0] == counts[1]


@ALL
def test_gradients_reach_the_features(name):
    given = some(name)
    given["features"].requires_grad_()
    called(name, given, keep=6, grid=write.GRID).merged.sum().backward()
    assert given["features"].grad.abs().sum() > 0


@ALL
def test_packed_images_are_those_of_a_call_each(name):
    if set(write.taken().get(name, ((), []))[0]) - {"keys"}:
        return  # what else it takes is not packed
    sizes, grids, keep = (24, 12, 24), ((4, 6), (3, 4), (4, 6)), (6, 4, 6)
    images = [some(name, n=n, images=1) for n in sizes]
    flat = {key: torch.cat([image[key][0] for image in images]) for key in images[0]}
    found = methods.packed(METHODS[name].call, keep=keep, lengths=sizes, grids=grids, **flat)
    alone = [METHODS[name].call(**given, keep=k, grid=g) for given, k, g in zip(images, keep, grids, strict=True)]
    for x, parts in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(x, torch.cat([part[0] for part in parts]), rtol=1e-6, atol=1e-6)


@ALL
def test_what_cannot_be_computed_is_refused(name):
    call, given = METHODS[name].call, {k: v for k, v in some(name).items() if k != "noise"}
    for keep, error, message in (
        (0, ValueError, "expected 1 <= keep <= 24"),
        (25, ValueError, "expected 1 <= keep <= 24"),
        (0.5, TypeError, "expected an int"),
        (None, TypeError, "expected an int"),
    ):
        with pytest.raises(error, match=message):
            call(**given, keep=keep, grid=write.GRID)
    with pytest.raises(ValueError, match="grid: expected sides whose product is 24"):
        call(**given, keep=6, grid=(5, 5))
    with pytest.raises(ValueError, match="features: expected 3 axes"):
        call(**{**given, "features": given["features"][0]}, keep=6, grid=write.GRID)
    with pytest.raises(ValueError, match=r"scores: expected shape \[B N\]"):
        call(**{**given, "scores": given["scores"][:, 1:]}, keep=6, grid=write.GRID)


@ALL
def test_nan_reaches_the_rows_that_its_token_goes_into_and_no_others(name):
    """PruMerge's neighbours are up to 32 tokens of each row: here of two."""
    options = {"neighbours": 2, "rest": False} if name == "prumerge" else {}
    given = some(name, images=1)
    given["features"][0, 7] = torch.nan
    found = called(name, given, keep=12, grid=write.GRID, **options)
    assert found.merged[0].isfinite().all(dim=1).sum() >= 6


@pytest.mark.parametrize("name", ["pooling", "uniform"])
@pytest.mark.parametrize(("grid", "keep"), [((5, 6), 20), ((5, 5), 16), ((7, 9), 48), ((12, 12), 96), ((3, 24), 46)])
def test_a_block_has_its_own_middle(name, grid, keep):
    found = METHODS[name].call(torch.rand(1, grid[0] * grid[1], 3), None, keep, grid=grid)
    assert torch.equal(found.assignment.gather(1, found.indices)[0], torch.arange(keep))
    assert (found.indices.diff() > 0).all()


@ALL
def test_options_that_are_numbers_are_checked(name):
    import inspect

    own = inspect.signature(METHODS[name].call).parameters
    given = {key: value for key, value in some(name).items() if key != "noise"}
    for option in METHODS[name].options:
        default = own[option].default
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        for bad, error, message in (("x", TypeError, "a number"), (torch.nan, ValueError, "."), (None, TypeError, ".")):
            with pytest.raises(error, match=f"{option}: expected.*{message}"):
                METHODS[name].call(**given, keep=6, grid=write.GRID, **{option: bad})


def test_cards():
    for name, card in METHODS.items():
        assert card.name == name and getattr(methods, name) is card.call
        assert card.scores in (CLS, TEXT, NONE) and card.source and card.title and card.primitive and card.cost
        assert card.call.__doc__ and 1 <= card.lines <= 25, (name, card.lines)
    assert len({card.title for card in METHODS.values()}) == len(METHODS)
    assert set(methods.ALIASES.values()) <= set(METHODS) and not set(methods.ALIASES) & set(METHODS)


def test_packed_says_what_does_not_fit():
    x, a = torch.rand(10, 4), torch.rand(10)
    with pytest.raises(ValueError, match="keep: expected one entry for each of 2 images, got 1"):
        methods.packed(methods.fastervlm, x, a, [2], [5, 5])
    with pytest.raises(ValueError, match="lengths: expected a sum of 10"):
        methods.packed(methods.fastervlm, x, a, [2, 2], [5, 6])


def test_pooling_names_the_nearest_number_that_it_takes():
    with pytest.raises(ValueError, match=r"expected for pooling .* at most 4 x 6, .* got 13\. Remedy: 12, or a"):
        methods.pooling(torch.rand(1, 24, 3), None, 13, grid=(4, 6))


def test_random_follows_a_generator_and_covers_all():
    features = torch.randn(200, 24, 5)
    first = methods.random(features, None, 6, generator=torch.Generator().manual_seed(1)).indices
    again = methods.random_merge(features, None, 6, generator=torch.Generator().manual_seed(1)).indices
    assert torch.equal(first, again)
    counts = first.flatten().bincount(minlength=24)  # 200 * 6 / 24 = 50 each
    assert counts.min() > 20 and counts.max() < 90


@pytest.mark.parametrize(
    "name", ["cdpruner", "divprune", "farthest_points", "flashvid", "idpruner", "otprune", "rediprune", "scope"]
)
def test_a_token_that_is_not_finite_is_kept_last(name):
    given = some(name)
    given["keys"][:, 5] = torch.nan
    given["scores"][:, 5] = 2.0
    assert (called(name, given, keep=23).indices != 5).all()


def test_equal_relevance_leaves_diversity_to_cdpruner():
    features = torch.randn(2, 24, 32)
    found = methods.cdpruner(features, torch.full((2, 24), 0.3), 6)
    assert torch.equal(found.indices, ck.dpp_select(keys=features, k=6).sort(dim=1).values)


def test_a_negative_score_is_none_to_scope_and_flashvid():
    given = some("scope")
    given["scores"] -= 0.5
    clamped = {**given, "scores": given["scores"].clamp(min=0)}
    for call in (
        lambda given: methods.scope(keep=6, alpha=2.0, **given),
        lambda given: methods.flashvid(keep=6, **given),
    ):
        assert torch.equal(call(given).indices, call(clamped).indices)


def test_options_that_cannot_be():
    x, a = torch.rand(1, 24, 3), torch.rand(1, 24)
    with pytest.raises(ValueError, match=r"balance: expected a number in \[0, 1\], got 1.5"):
        methods.idpruner(x, a, 6, balance=1.5)
    with pytest.raises(ValueError, match="among: expected 1 <= among <= 24"):
        methods.rediprune(x, a, 6, among=25)
    with pytest.raises(ValueError, match="text: mmtok cannot do without it"):
        methods.mmtok(x, None, 6)
    with pytest.raises(ValueError, match=r"text: expected shape \[B L D\]"):
        methods.mmtok(x, None, 6, text=torch.rand(1, 2, 4))
    with pytest.raises(TypeError, match="keep: expected an int.* OTPrune's loop breaks"):
        methods.otprune(x, None, 0.25)


def test_docs_methods_has_every_method_as_its_card_is():
    page = importlib.import_module("methods_page")
    text = page.PAGE.read_text()
    assert page.written(text) == text, f"docs/methods.md: run {page.COMMAND}"
