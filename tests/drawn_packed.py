"""Packed calls of selections and of assign, each held to its segments alone, and what takes keys in the place of s."""

import torch
from drawn import F32, Call, Dice, given, kept_tokens, offsets

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits


def segments(dice: Dice, fewest: int = 0) -> tuple[list[int], list[int]]:
    """Tokens and kept tokens of each, among them, where nothing may be kept, some without tokens."""
    lengths = [0 if not fewest and dice.chance(0.1) else dice.size(65) for _ in range(dice.size(4))]
    return lengths, [dice.random.randint(min(fewest, n), n) for n in lengths]


def by_segment(operator: str, rows: bool, lengths: list[int], kept: list[int], tokens: dict, options: dict) -> Call:
    """``tokens`` are packed [T, ...], s and c [T, widest]. The first result is one a kept token (rows), or a token."""
    packed = {
        "cu_seqlens": offsets(lengths), "cu_kept": offsets(kept), "max_seqlen": max(1, *lengths),
        **({"total_keep": sum(kept)} if rows else {}),
    }  # fmt: skip
    tokens = given(**tokens)
    call = Call(f"{operator}_varlen", {**tokens, **packed, **options}, lambda _: None, packed=True)

    def check(result: tuple) -> None:
        starts, ends = packed["cu_seqlens"].tolist(), packed["cu_kept"].tolist()
        for i, (n, k) in enumerate(zip(lengths, kept, strict=True)):
            own = {}
            for name, value in tokens.items():
                at = slice(ends[i], ends[i] + k) if name == "indices" else slice(starts[i], starts[i] + n)
                own[name] = value[None, at, :n] if name in ("s", "c") else value[None, at]
            counted = {"k": k} if rows else {}
            alone = getattr(ck, operator)(**own, **counted, **options)
            parts = (alone,) if isinstance(alone, torch.Tensor) else tuple(alone)
            for which, part in enumerate(parts):
                begin = ends[i] if rows and which == 0 else starts[i]
                mine = result[which][begin : begin + part.shape[1]]
                assert_same_bits((mine,), (part[0],), f"segment {i}, result {which}")

    call.check = check
    return call


def square(dice: Dice, lengths: list[int]) -> torch.Tensor:
    return dice.numbers(sum(lengths), max(1, *lengths), dtype=dice.working())


def some(dice: Dice, total: int) -> torch.Tensor | None:
    return dice.flags(total) if dice.chance(0.3) else None


def tiers(dice: Dice, total: int) -> torch.Tensor | None:
    return dice.integers(0, 3, total).to(torch.int8) if dice.chance(0.3) else None


def coverage_select_varlen(dice: Dice) -> Call:
    lengths, kept = segments(dice)
    total = sum(lengths)
    tokens = {"c": square(dice, lengths), "candidates": some(dice, total)}
    tokens["weight"] = dice.scores(total) if dice.chance(0.5) else None
    return by_segment("coverage_select", True, lengths, kept, tokens, {"combine": dice.one("mul", "add")})


def dpp_select_varlen(dice: Dice) -> Call:
    lengths, kept = segments(dice)
    total = sum(lengths)
    tokens = {"s": square(dice, lengths), "tier": tiers(dice, total), "candidates": some(dice, total)}
    quality = dice.scores(total) if dice.chance(0.5) else None
    call = by_segment(
        "dpp_select", True, lengths, kept, {**tokens, "quality": quality}, {"damping": dice.one(0.0, 0.5)}
    )
    call.arguments.setdefault("quality", None)
    return call


def dpc_knn_varlen(dice: Dice) -> Call:
    lengths, kept = segments(dice, fewest=1)
    tokens = {"s": square(dice, lengths), "tier": tiers(dice, sum(lengths))}
    options = {"k_nn": dice.random.randint(1, min(lengths)), "scale": dice.one(1.0, 0.5)}
    return by_segment("dpc_knn", True, lengths, kept, tokens, options)


def indices_of(dice: Dice, lengths: list[int], kept: list[int]) -> torch.Tensor:
    return torch.cat([kept_tokens(dice, 1, n, k)[0] for n, k in zip(lengths, kept, strict=True)])


def assign_varlen(dice: Dice) -> Call:
    lengths, kept = segments(dice, fewest=1)
    total, weight = sum(lengths), dice.one(0.0, 0.5)
    tokens = {"indices": indices_of(dice, lengths, kept), "sources": some(dice, total)}
    if dice.chance(0.5):
        tokens |= {"s": square(dice, lengths), "tier": tiers(dice, total)}
        options = {}
    else:
        tokens |= {"keys": dice.numbers(total, dice.size(40), dtype=dice.dtype()), "mask": some(dice, total)}
        options = {"metric": dice.one("cosine", "neg_l2")}
    tokens["positions"] = dice.numbers(total, 2, hostile=False) if weight else None
    return by_segment("assign", False, lengths, kept, tokens, {"spatial_weight": weight, **options})


def assign_from_keys(dice: Dice) -> Call:
    """As on the s and the tier of these keys."""
    b, n = dice.one(1, 1, 2), dice.size()
    keys, mask = dice.numbers(b, n, dice.size(40), dtype=dice.dtype()), dice.flags(b, n) if dice.chance(0.3) else None
    options = given(
        indices=kept_tokens(dice, b, n, dice.random.randint(1, n)), spatial_weight=0.0,
        sources=dice.flags(b, n) if dice.chance(0.2) else None,
    )  # fmt: skip
    metric = dice.one("cosine", "neg_l2")

    def check(result: tuple) -> None:
        s, _, _, tier = ck.similarity(keys, None, mask, metric=metric)[:4]
        assert_same_bits(result, (ck.assign(s, tier=tier, **options),), "from keys")

    return Call("assign", {**given(keys=keys, mask=mask), **options, "metric": metric}, check)


def greedy_select_from_keys_varlen(dice: Dice) -> Call:
    lengths, kept = segments(dice, fewest=1)
    total = sum(lengths)
    tokens = {"keys": dice.numbers(total, dice.size(40), dtype=dice.dtype()), "mask": some(dice, total)}
    tokens["prior"] = dice.scores(total, dtype=F32)
    options = {"suppression": dice.one(0.5, 1.0), "combine": dice.one("sub", "mul")}
    return by_segment("greedy_select", True, lengths, kept, tokens, options)
