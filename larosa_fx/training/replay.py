"""Functions of tensors replayed from CUDA graphs: thousands of small kernels take longer to launch than to run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from larosa_fx.ir import compat

log = logging.getLogger("larosa_fx")


class Replayed:
    """``function`` of tensors, captured in a CUDA graph at the first call with inputs of a kind; on a CPU just called.

    Inputs are of one kind if their shapes, dtypes and devices are equal: a graph holds inputs of its own, and to copy
    others there would round them. Whatever else the function reads must keep its address. What it returns, tensors nested
    in tuples, is overwritten by the next call with inputs of that kind. A function that cannot be captured, because
    something in it waits for the GPU, is called as it is, with one warning.
    """

    def __init__(self, function: Callable) -> None:
        self.function, self.capturable = function, True
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], object]] = {}

    def __call__(self, *inputs: torch.Tensor):
        if not inputs[0].is_cuda or not self.capturable:
            return self.function(*inputs)
        kind = tuple((t.shape, t.dtype, t.device) for t in inputs)
        if kind not in self._graphs:
            generator = torch.cuda.default_generators[inputs[0].device.index]
            state = generator.clone_state()
            try:
                self._graphs[kind] = self._capture(inputs)
            except RuntimeError as error:
                self.capturable = False
                compat.set_generator_state(generator, state)
                log.warning("%s cannot be replayed from a CUDA graph and runs kernel by kernel: %s",
                            self.function.__name__, str(error).splitlines()[0])
            if not self.capturable:  # behind the handler: the error holds what the attempt took, which may be most memory
                return self.function(*inputs)
        graph, held, outputs = self._graphs[kind]
        for static, given in zip(held, inputs, strict=True):
            static.copy_(given)
        graph.replay()
        return outputs

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], object]:
        held = [t.clone() for t in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in a first call, which a capture would refuse
            self.function(*held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*held)
        return graph, held, outputs
