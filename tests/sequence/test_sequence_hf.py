"""Hugging Face models with the sequence split: what their makers wrote computes what it does on one
device.

They take ``position_ids``, split with the tokens. With ``use_cache=True`` (the cache is empty, and
nobody reads it) transformers leaves it to torch's attention to be causal; else it makes a mask of
its own, of the length of a slice, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import grid

import funcpipe as fp
from funcpipe.testing import assert_equivalent

transformers: Any = pytest.importorskip(
    "transformers", reason="the extra 'test' installs transformers"
)

VOCABULARY, ROWS, LENGTH = 32, 4, 10
NAMES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BLOCKS = {"llama": ["model.layers.*"], "gpt2": ["transformer.h.*"]}
DIMS = {"ids": 1, "labels": 1, "positions": 1, "buffers": None}
ROWS_OF = {"ids": 0, "labels": 0, "positions": 0, "buffers": None}
HEADS = fp.seq_all_to_all(axis="seq", dims=DIMS)
STACKS = {
    "heads": (fp.Mesh(seq=4), HEADS, 1e-12),
    "ring": (fp.Mesh(ring=2), fp.seq_ring(axis="ring", dims=DIMS), 1e-10),
    "pipelined, ISP": (
        fp.Mesh(pipe=2, seq=2),
        fp.compose(
            HEADS,
            fp.pipelined(axis="pipe", microbatches=2, dims=ROWS_OF),
            fp.sharded_weights(axis="seq"),
        ),
        1e-12,
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**NAMES, **sizes, **heads))
    else:
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**NAMES, **none, **sizes))
    return model.double().train()


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(
        3, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed)
    )
    positions = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    return {
        "ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "positions": positions,
    }


def stepping(name: str) -> tuple[Callable, Any]:
    apply_fn, params, buffers = fp.from_module(build(name), BLOCKS[name])

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        out, _ = apply_fn(p, b["buffers"], b["ids"], position_ids=b["positions"], use_cache=True)
        total = F.cross_entropy(out.logits.flatten(0, 1), b["labels"].flatten(), reduction="sum")
        return fp.Mean(total, torch.ones_like(b["labels"]).sum())

    def step(state: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state, {**batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - 0.1 * g, state, grads), {"loss": loss}

    return step, params


@pytest.mark.parametrize(("name", "stack"), grid(BLOCKS, STACKS, (), turns=True))
def test_it_equals_one_device(name: str, stack: str) -> None:
    step, params = stepping(name)
    mesh, transform, rtol = STACKS[stack]
    assert_equivalent(step, transform(step), mesh, lambda p: p, params, [make_batch(0)], rtol=rtol)
