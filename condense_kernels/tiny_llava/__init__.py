"""A LLaVA of 0.6 million parameters that answers questions about small pictures, and everything that it was trained on.

It is there to see what condensation does to answers, without any download: what ``--model tiny`` means.
"""

from pathlib import Path

KINDS = ("digit of color", "color of digit", "digit at place", "count", "presence", "background")  # of questions
PATH = Path(__file__).parent / "weights"  # a Hugging Face folder, for AutoModelForImageTextToText and AutoProcessor
