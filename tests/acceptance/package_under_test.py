"""Which vicinal a process of its own tests: that of the process which started it, whichever is found first."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def use_package(folder: str, name: str = "vicinal") -> ModuleType:
    """Import the package that lies in a folder of any name, before anything else imports one of that name."""
    assert name not in sys.modules, f"{name} is imported already, from {sys.modules[name].__file__}"
    spec = importlib.util.spec_from_file_location(
        name, Path(folder) / "__init__.py", submodule_search_locations=[folder]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
