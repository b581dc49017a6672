"""Packing: every token once, few shapes, and a loss that does not depend on how documents were
packed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import distance, refused, same_bits

import funcpipe as fp
from funcpipe.data import Buckets, Document, Packed, local_rows, pack
from funcpipe.errors import BatchError, MismatchError

# Sums over microbatches and documents are taken in another order: some roundings of 2**-53.
FLOAT64 = 1e-12
VOCAB, WIDTH, LONGEST = 11, 4, 32


def documents(sizes: list[int], weighted: bool = False) -> list[Document]:
    """No token twice, so that a token says where it comes from."""
    tokens = torch.arange(1, sum(sizes) + 1).split(sizes)
    return [Document(x, weights=(x % 3).float() if weighted else None) for x in tokens]


def unpacked(batch: fp.Microbatches) -> list[list[list[dict[str, torch.Tensor]]]]:
    """Microbatch by microbatch, row by row, the documents by ``cu_seqlens``, padding and empty ones
    included."""
    out = []
    for part in batch.parts:
        bounds = part["cu_seqlens"].reshape(len(part["tokens"]), -1)
        leaves = {k: x for k, x in part.items() if k != "cu_seqlens"}
        rows = [
            [{k: x[r, a:b] for k, x in leaves.items()} for a, b in pairwise(ends)]
            for r, ends in enumerate(bounds.tolist())
        ]
        out.append(rows)
    return out


# ---- what a batch holds

sizes_ = st.lists(st.integers(1, 9), min_size=1, max_size=25)


@st.composite
def policies(draw: st.DrawFn, max_tokens: int) -> Buckets:
    documents = draw(st.none() | st.integers(1, 4))
    ragged = draw(st.booleans())
    if draw(st.booleans()):
        return Buckets(multiple_of=draw(st.integers(1, 5)), documents=documents, ragged=ragged)
    lengths = draw(st.lists(st.integers(1, 30), max_size=3))
    return Buckets(
        [max_tokens + draw(st.integers(0, 3)), *lengths], documents=documents, ragged=ragged
    )


@given(
    sizes_,
    st.integers(1, 4),
    st.none() | st.integers(1, 3),
    st.integers(9, 20),
    st.booleans(),
    st.data(),
)
def test_every_token_is_in_one_place(
    sizes: list[int],
    microbatches: int,
    rows: int | None,
    max_tokens: int,
    weighted: bool,
    data: st.DataObject,
) -> None:
    given_, buckets = documents(sizes, weighted), data.draw(policies(max_tokens))
    batch, leftover, fill = pack(given_, max_tokens, microbatches, rows=rows, buckets=buckets)
    found = []
    for rows_ in unpacked(batch):
        for row in rows_:
            real = [d for d in row if d["tokens"].any()]
            assert sum(len(d["tokens"]) for d in real) <= max_tokens
            assert len(real) <= (buckets.documents or len(sizes))
            for d in row[len(real) :]:  # padding, the first of these; the others are empty
                assert not d["tokens"].any() and not d["weights"].any() and not d["positions"].any()
                assert (d["labels"] == -100).all()
            assert all(not len(d["tokens"]) for d in row[len(real) + 1 :])
            found += real
    found.sort(key=lambda d: int(d["tokens"][0]))
    left = {int(d.tokens[0]) for d in leftover}
    kept = [d for d in given_ if int(d.tokens[0]) not in left]
    assert len(found) + len(left) == len(given_)
    for d, x in zip(kept, found, strict=True):
        assert torch.equal(x["tokens"], d.tokens) and torch.equal(
            x["positions"], torch.arange(len(d.tokens))
        )
        assert x["labels"].tolist() == [*d.tokens[1:].tolist(), -100]
        weights = torch.ones(len(d.tokens)) if d.weights is None else d.weights
        assert x["weights"].tolist() == [*weights[:-1].tolist(), 0.0]
    positions = sum(part["tokens"].numel() for part in batch.parts)
    assert fill == sum(len(d.tokens) for d in kept) / positions


@given(sizes_, st.integers(1, 4), st.none() | st.integers(1, 3), st.integers(9, 20), st.data())
def test_shapes_come_from_buckets(
    sizes: list[int], microbatches: int, rows: int | None, max_tokens: int, data: st.DataObject
) -> None:
    buckets = data.draw(policies(max_tokens))
    batch = pack(documents(sizes), max_tokens, microbatches, rows=rows, buckets=buckets).batch
    lengths = [part["tokens"].shape[1] for part in batch.parts]
    counts = [part["cu_seqlens"].shape[-1] - 1 for part in batch.parts]
    assert len(lengths) == microbatches and lengths == sorted(lengths, reverse=True)
    if buckets.multiple_of:
        assert all(n % buckets.multiple_of == 0 for n in lengths)
    else:
        assert set(lengths) <= set(buckets.lengths)
    assert all(
        n & (n - 1) == 0 if buckets.documents is None else n == buckets.documents + 1
        for n in counts
    )
    assert buckets.ragged or len(set(zip(lengths, counts, strict=True))) == 1
    lead = () if rows is None else (rows,)
    for part, length, count in zip(batch.parts, lengths, counts, strict=True):
        names = ("tokens", "labels", "positions", "weights")
        assert {part[k].shape for k in names} == {(rows or 1, length)} and part[
            "cu_seqlens"
        ].shape == (
            *lead,
            count + 1,
        )
        assert [part[k].dtype for k in names] == [torch.int64] * 3 + [torch.float32]
        assert (
            part["cu_seqlens"].dtype == torch.int32
            and (part["cu_seqlens"][..., -1] == length).all()
        )


@given(sizes_, st.integers(1, 6), st.integers(9, 40))
def test_nothing_is_left_over_that_would_fit_and_rows_are_balanced(
    sizes: list[int], microbatches: int, max_tokens: int
) -> None:
    batch, leftover, _ = pack(documents(sizes), max_tokens, microbatches)
    held = [int((part["tokens"] > 0).sum()) for part in batch.parts]
    for d in leftover:
        assert all(n + len(d.tokens) > max_tokens for n in held)
    assert [int(d.tokens[0]) for d in leftover] == sorted(int(d.tokens[0]) for d in leftover)
    # A first fit, longest first, into rows of twice the mean (and of the longest document) never
    # fails.
    enough = max(*sizes, -(-2 * sum(sizes) // microbatches)) if len(sizes) > 1 else sizes[0]
    if enough <= max_tokens:
        assert not leftover and max(held) <= enough


def test_rows_are_as_short_as_can_be() -> None:
    """A first fit into rows of 12 would give 12 and 4."""
    batch = pack(documents([5, 4, 4, 3]), 12, 2, buckets=Buckets(multiple_of=1)).batch
    assert [int((part["tokens"] > 0).sum()) for part in batch.parts] == [8, 8]


@given(sizes_, st.integers(1, 3), st.booleans())
def test_the_same_sequences_give_the_same_batch(sizes: list[int], rows: int, ragged: bool) -> None:
    once, again = (
        pack(documents(sizes), 12, 2, rows=rows, buckets=Buckets(multiple_of=2, ragged=ragged))
        for _ in range(2)
    )
    assert same_bits([once.batch.parts, once.leftover], [again.batch.parts, again.leftover])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_long_documents_are_split_and_no_label_is_lost(sizes: list[int]) -> None:
    packed = pack(documents(sizes), 7, 40, split=True)
    pieces = [
        d for rows in unpacked(packed.batch) for row in rows for d in row if d["tokens"].any()
    ]
    pieces.sort(key=lambda d: int(d["tokens"][0]))
    assert not packed.leftover and max(len(d["tokens"]) for d in pieces) <= 7
    whole = [pack([d], 40, 1).batch.parts[0] for d in documents(sizes)]
    for name in ("tokens", "labels", "weights"):
        expected = torch.cat([x[name][0, :n] for x, n in zip(whole, sizes, strict=True)])
        assert torch.equal(torch.cat([d[name] for d in pieces]), expected)
    assert all(torch.equal(d["positions"], torch.arange(len(d["tokens"]))) for d in pieces)


def test_what_is_left_over_is_packed_next_time() -> None:
    """Also pieces in the middle of a document, whose last label is not lost."""
    leftover = pack(documents([12]), 5, 1, split=True).leftover
    assert [d.tokens.tolist() for d in leftover] == [[5, 6, 7, 8], [9, 10, 11, 12]]
    batch, none_left, _ = pack([*leftover, *documents([1])], 5, 2)
    assert [part["labels"].tolist() for part in batch.parts] == [
        [[6, 7, 8, 9, -100]],
        [[10, 11, 12, -100, -100]],
    ]
    assert not none_left


def test_labels_of_ones_own() -> None:
    labels = torch.tensor([7, -100, 8])
    part = pack(
        [Document(torch.tensor([1, 2, 3]), labels, torch.tensor([2.0, 5.0, 0.5]))], 3, 1
    ).batch.parts[0]
    assert part["labels"].tolist() == [[7, -100, 8]] and part["weights"].tolist() == [
        [2.0, 0.0, 0.5]
    ]


def test_buckets_count_batches() -> None:
    buckets = Buckets([4, 8], ragged=True)
    for sizes in ([3, 2], [4, 1], [6, 2], [3, 3], [8, 7]):
        pack(documents(sizes), 8, 2, buckets=buckets)
    assert (buckets.hits, buckets.misses) == (2, 3)
    assert dict(buckets.shapes) == {
        ((1, 4, 2), (1, 4, 2)): 3,
        ((1, 8, 2), (1, 4, 2)): 1,
        ((1, 8, 2), (1, 8, 2)): 1,
    }


# ---- a loss over packed documents


def init_params() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    blocks = [{"qkv": rand(WIDTH, 3 * WIDTH), "out": rand(WIDTH, WIDTH)} for _ in range(3)]
    return {"embed": rand(VOCAB, WIDTH), "places": rand(LONGEST, WIDTH), "blocks": blocks}


def loss_fn(params: Any, batch: Any) -> fp.Mean:
    """A causal transformer in which a position sees its own document only."""
    tokens, ends = batch["tokens"], batch["cu_seqlens"].reshape(len(batch["tokens"]), -1)[:, 1:]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    document = (place[None, :, None] >= ends[:, None]).sum(-1)
    seen = (document[:, :, None] == document[:, None]) & (place[:, None] >= place)
    x = params["embed"][tokens] + params["places"][batch["positions"]]
    for block in params["blocks"]:
        q, k, v = (x @ block["qkv"]).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        x = fp.stage_boundary(x + torch.tanh(scores.softmax(-1) @ v @ block["out"]))
    logits = (x @ params["embed"].T).flatten(0, 1)
    losses = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100, reduction="none")
    return fp.Mean((losses * batch["weights"].flatten()).sum(), batch["weights"].sum())


def step(params: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(params, batch)
    return optree.tree_map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}


def texts(seed: int, count: int, longest: int = 12, weighted: bool = True) -> list[Document]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    new = lambda high, n: torch.randint(high, (n,), generator=g)  # noqa: E731
    return [Document(new(VOCAB, n), weights=new(3, n).float() if weighted else None) for n in sizes]


def alone(texts: list[Document]) -> fp.Microbatches:
    """Every document a microbatch of its own, nothing padded."""
    one = Buckets(multiple_of=1, documents=1)
    return fp.Microbatches([pack([d], len(d.tokens), 1, buckets=one).batch.parts[0] for d in texts])


def keep(params: Any) -> Any:
    return params


PIPE, DATA = fp.pipelined(axis="pipe", microbatches=None), fp.data_parallel(axis="data")
CASES: dict[str, tuple[fp.Mesh, list[Any], int | None]] = {
    "one device": (fp.Mesh(), [], None),
    "accumulated": (fp.Mesh(), [fp.accumulated(microbatches=None)], None),
    "pipelined": (fp.Mesh(pipe=2), [PIPE], None),
    "pipelined zb": (
        fp.Mesh(pipe=2),
        [fp.pipelined(axis="pipe", microbatches=None, schedule=fp.schedules.zb_h1())],
        None,
    ),
    "data": (fp.Mesh(data=2), [fp.accumulated(microbatches=None), DATA], 2),
    "pipelined data sharded": (
        fp.Mesh(pipe=2, data=2),
        [PIPE, DATA, fp.sharded_weights(axis="data")],
        4,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("ragged", "seed", "count"),
    [
        (True, 0, 2),
        (False, 1, 11),
        *[pytest.param(*how, marks=pytest.mark.slow) for how in ((True, 1, 11), (False, 0, 2))],
    ],
)
def test_the_loss_is_that_of_the_documents(name: str, ragged: bool, seed: int, count: int) -> None:
    """Also where some microbatches have no document."""
    mesh, stack, rows = CASES[name]
    some = [Document(torch.tensor([1, 2]), weights=torch.ones(2)), *texts(seed, count)]
    buckets = Buckets(multiple_of=3, ragged=ragged)
    batch, leftover, _ = pack(some, 30, 4, rows=rows, buckets=buckets)
    assert not leftover
    assert count > 2 or not batch.parts[-1]["weights"].any()
    params = init_params()
    want, expected = step(params, alone(some))
    run = fp.simulate(fp.compose(*stack)(step), mesh) if stack else None
    if run is None:
        new, metrics = step(params, batch)
    else:
        state, metrics = run(run.init(keep, params, batch), batch)
        new = run.unplace(state)
    assert distance(metrics, expected) <= FLOAT64 and distance(new, want) <= FLOAT64


def test_a_microbatch_of_no_weight() -> None:
    """Its documents are there, but count nothing; nor do they make anything undefined."""
    nothing = [
        Document(d.tokens, weights=torch.zeros(len(d.tokens))) for d in texts(1, 3, weighted=False)
    ]
    some = texts(2, 4, weighted=False)
    batch = fp.Microbatches([*pack(nothing, 36, 1).batch.parts, *pack(some, 24, 2).batch.parts])
    assert not batch.parts[0]["weights"].any() and (batch.parts[0]["labels"] >= 0).any()
    params = init_params()
    want = step(params, alone(some))
    for mesh, transform in (
        (fp.Mesh(pipe=2), PIPE),
        (fp.Mesh(), fp.accumulated(microbatches=None)),
    ):
        run = fp.simulate(transform(step), mesh)
        state, metrics = run(run.init(keep, params, batch), batch)
        assert distance((run.unplace(state), metrics), want) <= FLOAT64


def test_a_plan_for_every_miss() -> None:
    buckets = Buckets([12, 24], ragged=True)
    batches = [pack(texts(seed, 5), 24, 3, buckets=buckets).batch for seed in range(8)]
    run = fp.simulate(PIPE(step), fp.Mesh(pipe=2))
    state = run.init(keep, init_params(), batches[0])
    assert len({id(run.plan(state, batch)) for batch in batches}) == buckets.misses
    assert buckets.hits + buckets.misses == 8 and 1 < buckets.misses < 8


# ---- processes, each with rows of its own

MESH, STACK = (
    fp.Mesh(data=2),
    [fp.accumulated(microbatches=None), DATA, fp.sharded_weights(axis="data")],
)
TEXTS = [texts(seed, 9) for seed in range(3)]


def packed_for_all() -> list[Packed]:
    buckets = Buckets(multiple_of=6, ragged=True)
    return [pack(some, 24, 3, rows=2, buckets=buckets) for some in TEXTS]


def own_texts(rank: int) -> list[fp.Microbatches]:
    """What a rank packs that knows nothing of the others': shapes that never change."""
    fixed = Buckets([24], documents=8)
    return [pack(some[rank::2], 24, 3, buckets=fixed).batch for some in TEXTS]


