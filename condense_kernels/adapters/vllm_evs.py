"""vLLM's efficient video sampling, vllm/multimodal/evs.py: compute_retention_mask, by any method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..methods.registry import Method
from .common import mask_of

FIRST = 255.0  # of a token of the first frame, as in the host: above all others, whose scores are at most 2


def retained(tokens_per_frame: int, frames: int, q: float) -> int:
    """What vLLM has put as many placeholders for: compute_retained_tokens_count."""
    return max(tokens_per_frame, int(tokens_per_frame * frames * (1 - q)))


def change(frames: torch.Tensor) -> torch.Tensor:
    """[T, P, C] -> [1, T P]: 1 - the cosine with the frame before, of the first frame 255. In fp32, the host's dtype
    is that of the embeddings."""
    x = frames.detach().float()
    scores = 1 - torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1)
    scores = torch.nn.functional.pad(scores, (0, 0, 1, 0), value=FIRST)
    return scores.reshape(1, -1)


def retention_mask(
    method: Method, **options: Any
) -> Callable[[torch.Tensor, torch.Tensor | Sequence[int], int, float], torch.Tensor]:
    """A method as ``compute_retention_mask(video_embeds [N, C], video_size_thw, spatial_merge_size, q) -> bool [N]``.

    N is T H W / spatial_merge_size^2. Exactly max(tokens of a frame, int(N (1 - q))) are True, for as many has the
    processor made room. Scores are the host's own, :func:`change`: with ``fastervlm``, which takes the highest, the
    mask is the host's, but that bf16 is computed as fp32; methods that read no scores need not keep the first frame.
    A mask hands over no merged rows: of a method that merges, its tokens stay as they are. Models bind the host's
    function by name: it is to be replaced in theirs, such as vllm/model_executor/models/qwen2_5_vl.py, see the page.

    Raises (the function):
        ValueError: q outside [0, 1), sizes whose product is not N; what the method raises.
    """

    def compute_retention_mask(
        video_embeds: torch.Tensor, video_size_thw: torch.Tensor | Sequence[int], spatial_merge_size: int, q: float
    ) -> torch.Tensor:
        t, h, w = map(int, video_size_thw)
        rows, columns = h // spatial_merge_size, w // spatial_merge_size
        n, c = video_embeds.shape
        if t * rows * columns != n or n == 0:
            raise ValueError(f"video_size_thw: expected sizes of {n} tokens, got {t} x {rows} x {columns} of them.")
        if not 0 <= q < 1:
            raise ValueError(f"q: expected 0 <= q < 1, the share that leaves, got {q}.")
        scores = change(video_embeds.reshape(t, rows * columns, c))
        keep = retained(rows * columns, t, q)
        return mask_of(method(video_embeds[None], scores, keep, **options).indices, n)[0]

    return compute_retention_mask
