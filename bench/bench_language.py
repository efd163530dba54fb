"""Language models at public shapes: reading a prompt beside transformers, and writing after a short and a long one.

    python bench/bench_language.py OUT.json [--threads 1 2] [--rounds 3] [--dtype bfloat16] [--skip-writing]

Reading: a prompt of 1,024 tokens at the shape of mamba2-130m (24 layers, width 768, state 128, heads of 64) with random
weights, as ``generate`` reads it (logits of the last position), by our model and by that of transformers on the same
ones, at its default chunk of 256 and at 128, 64 and 32, in ``--dtype``. ``floor`` is the products with the weights
alone, which all of them make. Every figure is measured in a process of its own, and they take turns; the least of all
rounds is kept.
``memory_mib`` is the high-water mark of one reading less what was held before.

Writing: greedy tokens a second after 1,024, 16,384 and 65,536 tokens of context, and bytes of state, by a smaller model
with and without HAX (width 256, 4 layers). Blocks of tokens after the three contexts take turns in one process;
``slower`` is the median ratio of a block's time to that of the shortest context beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, VOCAB = 1024, 50288
READERS = ("floor", "ours", "hf256", "hf128", "hf64", "hf32")
CONTEXTS = (1024, 16_384, 65_536)
BLOCK, BLOCKS, PIECE = 16, 12, 2048


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/language.json"))
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--skip-writing", action="store_true")
    parser.add_argument("--case", nargs=3, metavar=("WHAT", "WHICH", "THREADS"), help="one case")
    arguments = parser.parse_args()
    if arguments.case:
        what, which, threads = arguments.case
        dtype = arguments.dtype
        row = reading(which, int(threads), dtype) if what == "reading" else writing(which, int(threads))
        print(json.dumps(row))
        return
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            for which in READERS:
                row = case("reading", which, threads, arguments.dtype)
                before = best.setdefault((which, threads), row)
                for figure in ("seconds", "memory_mib"):
                    before[figure] = min(before[figure], row[figure])
                print(
                    f"reading {which}, {threads} threads: {row['seconds']:.2f} s, {row['memory_mib']:.0f} MiB",
                    flush=True,
                )
    found: dict[str, Any] = {**machine(), "length": LENGTH, "dtype": arguments.dtype}
    found |= {"reading": list(best.values()), "writing": []}
    samples = {which: best[which, arguments.threads[0]]["sample"] for which in READERS[1:]}
    size = max(map(abs, samples["ours"]))
    found["difference"] = max(
        abs(a - b) / size for which in READERS[2:] for a, b in zip(samples["ours"], samples[which], strict=True)
    )
    print(f"largest difference of logits: {found['difference']:.1e} of the largest")
    for threads in arguments.threads:
        rows = {which: best[which, threads] for which in READERS}
        fastest = min((rows[which] for which in READERS[2:]), key=lambda row: row["seconds"])
        print(f"{threads} threads: ours takes {rows['ours']['seconds'] / rows['floor']['seconds']:.2f} x its products")
        for name, peer in (("default", rows["hf256"]), ("fastest", fastest)):
            speed, memory = peer["seconds"] / rows["ours"]["seconds"], peer["memory_mib"] / rows["ours"]["memory_mib"]
            found.setdefault("ratios", []).append({"threads": threads, "peer": name, "speed": speed, "memory": memory})
            print(f"{threads} threads, transformers' {name} chunk: {speed:.1f} x its speed, memory {memory:.2f} x ours")
    for which in () if arguments.skip_writing else ("mamba2", "hax"):
        found["writing"] += case("writing", which, arguments.threads[-1])["rows"]
    for row in found["writing"]:
        print(
            f"writing {row['which']} after {row['context']:,}: {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['slower']:.2f} x the time of the shortest, state {row['state_bytes']:,} bytes"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def case(what: str, which: str, threads: int, dtype: str = "float32") -> dict[str, Any]:
    """One measurement, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--dtype", dtype, "--case", what, which, str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def reading(which: str, threads: int, dtype: str) -> dict[str, Any]:
    """Seconds and peak memory of one prompt."""
    import torch

    from recollect.eval.bench.measure import median_time, peak_of

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = public_model("ours" if which == "floor" else which).to(getattr(torch, dtype))
    tokens = torch.randint(1, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))

    def read() -> None:
        if which == "floor":
            floor(model)
        else:
            found.append(model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1, ::5000])

    found: list[Any] = []
    with torch.no_grad():
        read()  # kernels compiled, allocator started
        peak = peak_of(read, torch.device("cpu"))
        timing = median_time(read, 4.0, torch.device("cpu"), first_s=peak.seconds)
    sample = found[-1].float().tolist() if found else None
    memory = (peak.bytes or 0) / 2**20
    return {"which": which, "threads": threads, "seconds": timing.seconds, "memory_mib": memory, "sample": sample}


