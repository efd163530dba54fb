"""transformers' own common tests of models and configs, read from its source distribution: no wheel has them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

VARIABLE = "RECOLLECT_TRANSFORMERS_TESTS"
"""Environment variable: the folder ``tests`` of the source distribution of the transformers that is installed."""

PACKAGE = "transformers_common_tests"

# What the common tests import from folders that the source distribution leaves out. The two mixins bring tests of their
# own and nothing that the others need; the dictionary has arguments that every config takes, none at its default.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["RecollectModel"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


def problem() -> str:
    """Why the tests cannot be read, in one line; empty where they can."""
    if not (named := os.environ.get(VARIABLE)):
        return f"{VARIABLE} is not set: the folder tests of transformers' source distribution; make upstream fetches it"
    folder, installed = Path(named), version("transformers")
    if not (folder / "test_modeling_common.py").is_file():
        return f"{VARIABLE}: {folder} has no test_modeling_common.py; make upstream fetches a source distribution"
    about = folder.parent / "PKG-INFO"
    found = re.search(r"^Version: (\S+)$", about.read_text(encoding="utf-8"), re.M) if about.is_file() else None
    if found and found[1] != installed:
        return f"{VARIABLE}: {folder} is of transformers {found[1]}, but {installed} is installed; run make upstream"
    if importlib.util.find_spec("parameterized") is None:
        return "transformers' tests need parameterized: pip install parameterized, or make upstream"
    return ""


def load(name: str) -> ModuleType:
    """The module ``name`` among the tests, such as test_modeling_common."""
    if PACKAGE not in sys.modules:
        _package(PACKAGE, os.environ[VARIABLE])
        for path, what in LEFT_OUT.items():
            parent, _, leaf = path.partition(".")
            _package(f"{PACKAGE}.{parent}")
            module = sys.modules[f"{PACKAGE}.{parent}.{leaf}"] = ModuleType(f"{PACKAGE}.{parent}.{leaf}")
            vars(module).update(what)
    # One of them asks for transformers by the path of the source tree around it.
    with patch("transformers.utils.direct_transformers_import", lambda *_: importlib.import_module("transformers")):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _package(name: str, *folders: str) -> None:
    """Make a package importable whose modules lie in ``folders``."""
    made = sys.modules[name] = ModuleType(name)
    made.__path__ = list(folders)
