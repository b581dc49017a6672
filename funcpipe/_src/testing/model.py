"""Models for tests: a description that prints as Python, with params, loss function and batches.

A model is a chain of *segments* with a boundary after each; a segment has a few *layers*, or none.
The leaves of params lie in *pools* by kind. A layer names its leaves by number, so that any leaf
can be tied to any other place.

In: a `Model`, drawn by `funcpipe.testing.models` or written by hand.
Out: ``init``, ``loss_fn``, ``batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import Mean, Rows
from funcpipe._src.core.primitives.stage_boundary import stage_boundary

TOKENS, VOCAB = 3, 7

# Which leaves a layer takes: from the pools of matrices, vectors, scalars (0-d) and (integer)
# permutations. A "skip" takes the number of the segment whose output it adds instead.
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
        carry: what goes through a boundary: a ``"tensor"``; a ``"dict"`` or a ``"tuple"`` with
            masks, ids, None, ints, bools and a value that is never read.
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
        draw = _Draws(seed, dtype, self.width)
        params: dict[str, Any] = {"embed": draw.normal(VOCAB, self.width)}
        params["pools"] = {}
        for pool, size in self._pool_sizes().items():
            params["pools"][pool] = [draw.leaf(pool) for _ in range(size)]
        params["head"] = None
        if not self.tied_head:
            params["head"] = draw.normal(VOCAB, self.width, scale=self.width**-0.5)
        if self.unused:
            params["unused"] = (draw.normal(2, 3), torch.arange(2), draw.normal())
        return params

    def _pool_sizes(self) -> dict[str, int]:
        sizes = dict.fromkeys("MVSP", 0)
        for layers in self.segments:
            for layer in layers:
                pools = LAYERS[layer.kind]  # none for a skip, whose number is a segment
                for pool, number in zip(pools, layer.leaves, strict=False):
                    sizes[pool] = max(sizes[pool], number + 1)
        return sizes

    def batch(self, seed: int = 0, rows: int = 4) -> dict[str, Any]:
        """A batch: tensors of ``rows`` rows, a 0-d tensor and a number.

        The weight of at least one row is not zero.
        """
        generator = torch.Generator().manual_seed(1000 + seed)
        ids, labels = torch.randint(VOCAB, (2, rows, TOKENS), generator=generator)
        mask = torch.rand(rows, TOKENS, generator=generator) < 0.7
        weight = torch.randint(3, (rows, TOKENS), generator=generator).double()
        mask[:, 0] = True  # a row that sees no token would be NaN
        weight[: rows // 2] *= not self.zero_rows
        weight[-1, 0] = 1
        return {
            "ids": ids,
            "labels": labels,
            "mask": mask,
            "weight": weight,
            "t": torch.tensor(1.5, dtype=torch.float64),  # a temperature
            "shift": 0.25,
        }

    def loss_fn(self, params: Any, batch: Any) -> Any:
        """``Mean``, or ``(Mean, aux)``."""
        params = pytree.map_tensors(_TOPS[self.top], params)
        forward = _Forward(self, params["pools"], batch["mask"], batch["labels"])
        hidden = F.embedding(batch["ids"], params["embed"]) + batch["shift"]
        for_aux = hidden
        for number, layers in enumerate(self.segments):
            hidden = forward.segment(number, layers, hidden)
            if number == self.aux:
                for_aux = hidden
        head = params["embed"] if self.tied_head else params["head"]
        logits = hidden @ head.T / batch["t"].to(hidden.dtype)
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            forward.labels.flatten(),
            reduction="none",
        )
        weight = batch["weight"].to(hidden.dtype)
        mean = Mean((losses * weight.flatten()).sum(), weight.sum())
        if not self.has_aux:
            return mean
        return mean, _aux(for_aux, logits, batch["labels"], weight)


class _Draws:
    """Random leaves, one after another from one seed."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        width: int,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.width = width

    def normal(
        self,
        *shape: int,
        mean: float = 0.0,
        scale: float = 1.0,
    ) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (mean + scale * drawn).to(self.dtype)

    def leaf(self, pool: str) -> Tensor:
        """A leaf of the kind that a pool has."""
        if pool == "M":
            return self.normal(self.width, self.width, scale=self.width**-0.5)
        if pool == "V":
            return self.normal(self.width, mean=1.0, scale=0.1)
        if pool == "S":
            return self.normal()
        return torch.randperm(self.width, generator=self.generator)


