"""For old releases of kernels, which look for a folder of the kernel's name: the package is one folder up."""

import importlib.util
import sys
from pathlib import Path

NAME = "@ID@"

if NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parent.parent / "__init__.py")
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[NAME])
    except BaseException:
        del sys.modules[NAME]
        raise
globals().update({name: value for name, value in vars(sys.modules[NAME]).items() if not name.startswith("__")})
