"""What a plan says of memory and traffic, against formulas and against what is measured while a
step runs."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fusing_backend import fusing
from support.watched_slots import held, slots_seen

import funcpipe as fp
from funcpipe._src.backends import grad_mean as divide
from funcpipe._src.backends import weight_buckets as shards
from funcpipe._src.comm.simulated import InProcessCommunicator
from funcpipe._src.graph.ids import ValueId
from funcpipe._src.runtime import bound_call, interpreter
from funcpipe.testing import Layer, Model, models

BLOCKS, WIDTH, ROWS = 6, 8, 8
data = fp.data_parallel(axis="data")


def loss_fn(params: Any, batch: Any) -> fp.Mean:
    x = batch
    for w in params["blocks"]:
        x = fp.stage_boundary(torch.tanh(x @ w))
    return fp.Mean((x * params["scale"]).square().sum(), torch.ones_like(x).sum())


def step(state: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(state[0], batch)
    params = optree.tree_map(lambda p, g: p - 0.1 * g, state[0], grads)
    return (params, grads), {"loss": loss}


def start(params: Any) -> Any:
    return params, optree.tree_map(torch.zeros_like, params)


def init_params() -> Any:
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.float64) for _ in range(BLOCKS)]
    return {"blocks": blocks, "scale": torch.tensor(0.5, dtype=torch.float64)}


BATCH = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BLOCK = WIDTH * WIDTH * 8  # bytes
PSI = BLOCKS * BLOCK


def ran(mesh: fp.Mesh, *transforms: Callable) -> tuple[fp.Plan, Any, Any]:
    """The plan, every rank's state after a step, and the runner."""
    run = fp.simulate(fp.compose(*transforms)(step), mesh)
    state = run.init(start, init_params(), BATCH)
    state, _ = run(state, BATCH)
    return run.plan(state, BATCH), state, run


def sharded(**options: Any) -> Callable:
    return fp.sharded_weights(axis="data", **options)


# ---- memory: what a rank holds


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_rank_holds_an_nth_and_the_padding_of_a_leaf(n: int) -> None:
    model = Model(
        ((Layer("linear", (0, 0)), Layer("permute", (0,))), (Layer("gated", (1, 2)),)), unused=True
    )
    optimizer = fp.optim.adamw(1e-2)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(model.loss_fn)(state["params"], batch)
        params, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": params, "opt": opt, "grads": grads}, {"loss": loss}

    run = fp.simulate(fp.compose(data, sharded())(step), fp.Mesh(data=n))
    params, batch = model.init(), model.batch(0, n)
    state = run.init(lambda p: {"params": p, "opt": optimizer.init(p), "grads": p}, params, batch)
    state, _ = run(state, batch)
    full = run.unplace(state)
    for what in ("params", "grads", "opt"):
        leaves = [x for x in optree.tree_leaves(full[what]) if x.dim()]
        shards = -(-sum(x.nbytes for x in leaves) // n) + sum(
            x.itemsize for x in leaves
        )  # of each leaf one element
        whole = sum(x.nbytes for x in optree.tree_leaves(full[what]) if not x.dim())
        assert all(held(s[what]) <= shards + whole for s in state)
    plan = run.plan(state, batch)
    assert max(held(s["params"]) for s in state) <= plan.memory[0]["params"]


# ---- memory: what is whole while a step runs


class Gathered:
    """Bytes of whole params that are alive, by rank: now and at their peak."""

    def __init__(self) -> None:
        self.alive: dict[int, Counter[int]] = defaultdict(Counter)
        self.now: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()

    def see(self, rank: int, x: torch.Tensor) -> None:
        memory = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if not memory[1]:
            return
        if not self.alive[rank][memory[0]]:
            self.now[rank] += memory[1]
        self.alive[rank][memory[0]] += 1
        self.peak[rank] = max(self.peak[rank], self.now[rank])
        weakref.finalize(x, self._gone, rank, *memory)

    def _gone(self, rank: int, memory: int, nbytes: int) -> None:
        self.alive[rank][memory] -= 1
        if not self.alive[rank][memory]:
            self.now[rank] -= nbytes


