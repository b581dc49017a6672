"""A loss function traced, cut, and its units run by hand, one after the other on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.gradients import totals_and_grads
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.ops import is_heavy
from funcpipe._src.graph.partition import Unit, Units, cut
from funcpipe._src.graph.trace import Traced, trace
from funcpipe._src.graph.unit_code import Value

# On CPUs a fake of attention's logsumexp is float32 there, whatever dtype the kernel makes.
OLD = torch.__version__.startswith("2.11.")


def traced(loss: Callable, params: Any, batch: Any, has_aux: bool = False) -> Traced:
    mode = FakeTensorMode()
    (p, p_spec), (b, b_spec) = (
        tree.flatten(tree.map_tensors(lambda x: fake(x.shape, x, mode), x)) for x in (params, batch)
    )
    return trace(loss, has_aux, (p, p_spec), (b, b_spec), mode)


def units(loss: Callable, params: Any, batch: Any, has_aux: bool = False) -> Units:
    return cut(traced(loss, params, batch, has_aux))


def run(
    c: Units, params: Any, batch: Any, kinds: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Heads and gradients, by units of the given kinds: "FB" or "FIW"."""
    p, b = tree.leaves(params), [x for x in tree.leaves(batch) if isinstance(x, torch.Tensor)]
    made: dict[Value, torch.Tensor] = {}

    def read(v: Value) -> torch.Tensor:
        if v in c.constants and v not in made:
            made[v] = c.constants[v]()
        return (
            {"param": p, "batch": b}[v.kind][v.index] if v.kind in ("param", "batch") else made[v]
        )

    for unit in c.units.values():
        if unit.kind in kinds:
            out = unit.code.run([read(v) for v in unit.inputs])
            for v, x in zip(unit.outputs, out, strict=True):
                assert tuple(x.shape) == v.shape
                assert x.dtype == v.dtype or (OLD and v.name.startswith("getitem"))
                made[v] = x
    grads = [
        functools.reduce(torch.add, map(read, partials)) if partials else None
        for partials in c.grads
    ]
    return [read(v) for v in c.heads], [
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, p, strict=True)
    ]


def assert_units_are_eager(loss: Callable, params: Any, batch: Any) -> Units:
    """F/B and F/I/W compute what plain PyTorch does, to the bit; returns the units."""
    c = units(loss, params, batch)
    total, _, _, expected = totals_and_grads(loss, False, *tree.flatten(params), batch)
    for kinds in ("FB", "FIW"):
        heads, grads = run(c, params, batch, kinds)
        assert torch.equal(heads[0], total), kinds
        for path, g, e in zip(tree.paths(params), grads, expected, strict=True):
            assert torch.equal(g, e), f"{kinds}: {path} is off by {(g - e).abs().max()}"
    assert_well_cut(c)
    return c


def assert_well_cut(c: Units) -> None:
    """What holds of every cut."""
    made = {v: u for u in c.units.values() for v in u.outputs}
    order = list(c.units.values())
    for u in order:
        assert len(set(u.inputs)) == len(u.inputs) and len(set(u.outputs)) == len(u.outputs)
        for v in u.inputs:
            if v.kind == "value":
                assert order.index(made[v]) < order.index(u), f"{u} reads {v} of {made[v]}"
                assert made[v].kind != "W", f"{u} reads {v} of {made[v]}"
    for s in range(c.segments):
        f, b, i, w = (c.units[k, s] for k in "FBIW")
        # every heavy op of B is once in I and W together
        assert sorted([*heavy(i), *heavy(w)]) == sorted(heavy(b))
        # W reads what B reads and what I leaves it, and nothing else of other segments
        near = {*b.inputs, *f.outputs, *i.outputs}
        assert all(v in near or v.kind != "value" for v in w.inputs), f"{w} reads of elsewhere"


def heavy(u: Unit) -> list[str]:
    """The matrix products and the like of a unit."""
    return [str(x.target) for x in u.code.module.graph.nodes if is_heavy(x)]


def ops(u: Unit) -> list[str]:
    """All ops of a unit, by name."""
    nodes = (x for x in u.code.module.graph.nodes if x.op == "call_function")
    return [
        getattr(getattr(x.target, "overloadpacket", x.target), "__name__", str(x.target))
        for x in nodes
    ]
