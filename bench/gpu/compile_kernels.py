"""Do Triton's kernels compile for a GPU? Needs none: Triton brings the assembler along.

    python bench/gpu/compile_kernels.py [--arch 90] [--only HAX] [--out compiled.json]

The cases of ``check_kernels.py`` run on CPU tensors with every launch replaced by the compilation of what would be
launched, arguments, widths and types as they are. What comes out of them is garbage and not looked at. For each kernel:
registers per thread, bytes spilled to local memory (which lies in the GPU's main memory: none is best), and shared
memory per program. Exits with 1 when something does not compile or needs more shared memory than a program may have.
With ``--only`` the other kernels that ``--out`` holds stay in it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recollect.core.files import write_atomically

SHARED = 232_448
"""Bytes of shared memory that a program may have on compute capability 9.0."""


class Driver:
    """Stands in for a GPU's driver as far as compiling asks it."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_device_interface(self) -> Any:
        return torch.cuda


def compile_only(found: dict[str, Any], arch: int) -> None:
    """Make every launch compile, and keep what comes of it by a name that tells types and widths."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(arch))  # pyright: ignore[reportArgumentType]
    run: Callable[..., Any] = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        types = [str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor)]
        widths = [str(x) for x, p in zip(args, self.params, strict=False) if p.is_constexpr]
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__} {types[0] if types else ''} {' '.join(widths)}"
        if name not in found:
            found[name] = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps, **usage(kernel)}
        return kernel

    JITFunction.run = compiled  # pyright: ignore[reportAttributeAccessIssue]


def usage(kernel: Any) -> dict[str, int]:
    """Registers per thread and bytes of local memory, by Triton's ``cuobjdump``."""
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([str(dump), "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    registers, local = re.search(r"REG:(\d+)", told), re.search(r"LOCAL:(\d+)", told)
    stack = re.search(r"STACK:(\d+)", told)
    spilled = max(int(x[1]) for x in (local, stack) if x) if local or stack else -1
    return {"registers": int(registers[1]) if registers else -1, "spilled": spilled}


def main() -> int:
    """Compile every case's kernels; prints a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", nargs="*", help="cases whose names contain one of these")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from check_kernels import CASES, TOLERANCES, outcome

    from recollect.ops import dispatch

    kernels: dict[str, Any] = {}
    failed: dict[str, str] = {}
    compile_only(kernels, options.arch)
    dispatch.KERNELS = "triton"
    asked = dispatch.explain_triton

    def chosen(*tensors: torch.Tensor) -> dispatch.Choice:
        """As on a GPU, though the tensors are on a CPU."""
        choice = asked(*tensors)
        return choice if "take" in choice.why else dispatch.Choice("triton", "compiled only")

    dispatch.explain_triton = chosen
    # What kernels would have written is read as an index here and there.
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    for name, make in CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for dtype in TOLERANCES:
            if str(dtype).removeprefix("torch.") not in options.dtypes:
                continue
            torch.manual_seed(0)
            try:
                outcome(make(torch.device("cpu")), dtype, None)
            except Exception as error:
                failed[f"{name}, {dtype}"] = f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"
    for name, kernel in sorted(kernels.items()):
        print(f"{name}: {json.dumps(kernel)}")
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    heavy = [name for name, kernel in kernels.items() if kernel["shared"] > SHARED]
    for name in heavy:
        print(f"{name} needs {kernels[name]['shared']:,} bytes of shared memory of {SHARED:,}", file=sys.stderr)
    if options.out:
        import triton

        kept = json.loads(options.out.read_text())["kernels"] if options.only and options.out.exists() else {}
        made = {
            "arch": options.arch,
            "triton": triton.__version__,
            "note": "compiled without a GPU: nothing here was run or timed",
            "kernels": dict(sorted((kept | kernels).items())),
            "failed": failed,
        }
        write_atomically(options.out, (json.dumps(made, indent=1) + "\n").encode())
    return 1 if failed or heavy else 0


if __name__ == "__main__":
    sys.exit(main())
