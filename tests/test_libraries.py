"""Kernels of installed packages: what is handed to them and what is made of their answers, with stand-ins for them.

The stand-ins (``stand_in_libraries``) compute what the packages say, one position after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.eval.bench.explain import explain
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.ops import dispatch, libraries
from recollect.ops.selective_scan import selective_scan, selective_scan_reference
from recollect.ops.ssd import ssd, ssd_reference
from stand_in_libraries import CALLS, chunk_simple_gla, install, mamba_chunk_scan_combined, put, selective_scan_fn

pytestmark = pytest.mark.usefixtures("poisoned_empty", "gpu")
HALF = {torch.bfloat16: 4e-2, torch.float16: 4e-3}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors count as a GPU's that may multiply in TF32 under a Triton that compiles rightly; nothing is installed."""
    monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)
    monkeypatch.setattr(libraries, "tf32_allowed", lambda: True)
    monkeypatch.setattr(libraries, "wrong_backward", lambda _: False)
    install(monkeypatch)
    yield
    libraries.lookup.cache_clear()


def dual(length: int, groups: int = 1) -> dict[str, Any]:
    """Everything ``ssd`` takes."""
    dt = torch.rand(2, length, 4) * 0.1 + 1e-3
    dt[:, length // 3] = 50
    reset = torch.rand(2, length) < 0.2
    reset[0, 0], reset[1, 0] = True, False
    return {
        "x_BLHP": torch.randn(2, length, 4, 3),
        "dt_BLH": dt,
        "A_H": -torch.linspace(0.1, 16, 4),
        "B_BLGN": torch.randn(2, length, groups, 5),
        "C_BLGN": torch.randn(2, length, groups, 5),
        "D_H": torch.randn(4),
        "h_init": torch.randn(2, 4, 3, 5),
        "reset": reset,
    }


def scanned(length: int) -> dict[str, Any]:
    """What ``selective_scan`` takes, without what the libraries refuse."""
    return {
        "u_BLE": torch.randn(2, length, 6),
        "dt_BLE": torch.rand(2, length, 6) + 1e-3,
        "A_EN": -torch.rand(6, 3) * 4 - 0.1,
        "B_BLN": torch.randn(2, length, 3),
        "C_BLN": torch.randn(2, length, 3),
        "D_E": torch.randn(6),
    }


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def run(op: Callable[..., tuple[Tensor, ...]], given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of all of them by every differentiable input."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v.is_floating_point()}
    outs = op(**{k: leaves.get(k, v) for k, v in given.items()}, **options)
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves.values(), strict=True))
    found = {f"output {i}": out for i, out in enumerate(outs)}
    return found | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 13])