def _unchanged(leaf: Tensor) -> Tensor:
    return leaf


def _scaled(leaf: Tensor) -> Tensor:
    return leaf * 0.75 if leaf.is_floating_point() else leaf


def _cast(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


_TOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _unchanged,
    "scale": _scaled,
    "cast": _cast,
}


def _aux(
    hidden: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
) -> dict[str, Any]:
    right = (logits.argmax(-1) == labels).sum()
    sizes = hidden.square().mean(-1) * weight
    return {
        "size": Mean(sizes.sum(), weight.sum()),
        "right": Mean(right, torch.ones_like(labels).sum()),
        "rows": Rows(hidden.mean(1)),
        "columns": [Rows(hidden[:, 0].t(), 1)],
    }


@dataclass
class _Forward:
    """One pass through the segments."""

    model: Model
    pools: dict[str, list[Tensor]]
    mask: Tensor
    labels: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    carried: Tensor | None = None

    def segment(
        self,
        number: int,
        layers: tuple[Layer, ...],
        hidden: Tensor,
    ) -> Tensor:
        for layer in layers:
            hidden = self._layer(layer, hidden)
        self.outputs.append(hidden)
        if number == self.model.carried:
            self.carried = hidden
        boundary = getattr(self, f"_boundary_of_{self.model.carry}")
        return boundary(hidden)

    def _layer(self, layer: Layer, hidden: Tensor) -> Tensor:
        if layer.kind == "skip":
            (number,) = layer.leaves
            output = self.carried if number == self.model.carried else None
            if output is None:
                output = self.outputs[number]
            return hidden + 0.5 * output
        leaves = []
        for pool, number in zip(LAYERS[layer.kind], layer.leaves, strict=True):
            leaves.append(self.pools[pool][number])
        compute = getattr(self, f"_{layer.kind}")
        return hidden + compute(hidden, *leaves)

    # ---- layers: each is added to what it reads, so that no gradient vanishes

    def _linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return torch.tanh(F.linear(hidden, weight, bias))

    def _gated(
        self,
        hidden: Tensor,
        gate: Tensor,
        up: Tensor,
    ) -> Tensor:
        return torch.sigmoid(hidden @ gate) * (hidden @ up)

    def _norm(
        self,
        hidden: Tensor,
        gain: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return F.layer_norm(hidden, (hidden.shape[-1],), gain, bias)

    def _mix(self, hidden: Tensor, weight: Tensor) -> Tensor:
        scores = torch.tanh(hidden @ hidden.transpose(1, 2))
        seen = scores.masked_fill(~self.mask[:, None], -torch.inf)
        return seen.softmax(-1) @ hidden @ weight

    def _scale(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return scale * torch.sin(hidden)

    def _permute(self, hidden: Tensor, order: Tensor) -> Tensor:
        return 0.5 * hidden.index_select(-1, order)

    # ---- boundaries

    def _boundary_of_tensor(self, hidden: Tensor) -> Tensor:
        return stage_boundary(hidden)

    def _boundary_of_dict(self, hidden: Tensor) -> Tensor:
        sign = hidden.detach() > 0  # not differentiable, and not from the batch alone
        out = stage_boundary(
            {
                "x": hidden,
                "sign": sign,
                "mask": self.mask,
                "old": self.carried,
                "none": None,
                "n": 2,
                "dead": hidden * 2,
            }
        )
        self.mask, self.carried = out["mask"], out["old"]
        return torch.where(out["sign"], out["x"], out["x"] / out["n"])

    def _boundary_of_tuple(self, hidden: Tensor) -> Tensor:
        tensors = [self.labels, self.carried]
        flags = {"on": True, "mask": self.mask}
        out = stage_boundary((hidden, None, 3, tensors, flags))
        hidden, none, _, (self.labels, self.carried), flags = out
        self.mask = flags["mask"]
        return hidden if flags["on"] and none is None else hidden * 0
