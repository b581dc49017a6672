"""What a compiled backend fuses: gradient GEMMs into sums, units that run back to back, sums in
more bits.

Most tests run the fused units' graphs op by op, without a compiler, so that many cases can be
drawn; the last ones compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.fusing_backend import Fusing, fusing
from torch import fx
from torch._dynamo.utils import counters

import funcpipe as fp
from funcpipe._src.backends import grad_mean as divide
from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.bind import bind
from funcpipe._src.backends.fusion import gradient_gemms
from funcpipe._src.backends.grad_accumulation import Factors, Lookup, form_of, outputs_of
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import DonationAnalysis
from funcpipe._src.core.loss_types import averaged
from funcpipe._src.program import ADD
from funcpipe._src.runtime import simulate
from funcpipe._src.runtime.rank import Rank
from funcpipe.errors import StackError, TraceError
from funcpipe.testing import Model, assert_equivalent, meshes, microbatch_counts, models, schedules

FLOAT64 = 1e-12  # sums in another order, fused roundings


def training(model: Model) -> tuple[Callable, Callable]:
    """A step of plain descent, which keeps its gradients; and its ``init_state``."""

    def step(state: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state[0], batch)
        params = tree.map(lambda p, g: p - 0.1 * g if p.is_floating_point() else p, state[0], grads)
        return (params, grads), {"out": out}

    return step, lambda params: (params, tree.map(torch.zeros_like, params))


@given(
    model=models(),
    microbatches=microbatch_counts(),
    schedule=schedules(v=2),
    ranks=st.integers(1, 3),
    data=st.data(),
)
def test_fused_steps_equal_one_device(
    model: Model, microbatches: int, schedule: Any, ranks: int, data: st.DataObject
) -> None:
    step, init_state = training(model)
    ranks = min(ranks, (len(model.segments) + 1) // 2)
    piped = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule)
    batches = [model.batch(seed, rows=2 * microbatches) for seed in range(2)]
    with fusing(data.draw(st.sampled_from([torch.bfloat16, torch.float64]))):
        assert_equivalent(
            step, piped, fp.Mesh(pipe=ranks), init_state, model.init(), batches, rtol=FLOAT64
        )


@given(
    model=models(),
    mesh=meshes(data=2, more=2),
    microbatches=microbatch_counts(3),
    reduce=st.sampled_from(["each", "last"]),
    regather=st.sampled_from(["microbatch", "step"]),
)
def test_fused_steps_with_sharded_weights(
    model: Model, mesh: fp.Mesh, microbatches: int, reduce: str, regather: str
) -> None:
    step, init_state = training(model)
    stack = [
        fp.accumulated(microbatches=microbatches),
        fp.data_parallel(axis=("data", "more")),
        fp.sharded_weights(axis="data", reduce=reduce, regather=regather),
    ]
    batches = [model.batch(seed, rows=4 * microbatches) for seed in range(2)]
    with fusing():
        assert_equivalent(
            step, fp.compose(*stack)(step), mesh, init_state, model.init(), batches, rtol=FLOAT64
        )


# ---- a language model, of which it is known what can be fused


def init(dtype: torch.dtype = torch.float64, layers: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: (torch.randn(shape, generator=g, dtype=torch.float64) * 0.3).to(dtype)  # noqa: E731
    blocks = [
        {"norm": torch.ones(8, dtype=dtype), "up": new(12, 8), "down": new(8, 12)}
        for _ in range(layers)
    ]
    return {"embed": new(11, 8), "blocks": blocks, "head": new(11, 8)}


def batch(rows: int = 8) -> dict[str, torch.Tensor]:
    tokens = torch.randint(11, (2, rows, 5), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[0], "labels": tokens[1]}


def loss_fn(params: Any, data: Any, dtype: torch.dtype | None = None) -> fp.Mean:
    p = tree.map(lambda x: x if dtype is None else x.to(dtype), params)
    x = F.embedding(data["tokens"], p["embed"])
    for b in p["blocks"]:
        x = fp.stage_boundary(
            x + F.linear(F.silu(F.linear(F.rms_norm(x, (8,), b["norm"]), b["up"])), b["down"])
        )
    logits = F.linear(x, p["head"]).flatten(0, 1)
    total = F.cross_entropy(logits.double(), data["labels"].flatten(), reduction="sum")
    return fp.Mean(total, logits.new_tensor(logits.shape[0], dtype=torch.float64))


def step_of(loss: Callable) -> Callable:
    def step(state: Any, data: Any) -> Any:
        loss_, grads = fp.value_and_grad(loss)(state["params"], data)
        return {"params": state["params"], "grads": grads}, {"loss": loss_}

    return step


def init_state(params: Any) -> Any:
    return {"params": params, "grads": tree.map(torch.zeros_like, params)}


def gradients(
    backend: Fusing | None, schedule: Any, dtype: torch.dtype, loss: Callable = loss_fn
) -> tuple[Any, Any]:
    """A pipeline's gradients after one step, and its plan."""
    piped = fp.pipelined(step_of(loss), axis="pipe", microbatches=4, schedule=schedule)
    run = fp.simulate(piped, fp.Mesh(pipe=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "Rank", partial(Rank, backend=backend))
        state, _ = run(run.init(init_state, init(dtype), batch()), batch())
    return run.unplace(state)["grads"], run.plan(None, batch())


def names(plan: Any, backend: Backend) -> set[str]:
    """The paths of leaves of which nothing but gradient GEMMs is added up."""
    found = set()
    for program in plan.calls[0].programs:
        bound = bind(program, None, backend, (0, 1), "0")  # type: ignore[arg-type]
        gemms = gradient_gemms(program, backend)
        made = set()
        for instruction, one in zip(program.instructions, bound.instructions, strict=True):
            if instruction.unit is not None:
                made |= {v for v in instruction.writes if program.slot_of[v] in one.writes}
        for instruction in program.instructions:
            if instruction.op == ADD and instruction.reads[0] in gemms & made:
                found.add(plan.placement.analysis.paths[instruction.writes[0].name.arg])
    return found


@pytest.mark.parametrize(
    "schedule", [fp.schedules.one_f_one_b(), fp.schedules.zb_h1()], ids=["1f1b", "zb_h1"]
)
def test_matrices_and_tables_are_gradient_gemms(schedule: Any) -> None:
    backend = Fusing()
    grads, plan = gradients(backend, schedule, torch.float64)
    want, _ = gradients(Backend(), schedule, torch.float64)  # type: ignore[arg-type]
    for got, expected in zip(tree.leaves(grads), tree.leaves(want), strict=True):
        assert (got - expected).norm() <= FLOAT64 * expected.norm()
    matrices = {
        "['embed']",
        "['head']",
        *(f"['blocks'][{i}]['{w}']" for i in range(3) for w in ("up", "down")),
    }
    assert names(plan, backend) == matrices


def test_what_runs_back_to_back_is_one_unit() -> None:
    backend = Fusing()
    _, plan = gradients(backend, fp.schedules.one_f_one_b(), torch.float64)
    program = plan.calls[0].programs[1]
    targets = [{str(x.target) for x in code.module.graph.nodes} for code, _ in backend.asked]
    both = [
        t
        for t in targets
        if {"aten._log_softmax.default", "aten._log_softmax_backward_data.default"} <= t
    ]
    assert both and not any(
        len({"aten._log_softmax.default", "aten._log_softmax_backward_data.default"} & t) == 1
        for t in targets
    )
    bound = bind(program, None, backend, (0, 1), "0")  # type: ignore[arg-type]
    assert len(bound.instructions) == len(program.instructions)


def test_profiles_time_what_is_fused() -> None:
    run = fp.simulate(fp.pipelined(step_of(loss_fn), axis="pipe", microbatches=4), fp.Mesh(pipe=2))
    run._backend = backend = Fusing()
    state = run.init(init_state, init(), batch())
    costs = fp.profile_units(run, state, batch(), rounds=1)
    segments = max(s for _, s in costs.units) + 1
    assert set(costs.units) == {(kind, s) for kind in "FBIW" for s in range(segments)}
    assert all(
        costs.of("F", s) > 0 and costs.of("I", s) > 0 and costs.of("W", s) > 0
        for s in range(segments)
    )
    separate = run._made.separate_units(run.plan(state, batch()), 0)
    units = {unit.code for unit in separate.units.values()}
    assert any(gemms for _, gemms in backend.asked)
    assert any(code not in units for code, _ in backend.asked)  # two that are one


def test_sums_in_more_bits() -> None:
    loss = partial(loss_fn, dtype=None)
    exact, _ = gradients(Fusing(), fp.schedules.one_f_one_b(), torch.float64, loss)
    errors = []
    for sums in (torch.bfloat16, torch.float32):
        got, _ = gradients(Fusing(sums), fp.schedules.one_f_one_b(), torch.bfloat16, loss)
        pairs = list(zip(tree.leaves(got), tree.leaves(exact), strict=True))
        assert all(x.dtype == torch.bfloat16 for x, _ in pairs)
        errors.append(sum(float((x.double() - y).norm() / y.norm()) for x, y in pairs))
    assert errors[1] < errors[0]


def test_halves_add_up_in_the_precision_of_the_params() -> None:
    """Params in float32, computed with in bfloat16: products go into float32 accumulators without
    being cast."""
    backend = Fusing()
    grads, plan = gradients(
        backend, fp.schedules.one_f_one_b(), torch.float32, partial(loss_fn, dtype=torch.bfloat16)
    )
    assert "['blocks'][0]['up']" in names(plan, backend)
    assert all(x.dtype == torch.float32 for x in tree.leaves(grads))


# ---- gradient GEMMs by themselves


def graph_of(fn: Callable, *inputs: torch.Tensor) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(fn, tracing_mode="fake")(*inputs).graph
    out = next(x for x in graph.nodes if x.op == "output")
    out.args = (out.args[0] if isinstance(out.args[0], list | tuple) else (out.args[0],),)
    return graph


A, B = torch.randn(3, 4), torch.randn(4, 5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: a @ b,
        lambda a, b: (a @ b).t(),
        lambda a, b: (a @ b).t().t(),
        lambda a, b: (a @ b).transpose(0, 1),
        lambda a, b: (a @ b).transpose(-1, -2).double(),
        lambda a, b: (a @ b).view(3, 5),
    ],
)
def test_forms(fn: Callable) -> None:
    form = form_of(outputs_of(graph_of(fn, A, B))[0])
    assert form is not None
    product = form.pack(A, B)
    want = fn(A, B)
    assert torch.equal(product.materialize(torch.float32), want.float())
    total = torch.ones(want.shape)
    assert product.accumulate_into(total) is total
    assert torch.allclose(total, want.float() + 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: (a @ b).relu(),
        lambda a, b: (a @ b).view(5, 3),
        lambda a, b: (a @ b)[0:2],
        lambda a, b: a * 2,
        lambda a, b: a,
    ],
)
def test_what_is_no_product(fn: Callable) -> None:
    assert form_of(outputs_of(graph_of(fn, A, B))[0]) is None


