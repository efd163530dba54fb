"""Speed, memory, state and accuracy of every layer by length, beside what a user could take instead.

Tokens per second are batch x length / median seconds. Forward is in evaluation without gradients; forward and backward
in training, auxiliary losses included; a step is one position of one sequence, from the state after ``length``
positions. Memory is what one forward and backward needs on top of module and input.

Accuracy: the largest difference, in float32, of ``forward`` from a float64 fold of ``step`` with the same parameters,
over the first ``CHECKED`` positions at most; relative to the root mean square of the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.layer import SequenceLayer
from recollect.core.state import nbytes
from recollect.eval.bench.cases import Case, Record, Row, note, run_cases
from recollect.eval.bench.measure import median_time, peak_of
from recollect.eval.bench.peers import PEERS, Peer, peers_of
from recollect.eval.bench.rows import build, refusal, row_names, sizes
from recollect.train.runtime import resolve_device

CHECKED = 256
"""Most positions over which the fold is compared: folding is slow, and its error does not need more to be seen."""

WARM_LENGTH = 512
"""Long enough that what runs at any length has been compiled and called."""

RATIOS = {
    "both": "both_tokens_per_s",
    "forward": "forward_tokens_per_s",
    "step": "step_tokens_per_s",
    "memory": "peak_bytes",
}


def bench_layers(
    layers: Sequence[str] = (),
    *,
    lengths: Sequence[str | int] = ("256..131072",),
    d_model: int = 256,
    batch: int = 8,
    threads: int = 2,
    device: str = "cpu",
    seconds: float = 0.5,
    budget_s: float = 60.0,
    peers: bool = True,
    out: Path = Path("runs/bench"),
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure each named layer (default: all) and its peers at each length into ``out/layers.json``.

    Raises ConfigError for an unknown name or an impossible size, RecollectError for a device that is not there and as
    ``run_cases`` does.
    """
    rows, at = row_names(layers), sizes(lengths)
    if min(d_model, batch, threads) < 1:
        raise ConfigError("bench: d_model, batch and threads must be at least 1")
    on = resolve_device(device)
    settings = {
        **{"d_model": d_model, "batch": batch, "threads": threads, "device": str(on), "seconds": seconds},
        **{"checked_positions": CHECKED, "dtype": "float32"},
    }
    common = {key: settings[key] for key in ("d_model", "batch", "threads", "device", "seconds")}
    beside = peers_of(rows) if peers else {}
    order = [name for row in rows for name in (row, *(label for label in beside if beside[label].row == row))]
    return run_cases(
        "layers",
        [_case(name, length, common, beside.get(name)) for name in order for length in at],
        size_name="length",
        settings=settings,
        out=out,
        budget_s=budget_s,
        device=on,
        fresh=fresh,
        say=say,
        derive=lambda measured: {"peers": _peer_facts(), "ratios": ratios(measured)},
    )


def _case(name: str, length: int, common: Mapping[str, Any], peer: Peer | None) -> Case:
    return Case(
        name,
        length,
        "recollect.eval.bench.layers:measure",
        {"row": name, "length": length, **common},
        preload=peer.modules if peer and not peer.refusal else (),
        refusal=refusal(name, common["d_model"]) if peer is None else peer.refusal,
    )


def _peer_facts() -> dict[str, dict[str, str]]:
    return {label: {"row": peer.row, "note": peer.note} for label, peer in PEERS.items()}


