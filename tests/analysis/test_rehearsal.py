"""What a step computes of leaves outside ``value_and_grad``: on ranks that lack leaves or hold
shards, the same or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
import torchopt
from support.models import count, distance, refused, start

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe.errors import StateError
from funcpipe.optim import statistics
from funcpipe.testing import assert_equivalent

FLOAT64 = 1e-12  # sums over microbatches and over leaves are reordered
WIDTH, WORDS = 3, 5

PIPE = fp.pipelined(axis="pipe", microbatches=2)
SHARDED = fp.compose(fp.data_parallel(axis="data"), fp.sharded_weights(axis="data"))
STACKS: dict[str, tuple[Callable, fp.Mesh]] = {
    "pipeline": (PIPE, fp.Mesh(pipe=2)),
    "long pipeline": (PIPE, fp.Mesh(pipe=3)),
    "sharded": (SHARDED, fp.Mesh(data=2)),
    "pipeline, sharded": (fp.compose(PIPE, SHARDED), fp.Mesh(pipe=2, data=2)),
}
every_stack = pytest.mark.parametrize("stack", STACKS)
pipelines = pytest.mark.parametrize("stack", ["pipeline", "pipeline, sharded"])


def params() -> dict[str, Any]:
    """An embedding that is tied to the head, blocks, and an odd number of elements."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    return {
        "embed": draw(WORDS, WIDTH),
        "blocks": [{"w": draw(WIDTH, WIDTH), "b": draw(WIDTH)} for _ in range(2)],
    }


def batch() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return {name: torch.randint(WORDS, (4,), generator=gen) for name in ("token", "label")}


def loss_fn(p: Any, b: Any) -> fp.Mean:
    x = fp.stage_boundary(F.embedding(b["token"], p["embed"]))
    for block in p["blocks"]:
        x = fp.stage_boundary(x + torch.tanh(x @ block["w"] + block["b"]))
    return fp.Mean(F.cross_entropy(x @ p["embed"].T, b["label"], reduction="sum"), count(x))


Rest = Callable[[Any, Any], tuple[Any, Any]]  # (state, grads) -> (state, metrics)


def step_with(rest: Rest) -> Callable:
    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state["p"], b)
        state, metrics = rest(state, grads)
        return state, {"loss": loss, **metrics}

    return step


def init(p: Any) -> dict[str, Any]:
    """Params, and a number for each leaf."""
    return {"p": p, "n": optree.tree_map(lambda x: torch.ones((), dtype=x.dtype), p)}


def scaled(state: Any, grads: Any, scale: Any) -> Any:
    new = optree.tree_map(lambda w, d, s: w - 0.1 * s * d, state["p"], grads, scale)
    return {**state, "p": new}


# ---- what ranks compute as one device does


def each_by_its_norm(state: Any, grads: Any) -> Any:
    norms = statistics(grads).norm
    return scaled(state, grads, optree.tree_map(lambda n: 1 / (n + 1e-3), norms)), {}


def and_a_metric(state: Any, grads: Any) -> Any:
    """The same trees beside params and as metrics, and what follows from two of them."""
    found, of_params = statistics(grads), statistics(state["p"])
    ratio = optree.tree_map(lambda a, b: a / b, found.norm, of_params.norm)
    large = optree.tree_map(lambda a: a > 1, of_params.max_abs)
    return scaled(state, grads, ratio), {
        "found": found,
        "ratio": ratio,
        "large": large,
        "first": ratio["embed"],
    }


def kept_in_the_state(state: Any, grads: Any) -> Any:
    kept = optree.tree_map(
        lambda old, new: 0.9 * old + 0.1 * new, state["n"], statistics(grads).norm
    )
    return {**scaled(state, grads, kept), "n": kept}, {}


def the_largest_norm(state: Any, grads: Any) -> Any:
    """Joined, so the tree is whole on every rank."""
    norms = torch.stack(tree.leaves(statistics(grads).norm))
    return scaled(state, grads, state["n"]), {"largest": norms.max(), "of": len(norms)}


def scaled_by_the_largest(state: Any, grads: Any) -> Any:
    largest = torch.stack(tree.leaves(statistics(grads).max_abs)).max()
    return {
        **state,
        "p": optree.tree_map(lambda w, d: w - 0.1 * d / largest, state["p"], grads),
    }, {}


def joined_and_apart(state: Any, grads: Any) -> Any:
    """One call for each use."""
    largest = torch.stack(tree.leaves(statistics(grads).norm)).max()
    return scaled(state, grads, statistics(grads).norm), {"largest": largest}


def one_leaf_for_all(state: Any, grads: Any) -> Any:
    norm = statistics(grads).norm["embed"]
    return {**state, "p": optree.tree_map(lambda w, d: w - 0.1 * d / norm, state["p"], grads)}, {
        "norm": norm
    }


def foreach(state: Any, grads: Any) -> Any:
    leaves, spec = tree.flatten(state["p"])
    moves = torch._foreach_mul(tree.leaves(grads), tree.leaves(statistics(grads).norm))
    return {**state, "p": tree.unflatten(spec, torch._foreach_sub(leaves, moves))}, {}


