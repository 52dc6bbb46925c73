"""condense_kernels.metrics against loops in numpy, by hand, and against the numbers that the papers print."""

import inspect
import math
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from processes import SAFE_PATH

from condense_kernels import methods, metrics

B, N, K, D = 3, 24, 7, 5


@pytest.fixture
def chosen():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, D, generator=generator)
    indices = torch.rand(B, N, generator=generator).argsort(dim=1)[:, :K]
    return x, indices


def cosine(a, b) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_redundancy_counts_pairs(chosen):
    x, _ = chosen
    x = x + 0.7  # so that some are similar
    for threshold in (0.75, 0.3):
        expected = []
        for tokens in x.double().numpy():
            pairs = [cosine(tokens[i], tokens[j]) >= threshold for i in range(N) for j in range(i)]
            expected.append(sum(pairs) / len(pairs))
        found = metrics.redundancy(x, threshold)
        assert 0 < min(expected) < max(expected) < 1
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_redundancy_of_equal_zero_and_single_tokens():
    ones = torch.ones(1, 4, 3)
    assert metrics.redundancy(ones).tolist() == [1.0]
    assert metrics.redundancy(0 * ones).tolist() == [0.0]
    assert metrics.redundancy(ones[:, :1]).isnan().all()
    assert metrics.redundancy(ones.bfloat16()).tolist() == [1.0]
    assert metrics.redundancy(ones.double()).dtype == torch.float64