def test_mambas_dual_equals_reference(length: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    given = dual(length, groups)
    cases = [given, without(given, "reset"), without(given, "h_init"), without(given, "reset", "h_init", "D_H")]
    for case in cases:
        assert_near(run(ssd, case), run(ssd_reference, case))
    assert ["mamba_chunk_scan_combined"] * len(cases) == CALLS


@pytest.mark.parametrize("resets", ["none", "all", "at the first position", "at the last"])
def test_a_reset_empties_the_state_before_its_position(resets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    given = dual(6)
    at = {"none": [], "all": list(range(6)), "at the first position": [0], "at the last": [5]}[resets]
    given["reset"] = torch.zeros(2, 6, dtype=torch.bool)
    given["reset"][:, at] = True
    found = run(ssd, given)
    assert_near(found, run(ssd_reference, given))
    assert bool(found["gradient of h_init"].any()) == (0 not in at)
    assert CALLS


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 13])
def test_flas_dual_equals_reference(length: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "fla")
    given = without(dual(length, groups), "reset")
    cases = [given, without(given, "h_init"), without(given, "D_H")]
    for case in cases:
        assert_near(run(ssd, case), run(ssd_reference, case))
    assert ["chunk_simple_gla"] * len(cases) == CALLS


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["mamba-ssm", "fla"])
def test_half_precision_is_multiplied_as_it_is(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps stay in float32, the states too."""
    install(monkeypatch, name)
    given = without(dual(13), "reset")
    given["dt_BLH"] = given["dt_BLH"].clamp(max=1)
    given |= {k: given[k].to(dtype) for k in ("x_BLHP", "B_BLGN", "C_BLGN")}
    found = run(ssd, given)
    assert found["output 0"].dtype == found["output 1"].dtype == torch.float32
    wanted = run(ssd_reference, given)
    assert_near(found, wanted, HALF[dtype])
    assert_near(found, {"output 1": wanted["output 1"]}, 1e-5 if name == "mamba-ssm" else HALF[dtype])
    assert len(CALLS) == 1


def test_products_of_two_types_are_taken_in_the_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    given = dual(5)
    given["x_BLHP"] = given["x_BLHP"].bfloat16()
    assert_near(run(ssd, given), run(ssd_reference, given), 1e-2)
    exact = ssd_reference(**given)
    torch.testing.assert_close(ssd(**given), exact, rtol=1e-4, atol=1e-5)
    assert len(CALLS) == 2


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_mambas_scan_equals_reference(length: int, softplus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the last state too, which ``selective_scan_fn`` itself lacks."""
    install(monkeypatch, "mamba-ssm")
    given = scanned(length)
    for case in (given, without(given, "D_E")):
        assert_near(
            run(selective_scan, case, softplus=softplus), run(selective_scan_reference, case, softplus=softplus)
        )
        with torch.no_grad():
            y, last = selective_scan(**case, softplus=softplus)
            wanted = selective_scan_reference(**case, softplus=softplus)
        torch.testing.assert_close((y, last), wanted, rtol=1e-5, atol=1e-5)
        for state in (last, selective_scan(**{k: v.requires_grad_() for k, v in case.items()})[1]):
            assert state.untyped_storage().nbytes() == 4 * state.numel(), "it would keep every position's output alive"
    assert CALLS == ["selective_scan_fn"] * 6


def test_the_scan_is_in_float32_whatever_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    given = scanned(9)
    given |= {k: given[k].bfloat16() for k in ("u_BLE", "B_BLN", "C_BLN")}
    found = run(selective_scan, given, softplus=True)
    assert found["output 0"].dtype == found["output 1"].dtype == torch.float32
    assert_near(found, run(selective_scan_reference, given, softplus=True), 1e-2)
    exact = selective_scan_reference(**given, softplus=True)
    torch.testing.assert_close((found["output 0"], found["output 1"]), exact, rtol=1e-5, atol=1e-5)
    assert len(CALLS) == 1


def test_what_is_asked_is_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dispatch.Asked] = []

    def noted(_op: str, call: dispatch.Asked) -> dispatch.Choice:
        asked.append(call)
        return dispatch.Choice("torch", "noted")

    monkeypatch.setattr(dispatch, "explain_library", noted)
    given = dual(5, groups=2)
    given["x_BLHP"] = given["x_BLHP"].bfloat16()
    ssd(**given)
    ssd(**without(given, "reset", "h_init") | {"A_H": given["A_H"].requires_grad_()})
    whole = dispatch.Asked(torch.device("cpu"), torch.float32, 2, 5, 4, 3, 5, 2, reset=True, h_init=True)
    assert asked == [whole, whole._replace(reset=False, h_init=False, gradients=True)]
    h = torch.randn(2, 6, 3, requires_grad=True)
    selective_scan(**scanned(7), h_init=h, reset=torch.zeros(2, 7, dtype=torch.bool))
    with torch.no_grad():
        selective_scan(**scanned(7), h_init=h)
    whole = dispatch.Asked(
        torch.device("cpu"), torch.float32, 2, 7, 1, 6, 3, 1, reset=True, h_init=True, gradients=True
    )
    assert asked[2:] == [whole, whole._replace(reset=False, gradients=False)]


