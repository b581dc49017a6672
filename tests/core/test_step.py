"""What a step calls, in plain PyTorch: ``torch.autograd.grad``, to the bit; under torch.func,
torch.func's."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import (
    D,
    batch,
    body,
    count,
    distance,
    loss_fn,
    params,
    refused,
    same_bits,
    step_of,
)
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import tap
from funcpipe._src.spec.transform_spec import TransformedStep
from funcpipe.errors import StackError, TraceError

# torch.func computes silu's and others' gradients by composed ops: a few roundings of 2**-53.
FLOAT64 = 1e-12


def autograd(loss: Any, p: Any, b: Any) -> tuple[torch.Tensor, Any]:
    """Loss and gradients as anybody would write them down."""
    leaves, spec = optree.tree_flatten(p)
    inputs = [
        x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x
        for x in leaves
    ]
    out = loss(optree.tree_unflatten(spec, inputs), b)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, allow_unused=True, materialize_grads=True))
    grads = [next(found) if x.requires_grad else torch.zeros_like(x) for x in inputs]
    return out.detach(), optree.tree_unflatten(spec, grads)


def scalar(p: Any, b: Any) -> torch.Tensor:
    return F.silu(body(p, b)).pow(2).sum()


# ---- plain


def test_it_is_autograd_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        p, b = params(3, dtype), batch(dtype=dtype)
        loss, grads = fp.value_and_grad(scalar)(p, b)
        assert same_bits((loss, grads), autograd(scalar, p, b))
        assert not loss.requires_grad and not any(g.requires_grad for g in grads["w"])
        assert not any(w.requires_grad for w in p["w"])


def test_an_unused_leaf_has_zeros_and_an_integer_one_too() -> None:
    p = {
        **params(),
        "unused": torch.ones(3),
        "ids": torch.arange(D),
        "flag": torch.tensor(True),
        "none": None,
    }
    _, grads = fp.value_and_grad(lambda p, b: scalar(p, {"x": b["x"][:, p["ids"]]}))(p, batch())
    assert same_bits(
        [grads[k] for k in ("unused", "ids", "flag")],
        [torch.zeros(3), torch.zeros(D).long(), torch.tensor(False)],
    )
    assert grads["none"] is None
    assert optree.tree_structure(grads) == optree.tree_structure(p)


def test_a_loss_without_params() -> None:
    loss, grads = fp.value_and_grad(lambda p, b: b["x"].sum())(params(), batch())
    assert loss == batch()["x"].sum()
    assert all((g == 0).all() for g in grads["w"])
    assert fp.value_and_grad(lambda p, b: b["x"].sum())({}, batch())[1] == {}


def test_complex_params() -> None:
    p = {"z": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)}
    loss = lambda p, b: (p["z"] * b).abs().square().sum()  # noqa: E731
    b = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert same_bits(fp.value_and_grad(loss)(p, b), autograd(loss, p, b))


def test_params_that_carry_a_graph_are_cut_off_from_it() -> None:
    w = torch.ones(D, D, dtype=torch.float64, requires_grad=True)
    loss, grads = fp.value_and_grad(scalar)({"w": [w * 2]}, batch())
    assert not loss.requires_grad and not grads["w"][0].requires_grad and w.grad is None


def test_it_works_where_gradients_are_off() -> None:
    expected = fp.value_and_grad(scalar)(params(), batch())
    with torch.no_grad():
        assert same_bits(fp.value_and_grad(scalar)(params(), batch()), expected)


def test_inference_mode_is_refused() -> None:
    """It records nothing: gradients would be zeros."""
    run = fp.simulate(fp.accumulated(step_of(loss_fn), microbatches=1), fp.Mesh())
    state = run.init(lambda p: p, params(), batch())
    calls = [
        ("value_and_grad", lambda: fp.value_and_grad(loss_fn)(params(), batch())),
        ("run.init", lambda: run.init(lambda p: p, params(), batch())),
        ("a step", lambda: run(state, batch())),
    ]
    for who, call in calls:
        with (
            torch.inference_mode(),
            refused(TraceError, f"{who} is called in torch.inference_mode()", "torch.no_grad()"),
        ):
            call()
    with torch.inference_mode(), torch.inference_mode(False):
        fp.value_and_grad(loss_fn)(params(), batch())


def test_tensors_of_inference_mode_are_copied() -> None:
    with torch.inference_mode():
        p, b = tree.map(torch.clone, (params(), batch()))
    want = fp.value_and_grad(loss_fn)(params(), batch())
    assert same_bits(fp.value_and_grad(loss_fn)(p, b), want)
    step = step_of(loss_fn)
    run = fp.simulate(fp.accumulated(step, microbatches=1), fp.Mesh())
    state, metrics = run(run.init(lambda p: p, p, b), b)
    assert same_bits((run.unplace(state), metrics), step(params(), batch()))


def test_checkpoints_and_custom_functions_are_plain_pytorch() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 3 * g * ctx.saved_tensors[0]  # not its derivative: seen in the gradient

    def loss(p: Any, b: Any) -> torch.Tensor:
        return checkpoint(lambda x: Square.apply(x @ p["w"][0]).sum(), b["x"], use_reentrant=False)

    assert same_bits(fp.value_and_grad(loss)(params(), batch()), autograd(loss, params(), batch()))


def test_mean_divides_loss_and_gradients_by_the_weight() -> None:
    loss, grads = fp.value_and_grad(loss_fn)(params(), batch())
    total, sums = fp.value_and_grad(lambda p, b: loss_fn(p, b).total)(params(), batch())
    assert same_bits((loss, grads), (total / 8, optree.tree_map(lambda g: g / 8, sums)))


def test_a_weight_may_be_an_integer_and_frozen_leaves_stay_integers() -> None:
    p = {**params(), "ids": torch.arange(D)}
    _, grads = fp.value_and_grad(lambda p, b: fp.Mean(scalar(p, b), torch.tensor(8)))(p, batch())
    assert grads["ids"].dtype == torch.int64 and grads["w"][0].dtype == torch.float64


def test_aux() -> None:
    def loss(p: Any, b: Any) -> Any:
        x = body(p, b)
        aux = {
            "mean": fp.Mean(x.sum(), count(x)),
            "rows": fp.Rows(x),
            "plain": x.max(),
            "n": 3,
            "none": None,
        }
        return loss_fn(p, b), aux

    (value, aux), grads = fp.value_and_grad(loss, has_aux=True)(params(), batch())
    assert same_bits((value, grads), fp.value_and_grad(loss_fn)(params(), batch()))
    x = body(params(), batch())
    assert same_bits([aux["mean"], aux["rows"], aux["plain"]], [x.sum() / 8, x, x.max()])
    assert (aux["n"], aux["none"]) == (3, None)
    assert not any(t.requires_grad for t in optree.tree_leaves(aux) if isinstance(t, torch.Tensor))


def test_microbatches_in_plain_pytorch_are_summed_in_order() -> None:
    parts = [batch(2, seed=1), batch(5, seed=2), batch(1, seed=3)]
    whole = {"x": torch.cat([part["x"] for part in parts])}

    def loss(p: Any, b: Any) -> Any:
        x = body(p, b)
        return loss_fn(p, b), {
            "mean": fp.Mean(x.sum(), count(x)),
            "rows": fp.Rows(x),
            "columns": fp.Rows(x.t(), 1),
        }

    split = fp.value_and_grad(loss, has_aux=True)(params(), fp.Microbatches(parts))
    assert distance(split, fp.value_and_grad(loss, has_aux=True)(params(), whole)) < FLOAT64
    one = fp.Microbatches([whole])
    assert same_bits(
        fp.value_and_grad(scalar)(params(), one), fp.value_and_grad(scalar)(params(), whole)
    )


def test_params_are_tensors() -> None:
    with refused(TraceError, "params['a'][1] is a str, not a tensor"):
        fp.value_and_grad(scalar)({"a": [torch.ones(1), "x"]}, batch())


# ---- torch.func


def test_inside_torch_func_grad() -> None:
    """A gradient penalty: the gradient of a function of gradients."""

    def penalty(p: Any) -> torch.Tensor:
        return fp.value_and_grad(scalar)(p, batch())[1]["w"][0].pow(2).sum()

    def by_hand(p: Any) -> torch.Tensor:
        return torch.func.grad(scalar)(p, batch())["w"][0].pow(2).sum()

    assert same_bits(torch.func.grad(penalty)(params()), torch.func.grad(by_hand)(params()))


def test_inside_vmap_over_params_and_over_batches() -> None:
    many = optree.tree_map(
        lambda *x: torch.stack(x),
        *(optree.tree_map(lambda w, k=k: w * k, params()) for k in (1, 2, 3)),
    )
    loss, grads = torch.vmap(fp.value_and_grad(loss_fn), in_dims=(0, None))(many, batch())
    each = [
        fp.value_and_grad(loss_fn)(optree.tree_map(lambda w, i=i: w[i], many), batch())
        for i in range(3)
    ]
    assert distance((loss, grads), optree.tree_map(lambda *x: torch.stack(x), *each)) < FLOAT64
    rows = batch()["x"][:, None]  # per-sample gradients
    _, per_row = torch.vmap(fp.value_and_grad(scalar), in_dims=(None, 0))(params(), {"x": rows})
    assert (
        distance(
            optree.tree_map(lambda g: g.sum(0), per_row),
            fp.value_and_grad(scalar)(params(), batch())[1],
        )
        < FLOAT64
    )


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script"
)  # torch's own, when jvp is first used; a FutureWarning from 2.14 on
def test_inside_jvp() -> None:
    """A Hessian-vector product, against differences."""
    p, step = params(), 1e-6
    gradient = lambda p: fp.value_and_grad(scalar)(p, batch())[1]  # noqa: E731
    _, tangent = torch.func.jvp(gradient, (p,), (optree.tree_map(torch.ones_like, p),))
    up, down = (gradient(optree.tree_map(lambda w, s=s: w + s * step, p)) for s in (1, -1))
    assert distance(optree.tree_map(lambda a, b: (a - b) / (2 * step), up, down), tangent) < 1e-6


def test_aux_and_frozen_leaves_inside_torch_func() -> None:
    def outer(w: torch.Tensor) -> Any:
        p = {"w": [w], "ids": torch.arange(D)}
        (loss, aux), grads = fp.value_and_grad(
            lambda p, b: (
                loss_fn(p, {"x": b["x"][:, p["ids"]]}),
                {"m": fp.Mean(p["w"][0].sum(), torch.tensor(2.0))},
            ),
            True,
        )(p, batch())
        assert not grads["ids"].any()
        return loss + aux["m"] + grads["w"][0].sum()

    w = params()["w"][0]
    up, down = (outer(w + s * 1e-6) for s in (1, -1))
    assert abs(torch.func.grad(outer)(w).sum() - (up - down) / 2e-6) < 1e-5


# ---- the other calls


def test_boundaries_are_inert() -> None:
    x = {"x": torch.ones(2), "n": 3, "none": None, "t": (True, "text")}
    assert fp.stage_boundary(x) is x


def test_clipping_is_torchs() -> None:
    for limit in (0.1, 1e6):
        grads = fp.value_and_grad(scalar)(params(3, torch.float32), batch(dtype=torch.float32))[1]
        twins = [torch.nn.Parameter(g.clone()) for g in grads["w"]]
        for twin, g in zip(twins, grads["w"], strict=True):
            twin.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, limit)
        clipped, mine = fp.clip_by_global_norm(grads, limit)
        torch.testing.assert_close(mine, norm)
        torch.testing.assert_close(clipped["w"], [t.grad for t in twins])


def test_norms_are_taken_in_float32_or_better_and_pass_over_integers() -> None:
    half = torch.full(
        (1 << 16,), 1.0, dtype=torch.float16
    )  # its squares add up to more than float16 holds
    tree = {"half": half, "ids": torch.arange(5), "none": None}
    assert fp.global_norm(tree) == 256 and fp.global_norm(tree).dtype == torch.float32
    assert fp.global_norm([half, torch.zeros(1, dtype=torch.float64)]).dtype == torch.float64
    assert fp.global_norm({"ids": torch.arange(5)}) == 0
    assert fp.global_norm([torch.tensor([3 + 4j])]) == 5
    clipped, _ = fp.clip_by_global_norm(tree, 1.0)
    assert clipped["half"].dtype == torch.float16 and torch.equal(clipped["ids"], torch.arange(5))


def test_global_sum_is_a_sum() -> None:
    assert fp.global_sum(params(), lambda xs: sum((x.sum() for x in xs), torch.zeros(()))) == sum(
        w.sum() for w in params()["w"]
    )


# ---- steps with transforms on them


def test_a_transformed_step_called_plainly_is_the_step() -> None:
    step = step_of()
    stacked = fp.data_parallel(fp.pipelined(step, axis="pipe", microbatches=4), axis="data")
    assert same_bits(stacked(params(), batch()), step(params(), batch()))
    assert stacked.__name__ == step.__name__ and isinstance(stacked, TransformedStep)
    assert repr(stacked) == "<step step\n  pipelined(axis='pipe')\n  data_parallel(axis='data')>"


def test_compose_applies_the_first_first_and_transforms_do_not_change_their_step() -> None:
    once = fp.accumulated(step_of(), microbatches=2)
    both = fp.compose(fp.accumulated(microbatches=2), fp.data_parallel(axis="data"))(step_of())
    assert [r.name for r in both.specs] == ["accumulated", "data_parallel"]
    fp.data_parallel(once, axis="data")
    assert [r.name for r in once.specs] == ["accumulated"]
    with refused(StackError, "data_parallel: the step is a str"):
        fp.compose(fp.data_parallel(axis="data"))("step")  # type: ignore[arg-type]


def test_tap_sees_every_call() -> None:
    with tap() as seen:
        out = fp.value_and_grad(scalar)(params(), batch())
    assert [len(x) for x in seen] == [3] and same_bits(seen[0][1:], out)
    fp.value_and_grad(scalar)(params(), batch())
    assert len(seen) == 1


# ---- norms of leaves of several kinds


def norm_of(tree: Any) -> torch.Tensor:
    leaves = [x.to(torch.complex128).abs().square().sum() for x in optree.tree_leaves(tree)]
    return sum(leaves, torch.zeros((), dtype=torch.float64)).sqrt()


KINDS = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from([(), (0,), (3,), (2, 4)])),
        min_size=1,
        max_size=5,
    )
)
def test_the_norm_of_leaves_of_any_kinds(leaves: list[tuple[str, tuple[int, ...]]]) -> None:
    drawn = [torch.randn(shape, dtype=torch.complex128) + 1 for _, shape in leaves]
    tree = [
        x.to(getattr(torch, k)) if "complex" in k else x.real.to(getattr(torch, k))
        for x, (k, _) in zip(drawn, leaves, strict=True)
    ]
    double = any(k in ("float64", "complex128") for k, _ in leaves)
    norm = fp.global_norm([*tree, torch.arange(3), None])
    assert norm.dtype == (torch.float64 if double else torch.float32)
    tolerance = {"rtol": 1e-12, "atol": 0.0} if double else {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(norm.double(), norm_of(tree), **tolerance)


def test_clipping_of_real_and_complex_leaves_is_torchs() -> None:
    tree = [
        torch.randn(3, dtype=torch.float64),
        torch.randn(2, 2, dtype=torch.complex128),
        torch.randn(0).double(),
    ]
    twins = [torch.nn.Parameter(x.clone()) for x in tree]
    for twin, x in zip(twins, tree, strict=True):
        twin.grad = x.clone()
    norm = torch.nn.utils.clip_grad_norm_(twins, 0.5)
    clipped, mine = fp.clip_by_global_norm(tree, 0.5)
    torch.testing.assert_close(mine, norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(clipped, [t.grad for t in twins], rtol=1e-12, atol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_norms_and_sums_of_mixed_leaves_over_ranks(sharded: bool) -> None:
    """A leaf that a rank does not count is none: what it sums up may then be a Python number."""
    p = {
        "a": torch.randn(3, dtype=torch.float64),
        "c": torch.randn(3, dtype=torch.complex128),
        "n": torch.arange(2),
    }
    x = torch.randn(8, 3, dtype=torch.float64)

    def loss_fn(p: Any, x: torch.Tensor) -> fp.Mean:
        x = fp.stage_boundary(x * p["a"]).to(torch.complex128)
        return fp.Mean((x @ p["c"]).abs().square().sum(), torch.tensor(float(len(x))))

    def step(p: Any, x: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(p, x)
        size = fp.global_sum(grads, lambda leaves: sum(x.abs().double().sum() for x in leaves))
        grads, norm = fp.clip_by_global_norm(grads, 0.5)
        new = optree.tree_map(
            lambda x, g: x - 0.1 * g if x.is_floating_point() or x.is_complex() else x, p, grads
        )
        return new, {"loss": loss, "norm": norm, "size": size}

    want, metrics = step(p, x)
    fast = fp.pipelined(fp.data_parallel(step, axis="data"), axis="pipe", microbatches=2)
    fast = fp.sharded_weights(fast, axis="data") if sharded else fast

    run = fp.simulate(fast, fp.Mesh(pipe=2, data=2))
    state, got = run(run.init(lambda p: p, p, x), x)
    for a, b in zip(
        optree.tree_leaves((run.unplace(state), got)),
        optree.tree_leaves((want, metrics)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_sum_of_no_leaves_is_a_tensor() -> None:
    assert torch.equal(
        fp.global_sum({}, lambda leaves: sum(x.sum() for x in leaves)), torch.tensor(0)
    )
    assert fp.global_norm({}) == 0
