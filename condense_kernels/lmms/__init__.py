"""lmms-eval on K visual tokens: its models by entry point, the paper's tables as its configs, and tasks of our own.

Nothing here imports lmms-eval before it is asked to: what reads its results runs without it.
"""

VERSION = "0.7.3"  # of lmms-eval, which all of this was written for and tried on
PREFIX = "condense_"  # of our models' names
STOCK = {  # lmms-eval's classes that run a model of transformers, and the families (docs/models.md) that each loads
    "gemma3": ("gemma3",),
    "gemma4": ("gemma4",),
    "glm4v": ("glm4v", "glm4v_moe"),
    "internvl_hf": ("internvl",),
    "llava_hf": ("llava", "llava_next", "llava_onevision"),
    "mistral3_vl": ("mistral3",),
    "qwen2_vl": ("qwen2_vl",),
    "qwen2_5_vl": ("qwen2_5_vl",),
    "qwen3_vl": ("qwen3_vl", "qwen3_vl_moe"),
    "qwen3_5": ("qwen3_5", "qwen3_5_moe"),
}
