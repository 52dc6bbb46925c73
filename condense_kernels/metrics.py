"""What a choice of tokens is worth before any model is asked, and what it saves by the papers' formulas.

Of tensors [B, ...] each function returns a tensor of their device, [B] or [B, bins], without waiting for it. Of numbers
it returns a number. docs/metrics.md has them in a table.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ._dispatch.checks import FLOATS, as_count, check_tensor, shown

INDEXES = (torch.int64, torch.int32)
SIMILAR = 0.75  # the cosine from which CondenseVLM's Table 1 calls two tokens similar


def unit(x: torch.Tensor) -> torch.Tensor:
    """[..., D] of length 1, zeros stay zeros; fp64 stays, all else is fp32."""
    return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def redundancy(tokens: torch.Tensor, threshold: float = SIMILAR) -> torch.Tensor:
    """Table 1 of CondenseVLM: the share of the pairs of kept tokens that are similar, of each image.

    Args:
        tokens: [B, K, D] kept tokens.
        threshold: two are similar whose cosine is at least this.

    Returns:
        [B] in [0, 1]; NaN where K < 2, as there are no pairs.
    """
    check_tensor("tokens", tokens, "B K D", {}, FLOATS)
    z, k = unit(tokens), tokens.shape[1]
    similar = (z @ z.transpose(1, 2) >= threshold).triu(diagonal=1)
    return similar.sum(dim=(1, 2)).to(z.dtype) / (k * (k - 1) / 2 if k > 1 else torch.nan)


def position_spread(indices: torch.Tensor, num_tokens: int, bins: int = 8) -> torch.Tensor:
    """Figure 2 of "Are We Solving the Right Problem?": where in raster order the kept tokens are.

    Args:
        indices: [B, K] int64 or int32, of kept tokens in an image of ``num_tokens``.
        bins: of equal length, from the image's top to its bottom. Token i is in bin i * bins // num_tokens.

    Returns:
        [B, bins] fp32, the share of the kept tokens in each. Under uniform choice a bin's expected share is its share
        of the positions, 1 / bins where bins divides num_tokens.
    """
    check_tensor("indices", indices, "B K", {}, INDEXES)
    num_tokens, bins = positive("num_tokens", num_tokens), positive("bins", bins)
    found = indices.new_zeros(len(indices), bins, dtype=torch.float32)
    share = torch.full(indices.shape, 1 / max(indices.shape[1], 1), dtype=torch.float32, device=indices.device)
    return found.scatter_add(1, indices.long() * bins // num_tokens, share)


def position_bias(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """How late in raster order the kept tokens are: their mean place, -1 the first token's, 1 the last one's.

    Args:
        indices: [B, K] int64 or int32, of kept tokens in an image of ``num_tokens``.

    Returns:
        [B] fp32. Under uniform choice 0 is expected, with standard deviation
        sqrt((N + 1) (N - K) / (3 K (N - 1)^2)), about 0.07 for 64 of 576; above 0 they are towards the end. Tokens in
        the middle and tokens at both ends have 0 as well: position_spread tells.
    """
    check_tensor("indices", indices, "B K", {}, INDEXES)
    last = positive("num_tokens", num_tokens) - 1
    return 2 * indices.float().mean(dim=1) / last - 1 if last else torch.zeros_like(indices[:, 0], dtype=torch.float32)


def coverage(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """How near the kept tokens are to all: the mean over tokens of the largest cosine to a kept one.

    Args:
        features: [B, N, D].
        indices: [B, K] int64 or int32, of the kept tokens.

    Returns:
        [B], at most 1, which all tokens have.
    """
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_tensor("indices", indices, "B K", sizes, INDEXES, like=features)
    z = unit(features)
    kept = z.gather(1, indices.long()[..., None].expand(-1, -1, z.shape[2]))
    return (z @ kept.transpose(1, 2)).amax(dim=2).mean(dim=1)


def nearest_rows(features: torch.Tensor, merged: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: the assignment, where a dropped token (-1) has the row at the least Euclidean distance."""
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_tensor("merged", merged, "B K D", sizes, FLOATS, like=features)
    check_tensor("assignment", assignment, "B N", sizes, INDEXES, like=features)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    exact = "donot_use_mm_for_euclid_dist"
    nearest = torch.cdist(features.to(wide), merged.to(wide), compute_mode=exact).argmin(dim=2)
    return torch.where(assignment < 0, nearest, assignment.long())


