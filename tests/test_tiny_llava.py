"""The tiny LLaVA: its pictures and questions, its packed answers against transformers' own, and its table."""
