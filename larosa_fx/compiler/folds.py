"""Folded weights: recipes evaluated in fp64 and cast once, one store for all compiled graphs, no stale tensors.

A compiled graph never holds weights of its own. It is called with the module's parameters, as Dynamo calls every graph,
and gets the folded tensors that belong to exactly these parameters: by identity, in-place version and address.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from larosa_fx.ir.recipe import FoldError, Recipe
from larosa_fx.plan.rotations import orthonormal


def stamp(parameters: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """What changes when a parameter's values do: in-place version and address.

    Writes through ``parameter.data`` change neither; nothing in torch records them.
    """
    try:
        versions = [p._version for p in parameters]
    except RuntimeError:  # inference tensors count no versions
        versions = [0 if p.is_inference() else p._version for p in parameters]
    return list(zip(versions, [p.data_ptr() for p in parameters], strict=True))


@dataclass(eq=False)
class Folded:
    """A folded tensor and the stamp of the parameters that it was folded from."""

    tensor: torch.Tensor
    stamp: list[tuple[int, int]]


class FoldStore:
    """Folded tensors of all live models, shared by every graph that needs the same expression of the same parameters.

    Entries are held weakly: they live as long as a compiled graph that reads them.
    """

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[tuple, Folded] = weakref.WeakValueDictionary()
        self._replaced: dict[int, weakref.ref] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Folded]:
        """The folded tensors there are now. Who holds the list keeps them for graphs that are compiled later."""
        return list(self._entries.values())

    def folded_from(self, parameters: Sequence[torch.Tensor]) -> list[Folded]:
        """What was folded from these parameters, among others; who holds the list keeps it."""
        ids = set(map(id, parameters))
        return [entry for key, entry in self._entries.items() if not ids.isdisjoint(key[-1])]

    def get(self, recipe: Recipe, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], digest: str,
            dtype: torch.dtype, device: torch.device) -> Folded:
        """The folded tensor, evaluated anew, into the same memory, when a parameter changed in place.

        ``digest`` names the rotations' values. RuntimeError where a source was replaced and cannot be folded anew.
        """
        key = (recipe.expression, digest, dtype, device, tuple(map(id, parameters)))
        current = stamp(parameters)
        entry = self._entries.get(key)
        if entry is not None and entry.stamp == current:
            return entry
        if any(self.is_replaced(p) for p in parameters):
            raise RuntimeError("larosa: this model's weights were folded with weights='replace' and are gone, so another "
                               "plan, rotation or new values cannot be folded; load the model again")
        try:
            folded = recipe.evaluate(parameters, rotations, dtype=dtype, device=device)
        except torch.OutOfMemoryError:  # a head in fp64 is four times a head in bf16
            folded = None
        if folded is None:  # slower, but there is room; and only here is free what the failure's frames held
            folded = recipe.evaluate(parameters, rotations, dtype=dtype, device=torch.device("cpu")).to(device)
        if entry is not None:
            entry.tensor.copy_(folded)
            entry.stamp = current
            return entry
        # An id may come again once its parameter is gone; the graph that holds this entry drops it then (backend).
        entry = self._entries[key] = Folded(folded, current)
        return entry

    def is_replaced(self, parameter: torch.Tensor) -> bool:
        ref = self._replaced.get(id(parameter))
        return ref is not None and ref() is parameter

    def replace(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give up the parameters' own memory: each then lies in memory of the tensor it was folded into.

        Sizes, strides and dtype stay, because Dynamo guards on them. What owns the parameters must not be used any more
        (``forbid_use``). Returns those that did: something was folded from them, and they had not done so before.
        """
        hosts = {id(p): entry.tensor for key, entry in self._entries.items() for p in parameters
                 if id(p) in key[-1] and entry.tensor.numel() >= p.numel() and entry.tensor.dtype == p.dtype}
        done = [p for p in parameters if id(p) in hosts and not self.is_replaced(p)]
        for p in done:
            p.data = hosts[id(p)].view(-1)[:p.numel()].as_strided(p.size(), p.stride())
            self._replaced[id(p)] = weakref.ref(p, functools.partial(self._forget, id(p)))
        replaced = set(map(id, done))
        for key, entry in self._entries.items():
            if replaced & set(key[-1]):
                entry.stamp = [current if i in replaced else old for i, current, old in zip(
                    key[-1], self._stamps_of(key[-1], done), entry.stamp, strict=True)]
        return done

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._replaced.pop(key, None)

    @staticmethod
    def _stamps_of(ids: Sequence[int], parameters: Sequence[torch.Tensor]) -> list[tuple[int, int] | None]:
        by_id = {id(p): stamp([p])[0] for p in parameters}
        return [by_id.get(i) for i in ids]