def work() -> dict[str, Any]:
    torch.set_num_threads(1)
    out = {}
    run = fp.spmd(fp.compose(*STACK)(step), MESH, device="cpu", timeout=30, batch="local")

    def train(batches: list[fp.Microbatches]) -> tuple[Any, Any]:
        state, metrics = run.init(keep, init_params(), batches[0]), []
        for batch in batches:
            state, new = run(state, batch)
            metrics.append(new)
        return run.unplace(state), metrics

    mine = [local_rows(x.batch, MESH.index(run.rank, "data"), 2) for x in packed_for_all()]
    out["rows"], out["own"] = train(mine), train(own_texts(run.rank))
    state, odd = run.init(keep, init_params(), mine[0]), run.rank == 1
    for name, batch in {
        "longer": pack(TEXTS[0], 30 if odd else 24, 3).batch,
        "more": pack(TEXTS[0], 24, 4 if odd else 3, buckets=Buckets([24], documents=20)).batch,
    }.items():
        try:
            run(state, batch)
        except MismatchError as error:
            out[name] = str(error)
    run(state, mine[0])  # they go on
    return out


@pytest.fixture(scope="module")
def ran() -> list[dict[str, Any]]:
    return fp.launch(work, 2, timeout=240)


def expected(batches: list[Any]) -> tuple[Any, Any]:
    params, metrics = init_params(), []
    for batch in batches:
        params, new = step(params, batch)
        metrics.append(new)
    return params, metrics


