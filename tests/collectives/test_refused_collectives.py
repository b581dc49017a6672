"""What collectives and `fp.vmap` refuse, with every error text."""

from __future__ import annotations

import pytest
import torch

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh
from funcpipe.errors import AxisError, BatchError


def text_of(fn, *args, kind=AxisError):
    with pytest.raises(kind) as caught:
        fn(*args)
    return str(caught.value)


def in_loss(fn, **mesh):
    def loss_fn(w, x):
        return fp.Mean((fn(x) * w).sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, _ = fp.value_and_grad(loss_fn)(w, x)
        return w, {"loss": loss}

    fast = fp.data_parallel(step, axis="data")
    fast = fp.pipelined(fast, axis="pipe", microbatches=1) if "pipe" in mesh else fast
    return text_of(
        fp.simulate(fast, fp.Mesh(**mesh)).init, lambda w: w, torch.ones(2), torch.ones(4, 2)
    )


def test_a_name_that_is_not_bound():
    x = torch.ones(2)
    assert text_of(fp.vmap(lambda x: fp.psum(x, "j"), "i"), x) == (
        "psum: axis 'j' is not bound here: bound are 'i' (of vmap). Name one of those, or map over "
        "it with fp.vmap(f, axis_name='j')"
    )
    assert in_loss(lambda x: fp.pmax(x, "seq"), data=2) == (
        "pmax: axis 'seq' is not bound here: Mesh(data=2) lacks it, and bound are 'data' (of the "
        "mesh). Name one of those, or add it to the mesh and stack a transform on it"
    )
    assert in_loss(lambda x: fp.all_gather(x, ("data", "pipe")), pipe=1, data=2) == (
        "all_gather: axis 'pipe' of Mesh(pipe=1, data=2) does not split the batch, so no "
        "collective runs over it: its ranks have the same rows, or other stages of a pipeline. "
        "Here, bound are 'data' (of the mesh); name one of those, or stack a transform that splits "
        "the batch over it (data_parallel)"
    )
    assert "psum: ('data', 'data') names an axis twice" in in_loss(
        lambda x: fp.psum(x, ("data", "data")), data=2
    )
    assert (
        text_of(fp.psum, x, (0,))
        == "psum: an axis is given by its name, or a tuple of names, not by 0"
    )


def test_outside_of_the_loss():
    def step(w, x):
        loss, _ = fp.value_and_grad(
            lambda w, x: fp.Mean((w * x).sum(), torch.tensor(float(len(x))))
        )(w, x)
        return w, {"loss": fp.psum(loss, "data")}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    assert text_of(run.init, lambda w: w, torch.ones(2), torch.ones(4, 2)) == (
        "psum: axis 'data' is not bound here: the step runs on a mesh, and this is outside "
        "value_and_grad, where every rank has the global batch. Call it inside the loss function; "
        "fp.global_sum sums over leaves out here"
    )


def test_what_does_not_fit():
    two = lambda f: fp.vmap(f, "i")  # noqa: E731
    x = torch.ones(2, 3)
    assert text_of(two(lambda x: fp.psum_scatter(x, "i")), x) == (
        "psum_scatter: dim 0 of a tensor of shape (3,) is no multiple of 2, the number of ranks on "
        "'i'; pad it, or name another dim"
    )
    assert text_of(two(lambda x: fp.all_to_all(x, "i", 0, 0, tiled=False)), x) == (
        "all_to_all: dim 0 of a tensor of shape (3,) is not 2, the number of ranks on 'i'; use "
        "tiled=True to cut it into shards"
    )
    assert (
        text_of(two(lambda x: fp.all_gather(x, "i", 1)), x)
        == "all_gather: a tensor of shape (3,) has no dim 1"
    )
    assert text_of(two(lambda x: fp.psum("3", "i")), x) == (
        "psum: a leaf is a str, not a tensor or a number; write torch.tensor(...)"
    )
    assert text_of(two(lambda x: fp.pmax(x * 1j, "i")), x) == (
        "pmax: complex numbers (torch.complex64) have no maximum; take it of x.abs()"
    )
    assert text_of(two(lambda x: fp.ppermute(x, "i", [(0, 2)])), x) == (
        "ppermute: destination 2 is not on an axis of 2 ranks: 0 to 1"
    )
    assert text_of(two(lambda x: fp.ppermute(x, "i", [(0, 1), (0, 0)])), x) == (
        "ppermute: [(0, 1), (0, 0)] names a source twice; use all_gather to send to several ranks"
    )


def test_vmap_refuses_dims_that_do_not_fit():
    f = lambda *xs: xs[0]  # noqa: E731
    x = torch.ones(2, 3)
    assert (
        text_of(fp.vmap(f, "i", (0, 1)), x, x)
        == "vmap over 'i': mapped dims differ in size: 2 in args[0], 3 in args[1]"
    )
    assert text_of(fp.vmap(f, "i", axis_size=5), x) == (
        "vmap over 'i': mapped dims differ in size: 5 in axis_size, 2 in args[0]"
    )
    assert text_of(fp.vmap(f, "i", None), x) == (
        "vmap over 'i': no argument is mapped; say how many elements: axis_size=..."
    )
    assert text_of(fp.vmap(f, "i", 2), x) == (
        "vmap over 'i': args[0] of shape (2, 3) has no dim 2; write in_dims=None for it"
    )
    assert (
        text_of(fp.vmap(f, "i", ("x",)), x)
        == "vmap over 'i': in_dims=('x',) holds 'x'; a dim is an int or None"
    )
    assert text_of(fp.vmap(f, "i", (0, 0)), x).startswith(
        "vmap over 'i': in_dims=(0, 0) does not fit the arguments: "
    )


def test_ops_outside_of_a_rank():
    assert text_of(torch.ops.funcpipe.psum_start, torch.ones(2), "data") == (
        "funcpipe::psum_start runs outside of a rank: wrap the call in bind_rank(communicator)"
    )


def test_a_closure_that_outlives_its_vmap():
    kept = []

    def f(x):
        kept.append(torch.func.vjp(lambda x: fp.psum(x, "i"), x)[1])
        return x

    fp.vmap(f, "i")(torch.ones(3))
    with pytest.raises((AxisError, RuntimeError)):
        kept[0](torch.ones(()))


def test_a_weight_that_is_summed_over_ranks_is_refused():
    def step(w, x):
        loss_fn = lambda w, x: fp.Mean((w * x).sum(), fp.psum(x.new_ones(()) * len(x), "data"))  # noqa: E731
        loss, _ = fp.value_and_grad(loss_fn)(w, x)
        return w, {"loss": loss}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    text = text_of(run.init, lambda w: w, torch.ones(2), torch.ones(4, 2), kind=BatchError)
    assert "Mean.weight of the whole batch is 4, but those of its 2 parts add up to 8" in text


def test_a_tensor_that_lies_where_no_rank_computes():
    """As a constant of the CPU does, in a loss on GPUs."""
    elsewhere = torch.device("meta")
    with bind_mesh(fp.Mesh(data=2), ("data",), elsewhere):
        assert text_of(lambda: fp.psum(torch.tensor(4.0), "data")).startswith(
            "psum: a leaf is on cpu, but ranks compute on meta at test_refused_collectives.py:"
        )
