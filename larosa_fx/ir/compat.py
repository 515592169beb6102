"""The only file that uses private API of torch and transformers: one function per need.

Checked on torch 2.11 and 2.13, transformers 5.17, 5.23 and 5.24 (``TESTED``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import re
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import NamedTuple

import torch
from torch import fx

#: Package -> the newest release, (major, minor), that the tests have passed with.
TESTED = {"torch": (2, 13), "transformers": (5, 24)}


def untested_versions(version: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """A sentence for each package that is installed in a newer release than the tests have seen.

    ``version``: the installed version of a package. Such a release may work; nobody has tried it.
    """
    found = []
    for package, newest in TESTED.items():
        try:
            installed = version(package)
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path
            continue
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers and tuple(map(int, numbers.groups())) > newest:
            found.append(f"{package} {installed} is newer than {newest[0]}.{newest[1]}, the newest that larosa_fx is tested "
                         f"with; if something fails, try {package}<{newest[0]}.{newest[1] + 1}")
    return found


# ---- torch -----------------------------------------------------------------------------------------------------------


def set_generator_state(generator: torch.Generator, state: torch.Generator) -> None:
    """Give a CUDA generator another state, ``clone_state()``'s, as a whole; a failed capture leaves its own in recording."""
    generator.graphsafe_set_state(state)


def copy_dynamo_metadata(source: fx.GraphModule, target: fx.GraphModule, node_map: dict[fx.Node, fx.Node]) -> None:
    """Carry over what AOTAutograd reads off a Dynamo graph; without it weights are no static CUDA-graph inputs.

    ``_dynamo_source`` per placeholder and ``_param_name_to_source`` per module (2.11 to 2.13); both are plain
    attributes that ``Graph.node_copy`` drops.
    """
    target.meta = dict(source.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    for old, new in node_map.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


_STATIC_INPUT = "_dynamo_static_input_type"


def mark_static_placeholder(node: fx.Node) -> None:
    """Tell AOTAutograd that the input of this new placeholder keeps its address, as parameters do (2.11 to 2.13)."""
    node._dynamo_source = None
    node.meta["tensor_dict"] = {_STATIC_INPUT: "unguarded"}


def parameter_name(node: fx.Node) -> str:
    """Dotted name of the parameter behind a Dynamo placeholder, relative to the module that the graph was made from.

    A source is written as a chain, ``L['self']._modules['layers']._modules['0']._parameters['weight']``. Its root is what
    the traced function calls the module, which is no part of the name: an argument (``L['self']``), one of ``*args``
    (``L['args'][0]``, where a decorator wraps forward) or a global (``G['model']``). Never used to decide anything.
    """
    if getattr(node, "_dynamo_source", None) is None:
        return str(node.target)
    name = input_source(node)
    root, chain = re.fullmatch(r"(\w\['[^']*'\](?:\[\d+\])?|)(.*)", name, re.DOTALL).groups()
    keys = re.findall(r"[\w/-]+", re.sub(r"\._(modules|parameters|buffers)\b", "", chain))
    return ".".join(keys or re.findall(r"'(.*)'", root)) or str(node.target)


def is_operator(target: object) -> bool:
    """Whether a node's target is an operator with a schema, torch's or a custom one (2.11 to 2.13)."""
    return isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def is_higher_order(target: object) -> bool:
    """Whether a node's target is an operator that takes graphs: cond, while_loop, flex_attention, ... (2.11 to 2.13)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """``list(model.parameters())``, in a fraction of its time, for what looks at them in each call (2.11 to 2.13)."""
    found: dict[int, torch.nn.Parameter] = {}
    seen, ahead = set(), [model]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.update((id(p), p) for p in module._parameters.values() if p is not None)
            ahead += reversed(module._modules.values())
    return list(found.values())


def written_by_schema(target: object) -> list[tuple[int | None, str]]:
    """(position, name) of the arguments that an operator's schema says it writes to; the position is None where the
    argument goes by name alone (2.11 to 2.13).

    Which overload a packet will choose is not known yet: those of all its overloads.
    """
    overloads = ([getattr(target, name) for name in target.overloads()]
                 if isinstance(target, torch._ops.OpOverloadPacket) else [target])
    return [(None if argument.kwarg_only else i, argument.name)
            for overload in overloads for i, argument in enumerate(overload._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write]


def add_to_all(tensors: Sequence[torch.Tensor], by: int) -> None:
    """Add ``by`` to all tensors in place, in one kernel a device (2.11 to 2.13)."""
    torch._foreach_add_(list(tensors), by)


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Fill all tensors with zeros, in few kernels a device (2.11 to 2.13)."""
    torch._foreach_zero_(list(tensors))


def foreach_add(graph: fx.Graph, tensors: Sequence[fx.Node], by: int) -> fx.Node:
    """A node that adds ``by`` to all tensors in place, in one kernel (2.11 to 2.13)."""
    return graph.call_function(torch._foreach_add_, (list(tensors), by))


class Spec(NamedTuple):
    """What a tensor is like, but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def fake_tensors(example_inputs: Sequence[object], specs: Sequence[Spec]) -> list[torch.Tensor]:
    """Fake tensors like these: in the fake mode that Dynamo traces with, outside of Dynamo in one of their own; no memory is
    taken in either (2.11 to 2.13)."""
    from torch._guards import detect_fake_mode
    from torch._subclasses import FakeTensorMode

    with detect_fake_mode(example_inputs) or FakeTensorMode():
        return [torch.empty_strided(*spec[:2], dtype=spec.dtype, device=spec.device) for spec in specs]


def is_plain(example: torch.Tensor) -> bool:
    """Whether Dynamo's example value stands for an ordinary tensor: no DTensor, no quantised or other subclass."""
    from torch._subclasses import FakeTensor

    return type(example) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, or Dynamo's example of one. Who has none has not loaded what makes them (2.11 to 2.13)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_tensor(x: torch.Tensor) -> torch.Tensor:
    """The tensor that a DTensor holds here, not a view of it as ``to_local`` gives (2.11 to 2.13)."""
    return x._local_tensor


def reads_local(node: fx.Node) -> bool:
    """Whether node is ``x.to_local()`` of a DTensor, without further arguments: a method, or in 2.11 a function of Dynamo's
    own making around it (2.11 to 2.13)."""
    if node.op == "call_method":
        return node.target == "to_local" and len(node.args) == 1 and not node.kwargs
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "prim_to_local":
        return False
    held = inspect.getclosurevars(node.target).nonlocals
    return not held.get("args_as_value") and not held.get("kwargs_as_value")


def join_ranks(count: int) -> tuple:
    """Make all processes, which are ``count``, the ranks of one split model, a process group where they are none yet.

    (what ``split_over`` takes, this rank's device), as ``from_pretrained(tp_plan="auto")`` makes them (5.17 to 5.24).
    """
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

    config, device, mesh = PreTrainedModel.prepare_distribute_model(DistributedConfig(tp_size=count))
    return (config, mesh), torch.device(device)


def split_over(joined: tuple, model: torch.nn.Module) -> torch.nn.Module:
    """Split a model of transformers' that has no memory yet: its parameters become DTensors without any (5.17 to 5.24).

    Tied weights are apart afterwards: transformers splits each by its own name, and ties them once they have values.
    """
    seen = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty_like(parameter)))
        seen.add(id(parameter))
    return model.maybe_distribute_model(model, *joined)


