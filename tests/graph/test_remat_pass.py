"""The pass behind `remat`: what is saved and cloned; choices against all there are; units run by
hand, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import D, batch, block, count, grid, params, refused
from support.units import assert_well_cut, heavy, ops, run, traced, units
from test_partition import BLOCKS, chain, language, language_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.collectives import collectives_of
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.gradients import totals_and_grads
from funcpipe._src.functional.checkpoint_name import checkpoint_name
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.node_labels import read_nodes
from funcpipe._src.graph.partition import Units, cut
from funcpipe._src.graph.remat import check_used, rematerialise
from funcpipe._src.graph.remat_min_cut import Choice, Item, Outcome, _cheapest, outcome, within
from funcpipe._src.graph.trace import Traced, trace
from funcpipe._src.spec.requests import Remat
from funcpipe.errors import StackError, TraceError
from funcpipe.testing import Model, models

BLOCK, PRODUCTS = Remat("block"), Remat("products")


def rematted(t: Traced, *remats: Remat) -> Units:
    """The cut of a trace as a planner makes it."""
    n = read_nodes(t)
    saved = rematerialise(n, remats)
    return replace(cut(t, n), saved=saved)


def cut_of(loss: Callable, p: Any, b: Any, *remats: Remat) -> Units:
    return rematted(traced(loss, p, b), *remats)


def residuals(c: Units, segment: int) -> int:
    """Bytes that B of a segment reads of what forward halves made."""
    forward = {v for u in c.units.values() if u.kind == "F" for v in u.outputs}
    return sum({v.storage: v.nbytes for v in c.units["B", segment].inputs if v in forward}.values())


def flops(c: Units, kinds: str) -> int:
    return sum(u.code.flops for u in c.units.values() if u.kind in kinds)


def assert_eager(c: Units, loss: Callable, p: Any, b: Any) -> None:
    """F/B and F/I/W have the bits of plain PyTorch."""
    total, _, _, expected = totals_and_grads(loss, False, *tree.flatten(p), b)
    for kinds in ("FB", "FIW"):
        heads, grads = run(c, p, b, kinds)
        assert torch.equal(heads[0], total), kinds
        for path, g, e in zip(tree.paths(p), grads, expected, strict=True):
            assert torch.equal(g, e), f"{kinds}: {path} is off by {(g - e).abs().max()}"
    assert_well_cut(c)


# ---- units


@pytest.mark.parametrize(
    ("name", "remat"), grid(BLOCKS, [BLOCK, PRODUCTS, Remat(budget=0.6)], (), turns=True)
)
def test_units_are_eager_to_the_bit(name: str, remat: Remat) -> None:
    loss, p, b = chain(BLOCKS[name]), params(3), batch()
    c = cut_of(loss, p, b, remat)
    assert_eager(c, loss, p, b)
    assert [residuals(c, s) for s in range(4)] == [s.outcome.nbytes for s in c.saved]


@pytest.mark.parametrize("remat", [BLOCK, PRODUCTS, Remat(budget=0.5)], ids=str)
def test_tied_leaves_skips_and_dicts(remat: Remat) -> None:
    p, b = language()
    assert_eager(cut_of(language_model, p, b, remat), language_model, p, b)


def trace_model(model: Model) -> Traced:
    mode = FakeTensorMode()
    (p, p_spec), (b, b_spec) = (
        tree.flatten(tree.map_tensors(lambda x: fake(x.shape, x, mode), x))
        for x in (model.init(), model.batch())
    )
    return trace(model.loss_fn, model.has_aux, (p, p_spec), (b, b_spec), mode)


POLICIES = st.sampled_from([BLOCK, PRODUCTS]) | st.builds(Remat, budget=st.floats(0, 1))


@given(models(), POLICIES)
def test_bytes_and_flops_are_those_announced(model: Model, remat: Remat) -> None:
    plain, c = rematted(trace_model(model)), rematted(trace_model(model), remat)
    assert_well_cut(c)
    for s, (saved, before) in enumerate(zip(c.saved, plain.saved, strict=True)):
        assert before.remat is None and before.outcome == saved.whole
        assert residuals(plain, s) == saved.whole.nbytes
        assert residuals(c, s) == saved.outcome.nbytes
        if remat.budget is not None:
            assert saved.over == (saved.outcome.nbytes > remat.budget * saved.whole.nbytes)
            least = outcome(saved.choice, within(saved.choice, 0.0)).nbytes
            assert not saved.over or saved.outcome.nbytes == least
    again = sum(s.outcome.flops for s in c.saved)
    assert flops(c, "FB") == flops(plain, "FB") + again  # once,
    assert (
        flops(c, "FIW") == flops(plain, "FIW") + again
    )  # also where I and W are units of their own


def test_without_remat_nothing_changes() -> None:
    for loss, p, b in ((chain(block), params(3), batch()), (language_model, *language())):
        plain = units(loss, p, b)
        for c in (cut_of(loss, p, b), cut_of(loss, p, b, Remat(budget=1.0))):
            assert {k: u.code.key for k, u in c.units.items()} == {
                k: u.code.key for k, u in plain.units.items()
            }


@pytest.mark.parametrize("remat", [BLOCK, PRODUCTS, Remat(budget=0.6)], ids=str)
def test_equal_blocks_share_their_code_whatever_the_depth(remat: Remat) -> None:
    codes = [
        {
            u.code.key
            for u in cut_of(chain(BLOCKS["attention"]), params(n), batch(), remat).units.values()
        }
        for n in (4, 7)
    ]
    assert codes[0] == codes[1]


# ---- what is cloned, and where


def ffn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A block of which much is elementwise."""
    gate, up = checkpoint_name((x @ w, x @ w.t()), "hidden")
    return x + checkpoint_name(F.silu(gate) * up, "act") @ w


