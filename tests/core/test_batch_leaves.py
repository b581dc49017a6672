"""What a batch may consist of: numpy and mappings work on one device and on ranks alike, other
leaves are refused by path."""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import refused, same_bits
from torch import nn

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import Items, as_dicts, key_of, read_batch, with_tensors
from funcpipe._src.planning.batch_split import signature
from funcpipe.errors import BatchError

W = torch.linspace(-1, 1, 3, dtype=torch.float64)
X = torch.arange(24, dtype=torch.float64).view(8, 3) / 10
STACKS = [
    (fp.accumulated(microbatches=2), fp.Mesh()),
    (fp.data_parallel(axis="data"), fp.Mesh(data=2)),
]


def step_of(read: Any) -> Any:
    def loss_fn(w: torch.Tensor, b: Any) -> fp.Mean:
        x = read(b)
        return fp.Mean((x.to(w) @ w).square().sum(), torch.tensor(float(len(x))))

    def step(w: torch.Tensor, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(w, b)
        return w - 0.1 * grads, {"loss": loss}

    return step


def trained(batch: Any, read: Any, stack: Any) -> torch.Tensor:
    transform, mesh = stack
    run = fp.simulate(transform(step_of(read)), mesh)
    state = run.init(lambda w: w, W, batch)
    state, _ = run(state, batch)
    return run.unplace(state)


def check_same(batch: Any, read: Any, rows: torch.Tensor = X, exact: bool = True) -> None:
    """Ranks and one device compute what they compute of the tensors; to the bit, unless memory is
    laid out in another way, in which kernels of some CPUs add up in another order."""
    want, _ = step_of(lambda b: b)(W, rows)
    off = 0.0 if exact else 1e-12
    torch.testing.assert_close(step_of(read)(W, batch)[0], want, rtol=off, atol=off)
    for stack in STACKS:
        torch.testing.assert_close(trained(batch, read, stack), want, rtol=1e-12, atol=1e-12)


# ---- numpy


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "uint8", "bool", ">f8"]
)
def test_arrays_are_tensors(dtype: str) -> None:
    x = (X * 10 % 2).numpy().astype(dtype)
    check_same({"x": x}, lambda b: b["x"], torch.from_numpy(x.astype(x.dtype.newbyteorder("="))))


def test_arrays_of_any_memory() -> None:
    x = X.numpy().copy()
    fixed = x.copy()
    fixed.flags.writeable = False
    turned, strided = np.ascontiguousarray(x[::-1])[::-1], np.repeat(x, 2, axis=1)[:, ::2]
    for array in (x, fixed, turned, strided, np.asfortranarray(x)):
        check_same(array, lambda b: b, exact=array.flags.c_contiguous)
    assert read_batch(x).data_ptr() == x.ctypes.data  # no copy
    assert read_batch(np.array(3.5)).shape == ()


def test_numbers_of_numpy_are_tensors_of_their_dtype() -> None:
    for x in (np.float32(2.5), np.int64(3), np.bool_(True), np.float64(1.5), np.complex64(1j)):
        for found in (read_batch({"k": x})["k"], with_tensors([x])[0]):
            assert found.shape == () and found.numpy().dtype == x.dtype and found.item() == x
    same = [signature(read_batch({"k": np.float32(k)})) for k in (1, 2)]
    assert same[0] == same[1]  # no new plan for another number


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(["a", "b"]), "dtype <U1"),
        (np.array([object()]), "dtype object"),
        (np.array(["2020"], dtype="datetime64[D]"), "dtype datetime64"),
        (np.zeros(2, dtype=[("a", "f8")]), "fields of records in a dict"),
        (np.zeros(2, dtype=np.longdouble), "dtype float128"),
        (np.ma.masked_array([1.0], [True]), "masked array of numpy: pass x.data and x.mask"),
    ],
)
def test_arrays_that_torch_does_not_have(array: np.ndarray, words: str) -> None:
    with refused(BatchError, "batch['x'] is a", words):
        read_batch({"x": array})


# ---- mappings


