"""Optimizers: the numbers of torch.optim, purity, and what transforms rely on."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import optree
import pytest
import torch
import torchopt
from hypothesis import given
from support.optim import assert_same, random_grads, random_params, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe.errors import FuncpipeError, OptimError
from funcpipe.optim import adamw, freeze, from_optax, per_leaf, sgd, warmup_cosine

# Every optimizer must pass the common tests below.
OPTIMIZERS = {
    "adamw": adamw(1e-2),
    "adamw-schedule": adamw(warmup_cosine(1e-2, 2, 10), decay=lambda leaf: True),
    "sgd": sgd(0.1),
    "sgd-schedule": sgd(warmup_cosine(0.1, 2, 10), weight_decay=0.1),
    "sgd-nesterov": sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw-per-leaf": per_leaf(
        adamw(1e-2), lambda path: 0.5 if "w" in path else 1.0, lambda path: 2.0
    ),
    "sgd-freeze": freeze(sgd(0.1, momentum=0.9), lambda path: "scale" in path),
    "torchopt-adam": from_optax(torchopt.adam(1e-2)),
    "torchopt-sgd": from_optax(torchopt.sgd(0.1, momentum=0.9, nesterov=True)),
    "torchopt-chain": from_optax(
        torchopt.chain(torchopt.transform.scale_by_adam(), torchopt.transform.scale(-0.1))
    ),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())

# The same formula with its roundings of 2**-53 in other places, ten updates.
FLOAT64 = 1e-12

# torchopt's Adam computes 1 - 0.999**t in float32, where 2**-24 is 6e-5 of it at first; the root
# halves that, and ten updates of 1e-2 add up.
FLOAT32_CORRECTION = 1e-5

# Kernels work in vectors and finish with a scalar loop, whose products and sums are rounded one by
# one: where an element lies in its slice may cost some last bits (2**-53 each) of each of three
# updates.
VECTOR_TAILS = 1e-14


def train_torch(make: Any, params: Any, steps: int, schedule: Any = None) -> Any:
    """The same with an optimizer of torch, whose two groups are the leaves with and without weight
    decay."""
    params = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
    leaves = optree.tree_leaves(params)
    matrices, others = ([p for p in leaves if (p.dim() >= 2) is big] for big in (True, False))
    optimizer = make([{"params": matrices}, {"params": others, "weight_decay": 0.0}])
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i in range(steps):
        for p, g in zip(leaves, optree.tree_leaves(random_grads(params, i)), strict=True):
            p.grad = g
        optimizer.step()
        if scheduler:
            scheduler.step()
    return optree.tree_map(lambda p: p.detach(), params)


# ---- the numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adamw_is_bitwise_torchs_fused_adamw(dtype):
    """The same kernel on both sides, so not one bit may differ."""
    params = random_params(dtype)
    ours, state = train(adamw(1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3), params, 10)
    theirs = train_torch(
        lambda groups: torch.optim.AdamW(
            groups, 1e-2, (0.8, 0.9), 1e-6, weight_decay=0.3, fused=True
        ),
        params,
        10,
    )
    assert_same(ours, theirs)
    assert state.step == 10 and state.step.dtype == torch.float64 and state.step.shape == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_is_bitwise_torchs_sgd(dtype, settings):
    """Its loop, not its foreach: on CPUs ``_foreach_mul_`` rounds a momentum of 0.9 to bfloat16 in
    2.13."""
    params = [{"w": block["w"]} for block in random_params(dtype)["blocks"]]
    ours, _ = train(sgd(0.1, **settings), params, 10)
    theirs = train_torch(
        lambda groups: torch.optim.SGD(groups[:1], 0.1, foreach=False, **settings), params, 10
    )
    assert_same(ours, theirs)


def cosine(step: int) -> float:
    """``warmup_cosine(1.0, 3, 8)`` in Python's numbers."""
    fall = min(max((step - 3) / 5, 0.0), 1.0)
    return min(1.0, (step + 1) / 3) * (0.1 + 0.45 * (1 + math.cos(math.pi * fall)))


