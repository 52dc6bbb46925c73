"""The mean similarity given, in the Triton kernels: the paths with and without s, packed batches, and the sum of unit
keys. tests/test_mean_similarity.py holds the public functions to the reference."""

import dataclasses

import pytest
import torch

from condense_kernels._dispatch import backends

if not backends.triton_interprets():
    pytest.skip("these run in the interpreter; tests/test_gpu.py runs the kernels on a GPU", allow_module_level=True)

from condense_kernels._triton.launcher import Packed, collecting
from condense_kernels._triton.tables import FusedConfig, Grouping, SimilarityConfig, StreamConfig, UnitSumConfig, trying
from condense_kernels.ops.select_and_merge.kernel import select_and_merge, workspace_bytes
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.ops.select_and_merge_varlen.reference import for_each_segment
from condense_kernels.ops.similarity.kernel import global_similarity_of, similarity
from condense_kernels.ops.similarity.reference import global_similarity, units
from condense_kernels.ops.similarity.unit_sum import launch_global_similarity
from condense_kernels.testing import Inputs, PackedInputs, assert_same_bits, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's; they are meant to be
MEANS = torch.tensor([0.1, 9.0, 0.4, 0.2, 0.3])
STREAMED = {"store_s": False}


def run(inputs: Inputs, **options):
    return select_and_merge(*inputs.args, **inputs.options, **options)


def given(inputs: Inputs, **changes) -> Inputs:
    return dataclasses.replace(inputs, mean_similarity=MEANS[: len(inputs.scores)], **changes)


def launches_of(launcher, *args, **options) -> list[str]:
    names = []
    with collecting(lambda kernel, args, options: names.append(kernel.__name__)):
        launcher(*args, **options)
    return names


# Without s


CASES = [
    ("nan", torch.float32),
    ("magnitudes", torch.bfloat16),
    ("masked", torch.float16),
    ("unscaled", torch.float32),
]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_without_s_stored_the_bits_are_the_same(kind, dtype):
    """Rounds of candidates as well; channels that fill no step, and several of them."""
    channels = 24 if dtype == torch.float32 else 100
    counts = {"num_tokens": 70, "channels": channels, "num_anchors": 9, "num_background": 5}
    inputs = given(make_inputs(kind, batch=2, dtype=dtype, **counts))
    expected = run(inputs)
    with trying(FusedConfig, **STREAMED), trying(StreamConfig, spare_turns=0):
        assert_same_bits(run(inputs), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_anchors": 0},
        {"num_background": 0},
        {"suppression": 0.0},
        {"background_suppression": 0.0},
        {"mean_similarity": torch.tensor([float("nan"), float("inf")])},
        {"mean_similarity": torch.tensor([[0.1, 7.0], [9.0, 7.0]], dtype=torch.float64)[:, 0]},
        {"mean_similarity": torch.full((2,), 1e-46, dtype=torch.float64), "scores": torch.eye(70)[50:52]},
    ],
    ids=["no anchors", "no background", "not suppressed", "background not", "no numbers", "strided fp64", "0 in fp32"],
)
def test_without_s_stored_at_the_limits(changes):
    inputs = make_inputs("clustered", batch=2, num_tokens=70, channels=8, num_anchors=6, num_background=4)
    inputs = dataclasses.replace(given(inputs), **changes)
    expected = run(inputs)
    with trying(FusedConfig, **STREAMED):
        assert_same_bits(run(inputs), expected)
    as_fp32 = dataclasses.replace(inputs, mean_similarity=inputs.mean_similarity.float().contiguous())
    assert_same_bits(run(as_fp32), expected)


@pytest.mark.parametrize("choice", [{"store_s": True}, STREAMED], ids=["stored", "streamed"])
def test_no_mean_is_computed(choice):
    """Nothing is launched for it; without s, no tile of all tokens is."""
    inputs = given(make_inputs("random", batch=2, num_tokens=70, channels=8))
    with trying(FusedConfig, **choice):
        names = launches_of(run, inputs)
    assert names[:2] == ["unit_sum_kernel", "global_similarity_kernel"]
    assert names.count("similarity_tile_kernel") == choice["store_s"]
    if choice["store_s"]:
        assert names[2:] == ["similarity_tile_kernel", "select_kernel", "assign_kernel", "merge_kernel"]


@pytest.mark.parametrize("choice", [{"store_s": True}, STREAMED], ids=["stored", "streamed"])
def test_memory_of_the_caller(choice):
    """In as many bytes as are stated, whatever they held."""
    inputs = given(make_inputs("masked", batch=2, num_tokens=70, channels=8, num_anchors=5, num_background=3))
    expected = run(inputs)
    with trying(FusedConfig, **choice):
        needed = workspace_bytes(2, 70, 8, 8, torch.float32, given=True)
        memory = torch.full((needed + 512,), 77, dtype=torch.uint8)
        assert_same_bits(run(inputs, workspace=memory[256:-256]), expected)
        assert memory[:256].eq(77).all() and memory[-256:].eq(77).all()
        with pytest.raises(ValueError, match=f"workspace: .* at least {needed} bytes, got {needed - 1}"):
            run(inputs, workspace=memory[: needed - 1])


def test_workspace_is_linear_in_n_beyond_what_is_stored():
    """The sum of unit keys takes 8 bytes a channel and image."""
    for n in (16385, 2**19):
        assert workspace_bytes(1, n, 64, 1024, torch.bfloat16, given=True) < 310 * n + 8 * 1024
    exact, mean = (workspace_bytes(8, 576, 64, 1024, torch.bfloat16, given) for given in (False, True))
    assert mean < exact  # no sums of tiles


