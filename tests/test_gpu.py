"""The Triton kernels compiled and run: what the interpreter cannot show. Skipped where there is no GPU."""

import dataclasses

import pytest
import torch

from condense_kernels import Condensed, similarity
from condense_kernels.testing import KINDS, assert_matches_reference, assert_same_bits, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [30, 130])
def test_every_kind_of_input(tokens, kind, dtype):
    inputs = make_inputs(kind, num_tokens=tokens, channels=72, dtype=dtype, device="cuda")
    assert_matches_reference(inputs.run(), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "kept"), [(1, (1, 0)), (576, (144, 48)), (729, (54, 18)), (2880, (240, 80))])
def test_sizes_of_real_models(tokens, kept, dtype):
    inputs = make_inputs(
        "clustered", batch=1, num_tokens=tokens, channels=1024, num_anchors=kept[0], num_background=kept[1], dtype=dtype
    ).to("cuda")
    assert_matches_reference(inputs.run(), inputs)


@pytest.mark.parametrize("kind", ["parallel", "masked", "positions"])
def test_an_image_alone_is_the_image_in_a_batch(kind):
    inputs = make_inputs(kind, batch=9, num_tokens=158, channels=952, device="cuda")
    together = inputs.run()
    for b in range(9):
        assert_same_bits(inputs.image(b).run(), Condensed(*(t[b : b + 1] for t in together)), f"image {b}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    inputs = make_inputs("clustered", batch=4, num_tokens=576, channels=256, dtype=dtype, device="cuda")
    first = inputs.run()
    for _ in range(20):
        assert_same_bits(inputs.run(), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarities_are_symmetric_and_equal_tokens_alike(dtype):
    """To the bit: rests on the matrix units treating swapped operands alike."""
    keys = make_inputs("clustered", batch=2, num_tokens=300, channels=200, dtype=dtype, device="cuda").features
    places = [0, 1, 63, 64, 130, 299]
    keys[:, places] = keys[:, 5:6].clone()
    s = similarity(keys)[0]
    assert torch.equal(s, s.mT)
    for i in places:
        assert torch.equal(s[:, i], s[:, 5])


def test_nothing_waits_for_the_device():
    inputs = make_inputs("masked", num_tokens=100, device="cuda")
    inputs.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.run()
        inputs.run_stages()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_from_a_graph_on_new_values():
    inputs, other = (make_inputs("random", num_tokens=100, device="cuda", seed=seed) for seed in (0, 1))
    expected = other.run()
    inputs.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = inputs.run()
    inputs.features.copy_(other.features)
    inputs.scores.copy_(other.scores)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(result, expected)


def test_runs_on_the_current_stream():
    inputs = make_inputs("random", num_tokens=100, device="cuda")
    expected = inputs.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = inputs.run()
    stream.synchronize()
    assert_same_bits(result, expected)


@pytest.mark.parametrize("assign_in_select", [False, True])
def test_launches(assign_in_select, monkeypatch):
    """Similarity, selection, merge; and the assignment, in the selection's launch or in one of its own."""
    from condense_kernels.select_and_merge.kernel import FusedConfig

    for_shape = FusedConfig.for_shape
    monkeypatch.setattr(
        FusedConfig, "for_shape", lambda n: dataclasses.replace(for_shape(n), assign_in_select=assign_in_select)
    )
    inputs = make_inputs("random", num_tokens=576, channels=64, device="cuda")
    inputs.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        inputs.run()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == (3 if assign_in_select else 4), kernels


def test_autocast_and_matmul_precision():
    inputs = make_inputs("clustered", num_tokens=200, channels=512, device="cuda")
    expected = inputs.run()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert_same_bits(inputs.run(), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
