from .op import attention_scores_varlen

__all__ = ["attention_scores_varlen"]
