"""Selection and assignment without s: a cosine is computed again where it is needed, memory is O(B N).

Both loops begin with a launch of their own, and go on in turns. A cosine has the same bits as in s.
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import image_rows, image_tokens, tokens_before
from ..._triton.launcher import VARYING, launch
from ..._triton.tables import StreamConfig
from ..._triton.workspace import Pieces
from ..assign import streamed as assigning
from ..greedy_select import streamed as picking
from ..greedy_select.loop import count_dead, write_kept
from ..similarity.unit_sum import launch_global_similarity


@triton.jit(do_not_specialize=VARYING)
def keep_kernel(
    nu_ptr,  # [B, N]
    indices_ptr,  # [B, K]
    N, K, packed,
    CHUNK: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
    nu_ptr += tokens_before(packed, at_b, N)
    indices_ptr += first_k
    write_kept(nu_ptr, indices_ptr, count_dead(nu_ptr, 0, N, CHUNK), K, N, CHUNK)


def given_of(images: int, tokens: int, dk: int) -> Pieces:
    """Of launch_given."""
    of_tokens = {name: ((tokens,), torch.float32) for name in ("scale", "inverse", "g")}
    return {**of_tokens, "unit_sums": ((images, dk), torch.int64)}


def pieces_of(images: int, tokens: int, blocks: int, dk: int | None = None) -> Pieces:
    """Tokens and blocks of all images together; dk: of keys whose mean similarity is given."""
    loop, sums = picking.pieces_of(images, tokens, blocks), picking.sums_of(tokens, blocks)
    if dk is not None:
        sums = given_of(images, tokens, dk)
    return {**loop, **sums, **assigning.tiles_of(blocks), "members": ((tokens,), torch.int32)}


def launch_given(w, keys, scores, mask, packed=None) -> None:
    """What needs no cosine where the mean similarity is given: tiers, factors and g."""
    launch_global_similarity(keys, scores, mask, w.tier, w.scale, w.inverse, w.unit_sums, w.g, packed)


def launch_select(w, keys, scores, indices, num_anchors, suppressions, scale_prior, mean=None, packed=None):
    """The kept tokens into indices [B, K], packed: [total_keep], from what the similarity tiles, or given the mean [B]
    launch_given, left in w."""
    k, n = indices.shape[-1], keys.shape[-2]
    counts = (num_anchors, k - num_anchors)
    if packed is not None:
        n, counts = packed.max_seqlen, (packed.max_keep,) * 2
    for background, count, factor in zip((False, True), counts, suppressions, strict=True):
        picking.launch_loop(
            w, keys, scores, k, num_anchors, count, factor, scaled=scale_prior, background=background, packed=packed,
            g=w.row_sums if mean is None else w.g, sbar=mean,
        )  # fmt: skip
    config = StreamConfig.for_shape()
    launch(
        keep_kernel, (w.due.numel(),), w.nu, indices, n, k, packed,
        CHUNK=config.chunk, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
