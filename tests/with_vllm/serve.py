"""A program of a user, python serve.py CHECKPOINT OPTIONS OUTPUT: num_tokens is an option, or in the environment."""

import json
import sys
from pathlib import Path

from engines import REQUESTS, engine, tokens

from condense_kernels.vllm import condensed


def main(checkpoint: str, options: dict, output: str) -> None:
    if "num_tokens" in options:
        options["hf_overrides"] = condensed(options.pop("num_tokens"))
    with engine(checkpoint, **options) as llm:
        Path(output).write_text(json.dumps(tokens(llm, REQUESTS)))


if __name__ == "__main__":  # the engine's processes import this file, too
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
