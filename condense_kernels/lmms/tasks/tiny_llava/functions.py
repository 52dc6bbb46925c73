"""What tiny_llava.yaml names."""

from pathlib import Path

from PIL import Image


def picture(doc):
    return [Image.open(Path(__file__).parent / doc["picture"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def scores(doc, results):
    right = float(results[0].strip() == doc["answer"])
    return {"all": right, doc["kind"]: right}


def mean(results):
    return sum(results) / len(results) if results else float("nan")