@contextlib.contextmanager
def gathers_seen() -> Iterator[Gathered]:
    seen, whole, start = Gathered(), shards._unsharded, InProcessCommunicator.start_all_gather
    rank_of: dict[int, int] = {}

    def starts(self: Any, x: torch.Tensor, axes: Any) -> Any:
        pending = start(self, x, axes)
        out = pending.wait()
        rank_of[id(out)] = self.rank
        seen.see(self.rank, out)
        return pending

    def wholes(out: torch.Tensor, bucket: Any) -> list[torch.Tensor]:
        leaves = whole(out, bucket)
        for leaf in leaves:
            seen.see(rank_of[id(out)], leaf)
        return leaves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessCommunicator, "start_all_gather", starts)
        patch.setattr(shards, "_unsharded", wholes)
        yield seen


@pytest.mark.parametrize(("prefetch", "blocks"), [(0, 1), (1, 2), (2, 3), (4, 5)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_gathered_params_are_those_of_the_prefetch_window(
    prefetch: int, blocks: int, microbatches: int
) -> None:
    with gathers_seen() as seen:
        plan, _, _ = ran(
            fp.Mesh(data=2),
            data,
            sharded(prefetch=prefetch),
            fp.accumulated(microbatches=microbatches),
        )
    assert [*seen.peak.values()] == [blocks * BLOCK] * 2
    assert plan.memory[0]["gathered"] == blocks * BLOCK


def test_held_params_are_all_of_a_stage() -> None:
    with gathers_seen() as seen:
        plan, _, _ = ran(
            fp.Mesh(pipe=2, data=2),
            data,
            sharded(regather="step"),
            fp.pipelined(axis="pipe", microbatches=2, stages=[3, 4]),
        )
    assert [seen.peak[r] for r in range(4)] == [3 * BLOCK] * 4
    assert [m["gathered"] for m in plan.memory] == [3 * BLOCK] * 2


options = st.fixed_dictionaries(
    {"prefetch": st.integers(0, 4)},
    optional={
        "regather": st.sampled_from(["step", 1, 2]),
        "bucket_bytes": st.sampled_from([1, 200]),
        "reduce": st.just("last"),
    },
)


@given(
    models(max_segments=3),
    options,
    st.sampled_from([fp.Mesh(data=3), fp.Mesh(pipe=2, data=2)]),
    st.integers(1, 3),
)
def test_gathered_params_are_those_predicted(
    model: Model, options: Any, mesh: fp.Mesh, microbatches: int
) -> None:
    def step(params: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)
        return params, {"out": out, "norm": fp.global_norm(grads)}

    micro = fp.pipelined(axis="pipe", microbatches=microbatches) if "pipe" in mesh.axes else None
    stack = [data, sharded(**options), micro or fp.accumulated(microbatches=microbatches)]
    params, batch = model.init(), model.batch(0, microbatches * mesh.axis_size("data"))
    with gathers_seen() as seen:
        run = fp.simulate(fp.compose(*stack)(step), mesh)
        run(state := run.init(lambda p: p, params, batch), batch)
    plan = run.plan(state, batch)
    for r in range(mesh.size):
        assert seen.peak[r] == plan.memory[mesh.coords(r).get("pipe", 0)]["gathered"]
    assert not any(seen.now.values())


@given(models(max_segments=4), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_residuals_and_sums_are_those_predicted(
    model: Model, microbatches: int, ranks: int, zero: bool
) -> None:
    def step(params: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)
        return params, {"out": out, "norm": fp.global_norm(grads)}

    schedule = fp.schedules.zb_h1() if zero else fp.schedules.one_f_one_b()
    ranks = min(ranks, len(model.segments) + 1)
    transformed = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule)
    params, batch = model.init(), model.batch(0, microbatches)
    run = fp.simulate(transformed, fp.Mesh(pipe=ranks))
    with slots_seen() as peaks:
        run(state := run.init(lambda p: p, params, batch), batch)
    plan = run.plan(state, batch)
    for r in range(ranks):
        assert peaks[r]["values"] == plan.memory[r]["residuals"]
        assert peaks[r]["sums"] == plan.memory[r]["gradients"]


@given(
    models(max_segments=4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float64]),
)
def test_residuals_and_sums_of_fused_units_are_those_predicted(
    model: Model, microbatches: int, zero: bool, sums: Any
) -> None:
    """In float64 sums have the dtype of gradients, else more bits: these models have leaves of
    either kind."""

    def step(params: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)
        return params, {"out": out, "norm": fp.global_norm(grads)}

    schedule = fp.schedules.zb_h1() if zero else fp.schedules.one_f_one_b()
    transformed = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule)
    params, batch = model.init(), model.batch(0, microbatches)
    with fusing(sums), slots_seen() as peaks:
        run = fp.simulate(transformed, fp.Mesh(pipe=2 if model.segments else 1))
        run(run.init(lambda p: p, params, batch), batch)
        (ranks,) = run._bound.values()
    cut = ranks[0].calls[0].planned.units
    # Where F and B are one unit, what both hand out is there at once, but goes to slots one after
    # the other.
    last = sum(v.nbytes for v in cut.units["F", cut.segments - 1].outputs)
    for r, one in enumerate(ranks):
        assert peaks[r]["values"] <= one.usage.residuals <= peaks[r]["values"] + last
        assert peaks[r]["sums"] == one.usage.gradients


