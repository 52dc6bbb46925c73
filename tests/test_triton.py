"""The Triton kernels in Triton's interpreter: what the tests through the public functions do not reach.

Picks are compared bit for bit, given the same s; the fused launches with the stages in a row, bit for bit.
"""

import dataclasses
import itertools

import pytest
import torch

from condense_kernels._dispatch import backends
from condense_kernels.ops.select_and_merge.pipeline import Stages, compose

if not backends.triton_interprets():
    pytest.skip("these run in the interpreter; tests/test_gpu.py runs the kernels on a GPU", allow_module_level=True)

from condense_kernels._triton.tables import FusedConfig, StreamConfig, trying
from condense_kernels.ops.assign import kernel as assign
from condense_kernels.ops.assign import reference as assign_reference
from condense_kernels.ops.greedy_select import kernel as greedy_select
from condense_kernels.ops.greedy_select import reference as greedy_reference
from condense_kernels.ops.greedy_select import turns
from condense_kernels.ops.merge import kernel as merge
from condense_kernels.ops.select_and_merge import kernel as select_and_merge
from condense_kernels.ops.similarity import kernel as similarity
from condense_kernels.ops.similarity import reference as similarity_reference
from condense_kernels.testing import KINDS, Inputs, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's; they are meant to be
NAN, INF = float("nan"), float("inf")
STAGES = compose(
    Stages(
        similarity.similarity, similarity.global_similarity_of, greedy_select.greedy_select, assign.assign, merge.merge
    )
)


def assert_same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def cosines(kind: str, batch: int, n: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "halves":  # many exact ties, negative values and zeros
        s = torch.randint(-2, 3, (batch, n, n), generator=generator) / 2
    else:
        s = torch.randn(batch, n, n, generator=generator) / 3
    s = torch.maximum(s, s.mT)
    if kind == "broken":
        s[torch.rand(s.shape, generator=generator) < 0.2] = NAN
        s[torch.rand(s.shape, generator=generator) < 0.1] = -INF
        s[s.abs() < 0.1] = -0.0
    return s


def priors(kind: str, batch: int, n: int, generator: torch.Generator) -> torch.Tensor:
    random = torch.rand(batch, n, generator=generator)
    if kind == "broken":
        special = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 3e38, -3e38, 1e-45])
        return torch.where(random < 0.6, special[(random * 1000).long() % len(special)], random - 0.3)
    return {
        "random": random,
        "signed": torch.round(random * 4) / 2 - 1,
        "zero": random * -0.0,
        "subnormal": random * 1e-42,
        "huge": random * 3e38,
    }[kind]


