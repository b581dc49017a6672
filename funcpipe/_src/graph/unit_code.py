"""Values and code: what goes between units, and what runs inside one.

In: nodes of a joint graph. Out: `Value` (a name, shape, dtype, bytes) and `Code` (a callable,
shared by all units whose graphs are equal; "boxed": it takes one list, empties it, and frees every
input at its last use).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from funcpipe._src.graph.ops import base_of, extract, is_op, viewed


@dataclass(frozen=True, eq=False)
class Value:
    """What a unit reads or writes.

    Args:
        name: unique in its joint graph.
        kind: ``"param"``, ``"batch"``, ``"const"``, or ``"value"`` for what a unit makes.
        index: which param or batch leaf.
        shape, stride, dtype, device: of the tensor.
        storage: the name of the value whose memory it shares, its own otherwise.
        nbytes: of that memory.
    """

    name: str
    kind: str
    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: str
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.name}: "
            f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"
        )


@dataclass(frozen=True, eq=False)
class Code:
    """What runs inside a unit.

    Args:
        key: a hash of the graph; equal graphs are one `Code`.
        module: the graph.
        run: the boxed function: a list of tensors in, a tuple out.
        flops: floating-point operations of its matrix products and attention
            (``torch.utils.flop_counter``).
        peak: bytes of its own intermediates at their peak, outputs included, inputs not.
    """

    key: str
    module: fx.GraphModule
    run: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]
    flops: int
    peak: int


def value_of(x: fx.Node, kind: str, index: int) -> Value:
    """The value that a node stands for."""
    base, val = base_of(x), x.meta["val"]
    shape, stride = tuple(val.shape), tuple(val.stride())
    return Value(
        x.name,
        kind,
        index,
        shape,
        stride,
        val.dtype,
        val.device,
        base.name,
        nbytes(base.meta["val"]),
    )


def nbytes(val: torch.Tensor) -> int:
    """Bytes of a dense tensor's memory."""
    return val.numel() * val.element_size()


def compile_unit(
    module: fx.GraphModule,
    body: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    known: dict[str, Code],
) -> Code:
    """The code of a unit: ``known`` code when an equal graph is there already."""
    key = _hash(body, inputs, outputs)
    if key not in known:
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for i, x in enumerate(inputs):
            new[x] = graph.placeholder(f"in{i}")
            new[x].meta["val"] = x.meta["val"]
        for x in body:
            new[x] = graph.node_copy(x, lambda a: new[a])
        graph.output(tuple(new[x] for x in outputs))
        graph.set_codegen(fx.graph._BoxedCodeGen())
        unit = fx.GraphModule(module, graph, class_name=f"unit_{key}")
        known[key] = Code(key, unit, unit.forward, sum(map(flops, body)), _peak(body, outputs))
    return known[key]


def _hash(body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> str:
    number = {x: f"%{i}" for i, x in enumerate([*inputs, *body])}
    lines = [_meta(x) for x in inputs]
    for x in body:
        args = fx.node.map_arg((x.args, x.kwargs), lambda a: _Name(number[a]))
        lines.append(f"{x.target}{args}")
    lines.append(",".join(number[x] for x in outputs))
    return hashlib.sha256(without_device_numbers("\n".join(lines)).encode()).hexdigest()[:12]


def without_device_numbers(text: str) -> str:
    """A text without the numbers of GPUs: a rank's own says nothing.

    >>> without_device_numbers("zeros(device=cuda:3)")
    'zeros(device=cuda)'
    """
    return re.sub(r"index=\d+|cuda:\d+", "cuda", text)


class _Name(str):
    __repr__ = str.__str__  # type: ignore[assignment]


def _meta(x: fx.Node) -> str:
    val = x.meta["val"]
    return f"{val.dtype}{tuple(val.shape)}{val.stride()}{val.device.type}"


def flops(x: fx.Node) -> int:
    """Floating-point operations of a node that is a matrix product, a convolution or an attention;
    0 for others."""
    count = flop_registry.get(getattr(x.target, "overloadpacket", None)) if is_op(x) else None
    if count is None:
        return 0
    args: Any
    args, kwargs = fx.node.map_arg((x.args, x.kwargs), lambda a: a.meta["val"])
    if "scaled_dot_product" in str(x.target):
        args = _with_equal_heads(args)
    return int(count(*args, **kwargs, out_val=x.meta["val"]))


def _with_equal_heads(args: Sequence[Any]) -> list[Any]:
    """Operands of an attention, ``(batch, heads, positions, dim)``, with equally many heads: torch
    counts no others."""
    heads = max(a.shape[1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 4)
    wide = lambda a: torch.empty((a.shape[0], heads, *a.shape[2:]), device="meta")  # noqa: E731
    return [wide(a) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]


def _peak(body: list[fx.Node], outputs: list[fx.Node]) -> int:
    own, keep = set(body), set(outputs)
    last = {}
    for x in body:
        for a in x.all_input_nodes:
            last[base_of(a)] = x
    ends: dict[fx.Node, list[fx.Node]] = {}
    for a, x in last.items():
        ends.setdefault(x, []).append(a)
    keep = {base_of(x) for x in keep}
    now = peak = 0
    for x in body:
        now += 0 if viewed(x) else _size(x)
        peak = max(peak, now)
        now -= sum(_size(a) for a in ends.get(x, ()) if a in own and a not in keep)
    return peak


def _size(x: fx.Node) -> int:
    val = x.meta.get("val")
    return nbytes(val) if isinstance(val, torch.Tensor) else 0


class Folded:
    """A constant that is computed on the rank that calls it.

    Args:
        run: computes it.
    """

    def __init__(self, run: fx.GraphModule) -> None:
        self.run = run

    def __call__(self) -> torch.Tensor:
        return self.run().clone()

    @property
    def key(self) -> str:
        """A hash of what it is computed from, numbers of Python among it."""
        nodes = list(self.run.graph.nodes)
        lines = [f"{x.target}{x.args}{x.kwargs}" for x in nodes]
        lines += [_bits(getattr(self.run, x.target)) for x in nodes if x.op == "get_attr"]
        return hashlib.sha256(without_device_numbers("\n".join(lines)).encode()).hexdigest()[:12]


def _bits(x: torch.Tensor) -> str:
    """A hash of what a tensor holds."""
    held = torch.view_as_real(x) if x.is_complex() else x
    held = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


def folded(module: fx.GraphModule, x: fx.Node) -> Folded:
    """A function that computes a constant on the rank that calls it."""
    return Folded(extract(module, x))


def bytes_text(n: float) -> str:
    """Bytes for people.

    >>> bytes_text(1536)
    '1.5 KiB'
    """
    power = min(int(math.log(max(n, 1), 1024)), 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{n / 1024**power:.{1 if power else 0}f} {unit}"
