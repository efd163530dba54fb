"""S4, S4D and DSS against convolution by FFT, S5 against s5-pytorch: time forward and backward, and peak memory.

    python bench/bench_s4.py OUT.json [--batch 8] [--length 2048] [--d-model 256] [--d-state 64] [--repeats 5]

From parameters and inputs to outputs and back, without the gated linear unit. ``fft`` convolves with a kernel that is
given; ``fft s4d`` also makes it, factored as exp(A (q T + t)) = exp(A q T) exp(A t), which is one batched product.
Cases take turns in one process with one thread, and the fastest round of each counts; memory is the peak resident set
of a process of its own, less what it held before. The first two hand over no state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import s5 as s5_pytorch
import torch
from torch import Tensor

from recollect.layers.dss import DSS
from recollect.layers.s4 import S4
from recollect.layers.s4d import S4D
from recollect.layers.s5 import S5
from recollect.ops import dispatch
from recollect.ops.mimo_ssm import mimo_ssm
from recollect.ops.s4_kernel import fft_convolve
from recollect.train.runtime import environment

Run = Callable[[Tensor], Tensor]


def fft_s4d(layer: S4D, x: Tensor) -> Tensor:
    """S4D as a convolution of the length at hand."""
    period, length = 64, x.shape[1]
    A_DP = torch.complex(-torch.exp(layer.log_A_real), layer.A_imag)
    step_DP1 = (A_DP * torch.exp(layer.log_dt).unsqueeze(-1)).unsqueeze(-1)
    c_DP = 2 * torch.view_as_complex(layer.C) * (torch.exp(step_DP1.squeeze(-1)) - 1) / A_DP
    coarse_DPQ = c_DP.unsqueeze(-1) * torch.exp(step_DP1 * (period * torch.arange(-(-length // period))))
    fine_DPT = torch.exp(step_DP1 * torch.arange(period))
    taps_DL = (coarse_DPQ.mT @ fine_DPT).real.flatten(1)[:, :length]
    return fft_convolve(x, taps_DL) + layer.D * x


def cases(arguments: argparse.Namespace) -> dict[str, tuple[torch.nn.Module, Run, str]]:
    """Name to (what holds the parameters, how to run, kernels)."""
    d_model, d_state = arguments.d_model, arguments.d_state
    torch.manual_seed(0)
    taps = torch.nn.ParameterList([torch.randn(d_model, arguments.length)])
    s4d, dss = S4D(S4D.Config(d_model, d_state=d_state)), DSS(DSS.Config(d_model, d_state=d_state))
    s4, s4_fft = (S4(S4.Config(d_model, d_state=d_state, method=method)) for method in ("chunk", "fft"))

    def core(layer: Any) -> Run:
        return lambda x: layer.run(x, layer.state_like(x).h, layer.system(torch.complex64), None)[0]

    s5, theirs = S5(S5.Config(d_model, d_state=d_state)), s5_pytorch.S5(d_model, d_state)

    def s5_core(x: Tensor) -> Tensor:
        state = s5.state_like(x).h
        return mimo_ssm(x, *s5._discretise(state.dtype), s5.D, state)[0]

    return {
        "fft, kernel given": (taps, lambda x: fft_convolve(x, taps[0]), "torch"),
        "fft s4d": (s4d, lambda x: fft_s4d(s4d, x), "torch"),
        "s4d, compiled": (s4d, core(s4d), "auto"),
        "s4d, chunks": (s4d, core(s4d), "torch"),
        "dss, compiled": (dss, core(dss), "auto"),
        "s4, compiled": (s4, core(s4), "auto"),
        "s4, chunks": (s4, core(s4), "torch"),
        "s4, fft": (s4_fft, core(s4_fft), "auto"),
        "s5, compiled": (s5, s5_core, "auto"),
        "s5-pytorch": (theirs, theirs, "auto"),
    }


def once(case: tuple[torch.nn.Module, Run, str], size: tuple[int, int, int]) -> tuple[float, float]:
    """Seconds forward and backward."""
    module, run, dispatch.KERNELS = case
    x = torch.randn(size, requires_grad=True)
    weight = torch.randn(size)
    begin = time.perf_counter()
    y = run(x)
    middle = time.perf_counter()
    y.backward(weight)
    end = time.perf_counter()
    module.zero_grad()
    return middle - begin, end - middle


def peak_mib() -> float:
    """Of this process alone: ``ru_maxrss`` would begin at what the parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/s4.json"))
    for name, value in (("batch", 8), ("length", 2048), ("d-model", 256), ("d-state", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory-of", help="run one case once and print the growth of its peak memory, in MiB")
    parser.add_argument("--only", nargs="*", help="cases to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = (arguments.batch, arguments.length, arguments.d_model)
    table = {name: case for name, case in cases(arguments).items() if not arguments.only or name in arguments.only}
    if arguments.memory_of:
        case = table[arguments.memory_of]
        once(case, (1, 64, arguments.d_model)) if case[2] == "auto" else None
        before = peak_mib()
        once(case, size)
        print(json.dumps(peak_mib() - before))
        return
    for case in table.values():
        once(case, size)
    rounds = [{name: once(case, size) for name, case in table.items()} for _ in range(arguments.repeats)]
    print("| case | forward, ms | backward, ms | together, ms | of fft s4d | peak memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    best = {name: min((each[name] for each in rounds), key=sum) for name in table}
    rows: list[dict[str, Any]] = []
    for name, (forward, backward) in best.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout)
        ratio = (forward + backward) / sum(best.get("fft s4d", (forward, backward)))
        times = " | ".join(f"{1e3 * each:.0f}" for each in (forward, backward, forward + backward))
        print(f"| {name} | {times} | {ratio:.2f} | {memory:.0f} |")
        milliseconds = {"forward_ms": round(1e3 * forward, 1), "backward_ms": round(1e3 * backward, 1)}
        rows.append({"case": name, **milliseconds, "memory_mib": round(memory, 1)})
    facts = environment(torch.device("cpu"))
    machine = {"torch": torch.__version__, "device": facts["device"], "commit": facts["commit"], "threads": 1}
    sizes = {name: getattr(arguments, name) for name in ("batch", "length", "d_model", "d_state")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(sizes | machine | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