def in_place(state: Any, grads: Any) -> Any:
    moves = optree.tree_map(lambda d, n: d.clone().mul_(n).neg_(), grads, statistics(grads).norm)
    return scaled(state, moves, state["n"]), {}


def metrics_of_leaves(state: Any, grads: Any) -> Any:
    """Of the dtypes and shapes that there are, and numbers of Python."""
    made = optree.tree_map(
        lambda x: {"half": torch.full((2, 1), 0.5).half(), "n": torch.tensor(7), "dims": x.dim()},
        grads,
    )
    return state, {"made": made, "kept": state["n"]}


RIGHT = {
    rest.__name__: rest
    for rest in (
        each_by_its_norm,
        and_a_metric,
        kept_in_the_state,
        the_largest_norm,
        scaled_by_the_largest,
        joined_and_apart,
        one_leaf_for_all,
        foreach,
        in_place,
        metrics_of_leaves,
    )
}


@every_stack
@pytest.mark.parametrize("name", RIGHT)
def test_ranks_compute_what_one_device_does(name: str, stack: str) -> None:
    (transform, mesh), step = STACKS[stack], step_with(RIGHT[name])
    assert_equivalent(step, transform(step), mesh, init, params(), [batch(), batch()], rtol=FLOAT64)


def lamb(state: Any, grads: Any) -> Any:
    """Layer-wise trust ratios: the update of a leaf has the norm of the leaf."""
    direction = optree.tree_map(lambda d, w: d.sign() + 0.01 * w, grads, state["p"])
    ratio = optree.tree_map(
        lambda a, b: a / b, statistics(state["p"]).norm, statistics(direction).norm
    )
    return scaled(state, direction, ratio), {"ratio": ratio}


@every_stack
def test_lamb(stack: str) -> None:
    """Beside norms by torch on whole leaves."""
    transform, mesh = STACKS[stack]
    run, state = start(transform(step_with(lamb)), mesh, params(), batch(), init)
    state, metrics = run(state, batch())
    new, ratios = run.unplace(state)["p"], metrics["ratio"]
    _, grads = fp.value_and_grad(loss_fn)(params(), batch())
    for w, d, got, ratio in zip(*map(tree.leaves, (params(), grads, new, ratios)), strict=True):
        direction = d.sign() + 0.01 * w
        assert (
            distance(
                (got, ratio),
                (w - 0.1 * w.norm() / direction.norm() * direction, w.norm() / direction.norm()),
            )
            < FLOAT64
        )


# ---- what is refused, when the step is planned

LACKS = (
    "on a rank that does not hold params['",
    "optree.tree_map",
    "fp.optim.statistics(tree).norm",
)


def by_the_number_of_leaves(state: Any, grads: Any) -> Any:
    share = 1 / len(tree.leaves(grads))
    return {**state, "p": optree.tree_map(lambda w, d: w - share * d, state["p"], grads)}, {}


def by_the_leaf_of_a_place(state: Any, grads: Any) -> Any:
    return state, {"norm": fp.global_norm(tree.leaves(grads)[0])}


def by_the_norm_of_each_leaf(state: Any, grads: Any) -> Any:
    return scaled(state, grads, optree.tree_map(fp.global_norm, grads)), {}


def by_norms_in_a_list(state: Any, grads: Any) -> Any:
    return state, {"largest": torch.stack([fp.global_norm(d) for d in tree.leaves(grads)]).max()}


def joined_numbers_of_the_state(state: Any, grads: Any) -> Any:
    return state, {"sum": torch.stack(tree.leaves(state["n"])).sum()}


def counted(state: Any, grads: Any) -> Any:
    return state, {"leaves": len(tree.leaves(grads))}


def joined_and_beside_params(state: Any, grads: Any) -> Any:
    norms = statistics(grads).norm
    largest = torch.stack(tree.leaves(norms)).max()
    return scaled(state, grads, norms), {"largest": largest}


def joined_and_kept(state: Any, grads: Any) -> Any:
    norms = statistics(grads).norm
    return {**state, "n": norms}, {"largest": torch.stack(tree.leaves(norms)).max()}


def of_the_first_leaf(state: Any, grads: Any) -> Any:
    """Python picks the leaf, so ranks would pick others."""
    first = tree.leaves(state["n"])[0]
    return {**state, "n": optree.tree_map(lambda n: n + first, state["n"])}, {}


