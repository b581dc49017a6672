"""Hugging Face models under transforms: what their makers wrote, cut into stages, computes what it
does on one device."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.examples import run
from support.models import refused, same_bits

import funcpipe as fp
from funcpipe._src.modules.from_module import from_module, to_module
from funcpipe.errors import BatchError
from funcpipe.testing import assert_equivalent

transformers: Any = pytest.importorskip(
    "transformers", reason="the extra 'test' installs transformers"
)

# Sums over microbatches are taken in another order than on one device: see test_equivalence.py.
FLOAT64 = 1e-12
VOCABULARY, ROWS, LENGTH = 32, 8, 6
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama(attention: str) -> Any:
    config = transformers.LlamaConfig(
        **TOKENS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(attention: str) -> Any:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        **TOKENS,
        **none,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=16,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config)  # the head is the embedding


def t5(attention: str) -> Any:
    """Encoder and decoder of two blocks each; every block of the decoder reads the encoder's
    output."""
    config = transformers.T5Config(
        **TOKENS,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    return transformers.T5ForConditionalGeneration(config)


BLOCKS = {
    llama: ["model.layers.*"],
    gpt2: ["transformer.h.*"],
    t5: ["encoder.block.*", "decoder.block.*"],
}
MODELS = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)


def build(make: Callable, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return make(attention).double().train()


def make_batch(seed: int, make: Callable, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH + 1), generator=g)
    decoder = {"decoder_input_ids": tokens[:, :-1].contiguous()} if make is t5 else {}
    ids = tokens.flip(1) if make is t5 else tokens
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        **decoder,
        **more,
    }


def training(model: Any, make: Callable) -> tuple[Callable, Any]:
    """A step of plain descent, whose state is the params; and those."""
    apply_fn, params, buffers = from_module(model, BLOCKS[make])

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        inputs = {name: x for name, x in batch.items() if name not in ("labels", "buffers")}
        out, _ = apply_fn(params, batch["buffers"], **inputs, use_cache=False)
        total = F.cross_entropy(
            out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )
        return fp.Mean(total, torch.ones_like(batch["labels"]).sum())

    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, {**batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}

    return step, params


def dims(batch: Any) -> Any:
    return {name: 0 for name in batch} | {"buffers": None}


def check(
    model: Any, make: Callable, mesh: fp.Mesh, microbatches: int, **more: torch.Tensor
) -> None:
    step, params = training(model, make)
    batches = [make_batch(seed, make, **more) for seed in range(2)]
    fast = fp.pipelined(step, axis="pipe", microbatches=microbatches, dims=dims(batches[0]))
    if "data" in mesh.axes:
        fast = fp.sharded_weights(
            fp.data_parallel(fast, axis="data", dims=dims(batches[0])), axis="data"
        )
    bitwise = microbatches == 1 and "data" not in mesh.axes
    assert_equivalent(step, fast, mesh, lambda p: p, params, batches, rtol=FLOAT64, bitwise=bitwise)


@MODELS
def test_pipelined_bits(make: Callable) -> None:
    """With attention op by op: transformers calls torch's fused one otherwise while it is traced
    (with a mask, and keys that are repeated), which on some processors has other bits."""
    check(build(make, "eager"), make, fp.Mesh(pipe=3), microbatches=1)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@MODELS
def test_pipelined(make: Callable, attention: str) -> None:
    check(build(make, attention), make, fp.Mesh(pipe=2), microbatches=4)


@MODELS
def test_pipelined_and_sharded(make: Callable) -> None:
    check(build(make), make, fp.Mesh(pipe=2, data=2), microbatches=2)


@MODELS
def test_recomputed(make: Callable) -> None:
    model = build(make)
    new = hasattr(
        model, "activation_checkpointing_enable"
    )  # renamed in the course of transformers 5
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    check(model, make, fp.Mesh(pipe=2), microbatches=2)


@MODELS
def test_padded(make: Callable) -> None:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1::2, LENGTH // 2 :] = 0
    check(build(make), make, fp.Mesh(pipe=2), microbatches=2, attention_mask=mask)


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_packed(make: Callable) -> None:
    """Positions that start over: several texts in a row, which do not see one another."""
    positions = (torch.arange(LENGTH) % 3).expand(ROWS, LENGTH).contiguous()
    check(build(make), make, fp.Mesh(pipe=2), microbatches=2, position_ids=positions)


@MODELS
def test_one_device_computes_what_the_model_does(make: Callable) -> None:
    """Loss and gradients of the model itself, bitwise; it is not changed."""
    model = build(make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, params = training(model, make)
    batch = make_batch(0, make)
    new, metrics = step(params, batch)
    out = model(**{**batch, "use_cache": False, "labels": None})
    loss = (
        F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        / batch["labels"].numel()
    )
    assert torch.allclose(metrics["loss"], loss, rtol=FLOAT64)
    F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").backward()
    want = {
        name: p.detach() - 0.1 * (p.grad / batch["labels"].numel())
        for name, p in model.named_parameters()
    }
    assert same_bits(new, want)
    assert same_bits({name: p.detach() for name, p in model.named_parameters()}, before)


@MODELS
def test_a_tied_embedding_is_one_leaf(make: Callable) -> None:
    model = build(make)
    if make is llama:
        model.lm_head.weight = model.model.embed_tokens.weight
    _, params, _ = from_module(model)
    assert not any(re.search("lm_head|encoder.embed", name) for name in params)
    check(model, make, fp.Mesh(pipe=2), microbatches=2)


def test_it_writes_after_training() -> None:
    """Train over a pipeline, put the params back, generate."""
    model = build(llama)
    step, params = training(model, llama)
    batch = make_batch(0, llama)
    run = fp.simulate(
        fp.pipelined(step, axis="pipe", microbatches=2, dims=dims(batch)), fp.Mesh(pipe=2)
    )
    state = run.init(lambda p: p, params, batch)
    for _ in range(3):
        state, _ = run(state, batch)
    full = run.unplace(state)
    to_module(model.eval(), full)
    prompt = batch["input_ids"][:2, :3]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    assert written.shape == (2, 7) and torch.equal(written[:, :3], prompt)
    expected = prompt
    apply_fn, _, buffers = from_module(model)
    for _ in range(4):
        logits = apply_fn(full, buffers, expected, use_cache=False)[0].logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(written, expected)


# ---- others, whose ways a call has to bear

SMALL = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 1}
HOOKED = {
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**SMALL, state_size=4, intermediate_size=32)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4
        )
    ),
    "esm": lambda: transformers.EsmForMaskedLM(
        transformers.EsmConfig(
            **SMALL, num_attention_heads=2, intermediate_size=24, position_embedding_type="rotary"
        )
    ),
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_load_old_checkpoints_play_no_part(name: str) -> None:
    torch.manual_seed(0)
    model = HOOKED[name]().double().eval()
    tokens = make_batch(0, llama)["input_ids"]
    apply_fn, params, buffers = from_module(model)
    out, _ = apply_fn(params, buffers, tokens)
    assert torch.equal(out.logits, model(tokens).logits)


def test_a_model_whose_functions_cache_tensors() -> None:
    """DINOv3's patch coordinates, before, in and after a plan."""
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    model = transformers.DINOv3ViTModel(config).double().eval()
    apply_fn, params, buffers = from_module(model)

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        out, _ = apply_fn(params, batch["buffers"], batch["x"])
        return fp.Mean(
            out.pooler_output.square().sum(), torch.ones_like(batch["x"][:, 0, 0, 0]).sum()
        )

    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, {**batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}

    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model(x).pooler_output
    fast = fp.data_parallel(step, axis="data", dims={"x": 0, "buffers": None})
    assert_equivalent(step, fast, fp.Mesh(data=2), lambda p: p, params, [{"x": x}], rtol=FLOAT64)
    assert torch.equal(model(x).pooler_output, before)


