"""What the benchmarks share: interleaved timing, one table, one JSON with its certificate.

    from harness import Row, arguments, interleaved, report

A benchmark times ours and the others in turn, in one process, so that a busy machine slows all
alike; it reports medians, and prints the ratio last. `--out` writes what README quotes:

    results/reference/benchmarks/<name>.json
        ours, peer, ratio, floor, share_of_floor, target, units    of the first row
        rows                                                       all rows, with every run
        machine, provenance
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.store import provenance, tables  # noqa: E402


@dataclass
class Row:
    """One comparison. Numbers are medians, in `units`.

    peer is another program's number for the same work, floor what the machine allows (a bare
    forward pass, a memory map). ratio and share_of_floor are better when larger, whichever way
    the units go.
    """

    case: str
    ours: float
    units: str
    peer: float | None = None
    peer_name: str = ""
    floor: float | None = None
    floor_name: str = ""
    target: str = ""  # such as "ratio >= 3"
    higher_is_better: bool = True
    runs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self._against(self.peer)

    @property
    def share_of_floor(self) -> float | None:
        return self._against(self.floor)

    def _against(self, other: float | None) -> float | None:
        if not other or not self.ours:
            return None
        return self.ours / other if self.higher_is_better else other / self.ours

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if not self.target:
            return None
        name, sign, bound = self.target.split()
        value = {"ratio": self.ratio, "share_of_floor": self.share_of_floor, "ours": self.ours}[
            name
        ]
        if value is None:
            return False
        return value >= float(bound) if sign == ">=" else value <= float(bound)

    def told(self) -> dict:
        more = {"ratio": self.ratio, "share_of_floor": self.share_of_floor, "reached": self.reached}
        return asdict(self) | more


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """--out and --repeats, to which a benchmark adds its own."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON to write, as results/reference/benchmarks/<name>.json")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def interleaved(
    work: dict[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times, taken in turn after a warm-up.

    Args:
        before: called before each, untimed.
        clock: time.process_time counts the processor's seconds of all threads, which others at
            work on the machine change less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + repeats):
        for name, function in work.items():
            before()
            started = clock()
            function()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def environment(**more: str) -> dict[str, str]:
    """This process's, in which Python finds our packages, and those that it finds here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def rates(seconds: dict[str, list[float]], amount: float) -> dict[str, list[float]]:
    """Units of work a second of every run."""
    return {name: [amount / s for s in runs] for name, runs in seconds.items()}


def median(values: list[float]) -> float:
    return statistics.median(values)


def matmul_rate(device: str = "cpu", dtype: str = "float32", n: int | None = None) -> float:
    """Operations a second of a square product: [n n] @ [n n] is 2 n^3 of them."""
    import torch

    n = n or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / min(_seconds(lambda: a @ b, device))


def disk_rate(folder: str | Path, mib: int = 512) -> float:
    """Bytes a second of a file until it is on the disk."""
    block, path = os.urandom(1 << 20) * 16, Path(folder) / "disk_rate.tmp"
    started = time.perf_counter()
    with open(path, "wb") as f:
        for _ in range(mib // 16):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return len(block) * (mib // 16) / seconds


def waits(device: str) -> Callable[[], object]:
    """What ends when the device is done."""
    import torch

    return torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None


def _seconds(function: Callable[[], object], device: str, repeats: int = 7) -> list[float]:
    wait, out = waits(device), []
    for turn in range(3 + repeats):
        wait()
        started = time.perf_counter()
        function()
        wait()
        out += [time.perf_counter() - started] if turn >= 3 else []
    return out


def machine(device: str = "cpu") -> dict:
    """Where the numbers were measured; a load above the cores means that others were at work."""
    out = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "device": device}
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            out["cpu"] = line.split(":", 1)[1].strip()
            break
    return out | {"system": platform.platform(terse=True)}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def report(name: str, rows: list[Row], out: str | None = None, device: str = "cpu") -> None:
    """Print the table, the ratios last, and write the JSON where `out` says."""
    shown = lambda v: "-" if v is None else f"{v:,.3g}" if abs(v) < 1000 else f"{v:,.0f}"  # noqa: E731
    head = ("case", "ours", "peer", "floor", "units", "share of floor", "target", "ratio")
    table = [head]
    for r in rows:
        peer = shown(r.peer) + (f" ({r.peer_name})" if r.peer_name else "")
        floor = shown(r.floor) + (f" ({r.floor_name})" if r.floor_name else "")
        mark = {True: "yes", False: "NO", None: ""}[r.reached]
        share = shown(r.share_of_floor)
        table.append(
            (r.case, shown(r.ours), peer, floor, r.units, share, f"{r.target} {mark}".strip(),
             shown(r.ratio))
        )  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    if out:
        first = {k: v for k, v in rows[0].told().items() if k not in ("runs", "case")}
        data = {"name": name, **first, "rows": [r.told() for r in rows], "machine": machine(device)}
        command = {"command": f"python tests/benchmarks/{Path(sys.argv[0]).name}"}
        made = provenance.certificate("benchmark", command, "", [], device)
        tables.write_json(out, data, made)
        print(f"written to {out}")