WRONG: dict[str, tuple[Rest, tuple[str, ...]]] = {
    "number of leaves": (by_the_number_of_leaves, ("the step computes another state['p']", *LACKS)),
    "leaf of a place": (
        by_the_leaf_of_a_place,
        ("a global norm or sum at test_rehearsal.py:", *LACKS),
    ),
    "norm of each leaf": (
        by_the_norm_of_each_leaf,
        ("a global norm or sum at test_rehearsal.py:", "gets another value for params['", *LACKS),
    ),
    "norms in a list": (by_norms_in_a_list, ("a global norm or sum at test_rehearsal.py:", *LACKS)),
    "numbers of the state": (
        joined_numbers_of_the_state,
        ("the step computes another metrics['sum']", *LACKS),
    ),
    "counted": (counted, ("the step computes another metrics['leaves']", *LACKS)),
    "joined and beside params": (
        joined_and_beside_params,
        (
            "fails on a rank",
            "are joined at test_rehearsal.py:",
            "torch.stack(",
            "Call it twice, once for each use",
        ),
    ),
    "joined and kept": (
        joined_and_kept,
        ("the step adds state['n']", "its state has other leaves", *LACKS),
    ),
    "first leaf": (of_the_first_leaf, ("the step computes another state['n']", *LACKS)),
}


@pipelines
@pytest.mark.parametrize("name", WRONG)
def test_ranks_that_would_compute_something_else(name: str, stack: str) -> None:
    (rest, words), (transform, mesh) = WRONG[name], STACKS[stack]
    with refused(StateError, *words):
        start(transform(step_with(rest)), mesh, params(), batch(), init)


CLIP, NORM = (
    "fp.clip_by_global_norm in place of an optimizer's own",
    "fp.optim.statistics(tree).norm for the norm of each",
)
LARGEST = "fp.optim.statistics(tree).max_abs for the largest"
REDUCED: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[str, ...]]] = {
    "norm": (lambda d: d / d.norm(), ("aten.linalg_vector_norm", CLIP, NORM)),
    "sum of squares": (lambda d: d / (d * d).sum().sqrt(), ("aten.sum", CLIP, NORM)),
    "foreach norm": (lambda d: d / torch._foreach_norm([d])[0], ("aten._foreach_norm", CLIP, NORM)),
    "max": (lambda d: d / d.abs().max(), ("aten.max", LARGEST)),
    "amax": (lambda d: d / d.abs().amax(), ("aten.amax", LARGEST)),
}


@pytest.mark.parametrize("name", REDUCED)
def test_a_reduction_of_a_leaf_is_told_what_gives_it(name: str) -> None:
    of_leaf, words = REDUCED[name]
    step = step_with(lambda state, grads: ({**state, "p": optree.tree_map(of_leaf, grads)}, {}))
    with refused(StateError, words[0], "outside value_and_grad at test_rehearsal.py:", *words[1:]):
        start(fp.accumulated(step, microbatches=2), fp.Mesh(), params(), batch(), init)


def test_clipping_by_torchopt_is_told_of_ours() -> None:
    optimizer = fp.optim.from_optax(
        torchopt.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.sgd(0.1))
    )

    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state[0], b)
        return optimizer.update(grads, state[1], state[0]), {"loss": loss}

    for transform, mesh in STACKS.values():
        with refused(StateError, "aten.linalg_vector_norm", CLIP):
            start(transform(step), mesh, params(), batch(), lambda p: (p, optimizer.init(p)))


def test_an_init_state_that_counts_leaves() -> None:
    def counting(p: Any) -> Any:
        share = 1 / len(tree.leaves(p))
        return {"p": p, "n": optree.tree_map(lambda x: torch.full((), share, dtype=x.dtype), p)}

    with refused(StateError, "init_state makes another state['n']", *LACKS):
        start(PIPE(step_with(each_by_its_norm)), fp.Mesh(pipe=2), params(), batch(), counting)


SIZES = ("on a rank that holds a shard of params['", "before the step", "optree.tree_map_with_path")
SIZED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numel": lambda w: w / w.numel() ** 0.5,
    "first size": lambda w: w * (1.0 if w.shape[0] < 4 else 0.5) / w.shape[0],
    "last size": lambda w: w / w.shape[-1],
    "ratio": lambda w: w * max(1.0, w.shape[0] / w.shape[-1]) ** 0.5,
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_of_shards_are_not_those_of_leaves(name: str) -> None:
    """Where leaves are whole, sizes are right."""

    def rest(state: Any, grads: Any) -> Any:
        return {**state, "p": optree.tree_map(SIZED[name], state["p"])}, {}

    step = step_with(rest)
    for stack in ("sharded", "pipeline, sharded"):
        transform, mesh = STACKS[stack]
        with refused(StateError, "the step computes another state['p']", *SIZES):
            start(transform(step), mesh, params(), batch(), init)
    assert_equivalent(step, PIPE(step), fp.Mesh(pipe=2), init, params(), [batch()], rtol=FLOAT64)


def test_the_sizes_of_leaves_that_stay_whole() -> None:
    def rest(state: Any, grads: Any) -> Any:
        shrunk = optree.tree_map(lambda w: w / w.numel() if w.dim() == 1 else w, state["p"])
        return {**state, "p": shrunk}, {}

    step = step_with(rest)
    matrices = fp.sharded_weights(axis="data", only=lambda path: "['b']" not in path)
    transform = fp.compose(fp.data_parallel(axis="data"), matrices)
    assert_equivalent(
        step, transform(step), fp.Mesh(data=2), init, params(), [batch()], rtol=FLOAT64
    )
