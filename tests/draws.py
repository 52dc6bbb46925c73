"""Which operators fuzz.py and soak.py draw, and call i of a run."""

from collections.abc import Callable

import drawn
import drawn_packed
from drawn import Call, Dice

DRAWS: dict[str, Callable[[Dice], Call]] = {
    draw.__name__: draw
    for draw in (
        drawn.similarity,
        drawn.greedy_select,
        drawn.greedy_select_from_keys,
        drawn.assign,
        drawn_packed.assign_from_keys,
        drawn.merge,
        drawn.merge_backward,
        drawn.gather_merge,
        drawn.attention_scores,
        drawn.dpp_select,
        drawn.coverage_select,
        drawn.dpc_knn,
        drawn.select_and_merge,
        drawn.select_and_merge_given_the_mean,
        drawn_packed.select_and_merge_varlen,
        drawn_packed.greedy_select_varlen,
        drawn_packed.greedy_select_from_keys_varlen,
        drawn_packed.assign_varlen,
        drawn_packed.merge_varlen,
        drawn_packed.similarity_varlen,
        drawn_packed.dpp_select_varlen,
        drawn_packed.coverage_select_varlen,
        drawn_packed.dpc_knn_varlen,
    )
}


def draw(seed: int, index: int, names: list[str] | None = None) -> Call:
    """Call ``index`` of a run. It depends on nothing that was drawn before."""
    dice = Dice(f"{seed}/{index}")
    return DRAWS[dice.one(*(names or DRAWS))](dice)
