"""What a GPU would wait for: copies between host and device, reads of single numbers, and work left on the CPU."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.item}
"""The host waits for a number."""
SHAPED_BY_DATA = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
"""It waits for the size of the result."""
FREE = {
    aten.view, aten._unsafe_view, aten.t, aten.transpose, aten.permute, aten.expand, aten.unsqueeze, aten.squeeze,
    aten.slice, aten.select, aten.alias, aten.detach, aten.as_strided, aten.split, aten.split_with_sizes, aten.unbind,
    aten._reshape_alias, aten.diagonal, aten.unfold, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten._conj, aten.conj, aten.view_as_real, aten.view_as_complex, aten.detach_, aten.lift_fresh, aten.chunk,
    aten.real,
}  # fmt: skip
"""They launch nothing."""


def _square(arguments: Any) -> tuple[int, int]:
    matrix = arguments[0]
    return matrix.shape[-1], max(1, matrix.shape[:-2].numel())


LAPACK = {  # operations of real numbers, after Golub and Van Loan
    aten._linalg_eigh: lambda a: 9 * _square(a)[0] ** 3 * _square(a)[1],
    aten.linalg_eigh: lambda a: 9 * _square(a)[0] ** 3 * _square(a)[1],
    aten._linalg_svd: lambda a: 20 * _square(a)[0] ** 3 * _square(a)[1],
    aten.linalg_qr: lambda a: 4 * a[0].shape[-2] * a[0].shape[-1] ** 2 * max(1, a[0].shape[:-2].numel()),
    aten._linalg_solve_ex: lambda a: (
        (2 / 3 * _square(a)[0] ** 3 + 2 * _square(a)[0] ** 2 * (a[1].shape[-1] if a[1].ndim > 1 else 1)) * _square(a)[1]
    ),
    aten.linalg_cholesky_ex: lambda a: _square(a)[0] ** 3 / 3 * _square(a)[1],
}


class Transfers(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        places: `[kind][file:line]` -> times; kinds are `to device`, `to host`, `read`, `shaped by data`.
        bytes: `[kind]` -> bytes copied.
        launches: operations that would start a kernel.
        work: `[device, dtype]` -> floating-point operations of products and decompositions.
    """

    def __init__(self, package: str = "headfuse") -> None:
        super().__init__()
        self.package = f"/{package}/"
        self.places: dict[str, Counter[str]] = defaultdict(Counter)
        self.bytes: Counter[str] = Counter()
        self.bytes_at: dict[str, Counter[str]] = defaultdict(Counter)
        self.launches: Counter[str] = Counter()
        self.work: dict[tuple[str, str], float] = defaultdict(float)
        self.work_at: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        after = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        on_device = any(x.device.type == "cuda" for x in before + after)
        device = "cuda" if on_device else "cpu"
        if packet in (aten._to_copy, aten.copy_):
            source, target = (args[0], result) if packet is aten._to_copy else (args[1], args[0])
            ends = source.device.type, target.device.type
            if ends[0] != ends[1] and "meta" not in ends:
                kind = "to host" if ends[1] == "cpu" else "to device"
                narrow = source if kind == "to host" else target  # a blocking copy converts on the host
                self._note(kind, narrow.numel() * narrow.element_size())
        elif on_device and packet in READS:
            self._note("read")
        elif on_device and packet in SHAPED_BY_DATA:
            self._note("shaped by data")
        elif on_device and packet in (aten.index, aten.index_put_, aten._index_put_impl_):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self._note("shaped by data")
            for index in indices:
                if index.device.type == "cpu" and args[0].device.type == "cuda":
                    self._note("to device", index.numel() * index.element_size())
        if packet not in FREE:
            self.launches[device] += 1
        self._count_work(packet, args, kwargs or {}, result, device, before)
        return result

    def _count_work(self, packet: Any, args: Any, kwargs: Any, result: Any, device: str, before: Any) -> None:
        if packet in LAPACK:
            work = float(LAPACK[packet](args))
        elif packet in flop_registry:
            work = float(flop_registry[packet](*args, **kwargs, out_val=result))
        else:
            return
        dtype = before[0].dtype
        work *= 4 if dtype.is_complex else 1
        name = str(dtype).removeprefix("torch.")
        self.work[device, name] += work
        self.work_at[f"{device} {name}"][self._place()] += work

    def _note(self, kind: str, size: int = 0) -> None:
        place = self._place()
        self.places[kind][place] += 1
        self.bytes[kind] += size
        self.bytes_at[kind][place] += size

    def _place(self) -> str:
        for frame in _frames():
            name = frame.f_code.co_filename
            if self.package in name and not name.endswith("/transfers.py"):
                short = name.rsplit(self.package, 1)[1]
                return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        return "elsewhere"

    def report(self) -> dict[str, Any]:
        """Plain data, places with the most first."""
        return {
            "launches": dict(self.launches),
            "copies": {kind: self._copies(kind) for kind in self.places},
            "work": {f"{device} {dtype}": work for (device, dtype), work in _falling(self.work).items()},
            "work_at": {name: _falling(places) for name, places in self.work_at.items()},
        }

    def _copies(self, kind: str) -> dict[str, Any]:
        places = {place: [times, self.bytes_at[kind][place]] for place, times in self.places[kind].most_common()}
        return {"times": sum(self.places[kind].values()), "bytes": self.bytes[kind], "places": places}


def _falling(counts: Mapping[Any, float]) -> dict[Any, float]:
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def table(report: dict[str, Any], most: int = 12) -> str:
    """The report as text."""
    lines = [f"launches: {report['launches']}"]
    for kind, found in report["copies"].items():
        lines.append(f"{kind}: {found['times']} times, {found['bytes'] / 1e6:.1f} MB")
        for place, (times, size) in list(found["places"].items())[:most]:
            lines.append(f"    {times:7d} x {size / 1e6:10.2f} MB  {place}")
    for name, work in report["work"].items():
        lines.append(f"work {name}: {work / 1e9:.2f} G")
        for place, part in list(report["work_at"].get(name, {}).items())[:most]:
            lines.append(f"    {part / 1e9:10.3f} G  {place}")
    return "\n".join(lines)
