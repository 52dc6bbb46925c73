"""Options of the merging methods, and what each is known for."""

import pytest
import torch
from test_methods import write

from condense_kernels import methods

GRID = (4, 6)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("dart", "pivots", 0, "pivots: expected an int of at least 1, got 0"),
        ("dart", "pivots", 1.5, "pivots: expected an int of at least 1, got 1.5"),
        ("vlm_pruner", "pivots", -1, "pivots: expected an int of at least 1, got -1"),
        ("prumerge", "neighbours", -1, "neighbours: expected an int >= 0, got -1"),
        ("mustdrop", "window", (0, 2), r"window: expected \(rows, columns\) of at least 1, got \(0, 2\)"),
        ("mustdrop", "window", 3, r"window: expected \(rows, columns\) of at least 1, got 3"),
        ("hired", "crops", 5, r"crops: expected \(rows, columns\) of crops, both ints >= 1, got 5"),
        ("visionzip", "contextual", 7, "contextual: expected an int from 0 to 6, a part of keep, got 7"),
        ("visionzip", "contextual", 0.5, "contextual: expected an int from 0 to 6"),
    ],
)
def test_options_are_checked(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        methods.METHODS[name].call(torch.rand(1, 24, 5), torch.rand(1, 24), 6, grid=GRID, **{option: value})


def test_dart_keeps_k_where_the_published_code_keeps_more():
    found = methods.dart(torch.randn(1, 576, 8), None, 64, pivots=8)
    assert found.indices.shape == (1, 64)  # theirs: 8 + 8 * 8


def test_tome_of_tokens_in_pairs_finds_the_pairs():
    x = torch.randn(2, 8, 16).repeat_interleave(2, dim=1)  # every odd token is as the even one before it
    found = methods.tome(x, None, 8)
    torch.testing.assert_close(found.merged, x[:, ::2])
    assert torch.equal(found.assignment[0], torch.arange(8).repeat_interleave(2))
    assert torch.equal(found.mass, torch.full((2, 8), 2.0))


def test_prumerge_has_all_the_attention():
    x, scores = torch.ones(1, 24, 3), torch.rand(1, 24)
    found = methods.prumerge(x, scores, 6, neighbours=0)
    assert found.mass.sum().item() == pytest.approx(scores.sum().item())
    order = scores[0].argsort(descending=True)
    rest = found.merged[0, found.indices[0] == order[5]]
    torch.testing.assert_close(rest, scores[0, order[5:]].sum().expand(1, 3))


def test_visionzip_has_the_published_54_and_10():
    x, scores = torch.randn(1, 576, 8), torch.rand(1, 576)
    found = methods.visionzip(x, scores, 64)
    dominant = scores[0].topk(54).indices
    assert torch.isin(dominant, found.indices[0]).all()
    sizes = found.assignment[0].bincount(minlength=64)
    assert (sizes == 1).sum() >= 54 and sizes.sum() == 576
    for keep, contextual in ((29, 5), (35, 5), (192, 30)):  # to the nearest
        by_share, by_number = (
            methods.visionzip(x, scores, keep),
            methods.visionzip(x, scores, keep, contextual=contextual),
        )
        assert torch.equal(by_share.assignment, by_number.assignment)


def test_vlm_pruner_grows_outwards_where_tokens_are_alike():
    """Of tokens that are all alike, the near ones come first."""
    x = torch.ones(1, 24, 4) + 1e-3 * torch.randn(1, 24, 4)
    found = methods.vlm_pruner(x, None, 4, grid=GRID, pivots=1, buffering=4.0)
    at = torch.stack([found.indices[0] // 6, found.indices[0] % 6]).float()
    assert (at.max(dim=1).values - at.min(dim=1).values).max() <= 2


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_tome_weighs_what_it_has_merged_from_the_third_step_on(keep):
    """24, 12, 6, 3: keys of clusters of different sizes are compared."""
    tome = write.restatements()["tome"]
    for seed in range(5):
        torch.manual_seed(seed)
        x, scores = torch.randn(1, 24, 6, dtype=torch.float64), torch.rand(1, 24, dtype=torch.float64)
        found = methods.tome(x, scores, keep)
        merged, indices, assignment, mass = tome(x[0].numpy(), scores[0].numpy(), keep)
        assert found.indices[0].tolist() == indices and found.assignment[0].tolist() == assignment.tolist()
        torch.testing.assert_close(found.merged[0], torch.from_numpy(merged))
        torch.testing.assert_close(found.mass[0], torch.tensor(mass, dtype=torch.float64))
