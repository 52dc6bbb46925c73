import pytest
import torch

from condense_kernels import condense, select_and_merge, split_budget
from condense_kernels.testing import assert_same_bits, make_inputs


@pytest.mark.parametrize(
    ("tokens", "keep", "ratio", "expected"),
    [
        (576, 64, 0.25, (48, 16)),
        (576, 192, 0.25, (144, 48)),
        (576, 1 / 3, 0.25, (144, 48)),
        (576, 0.1, 0.25, (43, 15)),  # 57.6 -> 58, 14.5 -> 15
        (10, 0.25, 0.5, (1, 2)),  # 2.5 -> 3, 1.5 -> 2: halves go up
        (10, 0.01, 0.0, (1, 0)),  # at least one token
        (5, 5, 1.0, (0, 5)),
        (1, 1, 0.25, (1, 0)),
    ],
)
def test_split_budget(tokens, keep, ratio, expected):
    assert split_budget(tokens, keep, ratio) == expected


@pytest.mark.parametrize("keep", [0, -1, 577, 0.0, 1.0, 1.5, float("nan")])
def test_budget_out_of_range(keep):
    with pytest.raises(ValueError, match="^keep: expected"):
        split_budget(576, keep)


@pytest.mark.parametrize("keep", [True, "64", None, torch.tensor(64)])
def test_budget_of_the_wrong_type(keep):
    with pytest.raises(TypeError, match="^keep: expected an int count or a float ratio"):
        split_budget(576, keep)


@pytest.mark.parametrize(("ratio", "error"), [(-0.1, ValueError), (1.1, ValueError), ("half", TypeError)])
def test_background_ratio_out_of_range(ratio, error):
    with pytest.raises(error, match="^background_ratio: expected"):
        split_budget(576, 64, ratio)


def test_num_tokens_out_of_range():
    with pytest.raises(ValueError, match="^num_tokens: expected"):
        split_budget(0, 1)


def test_condense_is_select_and_merge_with_the_split(backend):
    inputs = make_inputs("random", num_tokens=24)
    expected = select_and_merge(inputs.features, inputs.scores, 6, 2, grid=(4, 6), suppression=0.5, backend=backend)
    for keep in (8, 1 / 3):
        result = condense(inputs.features, inputs.scores, keep=keep, grid=(4, 6), suppression=0.5, backend=backend)
        assert_same_bits(result, expected)


def test_condense_names_a_wrong_rank():
    with pytest.raises(ValueError, match=r"^features: expected 3 axes \[B N D\].*features\[None\]"):
        condense(torch.rand(576, 16), torch.rand(576), grid=(24, 24))
    with pytest.raises(TypeError, match=r"^features: expected a torch.Tensor.*got list"):
        condense([[1.0]], torch.rand(576))
