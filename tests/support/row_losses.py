"""Loss functions whose batch is split by rows, for tests: proven, and computed part by part.

In: a body, which says what becomes of rows. Out: whether it is proven; its total and gradients on
one device, and over parts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.proof.loss_runs import Subject
from funcpipe._src.proof.rows import prove_rows
from funcpipe.errors import BatchError

N, T, D, V = 8, 6, 4, 7  # rows, positions, features, tokens
Body = Callable[
    [Any, Any, torch.Tensor], Any
]  # (params, batch, features of every row) -> the total, or a Mean
WHOLE = ("table",)  # the leaf of the batch that every part has


def data() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    ints = lambda n, *s: torch.randint(0, n, s, generator=g)  # noqa: E731
    params = {
        "w": rand(D, D),
        "a": rand(D),
        "embed": rand(V, D),
        "places": rand(T, D),
        "experts": rand(3, D, D),
    }
    params |= {"conv": rand(D, D, 3), "conv2": rand(2, 1, 3, 3), "row": rand(1, D)}
    batch = {
        "x": rand(N, D),
        "seq": rand(N, T, D),
        "image": rand(N, 1, 4, 4),
        "tokens": ints(V, N, T),
    }
    batch |= {
        "label": ints(D, N),
        "keep": ints(2, N) > 0,
        "length": ints(T, N),
        "weight": rand(N).abs(),
    }
    batch |= {
        "expert": ints(3, N),
        "turned": rand(T, N),
        "pairs": rand(2 * N, D),
        "spd": rand(N, D, D),
        "table": rand(T, D),
    }
    batch["key"] = fp.random.keys(fp.random.key(0), N)
    batch["spd"] = batch["spd"] @ batch["spd"].mT + torch.eye(D, dtype=torch.float64)
    return params, batch


def dim_of(name: str) -> int | None:
    return None if name in WHOLE else 1 if name == "turned" else 0


def loss_of(body: Body) -> Callable:
    def loss(p: Any, b: Any) -> Any:
        out = body(p, b, torch.tanh(b["x"] * p["a"]))
        if isinstance(out, tuple) and not isinstance(out, fp.Mean):
            return fp.Mean(out[0], count(b)), out[1]
        return out if isinstance(out, fp.Mean) else fp.Mean(out, count(b))

    return loss


def count(b: Any) -> torch.Tensor:
    return torch.tensor(float(len(b["x"])))


def part_of(batch: Any, k: int, parts: int) -> dict[str, torch.Tensor]:
    dims = {name: dim_of(name) for name in batch}
    return {
        k_: x if dims[k_] is None else x.chunk(parts, dims[k_])[k].contiguous()
        for k_, x in batch.items()
    }


def prove(body: Body, parts: int = 2, has_aux: bool = False, mesh: fp.Mesh | None = None) -> None:
    """Prove a loss whose rows are split into microbatches, or over the one axis of a mesh."""
    params, batch = data()
    mode = FakeTensorMode()
    fakes = tree.map_tensors(lambda x: fake(x.shape, x, mode), params)
    leaves, spec = tree.flatten(part_of(batch, 0, parts))
    local = [fake(x.shape, x, mode) for x in leaves]
    axes = tuple(mesh.axes) if mesh else ()
    dims = [dim_of(name) for name in sorted(batch)]
    cuts = [[] if d is None else [LeafCut(d, parts, axes)] for d in dims]
    prove_rows(
        Subject(loss_of(body), has_aux, fakes, spec, mode, axes), local, cuts, mesh or fp.Mesh()
    )


def computed(body: Body, params: Any, batch: Any) -> list[torch.Tensor]:
    """Total, weight and gradients of the total."""
    held = tree.map(lambda x: x.detach().requires_grad_(), params)
    loss = loss_of(body)(held, batch)
    leaves = tree.leaves(held)
    grads = torch.autograd.grad(loss.total, leaves, allow_unused=True, materialize_grads=True)
    return [loss.total.detach(), loss.weight.detach(), *grads]


def check_equal(body: Body, parts: int) -> None:
    """What parts make adds up to what one device makes."""
    params, batch = data()
    one = computed(body, params, batch)
    each = [computed(body, params, part_of(batch, k, parts)) for k in range(parts)]
    for x, *ys in zip(one, *each, strict=True):
        torch.testing.assert_close(sum(ys[1:], ys[0]), x, rtol=1e-12, atol=1e-12)


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect a BatchError that has these words in this order, and speaks of rows outside of the
    code that it quotes."""
    with pytest.raises(BatchError) as found:
        yield
    text = re.sub("`[^`]*`", "", str(found.value))
    assert re.search(".*".join(map(re.escape, words)), text, re.DOTALL), text
    assert not re.search(r"position(?!s at)|slice of|a rank|sequence", text), text
