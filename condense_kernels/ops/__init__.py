"""The operators, a folder each: op.py is the contract, reference.py the definition, kernel.py the Triton kernels.

The data's way, with the equations of CondenseVLM (section 3):

    queries   attention_scores  how much attention each token gets, a score to bring along  Eq. 1
    keys      similarity        cosines s of all pairs, their mean, each token's sum        Eq. 3
    scores    greedy_select     anchors by score, then background by that sum               Eq. 2, 4
    grid      assign            every other token to the kept one most similar and near     Eq. 6, 7
    features  merge             each cluster into its score-weighted mean                   Eq. 8

select_and_merge is the last four in a row. What other pruning methods need besides (docs/embedding.md):

    s         dpp_select        tokens that span the largest volume
    c         coverage_select   tokens that cover the rest, or a text
    s         dpc_knn           tokens that are centres of clusters
    features  gather_merge      weighted sums of listed tokens

Names that end in _varlen are the same for images of different sizes. Their C++ kernels are in csrc/, under the same
names.
"""

from .assign import assign as assign
from .assign import assign_varlen as assign_varlen
from .attention_scores import attention_scores as attention_scores
from .attention_scores_varlen import attention_scores_varlen as attention_scores_varlen
from .coverage_select import coverage_select as coverage_select
from .coverage_select import coverage_select_varlen as coverage_select_varlen
from .dpc_knn import DensityPeaks as DensityPeaks
from .dpc_knn import dpc_knn as dpc_knn
from .dpc_knn import dpc_knn_varlen as dpc_knn_varlen
from .dpp_select import dpp_select as dpp_select
from .dpp_select import dpp_select_varlen as dpp_select_varlen
from .gather_merge import gather_merge as gather_merge
from .greedy_select import greedy_select as greedy_select
from .greedy_select import greedy_select_varlen as greedy_select_varlen
from .merge import merge as merge
from .merge import merge_varlen as merge_varlen
from .select_and_merge import Condensed as Condensed
from .select_and_merge import select_and_merge as select_and_merge
from .select_and_merge import workspace_bytes as workspace_bytes
from .select_and_merge_varlen import select_and_merge_varlen as select_and_merge_varlen
from .similarity import global_similarity as global_similarity
from .similarity import mean_similarity as mean_similarity
from .similarity import similarity as similarity
from .similarity import similarity_varlen as similarity_varlen
