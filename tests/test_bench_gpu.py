"""The scripts for a GPU, as far as they run without one: they check in the interpreter and keep what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "bench" / "gpu"
CASE = "convolution, three taps, float32"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_kernels_are_checked_and_cases_kept(tmp_path: Path) -> None:
    out = tmp_path / "check-kernels.json"
    words = ("--device", "cpu", "--only", "three taps", "--out", str(out))
    done = run("check_kernels.py", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert set(record["cases"]) == {CASE, "convolution, three taps, bfloat16"}
    assert 0 < record["cases"][CASE]["gradients"] < 1e-4
    record["cases"][CASE]["gradients"] = 0.5
    out.write_text(json.dumps(record))
    again = run("check_kernels.py", *words)
    assert again.returncode == 1, "a case that is there is not measured again"
    assert again.stderr.strip() == f"differ from PyTorch's operations: {CASE}"
    assert f"| {CASE} | " in run("tables.py", str(tmp_path)).stdout


def test_tables_put_ours_beside_full_attention(tmp_path: Path) -> None:
    timed = {"ms": 4.0, "graph_ms": 2.0, "peak_bytes": 1 << 21}
    slow = {"ms": 6.0, "peak_bytes": 1 << 20, "graph_failed": "waits"}
    floor = {f"{what}_{by}_ms": 1.0 for what in ("forward", "both") for by in ("bytes", "products")}
    cases = {
        "ceilings": {"bytes_s": 1.0},
        "floor 1024": floor,
        "hax 1024": {"forward": timed, "both": timed},
        "flash 1024": {"forward": slow, "both": slow},
        "flash, step 1024": {"failed": "out of memory"},
    }
    record = {"keys": 128, "heads": 8, "width": 64, "dtype": "bfloat16", "device": "one H100", "torch": "2.11"}
    (tmp_path / "attention.json").write_text(json.dumps({**record, "commit": "abc", "cases": cases}))
    printed = run("tables.py", str(tmp_path)).stdout
    assert "| hax | 2.000 |" in printed
    assert "| flash | 6.000* |" in printed
    assert "| flash / hax | 3.0 |" in printed
    assert "| flash | failed |" in printed
    assert "one H100, torch 2.11, commit abc" in printed


@pytest.mark.parametrize(
    ("script", "says"), [("kernels.sh", "usage: bench/gpu/kernels.sh OUT"), ("train_rows.sh", "usage")]
)
def test_a_script_without_a_folder_says_how_it_is_used(script: str, says: str) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert says in done.stderr
