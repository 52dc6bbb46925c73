"""Long images, whose N x N similarities are never stored: the same bits as the stages in a row, which do store them."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits, make_inputs

# The stages of operators of their own store s at any size, so they are what the streamed flagship is compared with.
PRELUDE = """
import random, torch
import condense_kernels as ck
from condense_kernels.testing import KINDS, assert_same_bits, make_inputs

def same(inputs, what):
    assert_same_bits(inputs.run("cpp"), inputs.run_stages("cpp")[-1], what)
"""


def streamed(program: str, **environment: str) -> None:
    """Runs a program in which images of more than 48 tokens are streamed, as the limit is read but once."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
        env={**os.environ, "CONDENSE_STORED_TOKENS": "48", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", ["1", "2"])
def test_every_kind_of_input(threads, cpp):
    """From one tile to more tokens than the pool holds, budgets from 1 to N, each kind in each dtype."""
    streamed(
        """
        pick = random.Random(0)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for kind in KINDS:
                n = pick.choice([49, 96, 97, 200, 520, 777, 1100])
                k = pick.choice([1, 2, n // 8, n // 2, n - 1, n])
                background = pick.choice([0, k // 4, k])
                suppression, background_suppression = (pick.choice([0.0, 0.5, 1.0, 1.0, 3.0, 3e38]) for _ in range(2))
                inputs = make_inputs(
                    kind, batch=pick.choice([1, 2, 3]), num_tokens=n, channels=pick.choice([3, 16, 131, 259]),
                    num_anchors=k - background, num_background=background, dtype=dtype, suppression=suppression,
                    background_suppression=background_suppression,
                )
                factors = f"x {suppression} and {background_suppression}"
                same(inputs, f"{kind}, {dtype}, N {n}, K {k}, of these {background} background, {factors}")
        """,
        OMP_NUM_THREADS=threads,
    )


def test_a_round_that_ends_after_every_pick(cpp):
    """Five directions of 600 equal tokens each: a pick drops the score of the whole pool below that of the others."""
    streamed(
        """
        for scores in (torch.ones(1, 3000), torch.linspace(1, 2, 3000)[None], torch.linspace(2, 1, 3000)[None]):
            for order in (torch.arange(3000), torch.randperm(3000, generator=torch.Generator().manual_seed(0))):
                directions = torch.eye(5).repeat_interleave(600, dim=0)[order][None]
                inputs = make_inputs("random", batch=1, num_tokens=3000, num_anchors=40, num_background=20,
                                     features=directions, scores=scores)
                same(inputs, "equal directions")
        """
    )


def test_top_k_of_zero_keys(cpp):
    """Nothing is similar, so nothing could be scaled: without suppression the scores decide, then the index."""
    streamed(
        """
        scores = torch.arange(700).roll(7).float()[None] // 2  # in pairs
        features = torch.zeros(1, 700, 4)
        for dtype in (torch.float32, torch.float64):
            out = ck.select_and_merge(features, scores.to(dtype), 50, 3, suppression=0.0, spatial_weight=0.0)
            best = scores[0].sort(descending=True, stable=True).indices[:50].tolist()
            rest = [i for i in range(700) if i not in best][:3]
            assert out.indices[0].tolist() == sorted(best + rest)
        """
    )


def test_ties_across_the_border_of_the_pool(cpp):
    """Equal scores in and outside the pool: the lowest index is the pick, wherever it is."""
    streamed(
        """
        for seed in range(20):
            pick = torch.Generator().manual_seed(seed)
            lowest, levels = seed % 2 - 1, 1 + seed // 2 % 2
            keys = torch.randint(lowest, 2, (1, 1500, 6), generator=pick).float()  # cosines of a few values
            scores = torch.randint(1, 1 + levels, (1, 1500), generator=pick).float()
            inputs = make_inputs("random", batch=1, num_tokens=1500, num_anchors=400, num_background=100,
                                 features=keys, scores=scores)
            same(inputs, f"seed {seed}")
        """
    )


def test_the_first_pick_stands_alone(cpp):
    """All cosines with the first pick are negative: its suppression raises every score, by how much differs."""
    streamed(
        """
        for seed in range(40):
            pick = torch.Generator().manual_seed(seed)
            keys = torch.randn(1, 600, 8, generator=pick)
            scores = torch.rand(1, 600, generator=pick)
            keys[..., 0] = 0.3 + torch.rand(1, 600, generator=pick)
            keys[0, 77], scores[0, 77] = torch.eye(8)[0] * -1, 2.0
            inputs = make_inputs("random", batch=1, num_tokens=600, num_anchors=50, num_background=50,
                                 features=keys, scores=scores)
            assert inputs.run_stages("cpp").anchors[0, 0] == 77
            same(inputs, f"seed {seed}")
        """
    )


def test_above_the_limit_that_users_have(cpp):
    inputs = make_inputs("clustered", batch=1, num_tokens=5800, num_anchors=600, num_background=200)
    assert_same_bits(inputs.run(cpp), inputs.run_stages(cpp)[-1])


@pytest.mark.parametrize(
    ("n", "channels", "k", "dtype", "stored"),
    [
        (1000, 16, 960, torch.float32, True),  # s stays in the caches
        (4096, 64, 64, torch.float32, False),
        (4096, 64, 960, torch.float32, True),  # rows of many picks, once more
        (4096, 1024, 64, torch.float32, True),
        (4096, 384, 64, torch.float32, True),
        (5792, 1024, 64, torch.float32, True),  # 128 MB
        (5793, 1024, 64, torch.float32, False),
        (5793, 1024, 1000, torch.float32, True),  # the rows of the picks are 23 MB
        (4096, 1024, 64, torch.float64, True),
        (4097, 1024, 64, torch.float64, False),
    ],
)
def test_who_is_stored(n, channels, k, dtype, stored, cpp):
    """By the bytes that a call states, dense; packed and from keys the rule is the same code."""
    features, scores = torch.ones(1, dtype=dtype).expand(1, n, channels), torch.ones(1).expand(1, n)
    needed = ck.workspace_bytes(features, scores, k, 0, spatial_weight=0.0)
    assert (needed >= n * n * (8 if dtype == torch.float64 else 4)) == stored


def test_in_a_workspace_of_its_own(cpp):
    inputs = make_inputs("masked", batch=3, num_tokens=4132, num_anchors=30, num_background=20)
    needed = ck.workspace_bytes(*inputs.args, **inputs.options)
    assert needed < 3 * 4132 * 4132  # not even a byte a pair
    out = ck.select_and_merge(*inputs.args, **inputs.options, workspace=torch.empty(needed, dtype=torch.uint8))
    assert_same_bits(out, inputs.run(cpp))
