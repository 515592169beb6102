"""Calibration of a model that does not fit: accelerate brings each layer's weights when it runs, and takes them away.

A compiler cannot trace through that, so the structure is found on a twin of the model whose weights have shapes alone, and
what the sites read is seen by hooks on the model itself. A forward pass reads all weights once, from wherever they lie, so
as many tokens as possible go through in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import align_module_device
from tqdm.auto import tqdm

from larosa_fx.ir import compat
from larosa_fx.method.evaluate import by_length
from larosa_fx.method.reference import Affine, Replacement, headless, replaced
from larosa_fx.plan.plan import PlanSite

TOKENS = 65536  # at once: 1 GiB of activations for each 8192 channels in 16 bits


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The model with shapes for weights, on the meta device, and without hooks. RuntimeError where it cannot be made."""
    if not hasattr(model, "config"):
        raise RuntimeError("larosa cannot calibrate this model while its weights are offloaded: it has no config to make "
                           "its like of; load it whole, on a CPU if need be")
    with torch.device("meta"):
        return type(model)(model.config).to(model.dtype).eval()


@contextmanager
def present(model: torch.nn.Module, names: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """The parameters of these names, [N, K] each, brought in while the context lasts."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    with torch.no_grad(), ExitStack() as stack:
        for owner in owners:
            stack.enter_context(align_module_device(owner))
        yield [model.get_parameter(name) for name in names]


def watch(model: torch.nn.Module, sites: Sequence[PlanSite], observe: Callable[[str, torch.Tensor], None],
          tokens: Sequence[torch.Tensor], progress: bool) -> None:
    """Call ``observe(site name, x_hat)`` for what each site reads of all tokens; input_ids, [B, T] each."""
    def replacement(site: PlanSite) -> Replacement:
        def look(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            observe(site.name, x_hat)
            return x

        return look

    device, options = compat.execution_device(model), headless(model)
    with torch.no_grad(), replaced(model, sites, replacement), tqdm(
            joined(tokens), "calibrating", unit="pass", disable=not progress) as bar:
        for batch in bar:
            model(batch.to(device), **options)


def joined(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Batches of the same length in one, up to TOKENS tokens; a row has at least its length."""
    return [piece for length, rows in by_length(batches).items() for piece in rows.split(max(1, TOKENS // length))]