def is_plain_shard(placement: object) -> bool:
    """Whether each rank has one piece, cut as ``torch.chunk`` cuts, and not several (2.11 to 2.13)."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def summed_over_ranks(node: object) -> fx.Node | None:
    """x where node waits for the sum of all ranks' x, as Dynamo writes ``dist.all_reduce(x)`` (2.11 to 2.13)."""
    if not (is_collective(node, "wait_tensor") and is_collective(node.args[0], "all_reduce")):
        return None
    x, kind, *_ = node.args[0].args
    return x if kind == "sum" else None


def is_collective(node: object, *names: str) -> bool:
    """Whether node exchanges tensors between ranks by one of torch's functional collectives (2.11 to 2.13)."""
    if not isinstance(node, fx.Node) or not is_operator(node.target) or not torch.distributed.is_available():
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return any(packet is getattr(torch.ops._c10d_functional, name) for name in names)


def rank_of_sum(collective: fx.Node) -> tuple[int, int]:
    """(this rank, number of ranks) of those that an ``all_reduce`` of a graph adds up (2.11 to 2.13)."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(collective.args[2])
    return group.rank(), group.size()


def wraps_local(node: object) -> bool:
    """Whether node makes a DTensor of what this rank has (2.11 to 2.13)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(node, fx.Node) and node.target == module.DTensor.from_local


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Within it tensors are real, also while Dynamo or AOTAutograd traces with fake ones (2.11 to 2.13)."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def is_trace_failure(error: BaseException) -> bool:
    """Whether Dynamo raised it because it could not trace a model, not because a backend failed (2.11 to 2.13)."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    return isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)


@dataclass(frozen=True)
class Cut:
    """Where Dynamo cut a model into several graphs: the function, and the file that it stands in."""

    function: str
    file: str


def resumed_in(graph: fx.Graph) -> Cut | None:
    """The function behind whose graph break this graph begins; None where it begins with a function of the model's own.

    Dynamo gives the rest of a function a name of its own, which the nodes' stack traces hold (2.11 to 2.13).
    """
    for node in graph.nodes:
        found = re.search(r'File "([^"\n]+)", line \d+, in torch_dynamo_resume_in_(\w+)_at_\d+', node.stack_trace or "")
        if found:
            return Cut(found[2], found[1])
    return None


def freezes_weights() -> bool:
    """Whether Dynamo makes weights constants of the graph now, for Inductor to compute with (2.11 to 2.13)."""
    from torch._inductor import config

    return bool(config.freezing) and not torch.is_grad_enabled()


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of a dtype on this CPU, whichever way a matrix lies (2.11 to 2.13)."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked)())


def guard(node: fx.Node, holds: Callable[[object], bool], why: str) -> bool:
    """Make Dynamo compile anew as soon as ``holds(value)`` is false of what the placeholder ``node`` stands for.

    To be called by a backend, while it compiles. Returns whether there was something to guard: not outside of Dynamo. The
    guard stands at the root, beside the arguments: Dynamo skips guards on parameters as long as no module's dictionary
    changes (2.11 to 2.13). ``why`` is shown by TORCH_LOGS="recompiles".
    """
    from torch._guards import TracingContext

    source, context = getattr(node, "_dynamo_source", None), TracingContext.try_get()
    if source is None or context is None:
        return False
    name = _source_name(source)

    def check(builder, guard) -> None:
        # Dynamo's own spelling of where the value is found. Its scope without the arguments of the call that was traced:
        # a guard that held them would keep their model alive for as long as its code.
        value = eval(f"lambda L: {name}", {k: v for k, v in builder.scope.items() if k != "L"})

        def still_holds(frame_locals) -> bool:
            try:
                return holds(value(frame_locals))
            except (AttributeError, IndexError, KeyError, TypeError):
                return False  # another structure: other guards say so as well

        root = builder.guard_manager.root
        try:
            root.add_epilogue_lambda_guard(still_holds, [why], None)
        except TypeError:  # without a user's stack in older releases
            root.add_epilogue_lambda_guard(still_holds, [why])

    context.guards_context.dynamo_guards.add(source.make_guard(check))
    return True


#: Guards of Dynamo's on what is the same for a whole process; ``global_state`` says all of it.
GLOBAL_GUARDS = frozenset(("AUTOGRAD_SAVED_TENSORS_HOOKS", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE",
                           "GRAD_MODE", "TORCH_FUNCTION_STATE"))
OWN_GUARD = "check"  # what Dynamo calls a guard that ``guard`` made, by its function's name
_SAID_IN_PYTHON = frozenset(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "DUPLICATE_INPUT", "HASATTR", "SHAPE_ENV"))


@dataclass(frozen=True)
class GuardSeen:
    """One of Dynamo's guards. source: an expression over ``L`` and ``G``; value: what it is now.

    holds: expressions that are true, where Python says all that the guard asks for. key: the attribute or key that is, or is
    not, there.
    """

    kind: str
    source: str
    value: object
    holds: tuple[str, ...]
    key: object


def guards_seen(entries: Sequence) -> Iterator[GuardSeen]:
    """The guards that a ``guard_filter_fn`` is asked about (2.11 to 2.13)."""
    for entry in entries:
        guard = entry.orig_guard
        asked, source = getattr(guard.create_fn, "keywords", {}), _source_name(guard.originating_source)
        if entry.guard_type == "HASATTR" and not asked:  # in older releases the source ends in the attribute
            found = f"hasattr({_source_name(guard.originating_source.base)}, {guard.originating_source.member!r})"
            yield GuardSeen("HASATTR", source, None, (found if entry.has_value else f"not {found}",), None)
            continue
        said = tuple(guard.code_list or ()) if entry.guard_type in _SAID_IN_PYTHON else ()
        yield GuardSeen(entry.guard_type, source, entry.value, said, asked.get("key", asked.get("attr")))


#: What Dynamo itself puts something in the place of, once it compiles, to count a class's instances (2.11 to 2.13).
PATCHED_BY_DYNAMO = frozenset(((torch.nn.Module, "__init__"), (torch.nn.Module, "__setstate__")))


def input_source(node: fx.Node) -> str:
    """Where Dynamo takes a placeholder's value from, as an expression (2.11 to 2.13)."""
    return _source_name(node._dynamo_source)


