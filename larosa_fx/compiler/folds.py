"""Folded weights: recipes evaluated in fp64 and cast once, one store for all compiled graphs, no stale tensors.

A compiled graph never holds weights of its own. It is called with the module's parameters, as Dynamo calls every graph,
and gets the folded tensors that belong to exactly these parameters. Three things tell that a parameter changed:

- its mark: in-place version, address, and a revision that ``refold`` and every step of an optimiser raise;
- a fingerprint, a few of its values, because fused optimisers, ``.data`` writes and writes to parameters made under
  ``torch.inference_mode`` move neither version nor address.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from larosa_fx.ir import compat, shards
from larosa_fx.ir.recipe import FoldError, Recipe
from larosa_fx.plan.rotations import orthonormal

SAMPLES = 8  # values of a parameter in its fingerprint
FIRST_CALLS, PERIOD = 8, 64  # on a GPU: when fingerprints are compared, see Fingerprint.differs_by_now

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element -> what holds its bits


def stamp(parameters: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """In-place version and address of each parameter; cheap enough for every call.

    Not every write moves one of them: see ``Fingerprint``.
    """
    try:
        versions = [p._version for p in parameters]
    except RuntimeError:  # inference tensors count no versions
        versions = [0 if p.is_inference() else p._version for p in parameters]
    return list(zip(versions, [p.data_ptr() for p in parameters], strict=True))


class Fingerprint:
    """SAMPLES values of each parameter, bit for bit, as they were when it was made.

    It holds views of the parameters' memory. So an address cannot come again, with other values, as long as it lives.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], marks: list[tuple[int, int, int]]) -> None:
        self.marks = marks
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for p in parameters:
            if p.numel():
                groups.setdefault((p.device, p.dtype), []).append(_samples(p))
        self._views = list(groups.values())
        self._device = next((device for device, _ in groups if device.type == "cuda"), None)
        self._values = self._now()
        self._calls = 0
        self._answer: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def _now(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._views]

    def differs(self) -> bool:
        """Whether one of the values is another one now. On a GPU this waits for all work that was queued."""
        return not all(map(torch.equal, self._now(), self._values))

    def differs_by_now(self) -> bool:
        """What each call of a compiled graph asks; it must cost nothing that counts.

        On a CPU a comparison costs about as much as reading the parameters' versions, so every call makes one. On a GPU it
        would hold up the queue. There the calls 1, 2, 4 and FIRST_CALLS compare, and from then on every PERIOD-th call
        queues a comparison whose answer a later call finds. Nothing is queued while a CUDA graph is captured.
        """
        if self._device is None:
            return self.differs()
        self._calls += 1
        if self._answer is not None and self._answer[1].query():
            differs, self._answer = bool(self._answer[0]), None
            return differs
        due = self._calls & (self._calls - 1) == 0 if self._calls <= FIRST_CALLS else self._calls % PERIOD == 0
        if not due or torch.cuda.is_current_stream_capturing():
            return False
        if self._calls <= FIRST_CALLS:
            return self.differs()
        with torch.cuda.device(self._device):
            differences = [(now != then).any().to(self._device) for now, then in zip(self._now(), self._values, strict=True)]
            answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            answer.copy_(torch.stack(differences).any(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._answer = answer, event
        return False


def _samples(p: torch.Tensor) -> torch.Tensor:
    """A view of up to SAMPLES elements of p, as integers: evenly spread over its memory, or along its longest dimension."""
    flat = p.detach()
    if flat.is_contiguous():
        flat = flat.view(-1)
    else:
        longest = max(range(flat.ndim), key=flat.size)
        for dim in reversed([d for d in range(flat.ndim) if d != longest]):
            flat = flat.select(dim, flat.size(dim) // 2)
    step = max(1, (len(flat) - 1) // SAMPLES)
    return flat.view(_INTEGERS[flat.itemsize])[::step][:SAMPLES]


@dataclass(eq=False)
class Folded:
    """A folded tensor, the parameters that it was folded from, and their marks then.

    made_with: what the same evaluation made besides. It is kept for whoever asks for that next.
    """

    tensor: torch.Tensor
    sources: list[weakref.ref]
    marks: list[tuple[int, int, int]]
    made_with: list[Folded] = field(default_factory=list)

    def is_of(self, parameters: Sequence[torch.Tensor]) -> bool:
        return all(ref() is p for ref, p in zip(self.sources, parameters, strict=True))


class FoldStore:
    """Folded tensors of all live models, shared by every graph that needs the same expression of the same parameters.

    Of a parameter that is split over several ranks the part here, ``shards.local``, is what is folded and known by its
    identity. Entries are held weakly: they live as long as a compiled graph that reads them. ``revision`` counts all calls
    of ``touch``, for whichever parameters: while it stands still, nobody said that values changed. ``made`` counts entries.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.made = 0
        self._entries: weakref.WeakValueDictionary[tuple, Folded] = weakref.WeakValueDictionary()
        self._fingerprints: weakref.WeakValueDictionary[tuple[int, ...], Fingerprint] = weakref.WeakValueDictionary()
        self._revisions: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._replaced: dict[int, weakref.ref] = {}
        self._origins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter that was never there -> (whence, its name)
        self._blanks: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Folded]:
        """The folded tensors there are now. Who holds the list keeps them for graphs that are compiled later."""
        return list(self._entries.values())

    def folded_from(self, parameters: Sequence[torch.Tensor]) -> list[Folded]:
        """What was folded from these parameters, among others; who holds the list keeps it."""
        ids = {id(shards.local(p)) for p in parameters}
        return [entry for key, entry in self._entries.items() if not ids.isdisjoint(key[-1])]

    def made_of(self, parameters: Sequence[torch.Tensor], digest: str
                ) -> list[tuple[tuple, list[torch.Tensor], torch.dtype, torch.Tensor]]:
        """(expression, its parameters, their dtype, the folded tensor) of all that was folded from these parameters alone,
        or from nothing but the rotations that ``digest`` names."""
        own = {id(p): p for p in parameters}
        found = [(key[0], [own[i] for i in key[-1]], key[2], entry) for key, entry in list(self._entries.items())
                 if key[1] == digest and own.keys() >= set(key[-1])]
        return [(*described, entry.tensor) for *described, entry in found if entry.is_of(described[1])]

    def adopt(self, expression: tuple, parameters: Sequence[torch.Tensor], digest: str, dtype: torch.dtype,
              tensor: torch.Tensor) -> Folded:
        """Take ``tensor`` for what is folded from these parameters, as they are now. Who holds the result keeps it.

        dtype: that of the weights; what is quantised is stored in another. ``tensor`` may lie in memory as files have it.
        """
        tensor = Recipe(expression).laid_out(tensor, tensor.device.type)
        entry = Folded(tensor, [weakref.ref(p) for p in parameters], self.marks(parameters))
        self._enter((expression, digest, dtype, tensor.device, tuple(map(id, parameters))), entry)
        return entry

    def _enter(self, key: tuple, entry: Folded) -> None:
        self._entries[key] = entry
        self.made += 1

    # ---- changes -----------------------------------------------------------------------------------------------------

    def touch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Note that these parameters' values may have changed: what was folded from them is folded anew when needed."""
        self.revision += 1
        for p in map(shards.local, parameters):
            self._revisions[p] = self.revision

    def marks(self, parameters: Sequence[torch.Tensor]) -> list[tuple[int, int, int]]:
        """The stamps, each with the revision at which the parameter was touched last."""
        parameters = [shards.local(p) for p in parameters]
        return [(*pair, self._revisions.get(p, 0)) for pair, p in zip(stamp(parameters), parameters, strict=True)]

    def fingerprint(self, parameters: Sequence[torch.Tensor]) -> Fingerprint:
        """Their fingerprint as of their last change, one for all graphs that read the same parameters."""
        key, marks = tuple(map(id, parameters)), self.marks(parameters)
        found = self._fingerprints.get(key)
        if found is None or found.marks != marks:
            found = self._fingerprints[key] = Fingerprint(parameters, marks)
        return found

    def fingerprints_of(self, parameters: Sequence[torch.Tensor]) -> list[Fingerprint]:
        """The fingerprints that cover one of these parameters; none where nothing is folded from them."""
        ids = {id(shards.local(p)) for p in parameters}
        return [found for key, found in self._fingerprints.items() if not ids.isdisjoint(key)]

    # ---- folding -----------------------------------------------------------------------------------------------------

    def get(self, recipe: Recipe, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], digest: str,
            dtype: torch.dtype, device: torch.device) -> Folded:
        """The folded tensor, evaluated anew, into the same memory, when a parameter changed in place.

        ``digest`` names the rotations' values. RuntimeError where a source was replaced and cannot be folded anew.
        """
        marks = self.marks(parameters)
        keys = {part: (part.expression, digest, dtype, device, tuple(map(id, parameters))) for part in recipe.parts}
        known = {part: entry for part, key in keys.items()  # an id may come again after its parameter was gone
                 if (entry := self._entries.get(key)) is not None and entry.is_of(parameters)}
        if recipe in known and known[recipe].marks == marks:
            return known[recipe]
        if any(self.is_replaced(p) for p in parameters):
            raise RuntimeError(self._gone(parameters))
        # What is folded outlives the call. An inference tensor could not be written to when a parameter changes.
        with torch.inference_mode(False), torch.no_grad():
            made = {}
            for part, folded in _evaluate(recipe, parameters, rotations, dtype, device).items():
                if part in known:
                    known[part].tensor.copy_(folded)
                    known[part].marks = marks
                else:
                    made[part] = Folded(folded, [weakref.ref(p) for p in parameters], marks)
                    self._enter(keys[part], made[part])
        entry = known.get(recipe) or made.pop(recipe)
        entry.made_with += made.values()
        return entry

    def _gone(self, parameters: Sequence[torch.Tensor]) -> str:
        packed = [self._origins[p] for p in parameters if p in self._origins]
        if packed:
            names = ", ".join(name for _, name in packed)
            return (f"larosa: {packed[0][0]} does not hold what this graph folds {names} into: it was packed with other "
                    "options or releases, or a parameter was changed since; load it as it was packed, or pack it again")
        return ("larosa: this model's weights were folded with weights='replace' and are gone, so another plan, rotation or "
                "new values cannot be folded; load the model again. Where nothing was changed, this model's steps fold them "
                "otherwise than its prompts do: enable it with weights='copy'")

    def is_replaced(self, parameter: torch.Tensor) -> bool:
        parameter = shards.local(parameter)
        ref = self._replaced.get(id(parameter))
        return ref is not None and ref() is parameter

    def replace(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give up the parameters' own memory: each then lies in memory of the tensor it was folded into.

        Where that is smaller, in 8 or 4 bits, all lie in one blank tensor as large as the largest of them. What is part of
        a split parameter lies nowhere.

        Sizes, strides and dtype stay, because Dynamo guards on them. What owns the parameters must not be used any more
        (``forbid_use``). Returns those that did: something was folded from them, and they had not done so before.
        """
        hosts: dict[int, torch.Tensor | None] = {}
        for p in [p for p in parameters if not self.is_replaced(p)]:
            made = [entry.tensor for key, entry in self._entries.items() if id(p) in key[-1]]
            if made:
                hosts[id(p)] = next((t for t in made if t.numel() >= p.numel() and t.dtype == p.dtype), None)
                if hosts[id(p)] is None:
                    hosts[id(p)] = self._blank(p)
        done = [p for p in parameters if id(p) in hosts]
        for p in done:
            if isinstance(p, torch.nn.Parameter):
                p.data = hosts[id(p)].as_strided(p.size(), p.stride())
            else:
                p.data = without_memory(p)
        self._give_up(done)
        # Their addresses are new, their values are not: what was folded from them stays valid.
        marks = dict(zip(map(id, done), self.marks(done), strict=True))
        for key, entry in self._entries.items():
            entry.marks = [marks.get(i, old) for i, old in zip(key[-1], entry.marks, strict=True)]
        return done

    def never_there(self, parameters: Mapping[str, torch.Tensor], origin: str) -> None:
        """Note that these parameters, by name, hold no values: ``origin`` brought what was folded from them instead."""
        self._give_up(list(parameters.values()))
        for name, p in parameters.items():
            self._origins[p] = origin, name

    def _give_up(self, parameters: Sequence[torch.Tensor]) -> None:
        for p in parameters:
            self._replaced[id(p)] = weakref.ref(p, functools.partial(self._forget, id(p)))

    def _blank(self, p: torch.Tensor) -> torch.Tensor:
        """Memory that nobody reads, for a parameter of p's size, dtype and device; common to all that came before it."""
        key = (p.dtype, p.device)
        if key not in self._blanks or self._blanks[key].numel() < p.numel():
            self._blanks[key] = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
        return self._blanks[key]

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._replaced.pop(key, None)


def without_memory(p: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of no bytes that looks like ``p``, the part here of a split parameter, which nothing reads any more.

    device: where it seems to lie; None, where ``p`` does.
    Its place in its storage stays too: a DTensor remembers that of its part, and Dynamo cannot trace one that differs.
    """
    reach = p.storage_offset() + sum((n - 1) * stride for n, stride in zip(p.size(), p.stride(), strict=True)) + 1
    empty = torch.empty(reach, dtype=p.dtype, device=device or p.device).as_strided(p.size(), p.stride(), p.storage_offset())
    empty.untyped_storage().resize_(0)
    return empty


def _evaluate(recipe: Recipe, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor],
              dtype: torch.dtype, device: torch.device) -> dict[Recipe, torch.Tensor]:
    """The values of a recipe's parts, computed on ``device``, or in main memory where there is no room."""
    try:
        folded = recipe.evaluate(parameters, rotations, dtype=dtype, device=device)
    except torch.OutOfMemoryError:  # a head in fp64 is four times a head in bf16
        folded = None
    if folded is None:  # slower, but there is room; and only here is free what the failure's frames held
        folded = recipe.evaluate(parameters, rotations, dtype=dtype, device=torch.device("cpu"))
    return {part: _in_memory_of_its_own(part.laid_out(tensor.to(device), device.type), parameters)
            for part, tensor in folded.items()}


def _in_memory_of_its_own(folded: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    aliases = not folded.is_meta and folded.data_ptr() in [p.data_ptr() for p in parameters]
    return folded.clone() if aliases else folded


#: One store for the process: prefill, decode and recompiled graphs of one model share what is folded.
STORE = FoldStore()


def check(parameters: Sequence[torch.Tensor]) -> bool:
    """Compare weights with the fingerprints taken when they were folded; whether one differs.

    What differs is folded anew at the next call. It waits for a GPU: once at the start of a generation, not at each token.
    """
    changed = any(taken.differs() for taken in STORE.fingerprints_of(parameters))
    if changed:
        STORE.touch(parameters)
    return changed


def refold(model: torch.nn.Module) -> None:
    """Fold the weights of ``model`` anew at the next call of whatever was compiled for it.

    Needed only after a write that nothing records and that leaves alone the few values that are looked at: one row
    changed through ``parameter.data``, say. RuntimeError where weights="replace" left nothing to fold from.
    """
    parameters = list(model.parameters())
    if any(map(STORE.is_replaced, parameters)):
        raise RuntimeError("larosa: this model's weights were folded with weights='replace' and are gone, so nothing can be "
                           "folded anew; load the model again")
    STORE.touch(parameters)


def _after_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    """A step of an optimiser changes its parameters; the fused ones move no version."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if STORE.fingerprints_of(parameters):
        STORE.touch(parameters)


register_optimizer_step_post_hook(_after_step)

_GONE = ("larosa: the weights of this module were folded into a compiled model with weights='replace'; the eager model can "
         "no longer be run or saved. Use the compiled model, or load the model again.")


class _Asked(threading.local):
    shapes = False


_asked = _Asked()


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it modules whose weights are gone may run in this thread: for the shapes of what they return."""
    _asked.shapes = True
    try:
        yield
    finally:
        _asked.shapes = False


def forbid_use(parameters: Sequence[torch.Tensor]) -> None:
    """Make the modules that own these parameters refuse to run eagerly or to be saved, until they own others.

    The owners are found by walking live modules: tied weights have several, and Dynamo names only the one it traced.
    """
    gone = WeakIdKeyDictionary(dict.fromkeys(parameters, True))

    def refuse(module: torch.nn.Module, *_: object, **__: object) -> None:
        if not (torch.compiler.is_compiling() or _asked.shapes) and _owns(module, gone):
            raise RuntimeError(_GONE)

    for module in [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]:
        if _owns(module, gone):
            compat.register_eager_pre_hook(module, refuse)
            module.register_state_dict_pre_hook(refuse)


def _owns(module: torch.nn.Module, parameters: WeakIdKeyDictionary) -> bool:
    return any(p is not None and shards.local(p) in parameters for p in module._parameters.values())


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

    def sources(self, args: Sequence[object]) -> list[torch.Tensor]:
        """The parameters that recipes read, each once."""
        return [args[i] for i in sorted({i for recipe in self.recipes() for i in recipe.sources})]

    def replaceable(self, args: Sequence[object]) -> list[int]:
        """Positions of the matrices that only recipes read. Gains are kept: they are small, and norms outlive folding."""
        kept = set(self.kept())
        return sorted({i for recipe in self.recipes() for i in recipe.sources if i not in kept and args[i].ndim > 1})

    def specs(self, args: Sequence[object]) -> list[compat.Spec]:
        """What each folded tensor will be like, without folding."""
        meta = torch.device("meta")
        folded = [recipe.laid_out(recipe.evaluate([args[i].to(meta) for i in recipe.sources], self.rotations,
                                                  dtype=self.dtype, device=meta)[recipe], self.device.type)
                  for recipe in self.recipes()]
        return [compat.Spec(tuple(tensor.shape), tensor.stride(), tensor.dtype, self.device) for tensor in folded]

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
