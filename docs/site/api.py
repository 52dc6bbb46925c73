"""The API reference: which names are on which page. tests/test_site.py holds it to what the package exports."""

import importlib
import inspect
from pathlib import Path

DOCS = Path(__file__).parents[1]

# docs/api/NAME.md: its title, its first words, and the names below condense_kernels in the order of their use. A
# module stands for all that is public in it.
PAGES = {
    "operators": (
        "Operators",
        "The functions of `condense_kernels` that score, pick, assign and merge tokens: shapes, dtypes and errors "
        "of every argument. Nearly all are operators of `torch.ops.condense`, too. [Conventions](../conventions.md) "
        "has the letters.",
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
        "What `condense_kernels` has around its operators: a layer, budgets, the way back to all tokens, budgets of "
        "crops, memory, compiling in advance.",
        [
            "Condense", "gather_tokens", "unmerge", "sizes", "split_budget", "varlen_budget", "VarlenBudget",
            "allocate_budget", "segment_topk", "segment_topk_indices", "bipartite_match", "merge_matrix",
            "workspace_bytes", "warm_up", "debug",
        ],
    ),
    "methods": (
        "Methods",
        "The published methods in `condense_kernels.methods`, each a function that begins with features, scores and "
        "keep. [One table](../methods.md) has them side by side.",
        [],
    ),
    "metrics": (
        "Metrics",
        "Numbers about kept tokens that need no model, and the papers' formulas of cost. [One table](../metrics.md) "
        "says what each is and which way is better.",
        ["metrics"],
    ),
    "models": (
        "Models",
        "`apply_condense` puts a transformers model on fewer visual tokens, and its handle takes that back. It "
        "needs the extra `models`; [how it is used](../models.md).",
        ["models.apply_condense", "models.CondenseHandle", "models.Report"],
    ),
    "adapters": (
        "Adapters",
        "Functions that other pruning libraries call as their own, a module for each library. "
        "[Adapters](../adapters.md) says which of their files takes which.",
        [f"adapters.{host}" for host in (
            "angelslim", "keep_list", "lightcompress", "llava", "tome", "uniprunebench", "visionzip", "vllm_evs",
        )],
    ),
    "testing": (
        "Testing",
        "Inputs, tolerances and comparisons with the reference, for libraries that embed the operators. Our own "
        "tests use the same.",
        ["testing"],
    ),
}  # fmt: skip

# The page that explains a name of the first two, where it is not docs/NAME.md, nor that of the name without _varlen.
EXPLAINED = {
    **dict.fromkeys(("condense", "Condensed", "split_budget", "workspace_bytes"), "select_and_merge"),
    **dict.fromkeys(("varlen_budget", "VarlenBudget"), "select_and_merge_varlen"),
    **dict.fromkeys(("global_similarity", "mean_similarity"), "similarity"),
    **dict.fromkeys(("Condense", "gather_tokens", "unmerge", "sizes"), "modules"),
    **dict.fromkeys(("allocate_budget", "segment_topk", "segment_topk_indices"), "segments"),
    "DensityPeaks": "dpc_knn",
    "debug": "debugging",
}


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


def explained(name: str) -> str:
    """The page with its equation, rules and examples."""
    if name in EXPLAINED:
        return EXPLAINED[name]
    return name if (DOCS / f"{name}.md").is_file() else name.removesuffix("_varlen")


def entry(page: str, name: str) -> str:
    text = f"::: {definition(name)}"
    if page in ("operators", "pieces"):
        text += f"\n\nEquations, rules and examples: [{explained(name)}](../{explained(name)}.md)"
    return text


def markdown(page: str) -> str:
    title, words, _ = PAGES[page]
    return "\n\n".join([f"# {title}", words, *(entry(page, name) for name in names_of(page))]) + "\n"


def anchors() -> dict[str, str]:
    """Of each function or class by its short name, as docstrings refer to it."""
    return {name.rpartition(".")[2]: definition(name) for page in PAGES for name in names_of(page)}