def _source_name(source: object) -> str:
    """A source as Dynamo writes it; its name is a method in older releases, a property since."""
    return source.name() if callable(source.name) else source.name


def op_name(value: object) -> str | None:
    """The name of one of torch's registered operators; None for anything else (2.11 to 2.13)."""
    from torch._ops import OpOverload, OpOverloadPacket

    return str(value) if isinstance(value, (OpOverload, OpOverloadPacket)) else None


def dispatch_keys(tensor: torch.Tensor) -> int:
    """What torch chooses kernels by; tells inference tensors, conjugates and others from plain ones (2.11 to 2.13)."""
    return torch._C._dispatch_keys(tensor).raw_repr()


def global_state() -> tuple:
    """What a trace depends on that no argument and no module holds (2.11 to 2.13)."""
    from torch._functorch import config as functorch

    cuda = torch.backends.cuda
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(), str(torch.get_default_dtype()),
        str(torch.get_default_device()), torch.get_num_threads(), torch.get_float32_matmul_precision(),
        tuple((torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))) for device in devices),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch._dynamo.config.disable, str(torch._dynamo.eval_frame._stance.stance),
        *(name for config in (torch._dynamo.config, functorch) for name in _unlike_default(config)))


def modes_active() -> bool:
    """Whether a mode of torch's sees what is called, but for the one that sets the default device (2.11 to 2.13)."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return (any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
            or bool(_get_current_dispatch_mode_stack()))


def _unlike_default(config: object) -> Iterator[str]:
    """The settings of a module of torch's that somebody changed, those that are numbers or switches."""
    for name, value in sorted(config.get_config_copy().items()):
        if isinstance(value, (bool, int, float, type(None))) and value != config._config[name].default:
            yield f"{name}={value}"


