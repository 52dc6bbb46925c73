"""ToMe's and tomesd's closures, in a stand-in of a ViT block, and beside the published loop restated."""

import pytest
import torch
import torch.nn.functional as F
from hosts import random, tome_loop

from condense_kernels.adapters import tome

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Block:
    """ToMe's step in a ViT block: the sizes are carried along."""

    def __init__(self, matching, wavg):
        self.matching, self.wavg = matching, wavg

    def __call__(self, x, metric, r, size=None, class_token=False, distill_token=False):
        merge, unmerge = self.matching(metric, r, class_token, distill_token)
        return *self.wavg(merge, x, size), unmerge


STEP = Block(tome.bipartite_soft_matching, tome.merge_wavg)


@pytest.mark.parametrize("r", [1, 5, 11])
def test_tome_merges_what_the_loop_merges(r):
    x, metric, size = random(3, 24, 8), random(3, 24, 6), torch.rand(3, 24, 1) + 1
    rows, sizes, unmerge = STEP(x, metric, r, size)
    assert rows.shape == (3, 24 - r, 8) and sizes.shape == (3, 24 - r, 1)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    for image in range(3):
        expected = tome_loop(metric[image], r, x[image], size[image])
        for tokens, mean in expected.items():
            back = unmerge(rows)[image, list(tokens)]
            torch.testing.assert_close(back, mean.expand_as(back))


def test_tome_is_the_same_with_the_hosts_merge_wavg():
    """Which knows closures alone: it calls ours with mode="sum"."""

    def theirs(merge, x, size=None):
        size = torch.ones_like(x[..., :1]) if size is None else size
        total = merge(size, mode="sum")
        return merge(x * size, mode="sum") / total, total

    x, metric, size = random(2, 31, 8), random(2, 31, 6), torch.rand(2, 31, 1) + 1
    for given in (None, size):
        ours, others = STEP(x, metric, 7, given), Block(tome.bipartite_soft_matching, theirs)(x, metric, 7, given)
        torch.testing.assert_close(ours[:2], others[:2])
    foreign = tome.merge_wavg(lambda y, mode: y[:, ::2], x, size)
    torch.testing.assert_close(foreign, (x[:, ::2], size[:, ::2]))


def test_tome_modes():
    x, metric = random(2, 12, 4), random(2, 12, 6)
    merge, unmerge = tome.bipartite_soft_matching(metric, 4)
    source = merge(torch.eye(12).expand(2, 12, 12), mode="amax")  # ToMe's merge_source
    assert torch.equal(source.sum(dim=1), torch.ones(2, 12))
    torch.testing.assert_close(merge(x, mode="sum"), source @ x)
    torch.testing.assert_close(merge(x), source @ x / source.sum(dim=2, keepdim=True))
    assert torch.equal(unmerge(merge(x)).shape == x.shape and source.mT @ source, unmerge(source))
    with pytest.raises(ValueError, match=r"^mode: expected one of mean, sum, amax, got 'prod'"):
        merge(x, mode="prod")


@DTYPES
def test_tome_dtypes_and_protected_tokens(dtype):
    x, metric = random(2, 20, 8, dtype=dtype), random(2, 20, 6, dtype=dtype)
    metric[:, :2] = metric[:, 4:6]  # equal to others: they would be merged first
    for options, kept in (({"class_token": True}, 1), ({"class_token": True, "distill_token": True}, 2)):
        rows, sizes, _ = STEP(x, metric, 8, None, **options)
        assert rows.dtype == sizes.dtype == dtype and rows.shape == (2, 12, 8)
        assert torch.equal(rows[:, :kept], x[:, :kept]) and (sizes[:, 0] == 1).all()
    assert STEP(x, metric, 50, None, class_token=True)[0].shape[1] == 20 - 9
    for r in (0, -1):
        merge, unmerge = tome.bipartite_soft_matching(metric, r)
        assert merge(x, mode="sum") is x and unmerge(x) is x


@pytest.mark.parametrize(("h", "w", "sy", "sx"), [(6, 8, 2, 2), (7, 9, 2, 3), (5, 4, 1, 2)])
def test_tomesd_windows(h, w, sy, sx):
    n, count = h * w, (h // sy) * (w // sx)
    x = random(2, n, 8)
    merge, unmerge = tome.bipartite_soft_matching_random2d(x, w, h, sx, sy, n - count, no_rand=True)
    source = merge(torch.eye(n).expand(2, n, n), mode="amax")
    assert source.shape[1] == count
    first = [y * w + z for y in range(0, h - sy + 1, sy) for z in range(0, w - sx + 1, sx)]
    assert torch.equal(merge.matching.indices, torch.tensor(first).expand(2, -1))
    z = F.normalize(x, dim=-1)
    best = (z @ z[:, first].mT).argmax(dim=2)
    rest = [i for i in range(n) if i not in first]
    assert torch.equal(merge.matching.assignment[:, rest], best[:, rest])
    assert unmerge(merge(x)).shape == x.shape
    draws = [
        tome.bipartite_soft_matching_random2d(x, w, h, sx, sy, n - count, generator=torch.Generator().manual_seed(s))[0]
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0].matching.indices, draws[1].matching.indices)
    assert not torch.equal(draws[0].matching.indices, draws[2].matching.indices)
    at = draws[0].matching.indices[0]
    windows = {(int(i) // w // sy, int(i) % w // sx) for i in at}
    assert windows == {(y, z) for y in range(h // sy) for z in range(w // sx)}


def test_tomesd_errors():
    with pytest.raises(ValueError, match=r"^w, h, sx, sy: expected windows within 12 tokens, got 3 x 5 of 2 x 2"):
        tome.bipartite_soft_matching_random2d(random(1, 12, 4), 5, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=r"^w, h, sx, sy"):
        tome.bipartite_soft_matching_random2d(random(1, 12, 4), 4, 3, 5, 2, 4)
    assert tome.bipartite_soft_matching_random2d(random(1, 12, 4), 4, 3, 2, 2, 0)[0] is tome.do_nothing
