"""One training step as a CUDA graph: thousands of kernels started by one call, on memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_RUNS = 3
"""Runs before a step is recorded, in which libraries choose their kernels and take their memory."""

Record = Callable[[Callable[[], None], Iterable[Tensor]], Callable[[], None]]
"""A step and the tensors that it changes -> the same step, to be called as often as is liked; the tensors stay."""


def plain(step: Callable[[], None], changed: Iterable[Tensor]) -> Callable[[], None]:
    """The step as it is."""
    return step


def cuda_graph(step: Callable[[], None], changed: Iterable[Tensor]) -> Callable[[], None]:
    """The step recorded as a CUDA graph."""
    before = [(tensor, tensor.clone()) for tensor in changed]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, value in before:
        tensor.copy_(value)
    replay: Callable[[], None] = graph.replay
    return replay


def tape(step: Callable[[], None], changed: Iterable[Tensor]) -> Callable[[], None]:
    """What a CUDA graph does, without CUDA: the same operations on the same memory again, whatever Python thinks since.

    For rehearsals: it fails where a recording would, at a value that Python reads off a tensor.
    """
    before = [(tensor, tensor.clone()) for tensor in changed]
    for _ in range(WARM_RUNS):
        step()
    with Tape() as recorded:
        step()
    for tensor, value in before:
        tensor.copy_(value)
    again: Callable[[], None] = recorded.replay
    return again


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation on tensors while it is entered, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} reads values off a tensor, which a CUDA graph cannot record")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do it all again; each result goes where the recorded one was."""
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(result: Any) -> list[Tensor]:
    """The tensors among an operation's results."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