def traced_code() -> list[CodeType]:
    """The code of all functions that Dynamo has gone through for the graph that it compiles now (2.11 to 2.13)."""
    from torch._guards import TracingContext

    return list(TracingContext.get_traced_code() or ())


def changes_objects() -> bool:
    """Whether the function that Dynamo compiles now leaves objects that it is given, or globals, otherwise than they were;
    tensors do not count (2.11 to 2.13)."""
    from torch._dynamo.side_effects import AttributeMutationExisting, ValueMutationExisting
    from torch._dynamo.symbolic_convert import tls

    translator = getattr(tls, "current_tx", None)
    if translator is None:
        return False
    effects = translator.output.side_effects
    return any(isinstance(variable.mutation_type, (AttributeMutationExisting, ValueMutationExisting))
               and not _written_back(variable, effects.store_attr_mutations.get(variable))
               for variable in effects._get_modified_vars())


def _written_back(variable: object, attributes: Mapping[str, object] | None) -> bool:
    """Whether all that is written to an object is what it holds: transformers sets a global aside for a while so."""
    from torch._dynamo.variables import UserDefinedObjectVariable

    if type(variable) is not UserDefinedObjectVariable or not attributes:
        return False
    held = getattr(variable.value, "__dict__", {})
    return all(name in held and new.is_python_constant() and type(new.as_python_constant()) is type(held[name])
               and new.as_python_constant() == held[name] for name, new in attributes.items())


_SAID_OF_GRAPH = ("backend_id", "dynamo_compile_id", "dynamo_flat_name_to_original_fqn")


@dataclass(frozen=True)
class _Shown:
    """What an example tensor shows, its sizes as symbols. What it shares memory with is not kept."""

    sizes: tuple
    strides: tuple
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, example: torch.Tensor) -> _Shown:
        return cls(tuple(example.shape), example.stride(), example.dtype, example.device)

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Ref:
    """A node of a pickled graph, by its name."""

    name: str


def pickled_graph(gm: fx.GraphModule) -> bytes:
    """A Dynamo graph with its example values and sources. Whatever pickle raises where it holds what cannot be pickled
    (2.11 to 2.13)."""
    from torch.fx._graph_pickler import GraphPickler
    from torch.utils._pytree import tree_map_only

    def refs(args: object) -> object:
        return fx.map_arg(args, lambda node: _Ref(node.name))

    nodes = []
    for node in gm.graph.nodes:
        example = tree_map_only(torch.Tensor, _Shown.of, node.meta.get("example_value"))
        lies = node.meta.get("tensor_dict", {}).get(_STATIC_INPUT)  # whether an input keeps its address, for CUDA graphs
        nodes.append((node.op, node.target, refs(node.args), refs(node.kwargs), node.name, node.type, example,
                      getattr(node, "_dynamo_source", None), lies))
    said = {name: gm.meta[name] for name in _SAID_OF_GRAPH if name in gm.meta}
    return GraphPickler.dumps((nodes, dict(gm._param_name_to_source), said))


