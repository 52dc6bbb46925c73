"""greedy_select given S, against the other methods' loops given S and against a top-k.

Two of these methods are here as they are and as calls of ours, given S and from the features on: "whole" has S in it.
"""

from collections.abc import Callable
from functools import partial

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import greedy_select, similarity

SHAPES = ("llava15-64", "llava15-192", "llava-next-global")


def top_k_side(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> Side:
    one, its_scores = baselines.one_or_batch(features, scores)
    chosen = shape.batch * shape.kept * shape.channels * features.element_size()
    return Side(
        lambda: baselines.batched(shape.batch, baselines.top_k(one, its_scores, shape.kept)),
        lambda result: gates.check_top_k(result, features, scores, shape.kept),
        Work(shape.batch * shape.num_tokens, 2 * chosen + scores.nbytes),
        leaves_out="similarity, merging",
    )


def our_divprune(s: torch.Tensor, k: int) -> torch.Tensor:
    return torch.ops.condense.greedy_select(s, None, k, max_min=True)


def our_idpruner(s: torch.Tensor, importance: torch.Tensor, k: int, balance: float = 0.5) -> torch.Tensor:
    low, high = importance.aminmax(dim=-1, keepdim=True)
    prior = balance * (importance - low) / (high - low)
    return torch.ops.condense.greedy_select(s, prior, k, suppression=1 - balance)


def divprune_from_keys(keys: torch.Tensor, k: int) -> torch.Tensor:
    return torch.ops.condense.greedy_select_from_keys(keys, None, k, max_min=True)


def idpruner_from_keys(keys: torch.Tensor, importance: torch.Tensor, k: int, balance: float = 0.5) -> torch.Tensor:
    low, high = importance.aminmax(dim=-1, keepdim=True)
    prior = balance * (importance - low) / (high - low)
    return torch.ops.condense.greedy_select_from_keys(keys, prior, k, suppression=1 - balance, scale_prior=False)


def other_methods(
    shape: Shape, features: torch.Tensor, scores: torch.Tensor, s: torch.Tensor, loop: Work
) -> dict[str, Side]:
    """DivPrune and IDPruner, given S and from the features on: ours, as a careful author writes them, as published."""
    pairs, k = shape.num_tokens * (shape.num_tokens + 1) / 2, shape.kept
    whole = Work(2 * shape.batch * pairs * shape.channels + loop.flop, features.nbytes)
    found = {}
    divprune = baselines.divprune, baselines.divprune_as_published, gates.divprune_definition, ()
    idpruner = baselines.idpruner, baselines.idpruner_as_published, gates.idpruner_definition, (scores,)
    for name, ours, from_keys, careful, published, definition, prior in (
        ("DivPrune", our_divprune, divprune_from_keys, *divprune),
        ("IDPruner", our_idpruner, idpruner_from_keys, *idpruner),
    ):

        def check(order: torch.Tensor, definition=definition, prior=prior) -> None:
            gates.check_loop(order, features, definition, *prior)

        def on_s(select: Callable, s: torch.Tensor, prior=prior) -> torch.Tensor:
            one, *of_one = baselines.one_or_batch(s, *prior)
            return baselines.batched(shape.batch, select(one, *of_one, k))

        def by_ours(ours=ours, prior=prior) -> torch.Tensor:
            return ours(similarity(features)[0], *prior, k)

        def by_torch(select: Callable, on_s=on_s) -> torch.Tensor:
            return on_s(select, baselines.matmul(baselines.unit(features)))

        found |= {
            name: Side(partial(on_s, careful, s), check, loop, capturable=False),
            f"{name}, as published": Side(partial(on_s, published, s), check, loop, capturable=False),
            f"{name}, ours": Side(lambda ours=ours, prior=prior: ours(s, *prior, k), check, loop),
            f"{name}, whole": Side(partial(by_torch, careful), check, whole, capturable=False),
            f"{name}, as published, whole": Side(partial(by_torch, published), check, whole, capturable=False),
            f"{name}, whole, ours": Side(by_ours, check, whole),
            f"{name}, from keys": Side(
                lambda from_keys=from_keys, prior=prior: from_keys(features, *prior, k), check, whole
            ),
        }
    return found


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    s, sbar, _, tier = similarity(features, scores)
    s = s.contiguous()
    expected = greedy_select(s, scores, shape.kept, sbar=sbar, tier=tier, backend="reference")
    utility = sbar[:, None] / scores.mean(dim=1, keepdim=True) * scores
    one, one_utility, one_scores = baselines.one_or_batch(s, utility, scores)
    # Every pick reads its row of S, subtracts and takes two maxima.
    work = Work(3 * shape.batch * shape.kept * shape.num_tokens, 4 * shape.batch * shape.kept * shape.num_tokens)

    def loop(
        select: Callable, *prior: torch.Tensor, define: Callable, scores: tuple = (), leaves_out: str = ""
    ) -> Side:
        return Side(
            lambda: baselines.batched(shape.batch, select(one, *prior, shape.kept)),
            lambda order: gates.check_loop(order, features, define, *scores),
            work,
            leaves_out=leaves_out,
            capturable=False,
        )

    condense = {"define": gates.condense_definition, "scores": (utility,), "leaves_out": "scaling, tiers"}
    result = {
        "top-k": top_k_side(shape, features, scores),
        "ours": Side(
            lambda: torch.ops.condense.greedy_select(s, scores, shape.kept, sbar=sbar, tier=tier),
            lambda order: gates.equal("order", order, expected),
            work,
        ),
        "plain loop": loop(baselines.greedy_running_maximum, one_utility, **condense),
        "plain loop, as printed": loop(baselines.greedy_as_printed, one_utility, **condense),
        "CDPruner": loop(
            baselines.cdpruner, one_scores, define=gates.cdpruner_definition, scores=(scores,), leaves_out="text"
        ),
        **other_methods(shape, features, scores, s, work),
    }
    if shape.batch == 1 and shape.num_tokens in baselines.COMPILED:
        result["plain loop, compiled"] = loop(baselines.greedy_compiled, one_utility, **condense)
    return result


def test_greedy_select(shape_name, interleaved):
    interleaved("greedy_select", shape_name, sides)


if __name__ == "__main__":
    main("greedy_select", sides, SHAPES)