#: One store for the process: prefill, decode and recompiled graphs of one model share what is folded.
STORE = FoldStore()

_GONE = ("larosa: the weights of this module were folded into a compiled model with weights='replace'; the eager model can "
         "no longer be run or saved. Use the compiled model, or load the model again.")


def forbid_use(parameters: Sequence[torch.Tensor]) -> None:
    """Make the modules that own these parameters refuse to run eagerly or to be saved; found by walking live modules."""
    ids = set(map(id, parameters))

    def refuse(*_: object, **__: object) -> None:
        if not torch.compiler.is_compiling():
            raise RuntimeError(_GONE)

    for module in [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]:
        if any(p is not None and id(p) in ids for p in module._parameters.values()):
            module.register_forward_pre_hook(refuse)
            module.register_state_dict_pre_hook(refuse)


class ExactRotations(Mapping):
    """A plan's matrices in fp64; rotations, [D, D], orthogonal beyond fp32's rounding, maps and scales as they are.

    The last two are kept: a layer's recipes follow each other.
    """

    def __init__(self, rotations: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._bases = tuple(rotations)
        self._make = functools.lru_cache(maxsize=2)(lambda name: _exact(rotations[name].to(device)))

    def __getitem__(self, basis: str) -> torch.Tensor:
        return self._make(basis)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)


def _exact(matrix: torch.Tensor) -> torch.Tensor:
    return orthonormal(matrix) if matrix.ndim == 2 else matrix.double()


@dataclass(frozen=True)
class Binding:
    """The inputs of a rewritten graph: for each, a position in the original inputs or a recipe.

    ``rotations``: what recipes name, a plan's ``matrices``; ``digest`` stands for their values.
    """

    inputs: list[int | Recipe]
    dtype: torch.dtype
    device: torch.device
    rotations: Mapping[str, torch.Tensor] = field(default_factory=dict)
    digest: str = ""
    names: Sequence[str] = ()  # of the original inputs

    def recipes(self) -> list[Recipe]:
        return [entry for entry in self.inputs if isinstance(entry, Recipe)]

    def kept(self) -> list[int]:
        """Positions of the original inputs that the rewritten graph still takes; its other inputs follow them."""
        return [entry for entry in self.inputs if isinstance(entry, int)]

    def replaceable(self, args: Sequence[object]) -> list[int]:
        """Positions of the matrices that only recipes read. Gains are kept: they are small, and norms outlive folding."""
        kept = set(self.kept())
        return sorted({i for recipe in self.recipes() for i in recipe.sources if i not in kept and args[i].ndim > 1})

    def specs(self, args: Sequence[object]) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
        """Shape, dtype and device of each folded tensor, without folding."""
        meta = torch.device("meta")
        return [(tuple(recipe.evaluate([args[i].to(meta) for i in recipe.sources], self.rotations, dtype=self.dtype,
                                       device=meta).shape), self.dtype, self.device) for recipe in self.recipes()]

    def fold(self, args: Sequence[object], *, replace: bool = False) -> list[Folded]:
        """The folded tensors for these parameters, in the order of the recipes.

        ``replace`` gives up each of the ``replaceable`` parameters as soon as nothing more is folded from it, so that the
        model and one weight in fp64 is all that must fit into memory.
        """
        exact = ExactRotations(self.rotations, self.device)
        recipes, replaced, folded = self.recipes(), [], []
        last = {id(args[i]): n for n, recipe in enumerate(recipes) for i in recipe.sources}
        leaving = [args[i] for i in self.replaceable(args)] if replace else []
        if self.dtype == torch.float16:  # whose range may yet be left: until then the model is as it was
            last = dict.fromkeys(last, len(recipes) - 1)
        try:
            for n, recipe in enumerate(recipes):
                folded.append(STORE.get(recipe, [args[i] for i in recipe.sources], exact, self.digest, self.dtype,
                                        self.device))
                if done := [p for p in leaving if last[id(p)] == n]:
                    replaced += STORE.replace(done)
        except FoldError as error:
            raise FoldError(f"larosa: folding {', '.join(self.names[i] for i in recipe.sources)} into one weight fails: "
                            f"{error}. Use the model in bfloat16 or float32, or a plan with rotation='none'") from None
        finally:
            if replaced:
                forbid_use(replaced)
        return folded