@contextlib.contextmanager
def unpickled_graph(content: bytes) -> Iterator[tuple[fx.GraphModule, list[object]]]:
    """(graph, example values of its inputs) of ``pickled_graph``, within a context to compile it in (2.11 to 2.13)."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._pytree import tree_map_only

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    nodes, parameters, said = GraphPickler.loads(content, mode)
    graph, made = fx.Graph(), {}
    with mode, torch.no_grad():
        for op, target, args, kwargs, name, kind, example, source, lies in nodes:
            args, kwargs = (fx.node.map_aggregate(x, lambda x: made[x.name] if isinstance(x, _Ref) else x)
                            for x in (args, kwargs))
            made[name] = node = graph.create_node(op, target, args, kwargs, name, kind)
            node.meta["example_value"] = tree_map_only(_Shown, _Shown.tensor, example)
            if op == "placeholder":
                node._dynamo_source = source
                node.meta["tensor_dict"] = {} if lies is None else {_STATIC_INPUT: lies}
    gm = fx.GraphModule(torch.nn.Module(), graph)
    gm._param_name_to_source, gm.meta = parameters, said
    gm._source_to_user_stacks = {}  # whose being there is part of the key under which Inductor keeps what it compiled
    with tracing(TracingContext(mode)):
        yield gm, [node.meta["example_value"] for node in graph.find_nodes(op="placeholder")]


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Within, modules that were compiled in place, by ``module.compile()`` or by compiling ``module.forward``, run as they
    were written, so that another compilation sees them (2.11 to 2.13)."""
    changed: list[tuple[torch.nn.Module, str, object]] = []
    for module in model.modules():
        if module.__dict__.get("_compiled_call_impl") is not None:
            changed.append((module, "_compiled_call_impl", module._compiled_call_impl))
            module._compiled_call_impl = None
        forward = module.__dict__.get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable"):
            changed.append((module, "forward", forward))
            module.forward = forward._torchdynamo_orig_callable
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


@dataclass(frozen=True)
class _Compilation:
    """What Dynamo compiles at the moment: for which backend with which options, what, and after how many compilations."""

    backend: object
    options: object
    code: CodeType
    before: int


_allowed: list[tuple[Callable, Callable[[object, str, int], None]]] = []  # backends, and what is told at the last limit
_codes: weakref.WeakSet[CodeType] = weakref.WeakSet()  # what these backends have compiled
_limit_before: list[int] = []  # one entry while the limit is raised


def allow_recompilations(backend: Callable, exhausted: Callable[[object, str, int], None]) -> None:
    """Let code that is compiled by ``backend`` be compiled as often as ``accumulated_recompile_limit`` (256) allows.

    Dynamo counts the compilations of a code object, whoever asks for them, and all models of a class share one. From the
    ninth on (``recompile_limit``) it runs the code eagerly, for every backend and for good. Dynamo asks the hook that is
    registered here before it looks at its limits. For code that ``backend`` compiles, or has compiled, the hook raises the
    first limit, for this compilation only. Where the other limit is reached, ``exhausted(options, function, limit)`` is
    told, and may raise. Code that others compiled to the limit before stays eager: no one is asked (2.11 to 2.13).
    """
    from torch._dynamo import register_hook_for_recompile_user_context
    from torch._dynamo.utils import get_hook_for_recompile_user_context

    if all(other is not backend for other, _ in _allowed):
        _allowed.append((backend, exhausted))
    if _before_compilation not in (get_hook_for_recompile_user_context() or ()):
        register_hook_for_recompile_user_context(_before_compilation)


def _before_compilation() -> str:
    from torch._dynamo import callback, config

    _set_limit_back()  # where Dynamo gave up before it came to the callback
    compiling = _compilation()
    if compiling is None:
        return ""
    limit, code = config.accumulated_recompile_limit, compiling.code
    for exhausted in [told for backend, told in _allowed if backend is compiling.backend]:
        _codes.add(code)
        if compiling.before >= limit:
            exhausted(compiling.options, f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})", limit)
    if code in _codes and compiling.before < limit and config.recompile_limit < limit:
        _limit_before.append(config.recompile_limit)
        config.recompile_limit = limit
        if _set_limit_back not in callback.callback_handler.start_callbacks:  # torch.compiler.reset() clears them
            callback.on_compile_start(_set_limit_back)
    return ""


def _set_limit_back(*_: object) -> None:
    from torch._dynamo import config

    if _limit_before:
        config.recompile_limit = _limit_before.pop()


