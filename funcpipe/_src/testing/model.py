"""Models for tests: a description that prints as Python, and the params, loss function and batches
it stands for.

Terms. A model is a chain of *segments* with a boundary after each; a segment is a few *layers*,
none included. The leaves of params lie in *pools* by kind; a layer names its leaves by number, so
that any leaf can be tied to any other place.

In: a `Model`, drawn by `funcpipe.testing.models` or written by hand. Out: ``init``, ``loss_fn``,
``batch``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import Mean, Rows
from funcpipe._src.core.primitives.stage_boundary import stage_boundary

TOKENS, VOCAB = 3, 7

# What leaves a layer of a kind takes: from the pools of matrices, vectors, scalars (0-d) and
# (integer) permutations. A "skip" takes the number of the segment whose output it adds instead.
LAYERS = {
    "linear": "MV",
    "gated": "MM",
    "norm": "VV",
    "mix": "M",
    "scale": "S",
    "permute": "P",
    "skip": "",
}


@dataclass(frozen=True)
class Layer:
    """A layer: one of ``LAYERS``, and the numbers of its leaves."""

    kind: str
    leaves: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """A random model: ``(rows, TOKENS)`` ids in, the cross-entropy of every token out, weighted.

    Args:
        segments: the layers of every segment; the head is one more segment.
        width: of the hidden state.
        carry: what a boundary is given: a ``"tensor"``, a ``"dict"`` or a ``"tuple"`` with masks,
            ids, None, ints, bools and a value that nobody reads.
        carried: the segment whose output travels on in the dict or tuple from then on; other skips
            are locals.
        tied_head: whether the embedding is also the head.
        top: what happens to the params at the top of the loss: ``"none"``, ``"scale"``, or a
            ``"cast"`` to float64.
        aux: the segment at which aux values are taken; None for no aux.
        unused: whether params hold leaves that the loss does not read.
        zero_rows: whether half of the rows have the weight zero.

    >>> model = Model(((Layer("linear", (0, 0)),), (Layer("linear", (0, 1)),)), tied_head=True)
    >>> params = model.init(seed=0)
    >>> [len(pool) for pool in params["pools"].values()], params["head"]
    ([1, 2, 0, 0], None)
    >>> model.loss_fn(params, model.batch(seed=0, rows=2)).total.dtype
    torch.float64
    """

    segments: tuple[tuple[Layer, ...], ...]
    width: int = 4
    carry: str = "tensor"
    carried: int | None = None
    tied_head: bool = False
    top: str = "none"
    aux: int | None = None
    unused: bool = False
    zero_rows: bool = False

    @property
    def has_aux(self) -> bool:
        """Whether the loss function returns ``(loss, aux)``."""
        return self.aux is not None

    def init(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Params: floating leaves of ``dtype``, integer ones frozen."""
        g = torch.Generator().manual_seed(seed)
        d = self.width

        def rand(*shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
            return (mean + scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

        make = {
            "M": lambda: rand(d, d, scale=d**-0.5),
            "V": lambda: rand(d, mean=1.0, scale=0.1),
            "S": lambda: rand(),
            "P": lambda: torch.randperm(d, generator=g),
        }
        out = {
            "embed": rand(VOCAB, d),
            "pools": {pool: [make[pool]() for _ in range(n)] for pool, n in self._pools().items()},
            "head": None if self.tied_head else rand(VOCAB, d, scale=d**-0.5),
        }
        return out | ({"unused": (rand(2, 3), torch.arange(2), rand())} if self.unused else {})

    def _pools(self) -> dict[str, int]:
        sizes = dict.fromkeys("MVSP", 0)
        for layer in (layer for layers in self.segments for layer in layers):
            for pool, number in zip(LAYERS[layer.kind], layer.leaves, strict=False):
                sizes[pool] = max(sizes[pool], number + 1)
        return sizes

    def batch(self, seed: int = 0, rows: int = 4) -> dict[str, Any]:
        """A batch: tensors of ``rows`` rows, a 0-d tensor and a number. Some row's weight is not
        zero."""
        g = torch.Generator().manual_seed(1000 + seed)
        ids, labels = torch.randint(VOCAB, (2, rows, TOKENS), generator=g)
        mask = torch.rand(rows, TOKENS, generator=g) < 0.7
        weight = torch.randint(3, (rows, TOKENS), generator=g).double()
        mask[:, 0] = True  # a row that sees no token would be NaN
        weight[: rows // 2] *= not self.zero_rows
        weight[-1, 0] = 1
        temperature = torch.tensor(1.5, dtype=torch.float64)
        return {
            "ids": ids,
            "labels": labels,
            "mask": mask,
            "weight": weight,
            "t": temperature,
            "shift": 0.25,
        }

    def loss_fn(self, params: Any, batch: Any) -> Any:
        """``Mean``, or ``(Mean, aux)``."""
        p = tree.map_tensors(_TOPS[self.top], params)
        walk = _Walk(self, p["pools"], batch["mask"], batch["labels"])
        x = F.embedding(batch["ids"], p["embed"]) + batch["shift"]
        seen = x
        for number, layers in enumerate(self.segments):
            x = walk.segment(number, layers, x)
            seen = x if number == self.aux else seen
        logits = x @ (p["embed"] if self.tied_head else p["head"]).T / batch["t"].to(x.dtype)
        loss = F.cross_entropy(logits.flatten(0, 1), walk.labels.flatten(), reduction="none")
        weight = batch["weight"].to(x.dtype)
        mean = Mean((loss * weight.flatten()).sum(), weight.sum())
        return (mean, _aux(seen, logits, batch["labels"], weight)) if self.has_aux else mean


_TOPS = {
    "none": lambda leaf: leaf,
    "scale": lambda leaf: leaf * 0.75 if leaf.is_floating_point() else leaf,
    "cast": lambda leaf: leaf.double() if leaf.is_floating_point() else leaf,
}


def _aux(
    x: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> dict[str, Any]:
    right = (logits.argmax(-1) == labels).sum()
    return {
        "size": Mean((x.square().mean(-1) * weight).sum(), weight.sum()),
        "right": Mean(right, torch.ones_like(labels).sum()),
        "rows": Rows(x.mean(1)),
        "columns": [Rows(x[:, 0].t(), 1)],
    }


@dataclass
class _Walk:
    """One pass through the segments."""

    model: Model
    pools: dict[str, list[torch.Tensor]]
    mask: torch.Tensor
    labels: torch.Tensor
    outputs: list[torch.Tensor] = field(default_factory=list)
    carried: torch.Tensor | None = None

    def segment(self, number: int, layers: tuple[Layer, ...], x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = self._layer(layer, x)
        self.outputs.append(x)
        if number == self.model.carried:
            self.carried = x
        return getattr(self, f"_{self.model.carry}")(x)

    def _layer(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        if layer.kind == "skip":
            (number,) = layer.leaves
            travelling = self.carried if number == self.model.carried else None
            return x + 0.5 * (self.outputs[number] if travelling is None else travelling)
        leaves = [
            self.pools[pool][i] for pool, i in zip(LAYERS[layer.kind], layer.leaves, strict=True)
        ]
        return x + getattr(self, f"_{layer.kind}")(x, *leaves)

    # ---- layers: each is added to what it reads, so that no gradient vanishes

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, weight, bias))

    def _gated(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x @ gate) * (x @ up)

    def _norm(self, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), gain, bias)

    def _mix(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(x @ x.transpose(1, 2)).masked_fill(~self.mask[:, None], -torch.inf)
        return scores.softmax(-1) @ x @ weight

    def _scale(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * torch.sin(x)

    def _permute(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.index_select(-1, order)

    # ---- boundaries

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        return stage_boundary(x)

    def _dict(self, x: torch.Tensor) -> torch.Tensor:
        sign = x.detach() > 0  # not differentiable, and not from the batch alone
        out = stage_boundary(
            {
                "x": x,
                "sign": sign,
                "mask": self.mask,
                "old": self.carried,
                "none": None,
                "n": 2,
                "dead": x * 2,
            }
        )
        self.mask, self.carried = out["mask"], out["old"]
        return torch.where(out["sign"], out["x"], out["x"] / out["n"])

    def _tuple(self, x: torch.Tensor) -> torch.Tensor:
        out = stage_boundary(
            (x, None, 3, [self.labels, self.carried], {"on": True, "mask": self.mask})
        )
        x, none, _, (self.labels, self.carried), flags = out
        self.mask = flags["mask"]
        return x if flags["on"] and none is None else x * 0
