"""The API reference: which names are on which page. tests/test_site.py holds it to what the package exports."""

import importlib
import inspect

# docs/api/NAME.md: its title, its first words, and the names below condense_kernels in the order of their use. A
# module stands for all that is public in it.
PAGES = {
    "operators": (
        "Operators",
        "In `condense_kernels`, and nearly all in `torch.ops.condense`. What each computes is on its own page.",
        [
            "condense", "select_and_merge", "select_and_merge_varlen", "attention_scores", "attention_scores_varlen",
            "similarity", "similarity_varlen", "global_similarity", "mean_similarity", "greedy_select",
            "greedy_select_varlen", "assign", "assign_varlen", "merge", "merge_varlen", "dpp_select",
            "dpp_select_varlen", "coverage_select", "coverage_select_varlen", "dpc_knn", "dpc_knn_varlen",
            "gather_merge", "Condensed", "DensityPeaks",
        ],
    ),
    "pieces": (
        "Around the operators",
        "In `condense_kernels`: a layer, budgets, the way back, the rules of crops, memory, compiling in advance.",
        [
            "Condense", "gather_tokens", "unmerge", "sizes", "split_budget", "varlen_budget", "VarlenBudget",
            "allocate_budget", "segment_topk", "segment_topk_indices", "bipartite_match", "merge_matrix",
            "workspace_bytes", "warm_up", "debug",
        ],
    ),
    "methods": ("Methods", "In `condense_kernels.methods`; [one table](../methods.md) has them side by side.", []),
    "metrics": ("Metrics", "With their equations in [one table](../metrics.md).", ["metrics"]),
    "models": (
        "Models",
        "Of the extra `models`: [how it is used](../models.md).",
        ["models.apply_condense", "models.CondenseHandle", "models.Report"],
    ),
    "adapters": (
        "Adapters",
        "A module a host: [which file takes which](../adapters.md).",
        [f"adapters.{host}" for host in (
            "angelslim", "keep_list", "lightcompress", "llava", "tome", "uniprunebench", "visionzip", "vllm_evs",
        )],
    ),
    "testing": ("Testing", "For libraries that embed the operators, as our own tests use it.", ["testing"]),
}  # fmt: skip


def names_of(page: str) -> list[str]:
    if page != "methods":
        return PAGES[page][2]
    from condense_kernels.methods import METHODS

    return [f"methods.{name}" for name in (*sorted(METHODS), "packed", "pdrop_budgets", "sparsevlm_scores")]


def definition(name: str) -> str:
    """Where mkdocstrings finds it: a name of condense_kernels can be that of a folder of condense_kernels.ops, too."""
    value = importlib.import_module("condense_kernels")
    for part in name.split("."):
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(f"{value.__name__}.{part}")
    if inspect.ismodule(value):
        return value.__name__
    written = inspect.unwrap(value)
    return f"{written.__module__}.{written.__qualname__}"


def markdown(page: str) -> str:
    title, words, _ = PAGES[page]
    return "\n\n".join([f"# {title}", words, *(f"::: {definition(name)}" for name in names_of(page))]) + "\n"


def anchors() -> dict[str, str]:
    """Of each function or class by its short name, as docstrings refer to it."""
    return {name.rpartition(".")[2]: definition(name) for page in PAGES for name in names_of(page)}