def _compilation() -> _Compilation | None:
    """Read off the frame of Dynamo's own function ``_compile``, which calls the hooks; None where that looks otherwise."""
    from torch._dynamo.eval_frame import innermost_backend

    frame = sys._getframe()
    while frame is not None and (frame.f_code.co_name, frame.f_globals.get("__name__")) != (
            "_compile", "torch._dynamo.convert_frame"):
        frame = frame.f_back
    if frame is None or not {"compiler_fn", "code", "compile_id"} <= frame.f_locals.keys():
        return None
    compiler, code, compile_id = (frame.f_locals[name] for name in ("compiler_fn", "code", "compile_id"))
    compiler = innermost_backend(compiler)  # torch.compile's wrapper around a backend and its options
    return _Compilation(getattr(compiler, "compiler_fn", compiler), getattr(compiler, "kwargs", {}).get("options"), code,
                        compile_id.frame_compile_id)


def size_form(size: int | torch.SymInt) -> object:
    """A size to compare: an int, or the expression behind a SymInt, equal only to what has the same form (2.11 to 2.13).

    To compare a SymInt asks whether the sizes are equal now, and binds the graph to the answer.
    """
    if isinstance(size, int):
        return size
    form = size.node.expr
    return int(form) if form.is_number else form


def concrete(sizes: object) -> object:
    """Ints in place of SymInts, those of the inputs that Dynamo traced with (2.11 to 2.13); tuples element by element."""
    if isinstance(sizes, tuple):
        return tuple(map(concrete, sizes))
    return sizes.node.hint if isinstance(sizes, torch.SymInt) else sizes


def inductor_options(mode: str | None) -> dict[str, object]:
    """Inductor's configuration for a ``torch.compile`` mode; ValueError for a name it does not know."""
    from torch._inductor import list_mode_options

    if mode is None or mode == "default":
        return {}
    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"unknown Inductor mode {mode!r}; choose one of {sorted(modes)} or None")
    return dict(modes[mode])


def compile_with_inductor(gm: fx.GraphModule, example_inputs: Sequence[object], mode: str | None, tag: str) -> Callable:
    """``compile_fx`` with a mode's options; takes ownership of ``gm`` (2.11 to 2.13).

    ``tag`` becomes part of the key under which compiled code is kept on disk, beside the user's own.
    """
    from torch._inductor.compile_fx import compile_fx

    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag + tag):
        return compile_fx(gm, list(example_inputs), config_patches=inductor_options(mode) or None)


@contextlib.contextmanager
def sizes_stay_apart() -> Iterator[None]:
    """Within it Dynamo takes no two dynamic sizes for one because they are equal at first (2.11 to 2.13).

    A prompt as long as a head is wide would otherwise have a graph of its own: the width is a constant, so the length is.
    Nor does it make inputs of a graph of the numbers in a model's code that are no sizes. Scalars that scale a branch or the
    stream are constants of the model, and known as such to all passes.
    """
    with torch.fx.experimental._config.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):
        yield


def mark_growing(tensor: torch.Tensor, dims: Sequence[int]) -> None:
    """Ask Dynamo for one graph whatever the sizes of ``dims``, which it may still fix where it must (2.11 to 2.13).

    The others are constants, also in a graph for all lengths: there Dynamo would make symbols of them, and find them to be
    constants one by one. For the caches of 32 layers that was a tenth of what it took to trace a prompt.
    """
    if getattr(tensor, "_larosa_growing", None) == tuple(dims):
        return  # marking the caches of 32 layers takes longer than all that is done with them before a prompt
    for dim in range(tensor.ndim):
        mark = torch._dynamo.maybe_mark_dynamic if dim in dims else torch._dynamo.mark_static
        mark(tensor, dim)
    tensor._larosa_growing = tuple(dims)


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within it a GGUF file is parsed once (5.17 to 5.24).

    transformers does so anew for the configuration, the tokenizer and the weights, and makes the table of tensors' names for
    each of them: of SmolLM2's 94 MiB, two thirds of half a minute.
    """
    try:
        import gguf
    except ImportError:  # transformers says so where it is needed
        yield
        return
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether accelerate keeps weights of a model elsewhere until they are needed (``device_map``, ``disk_offload``)."""
    return any(getattr(_align_hook(module), "offload", False) for module in model.modules())


def hooked(model: torch.nn.Module) -> str | None:
    """The name of a module around which accelerate moves weights or activations, where Dynamo does not follow; else None."""
    return next((name or type(module).__name__ for name, module in model.named_modules()
                 if _align_hook(module) is not None), None)