class TokenizerOutput(collections.UserDict):
    """As transformers' BatchEncoding: entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


@pytest.mark.parametrize(
    "make", [collections.UserDict, types.MappingProxyType, TokenizerOutput, collections.Counter]
)
def test_mappings_are_dicts(make: Any) -> None:
    check_same(make({"x": X, "key": torch.arange(8)}), lambda b: b["x"])
    check_same({"text": make({"x": X.numpy()}), "name": "train"}, lambda b: b["text"]["x"])


def test_entries_of_a_mapping_can_be_read_as_attributes() -> None:
    batch = TokenizerOutput({"x": X.numpy(), "key": np.arange(8)})
    check_same(batch, lambda b: b.x)
    with refused(
        BatchError, "no entry 'to' at test_batch_leaves.py", "['x', 'key']", "before the step"
    ):
        trained(batch, lambda b: b.to("cpu"), STACKS[0])


def test_one_device_keeps_a_mapping_of_tensors_as_it_is() -> None:
    seen = []
    step_of(lambda b: seen.append(b) or b["x"])(W, batch := TokenizerOutput({"x": X}))
    assert seen == [batch] and seen[0] is batch


def test_items_are_a_node_with_the_leaves_and_paths_of_a_dict() -> None:
    plain = {"b": 1, "a": [2, {"c": 3}], 5: 4}
    items = read_batch(collections.UserDict(plain))
    assert tree.leaves(items) == tree.leaves(plain) and tree.paths(items) == tree.paths(plain)
    again = tree.map(lambda x: x, items)
    assert type(again) is Items and list(again) == list(plain) and as_dicts([items]) == [plain]
    assert optree.tree_leaves(items) == [items]  # a leaf to everyone else, as the mapping was


def test_dims_of_a_mapping_are_named_as_those_of_a_dict() -> None:
    batch = collections.UserDict(x=X, table=torch.ones(3, dtype=torch.float64))
    read = lambda b: b["x"] * b["table"]  # noqa: E731
    stack = fp.accumulated(microbatches=2, dims={"x": 0, "table": None}), fp.Mesh()
    torch.testing.assert_close(
        trained(batch, read, stack), step_of(read)(W, batch)[0], rtol=1e-12, atol=1e-12
    )


# ---- tensors that are not dense


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (lambda: X.to_sparse(), ("sparse", "to_dense()")),
        (lambda: torch.empty(8, device="meta"), ("meta device",)),
        (
            lambda: torch.nested.nested_tensor(list(X), layout=torch.jagged),
            ("nested", "pad it", "values()"),
        ),
        (lambda: X.as_subclass(Tagged), ("Tagged", "as_subclass(torch.Tensor)")),
        (
            lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.quint8),
            ("quantized", "dequantize()"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_are_refused(x: Any, words: tuple[str, ...]) -> None:
    for stack in STACKS:
        with refused(BatchError, "batch['a'][1] is a", *words):
            trained({"x": X, "a": [0, x()]}, lambda b: b["x"], stack)


def test_conjugated_and_negated_views_and_parameters_are_tensors() -> None:
    c = torch.complex(X, X).conj()
    assert c.is_conj() and c.imag.is_neg()
    check_same({"x": c}, lambda b: b["x"].real, exact=False)
    check_same({"x": c.imag}, lambda b: -b["x"], exact=False)
    check_same(nn.Parameter(X), lambda b: b)


# ---- constants


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float
    names: frozenset[str] = frozenset()


@dataclasses.dataclass
class Record:
    x: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = x


CONSTANTS = [
    "text", b"bytes", 3, 2.5, True, 1 + 2j, Colour.RED, torch.float64, torch.device("cpu"), range(3), slice(0, 2),
    Settings(2.0, frozenset(["a"])), frozenset([1, 2]), torch.relu, Settings, len,
]  # fmt: skip


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda constant: type(constant).__name__)
def test_constants_keep_their_meaning(constant: Any) -> None:
    seen = []
    check_same({"x": X, "k": constant, "none": None}, lambda b: seen.append(b["k"]) or b["x"])
    assert all(x is constant for x in seen)
    assert hash(signature({"k": constant})) == hash(signature({"k": constant}))


def test_keys_tell_values_apart_that_python_takes_for_equal() -> None:
    values = [1, True, 1.0, 1 + 0j, 0.0, -0.0, 0j, complex(0.0, -0.0), "1", b"1"]
    values += [
        frozenset([1]),
        frozenset([True]),
        Settings(0.0),
        Settings(-0.0),
        slice(1),
        slice(True),
    ]
    assert len({key_of(x) for x in values}) == len(values)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (
            Record(X),
            (
                "a Record (a dataclass)",
                "tensors are not seen",
                "dict",
                "optree.register_pytree_node(Record",
            ),
        ),
        (Frozen(X), ("a Frozen (a dataclass)", "optree.register_pytree_node(Frozen")),
        (Frozen([1]), ("a Frozen whose x is a list",)),
        (Record(1), ("a Record (a dataclass)", "cannot be hashed")),
        (Holder(X), ("a Holder", "tensors are not seen", "namespace='funcpipe'")),
        (Holder(1), ("a Holder", "compared by identity")),
        ({"a", "b"}, ("a set", "no order", "sorted tuple or list")),
        (bytearray(b"a"), ("a bytearray", "cannot be hashed")),
        (nn.Linear(2, 2), ("a Linear, a module", "fp.from_module")),
        (float("nan"), ("nan", "equals nothing", "torch.tensor(nan)")),
        (complex(0, float("nan")), ("nanj", "equals nothing")),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_leaves_are_refused(leaf: Any, words: tuple[str, ...], stack: Any) -> None:
    with refused(BatchError, "batch['a']", *words):
        trained({"x": X, "a": leaf}, lambda b: b["x"], stack)


def test_what_a_step_makes_of_a_batch_is_read_as_well() -> None:
    def step(w: torch.Tensor, b: Any) -> Any:
        loss, grads = fp.value_and_grad(
            lambda w, b: fp.Mean((b["x"] @ w).square().sum(), torch.tensor(float(len(b["x"]))))
        )(w, made(b))
        return w - 0.1 * grads, {"loss": loss}

    made = lambda b: collections.UserDict(x=b["x"] * 2, shift=np.ones(8))  # noqa: E731
    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    state, _ = run(run.init(lambda w: w, W, {"x": X}), {"x": X})
    torch.testing.assert_close(run.unplace(state), step(W, {"x": X})[0], rtol=1e-12, atol=1e-12)
    made = lambda b: Record(b["x"])  # noqa: E731
    with refused(BatchError, "batch is a Record"):
        run.init(lambda w: w, W, {"x": X})


def test_a_batch_that_needs_no_reading_stays_the_same_object() -> None:
    batch = {"x": X, "k": (1, 2.0, "a", None, True)}
    assert read_batch(batch) is batch and with_tensors(batch) is batch


def test_a_batch_that_does_not_divide_names_the_ways_out() -> None:
    with refused(BatchError, "batch['x'] of shape (7, 3)", "drop_last", "weight 0", "dims="):
        trained({"x": X[:7]}, lambda b: b["x"], STACKS[0])


# ---- sparse gradients


@pytest.mark.parametrize(
    "stack",
    [
        *STACKS,
        (
            fp.compose(fp.data_parallel(axis="data"), fp.sharded_weights(axis="data")),
            fp.Mesh(data=2),
        ),
        (fp.compose(fp.pipelined(axis="pipe", microbatches=2)), fp.Mesh(pipe=2)),
    ],
)
def test_gradients_of_sparse_lookups_are_dense(stack: Any) -> None:
    """A table in two segments, looked up in all ways that can be sparse."""
    ids = torch.tensor([1, 2, 2, 5, 3, 0, 1, 1])
    table = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)

    def step(table: torch.Tensor, ids: torch.Tensor, sparse: bool = True) -> Any:
        def loss_fn(table: torch.Tensor, ids: torch.Tensor) -> fp.Mean:
            x = fp.stage_boundary(F.embedding(ids, table, sparse=sparse).tanh())
            x = x + F.embedding_bag(ids[:, None], table, mode="sum", sparse=sparse)
            x = x + torch.embedding(table, ids, -1, False, sparse)
            return fp.Mean(x.square().sum(), torch.tensor(float(len(ids))))

        loss, grads = fp.value_and_grad(loss_fn)(table, ids)
        assert grads.layout is torch.strided
        return table - 0.1 * grads, {"loss": loss}

    want, _ = step(table, ids, sparse=False)
    torch.testing.assert_close(step(table, ids)[0], want, rtol=1e-12, atol=1e-12)
    transform, mesh = stack
    run = fp.simulate(transform(step), mesh)
    state, _ = run(run.init(lambda w: w, table, ids), ids)
    torch.testing.assert_close(run.unplace(state), want, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_sparse_gather_is_dense() -> None:
    def step(table: torch.Tensor, ids: torch.Tensor) -> Any:
        def loss_fn(table: torch.Tensor, ids: torch.Tensor) -> fp.Mean:
            x = table.gather(0, ids[:, None].expand(-1, 3), sparse_grad=True)
            x = x + torch.gather(table, 1, ids[: len(table), None] % 3, sparse_grad=True).sum()
            return fp.Mean(x.square().sum(), torch.tensor(float(len(ids))))

        loss, grads = fp.value_and_grad(loss_fn)(table, ids)
        return table - 0.1 * grads, {"loss": loss}

    ids, table = torch.tensor([1, 2, 0, 1]), X[:4, :]
    run = fp.simulate(fp.accumulated(step, microbatches=1), fp.Mesh())
    state, _ = run(run.init(lambda w: w, table, ids), ids)
    torch.testing.assert_close(run.unplace(state), step(table, ids)[0], rtol=1e-12, atol=1e-12)


def test_a_gradient_that_stays_sparse_is_refused_by_its_path() -> None:
    def loss_fn(p: Any, x: torch.Tensor) -> fp.Mean:
        return fp.Mean(Sparse.apply(p["w"]).sum() * x.sum(), torch.tensor(float(len(x))))

    class Sparse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return w.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return g.to_sparse(1)

    def step(p: Any, x: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(p, x)
        return {"w": p["w"] - grads["w"]}, {"loss": loss}

    with refused(fp.errors.TraceError, "gradient of params['w'] is sparse"):
        fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh()).init(lambda p: p, {"w": W}, X)


def test_bits_are_those_of_a_dense_lookup() -> None:
    ids, table = torch.tensor([1, 1, 0, 1]), torch.linspace(0, 1, 6).view(3, 2).sin()

    def ran(sparse: bool) -> torch.Tensor:
        def step(table: torch.Tensor, ids: torch.Tensor) -> Any:
            def look_up(t, i):
                return fp.Mean(
                    F.embedding(i, t, sparse=sparse).exp().sum(), torch.tensor(float(len(i)))
                )

            loss, grads = fp.value_and_grad(look_up)(table, ids)
            return table - grads, {"loss": loss}

        run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
        return run.unplace(run(run.init(lambda t: t, table, ids), ids)[0])

    assert same_bits(ran(True), ran(False))