def test_the_mean_that_labels_give_is_refused() -> None:
    apply_fn, params, buffers = from_module(build(llama), BLOCKS[llama])

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        out, _ = apply_fn(
            params, batch["buffers"], batch["input_ids"], labels=batch["labels"], use_cache=False
        )
        return fp.Mean(out.loss, torch.ones_like(batch["labels"]).sum())

    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, {**batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - g, params, grads), {"loss": loss}

    batch = make_batch(0, llama)
    run = fp.simulate(
        fp.pipelined(step, axis="pipe", microbatches=2, dims=dims(batch)), fp.Mesh(pipe=2)
    )
    with refused(
        BatchError,
        "by the number of labels among them",
        "write reduction='sum', and the number of labels as Mean.weight",
    ):
        run.init(lambda p: p, params, batch)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--simulate", "--check", "--max_steps", "2"], marks=pytest.mark.slow),
        [
            "--simulate",
            "--mesh",
            "pipe=3",
            "--bf16",
            "--gradient_checkpointing",
            "--max_steps",
            "2",
        ],
        pytest.param(
            ["--max_steps", "2", "--mesh", "data=2,pipe=2", "--gradient_accumulation_steps", "2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_finetune_hf(args: list[str], tmp_path: Path) -> None:
    out = run("finetune_hf.py", "--short", *args, cwd=tmp_path)
    assert "What it writes now:\ndef " in out
    assert "--check" not in args or "check: two steps equal one device" in out