def floor(model: Any) -> None:
    """The products of as many activations with every matrix of the model."""
    import torch
    from torch.nn import functional as F

    for block in model.backbone.layers:
        for linear in (block.mixer.in_proj, block.mixer.out_proj):
            F.linear(torch.ones(LENGTH, linear.in_features, dtype=linear.weight.dtype), linear.weight)


def public_model(which: str) -> Any:
    """The model of mamba2-130m's shape with random weights, the same for everyone."""
    import torch

    from recollect.hf import RecollectConfig, RecollectForCausalLM
    from recollect.hf.layouts import transformers_config
    from recollect.layers.mamba2 import Mamba2

    layer = Mamba2.Config(768, d_state=128)
    ours = RecollectForCausalLM(RecollectConfig.of([layer] * 24, VOCAB)).eval()
    if which == "ours":
        return ours
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = transformers_config(layer, 24, VOCAB, tie_word_embeddings=True)
    theirs = Mamba2ForCausalLM(Mamba2Config.from_dict({**config, "chunk_size": int(which[2:])})).eval()
    with torch.no_grad():
        theirs.load_state_dict(ours.state_dict())
    return theirs


def writing(which: str, threads: int) -> dict[str, Any]:
    """Tokens a second after each context."""
    import torch
    from transformers import DynamicCache

    from recollect.core.derived import unchanging
    from recollect.hf import RecollectConfig, RecollectForCausalLM
    from recollect.hf.cache import state_bytes
    from recollect.layers.mamba2 import Mamba2
    from recollect.models.beside import Beside

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    mixer = Mamba2.Config(256, d_state=64)
    layer = mixer if which == "mamba2" else Beside(128, gate=1.0).around(mixer)
    model = RecollectForCausalLM(RecollectConfig.of([layer] * 4, 1024)).eval()
    caches, times = {}, {context: [] for context in CONTEXTS}
    with torch.no_grad(), unchanging():
        for context in CONTEXTS:
            caches[context] = DynamicCache(config=model.config)
            for piece in torch.randint(1, 1024, (1, context)).split(PIECE, 1):
                model(piece, past_key_values=caches[context], use_cache=True, logits_to_keep=1)
        token = torch.ones(1, 1, dtype=torch.long)
        for turn in range(BLOCKS + 1):
            for context in CONTEXTS:
                started = time.perf_counter()
                for _ in range(BLOCK):
                    token = model(token, past_key_values=caches[context], use_cache=True).logits[:, -1:].argmax(-1)
                if turn:  # the first turn warms up
                    times[context].append(time.perf_counter() - started)
    rows = []
    for context in CONTEXTS:
        ratios = [own / short for own, short in zip(times[context], times[CONTEXTS[0]], strict=True)]
        rows.append(
            {
                "which": which,
                "context": context,
                "threads": threads,
                "tokens_per_s": BLOCK / statistics.median(times[context]),
                "slower": statistics.median(ratios),
                "state_bytes": state_bytes(caches[context]),
            }
        )
    return {"rows": rows}


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch
    import transformers

    from recollect.train.runtime import environment

    found = environment(torch.device("cpu"))
    return {
        "commit": found["commit"],
        "device": found["device"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
