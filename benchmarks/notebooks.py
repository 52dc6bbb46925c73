"""Run the notebooks of docs/notebooks in fresh kernels, and write their outputs into them: ``make notebooks``.

What is written depends on nothing but what the cells print and draw: no times, no paths, no versions of the machine. So
a second run changes the pictures and the cells that are tagged "varies" at most.
"""

import argparse
import base64
import io
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("tags", "alt")  # of a cell's metadata; alt is the text of its picture
TIMEOUT = 600  # seconds a cell


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in that folder. A cell that raises ends it, with its traceback."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return normalised(client.execute())


def normalised(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT if key in cell.metadata})
        if cell.cell_type == "code":  # bars of loading are no result
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = nbformat.from_dict({"image/png": smaller(output.data["image/png"])})
                output.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    return notebook


def smaller(png: str) -> str:
    """The picture in 256 colours, which takes a third, and without the fields that name versions."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    written = io.BytesIO()
    image.save(written, format="png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and the last line's value, but no pictures and no warnings."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.(\d+))?(?![\w.]*\w)")


def differs(found: str, stored: str, units: float = 2) -> bool:
    """Whether a text is another one; a number with decimals may be off by so many of its last place."""
    if NUMBER.sub("0", found).split() != NUMBER.sub("0", stored).split():
        return True
    pairs = zip(NUMBER.finditer(found), NUMBER.finditer(stored), strict=True)
    return any(
        abs(float(one[0]) - float(other[0])) > (units * 10.0 ** -len(other[1]) * 1.001 if other[1] else 0)
        for one, other in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="run the notebooks, and write their outputs into them")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of docs/notebooks")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path, path.parent)
        nbformat.write(notebook, path)
        print(f"wrote {path}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