# ---- memory: sums of gradients, and gradients that are being reduced


class _Slow:
    """A reduction that takes until it is waited for, as on a GPU: what it reads lives that long."""

    def __init__(self, source: torch.Tensor, out: torch.Tensor) -> None:
        self.source, self.out = source, out

    def wait(self) -> torch.Tensor:
        return self.out


def alive(slots: list[Any], values: dict[int, ValueId]) -> list[torch.Tensor]:
    """What sums, and reductions under way, hold."""
    out = []
    for slot, value in values.items():
        if value.kind in ("sum", "row", "unsharded", "shard"):
            out.append(slots[slot])
        elif value.kind == "pending" and str(value.name).startswith("reduction"):
            pending = slots[slot].pending
            out += [pending.source, pending.out]
    return out


@contextlib.contextmanager
def sums_seen() -> Iterator[dict[int, int]]:
    """By rank the peak of what sums hold; a program runs instruction by instruction."""
    peaks: dict[int, int] = defaultdict(int)
    programs: list[tuple[Any, Any]] = []
    bind, run, reduce = bound_call.bind, interpreter.run, InProcessCommunicator.start_reduce_scatter

    def binds(program: Any, *args: Any) -> Any:
        programs.append((bound := bind(program, *args), program))
        return bound

    def runs(bound: Any, slots: list[Any], comm: Any) -> None:
        program = next(p for b, p in programs if b is bound)
        names: dict[int, ValueId] = {}
        for one, written in zip(bound.instructions, program.instructions, strict=True):
            before = alive(slots, names)
            run(dataclasses.replace(bound, instructions=(one,)), slots, comm)
            for value in written.frees:
                names.pop(program.slot_of[value], None)
            for value in written.writes:
                if value not in written.frees:
                    names[program.slot_of[value]] = value
            peaks[comm.rank] = max(peaks[comm.rank], held([*before, *alive(slots, names)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_call, "bind", binds)
        patch.setattr(interpreter, "run", runs)
        patch.setattr(
            InProcessCommunicator,
            "start_reduce_scatter",
            lambda self, x, axes: _Slow(x, reduce(self, x, axes).wait()),
        )
        yield peaks


@pytest.mark.parametrize("reduce", ["each", "last"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_sums_of_gradients_are_those_predicted(reduce: str, microbatches: int) -> None:
    with sums_seen() as peaks:
        plan, _, _ = ran(
            fp.Mesh(data=2), data, sharded(reduce=reduce), fp.accumulated(microbatches=microbatches)
        )
    predicted = plan.memory[0]["gradients"]
    # A lone gradient may be sent from where it lies; the prediction has it copied.
    assert all(peak <= predicted <= peak + (reduce == "last") * BLOCK for peak in peaks.values())
    scalars = 3 * 8  # total, weight, and the gradient of the 0-d leaf
    if (reduce, microbatches) == (
        "each",
        1,
    ):  # shards of all blocks, and the last two blocks under way
        assert (
            PSI / 2 + 2 * BLOCK <= plan.memory[0]["gradients"] <= PSI / 2 + 3 * BLOCK + 2 * scalars
        )
    if (reduce, microbatches) == ("last", 2):  # all blocks, and one of them added up
        assert PSI + BLOCK <= plan.memory[0]["gradients"] <= PSI + 4 * BLOCK + 2 * scalars


# ---- traffic


class Sent:
    """Bytes that ranks receive, by rank and axes, counted as rings do; single numbers are left
    out."""

    def __init__(self) -> None:
        self.bytes: dict[int, Counter[Any]] = defaultdict(Counter)

    def add(self, comm: Any, axes: Any, nbytes: float) -> None:
        if comm.mesh.axis_size(axes) > 1:
            self.bytes[comm.rank][axes] += round(nbytes)


@contextlib.contextmanager
def traffic_seen(pipe: str = "pipe") -> Iterator[Sent]:
    seen = Sent()
    comm = InProcessCommunicator
    originals = {
        name: getattr(comm, name) for name in ("all_gather", "reduce_scatter", "all_reduce", "recv")
    }

    def all_gather(self: Any, x: torch.Tensor, axes: Any) -> Any:
        seen.add(self, axes, (self.mesh.axis_size(axes) - 1) * x.nbytes)
        return originals["all_gather"](self, x, axes)

    def reduce_scatter(self: Any, x: torch.Tensor, axes: Any) -> Any:
        seen.add(self, axes, (len(x) - 1) * x[0].nbytes)
        return originals["reduce_scatter"](self, x, axes)

    def all_reduce(self: Any, x: torch.Tensor, axes: Any, op: str = "sum") -> Any:
        n = self.mesh.axis_size(axes)
        if x.numel() > 2:  # not total and weight, nor a norm
            seen.add(self, axes, 2 * (n - 1) * x.nbytes / n)
        return originals["all_reduce"](self, x, axes, op)

    def recv(self: Any, outs: Any, src: int, channel: str) -> Any:
        seen.add(self, (pipe,), sum(x.nbytes for x in outs))
        return originals["recv"](self, outs, src, channel)

    with pytest.MonkeyPatch.context() as patch:
        for name, count in (
            ("all_gather", all_gather), ("reduce_scatter", reduce_scatter), ("all_reduce", all_reduce), ("recv", recv)
        ):  # fmt: skip
            patch.setattr(comm, name, count)
        yield seen


SCALE = 8  # the gradient of the 0-d leaf is all-reduced


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_traffic_of_sharding_against_formulas(n: int, microbatches: int) -> None:
    """Regathered and held, reduced each time and once. The first block's backward needs no weights:
    3 PSI less one."""
    micro, part = fp.accumulated(microbatches=microbatches), (n - 1) / n
    scale = 2 * part * SCALE
    plan, _, _ = ran(fp.Mesh(data=n), data, sharded(prefetch=0), micro)
    assert plan.traffic == [{("data",): microbatches * (3 * PSI - BLOCK) * part + scale}]
    plan, _, _ = ran(fp.Mesh(data=n), data, sharded(prefetch=0, reduce="last"), micro)
    assert plan.traffic == [{("data",): (microbatches * (2 * PSI - BLOCK) + PSI) * part + scale}]
    plan, _, _ = ran(fp.Mesh(data=n), data, sharded(regather="step", reduce="last"), micro)
    assert plan.traffic == [{("data",): 2 * PSI * part + scale}]
    plan, _, _ = ran(fp.Mesh(data=n), data, micro)
    assert plan.traffic == [{("data",): 2 * (PSI + SCALE) * part}]


def test_a_prefetch_window_saves_what_it_spans() -> None:
    """With two units ahead, the last block's backward comes before its weights are dropped."""
    plan, _, _ = ran(fp.Mesh(data=2), data, sharded(prefetch=2))
    assert plan.traffic == [{("data",): (3 * PSI - 2 * BLOCK) // 2 + SCALE}]


def test_traffic_of_hsdp_and_of_shards_that_no_batch_is_split_over() -> None:
    hsdp = fp.data_parallel(axis=("replica", "data"))
    plan, _, _ = ran(fp.Mesh(replica=4, data=2), hsdp, sharded(regather="step"))
    along = {
        ("data",): 2 * PSI // 2,
        ("replica",): 2 * PSI // 2 * 3 // 4,
        ("replica", "data"): 2 * SCALE * 7 // 8,
    }
    assert plan.traffic == [along]
    plan, _, _ = ran(fp.Mesh(data=2, x=4), data, fp.sharded_weights(axis="x", regather="step"))
    assert plan.traffic == [{("x",): PSI * 3 // 4, ("data",): PSI // 4 + SCALE}]


def test_traffic_of_a_pipeline() -> None:
    """Activations one way, their gradients the other, with total and weight; the tied 0-d leaf is
    not there."""
    plan, _, _ = ran(fp.Mesh(pipe=2), fp.pipelined(axis="pipe", microbatches=4, stages=[3, 4]))
    activations = ROWS * WIDTH * 8
    assert plan.traffic == [{("pipe",): activations + 2 * 8}, {("pipe",): activations}]


@given(models(max_segments=3), options, st.data())
def test_bytes_moved_are_those_predicted(model: Model, options: Any, drawn: st.DataObject) -> None:
    def step(params: Any, batch: Any) -> Any:
        loss, _ = fp.value_and_grad(lambda p, b: _mean(model.loss_fn(p, b)))(params, batch)
        return params, {"loss": loss}

    cases = {
        "pipeline": (fp.Mesh(pipe=2, data=2), [data, sharded(**options)]),
        "hsdp": (fp.Mesh(a=2, data=2), [fp.data_parallel(axis=("a", "data")), sharded(**options)]),
        "slices": (fp.Mesh(x=2, data=2), [data, fp.sharded_weights(axis=("x", "data"), **options)]),
        "whole": (fp.Mesh(pipe=2, data=2), [data]),
    }
    mesh, stack = cases[drawn.draw(st.sampled_from(sorted(cases)))]
    micro = (
        fp.pipelined(axis="pipe", microbatches=2)
        if "pipe" in mesh.axes
        else fp.accumulated(microbatches=2)
    )
    run = fp.simulate(fp.compose(*stack, micro)(step), mesh)
    params, batch = model.init(), model.batch(0, 8)
    state = run.init(lambda p: p, params, batch)
    with traffic_seen() as seen:
        run(state, batch)
    plan = run.plan(state, batch)
    small = (
        8 * 2 * len(optree.tree_leaves(params))
    )  # 0-d leaves may be reduced alone; a shard may be an element short
    for r in range(mesh.size):
        predicted = plan.traffic[mesh.coords(r).get("pipe", 0)]
        for axes in {*predicted, *seen.bytes[r]}:
            assert 0 <= predicted.get(axes, 0) - seen.bytes[r][axes] <= small, (r, axes)


def _mean(out: Any) -> Any:
    return out if isinstance(out, fp.Mean) else out[0]


def test_sums_are_gone_one_by_one_as_they_are_divided() -> None:
    """Beside the gradients that a step gets there is never more than one sum."""
    alive: list[int] = []
    sums: list[weakref.ref] = []
    averaged, grads = divide.averaged, bound_call.BoundCall._grads

    def made(self: Any, *args: Any) -> Any:
        out = grads(self, *args)
        sums.extend(weakref.ref(x) for x in out if x is not None)
        return out

    def divides(g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        alive.append(sum(x() is not None for x in sums))
        return averaged(g, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_call.BoundCall, "_grads", made)
        patch.setattr(divide, "averaged", divides)
        ran(fp.Mesh(data=1), data, sharded())
    assert alive == list(range(BLOCKS + 1, 0, -1))
