"""How many kernels a call launches. benchmarks/count_launches.py counts; here is what must not come back."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def counts() -> dict[str, collections.Counter[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the package that is tested
    command = [sys.executable, str(ROOT / "benchmarks" / "count_launches.py"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {call: collections.Counter(kernels) for call, kernels in json.loads(done.stdout).items()}


def test_the_page_has_these_counts(counts):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [call for call, kernels in counts.items() if f"| {call} | {kernels.total()} |" not in page] == []


@pytest.mark.parametrize(
    ("batch", "groups"),
    [("64 x 2880, K = 320", 1), ("65 x 2880, K = 320", 2), ("4096 segments, the longest 10000", 16)],
)
def test_packed_batches_are_stored_in_groups(counts, batch, groups):
    """65 x 2880 made 11,522 launches, as its s takes more than 2 GiB. No more than 5 a group, and the merge."""
    kernels = counts[f"packed, {batch}"]
    assert kernels["similarity_tile_kernel"] == groups and kernels["begin_kernel"] == 0
    assert kernels.total() <= 5 * groups + 1


def turns(kept: int) -> int:
    """One for each 64 picks but the first, and 16 to spare."""
    return -(-(kept - 1) // 64) + 16


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        ("1 x 20000, K = 640", (480, 160)),
        ("1 x 65536, K = 1024", (768, 256)),
        ("packed, 5 x 20000, K = 640", (3200, 3200)),  # any segment might have all rows, of either kind
    ],
)
def test_streamed_images_take_a_turn_for_64_picks(counts, call, kept):
    """1 x 20000 made 1,282 launches, two for each pick."""
    kernels = counts[call]
    assert kernels["update_kernel"] == kernels["pick_kernel"] == sum(map(turns, kept))
    assert kernels.total() == 2 * sum(map(turns, kept)) + 6