def reconstruction_error(features: torch.Tensor, merged: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """How far the features are from the rows that stand for them: |X - M[assignment]| / |X|, Frobenius norms.

    Args:
        features: [B, N, D].
        merged: [B, K, D].
        assignment: [B, N] int64 or int32, the row of merged that a token went into. -1, a dropped token: the row at the
            least Euclidean distance stands for it, so that a method which drops is not charged for more than it lost.

    Returns:
        [B] >= 0; NaN where all features are zero.
    """
    rows = nearest_rows(features, merged, assignment)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    x, m = features.to(wide), merged.to(wide)
    rebuilt = m.gather(1, rows[..., None].expand(-1, -1, m.shape[2]))
    return (x - rebuilt).norm(dim=(1, 2)) / x.norm(dim=(1, 2))


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model that the formulas need."""

    layers: int  # T
    width: int  # d
    hidden: int  # m, of the feed-forward network
    kv_width: int  # key and value heads times the width of one; d without grouped queries

    @classmethod
    def of(cls, config: Any) -> "Decoder":
        """From a model's config."""
        text = config.get_text_config()
        names = "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
        sizes: list[Any] = [getattr(text, name, None) for name in names]
        if None in sizes:
            raise ValueError(
                f"config: expected {', '.join(names)} of a language model, got a "
                f"{getattr(text, 'model_type', None)!r} without. Remedy: a decoder of transformer layers."
            )
        layers, width, hidden, heads = sizes
        of_head = getattr(text, "head_dim", None) or width // heads
        return cls(layers, width, hidden, (getattr(text, "num_key_value_heads", None) or heads) * of_head)


def flops(decoder: Decoder, tokens: int) -> int:
    """Eq. 9 of CondenseVLM, for ``tokens`` of a prompt: T (4 N d^2 + 2 N^2 d + 2 N d m).

    One multiply-add is one, attention is not halved for being causal, and the feed-forward network has two matrices
    (Llama's has three); embeddings, the head, the encoder and the operator are left out.
    """
    n, d = tokens, decoder.width
    return decoder.layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * decoder.hidden)


def flops_pruned(decoder: Decoder, tokens: int, kept: int, layer: int = 0) -> int:
    """Eq. 10 of CondenseVLM: ``layer`` layers (L) on all tokens, the others on those that are kept."""
    if not 0 <= layer <= decoder.layers:
        raise ValueError(f"layer: expected 0 <= layer <= {decoder.layers}, the decoder's layers, got {shown(layer)}.")
    whole, left = (flops(decoder, n) // decoder.layers for n in (tokens, kept))
    return layer * whole + (decoder.layers - layer) * left


def flops_left(decoder: Decoder, tokens: int, kept: int, layer: int = 0) -> float:
    """Eq. 10 over Eq. 9 of CondenseVLM: the share of the FLOPs of ``tokens`` visual tokens that ``kept`` have.

    ``layer`` 0, as here: they leave before the first layer."""
    return flops_pruned(decoder, tokens, kept, layer) / flops(decoder, tokens)


def flops_saved(decoder: Decoder, tokens: int, kept: int, layer: int = 0) -> float:
    """Eq. 11 of CondenseVLM, 1 - Eq. 10 / Eq. 9."""
    return 1 - flops_left(decoder, tokens, kept, layer)


def kv_bytes(decoder: Decoder, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of every layer: 2 T N (key and value heads) (width of one) bytes of an element."""
    return 2 * decoder.layers * tokens * decoder.kv_width * itemsize


def training_aware_ratio(patches: int, tokens: int) -> float:
    """TACR, Eq. 7 of "Are We Solving the Right Problem?": patches of the encoder a visual token; 4 of Qwen2-VL."""
    return positive("patches", patches) / positive("tokens", tokens)


def token_reduction_rate(patches: int, tokens: int, kept: int) -> float:
    """TRR, Eq. 8: TACR times the training-free rate, tokens / kept; which is patches / kept.

    The paper multiplies the two, so that a rate here is a factor: 66.7 % fewer tokens are 3. 1 - 1 / TRR is the share
    of the patches that went, by training and by pruning together.
    """
    return training_aware_ratio(patches, tokens) * (positive("tokens", tokens) / positive("kept", kept))


def positive(name: str, value: int) -> int:
    count = as_count(name, value)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {shown(value)}.")
    return count
