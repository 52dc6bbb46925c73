from .op import attention_scores

__all__ = ["attention_scores"]
