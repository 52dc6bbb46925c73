"""The flagship's definition: the stages' definitions in a row, in fp64."""

from ..assign.reference import assign
from ..greedy_select.reference import greedy_select
from ..merge.reference import merge
from ..similarity.reference import global_similarity, similarity
from .pipeline import Stages, compose

select_and_merge = compose(Stages(similarity, global_similarity, greedy_select, assign, merge))
