"""Packed calls of selections and of assign, each held to its segments alone, and what takes keys in the place of s."""

import itertools

import torch
from drawn import F32, Call, Dice, given, kept_tokens

import condense_kernels as ck
from condense_kernels.testing import PackedInputs, assert_same_bits


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def select_and_merge_varlen(dice: Dice) -> Call:
    lengths = [
        dice.random.choice((0, dice.size(65))) if dice.chance(0.2) else dice.size(65) for _ in range(dice.size(4))
    ]
    kept = [dice.random.randint(0, n) for n in lengths]
    anchors = [dice.random.randint(0, k) for k in kept]
    total, d, dtype = sum(lengths), dice.size(40), dice.dtype()
    weight = dice.one(0.0, 1.0)
    inputs = PackedInputs(
        features=dice.numbers(total, d, dtype=dtype), scores=dice.scores(total), cu_seqlens=offsets(lengths),
        cu_anchors=offsets(anchors), cu_background=offsets([k - a for k, a in zip(kept, anchors, strict=True)]),
        total_keep=sum(kept), max_seqlen=max(1, *lengths) + dice.one(0, 0, 3), spatial_weight=weight,
        positions=dice.numbers(total, 2, hostile=False) if weight else None, suppression=dice.one(1.0, 0.5, 0.0),
    )  # fmt: skip

    def check(result: tuple) -> None:
        if total:
            assert_same_bits(result, inputs.segment_by_segment("cpp"), "packed")

    return Call("select_and_merge_varlen", given(**vars(inputs)), check, packed=True)


def greedy_select_varlen(dice: Dice) -> Call:
    lengths = [dice.size(65) for _ in range(dice.size(4))]
    kept = [dice.random.randint(0, n) for n in lengths]
    total, widest = sum(lengths), max(lengths)
    s, prior = dice.numbers(total, widest, dtype=dice.working()), dice.numbers(total)
    options = {"suppression": dice.one(0.5, 1.0), "first": dice.one(None, "max_min"), "combine": dice.one("sub", "mul")}
    options = given(**options)
    cu_seqlens, cu_kept = offsets(lengths), offsets(kept)

    def check(result: tuple) -> None:
        for i, (n, k) in enumerate(zip(lengths, kept, strict=True)):
            tokens = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
            alone = ck.greedy_select(s[None, tokens, :n], prior[None, tokens], k, **options)
            assert_same_bits((result[0][int(cu_kept[i]) : int(cu_kept[i + 1])],), (alone[0],), f"segment {i}")

    arguments = {"s": s, "prior": prior, "cu_seqlens": cu_seqlens, "cu_kept": cu_kept, "total_keep": sum(kept)}
    return Call("greedy_select_varlen", {**arguments, "max_seqlen": widest, **options}, check, packed=True)


def merge_varlen(dice: Dice) -> Call:
    lengths = [dice.size(65) for _ in range(dice.size(4))]
    kept = [dice.random.randint(1, n) for n in lengths]
    total, d = sum(lengths), dice.size()
    features, scores = dice.numbers(total, d, dtype=dice.dtype()), dice.scores(total)
    indices = torch.cat([kept_tokens(dice, 1, n, k)[0] for n, k in zip(lengths, kept, strict=True)])
    rows = torch.cat([dice.integers(-1, k, n) for n, k in zip(lengths, kept, strict=True)])
    cu_seqlens, cu_kept, mode = offsets(lengths), offsets(kept), dice.one("mean", "sum", "lerp")

    def check(result: tuple) -> None:
        for i in range(len(lengths)):
            t, r = slice(*cu_seqlens[i : i + 2].tolist()), slice(*cu_kept[i : i + 2].tolist())
            alone = ck.merge(features[None, t], scores[None, t], indices[None, r], rows[None, t], mode=mode)
            assert_same_bits((result[0][r], result[1][r]), (alone[0][0], alone[1][0]), f"segment {i}")

    arguments = {"features": features, "scores": scores, "indices": indices, "assignment": rows, "mode": mode}
    arguments |= {"cu_seqlens": cu_seqlens, "cu_kept": cu_kept, "max_seqlen": max(lengths)}
    return Call("merge_varlen", arguments, check, packed=True)


def similarity_varlen(dice: Dice) -> Call:
    lengths = [dice.size(65) for _ in range(dice.size(4))]
    total, cu_seqlens = sum(lengths), offsets(lengths)
    keys, metric = dice.numbers(total, dice.size(), dtype=dice.dtype()), dice.one("cosine", "neg_l2")

    def check(result: tuple) -> None:
        for i, n in enumerate(lengths):
            t = slice(*cu_seqlens[i : i + 2].tolist())
            s, sbar, g, tier, nearest = ck.similarity(keys[None, t], metric=metric, nearest=True)
            packed = (result[0][t, :n], result[1][i : i + 1], result[2][t], result[3][t], result[4][t])
            assert_same_bits(packed, (s[0], sbar, g[0], tier[0], nearest[0]), f"segment {i}")

    arguments = {"keys": keys, "cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "metric": metric}
    return Call("similarity_varlen", arguments, check, packed=True)


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
