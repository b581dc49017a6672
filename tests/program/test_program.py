"""Programs: slots, sums, memory, and what the verifier of programs sees."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from support.models import (
    batch,
    body,
    count,
    loss_fn,
    params,
    pipe,
    refused,
    same_bits,
    start,
    step_of,
)

import funcpipe as fp
from funcpipe._src.comm.simulated import InProcessCommunicator
from funcpipe._src.graph.ids import ArgId, OfArg, ValueId
from funcpipe._src.planning.plan import Plan
from funcpipe._src.program import ADD, RUN, Program
from funcpipe._src.program.verify import verify
from funcpipe._src.schedule import (
    Action,
    from_table,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
    zb_h1,
    zb_v,
)
from funcpipe._src.schedule.communication import message_of
from funcpipe.errors import ScheduleError

FIRST_GRAD = ValueId("sum", OfArg(ArgId(0), 0))
SCHEDULES = {
    "gpipe": gpipe(),
    "1f1b": one_f_one_b(),
    "interleaved": interleaved_1f1b(2),
    "zb_h1": zb_h1(),
    "zb_v": zb_v(),
}


def planned(
    schedule: Any, microbatches: int = 4, ranks: int = 2, layers: int = 4, rows: int = 8
) -> Plan:
    run, state = start(
        pipe(step_of(), microbatches, schedule=schedule),
        fp.Mesh(pipe=ranks),
        params(layers),
        batch(rows),
    )
    return run.plan(state, batch(rows))


def programs(plan: Plan) -> tuple[Program, ...]:
    return plan.calls[0].programs


def planned_slots(program: Program) -> int:
    """The slots of what is made on the way: not those of what a step brings and takes away."""
    return program.slots - sum(map(len, (program.inputs, program.outputs, program.partial_grads)))


def test_slots_do_not_grow_with_microbatches_under_1f1b() -> None:
    few, many = (programs(planned(one_f_one_b(), m, rows=16)) for m in (4, 16))
    assert [planned_slots(p) for p in few] == [planned_slots(p) for p in many]
    few, many = (programs(planned(gpipe(), m, rows=16)) for m in (4, 16))
    assert all(planned_slots(a) < planned_slots(b) for a, b in zip(few, many, strict=True))


def test_residuals_of_1f1b_are_below_those_of_gpipe() -> None:
    one, all_ = (planned(s, 8, ranks=4, rows=16).memory for s in (one_f_one_b(), gpipe()))
    assert all(a["residuals"] < b["residuals"] for a, b in zip(one, all_, strict=True))
    assert [m["params"] for m in one] == [m["params"] for m in all_]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_freed_is_not_read_again(name: str) -> None:
    plan = planned(SCHEDULES[name])
    for program in programs(plan):
        verify(program)
        brought = {program.slot_of[value] for value in program.inputs}
        results = (*program.outputs, *program.partial_grads)
        kept = {program.slot_of[value] for value in results}
        filled = set(brought)
        for i in program.instructions:
            reads, writes, frees = (
                {program.slot_of[value] for value in some} for some in (i.reads, i.writes, i.frees)
            )
            assert reads <= filled, f"{i.action} reads an empty slot"
            assert not frees & kept
            filled = (filled - frees) | (writes - frees)
        assert filled == kept | brought


def test_the_verifier_sees_a_slot_that_was_freed_too_early_and_a_sum_out_of_turn() -> None:
    program = programs(planned(one_f_one_b()))[0]
    rows = list(program.instructions)
    at, i = next((k, i) for k, i in enumerate(rows) if i.op == RUN and not i.frees and i.writes)
    with refused(ScheduleError, "rank 0 of the pipeline, instruction", "reads", "which holds None"):
        broken = [*rows[:at], dataclasses.replace(i, frees=i.writes), *rows[at + 1 :]]
        verify(dataclasses.replace(program, instructions=tuple(broken)))
    first, second = (
        k
        for k, row in enumerate(rows)
        if row.op == ADD and row.writes == (FIRST_GRAD,) and row.nth < 2
    )
    order = list(range(len(rows)))
    order[first], order[second] = second, first
    with refused(ScheduleError, "rank 0 of the pipeline, instruction"):
        verify(
            dataclasses.replace(
                program,
                instructions=tuple(rows[k] for k in order),
            )
        )


def test_every_unit_runs_once_for_every_microbatch() -> None:
    for schedule in SCHEDULES.values():
        plan = planned(schedule)
        ran = [
            (i.unit.kind, i.unit.segment, i.action.microbatch)
            for program in programs(plan)
            for i in program.instructions
            if i.unit is not None
        ]
        assert len(ran) == len(set(ran))
        whole = {(k, s, m) for k, s, m in ran if k in "FB"} | {
            ("B", s, m) for k, s, m in ran if k == "I"
        }
        assert whole == {(k, s, m) for k in "FB" for s in range(5) for m in range(4)}
        assert {(s, m) for k, s, m in ran if k == "I"} == {(s, m) for k, s, m in ran if k == "W"}


REVERSED = from_table(
    [
        ["0F0", "0F1", "0F2", "0F3", "0B3", "0B2", "0B1", "0B0"],
        ["1F0", "1F1", "1F2", "1F3", "1B3", "1B2", "1B1", "1B0"],
    ]
)


def test_sums_are_taken_in_microbatch_order_whatever_the_schedule() -> None:
    """Bitwise, also where the table runs backward passes in reverse, or the loss tells microbatches
    apart."""

    def loss(p: Any, b: Any) -> fp.Mean:
        x = body(p, b)
        return fp.Mean((x.pow(2) * b["x"].exp() * 1e3).sum(), count(x))

    grads = []
    step = lambda s, b: (fp.value_and_grad(loss)(s, b)[1], {})  # noqa: E731
    for schedule in (REVERSED, *SCHEDULES.values()):
        run, state = start(
            pipe(step, 4, schedule=schedule),
            fp.Mesh(pipe=2),
            params(4, torch.float32),
            batch(8, torch.float32),
        )
        grads.append(run.unplace(run(state, batch(8, torch.float32))[0]))
    run, state = start(
        fp.accumulated(step, microbatches=4),
        fp.Mesh(),
        params(4, torch.float32),
        batch(8, torch.float32),
    )
    grads.append(run.unplace(run(state, batch(8, torch.float32))[0]))
    assert all(same_bits(g, grads[0]) for g in grads)


def test_a_sum_waits_for_its_turn() -> None:
    program = programs(planned(REVERSED))[1]
    assert program.partial_grads
    for total in program.partial_grads:
        adds = [i for i in program.instructions if i.op == ADD and i.writes == (total,)]
        assert [i.nth for i in adds] == [0, 1, 2, 3]
        assert [i.reads[0].microbatch for i in adds] == [0, 1, 2, 3]


def test_a_value_is_sent_once_to_each_place_that_reads_it() -> None:
    def skipping(p: Any, b: Any) -> fp.Mean:
        x, kept = b["x"], []
        for w in p["w"]:
            x = fp.stage_boundary(torch.tanh(x @ w))
            kept.append(x)
        return fp.Mean((x * kept[0] * kept[1]).sum(), count(x))

    run, state = start(
        pipe(step_of(skipping), 2, stages=[1, 1, 1, 2]), fp.Mesh(pipe=4), params(4), batch()
    )
    plan = run.plan(state, batch())
    sends = [
        (p.pipeline_rank, i)
        for p in programs(plan)
        for i in p.instructions
        if i.action.kind in ("SEND_F", "SEND_B")
    ]
    sent = [(place, i.peer, v.name) for place, i in sends for v in i.values]
    assert len(sent) == 2 * len(set(sent))  # once for each microbatch
    assert {(a, b) for a, b, name in sent if name == "tanh"} == {(0, 1), (0, 3)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_go_to_the_other_places_as_soon_as_they_may(name: str, ranks: int) -> None:
    """Behind the action that follows the last summand, which may be one unit with the last
    forward."""
    plan = planned(SCHEDULES[name], ranks=ranks, layers=12)
    maker = plan.calls[0].schedule.table.placement[-1]
    p = programs(plan)[maker]
    told = [(k, i) for k, i in enumerate(p.instructions) if i.action.kind[-2:] == "_H"]
    assert [(i.op, i.peer) for _, i in told] == [("send", q) for q in range(ranks) if q != maker]
    totals = {ValueId("sum", 0), ValueId("sum", 1)}
    summed = max(k for k, i in enumerate(p.instructions) if i.op == ADD and i.writes[0] in totals)
    behind = p.instructions[summed : told[0][0]]
    assert len({i.action for i in behind if i.op == RUN}) == 1
    assert not any(i.op == "recv" for i in behind)
    assert all(set(p.outputs) == totals for p in programs(plan))


def run_until(some: tuple[Program, ...], stop: tuple[int, int]) -> list[int]:
    """How many rows every place gets through at most, if one of them never runs its row ``stop``
    (place, row)."""
    at, boxes = [0] * len(some), Counter[tuple[int, int, str]]()
    moved = True
    while moved:
        moved = False
        for place, program in enumerate(some):
            while at[place] < len(program.instructions) and (place, at[place]) != stop:
                row = program.instructions[at[place]]
                if row.op == "send":
                    boxes[place, row.peer, row.action.kind[-1]] += 1
                elif row.op == "recv":
                    if not boxes[row.peer, place, row.action.kind[-1]]:
                        break
                    boxes[row.peer, place, row.action.kind[-1]] -= 1
                at[place], moved = at[place] + 1, True
    return at


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_place_waits_for_sums_but_at_its_end(name: str, ranks: int) -> None:
    """As long as they are not sent, no place comes to where it receives them, whatever the order in
    which ranks run."""
    plan = planned(SCHEDULES[name], ranks=ranks, layers=12)
    maker, some = plan.calls[0].schedule.table.placement[-1], programs(plan)
    sent = next(k for k, row in enumerate(some[maker].instructions) if row.action.kind == "SEND_H")
    reached = run_until(some, (maker, sent))
    received = {
        p: [k for k, row in enumerate(some[p].instructions) if row.action.kind == "RECV_H"]
        for p in range(ranks)
    }
    for p in set(range(ranks)) - {maker}:
        (k,) = received[p]
        assert reached[p] < k or k == len(some[p].instructions) - 1
    # The place that sends the maker its last activations gets their gradients back, and knows by
    # that.
    neighbour = plan.calls[0].schedule.table.placement[-2]
    if neighbour != maker:
        assert received[neighbour][0] < len(some[neighbour].instructions) - 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_sent_is_held_until_it_has_surely_arrived(name: str, ranks: int) -> None:
    """By the order of both programs; and no longer: what the other end had not received when it
    sent may still be on its way."""
    plan = planned(SCHEDULES[name], microbatches=6, ranks=ranks, layers=12, rows=12)
    rows = [[(row.action, row) for row in p.instructions] for p in programs(plan)]
    let_go = 0
    for p in programs(plan):
        held: dict[Any, Action] = {}
        for row in p.instructions:
            if row.op == "send":
                held |= dict.fromkeys(row.writes, row.action)
            if row.op != "recv" or row.action.kind == "RECV_H":
                continue
            peer = plan.calls[0].schedule.table.placement[row.action.peer]
            there = [
                a
                for a, other in rows[peer]
                if other.op in ("send", "recv") and other.peer == p.pipeline_rank
            ]
            answer = next(
                k
                for k, a in enumerate(there)
                if a.kind[:4] == "SEND" and message_of(a) == message_of(row.action)
            )
            got = {message_of(a) for a in there[:answer] if a.kind in ("RECV_F", "RECV_B")}
            assert {message_of(held[n]) for n in row.reads} <= got
            for n in row.reads:
                del held[n]
                let_go += 1
            assert (
                not {message_of(a) for n, a in held.items() if str(n.name).endswith(f" to {peer}")}
                & got
            )
        assert not held
    assert let_go


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_has_no_collective_over_the_pipeline(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = []
    collective = InProcessCommunicator._collective
    monkeypatch.setattr(
        InProcessCommunicator,
        "_collective",
        lambda self, kind, x, over, combine: (
            axes.append(over) or collective(self, kind, x, over, combine)
        ),
    )
    step = fp.data_parallel(pipe(step_of(), 4, schedule=SCHEDULES[name]), axis="data")
    run, state = start(step, fp.Mesh(pipe=2, data=2), params(4), batch(16))
    run(state, batch(16))
    assert axes and all("pipe" not in over for over in axes)


def test_a_plan_reads_as_text_and_tells_its_memory() -> None:
    plan = planned(one_f_one_b())
    text = str(plan)
    assert text.startswith("Mesh(pipe=2)\n")
    for words in (
        "value_and_grad 0: 5 segments in 2 stages, 4 microbatches, one_f_one_b, bubble ",
        "rank 0 of the pipeline: stage 0 = segments",
        "0SEND_F0>1 send to rank 1",
        "recv from rank 0",
        "residuals",
        "\nproducts of float32: ",
    ):
        assert words in text
    assert 0.2 <= plan.bubble < 0.5
    for memory in plan.memory:
        assert 0 < memory["residuals"] <= memory["activations"] <= memory["step"]
        assert memory["step"] <= memory["activations"] + memory["gradients"]
        assert memory["graph"] == 0  # nothing was captured


def test_a_program_reads_as_text() -> None:
    title, *lines = str(programs(planned(one_f_one_b(), 2))[0]).splitlines()
    assert title.startswith("pipeline rank 0, slots: 18, bytes at their peak: activations ")
    first = "  0F0 run F0 ({}) -> (value tanh@0, value add@0)"
    inputs = [
        "batch 0@0, param 0",
        "param 0, batch 0@0",
    ]  # torch names them in another order in 2.14
    assert lines[0] in [first.format(names) for names in inputs]
    assert "  0B1 add summand 1 (value mm_8@1) -> (sum 1#0) frees (value mm_8@1)" in lines
    (sent,) = (line for line in lines if line.startswith("  0SEND_F1>1"))
    assert sent.endswith("(value add_1@1) -> (sent add_1 to 1@1) frees (value add_1@1)")


def test_equal_plans_have_equal_digests() -> None:
    assert planned(one_f_one_b()).digest() == planned(one_f_one_b()).digest()
    assert len({planned(s).digest() for s in SCHEDULES.values()}) == len(SCHEDULES)


def test_memory_of_gradients_is_that_of_the_params_held() -> None:
    run, state = start(pipe(step_of(loss_fn)), fp.Mesh(pipe=2), params(3))
    for memory in run.plan(state, batch()).memory:
        assert memory["gradients"] >= memory["params"]