@pytest.mark.parametrize("suppression", [0.0, 0.7, 3e38])
@pytest.mark.parametrize("prior", ["random", "signed", "zero", "subnormal", "huge", "broken"])
@pytest.mark.parametrize("kind", ["random", "halves", "broken"])
def test_picks_are_those_of_the_reference(kind, prior, suppression):
    generator = torch.Generator().manual_seed(len(kind) + 10 * len(prior))
    for n in (1, 5, 16, 17):  # a power of two and its neighbour among them
        s, p = cosines(kind, 2, n, generator), priors(prior, 2, n, generator)
        tier = torch.randint(0, 5, (2, n), generator=generator).clamp(max=3).to(torch.int8)
        sbar = torch.rand(2, generator=generator)
        for k, options in ((n, {}), ((n + 1) // 2, {"sbar": sbar}), (n, {"sbar": sbar, "tier": tier})):
            actual = greedy_select.greedy_select(s, p, k, **options, suppression=suppression)
            expected = greedy_reference.greedy_select(s, p, k, **options, suppression=suppression)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("n", [64, 65, 100, 128, 129, 256, 257, 576, 577, 1024, 1025], ids=lambda n: f"N={n}")
def test_picks_of_chunks(n):
    """Chunks that the image fills, that it ends in and behind its end; and chunks across warps."""
    generator = torch.Generator().manual_seed(n)
    s, p = cosines("halves", 1, n, generator), priors("signed", 1, n, generator)
    assert torch.equal(greedy_select.greedy_select(s, p, 40), greedy_reference.greedy_select(s, p, 40))


@pytest.mark.parametrize("n", [1, 63, 64, 127, 129, 300, 1025], ids=lambda n: f"N={n}")
def test_picks_read_rows_of_s_alone(n, bounded):
    """The last row first, behind which there is nothing."""
    s, p = torch.zeros(1, n, n), torch.arange(float(n))[None]
    k = min(n, 3)
    assert greedy_select.greedy_select(s, p, k).tolist() == [list(range(n - 1, n - 1 - k, -1))]


def test_any_strides():
    generator = torch.Generator().manual_seed(0)
    s = cosines("random", 3, 9, generator)
    p = priors("random", 3, 9, generator)
    tier = torch.randint(0, 4, (3, 9), generator=generator).to(torch.int8)
    sbar = torch.rand(3, generator=generator)

    def strange(x):  # the batch innermost, every second element of it
        return x.movedim(0, -1).repeat_interleave(2, dim=-1)[..., ::2].movedim(-1, 0)

    expected = greedy_select.greedy_select(s, p, 9, sbar=sbar, tier=tier)
    actual = greedy_select.greedy_select(strange(s), strange(p), 9, sbar=strange(sbar), tier=strange(tier))
    assert torch.equal(actual, expected)
    positions = torch.rand(3, 9, 2, generator=generator)
    expected = assign.assign(s, expected[:, :4], tier=tier, positions=positions)
    actual = assign.assign(strange(s), strange(actual[:, :4]), tier=strange(tier), positions=strange(positions))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize(
    "where",
    [
        {"grid": "row"},
        {"grid": "column"},
        {"positions": torch.float32, "axes": 1},
        {"positions": torch.float16, "axes": 2},
        {"positions": torch.uint8, "axes": 3},
        {"positions": torch.int64, "axes": 5},
        {"positions": torch.float64, "axes": 2, "scale": 1e-30},
        {"positions": torch.float32, "axes": 2, "scale": 1e37},
        {},
    ],
    ids=str,
)
def test_assignment_is_that_of_the_reference(where, n):
    generator = torch.Generator().manual_seed(n)
    s = cosines("broken", 2, n, generator)
    tier = torch.randint(0, 3, (2, n), generator=generator).to(torch.int8)
    indices = torch.randint(-1, n, (2, (n + 1) // 2), generator=generator)  # absent and repeated rows among them
    options = {"spatial_weight": 0.0 if not where else 0.7}
    if "grid" in where:
        options["grid"] = (1, n) if where["grid"] == "row" else (n, 1)
    if "positions" in where:
        positions = torch.randint(0, 9, (2, n, where["axes"]), generator=generator) * where.get("scale", 1)
        options["positions"] = positions.to(where["positions"])
        if options["positions"].is_floating_point():
            options["positions"][:, n // 2] = NAN
    for tiers in (None, tier):
        expected = assign_reference.assign(s, indices, tier=tiers, **options)
        assert torch.equal(assign.assign(s, indices, tier=tiers, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_indices_out_of_range_are_harmless(dtype):
    """On a GPU values are not inspected: whatever they are, nothing outside the tensors is touched."""
    x, scores, s = torch.rand(1, 4, 3).to(dtype), torch.rand(1, 4), torch.rand(1, 4, 4)
    indices = torch.tensor([[2**40, -7, 1]])
    assignment = assign.assign(s, indices, grid=(2, 2))
    assert assignment.tolist() == [[2, 2, 2, 2]]  # the only row there is
    merged, mass = merge.merge(x, scores, indices, torch.tensor([[0, 1, 2, 2**40]]))
    assert merged[:, :2].eq(0).all() and mass[:, :2].eq(0).all()  # no token, nothing
    torch.testing.assert_close(mass[:, 2], scores[:, 2])


def test_kept_tokens_are_copied_bit_for_bit():
    payload = torch.tensor([0x7FC12345, -0x00400001, 0x00000001, -0x80000000], dtype=torch.int32).view(torch.float32)
    x = payload.expand(1, 3, 4).contiguous()  # NaN with payloads, a subnormal, -0
    indices = torch.tensor([[0, 2]])
    merged, mass = merge.merge(x, torch.tensor([[0.3, 0.0, 0.0]]), indices, torch.tensor([[0, 1, 1]]))
    assert torch.equal(merged.view(torch.int32), x[:, :2].view(torch.int32))
    torch.testing.assert_close(mass, torch.tensor([[0.3, 0.0]]))


def test_long_clusters():
    """More members than a partial sum takes, and than a block of tokens holds."""
    n = 1100
    x, scores = torch.rand(1, n, 2), torch.rand(1, n)
    merged, mass = merge.merge(x, scores, torch.tensor([[0, 1]]), (torch.arange(n) % 2)[None])
    expected = torch.stack([(scores[0, i::2, None] * x[0, i::2]).sum(0) / scores[0, i::2].sum() for i in (0, 1)])
    torch.testing.assert_close(merged[0], expected)
    torch.testing.assert_close(mass[0], torch.stack([scores[0, i::2].sum() for i in (0, 1)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130])
def test_similarity(n, dtype):
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(2, n, 70, generator=generator).to(dtype)
    keys[:, n // 2] = keys[:, 0]
    if dtype != torch.float16:  # squares that fp32 cannot hold
        keys[0, ::3] *= 2.0**100
        keys[0, 1::3] *= 2.0**-110
    mask = torch.rand(2, n, generator=generator) < 0.8
    scores = torch.rand(2, n, generator=generator)
    scores[:, -1] = INF
    s, sbar, g, tier = similarity.similarity(keys, scores, mask)
    expected = similarity_reference.similarity(keys, scores, mask)
    for actual, value, bound in zip((s, sbar, g), expected, (1e-6, 1e-6, 1e-6 * n), strict=False):
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=bound)
    assert torch.equal(tier, expected[3]) and torch.equal(s, s.mT)


def test_a_power_of_two_changes_no_bit():
    keys = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(0))
    expected = similarity.similarity(keys)
    for exponent in (-90, -20, 20, 100):  # scaled in the kernel, not scaled, scaled
        assert_same_bits(similarity.similarity(keys * 2.0**exponent), expected)


def flagship_inputs(n: int, dtype: torch.dtype, layout: str) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(2, n, 24, generator=generator).to(dtype)
    if layout == "permuted":
        features = features.mT.contiguous().mT
    scores = torch.rand(2, n, generator=generator)
    if n > 4:
        features[0, 1, 0] = NAN
        scores[1, 2] = INF
    options = {
        "grid": {"grid": (1, n)},
        "permuted": {"positions": torch.rand(n, 2, generator=generator)},
        "masked": {"grid": (1, 1, n), "mask": torch.arange(n).expand(2, n) % 3 == 0},  # fewer valid than kept
    }[layout]
    kept = max(n // 2, 1)
    return (features, scores, kept - kept // 3, kept // 3), options


@pytest.mark.parametrize("layout", ["grid", "permuted", "masked"])
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (1, torch.float32),
        (2, torch.bfloat16),
        (7, torch.float16),
        (64, torch.float32),
        (69, torch.bfloat16),
        (130, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_select", [False, True], ids=["assign apart", "assign in select"])
def test_flagship_is_its_stages_in_a_row(n, dtype, layout, in_select):
    args, options = flagship_inputs(n, dtype, layout)
    with trying(FusedConfig, assign_in_select=in_select):
        result = select_and_merge.select_and_merge(*args, **options)
    assert_same_bits(result, STAGES(*args, **options))
    alone = {name: value[1:] if name == "mask" else value for name, value in options.items()}
    image = select_and_merge.select_and_merge(args[0][1:], args[1][1:], *args[2:], **alone)
    assert_same_bits([x[1:] for x in result], image)


def run(inputs: Inputs, **options):
    return select_and_merge.select_and_merge(*inputs.args, **inputs.options, **options)


def assert_streamed_is_stored(inputs: Inputs):
    """With turns to spare, and with as few as can do: then they have several rounds of candidates."""
    expected = run(inputs)
    for spare_turns in (StreamConfig.spare_turns, 0):
        with trying(FusedConfig, store_s=False), trying(StreamConfig, spare_turns=spare_turns):
            assert_same_bits(run(inputs), expected)


@pytest.mark.parametrize("choice", [{"store_s": False}, {"assign_in_select": True}], ids=str)
def test_top_k_of_zero_keys_on_every_path(choice):
    """Nothing is similar, so nothing could be scaled: without suppression the scores decide, then the index."""
    scores = torch.arange(70).roll(30).float()[None] // 2  # in pairs
    inputs = make_inputs("random", batch=1, num_tokens=70, channels=8, num_anchors=5, num_background=3)
    inputs = dataclasses.replace(inputs, keys=torch.zeros(1, 70, 8), scores=scores, suppression=0.0)
    with trying(FusedConfig, **choice):
        indices = run(inputs)[1]
    best = scores[0].sort(descending=True, stable=True).indices[:5].tolist()
    rest = [i for i in range(70) if i not in best][:3]
    assert indices[0].tolist() == sorted(best + rest)


DTYPES = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, DTYPES, strict=False)), ids=str)
def test_without_s_stored_the_bits_are_the_same(kind, dtype):
    assert_streamed_is_stored(
        make_inputs(kind, batch=1, num_tokens=100, channels=24, num_anchors=9, num_background=5, dtype=dtype)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"num_anchors": 0, "num_background": 12},
        {"num_anchors": 12, "num_background": 0},
        {"num_anchors": 0, "num_background": 1},
        {"num_anchors": 50, "num_background": 20},  # K = N
        {"suppression": 0.0},
        {"suppression": 3e38},  # suppression * m is infinite
        {"background_suppression": 3e38},
        {"mask": torch.arange(70).expand(2, 70) % 9 == 0},  # 8 valid tokens for 14 rows
        {"mask": torch.arange(70).expand(2, 70) % 35 == 0},  # fewer than anchors
        {"mask": torch.zeros(2, 70, dtype=torch.bool)},
    ],
    ids=lambda change: ", ".join(f"{key}={value if key != 'mask' else value.sum()}" for key, value in change.items()),
)
def test_without_s_stored_at_the_limits(change):
    inputs = make_inputs("negative", batch=2, num_tokens=70, channels=8, num_anchors=9, num_background=5)
    inputs.features[0, 3, 0] = NAN
    inputs.scores[1, 66] = INF
    assert_streamed_is_stored(dataclasses.replace(inputs, **change))


class Spy:
    """A kernel that tells how many tokens each of its launches picked, and leaves every block's best token behind."""

    def __init__(self, kernel):
        self.kernel, self.picked = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            names = self.kernel.arg_names
            fresh, key, best = (args[names.index(f"{name}_ptr")] for name in ("fresh", "key", "best"))
            self.picked.append(int(fresh[0]))
            keys = torch.nn.functional.pad(key, (0, -len(key) % 64), value=2**31 - 1).long()
            places = (keys << 32) | torch.arange(len(keys))
            assert torch.equal(best, places.view(-1, 64).amin(1))

        return launch


def test_without_s_stored_batches_of_one_pick(monkeypatch):
    """Three clusters of more equal tokens than there are candidates: each pick sinks all candidates below the rest."""
    spy = Spy(turns.pick_kernel)
    monkeypatch.setattr(turns, "pick_kernel", spy)
    n = 210
    features = torch.eye(3).repeat_interleave(70, dim=0)[None]
    scores = torch.linspace(1.0, 0.9, 3).repeat_interleave(70)[None]
    assert_streamed_is_stored(Inputs(features, scores, 3, 0, grid=(1, n)))
    assert spy.picked == [1, 1, 2]  # every turn that is launched is needed; in the last, rounds of candidates


def test_without_s_stored_batches_are_full_where_they_can_be(monkeypatch):
    """Equal tokens: every pick leaves all others alike, the lowest index is next, 64 at a time."""
    spy = Spy(turns.pick_kernel)
    monkeypatch.setattr(turns, "pick_kernel", spy)
    inputs = make_inputs("ties", batch=1, num_tokens=140, channels=8, num_anchors=70, num_background=0)
    assert_streamed_is_stored(inputs)
    assert spy.picked == [64, 5, *[0] * 16, 64, 5]


@pytest.mark.parametrize("spare_turns", [0, 1, 5])
def test_without_s_stored_turns_suffice(spare_turns, monkeypatch):
    """A turn ends early only where 64 picks in each of those that are left are enough."""
    spy = Spy(turns.pick_kernel)
    monkeypatch.setattr(turns, "pick_kernel", spy)
    inputs = make_inputs("random", batch=1, num_tokens=300, channels=8, num_anchors=150, num_background=0)
    expected = run(inputs)
    with trying(FusedConfig, store_s=False), trying(StreamConfig, spare_turns=spare_turns):
        assert_same_bits(run(inputs), expected)
    assert len(spy.picked) == 3 + spare_turns and sum(spy.picked) == 149
    assert spy.picked[0] < 64  # as the candidates have it


@pytest.mark.parametrize("store_s", [True, False], ids=["stored", "streamed"])
def test_memory_of_the_caller(store_s, monkeypatch):
    """Results and workspace given: nothing is allocated, and nothing around the workspace is touched."""
    inputs = make_inputs("masked", batch=2, num_tokens=70, channels=8, num_anchors=5, num_background=3)
    expected = run(inputs)
    out = tuple(torch.empty_like(x) for x in expected)
    with trying(FusedConfig, store_s=store_s):
        needed = select_and_merge.workspace_bytes(2, 70, 8, 8, torch.float32)
        memory = torch.full((needed + 512,), 77, dtype=torch.uint8)

        empty = torch.Tensor.new_empty

        def refuse(*size, **_):
            pytest.fail(f"allocates {size}")

        def nothing(x, *size, **options):
            return empty(x, 0, **options) if size == (0,) else refuse(*size)  # as the interpreter does for itself

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", refuse)
            patch.setattr(torch, "zeros", refuse)
            patch.setattr(torch.Tensor, "new_empty", nothing)
            result = run(inputs, out=out, workspace=memory[256:-256])
        assert all(x is y for x, y in zip(result, out, strict=True))
        assert_same_bits(result, expected)
        assert memory[:256].eq(77).all() and memory[-256:].eq(77).all()
        with pytest.raises(ValueError, match=rf"workspace: .* at least {needed} bytes, got {needed - 1}\. Remedy"):
            run(inputs, out=out, workspace=memory[: needed - 1])


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (torch.empty(10**6), r"1-D uint8 tensor, got torch.float32 .*Remedy"),
        (torch.empty(10**6, dtype=torch.uint8)[::2], r"contiguous .* strides \(2,\)\. Remedy"),
        (
            torch.empty(10**6, dtype=torch.uint8, device="meta"),
            r"tensor on cpu, like features, got one on meta\. Remedy",
        ),
        (torch.empty(10**6, dtype=torch.uint8)[1:], r"aligned to 16 bytes, got one 1 past\. Remedy"),
    ],
    ids=["dtype", "strides", "device", "alignment"],
)
def test_a_workspace_of_another_kind_is_refused_with_the_remedy(workspace, message):
    inputs = make_inputs("random", batch=1, num_tokens=9, channels=4, num_anchors=1, num_background=1)
    with pytest.raises(ValueError, match="workspace: expected .*" + message):
        run(inputs, workspace=workspace)


def test_workspace_of_long_inputs_is_linear_in_n():
    def per_token(n):
        return select_and_merge.workspace_bytes(1, n, 64, 1024, torch.bfloat16) / n

    assert per_token(16384) > 4 * 16384  # s
    assert per_token(16385) < 310 and per_token(2**19) < 310


@pytest.mark.parametrize("argument", ["features", "scores", "keys"])
def test_float64_is_refused_with_the_remedy(argument):
    inputs = {"features": torch.rand(1, 4, 2), "scores": torch.rand(1, 4), "keys": torch.rand(1, 4, 2)}
    inputs[argument] = inputs[argument].double()
    with pytest.raises(ValueError, match=rf"{argument}: .*float64.*Remedy.*CPU"):
        select_and_merge.select_and_merge(
            inputs["features"], inputs["scores"], 1, 1, keys=inputs["keys"], spatial_weight=0
        )


def test_too_many_tokens_are_refused_with_the_remedy():
    s = torch.zeros(1, 1, 1).expand(1, 16385, 16385)
    with pytest.raises(ValueError, match=r"N: expected at most 16384 .*got 16385\. Remedy: select_and_merge"):
        greedy_select.greedy_select(s, s[0, :1], 1)


def test_empty_batches_launch_nothing():
    x, scores = torch.empty(0, 4, 3), torch.empty(0, 4)
    merged, indices, assignment, mass = select_and_merge.select_and_merge(x, scores, 2, 1, grid=(2, 2))
    assert [*map(list, (merged.shape, indices.shape, assignment.shape, mass.shape))] == [
        [0, 3, 3], [0, 3], [0, 4], [0, 3],
    ]  # fmt: skip


def test_no_rows():
    s, none = torch.rand(2, 4, 4), torch.empty(2, 0, dtype=torch.int64)
    assert greedy_select.greedy_select(s, s[0, :2], 0).shape == (2, 0)
    assert assign.assign(s, none, grid=(2, 2)).eq(-1).all()
    assert merge.merge(s, s[0, :2], none, none.new_full((2, 4), -1))[0].shape == (2, 0, 4)