def test_position_spread_counts_places(chosen):
    _, indices = chosen
    for bins in (1, 4, 5, 24, 31):
        expected = np.zeros((B, bins))
        for b, row in enumerate(indices.tolist()):
            for i in row:
                expected[b, i * bins // N] += 1 / K
        torch.testing.assert_close(metrics.position_spread(indices, N, bins), torch.tensor(expected).float())


def test_position_bias_is_the_mean_place(chosen):
    _, indices = chosen
    expected = [np.mean([2 * i / (N - 1) - 1 for i in row]) for row in indices.tolist()]
    torch.testing.assert_close(metrics.position_bias(indices, N), torch.tensor(expected).float())
    ends = torch.tensor([[0, 1], [N - 2, N - 1], [0, N - 1]])
    assert metrics.position_bias(ends, N).tolist() == pytest.approx([-1 + 1 / (N - 1), 1 - 1 / (N - 1), 0])
    assert metrics.position_bias(ends[:1, :1], 1).tolist() == [0]


def test_under_uniform_choice_the_bias_is_zero_with_the_stated_deviation():
    n, k, draws = 60, 9, 4000
    indices = torch.rand(draws, n, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :k]
    bias, deviation = metrics.position_bias(indices, n), math.sqrt((n + 1) * (n - k) / (3 * k * (n - 1) ** 2))
    assert abs(float(bias.mean())) < 4 * deviation / math.sqrt(draws)
    assert float(bias.std()) == pytest.approx(deviation, rel=0.05)
    everything = torch.arange(n)[None]
    assert float(metrics.position_bias(everything, n)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(metrics.position_spread(everything, n, 6), torch.full((1, 6), 1 / 6))


def test_coverage_is_the_mean_of_the_nearest(chosen):
    x, indices = chosen
    expected = [
        np.mean([max(cosine(tokens[i], tokens[j]) for j in row) for i in range(N)])
        for tokens, row in zip(x.double().numpy(), indices.tolist(), strict=True)
    ]
    torch.testing.assert_close(metrics.coverage(x, indices), torch.tensor(expected).float())
    everything = torch.arange(N).expand(B, -1)
    torch.testing.assert_close(metrics.coverage(x, everything), torch.ones(B))


def test_reconstruction_error_sums_squares_and_a_dropped_token_has_its_nearest_row(chosen):
    x, indices = chosen
    merged = x.gather(1, indices[..., None].expand(-1, -1, D)) + 0.1
    assignment = torch.randint(K, (B, N), generator=torch.Generator().manual_seed(2))
    assignment[:, ::3] = -1
    expected, rows = [], []
    for tokens, kept, row in zip(*(t.numpy() for t in (x.double(), merged.double(), assignment)), strict=True):
        nearest = [int(np.argmin([np.sum((token - m) ** 2) for m in kept])) for token in tokens]
        of = [nearest[i] if a < 0 else a for i, a in enumerate(row)]
        error = sum(np.sum((token - kept[a]) ** 2) for token, a in zip(tokens, of, strict=True))
        expected.append(math.sqrt(error / np.sum(tokens**2)))
        rows.append(of)
    assert metrics.nearest_rows(x, merged, assignment).tolist() == rows
    torch.testing.assert_close(metrics.reconstruction_error(x, merged, assignment), torch.tensor(expected).float())


def test_what_loses_nothing_has_no_error(chosen):
    x, _ = chosen
    all_of = methods.random(x, None, N, generator=torch.Generator().manual_seed(0))
    assert metrics.reconstruction_error(x, all_of.merged, all_of.assignment).tolist() == [0.0] * B
    assert metrics.reconstruction_error(0 * x, 0 * all_of.merged, all_of.assignment).isnan().all()


def test_an_image_counts_alone_as_in_a_batch(chosen):
    x, indices = chosen
    for found in (metrics.redundancy, lambda t: metrics.coverage(t, indices[: len(t)])):
        torch.testing.assert_close(found(x)[:1], found(x[:1]))


# Formulas


VICUNA = metrics.Decoder(layers=32, width=4096, hidden=11008, kv_width=4096)


def by_layers(tokens: int) -> int:
    d, m = VICUNA.width, VICUNA.hidden
    return 4 * tokens * d**2 + 2 * tokens**2 * d + 2 * tokens * d * m


@pytest.mark.parametrize("layer", [0, 2, 32])
def test_flops_are_those_of_each_layer(layer):
    pruned = sum(by_layers(576 if at < layer else 64) for at in range(32))
    assert metrics.flops(VICUNA, 576) == 32 * by_layers(576)
    assert metrics.flops_pruned(VICUNA, 576, 64, layer) == pruned
    assert metrics.flops_left(VICUNA, 576, 64, layer) == pytest.approx(pruned / (32 * by_layers(576)))
    assert metrics.flops_saved(VICUNA, 576, 64, layer) == pytest.approx(1 - pruned / (32 * by_layers(576)))


def test_training_aware_compression():
    assert metrics.training_aware_ratio(2304, 576) == 4  # Qwen2-VL's
    assert metrics.token_reduction_rate(2304, 576, 192) == 12  # 4 * 3
    assert metrics.token_reduction_rate(576, 576, 64) == 9


def test_mistakes_are_named():
    x = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match=r"layer: expected 0 <= layer <= 32"):
        metrics.flops_pruned(VICUNA, 576, 64, 33)
    with pytest.raises(ValueError, match="kept: expected an int of at least 1, got 0"):
        metrics.token_reduction_rate(576, 576, 0)
    with pytest.raises(ValueError, match="num_tokens: expected an int"):
        metrics.position_bias(torch.zeros(1, 2, dtype=torch.int64), 2.5)
    with pytest.raises(TypeError, match="indices"):
        metrics.coverage(x, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="tokens"):
        metrics.redundancy(x[0])


def test_all_is_annotated_and_needs_no_transformers():
    for name, function in inspect.getmembers(metrics, inspect.isfunction):
        if function.__module__ == metrics.__name__:
            hints = typing.get_type_hints(function).keys()
            assert hints == {*inspect.signature(function).parameters, "return"}, name
    code = "import sys; sys.modules['transformers'] = None; import condense_kernels.metrics"
    subprocess.run([sys.executable, *SAFE_PATH, "-c", code], check=True, timeout=120)