def execution_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: where its weights lie or, where accelerate offloads them, are brought to."""
    where = next((hook.execution_device for module in model.modules()
                  if (hook := _align_hook(module)) is not None and hook.offload), None)
    if where is None:
        return next(model.parameters()).device
    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)


def _align_hook(module: torch.nn.Module) -> object | None:
    """The hook that moves a module's weights, among those that accelerate gave it."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device") and hasattr(one, "offload"):
            return one
    return None


# ---- transformers ----------------------------------------------------------------------------------------------------


def compile_everywhere(config: object) -> None:
    """Let a ``CompileConfig`` compile on a CPU too, which ``generate`` by itself does not (transformers 5.17 to 5.24)."""
    config._compile_all_devices = True


def merged_generation_config(model: torch.nn.Module, given: object, kwargs: dict[str, object]):
    """The ``GenerationConfig`` that ``generate`` would follow: arguments, then ``given``, then the model's own."""
    return model._prepare_generation_config(given, **kwargs)[0]


@contextlib.contextmanager
def causal_prompts() -> Iterator[None]:
    """Within it a prompt that is all its cache holds, and has no padding, is traced without a mask: it is causal.

    transformers leaves such a mask out of eager calls alone: before torch 2.14 Dynamo looks like an exporter to it, whose
    graph would be causal for later prompts too (5.17 to 5.24). Dynamo's has guards, and each call is traced within this.
    """
    from transformers import masking_utils

    usual = masking_utils._ignore_causal_mask_sdpa
    masking_utils._ignore_causal_mask_sdpa = _needs_no_mask
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa = usual


def _needs_no_mask(padding_mask: torch.Tensor | None, q_length: int, kv_length: int, q_offset: object, kv_offset: object,
                   local_size: int | None = None) -> bool:
    """One function for all calls, since Dynamo's guards know it by its identity."""
    return padding_mask is None and local_size is None and q_length == kv_length


def prefill(model: torch.nn.Module, input_ids: torch.Tensor, generation_config: object, model_kwargs: dict[str, object]):
    """``generate``'s first forward pass over the prompt, in chunks where ``generation_config`` asks for them."""
    return model._prefill(input_ids, generation_config, model_kwargs)


def sample(model: torch.nn.Module, input_ids: torch.Tensor, logits_processor: object, stopping_criteria: object,
           generation_config: object, streamer: object | None, model_kwargs: dict[str, object]):
    """transformers' own loop of greedy decoding and sampling, from where ``custom_generate`` is called."""
    return model._sample(input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                         generation_config=generation_config, streamer=streamer, **model_kwargs)


def next_kwargs(model: torch.nn.Module, outputs: object, model_kwargs: dict[str, object]) -> dict[str, object]:
    """``model_kwargs`` with masks, positions and token types longer by the token that ``outputs`` lead to."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)


def pad_token(generation_config: object) -> torch.Tensor | None:
    """The padding token, a scalar tensor, as ``generate`` prepared it."""
    return generation_config._pad_token_tensor


def keep_outputs(model: torch.nn.Module) -> None:
    """Install the hooks that keep hidden states and attentions, which transformers does at the first call that asks for
    them, under a lock that Dynamo cannot trace (transformers 5.17 to 5.24)."""
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            maybe_install_capturing_hooks(module)


def asks_for_more(model: torch.nn.Module, kwargs: Mapping[str, object]) -> bool:
    """Whether a call of a model with these arguments is to return more than logits and a cache."""
    def asked(name: str) -> object:
        return kwargs[name] if kwargs.get(name) is not None else getattr(model.config, name, None)

    return kwargs.get("labels") is not None or asked("return_dict") is False or any(
        map(asked, ("output_hidden_states", "output_attentions", "output_router_logits")))


def cache_name(names: Container[str]) -> str | None:
    """What a cache is called among the names of arguments or of fields: "past_key_values" up to 5.23, "cache" since."""
    return next((name for name in ("past_key_values", "cache") if name in names), None)


def logits_with(cache: object, logits: torch.Tensor):
    """What a model returns that computed ``logits``, [B, T, V], over ``cache``."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(logits=logits, **{cache_name(CausalLMOutputWithPast.__annotations__): cache})


def decoding(model: torch.nn.Module):
    """The context in which ``generate`` decodes: experts as suit one token. Older releases have none."""
    return getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)()


