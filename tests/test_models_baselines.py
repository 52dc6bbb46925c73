"""The baselines of condense_kernels.models: what each keeps, told by a loop or by hand."""

import pytest
import torch

from condense_kernels.models import baselines
from condense_kernels.models.methods import BASELINES, Condenser

GRID, N, D = (4, 6), 24, 5


def some(b: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(b, N, D), torch.rand(b, N)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("keep", [1, 6, N])
def test_a_baseline_keeps_distinct_tokens_in_order(name, keep):
    features, scores = some()
    for b, one in enumerate(Condenser(name)(list(features), list(scores), [keep] * 2, [GRID] * 2)):
        assert one.merged.shape == (keep, D) and one.indices.shape == (keep,)
        assert torch.equal(one.indices, one.indices.unique())
        assert torch.equal(one.assignment[one.indices], torch.arange(keep))
        for k in range(keep):
            cluster = one.assignment == k
            torch.testing.assert_close(one.mass[k], scores[b, cluster].sum())
        assert "merge" in name or name == "pooling" or torch.equal(one.merged, features[b, one.indices])


def test_topk_has_the_highest_scores():
    features, scores = some()
    best = scores.argsort(dim=1, descending=True)[:, :5].sort().values
    assert torch.equal(baselines.topk(features, scores, 5, GRID).indices, best)
    merged = baselines.topk_merge(features, scores, 5, GRID)
    assert torch.equal(merged.indices, best) and (merged.assignment >= 0).all()


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_flow_through_a_baseline(name):
    features, scores = some(1)
    merged = Condenser(name).batch(features.requires_grad_(), scores.requires_grad_(), 6, GRID).merged
    merged.sum().backward()
    torch.testing.assert_close(features.grad.sum(), torch.tensor(6.0 * D))


def test_maxmin_is_the_farthest_from_those_kept_each_time():
    features, scores = some(1)
    z = torch.nn.functional.normalize(features[0].double(), dim=1)
    distance = 1 - z @ z.T
    nearest = [min(distance[i, j] for j in range(N) if j != i) for i in range(N)]
    kept = [max(range(N), key=nearest.__getitem__)]
    while len(kept) < 7:
        rest = [i for i in range(N) if i not in kept]
        kept.append(max(rest, key=lambda i: min(distance[i, j] for j in kept)))
    assert baselines.maxmin(features, scores, 7, GRID).indices[0].tolist() == sorted(kept)


def test_pooling_is_the_mean_of_blocks_and_uniform_their_middles():
    features, scores = some()
    pooled = baselines.pooling(features, scores, 6, GRID)  # 2 x 3 blocks of 2 x 2
    image = features.transpose(1, 2).view(2, D, *GRID)
    expected = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled.merged, expected)
    assert torch.equal(pooled.indices, baselines.uniform(features, scores, 6, GRID).indices)
    assert pooled.indices[0].tolist() == [7, 9, 11, 19, 21, 23]


def test_pooling_refuses_what_is_no_product():
    with pytest.raises(ValueError, match=r"num_tokens: expected for pooling .* at most 4 x 6, .* got 13\. Remedy"):
        baselines.pooling(*some(), 13, GRID)


def test_random_follows_torchs_generator_and_covers_all():
    features, scores = some(200)
    torch.manual_seed(1)
    first = baselines.random(features, scores, 6, GRID).indices
    torch.manual_seed(1)
    assert torch.equal(first, baselines.random_merge(features, scores, 6, GRID).indices)
    counts = first.flatten().bincount(minlength=N)  # 200 * 6 / 24 = 50 each
    assert counts.min() > 20 and counts.max() < 90
