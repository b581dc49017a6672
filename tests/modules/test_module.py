"""`from_module` and `to_module`: a module as a pure function computes what the module does, and is
not changed by it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused, same_bits
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.modules.buffers import buffer_means, update_buffers
from funcpipe._src.modules.from_module import from_module, to_module
from funcpipe.errors import CutError, ModuleError
from funcpipe.testing import assert_equivalent, meshes, microbatch_counts

# Sums over microbatches are taken in another order than on one device: see test_equivalence.py.
FLOAT64 = 1e-12
D = 4


# ---- modules


class Residual(nn.Module):
    """``x + inner(x)``, under a checkpoint if asked for."""

    def __init__(self, inner: nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.inner, self.recompute = inner, recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (
            checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)
        )


class Average(nn.Module):
    """Two averages of what it has seen, one changed in place and one assigned; and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(D))
        self.register_buffer("size", torch.zeros(()))
        self.register_buffer("table", torch.arange(1.0, D + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen.lerp_(x.mean(0), 0.25)
        self.size = 0.5 * self.size + x.square().mean()  # keeps a graph: it has to be detached
        return x * self.table


class Fused(nn.Module):
    """A batch normalization whose statistics another module's forward reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        if self.training:
            n.num_batches_tracked.add_(1)
        return F.batch_norm(
            self.linear(x),
            n.running_mean,
            n.running_var,
            n.weight,
            n.bias,
            self.training,
            0.2,
            n.eps,
        )


class Tied(nn.Module):
    """One matrix under two names, beside a submodule under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.second.weight = self.first.weight
        self.also = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.also(torch.tanh(self.second(torch.tanh(self.first(self.norm(x))))))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()),
    "mlp": lambda: Residual(
        nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D, bias=False))
    ),
    "recomputed": lambda: Residual(
        nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), recompute=True
    ),
    "tied": Tied,
    "norm": lambda: nn.LayerNorm(D),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "dropout": lambda: nn.Dropout(0.0),
}
CHANGING: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.BatchNorm1d(D),
    "average": Average,
    "fused": Fused,
    "recomputed_norm": lambda: Residual(
        nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh()), recompute=True
    ),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(D, D)),
}


def build(kinds: list[str], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = LAYERS | CHANGING
    return nn.Sequential(nn.Linear(D, D), *(layers[kind]() for kind in kinds)).double()


def kinds(of: dict[str, Any], least: int = 0) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sorted(of)), min_size=least, max_size=4)