def has_own_cache(model: torch.nn.Module) -> bool:
    """Whether a model decodes over a cache of its own making, which no static cache can stand in for (5.17 to 5.24)."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and not supports()


def has_own_generate(model: torch.nn.Module) -> bool:
    """Whether a model's ``generate`` is another than all others'."""
    from transformers import GenerationMixin

    return type(model).generate is not GenerationMixin.generate


def has_own_inputs(model: torch.nn.Module) -> bool:
    """Whether a model prepares the inputs of a step in a way of its own."""
    from transformers import GenerationMixin

    return type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation


@dataclass(frozen=True)
class CacheLayout:
    """What the layers of a model keep of each position.

    shapes: ((heads, size of a key), (heads, size of a value)) of each layer, None of one without attention; None as a whole
        where nothing says it.
    added: positions that the model itself puts before those of a prompt.
    """

    shapes: list[tuple[tuple[int, int], tuple[int, int]] | None] | None
    added: int = 0


def cache_layout(model: torch.nn.Module) -> CacheLayout:
    """What a pass over two tokens leaves in a cache; where the model cannot make one, or a rank has only a part of it, what
    transformers reads from the configuration (5.17 to 5.24)."""
    if not any(map(is_dtensor, model.parameters())) and (found := _observed_layout(model, tokens=2)) is not None:
        return found
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_attention_heads", None) is None or not hasattr(model, "_get_static_cache_init_shape"):
        return CacheLayout(None)
    shape = model._get_static_cache_init_shape()
    if shape is None:
        return CacheLayout(None)
    heads, sizes = ([n] * config.num_hidden_layers if isinstance(n, int) else n for n in shape)
    return CacheLayout([(layer, layer) for layer in zip(heads, sizes, strict=True)])


def _observed_layout(model: torch.nn.Module, tokens: int) -> CacheLayout | None:
    from transformers import DynamicCache

    def shape(x: torch.Tensor) -> tuple[int, int]:
        return x.shape[1], x.shape[3]

    forward = type(model).forward
    name = cache_name(inspect.signature(forward).parameters)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            forward(model, input_ids=ids, use_cache=True, **{name: cache})
        kept = [layer if isinstance(getattr(layer, "keys", None), torch.Tensor) else None for layer in cache.layers]
        shapes = [layer and (shape(layer.keys), shape(layer.values)) for layer in kept]
        return CacheLayout(shapes, max([0, *(layer.keys.shape[2] - tokens for layer in kept if layer)]))
    except Exception:  # whatever a model raises that cannot run so: one that was folded away, for instance
        return None


def causal_language_models() -> Mapping[type, type | tuple[type, ...]]:
    """Configuration class -> model class or classes, for all that AutoModelForCausalLM knows; imports them when read."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping


def register_eager_pre_hook(module: torch.nn.Module, hook: Callable) -> None:
    """Register a forward pre-hook that does nothing in compiled code; Dynamo does not see it (2.11 to 2.13).

    Else Dynamo traces torch's loop over hooks in each call of a module, which for all linears of a model is a fifteenth of
    a first call. Where a module has other hooks it traces them, and this one with them.
    """
    if not module._forward_pre_hooks:  # else somebody may hold the dict, to take a hook out again
        module._forward_pre_hooks = _EagerHooks(hook)
    module.register_forward_pre_hook(hook)


class _EagerHooks(OrderedDict):
    """Forward pre-hooks that are none while Dynamo traces in this thread and ``hook`` is the only one.

    Where Dynamo is told to guard that modules have no hooks, which is not its default, it sees how many there are.
    """

    def __init__(self, hook: Callable) -> None:
        super().__init__()
        self._hook = hook

    def __len__(self) -> int:
        count = super().__len__()
        if torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is None:
            return count  # the first is so where Dynamo traces this function itself, because there are others
        unseen = torch._dynamo.config.skip_nnmodule_hook_guards and next(iter(self.values()), None) is self._hook
        return 0 if unseen and count == 1 else count

    def only_own(self) -> bool:
        """Whether there is no hook but ours."""
        return super().__len__() == 1 and next(iter(self.values())) is self._hook

    def __reduce__(self) -> tuple:
        return type(self), (self._hook,), None, None, iter(self.items())


def is_own_hooks(hooks: object) -> bool:
    """Whether these are a module's hooks, and none but one of ``register_eager_pre_hook``."""
    return isinstance(hooks, _EagerHooks) and hooks.only_own()


def tracing() -> bool:
    """Whether torch writes a structured trace, for TORCH_TRACE (2.11 to 2.13)."""
    import torch._logging._internal as internal

    return bool(internal.trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Add a text to torch's structured trace, where there is one (2.11 to 2.13)."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


@contextlib.contextmanager
def attending_by(model: torch.nn.Module, attention: Callable) -> Iterator[None]:
    """Within it all layers of ``model`` attend by ``attention``, called as transformers' interface says, with a mask that is
    added to the scores, [B, 1, T, T]. What the model attended by before is private to its configuration."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name, before = "larosa_attention", model.config._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