ROWS = 8 * D * 8  # bytes of a tensor of rows


def of_ffn(*remats: Remat) -> Units:
    return cut_of(chain(ffn), params(3), batch(), *remats)


def test_a_block_saves_what_enters_it_alone() -> None:
    c = of_ffn(BLOCK)
    assert [len(u.outputs) for u in c.units.values() if u.kind == "F"] == [
        1,
        1,
        1,
        2,
    ]  # total and weight
    assert [residuals(c, s) for s in range(4)] == [
        0,
        ROWS,
        ROWS,
        ROWS,
    ]  # what enters segment 0 is the batch
    assert heavy(c.units["F", 1]) == ["aten.mm.default"] * 3
    assert heavy(c.units["B", 1]) == ["aten.mm.default"] * (
        2 + 6
    )  # the last product of the block is not needed


def test_a_budget_takes_what_costs_no_flops_first() -> None:
    plain = of_ffn()
    assert residuals(plain, 1) == 5 * ROWS  # x, gate, up, silu(gate), silu(gate) * up
    for budget, tensors in ((0.99, 4), (0.8, 4), (0.79, 3), (0.6, 3)):
        c = of_ffn(Remat(budget=budget))
        assert residuals(c, 1) == tensors * ROWS
        assert flops(c, "FB") == flops(plain, "FB") and not c.saved[1].over
    assert flops(of_ffn(Remat(budget=0.4)), "FB") > flops(plain, "FB")
    assert of_ffn(Remat(budget=0.1)).saved[1].over


def test_products_are_saved_and_the_rest_is_computed_again() -> None:
    c = of_ffn(PRODUCTS)
    assert residuals(c, 1) == 3 * ROWS and flops(c, "FB") == flops(of_ffn(), "FB")
    assert "mul" in ops(c.units["B", 1]) and "silu" in ops(c.units["B", 1])


def test_names_that_are_saved() -> None:
    c = of_ffn(Remat(save=("hidden",)))
    assert residuals(c, 1) == 3 * ROWS and flops(c, "FB") == flops(of_ffn(), "FB")
    c = of_ffn(Remat(save=("act",)))
    assert residuals(c, 1) == 2 * ROWS and len(heavy(c.units["B", 1])) == 8


def test_names_that_are_computed_again() -> None:
    c = of_ffn(Remat(recompute=("act",)))
    assert residuals(c, 1) == 4 * ROWS and flops(c, "FB") == flops(of_ffn(), "FB")
    c = of_ffn(Remat(recompute=("hidden",)))
    assert residuals(c, 1) == 3 * ROWS and len(heavy(c.units["B", 1])) == 8


