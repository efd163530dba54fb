"""The marks that transformers' tests bear, so that --strict-markers knows them where those tests are read."""

from __future__ import annotations

import os

import pytest
from transformers_tests import VARIABLE

THEIRS = (
    "accelerate_tests",
    "all_flash_attn_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "is_training_test",
    "order",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(VARIABLE):
        for mark in THEIRS:
            config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