def test_local_rows_are_the_global_batch(ran: list[dict[str, Any]]) -> None:
    want = expected([x.batch for x in packed_for_all()])
    assert all(distance(result["rows"], want) <= FLOAT64 for result in ran)
    assert not any(x.leftover for x in packed_for_all())


def test_ranks_that_pack_for_themselves(ran: list[dict[str, Any]]) -> None:
    both = [
        fp.Microbatches([*a.parts, *b.parts])
        for a, b in zip(own_texts(0), own_texts(1), strict=True)
    ]
    assert all(distance(result["own"], expected(both)) <= FLOAT64 for result in ran)


def test_shapes_that_differ_between_ranks_are_refused_by_name(ran: list[dict[str, Any]]) -> None:
    for result in ran:
        assert result["longer"].startswith(
            "batch.parts[0]['labels'] is int64[1, 24] on rank 0 and int64[1, 30] on rank 1: every "
            "rank passes"
        )
        assert result["more"].startswith(
            "batch.parts[3]['cu_seqlens'] is no such leaf on rank 0 and int32[22] on rank 1: every "
            "rank passes"
        )


def test_local_rows_are_what_data_parallel_hands_out() -> None:
    batch = pack(documents([5, 3, 4, 4]), 8, 2, rows=4).batch
    pieces = [local_rows(batch, i, 2) for i in (0, 1)]
    for part, *halves in zip(batch.parts, *(piece.parts for piece in pieces), strict=True):
        assert all(torch.equal(torch.cat([h[k] for h in halves]), part[k]) for k in part)