def test_a_product_that_others_read_is_made() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        product = a @ b
        return product.t(), product.sum()

    assert form_of(outputs_of(graph_of(fn, A, B))[0]) is None


@pytest.mark.parametrize(
    "padding, scaled, found", [(-1, False, True), (0, False, False), (-1, True, False)]
)
def test_tables(padding: int, scaled: bool, found: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 4, generator=generator)
    places = torch.tensor([[0, 5, 0], [1, 1, 6]])
    fn = lambda r, p: torch.ops.aten.embedding_dense_backward(r, p, 7, padding, scaled)  # noqa: E731
    form = form_of(outputs_of(graph_of(fn, rows, places))[0])
    assert (form is not None) == found
    if form is not None:
        product = form.pack(rows, places)
        assert isinstance(product, Lookup)
        assert torch.allclose(product.materialize(torch.float32), fn(rows, places))
        added = product.accumulate_into(torch.ones(7, 4))
        assert torch.allclose(added, fn(rows, places) + 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_accumulators(dtype: torch.dtype) -> None:
    """Which accumulators take a product of float32 or bfloat16 factors in."""
    for made in (torch.float32, torch.bfloat16):
        form = form_of(outputs_of(graph_of(lambda a, b: a @ b, A.to(made), B.to(made)))[0])
        assert form is not None
        assert form.adds_to(dtype) == (
            dtype == made or (made, dtype) == (torch.bfloat16, torch.float32)
        )


def test_halves_into_float32() -> None:
    product = Factors(A.bfloat16(), B.bfloat16())
    total = product.materialize(torch.float32)
    assert total.dtype == torch.float32
    assert torch.allclose(product.accumulate_into(total), 2 * A @ B, atol=0.1)


# ---- gradients over the weight


@pytest.mark.parametrize("backend", [Fusing(), Backend()], ids=["fusing", "eager"])
def test_sums_over_a_weight(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the division is compiled; here the graph runs that would be, and under a mode as
    when a step is watched."""
    monkeypatch.setattr(
        divide, "_is_slow", lambda x, weight: x.is_floating_point() and x.is_contiguous()
    )
    x, weight = torch.arange(6.0).view(2, 3), torch.tensor(7.0)
    sums = [x, x.bfloat16(), x.t(), None, torch.arange(3), x + 1, torch.ones(())]
    want = [None if s is None else averaged(s, weight) for s in sums]
    with DonationAnalysis([x]).watch():
        divide.divide(sums, weight, backend)
    assert all(s is w is None or torch.equal(s, w) for s, w in zip(sums, want, strict=True))
    assert all(s is None or s.shape == w.shape for s, w in zip(sums, want, strict=True))
    assert len(backend._made) == (
        3 if backend.fuses else 0
    )  # for 6 elements of either dtype, and for one


# ---- with the compiler


def compiles(folder: str) -> tuple[float, dict[str, int]]:
    """How far a compiled step is from one device, and how often torch's cache on disk was hit while
    it was compiled."""
    counters["inductor"].clear()
    transformed = fp.accumulated(step_of(loss_fn), microbatches=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        patch.setattr(divide, "_is_slow", lambda x, weight: x.dim() == 2)
        patch.setattr(simulate, "Rank", partial(Rank, backend=Backend("inductor")))
        run = fp.simulate(transformed, fp.Mesh())
        state, _ = run(run.init(init_state, init(layers=1), batch()), batch())
    want = fp.value_and_grad(loss_fn)(init(layers=1), batch())[1]
    pairs = zip(tree.leaves(run.unplace(state)["grads"]), tree.leaves(want), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return error, {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning"
)  # torch's own, where inductor is imported
def test_compiled_units_and_their_cache_on_disk(tmp_path: Any) -> None:
    error, first = compiles(str(tmp_path / "cache"))
    assert error <= FLOAT64
    # F and B of the first segment, both of the last one as one unit, the divisions of two sizes of
    # matrices.
    assert first == {"fxgraph_cache_miss": 5}
    assert compiles(str(tmp_path / "cache"))[1] == {"fxgraph_cache_hit": 5}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_compiled_unit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest there is; whole steps are slow."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = fx.GraphModule({}, graph_of(lambda a: a.sin() + a, A))
    module.graph.set_codegen(fx.graph._BoxedCodeGen())
    module.recompile()
    (found,) = Backend("inductor")._inductor(module, "abc")([A])
    assert torch.allclose(found, A.sin() + A)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_what_inductor_refuses() -> None:
    unboxed = fx.GraphModule({}, graph_of(lambda a, b: a @ b, A, B))
    with pytest.raises(
        TraceError, match=r"torch's inductor cannot compile unit abc: .*use backend='eager'"
    ):
        Backend("inductor")._inductor(unboxed, "abc")


def searched_and_compiled() -> tuple[float, list[dict[str, int]]]:
    """In processes: the units of a pipeline, timed and compiled; how far its gradients are from one
    device's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformed = fp.pipelined(step_of(loss_fn), axis="pipe", microbatches=2, schedule="auto")
    run = fp.spmd(transformed, fp.Mesh(pipe=2), device="cpu", backend="inductor", timeout=120)
    state = run.init(init_state, init(layers=1), batch())
    for _ in range(2):
        state, _ = run(state, batch())
    got, memory = run.unplace(state)["grads"], run.plan(state, batch()).memory
    want = fp.value_and_grad(loss_fn)(init(layers=1), batch())[1]
    run.close()
    pairs = zip(tree.leaves(got), tree.leaves(want), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs), memory


@pytest.mark.slow
def test_compiled_units_in_processes() -> None:
    """Every rank knows what the units of all take."""
    (error, memory), (other, same) = fp.launch(searched_and_compiled, 2, timeout=240)
    assert max(error, other) <= FLOAT64
    assert memory == same and all(
        0 < m["residuals"] <= m["activations"] <= m["step"] for m in memory
    )


def test_a_captured_step_donates() -> None:
    with pytest.raises(
        StackError, match=r"spmd: a captured step updates its state in place; leave donate=False or"
    ):
        fp.spmd(step_of(loss_fn), fp.Mesh(), cuda_graph=True, donate=False)


def test_sums_are_for_compiled_units() -> None:
    for backend, sums in (("eager", torch.float32), ("inductor", torch.int64)):
        with pytest.raises(
            StackError,
            match=r"accumulate_dtype=torch.*give a floating-point dtype, with backend='inductor'",
        ):
            fp.spmd(step_of(loss_fn), fp.Mesh(), backend=backend, accumulate_dtype=sums)