def rows(n: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(tensors: dict[str, torch.Tensor], seed: int = 2) -> dict[str, torch.Tensor]:
    """Other values of the same shapes and dtypes, near the given ones."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: x + 0.1 * torch.rand(x.shape, generator=g, dtype=x.dtype)
        if x.is_floating_point()
        else x + 3
        for n, x in tensors.items()
    }


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone() for n, x in (*module.named_parameters(), *module.named_buffers())}


def gradients(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(inputs, torch.autograd.grad(out.square().sum(), inputs.values()), strict=True))


# ---- equal to the module


@given(kinds(LAYERS | CHANGING), st.booleans())
def test_the_function_computes_what_the_module_does(kinds: list[str], training: bool) -> None:
    """Bitwise, with tensors that are not the module's, gradients and new buffers included; the
    module stays as it is."""
    module = build(kinds).train(training)
    before = tensors_of(module)
    apply_fn, params, buffers = from_module(module)
    params, buffers = others(params), others(buffers)
    given = {n: x.clone() for n, x in (params | buffers).items()}

    leaves = {n: x.clone().requires_grad_() for n, x in params.items()}
    out, new_buffers = apply_fn(leaves, buffers, rows())
    grads = gradients(out, leaves)

    twin = to_module(copy.deepcopy(module), params, buffers)
    want = twin(rows())
    after = {n: x.detach().clone() for n, x in twin.named_buffers()}
    assert same_bits(out, want)
    assert same_bits(grads, gradients(want, dict(twin.named_parameters())))
    assert same_bits(new_buffers, after)
    assert same_bits(params | buffers, given)
    assert same_bits(tensors_of(module), before) and not any(
        x.grad_fn for x in new_buffers.values()
    )
    assert {n for n in buffers if new_buffers[n] is not buffers[n]} >= {
        n for n in buffers if not torch.equal(after[n], buffers[n])
    }


def test_a_cumulative_average() -> None:
    """Its factor is a Python number made from a buffer: plain PyTorch only, the tracer refuses
    it."""
    module = nn.BatchNorm1d(D, momentum=None).double()
    apply_fn, params, buffers = from_module(module, copy=True)
    for _ in range(2):
        _, buffers = apply_fn(params, buffers, rows())
        module(rows())
    assert same_bits(buffers, dict(module.named_buffers()))


def test_buffers_that_stay_are_those_that_came_in() -> None:
    apply_fn, params, buffers = from_module(build(["average", "batch_norm"]).eval())
    _, new = apply_fn(params, buffers, rows())
    assert [n for n in buffers if new[n] is not buffers[n]] == ["1.seen", "1.size"]


def test_params_share_memory_unless_copied() -> None:
    module = nn.BatchNorm1d(D)
    _, params, buffers = from_module(module)
    _, own_params, own_buffers = from_module(module, copy=True)
    module.weight.data.fill_(5.0)
    module.running_mean.fill_(5.0)
    assert params["weight"][0] == buffers["running_mean"][0] == 5.0
    assert own_params["weight"][0] == 1.0 and own_buffers["running_mean"][0] == 0.0
    assert not any(x.requires_grad for x in (params | own_params).values())


def test_a_tied_parameter_is_one_leaf() -> None:
    module = build(["tied"])
    apply_fn, params, buffers = from_module(module)
    assert (
        "1.first.weight" in params
        and "1.second.weight" not in params
        and "1.also.weight" not in params
    )
    leaves = {n: x.clone().requires_grad_() for n, x in params.items()}
    grads = gradients(apply_fn(leaves, buffers, rows())[0], leaves)
    assert same_bits(grads, gradients(module(rows()), dict(module.named_parameters())))
    new = others(params)
    to_module(module, new)
    assert module[1].second.weight is module[1].first.weight and same_bits(
        module[1].second.weight, new["1.first.weight"]
    )


def test_a_frozen_parameter_gets_zeros() -> None:
    module = build(["linear"])
    module[0].requires_grad_(False)
    apply_fn, params, buffers = from_module(module)
    _, grads = fp.value_and_grad(lambda p, x: apply_fn(p, buffers, x)[0].sum())(params, rows())
    assert not grads["0.weight"].any() and grads["1.0.weight"].any()


def test_the_mode_of_the_call_counts() -> None:
    module = build(["batch_norm"])
    apply_fn, params, buffers = from_module(module)
    want = copy.deepcopy(module).eval()(rows())
    module.eval()
    assert same_bits(apply_fn(params, buffers, rows())[0], want)


def test_inference_mode() -> None:
    apply_fn, params, buffers = from_module(build(["batch_norm", "average"]))
    with torch.inference_mode():
        out, new = apply_fn(params, buffers, rows())
    want, true = apply_fn(params, buffers, rows())
    assert same_bits((out, new), (want, true))


def test_params_of_another_dtype() -> None:
    apply_fn, params, buffers = from_module(build(["linear"]))
    half = {n: x.bfloat16() for n, x in params.items()}
    assert apply_fn(half, buffers, rows().bfloat16())[0].dtype == torch.bfloat16


def test_threads_need_no_lock() -> None:
    apply_fn, params, buffers = from_module(build(["mlp", "tied", "batch_norm"]))
    of = [(others(params, seed), others(buffers, seed)) for seed in range(16)]
    alone = [apply_fn(*tensors, rows()) for tensors in of]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda tensors: apply_fn(*tensors, rows()), of))
    assert same_bits(together, alone)


def test_inside_torch_func() -> None:
    module = build(["mlp", "batch_norm"])
    apply_fn, params, buffers = from_module(module)

    def loss(p: Any) -> Any:
        out, new = apply_fn(p, buffers, rows())
        return out.square().sum(), new

    grads, new = torch.func.grad(loss, has_aux=True)(params)
    leaves = {n: x.clone().requires_grad_() for n, x in params.items()}
    want = gradients(apply_fn(leaves, buffers, rows())[0], leaves)
    assert (
        max(
            float((grads[n] - want[n]).norm() / want[n].norm())
            for n in want
            if want[n].norm() > 1e-9
        )
        < FLOAT64
    )
    assert same_bits(new, apply_fn(params, buffers, rows())[1])
    module.eval()
    stacked = optree.tree_map(lambda *xs: torch.stack(xs), params, others(params))
    x = rows()
    both = torch.func.vmap(lambda p: apply_fn(p, buffers, x)[0])(stacked)
    assert torch.allclose(both[1], apply_fn(others(params), buffers, x)[0], rtol=FLOAT64)


# ---- modules that refer to themselves in other ways


class Wired(nn.Module):
    """References outside of ``_modules``: an attribute, a list, a dict, a bound method, a
    partial."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.weight = nn.Parameter(torch.ones(D))
        self.listed, self.named = [self.inner], {"weight": (self.weight, 2.0)}
        self.method = self.inner.forward
        self.call = functools.partial(F.linear, weight=self.inner.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, factor = self.named["weight"]
        return self.call(self.method(self.listed[0](x))) * weight * factor


@pytest.mark.parametrize(
    "make", [Wired, lambda: nn.LSTM(D, D, num_layers=2), lambda: nn.MultiheadAttention(D, 2)]
)
def test_references_follow(make: Callable[[], nn.Module]) -> None:
    module = make().double()
    x = (rows()[:, None],) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
    apply_fn, params, buffers = from_module(module)
    params = {n: x.requires_grad_() for n, x in others(params).items()}
    out, _ = apply_fn(params, buffers, *x)
    want = to_module(copy.deepcopy(module), params)(*x)
    assert same_bits(out, want)
    first = out if isinstance(out, torch.Tensor) else out[0]
    assert all(g.any() for n, g in gradients(first, params).items() if "in_proj_bias" not in n)


def test_what_a_call_sets_is_gone_after_it() -> None:
    class Hooking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = x
            self.register_forward_hook(lambda module, args, out: out)
            return super().forward(x)

    module = Hooking(D, D).double()
    apply_fn, params, buffers = from_module(module)
    apply_fn(params, buffers, rows())
    assert not hasattr(module, "cache") and not module._forward_hooks


# ---- boundaries


class Counting(PlainContext):
    """A context that counts boundaries, and keeps what they got."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def stage_boundary(self, x: Any) -> Any:
        self.seen.append(x)
        return x


def boundaries(module: nn.Module, where: Any, *args: Any) -> int:
    apply_fn, params, buffers = from_module(module, where)
    context = Counting()
    with bind_context(context):
        apply_fn(params, buffers, *args)
    return len(context.seen)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ((), 0),
        (["0"], 1),
        (["*"], 4),
        (["1.inner"], 1),
        (["1.*.*"], 3),
        (["*", "1", "[01]"], 4),
        (["3.norm"], 2),  # one submodule, called twice under two names
        (["3.norm", "3.also"], 2),
        (lambda path, m: isinstance(m, nn.Linear), 6),
    ],
)
def test_boundaries(where: Any, count: int) -> None:
    assert boundaries(build(["mlp", "linear", "tied"]), where, rows()) == count


def test_a_boundary_takes_any_output() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"x": (x, None), "n": 3}

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.pair(x)
            assert out["x"][1] is None and out["n"] == 3
            return out["x"][0]

    assert boundaries(Root(), ["pair"], rows()) == 1


# ---- under transforms


def loss_of(apply_fn: Callable, weigh: bool = False) -> Callable:
    """The sum of squares over the rows; with ``weigh``, beside it the buffers that changed."""

    def loss_fn(params: Any, batch: Any) -> Any:
        y, new = apply_fn(params, batch["buffers"], batch["x"])
        count = torch.ones_like(batch["y"][:, 0]).sum()
        loss = fp.Mean((y - batch["y"]).square().sum(), count)
        return (loss, buffer_means(batch["buffers"], new, count)) if weigh else loss

    return loss_fn


DIMS = {"x": 0, "y": 0, "buffers": None}


def plain_step(apply_fn: Callable, buffers: Any) -> Callable:
    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_of(apply_fn))(params, {**batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - 0.01 * g, params, grads), {"loss": loss}

    return step


@given(kinds(LAYERS, least=1), microbatch_counts(3), st.booleans(), st.data())
def test_modules_under_transforms_equal_one_device(
    kinds: list[str], microbatches: int, sharded: bool, data: st.DataObject
) -> None:
    apply_fn, params, buffers = from_module(build(kinds), boundaries=["*"])
    step = plain_step(apply_fn, buffers)
    mesh = data.draw(meshes(pipe=len(kinds) + 1, data=2), label="mesh")
    fast = fp.pipelined(step, axis="pipe", microbatches=microbatches, dims=DIMS)
    fast = fp.data_parallel(fast, axis="data", dims=DIMS)
    fast = fp.sharded_weights(fast, axis="data") if sharded else fast
    n = microbatches * mesh.axis_size("data") * 2
    batches = [{"x": rows(n, seed), "y": rows(n, seed + 10)} for seed in range(2)]
    assert_equivalent(step, fast, mesh, lambda p: p, params, batches, rtol=FLOAT64)


def training(apply_fn: Callable, buffers: Any) -> tuple[Callable, Callable]:
    """A step whose state has the buffers, and its ``init_state``."""

    def init_state(params: Any) -> Any:
        return {"params": params, "buffers": optree.tree_map(torch.clone, buffers)}

    def step(state: Any, batch: Any) -> Any:
        parts = batch.parts if isinstance(batch, fp.Microbatches) else None
        held = {"buffers": state["buffers"]}
        batch = (
            fp.Microbatches([{**part, **held} for part in parts]) if parts else {**batch, **held}
        )
        run = fp.value_and_grad(loss_of(apply_fn, weigh=True), has_aux=True)
        (loss, means), grads = run(state["params"], batch)
        params = optree.tree_map(lambda p, g: p - 0.01 * g, state["params"], grads)
        return {"params": params, "buffers": update_buffers(state["buffers"], means)}, {
            "loss": loss
        }

    return step, init_state


@given(kinds(CHANGING, least=1), st.integers(1, 3), st.integers(1, 2), st.data())
def test_running_statistics_are_averaged_over_microbatches_and_shards(
    kinds: list[str], microbatches: int, shards: int, data: st.DataObject
) -> None:
    """Each microbatch of each shard is a batch of its own: as one device does with the same
    pieces."""
    apply_fn, params, buffers = from_module(build([*kinds, "linear"]), boundaries=["*"])
    step, init_state = training(apply_fn, buffers)
    mesh = data.draw(meshes(pipe=len(kinds) + 1, data=1), label="mesh")
    mesh = fp.Mesh(**mesh.axes | {"data": shards})
    batches = [{"x": rows(12, seed), "y": rows(12, seed + 10)} for seed in range(2)]

    state = init_state(params)
    for batch in batches:  # the pieces in the order of ranks
        pieces = [
            optree.tree_map(lambda x, i=i: x.chunk(microbatches * shards)[i], batch)
            for i in range(microbatches * shards)
        ]
        state, metrics = step(state, fp.Microbatches(pieces))
    fast = fp.pipelined(step, axis="pipe", microbatches=microbatches, dims=DIMS)
    run = fp.simulate(fp.data_parallel(fast, axis="data", dims=DIMS), mesh)
    ranks = run.init(init_state, params, batches[0])
    for batch in batches:
        ranks, found = run(ranks, batch)
    found_state = run.unplace(ranks)
    worst = optree.tree_map(
        lambda a, b: float((a - b).double().norm() / b.double().norm().clamp(min=1e-3)),
        (found_state, found),
        (state, metrics),
    )
    assert max(optree.tree_leaves(worst)) <= FLOAT64
    for name, x in found_state["buffers"].items():
        assert x.dtype == buffers[name].dtype
        assert "num_batches_tracked" not in name or x == len(batches)


def test_a_whole_batch_gives_the_running_statistics_of_the_module() -> None:
    """One microbatch: what the module itself does, but for the rounding of the mean of one."""
    module = build(["batch_norm", "recomputed_norm"])
    apply_fn, params, buffers = from_module(module, copy=True)
    step, init_state = training(apply_fn, buffers)
    state, _ = step(init_state(params), {"x": rows(), "y": rows(seed=2)})
    module(rows())
    for name, x in module.named_buffers():
        assert torch.allclose(state["buffers"][name], x, rtol=FLOAT64, atol=0.0), name


def test_checkpointed_blocks_may_end_in_a_boundary_but_not_hold_one() -> None:
    module = build(["recomputed", "recomputed"])
    for where in (["1", "2"], ["*.inner"]):
        apply_fn, params, buffers = from_module(module, where)
        step = plain_step(apply_fn, buffers)
        batch = {"x": rows(), "y": rows(seed=2)}
        fast = fp.pipelined(step, axis="pipe", microbatches=2, dims=DIMS)
        assert_equivalent(step, fast, fp.Mesh(pipe=2), lambda p: p, params, [batch], rtol=FLOAT64)
    apply_fn, params, buffers = from_module(module, ["1.inner.0"])
    fast = fp.pipelined(plain_step(apply_fn, buffers), axis="pipe", microbatches=2, dims=DIMS)
    with refused(
        CutError, "a boundary inside torch.utils.checkpoint cannot be cut", "checkpoint one block"
    ):
        fp.simulate(fast, fp.Mesh(pipe=2)).init(lambda p: p, params, batch)


# ---- back into a module


def test_a_module_takes_back_what_it_gave() -> None:
    module, other = build(["tied", "batch_norm"]), build(["tied", "batch_norm"], seed=5)
    _, params, buffers = from_module(module)
    params, buffers = others(params), others(buffers)
    assert to_module(other, params, buffers) is other
    assert same_bits(tensors_of(other), params | buffers)
    kept = tensors_of(other)
    to_module(other, {n: x.float() * 2 for n, x in params.items()})
    assert other[0].weight.dtype == torch.float64
    assert all(same_bits(x, kept[n]) for n, x in other.named_buffers())


# ---- what is refused


def test_refused_boundaries() -> None:
    module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(D, D)])})
    with refused(
        ModuleError,
        "boundary 'layers.1' matches no submodule",
        "between two dots",
        "'layers', 'layers.0'",
    ):
        from_module(module, ["layers.1"])
    with refused(ModuleError, "boundary '*.*.*' matches no submodule"):
        from_module(module, ["*.*.*"])
    with refused(ModuleError, "boundary 'x' matches no submodule", "this module has no submodules"):
        from_module(nn.Linear(D, D), ["x"])
    with refused(
        ModuleError, "boundary 'layers' is a ModuleList", "never called itself", "write 'layers.*'"
    ):
        from_module(module, ["layers"])
    with refused(ModuleError, "a predicate, is true of no submodule", "nowhere to cut"):
        from_module(module, lambda path, m: False)
    with refused(ModuleError, "boundaries='layers.*'; write a list of paths: ['layers.*']"):
        from_module(module, "layers.*")


@pytest.mark.parametrize("call", ["apply_fn", "to_module"])
def test_refused_tensors(call: str) -> None:
    module = build(["tied", "batch_norm"])
    before = tensors_of(module)
    apply_fn, params, buffers = from_module(module)

    def use(params: Any, buffers: Any) -> None:
        params = {n: x + 1 if isinstance(x, torch.Tensor) else x for n, x in params.items()}
        apply_fn(params, buffers, rows()) if call == "apply_fn" else to_module(
            module, params, buffers
        )

    without = {n: x for n, x in params.items() if n != "1.norm.bias"}
    with refused(
        ModuleError, f"{call}: params lacks '1.norm.bias'", "every name that from_module gave"
    ):
        use(without, buffers)
    with refused(ModuleError, f"{call}: params lacks ", " and 6 more: "):
        use({}, buffers)
    with refused(
        ModuleError,
        f"{call}: buffers lacks '2.running_mean', '2.running_var', '2.num_batches_tracked': ",
    ):
        use(params, {})
    with refused(ModuleError, f"{call}: params has 'x': the module has no tensor of that name"):
        use({**params, "x": params["0.bias"]}, buffers)
    with refused(
        ModuleError,
        f"{call}: params has '1.second.weight': it is tied",
        "first name, '1.first.weight'",
    ):
        use({**params, "1.second.weight": params["0.weight"]}, buffers)
    with refused(
        ModuleError, f"{call}: params has '2.running_mean'", "params and buffers are two dicts"
    ):
        use(params | buffers, buffers)
    with refused(
        ModuleError, f"{call}: buffers['2.running_var'] is a tensor of shape (1,)", "has shape (4,)"
    ):
        use(params, {**buffers, "2.running_var": torch.ones(1)})
    with refused(
        ModuleError,
        f"{call}: params['0.bias'] is None, but the module's has shape (4,)",
        "run.unplace(state)",
    ):
        use({**params, "0.bias": None}, buffers)
    with refused(
        ModuleError,
        f"{call}: buffers is a tensor of shape (8, 4)",
        "the call is ",
        "params, buffers",
    ):
        use(params, rows())
    assert same_bits(tensors_of(module), before)


def test_refused_modules() -> None:
    with refused(ModuleError, "take a torch.nn.Module written in Python, not a function"):
        from_module(lambda x: x)  # type: ignore[arg-type]
    with refused(ModuleError, "take a torch.nn.Module", "not an int"):
        to_module(3, {})  # type: ignore[arg-type]
    with refused(
        ModuleError, "'0.weight' has no shape yet (a lazy module)", "on an example input first"
    ):
        from_module(nn.Sequential(nn.LazyLinear(D)))
    with refused(ModuleError, "submodule '0' is a SyncBatchNorm", "use nn.BatchNorm1d, 2d or 3d"):
        from_module(nn.Sequential(nn.SyncBatchNorm(D)))


def test_refused_memory() -> None:
    module = nn.Linear(D, D)
    module.weight = nn.Parameter(torch.ones(D, 1).expand(D, D))
    with refused(
        ModuleError, "parameter 'weight' of shape (4, 4) is expanded", "expand it in forward"
    ):
        from_module(module)
    module.weight = nn.Parameter(torch.ones(D, D))
    module.bias = nn.Parameter(module.weight.detach()[0])
    with refused(
        ModuleError,
        "parameters 'bias' and 'weight' are views of the same memory",
        "assign one nn.Parameter",
    ):
        from_module(module)
    flat = torch.ones(D * D + D)  # beside one another in one storage
    module.weight, module.bias = nn.Parameter(flat[: D * D].view(D, D)), nn.Parameter(flat[D * D :])
    assert list(from_module(module)[1]) == ["weight", "bias"]
    with torch.device("meta"):
        assert list(from_module(nn.Linear(D, D))[1]) == ["weight", "bias"]


def test_refused_references() -> None:
    class Holder:
        def __init__(self, held: Any) -> None:
            self.held = held

    module = build(["linear"])
    module.act = lambda x: module[0](x)
    with refused(
        ModuleError,
        "act is a function that holds the module itself",
        "in an attribute, list or dict",
    ):
        from_module(module)
    module.act = [Holder({"weight": module[0].weight})]
    with refused(
        ModuleError,
        "act is a list of 1 that holds '0.weight', where a call cannot put other tensors",
    ):
        from_module(module)
    del module.act
    module[1].owner = Holder(module[0])
    with refused(ModuleError, "1.owner is a Holder that holds submodule '0'"):
        from_module(module)
    del module[1].owner
    module.loop = loop = Holder(None)
    loop.held = [loop]
    from_module(module)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch.compile imports
def test_a_compiled_module_is_refused() -> None:
    with refused(
        ModuleError, "that holds submodule '_orig_mod'", "before torch.compile", "module._orig_mod"
    ):
        from_module(torch.compile(nn.Linear(D, D)))


def test_refused_calls() -> None:
    class Growing(nn.Module):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what
            self.register_buffer("seen", torch.zeros(1) if what != "appears" else None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = {"appears": x[:1], "vanishes": None, "grows": torch.zeros(2)}[self.what]
            return x

    for what, words in (
        ("appears", "buffer 'seen' is None before the call and a tensor of shape (1, 4)"),
        (
            "vanishes",
            "buffer 'seen' is a tensor of shape (1,) and dtype torch.float32 before the call and "
            "None after it",
        ),
        ("grows", "buffer 'seen' is a tensor of shape (1,)"),
    ):
        apply_fn, params, buffers = from_module(Growing(what))
        with refused(ModuleError, words, "register every buffer in __init__"):
            apply_fn(params, buffers, rows())

    apply_fn, params, buffers = from_module(nn.BatchNorm1d(D).double())
    with refused(
        ModuleError,
        "got a tensor of shape (1, 4)",
        "one value for each channel",
        "give those more rows",
    ):
        apply_fn(params, buffers, rows(1))
    module = nn.InstanceNorm1d(D, track_running_stats=True).double()
    apply_fn, params, buffers = from_module(module)
    with refused(
        ModuleError,
        "instance normalization of a tensor of shape (1, 4, 8)",
        "track_running_stats=False",
    ):
        apply_fn(params, buffers, rows().t()[None])
    module.eval()
    assert same_bits(apply_fn(params, buffers, rows().t()[None])[0], module(rows().t()[None]))


# ---- graph modules, and caches that calls fill


def test_a_graph_module_is_a_module() -> None:
    for inner in (nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Tanh()):
        module = nn.Sequential(
            nn.Linear(D, D), torch.fx.symbolic_trace(inner), nn.Linear(D, 1)
        ).double()
        apply_fn, params, buffers = from_module(module, boundaries=["0", "1"])
        x = torch.randn(8, D, dtype=torch.float64)
        assert torch.equal(apply_fn(params, buffers, x)[0], module(x))
        doubled = {name: 2 * p for name, p in params.items()}
        want = to_module(copy.deepcopy(module), doubled)(x)
        assert torch.equal(apply_fn(doubled, buffers, x)[0], want)

        def step(p: Any, x: torch.Tensor, run: Any = apply_fn, held: Any = buffers) -> Any:
            rows = torch.tensor(float(len(x)))
            loss, grads = fp.value_and_grad(
                lambda p, x: fp.Mean(run(p, held, x)[0].square().sum(), rows * 0 + len(x))
            )(p, x)
            return optree.tree_map(lambda p, g: p - 0.1 * g, p, grads), {"loss": loss}

        fast = fp.pipelined(step, axis="pipe", microbatches=2)
        assert_equivalent(step, fast, fp.Mesh(pipe=2), lambda p: p, params, [x])


class Rotation(nn.Module):
    """Fills a buffer on its first call, and remembers that in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(8), persistent=False)
        self.filled = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        if self.filled < length:
            self.table[:length] = torch.arange(1.0, length + 1)
            self.filled = length
        return x * self.table[:length]


def test_a_cache_that_the_module_filled_behind_a_copy_is_refused() -> None:
    module, x = nn.Sequential(nn.Linear(D, D), Rotation()), torch.ones(2, D)
    apply_fn, params, buffers = from_module(module, copy=True)
    out = apply_fn(params, buffers, x)[0]  # of a stand-in: the module itself stays as it was
    assert torch.equal(out, module(x))
    with refused(
        ModuleError,
        "filled buffer '1.table' and set '1.filled' since from_module",
        "Call the module first",
    ):
        apply_fn(params, buffers, x)
    apply_fn, params, buffers = from_module(module, copy=True)
    assert torch.equal(apply_fn(params, buffers, x)[0], out)
    to_module(module, params, buffers)  # writes buffers, and no attributes
    assert torch.equal(apply_fn(params, buffers, x)[0], out)
    module, x = nn.Sequential(Rotation()), torch.ones(2, D)
    apply_fn, params, buffers = from_module(module, copy=True)
    module[0].filled = -1  # an attribute alone
    assert torch.equal(apply_fn(params, buffers, x)[0], module(x))


def test_a_cache_that_calls_share_with_the_module_follows_it() -> None:
    module, x = nn.Sequential(nn.Linear(D, D), Rotation()), torch.ones(2, D)
    apply_fn, params, buffers = from_module(module)
    out = module(x)
    assert torch.equal(apply_fn(params, buffers, x)[0], out)
    module[1].table = torch.zeros(8)  # another tensor, filled again
    module[1].filled = 0
    module(torch.ones(2, D))
    with refused(ModuleError, "buffer '1.table'"):
        apply_fn(params, buffers, x)