# Packed batches


def offsets(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


class Batch(PackedInputs):
    """A call of the launcher itself."""

    def run(self):
        return select_and_merge_varlen(**vars(self))

    def segment_by_segment(self):
        return for_each_segment(select_and_merge)(**vars(self))


def batch_of(kind: str) -> Batch:
    """Of one block, of none, of more than one; each with another mean."""
    inputs = make_inputs(kind, batch=1, num_tokens=80, channels=12)
    lengths, anchors, background = offsets(5, 0, 70, 3, 2), offsets(2, 0, 4, 0, 2), offsets(1, 0, 2, 0, 0)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        inputs.features[0], inputs.scores[0], lengths, anchors, background, 11, 70,
        keys=None if inputs.keys is None else inputs.keys[0], positions=torch.rand(80, 2, generator=generator),
        background_suppression=inputs.background_suppression, scale_prior=inputs.scale_prior, mean_similarity=MEANS,
    )  # fmt: skip


WAYS = {"stored": {}, "in groups": {"grouping": Grouping(2, 1)}, "streamed": STREAMED}


@pytest.mark.parametrize("kind", ["nan", "two_factors"])
def test_a_packed_batch_is_its_segments(kind):
    batch = batch_of(kind)
    expected = batch.segment_by_segment()
    for way in WAYS.values():
        with trying(FusedConfig, **way):
            assert_same_bits(batch.run(), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "cu_seqlens", [[0, 70, 20, 80, 0, 80], [2**31 - 1, -(2**31), 80, 0, 70, 5], [0, 30, 30, 90, 9, 9]]
)
def test_wrong_offsets_stay_inside(cu_seqlens, way, bounded):
    batch = dataclasses.replace(batch_of("random"), cu_seqlens=torch.tensor(cu_seqlens).int())
    with trying(FusedConfig, **WAYS[way]):
        batch.run()


# The sum of unit keys


def sums_of(keys, packed=None, config=None) -> torch.Tensor:
    """Through the launch, as numbers."""
    tokens, images = keys.shape[:-1], len(keys) if packed is None else packed.num_segments
    tier = torch.empty(tokens, dtype=torch.int32)
    scale, inverse, g = (torch.empty(tokens) for _ in range(3))
    sums = torch.empty(images, keys.shape[-1], dtype=torch.int64)
    with trying(UnitSumConfig, **(config or {})):
        launch_global_similarity(keys, None, None, tier, scale, inverse, sums, g, packed)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unit_keys_are_rounded_to_the_nearest(dtype):
    """Half a 2**24th a key at most, and the norm's error; cut off, those of equal keys would be off by up to one."""
    for keys in (
        torch.randn(1, 200, 70),
        torch.rand(1, 1, 70).expand(1, 200, 70),
        -torch.rand(1, 1, 70).expand(1, 200, 70),
    ):
        keys = keys.to(dtype)
        exact = units(keys[0].double())
        error = (sums_of(keys)[0] / 2**24 - exact.sum(dim=0)).abs()
        assert (error <= 200 * 2.0**-25 + exact.abs().sum(dim=0) * 4 * 2.0**-24).all()


@pytest.mark.parametrize("config", [{"block": 16}, {"block": 64, "num_warps": 2}, {"num_stages": 1}], ids=str)
def test_the_sum_has_no_order(config):
    """Programs, and tokens, may come in any."""
    keys = torch.randn(2, 133, 40)
    keys[0, 5] *= 1e30
    expected = sums_of(keys)
    assert torch.equal(sums_of(keys, config=config), expected)
    assert torch.equal(sums_of(keys[:, torch.randperm(133)]), expected)
    lengths = offsets(133, 0, 133)
    packed = Packed.kept(lengths, None, 266, 0, 133)
    assert torch.equal(sums_of(keys.flatten(0, 1), packed, config)[[0, 2]], expected)


def test_equal_keys_have_equal_g():
    keys = torch.randn(2, 100, 70)
    keys[:, 77] = keys[:, 3]
    g, _ = global_similarity_of(keys)
    assert torch.equal(g[:, 77], g[:, 3])


@pytest.mark.parametrize("n", [1, 31, 33])
def test_reads_and_writes_what_is_there(n, bounded):
    keys, mask = torch.randn(2, n, 33).half(), torch.arange(n).expand(2, n) % 3 != 1
    g, tier = global_similarity_of(keys, torch.rand(2, n), mask)
    expected, tiers = global_similarity(keys, None, mask)
    assert torch.equal(tier, tiers) and (g - expected).abs().max() < n * 1e-5


def test_the_error_is_that_of_sums_of_cosines():
    """On a par, and bounded by a few roundings of g where all tokens are alike."""
    keys = torch.randn(1, 1, 256) + 0.5 * torch.randn(1, 150, 256)
    exact = global_similarity(keys)[0]
    errors = [(x - exact).abs().max() for x in (global_similarity_of(keys)[0], similarity(keys)[2])]
    assert errors[0] <= 2 * errors[1] and errors[0] <= 8 * 2.0**-24 * exact.abs().max()


def test_blocks_divide_those_that_packed_batches_number():
    assert SimilarityConfig.block % UnitSumConfig.for_shape().block == 0
