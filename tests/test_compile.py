"""Training through ``torch.compile`` computes what it computes without. The backends here generate no code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.cli import main
from recollect.core.errors import ConfigError, RunError
from recollect.core.layer import LayerConfig
from recollect.layers.attention import Attention
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention
from recollect.models.backbone import Backbone
from recollect.ops import dispatch
from recollect.ops.patterns import Full, KeySelection, Lsh
from recollect.tasks import JointRecall
from recollect.train import checkpoint as ckpt
from recollect.train.compilation import as_written, check_compile
from recollect.train.loop import train
from recollect.train.metrics import read_metrics
from recollect.train.recall import RecallConfig
from recollect.train.run import RunConfig, TrainConfig

# What torch's own tracer does while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

MAMBA2 = Mamba2.Config(8, d_state=4, d_head=4)
LAYERS: dict[str, LayerConfig] = {
    "mamba2": MAMBA2,
    "attention": Attention.Config(8, n_heads=2, window=8),
    "hax": HAX.Config(8, mixer=MAMBA2, patterns=(Lsh(4, n_bits=2), KeySelection(4)), d_key=4),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recall_run(layer: LayerConfig, steps: int = 3) -> RunConfig:
    task = JointRecall.Config(n_contexts=(2, 2), n_keys=(3, 3), n_values=5)
    problem = RecallConfig(
        task, Backbone.Config(8, layers=(layer,)), batch_size=2, valid_samples=1, test_samples=1, embedding_std=0.5
    )
    train = TrainConfig(steps=steps, lr=3e-3, warmup_steps=0, log_every=1, eval_every=2, checkpoint_every=2)
    return RunConfig("test", "recall", "row", 0, problem, train)


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_run_gives_the_same_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # aot_eager would trace backward too, but foretells other strides of softplus' gradient than the CPU's code gives.
    backend = "aot_eager" if name == "attention" else "eager"
    monkeypatch.setattr("recollect.train.compilation.BACKEND", backend)
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    run = recall_run(LAYERS[name])
    plain = train(run, tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    compiled = train(run, tmp_path / "compiled", compile="default")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, "one graph and no break"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    a, b = (ckpt.load(tmp_path / n / "checkpoints", "step-00000003").tensors for n in ("plain", "compiled"))
    assert a.keys() == b.keys(), "a checkpoint does not tell"
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5, msg=key)
    assert compiled["metrics"].keys() == plain["metrics"].keys()


def test_numba_kernels_give_way_to_operations_that_can_be_traced() -> None:
    assert dispatch.explain_kernels(torch.zeros(1)).path == "numba"

    @torch.compile(backend="eager", fullgraph=True)
    def path(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if dispatch.explain_kernels(x).path == "torch" else 0)

    assert path(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("length", [40, 257])
def test_what_follows_from_the_data_stays_out_of_the_graph(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above ``DENSE_SOURCES`` sparse attention runs in tiles, whose number the keys decide."""
    monkeypatch.setattr(dispatch, "KERNELS", "torch")  # also what the tracer leaves to eager execution
    model = SparseAttention.Config(8, patterns=(Lsh(4, n_bits=2), KeySelection(4)), d_key=4).build()
    x = torch.randn(1, length, 8)
    explained = torch._dynamo.explain(lambda x: model(x).y)(x)
    reasons = {str(each.reason).splitlines()[0] for each in explained.break_reasons}
    assert len(reasons) == (length > dispatch.DENSE_SOURCES), reasons
    assert all("disable" in reason for reason in reasons), "nothing but the tiles"
    full = SparseAttention.Config(8, patterns=(Full(),), d_key=4).build()
    assert torch._dynamo.explain(lambda x: full(x).y)(x).graph_count == 1


def test_tritons_attention_is_called_between_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it is picked whether or not the layer around it is compiled."""
    model = SparseAttention.Config(8, patterns=(Lsh(4, n_bits=2), KeySelection(4)), d_key=4).build()
    x = torch.randn(1, dispatch.DENSE_SOURCES + 9, 8)
    plain = model(x).y

    def triton(*_: Any, **__: Any) -> dispatch.Choice:
        return dispatch.Choice("triton", "as on a GPU")

    monkeypatch.setattr(dispatch, "explain_sparse_attention", triton)
    monkeypatch.setattr(dispatch, "KERNELS", "triton")
    compiled = torch.compile(lambda x: model(x).y, backend="eager")
    torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-5)


def test_evaluation_runs_the_code_as_written() -> None:
    seen: list[bool] = []

    class Probe(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.compiler.is_compiling())
            return x

    probe = Probe()
    probe.compile(backend="eager")
    with as_written("default"):
        probe(torch.zeros(1))
    assert seen == [False]


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise ValueError("no C++ compiler\nwas found")

    monkeypatch.setattr("recollect.train.compilation.BACKEND", broken)
    with pytest.raises(RunError, match=r"--compile default failed .*no C\+\+ compiler.*with --compile off") as caught:
        train(recall_run(MAMBA2), tmp_path, compile="default")
    assert "\n" not in str(caught.value)


def test_graphs_need_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "toy_problem:faceoff", "--row", "good", "--out", str(tmp_path / "run"), "--compile", "graphs"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs a GPU" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="unknown way to compile 'fast'"):
        check_compile("fast", torch.device("cpu"))
