"""The published ways from N visual tokens to K, one short file each, all with one signature:

    method(features [B, N, D], scores [B, N], keep, *, grid=None, keys=None, generator=None, ...) -> Condensed

METHODS has a card of each by name: its source, what it is built on, which scores it reads. docs/methods.md is a table.
"""

from ..ops.select_and_merge import Condensed as Condensed
from .apet import farthest_points as farthest_points
from .cdpruner import cdpruner as cdpruner
from .condensevlm import condensevlm as condensevlm
from .condensevlm import condensevlm_anchors as condensevlm_anchors
from .condensevlm import condensevlm_attention as condensevlm_attention
from .condensevlm import condensevlm_cosine as condensevlm_cosine
from .condensevlm import condensevlm_suppressed as condensevlm_suppressed
from .dart import dart as dart
from .divprune import divprune as divprune
from .fastervlm import fastervlm as fastervlm
from .fastervlm import topk_merge as topk_merge
from .fastv import fastv as fastv
from .fastv import reverse_fastv as reverse_fastv
from .fastv import window_fastv as window_fastv
from .ficoco import ficoco_v as ficoco_v
from .flashvid import flashvid as flashvid
from .globalcom2 import globalcom2 as globalcom2
from .hired import hired as hired
from .idpruner import idpruner as idpruner
from .importance import importance_redundancy as importance_redundancy
from .mmtok import mmtok as mmtok
from .mustdrop import mustdrop as mustdrop
from .otprune import otprune as otprune
from .packed import packed as packed
from .pdrop import pdrop as pdrop
from .pdrop import pdrop_budgets as pdrop_budgets
from .prumerge import prumerge as prumerge
from .random_tokens import random as random
from .random_tokens import random_merge as random_merge
from .rediprune import rediprune as rediprune
from .registry import METHODS as METHODS
from .registry import Card as Card
from .scope import scope as scope
from .sparsevlm import sparsevlm as sparsevlm
from .sparsevlm import sparsevlm_scores as sparsevlm_scores
from .tome import tome as tome
from .uniform import pooling as pooling
from .uniform import uniform as uniform
from .visionzip import visionzip as visionzip
from .vlm_pruner import vlm_pruner as vlm_pruner

# Names that they are known by as well.
ALIASES = {"topk": "fastervlm", "maxmin": "divprune"}
