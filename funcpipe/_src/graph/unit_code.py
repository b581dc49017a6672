"""Values and code: what units read and write, and what runs inside one.

In: nodes of a joint graph. Out: `Value` (a name, shape, dtype, bytes) and `Code` (a callable,
shared by all units whose graphs are equal). Code is "boxed": it takes one list, empties it, and
frees every input at its last use.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}[{', '.join(map(str, self.shape))}]"


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


def value_of(node: fx.Node, kind: str, index: int) -> Value:
    """The value that a node stands for."""
    base = base_of(node)
    tensor = node.meta["val"]
    return Value(
        name=node.name,
        kind=kind,
        index=index,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=tensor.dtype,
        device=tensor.device,
        storage=base.name,
        nbytes=nbytes(base.meta["val"]),
    )


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a dense tensor's memory."""
    return tensor.numel() * tensor.element_size()


def nbytes_of(node: fx.Node) -> int:
    """Bytes of what a node makes; 0 unless that is one tensor."""
    made = node.meta.get("val")
    return nbytes(made) if isinstance(made, torch.Tensor) else 0


def compile_unit(
    module: fx.GraphModule,
    body: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    compiled: dict[str, Code],
) -> Code:
    """The code of a unit.

    Args:
        module: the joint graph.
        body: the nodes that the unit computes, in order.
        inputs, outputs: the nodes that it reads and returns.
        compiled: code by its key, which an equal graph shares; new code is added.
    """
    key = _hash(body, inputs, outputs)
    if key not in compiled:
        unit = _graph_of(module, body, inputs, outputs, f"unit_{key}")
        compiled[key] = Code(
            key=key,
            module=unit,
            run=unit.forward,
            flops=sum(map(flops, body)),
            peak=_peak(body, outputs),
        )
    return compiled[key]


def _graph_of(
    module: fx.GraphModule,
    body: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    name: str,
) -> fx.GraphModule:
    """A boxed graph of some nodes of a joint graph."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in{number}")
        copies[node].meta["val"] = node.meta["val"]
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    graph.set_codegen(fx.graph._BoxedCodeGen())
    return fx.GraphModule(module, graph, class_name=name)


# ---- keys: equal graphs have equal texts


class _Bare(str):
    """A text that is printed without quotes."""

    __repr__ = str.__str__  # type: ignore[assignment]


def _hash(body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> str:
    numbers: dict[fx.Node, _Bare] = {}
    for node in (*inputs, *body):
        numbers[node] = _Bare(f"%{len(numbers)}")
    lines = list(map(_input_text, inputs))
    for node in body:
        args = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        lines.append(f"{node.target}{args}")
    lines.append(",".join(numbers[node] for node in outputs))
    return _short_hash(lines)


def _input_text(node: fx.Node) -> str:
    tensor = node.meta["val"]
    shape = tuple(tensor.shape)
    return f"{tensor.dtype}{shape}{tensor.stride()}{tensor.device.type}"


def _short_hash(lines: Iterable[str]) -> str:
    text = without_device_numbers("\n".join(lines))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_device_numbers(text: str) -> str:
    """A text without the numbers of GPUs, so that it is the same on all ranks.

    >>> without_device_numbers("zeros(device=cuda:3)")
    'zeros(device=cuda)'
    """
    return re.sub(r"index=\d+|cuda:\d+", "cuda", text)


# ---- what a unit costs


def flops(node: fx.Node) -> int:
    """Floating-point operations of a matrix product, a convolution or an attention; 0 for other
    nodes."""
    packet = getattr(node.target, "overloadpacket", None)
    count = flop_registry.get(packet) if is_op(node) else None
    if count is None:
        return 0
    args: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _fake_of)
    if "scaled_dot_product" in str(node.target):
        args = _with_equal_heads(args)
    return int(count(*args, **kwargs, out_val=_fake_of(node)))


def _fake_of(node: fx.Node) -> Any:
    return node.meta["val"]


def _with_equal_heads(args: Sequence[Any]) -> list[Any]:
    """Operands of an attention, ``(batch, heads, positions, dim)``, with equally many heads: torch
    counts no others."""
    heads = max(x.shape[1] for x in filter(_has_heads, args))
    widened = list(args)
    for position, operand in enumerate(args):
        if _has_heads(operand):
            shape = (operand.shape[0], heads, *operand.shape[2:])
            widened[position] = torch.empty(shape, device="meta")
    return widened


def _has_heads(operand: Any) -> bool:
    return isinstance(operand, torch.Tensor) and operand.dim() == 4


def _peak(body: list[fx.Node], outputs: list[fx.Node]) -> int:
    """Bytes of a unit's own memory at their peak: each tensor lives until its last use."""
    last_use: dict[fx.Node, fx.Node] = {}
    for node in body:
        for source in node.all_input_nodes:
            last_use[base_of(source)] = node
    freeable = set(body).difference(map(base_of, outputs))
    freed_at: Counter[fx.Node] = Counter()
    for base, node in last_use.items():
        if base in freeable:
            freed_at[node] += nbytes_of(base)
    now = peak = 0
    for node in body:
        if viewed(node) is None:
            now += nbytes_of(node)
        peak = max(peak, now)
        now -= freed_at[node]
    return peak


# ---- constants


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
        lines = [f"{node.target}{node.args}{node.kwargs}" for node in nodes]
        for node in nodes:
            if node.op == "get_attr":
                lines.append(_content_hash(getattr(self.run, node.target)))
        return _short_hash(lines)


def _content_hash(tensor: torch.Tensor) -> str:
    """A hash of what a tensor holds."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    held = flat.view(torch.uint8).numpy()
    return hashlib.sha256(held.tobytes()).hexdigest()


def folded(module: fx.GraphModule, node: fx.Node) -> Folded:
    """A function that computes a constant on the rank that calls it."""
    return Folded(extract(module, node))


def bytes_text(count: float) -> str:
    """Bytes for people.

    >>> bytes_text(1536)
    '1.5 KiB'
    """
    power = min(int(math.log(max(count, 1), 1024)), 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    decimals = 1 if power else 0
    return f"{count / 1024**power:.{decimals}f} {unit}"