def test_segments_that_are_chosen() -> None:
    plain = of_ffn()
    for segments in ((1,), lambda s: s == 1):
        c = of_ffn(Remat("block", segments=segments))
        assert [residuals(c, s) < residuals(plain, s) for s in range(4)] == [
            False,
            True,
            False,
            False,
        ]
    c = of_ffn(Remat("block", segments=(0,)), Remat(budget=0.5, segments=(1, 2)))
    assert [s.remat and s.remat.budget for s in c.saved] == [None, 0.5, 0.5, None]
    assert [residuals(c, s) // ROWS for s in range(4)] == [0, 2, 2, 1]


def test_clones_come_just_before_their_first_use() -> None:
    def two(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mid = checkpoint_name(torch.tanh(x @ w) @ w, "mid")
        return torch.tanh(mid @ w)

    c = cut_of(chain(two), params(2), batch(), Remat(save=("mid",)))
    found = [x for x in ops(c.units["B", 0]) if "tanh" in x]
    assert found == ["tanh", "tanh_backward", "tanh", "tanh_backward"]


def test_what_w_needs_it_reads_from_i() -> None:
    def wide(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x @ w) @ w)

    c = cut_of(chain(wide), params(3), batch(), BLOCK)
    assert len(heavy(c.units["I", 1])) == 2 + 2 and len(heavy(c.units["W", 1])) == 2
    assert "tanh" in ops(c.units["I", 1]) and "tanh" not in ops(c.units["W", 1])


def test_values_of_other_segments_are_read_as_they_are() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        first = fp.stage_boundary(torch.tanh(b["x"] @ p["w"][0]))
        x = fp.stage_boundary(torch.tanh(first @ p["w"][1]))
        return fp.Mean((x * first.exp()).sum(), count(x))

    p, b = params(2), batch()
    c = cut_of(loss, p, b, BLOCK)
    assert_eager(c, loss, p, b)
    assert [ops(c.units["B", s]).count("tanh") for s in range(3)] == [1, 1, 0] and "exp" in ops(
        c.units["B", 2]
    )


def test_communication_is_never_repeated() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = fp.stage_boundary(torch.tanh(fp.psum(torch.tanh(x @ w), "data") @ w))
        return fp.Mean(x.sum(), count(x))

    mesh, mode = fp.Mesh(data=2), FakeTensorMode()
    (p, p_spec), (b, b_spec) = (
        tree.flatten(tree.map_tensors(lambda x: fake(x.shape, x, mode), x))
        for x in (params(), batch())
    )
    found = []
    for remats in ((), (BLOCK,)):
        c = rematted(trace(loss, False, (p, p_spec), (b, b_spec), mode, mesh, ("data",)), *remats)
        found.append({key: collectives_of(u.code.module.graph) for key, u in c.units.items()})
    assert found[0] == found[1] and len(found[0]["F", 1]) == 1
    # x and the sum instead of x, the sum and two tanh
    assert residuals(c, 1) == 2 * ROWS and ops(c.units["B", 1]).count("tanh") == 2


def test_a_checkpoint_of_ones_own_beside_it() -> None:
    def inner(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x @ w)
        return y + checkpoint(
            lambda w, x: checkpoint_name(torch.tanh(x @ w), "inner"), w, y, use_reentrant=False
        )

    p, b = params(3), batch()
    for remat in (BLOCK, Remat(save=("inner",))):
        c = cut_of(chain(inner), p, b, remat)
        assert_eager(c, chain(inner), p, b)
        assert residuals(c, 1) == ROWS


# ---- choices, against all that there are


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Small choices: something enters, the others need what was before them; some are views, some
    cannot be repeated."""
    items: list[Item] = []
    for i in range(draw(st.integers(2, 7))):
        nbytes, work = draw(st.integers(0, 9)), draw(st.integers(0, 9))
        needs = (
            tuple(sorted(draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=3)))) if i else ()
        )
        kind = draw(st.sampled_from(["op", "op", "op", "view", "fixed"])) if i else "fixed"
        if kind == "view":
            items.append(Item(0, 0, 0, items[needs[0]].base, needs[:1], False, True, False))
        else:
            items.append(Item(nbytes, work, work, i, needs, True, kind == "op", False))
    read = tuple(sorted(draw(st.sets(st.integers(0, len(items) - 1), min_size=1))))
    return Choice(tuple(items), read, ())


def every_outcome(c: Choice) -> list[Outcome]:
    bases = sorted(c.bases)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(bases, n) for n in range(len(bases) + 1)
    )
    return [outcome(c, frozenset(s)) for s in subsets]


@given(choices(), st.integers(0, 9), st.integers(1, 9))
def test_the_cheapest_choice_is_found(c: Choice, per_byte: int, per_work: int) -> None:
    def price(x: Outcome) -> int:
        return per_byte * x.nbytes + per_work * x.work

    assert price(_cheapest(c, per_byte, per_work)) == min(map(price, every_outcome(c)))


@given(choices(), st.floats(0, 1))
def test_a_budget_is_kept_with_little_work(c: Choice, budget: float) -> None:
    found, there = outcome(c, within(c, budget)), every_outcome(c)
    limit = budget * outcome(c, c.bases).nbytes
    if found.nbytes > limit:
        assert found.nbytes == min(x.nbytes for x in there)
        return
    for prices in itertools.product(
        range(12), range(1, 12)
    ):  # no better than the choices that some prices make best
        best = min(there, key=lambda x: prices[0] * x.nbytes + prices[1] * x.work)
        assert best.nbytes > limit or found.work <= best.work


@given(choices(), st.floats(0, 1))
def test_nothing_more_would_fit(c: Choice, budget: float) -> None:
    """To save one more value breaks the budget, or spares nothing."""
    found = outcome(c, within(c, budget))
    limit = budget * outcome(c, c.bases).nbytes
    assert outcome(c, found.saved) == found
    for i in c.bases - found.saved:
        more = outcome(c, found.saved | {i})
        assert more.nbytes > limit or more.work >= found.work


# ---- names


NAMED: dict[str, Callable] = {
    "plain": ffn,
    "checkpoint": lambda w, x: checkpoint(ffn, w, x, use_reentrant=False),
    "in place": lambda w, x: _in_place(checkpoint_name(x @ w, "hidden")),
    "vmap": lambda w, x: torch.vmap(lambda row: torch.tanh(checkpoint_name(row @ w, "hidden")))(x),
    "torch.func.grad": lambda w, x: (
        torch.func.grad(lambda y: checkpoint_name(y @ w, "hidden").tanh().sum())(x) + x
    ),
    "custom Function": lambda w, x: _Doubled.apply(x @ w),
    "a view": lambda w, x: checkpoint_name((x @ w).view(2, -1, D), "hidden").tanh().view(-1, D),
}


def _in_place(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[:, 0] = 0
    return y.relu_()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_name(x * 2, "hidden").tanh()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 3


@pytest.mark.parametrize("name", NAMED)
def test_names_are_seen_wherever_a_value_is_made(name: str) -> None:
    loss, p, b = chain(NAMED[name]), params(3), batch()
    c = cut_of(loss, p, b, Remat(save=("hidden",)))
    assert_eager(c, loss, p, b)
    assert "named" not in {x for u in c.units.values() for x in ops(u)}
    found = [len(dict(s.choice.names)["hidden"]) for s in c.saved]
    assert all(n >= 1 for n in found[:3]) and found[3] == 0


def test_a_name_is_nothing_outside_of_a_trace() -> None:
    x = torch.ones(2)
    assert checkpoint_name(x, "x") is x
    tree_ = {"x": x, "n": 3, "none": None}
    assert checkpoint_name(tree_, "x") is tree_
    out = torch.vmap(lambda row: checkpoint_name(row * 2, "row"))(torch.ones(3, 2))
    assert torch.equal(out, torch.full((3, 2), 2.0))


def test_a_name_is_a_text() -> None:
    for name, text in ((3, "an int"), ("", "a str"), (None, "None")):
        with refused(
            TraceError, f"checkpoint_name: the name is {text}; write a text such as 'attention'"
        ):
            checkpoint_name(torch.ones(2), name)  # type: ignore[arg-type]


# ---- errors


def test_names_that_no_value_has() -> None:
    saved = of_ffn().saved
    check_used([Remat(save=("act", "hidden")), Remat(recompute=("act",))], [saved])
    with refused(
        StackError,
        "remat(recompute=['gone']): no value of the loss function has the name 'gone'; it names "
        "'act', 'hidden'. Write x = fp.checkpoint_name(x, 'gone') where",
    ):
        check_used([Remat(recompute=("gone",))], [saved])
    with refused(StackError, "the name 'gone'; it names none. Write"):
        check_used([Remat(save=("gone",))], [cut_of(chain(block), params(), batch()).saved])


def test_segments_that_do_not_fit() -> None:
    with refused(
        StackError,
        "remat(policy='block', segments=[4]): there is no segment 4: the loss function has 4, "
        "counted from 0",
    ):
        check_used([Remat("block", segments=(4,))], [of_ffn().saved])
    longer = cut_of(chain(block), params(4), batch()).saved
    check_used(
        [Remat("block", segments=(4,))], [of_ffn().saved, longer]
    )  # one of several losses has it
    with refused(
        StackError,
        "remat(policy='block') and remat(budget=0.5, segments=[2]) both choose what segment 2 "
        "saves; give each its own segments",
    ):
        of_ffn(BLOCK, Remat(budget=0.5, segments=(2,)))