ASKED = dispatch.Asked(torch.device("cuda"), torch.bfloat16, 2, 1000, 4, 64, 128, gradients=True)
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "float64, mamba": ("ssd", "mamba-ssm", {"dtype": torch.float64}, "float64: it takes bfloat16"),
    "float64, fla": ("ssd", "fla", {"dtype": torch.float64}, "float64: it takes bfloat16"),
    "float64, scan": ("selective_scan", "mamba-ssm", {"dtype": torch.float64}, "float64: it takes bfloat16"),
    "states, mamba": ("ssd", "mamba-ssm", {"d_state": 257}, "257 states: at most 256"),
    "states, fla": ("ssd", "fla", {"d_state": 257}, "257 states: at most 256"),
    "states, scan": ("selective_scan", "mamba-ssm", {"d_state": 257}, "257 states: at most 256"),
    "resets, fla": ("ssd", "fla", {"reset": True}, "resets: "),
    "resets, scan": ("selective_scan", "mamba-ssm", {"reset": True}, "resets: its scan cannot empty"),
    "a first state, scan": ("selective_scan", "mamba-ssm", {"h_init": True}, "an initial state: "),
    "heads, mamba": ("ssd", "mamba-ssm", {"heads": 65_536, "batch": 1, "length": 1, "width": 1}, "65,536 heads: "),
    "heads, fla": ("ssd", "fla", {"heads": 32_768, "width": 1, "length": 1}, "65,536 heads in all: "),
    "chunks, fla": (
        *("ssd", "fla", {"length": 64 * 65_535 + 1, "batch": 1, "heads": 1, "width": 1}),
        "65,536 chunks: ",
    ),
    "channels, scan": ("selective_scan", "mamba-ssm", {"width": 65_536, "length": 1}, "65,536 channels: "),
    "numbers, mamba": ("ssd", "mamba-ssm", {"length": 2**22}, "numbers in x: "),
    "numbers of states, mamba": (
        *("ssd", "mamba-ssm", {"batch": 65_535, "length": 1, "d_state": 256}),
        "numbers in the states of chunks: ",
    ),
    "numbers of products, mamba": ("ssd", "mamba-ssm", {"length": 2**21, "groups": 4, "batch": 1}, "products C B"),
    "numbers of keys, fla": ("ssd", "fla", {"length": 2**21, "batch": 2, "width": 1}, "numbers in the keys of all"),
    "numbers of states, fla": ("ssd", "fla", {"length": 2**18, "width": 128, "batch": 8}, "numbers in the states"),
    "numbers, scan": ("selective_scan", "mamba-ssm", {"width": 2**10, "length": 2**20 - 100}, "numbers in u: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_cannot_do_is_refused_with_a_reason(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm", "fla")
    op, name, changes, reason = REFUSED[case]
    assert libraries.refusal(op, name, ASKED._replace(**changes)).find(reason) >= 0
    assert libraries.refusal(op, name, ASKED) == ""


