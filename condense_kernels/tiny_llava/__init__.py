"""A LLaVA of 0.6 million parameters that answers questions about small pictures, and everything that it was trained on.

It is there to see what condensation does to answers, without any download: what ``--model tiny`` means.
"""

from pathlib import Path

PATH = Path(__file__).parent / "weights"  # a Hugging Face folder, for AutoModelForImageTextToText and AutoProcessor
