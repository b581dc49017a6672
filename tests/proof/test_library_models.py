"""What the proof allows and refuses of models that a library brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.sequence_ranks import Splits, a_part, far, on_one, on_ranks, proven

import funcpipe as fp
from funcpipe._src.functional import dispatch as hook
from funcpipe.errors import SequenceError

# Sums over positions, and matrix products over them, are taken rank by rank.
FLOAT64 = 1e-12
B = 2  # rows


BUFFER = "buffer "


def library_models() -> dict[str, Callable[[], Any]]:
    transformers = pytest.importorskip("transformers", reason="needs the transformers library")
    small = {"vocab_size": 32, "attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 0}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, **llama, max_position_embeddings=32)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **gpt2)),
    }


def library_loss(models: list[Any], **options: Any) -> tuple[Callable, Any]:
    """A loss function of a model, and its params. A call swaps params in, so every rank has a model
    of its own. Buffers come
    with the batch: they have no gradients."""

    def loss(p: Any, b: Any) -> fp.Mean:
        model = models[getattr(hook.current(), "member", 0)]
        p = p | {k.removeprefix(BUFFER): x for k, x in b.items() if k.startswith(BUFFER)}
        mask = {"attention_mask": b["mask"]} if "mask" in b else {}
        out = torch.func.functional_call(
            model, p, (b["ids"],), {"position_ids": b["at"], **mask, **options}
        )
        return fp.Mean(
            F.cross_entropy(out.logits.flatten(0, 1), b["labels"].flatten(), reduction="sum"),
            torch.ones_like(b["ids"]).sum(),
        )

    return loss, {k: x.detach() for k, x in models[0].named_parameters()}


def library_batch(length: int, model: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 32, (2, B, length), generator=g)
    buffers = {BUFFER + k: x for k, x in model.named_buffers()}
    return {
        "ids": ids,
        "labels": labels,
        "at": torch.arange(length).expand(B, -1).contiguous(),
        **buffers,
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["with a cache", "with a whole mask", "under a name of its own"])
def test_models_of_a_library(name: str, how: str) -> None:
    """What makes transformers leave its own mask out, which it would build from the length of a
    slice: a cache that stays empty, a 4-d mask of the whole sequence, or torch's attention under a
    name for which it makes no mask."""
    options: dict[str, Any] = {"use_cache": how == "with a cache"}
    models = [library_models()[name]().double().eval() for _ in range(2)]
    loss, params = library_loss(models, **options)
    batch, part = library_batch(7, models[0]), a_part(7, 2)
    splits: Splits = {"ids": (1, part), "labels": (1, part), "at": (1, part)}
    if how == "with a whole mask":
        batch["mask"] = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    if how == "under a name of its own":
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        for model in models:
            model.set_attn_implementation("sdpa_without_mask")
    found = proven(loss, params, batch, splits, attention=True)
    assert far(on_one(loss, params, batch), on_ranks(found, loss, params, batch, splits)) < FLOAT64


def test_a_model_that_builds_its_mask_is_refused() -> None:
    model, part = library_models()["llama"]().double().eval(), a_part(7, 2)
    loss, params = library_loss([model], use_cache=False)
    with pytest.raises(
        SequenceError, match=r"an operand of attention at sdpa_attention.py.* at masking_utils.py"
    ):
        proven(
            loss, params, library_batch(7, model), {k: (1, part) for k in ("ids", "labels", "at")}
        )