def test_positions_that_read_the_last_state_count(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    asked = ASKED._replace(width=2**10, length=2**20 - 100)
    assert libraries.refusal("selective_scan", "mamba-ssm", asked)
    assert not libraries.refusal("selective_scan", "mamba-ssm", asked._replace(gradients=False))


def test_float32_needs_leave_to_multiply_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm", "fla")
    asked = ASKED._replace(dtype=torch.float32)
    monkeypatch.setattr(libraries, "tf32_allowed", lambda: False)
    assert all("TF32" in libraries.refusal("ssd", name, asked) for name in dispatch.LIBRARIES)
    assert not libraries.refusal("selective_scan", "mamba-ssm", asked), "no products of matrices"
    assert not any(libraries.refusal("ssd", name, ASKED) for name in dispatch.LIBRARIES)


def test_leave_for_tf32_is_pytorchs_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert libraries.tf32_allowed() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic_algorithms_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm", "fla")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for op, name in (("ssd", "mamba-ssm"), ("ssd", "fla"), ("selective_scan", "mamba-ssm")):
        assert "deterministic algorithms are asked for" in libraries.refusal(op, name, ASKED)


@pytest.mark.parametrize(
    ("capability", "version", "wrong"),
    [
        ((9, 0), "3.3.1", False),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.6.0+git1", True),
        ((9, 0), "3.7.0", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ],
)
def test_flas_gradients_are_not_taken_where_triton_miscompiles_them(
    capability: tuple[int, int], version: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    install(monkeypatch, "fla")
    put(monkeypatch, "triton", __version__=version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ("gradients: Triton" in libraries.refusal("ssd", "fla", ASKED)) == wrong
    assert not libraries.refusal("ssd", "fla", ASKED._replace(gradients=False))


def newer(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None) -> Tensor:
    raise AssertionError("never called")


def older(
    q: Any, k: Any, v: Any, g: Any, scale: Any, initial_state: Any, output_final_state: Any, head_first: Any = True
) -> None:
    raise AssertionError("never called")


def test_another_version_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libraries.refusal("ssd", "mamba-ssm", ASKED) == "not installed"
    install(monkeypatch)
    put(monkeypatch, "mamba_ssm.ops.triton.ssd_combined")
    assert libraries.refusal("ssd", "mamba-ssm", ASKED) == "has no mamba_chunk_scan_combined: another version"
    install(monkeypatch)
    put(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=newer)
    lacks = "mamba_chunk_scan_combined takes no initial_states, seq_idx, return_final_states: another version"
    assert libraries.refusal("ssd", "mamba-ssm", ASKED) == lacks
    install(monkeypatch)
    put(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=older)
    assert libraries.refusal("ssd", "fla", ASKED) == "chunk_simple_gla takes heads before time: too old"
    assert libraries.refusal("selective_scan", "fla", ASKED) == "has no kernel for it"


def test_an_import_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "mamba_ssm")
    reason = libraries.refusal("ssd", "mamba-ssm", ASKED)
    assert reason.startswith("cannot be imported: ModuleNotFoundError: ")
    install(monkeypatch)
    put(monkeypatch, "mamba_ssm")

    def broken(_name: str) -> None:
        raise OSError("undefined symbol\nin selective_scan_cuda")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    expected = "cannot be imported: OSError: undefined symbol in selective_scan_cuda"
    assert libraries.refusal("ssd", "mamba-ssm", ASKED) == expected


def test_the_first_that_can_is_taken_and_every_reason_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm", "fla")
    assert dispatch.explain_library("ssd", ASKED).path == "mamba-ssm"
    monkeypatch.setattr(dispatch, "LIBRARIES", ("fla", "mamba-ssm"))
    assert dispatch.explain_library("ssd", ASKED).path == "fla"
    assert dispatch.explain_library("ssd", ASKED._replace(reset=True)).path == "mamba-ssm"
    assert dispatch.explain_library("selective_scan", ASKED).path == "mamba-ssm"
    neither = dispatch.explain_library("ssd", ASKED._replace(d_state=300))
    assert neither == ("torch", "fla: 300 states: at most 256; mamba-ssm: 300 states: at most 256")
    install(monkeypatch, "fla")
    assert dispatch.explain_library("selective_scan", ASKED) == ("torch", "mamba-ssm: not installed")


def test_kernels_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm", "fla")
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    assert dispatch.explain_library("ssd", ASKED) == ("torch", "RECOLLECT_KERNELS=torch")
    given = dual(5)
    assert_near(run(ssd, given), run(ssd_reference, given), 1e-4)
    assert not CALLS


@pytest.mark.parametrize("more", ["reset", "h_init"])
def test_the_scan_falls_back_with_all_its_gradients(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mamba-ssm")
    given = scanned(9)
    given[more] = torch.rand(2, 9) < 0.4 if more == "reset" else torch.randn(2, 6, 3)
    assert_near(run(selective_scan, given), run(selective_scan_reference, given), 1e-4)
    assert not CALLS


def test_the_dual_with_resets_falls_back_where_only_fla_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "fla")
    given = dual(9)
    assert_near(run(ssd, given), run(ssd_reference, given), 1e-4)
    assert not CALLS


@pytest.mark.parametrize("config", [Mamba.Config(4, d_state=3), Mamba2.Config(4, d_state=4, d_head=4)])
def test_gradients_pass_from_one_call_to_the_next(
    config: Mamba.Config | Mamba2.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that goes on from its own state, not detached, learns what it learns in one call."""
    install(monkeypatch, "mamba-ssm")
    layer = config.build()
    x = torch.randn(2, 9, 4)
    parameters = list(layer.parameters())
    first = layer(x[:, :5])
    assert CALLS
    y = torch.cat([first.y, layer(x[:, 5:], first.state).y], 1)
    found = torch.autograd.grad(y.square().sum(), parameters)
    install(monkeypatch)
    wanted = torch.autograd.grad(layer(x).y.square().sum(), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba-ssm", "fla"])
def test_second_derivatives_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    given = without(dual(4), "reset")
    x = given.pop("x_BLHP").requires_grad_()
    y, last = ssd(x, **given)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum() + last.sum(), x, create_graph=True)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("installed", [False, True])
def test_compiled_graphs_are_broken_around_a_library_and_nowhere_else(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = without(dual(5), "h_init")
    expected = ssd_reference(**given)
    install(monkeypatch, *(["mamba-ssm"] if installed else []))
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(lambda given: ssd(**given), backend="eager")
    torch.testing.assert_close(compiled(given), expected, rtol=1e-4, atol=1e-4)
    reasons = {reason.splitlines()[0] for reason in counters["graph_break"]}
    assert len(reasons) == installed, reasons
    assert all("disable" in reason for reason in reasons)
    assert bool(CALLS) == installed


class Watch:
    """Finds no module, and notes which are looked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, *_: object) -> None:
        self.asked.append(name)


def test_a_cpu_never_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    libraries.lookup.cache_clear()
    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    ssd(**dual(5))
    selective_scan(**scanned(5))
    assert not any("library" in row.what for row in explain())
    assert not [name for name in watch.asked if name.partition(".")[0] in ("mamba_ssm", "fla")]
    assert dispatch.explain_library("ssd", ASKED._replace(device=torch.device("cpu"))).path == "torch"
    assert libraries.missing("ssd", "mamba-ssm") == "not installed", "asked for, it is looked for"
    assert "mamba_ssm" in watch.asked


def test_the_bench_says_which_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(dtype: str = "bfloat16") -> dict[str, tuple[str, str]]:
        return {row.what: (row.path, row.why) for row in explain(dtype=dtype) if "library" in row.what}

    assert {path for path, _ in said().values()} == {"torch"}
    assert said()["Mamba-2's dual by a library"][1] == "mamba-ssm: not installed; fla: not installed"
    install(monkeypatch, "mamba-ssm", "fla")
    found = said()
    assert [path for path, _ in found.values()] == ["mamba-ssm", "torch", "mamba-ssm", "mamba-ssm"]
    assert "resets" in found["Mamba's scan by a library, with resets"][1]


def test_stand_ins_take_what_is_asked_for() -> None:
    """What ``ops.libraries`` looks for in a signature is what the stand-ins were written from."""
    for function in (mamba_chunk_scan_combined, chunk_simple_gla, selective_scan_fn):
        (kernel,) = (k for each in libraries.KERNELS.values() for k in each.values() if k.function == function.__name__)
        assert set(kernel.arguments) <= set(function.__code__.co_varnames)