SCHEDULES = {
    "warmup_cosine": (warmup_cosine(1.0, 3, 8), cosine),
    "inverse": (lambda step: 1 / (step + 1), lambda step: 1 / (step + 1)),
    "third": (lambda step: torch.full_like(step, 1 / 3), lambda step: 1 / 3),
    "number": (lambda step: 1 / 3, lambda step: 1 / 3),
}
SCHEDULED = {
    "adamw": (
        lambda rate: adamw(lambda step: 1e-2 * rate(step)),
        lambda groups: torch.optim.AdamW(
            groups, 1e-2, (0.9, 0.95), weight_decay=0.1, foreach=False
        ),
    ),
    "sgd": (
        lambda rate: sgd(lambda step: 0.1 * rate(step)),
        lambda groups: torch.optim.SGD(groups, 0.1),
    ),
    "sgd-nesterov": (
        lambda rate: sgd(lambda step: 0.1 * rate(step), momentum=0.9, nesterov=True),
        lambda groups: torch.optim.SGD(groups, 0.1, 0.9, nesterov=True),
    ),
    "torchopt-sgd": (
        lambda rate: from_optax(torchopt.sgd(lambda step: 0.1 * rate(step.double()), momentum=0.9)),
        lambda groups: torch.optim.SGD(groups, 0.1, 0.9),
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_are_those_of_lambda_lr(name, schedule):
    """In float64, as torch's schedulers compute them."""
    (make, torchs), (rate, as_number) = SCHEDULED[name], SCHEDULES[schedule]
    params = random_params(torch.float64)
    ours, _ = train(make(rate), params, 10)
    assert_same(ours, train_torch(torchs, params, 10, as_number), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrower_leaves_take_a_scheduled_rate_in_float32(dtype):
    """A rate that float32 has exactly gives torch's bits."""
    params = random_params(dtype)
    ours, _ = train(adamw(lambda step: torch.full_like(step, 2.0**-7)), params, 5)
    assert_same(ours, train(adamw(2.0**-7), params, 5)[0])


@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_schedule_gets_the_count_in_float64(make):
    seen = []
    train(make(lambda step: seen.append(step) or 0.1), random_params(), 3)
    assert [x.item() for x in seen] == [0, 1, 2] and {x.dtype for x in seen} == {torch.float64}


@pytest.mark.parametrize("make", [adamw, sgd])
def test_steps_are_counted_beyond_what_float32_has(make):
    params, last = {"w": torch.ones(2, 2)}, 2**24
    optimizer = make(warmup_cosine(0.1, 1, last + 4))
    state = optimizer.init(params)._replace(step=torch.tensor(float(last), dtype=torch.float64))
    for _ in range(3):
        params, state = optimizer.update(random_grads(params, 0), state, params)
    assert state.step == last + 3


def test_warmup_cosine_computes_in_float64():
    schedule = warmup_cosine(1.0, 1, 2**25)
    rates = [schedule(torch.tensor(step)) for step in (2**24, 2**24 + 1, 2**24 + 2)]
    assert rates[0] > rates[1] > rates[2] and {rate.dtype for rate in rates} == {torch.float64}
    assert schedule(torch.tensor(12345)) == schedule(torch.tensor(12345.0))


def test_a_schedule_may_return_a_number():
    params = random_params()
    assert_same(train(adamw(lambda step: 1e-2), params, 3), train(adamw(1e-2), params, 3))


def one_group(groups):
    """All leaves in one group of torch's, whatever their dims."""
    return [p for group in groups for p in group["params"]]


@pytest.mark.parametrize(
    ("pair", "make", "rtol"),
    [
        (torchopt.sgd(0.1), lambda groups: torch.optim.SGD(groups, 0.1), FLOAT64),
        (
            torchopt.sgd(0.1, 0.9, nesterov=True),
            lambda groups: torch.optim.SGD(groups, 0.1, 0.9, nesterov=True),
            FLOAT64,
        ),
        (torchopt.rmsprop(1e-2), lambda groups: torch.optim.RMSprop(groups, 1e-2), FLOAT64),
        (torchopt.adagrad(1e-2), lambda groups: torch.optim.Adagrad(groups, 1e-2), FLOAT64),
        (torchopt.adamax(1e-2), lambda groups: torch.optim.Adamax(groups, 1e-2, eps=1e-6), FLOAT64),
        (torchopt.adam(1e-2), lambda groups: torch.optim.Adam(groups, 1e-2), FLOAT32_CORRECTION),
        (
            torchopt.adamw(1e-2, (0.8, 0.9), 1e-6, weight_decay=0.1),
            lambda groups: torch.optim.AdamW(
                one_group(groups), 1e-2, (0.8, 0.9), 1e-6, weight_decay=0.1
            ),
            FLOAT32_CORRECTION,
        ),
    ],
    ids=["sgd", "sgd-nesterov", "rmsprop", "adagrad", "adamax", "adam", "adamw"],
)
def test_torchopts_optimizers_are_torchs(pair, make, rtol):
    params = random_params(torch.float64)
    assert_same(train(from_optax(pair), params, 10)[0], train_torch(make, params, 10), rtol)


@pytest.mark.parametrize("make", [torchopt.adam, torchopt.sgd])
def test_a_torchopt_pair_gives_torchopts_own_numbers(make):
    params, pair = random_params(torch.float64), make(1e-2)
    ours, _ = train(from_optax(pair), params, 10)
    theirs, state = params, pair.init(params)
    for i in range(10):
        updates, state = pair.update(random_grads(theirs, i), state, params=theirs, inplace=False)
        theirs = torchopt.apply_updates(theirs, updates, inplace=False)
    assert_same(ours, theirs)


# ---- what every optimizer keeps to


@every_optimizer
def test_inputs_are_never_modified_and_never_handed_out(optimizer):
    params = random_params()
    state = optimizer.init(params)
    for i in range(3):
        given_ = (random_grads(params, i), state, params)
        before = optree.tree_map(torch.clone, given_)
        versions = [x._version for x in optree.tree_leaves(given_)]
        after = optimizer.update(*given_)
        assert_same(given_, before)
        assert versions == [x._version for x in optree.tree_leaves(given_)]
        kept = {x.data_ptr() for x in optree.tree_leaves(given_) if x.numel() > 1}
        assert not [x for x in optree.tree_leaves(after) if x.data_ptr() in kept]
        params, state = after


@every_optimizer
def test_same_inputs_give_the_same_bits(optimizer):
    assert_same(train(optimizer, random_params(), 3), train(optimizer, random_params(), 3))


@every_optimizer
def test_parameters_that_require_grad_leave_no_graph_behind(optimizer):
    params = optree.tree_map(lambda p: p.requires_grad_(), random_params())
    assert not any(x.requires_grad for x in optree.tree_leaves(train(optimizer, params, 2)))


@every_optimizer
@given(rows=st.integers(1, 6), parts=st.integers(1, 3), seed=st.integers(0, 99))
def test_slices_of_leaves_are_trained_as_the_whole(optimizer, rows, parts, seed):
    """What sharding relies on: an update of every slice is the slice of the update."""
    gen = torch.Generator().manual_seed(seed)
    whole = {
        "w": torch.randn(rows * parts, 3, generator=gen, dtype=torch.float64),
        "b": torch.ones(4),
    }
    expected, _ = train(optimizer, whole, 3)
    for i in range(parts):
        mine = slice(i * rows, (i + 1) * rows)

        def grads(params, step, mine=mine):
            return {"w": random_grads(whole, step)["w"][mine], "b": None}

        part, _ = train(optimizer, {"w": whole["w"][mine], "b": None}, 3, grads)
        assert part["b"] is None
        torch.testing.assert_close(
            part["w"], expected["w"][mine], rtol=VECTOR_TAILS, atol=VECTOR_TAILS
        )


@every_optimizer
@pytest.mark.parametrize("empty", [{}, (), [None, {"a": None}]], ids=str)
def test_a_rank_that_holds_nothing(optimizer, empty):
    params, _ = train(optimizer, empty, 2)
    assert params == empty


@every_optimizer
def test_leaves_without_elements(optimizer):
    params, _ = train(optimizer, [torch.ones(0, 3), torch.ones(2)], 2)
    assert params[0].shape == (0, 3)


@every_optimizer
def test_integer_bool_and_foreign_leaves_are_frozen(optimizer):
    params = {
        "w": torch.ones(2),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "name": "x",
    }
    state = optimizer.init(params)
    for nothing in (None, torch.zeros(3, dtype=torch.int64)):
        grads = {"w": torch.ones(2), "ids": nothing, "mask": None, "name": None}
        params, state = optimizer.update(grads, state, params)
    assert params["w"][0] < 1.0 and params["name"] == "x"
    assert torch.equal(params["ids"], torch.arange(3)) and torch.equal(
        params["mask"], torch.tensor([True, False])
    )


@every_optimizer
def test_dtypes_may_be_mixed(optimizer):
    dtypes = {"a": torch.float64, "b": torch.bfloat16, "c": torch.float32, "d": torch.float64}
    params = {k: torch.full((2, 2), 2.0, dtype=t) for k, t in dtypes.items()}
    alone = {
        k: train(optimizer, {k: p}, 3, lambda params, i: params)[0][k] for k, p in params.items()
    }
    together, _ = train(optimizer, params, 3, lambda params, i: params)
    assert_same(together, alone)
    assert {k: p.dtype for k, p in together.items()} == dtypes


@every_optimizer
def test_gradients_may_be_wider_or_lie_otherwise_in_memory(optimizer):
    """torch's fused kernels walk over memory as if all tensors of a leaf had the strides of the
    first."""
    params = [torch.randn(4, 3, generator=torch.Generator().manual_seed(0))]
    expected, _ = train(optimizer, params, 3)

    def odd(params, i):
        (g,) = random_grads(params, i)
        return [g.double().t().contiguous().t()]

    assert_same(train(optimizer, params, 3, odd)[0], expected)
    transposed = [params[0].t().contiguous().t()]
    assert_same(train(optimizer, transposed, 3)[0], expected)


class ElementwiseOnly(TorchDispatchMode):
    """Refuses every op on a leaf in which one element could see another."""

    ALLOWED = ("clone", "copy_", "_to_copy", "detach", "zeros_like", "empty_like", "device")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [x for x in optree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        leaves = [tuple(x.shape) for x in tensors if x.numel() > 1]
        elementwise = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "_fused"))
        assert elementwise or name in self.ALLOWED or not leaves, f"{func} on {leaves}"
        assert name not in ("_local_scalar_dense", "item"), "a step must not wait for its device"
        return func(*args, **(kwargs or {}))


@every_optimizer
def test_runs_on_fakes_and_touches_leaves_elementwise_only(optimizer):
    with FakeTensorMode(), ElementwiseOnly():
        params = {
            "w": torch.empty(100003, 1),
            "b": torch.empty(100019),
            "s": torch.empty(()),
            "x": None,
        }
        params["half"] = torch.empty(3, 100043, dtype=torch.bfloat16)
        new, state = train(
            optimizer, params, 2, lambda params, i: optree.tree_map(torch.zeros_like, params)
        )
    for p, n in zip(optree.tree_leaves(params), optree.tree_leaves(new), strict=True):
        assert (p.shape, p.dtype, p.stride()) == (n.shape, n.dtype, n.stride())
    shapes = {tuple(x.shape) for x in optree.tree_leaves(state)}
    assert shapes <= {(100003, 1), (100019,), (), (3, 100043)}


@every_optimizer
def test_a_real_update_waits_for_nothing(optimizer):
    with ElementwiseOnly():
        train(optimizer, random_params(), 2, lambda params, i: optree.tree_map(torch.clone, params))


def test_state_has_the_trees_of_params():
    params = {"w": torch.ones(2, 2), "n": None, "ids": torch.arange(2)}
    state = adamw(1e-3).init(params)
    for moments in (state.m, state.v):
        assert optree.tree_structure(moments) == optree.tree_structure(params)
        assert_same(moments, optree.tree_map(torch.zeros_like, params))
    assert sgd(0.1).init(params).momentum == ()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_optimizer
def test_an_update_on_a_gpu_can_be_captured(optimizer, dtype):
    params = optree.tree_map(lambda p: p.cuda(), random_params(dtype))
    grads = optree.tree_map(torch.ones_like, params)
    state = optimizer.init(params)
    expected = optimizer.update(grads, state, params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = optimizer.update(grads, state, params)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


# ---- what is refused

W, B = torch.ones(2, 2), torch.ones(3)
BAD_GRADS = {
    "grads has no leaf ['b'], but params has one; both need the same tree": {"w": W},
    "grads has a leaf ['c'][0], but params has none; both need the same tree": {
        "w": W,
        "b": B,
        "c": [B],
    },
    "grads['b'] is None, but params['b'] is float32[3] on cpu; give zeros for an unused leaf": {
        "w": W,
        "b": None,
    },
    "grads['w'] is float32[3] on cpu, but params['w'] is float32[2, 2] on cpu": {"w": B, "b": B},
    "grads['w'] is of type dict, but params['w'] is float32[2, 2] on cpu": {"w": {"x": W}, "b": B},
}


@every_optimizer
@pytest.mark.parametrize(
    "message", BAD_GRADS, ids=["missing", "additional", "none", "shape", "subtree"]
)
def test_gradients_that_do_not_fit_are_refused_with_the_path(optimizer, message):
    params = {"w": W, "b": B}
    with pytest.raises(OptimError) as caught:
        optimizer.update(BAD_GRADS[message], optimizer.init(params), params)
    assert str(caught.value) == message


@every_optimizer
def test_trees_of_other_types_are_refused(optimizer):
    with pytest.raises(OptimError, match="grads"):
        optimizer.update((W, B), optimizer.init([W, B]), [W, B])


def test_a_state_of_other_parameters_is_refused_with_the_path():
    optimizer = adamw(1e-3)
    with pytest.raises(
        OptimError, match=r"^opt_state\.m\['w'\] is float32\[3\] on cpu, but params\['w'\] is"
    ):
        optimizer.update({"w": W}, optimizer.init({"w": B}), {"w": W})
    with pytest.raises(
        OptimError, match=r"^opt_state\.m\['w'\] is float32.*, but params\['w'\] is bfloat16"
    ):
        optimizer.update({"w": W}, optimizer.init({"w": W}), {"w": W.bfloat16()})
    with pytest.raises(OptimError, match=r"^opt_state\.momentum has no leaf \['w'\]"):
        sgd(0.1, momentum=0.9).update({"w": W}, sgd(0.1, momentum=0.9).init({}), {"w": W})


def test_complex_leaves_are_refused():
    params = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(
        OptimError, match=r"^params\['w'\] is complex; keep torch\.view_as_real of it"
    ):
        train(adamw(1e-3), params, 1, lambda params, i: params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adamw(-1.0), "adamw: lr=-1.0 must not be negative"),
        (lambda: adamw(1e-3, eps=float("nan")), "adamw: eps=nan must not be negative"),
        (
            lambda: adamw(1e-3, betas=(0.9, 1.0)),
            "adamw: betas=(0.9, 1.0); each of the two is at least 0 and less than 1",
        ),
        (lambda: sgd(0.1, momentum=-0.5), "sgd: momentum=-0.5 must not be negative"),
        (
            lambda: sgd(0.1, nesterov=True),
            "sgd: nesterov=True looks ahead along the momentum; give it one, as in momentum=0.9",
        ),
        (
            lambda: warmup_cosine(1e-3, 10, 10),
            "warmup_cosine: warmup=10 and total=10; 0 <= warmup < total is needed",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(OptimError) as caught:
        make()
    assert str(caught.value) == message
    assert isinstance(caught.value, FuncpipeError) and isinstance(caught.value, ValueError)


def test_something_else_than_a_pair_is_refused():
    with pytest.raises(
        OptimError, match=r"from_optax takes a pair of functions \(init, update\), such as torchopt"
    ):
        from_optax(torch.optim.AdamW)


def test_warmup_cosine_has_its_corners():
    schedule = warmup_cosine(2.0, 4, 10, floor=0.25)
    rates = [float(schedule(torch.tensor(float(n)))) for n in range(14)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(a > b for a, b in pairwise(rates[4:11]))
    assert rates[10:] == pytest.approx([0.5] * 4)
    assert float(warmup_cosine(2.0, 0, 10)(torch.tensor(0.0))) == 2.0
