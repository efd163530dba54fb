"""``recollect bench explain``: what is said is what dispatch does."""

from __future__ import annotations

import pytest
import torch

from recollect.cli import main
from recollect.core.errors import ConfigError, RecollectError
from recollect.eval.bench.explain import KERNELS, explain
from recollect.ops import dispatch


def paths(**options: object) -> dict[str, str]:
    return {row.what: row.path for row in explain(**options)}  # pyright: ignore[reportArgumentType]


def test_a_cpu_runs_compiled_loops_and_streams_sparse_attention() -> None:
    found = paths()
    assert {found[what] for what in KERNELS} == {"numba"}
    assert found["HAX attention (64 hashed, 64 selected)"] == "streaming"
    assert found["HAX attention (64 hashed, 64 selected), one more token"] == "decode"
    assert found["full attention"] == "sdpa"


def test_the_length_and_the_type_of_tensors_count() -> None:
    assert paths(dtype="bfloat16")["HAX attention (64 hashed, 64 selected)"] == "tiled"
    assert paths(dtype="bfloat16", length=100)["HAX attention (64 hashed, 64 selected)"] == "dense"


def test_an_operation_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", "triton")
    rows = {row.what: row for row in explain()}
    name = "recurrent cells (GRU, LSTM)"
    assert rows[name].path == "torch"
    assert rows[name].why == "no triton kernel for it"


def test_every_kernel_is_named_as_its_module() -> None:
    x = torch.zeros(1)
    for name in KERNELS.values():
        assert dispatch.kernels(name, x) is not None


@pytest.mark.parametrize("words", [["bench", "explain"], ["bench", "--explain"]])
def test_the_command_prints_the_table(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--length", "300"]) == 0
    printed = capsys.readouterr().out
    assert "cpu, float32, 300 positions" in printed
    assert all(what in printed for what in KERNELS)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown; give one of float32"):
        explain(dtype="int8")
    with pytest.raises(ConfigError, match="length must be at least 1, got 0"):
        explain(length=0)
    if not torch.cuda.is_available():
        with pytest.raises(RecollectError, match="cuda"):
            explain("cuda")