def measure(
    row: str, length: int, *, d_model: int, batch: int, threads: int, device: str, seconds: float
) -> dict[str, Any]:
    """One row at one length, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on = torch.device(device)
    peer = PEERS.get(row)
    module: nn.Module = build(row, d_model, on) if peer is None else peer.build(d_model).to(on)
    x = torch.randn(batch, length, d_model, device=on)

    def both(x: Tensor) -> None:
        module.zero_grad(set_to_none=True)
        out = module(x)
        y, aux = (out, {}) if isinstance(out, Tensor) else (out.y, out.aux)
        sum(aux.values(), y.square().mean()).backward()

    def forward() -> None:
        with torch.no_grad():
            module(x)

    module.train()
    # Twice: some kernels only exist once gradients do.
    for _ in range(2):
        both(x[:, :WARM_LENGTH])
    module.zero_grad(set_to_none=True)
    peak = peak_of(lambda: both(x), on)
    both_time = median_time(lambda: both(x), seconds, on, first_s=peak.seconds)
    module.zero_grad(set_to_none=True)
    module.eval()
    forward_time = median_time(forward, seconds, on)
    with torch.no_grad(), unchanging():
        step, state_bytes = _decoder(module, x[:1])
        step_s = None
        if step is not None:
            step()
            step_s = median_time(step, seconds, on).seconds
    return {
        "peer_of": None if peer is None else peer.row,
        "params": sum(p.numel() for p in module.parameters()),
        "state_bytes": state_bytes,
        "forward_tokens_per_s": batch * length / forward_time.seconds,
        "both_tokens_per_s": batch * length / both_time.seconds,
        "step_tokens_per_s": None if step_s is None else 1 / step_s,
        "peak_bytes": peak.bytes,
        "pass_s": both_time.seconds,
        "repeats": both_time.repeats,
        **(error_of(module, x[:1, :CHECKED]) if isinstance(module, SequenceLayer) else {}),
    }


def _decoder(module: nn.Module, x: Tensor) -> tuple[Callable[[], object] | None, int | None]:
    """What runs one position after x, and the bytes of the state it starts from."""
    if isinstance(module, SequenceLayer):
        layer, token, state = module, x[:, -1], module(x).state
        return lambda: layer.step(token, state), nbytes(state)
    decoder: Any = getattr(module, "decoder", None)
    return (None, None) if decoder is None else decoder(x)


def error_of(layer: SequenceLayer, x: Tensor) -> dict[str, float | int]:
    """How far ``forward`` is from a fold of ``step`` in float64, on x (B, L, D)."""
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        y = layer(x).y.double()
        state, steps = exact.state_like(x.double()), []
        for x_BD in x.double().unbind(1):
            y_BD, state = exact.step(x_BD, state)
            steps.append(y_BD)
        wanted = torch.stack(steps, 1)
    largest, rms = float((y - wanted).abs().max()), float(wanted.square().mean().sqrt())
    return {"error_max": largest, "error_relative": largest / rms if rms else largest, "error_positions": x.shape[1]}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Ours / peer for every peer at every length where both were measured: above 1 is faster, or more memory."""
    ours = {(row["row"], row["length"]): row for row in rows if row["status"] == "measured"}
    found: list[Row] = []
    for (name, length), theirs in best_of_families(rows).items():
        mine = ours.get((theirs["peer_of"], length))
        if mine is not None:
            quotients = {key: _quotient(mine[column], theirs[column]) for key, column in RATIOS.items()}
            found.append({"row": mine["row"], "peer": name, "taken": theirs["row"], "length": length, **quotients})
    return found


def best_of_families(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """The measured row of every peer by name and length; of a family, the fastest forward and backward."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["status"] != "measured" or row["row"] not in PEERS:
            continue
        key = PEERS[row["row"]].family or row["row"], row["length"]
        if key not in best or row["both_tokens_per_s"] > best[key]["both_tokens_per_s"]:
            best[key] = row
    return best


def _quotient(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def tables(record: Record, names: Sequence[str] = ()) -> list[Table]:
    """For a terminal: every case, then ours / peer for speed and memory: a line per pair, a column per length."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer")
    columns = ("length", "params", "state B", "forward tok/s", "fwd+bwd tok/s", "step tok/s", "peak MiB", "error")
    for column in columns:
        grid.add_column(column, justify="right")
    grid.add_column("")
    for row in record.rows:
        if names and row["row"] not in names:
            continue
        cells = [""] * (len(columns) - 1)
        if row["status"] == "measured":
            speeds = [row[f"{what}_tokens_per_s"] for what in ("forward", "both", "step")]
            counts = [_count(value) for value in (row["params"], row["state_bytes"], *speeds)]
            error = row.get("error_relative")
            cells = [*counts, f"{row['peak_bytes'] / 2**20:,.1f}", "" if error is None else f"{error:.0e}"]
        grid.add_row(row["row"], f"{row['length']:,}", *cells, note(row))
    return [grid, *_ratio_tables(record.derived.get("ratios", []))]


def _ratio_tables(found: Sequence[Row]) -> list[Table]:
    pairs = list(dict.fromkeys((each["row"], each["peer"]) for each in found))
    lengths = sorted({each["length"] for each in found})
    titles = {"both": "forward + backward speed", "forward": "forward speed", "step": "step speed", "memory": "memory"}
    made: list[Table] = []
    for key, title in titles.items() if pairs else ():
        grid = Table(title=f"ours / peer, {title}", title_justify="left", box=None, pad_edge=False)
        grid.add_column("ours / peer")
        for length in lengths:
            grid.add_column(f"{length:,}", justify="right")
        for ours, peer in pairs:
            at = {each["length"]: each[key] for each in found if (each["row"], each["peer"]) == (ours, peer)}
            if any(value is not None for value in at.values()):
                grid.add_row(f"{ours} / {peer}", *("" if (v := at.get(n)) is None else f"{v:.2f}" for n in lengths))
        made.append(grid)
    return made


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