# ---- what is refused

W = torch.ones(3)


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        (
            [1, 2],
            (
                "the tokens of sequence 1 are a list of 2; write a 1-d tensor",
                "leave empty sequences out",
            ),
        ),
        (
            torch.ones(1, 2).long(),
            ("the tokens of sequence 1 are a tensor of shape (1, 2)", "1-d tensor"),
        ),
        (torch.tensor(3), ("the tokens of sequence 1 are a tensor of shape ()", "1-d tensor")),
        (
            torch.ones(0).long(),
            ("the tokens of sequence 1 are a tensor of shape (0,)", "leave empty sequences out"),
        ),
        (
            W,
            (
                "the tokens of sequence 1 are a tensor of shape (3,) and dtype torch.float32; they "
                "have to be integers",
            ),
        ),
        (
            Document(W.long(), W),
            ("the labels of sequence 1", "torch.float32; they have to be integers"),
        ),
        (
            Document(W.long(), weights=W[:2]),
            ("the weights of sequence 1 are a tensor of shape (2,)", "every token"),
        ),
        (
            torch.arange(9),
            (
                "sequence 1 has 9 tokens, more than max_tokens=8; write split=True to cut it into "
                "pieces, or leave it out",
            ),
        ),
    ],
)
def test_sequences_that_cannot_be_packed(sequence: Any, words: tuple[str, ...]) -> None:
    with refused(BatchError, "pack: ", *words):
        pack([torch.arange(3), sequence], 8, 2)


def test_settings_that_are_refused() -> None:
    with refused(BatchError, "pack: there are no sequences, and a step needs at least one token"):
        pack([], 8, 2)
    with refused(BatchError, "pack: microbatches is 0; it has to be a whole number, 1 or more"):
        pack([torch.arange(3)], 8, 0)
    with refused(BatchError, "pack: rows is 1.5; it has to be a whole number"):
        pack([torch.arange(3)], 8, 1, rows=1.5)  # type: ignore[arg-type]
    with refused(
        BatchError, "Buckets: 16 tokens are more than the longest of [4, 8]; add a longer one"
    ):
        pack([torch.arange(3)], 16, 1, buckets=Buckets([8, 4]))
    for kwargs in ({}, {"lengths": [4], "multiple_of": 4}):
        with refused(BatchError, "Buckets takes one of lengths=[...] and multiple_of=..."):
            Buckets(**kwargs)
    with refused(BatchError, "Buckets: documents is 0; it has to be a whole number, 1 or more"):
        Buckets([4], documents=0)
    with refused(
        BatchError, "local_rows: a tensor of shape (3,)", "pack with rows=2, or a multiple"
    ):
        local_rows(pack([torch.arange(3)], 8, 1).batch, 0, 2)
