"""The peers of the GPU benchmark, on the same model and data: plain PyTorch on one GPU, its
pipelines, and FSDP2.

In: a size. Out: a function that runs one step and returns its loss where this process knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_model import Size, block, data, init
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Go = Callable[[], Any]


class Block(nn.Module):
    def __init__(self, p: dict) -> None:
        super().__init__()
        self.p = nn.ParameterDict(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block(self.p, x)


class BlockInHalves(Block):
    """A block whose backward runs twice, once for each half: compiled, it must keep what it reads.
    Its code is another one, since what is compiled for a code is used for all modules that have
    it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block(self.p, x)


class Chunk(nn.Module):
    """A stage of the model."""

    def __init__(
        self, params: dict, stage: int = 0, stages: int = 1, of: type[Block] = Block
    ) -> None:
        super().__init__()
        n = len(params["blocks"]) // stages
        blocks = params["blocks"][stage * n : (stage + 1) * n]
        self.blocks = nn.ModuleList(of(p) for p in blocks)
        # Of blocks in halves: before 2.13, torch forgets their backward after its first half,
        # unless somebody holds it.
        self.held: list[GradientEdge] = []
        self.embed = nn.Parameter(params["embed"]) if stage == 0 else None
        self.head = nn.Parameter(params["head"]) if stage == stages - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embed is None else F.embedding(x, self.embed)
        for b in self.blocks:
            x = b(x)
            if isinstance(b, BlockInHalves) and x.requires_grad:
                self.held.append(get_gradient_edge(x))
        return x if self.head is None else F.linear(x, self.head)


def loss_of(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out.float().flatten(0, 1), labels.flatten())


def compile_blocks(chunk: Chunk, compiled: bool) -> None:
    """What is compiled stays so: a contender that would fall back to eager, having been compiled
    too often, fails."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for b in chunk.blocks if compiled else ():
        b.compile()


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True, **options)


def one_gpu(size: Size, compiled: bool = False, graph: bool = False) -> Go:
    """Plain PyTorch on one GPU, every microbatch after the other; perhaps the whole step in a CUDA
    graph."""
    chunk, batch = Chunk(init(size)), data(size)
    compile_blocks(chunk, compiled)
    optimizer = adamw(chunk.parameters(), capturable=graph)
    parts = list(
        zip(*(batch[k].chunk(size.microbatches) for k in ("tokens", "labels")), strict=True)
    )

    def go() -> Any:
        losses = []
        for tokens, labels in parts:
            loss = loss_of(chunk(tokens), labels) / size.microbatches
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return captured(go) if graph else go


def captured(go: Go) -> Go:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            go()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = go()

    def replay() -> Any:
        graph.replay()
        return loss.clone()

    return replay


def pipeline(size: Size, name: str, compiled: bool) -> Go:
    """``torch.distributed.pipelining``."""
    from torch._functorch import config
    from torch.distributed import pipelining

    ranks, rank = dist.get_world_size(), dist.get_rank()
    numbers = {
        "Schedule1F1B": [rank],
        "ScheduleInterleaved1F1B": [rank, rank + ranks],
        "ScheduleZBVZeroBubble": [rank, 2 * ranks - 1 - rank],
    }[name]
    params, stages = init(size), ranks * len(numbers)
    halves = name == "ScheduleZBVZeroBubble"
    chunks = [Chunk(params, s, stages, BlockInHalves if halves else Block).cuda() for s in numbers]
    for chunk in chunks:
        compile_blocks(chunk, compiled)
    device = torch.device("cuda", torch.cuda.current_device())
    made = [
        pipelining.PipelineStage(c, s, stages, device) for c, s in zip(chunks, numbers, strict=True)
    ]
    schedule = getattr(pipelining, name)(
        made[0] if len(made) == 1 else made, n_microbatches=size.microbatches, loss_fn=loss_of
    )
    optimizer, batch = adamw([p for c in chunks for p in c.parameters()]), data(size)

    def go() -> Any:
        losses: list = []
        config.donated_buffer = (
            not halves
        )  # which counts when a block is compiled: in the first step
        kwargs = {"target": batch["labels"], "losses": losses} if stages - 1 in numbers else {}
        schedule.step(*([batch["tokens"]] if 0 in numbers else []), **kwargs)
        for chunk in chunks:
            chunk.held.clear()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean() if losses else None

    return go


def fsdp(size: Size, microbatches: int, compiled: bool, reduced: torch.dtype = torch.float32) -> Go:
    """FSDP2 by block: float32 shards, bfloat16 weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    chunk = Chunk(init(size, torch.float32))
    compile_blocks(chunk, compiled)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
    for b in chunk.blocks:
        fully_shard(b, mp_policy=policy)
    fully_shard(chunk, mp_policy=policy)
    optimizer = adamw(chunk.parameters())
    ranks, rank, batch = dist.get_world_size(), dist.get_rank(), data(size)
    mine = [batch[k].chunk(ranks)[rank] for k in ("tokens", "labels")]
    parts = list(zip(*(x.chunk(microbatches) for x in mine), strict=True))

    def go() -> Any:
        losses = []
        for tokens, labels in parts:
            loss = loss_of(chunk(tokens), labels) / microbatches
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return go
