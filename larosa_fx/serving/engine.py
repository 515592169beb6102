"""What stands behind a model whose ``generate`` decodes sparsely: its plan, its compiled calls, its caches."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from larosa_fx.compiler import backend, folds
from larosa_fx.compiler.backend import LarosaError
from larosa_fx.compiler.calls import Calls, compiled, renamed
from larosa_fx.compiler.folds import STORE, Folded
from larosa_fx.compiler.options import Options
from larosa_fx.ir import compat, shards
from larosa_fx.ir.report import Report
from larosa_fx.kernels.pick import crossover
from larosa_fx.plan.plan import ATTACHED, Plan
from larosa_fx.serving import cache as caches
from larosa_fx.serving import drafting, loop
from larosa_fx.serving.pace import MOST, Pace

#: Inductor's mode where none is named. A GPU waits for its launches unless CUDA graphs replay them.
MODES = {"cuda": "reduce-overhead"}

_TOKEN_BY_TOKEN = ("greedy_search", "sample")
_OURS = (None, "static", "hybrid")  # "hybrid": what some models' files name, and transformers leaves out


@dataclass(frozen=True)
class Settings:
    """How a model decodes. ``options``: the backend's, for a step; ``sparse_rows``: sequences up to which it is sparse, None
    for those for which that is faster.

    lossless: sparse steps draft, and dense ones decide. draft_tokens: how many at a time, None for what measures best.
    """

    options: Options
    sparse_rows: int | None = None
    max_cache_len: int = 0
    lossless: bool = False
    draft_tokens: int | None = None

    @classmethod
    def of(cls, model: torch.nn.Module, *, mode: str | None, rotate_cache: bool | None, sparse_rows: int | None,
           max_cache_len: int | None, lossless: bool = False, draft_tokens: int | None = None, **options: object
           ) -> Settings:
        """With the device's best for what is None, and for mode "auto"."""
        if not isinstance(lossless, bool):
            raise ValueError(f"lossless is {lossless!r}; choose True or False")
        if lossless and any(map(shards.is_split, model.parameters())):
            raise ValueError("lossless=True does not work on a model that is split over several ranks: how many tokens are "
                             "drafted follows from measured times, which differ from rank to rank")
        if lossless and options.get("sparsify") == "all":
            raise ValueError("lossless=True gives dense decoding's tokens, and sparsify='all' sparsifies prompts, too; "
                             "choose one of them")
        if draft_tokens is not None and (isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int)
                                         or draft_tokens < 1 or not lossless):
            raise ValueError(f"draft_tokens is {draft_tokens!r}" + (
                "; give the number of tokens that lossless decoding drafts at a time, 1 or more" if lossless else
                ", and only lossless decoding drafts; pass lossless=True as well"))
        kind = model.device.type
        for name, number in (("sparse_rows", sparse_rows), ("max_cache_len", max_cache_len)):
            if number is not None and (not isinstance(number, int) or number < 0):
                raise ValueError(f"{name} is {number!r}; give a number of {'sequences' if 'rows' in name else 'tokens'}")
        if rotate_cache is None:  # where our own prompts are all that fills a cache, values may lie in it mapped
            rotate_cache = options["weights"] == "replace"
        mode = MODES.get(kind) if mode == "auto" else mode
        parsed = Options.parse({"mode": mode, "rotate_cache": rotate_cache, "rows": sparse_rows, **options})
        return cls(parsed, sparse_rows, max_cache_len or 0, lossless, draft_tokens)

    @property
    def owns(self) -> bool:
        """Whether prompts too need the folded weights: the original ones are gone, or cache other values."""
        return self.options.weights == "replace" or self.options.rotate_cache

    @property
    def compiles_prompts(self) -> bool:
        """Whether prompts go through folded weights: they need them, or are to be sparsified themselves."""
        return self.owns or self.options.sparsify == "all"


@dataclass
class Kept:
    """What the engines of one model share and keep: caches, compiled steps, what was folded from weights that are gone.

    rehearsed: by a plan's digest, whether a step's graph holds what the plan is for, where that was looked at.
    unfit: why the model cannot run over a static cache, once that was seen.
    steps: by options and tokens of a sequence. The graphs that read folded tensors keep them too, but graphs come and go
    (``torch.compiler.reset``).
    """

    pool: caches.CachePool = field(default_factory=caches.CachePool)
    folded: list[Folded] = field(default_factory=list)
    steps: dict[tuple[Options, int], Callable] = field(default_factory=dict)
    rehearsed: dict[str, bool] = field(default_factory=dict)
    unfit: str | None = None
    _made: int = -1  # STORE.made when it was looked through

    def let_go(self) -> None:
        """Hold no arguments of the steps that have run."""
        for step in self.steps.values():
            if isinstance(step, (Calls, _Growing)):
                step.let_go()

    def hold(self, parameters: Sequence[torch.Tensor]) -> None:
        if self._made != STORE.made:
            found = STORE.folded_from([p for p in parameters if STORE.is_replaced(p)])
            self.folded = list(dict.fromkeys((*self.folded, *found)))
            self._made = STORE.made


class _NotOver(Exception):
    """A model cannot run over the static cache that it was given, and why."""


class Engine:
    """Serves ``generate`` for one model. It is called as ``generate`` is."""

    def __init__(self, model: torch.nn.Module, plan: Plan, settings: Settings, kept: Kept) -> None:
        self.model, self.plan, self.settings = model, plan, settings
        self._kept, self._pool = kept, kept.pool
        self._pace: Pace | None = None
        self._prompts: dict[Callable, Callable] = {}
        self._said: set[str] = set()

    @property
    def sparse_rows(self) -> int:
        """Sequences at once up to which a step is sparse."""
        options, asked = self.settings.options, self.settings.sparse_rows
        if asked is not None:
            return asked
        topk = (options.selection or self.plan.selection) == "topk"
        return crossover(self.model.device.type, "dense" if options.quantize == "none" else options.quantize, topk=topk)

    def __call__(self, inputs: torch.Tensor | None = None, generation_config: object = None, *args: object,
                 streamer: object | None = None, **kwargs: object):
        """``model.generate``, sparsely where it can be; LarosaError under strict where it cannot."""
        parameters = compat.parameters(self.model)
        self._heed_rehearsals()
        attach(self.plan, self.model, parameters)
        folds.check(parameters)  # the weights may have been written to in a way that no call can afford to look for
        config = compat.merged_generation_config(self.model, generation_config, _settings(kwargs))
        reason = self._unserved(config, kwargs)
        if reason is not None:
            return self._leave(reason, inputs, generation_config, *args, streamer=streamer, **kwargs)
        own = caches.of(kwargs) is None
        if own and config.cache_implementation is None and (name := caches.argument_of(self.model)):
            kwargs[name] = caches.Later()
        elif own and generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.cache_implementation = "static"
        elif own:
            kwargs["cache_implementation"] = "static"
        if config.stop_strings is not None and "tokenizer" in kwargs:  # which generate keeps from a loop of one's own
            strings = StopStringCriteria(kwargs.pop("tokenizer"), config.stop_strings)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), strings])
            kwargs["stop_strings"] = None
        try:
            result = self._generate(inputs, generation_config, *args, streamer=streamer,
                                    custom_generate=partial(self._decode, streamer=streamer, own=own), **kwargs)
        finally:
            self._kept.let_go()
        if self.settings.options.weights == "replace":
            self._kept.hold(parameters)
        return result

    def forward(self, *args: object, **kwargs: object):
        """The whole model over any number of tokens, through the folded weights: densely, exact up to rounding, or with
        every token sparsified."""
        if torch.compiler.is_compiling():
            raise RuntimeError("larosa: this model was enabled with weights='replace' and is compiled already; call it as "
                               "it is, or load the model again")
        self._heed_rehearsals()
        if not self.settings.compiles_prompts:
            return type(self.model).forward(self.model, *args, **kwargs)
        if isinstance(cache := caches.of(kwargs), StaticCache):
            self._check_values(cache)
        mask = kwargs.get("attention_mask")
        if caches.begins(cache) and isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.all():
            kwargs["attention_mask"] = None
        # What else a model may return, its last hidden state say, is another reader of what is folded: a step has none.
        if more := compat.asks_for_more(self.model, kwargs):
            compat.keep_outputs(self.model)
        for_logits = cache is not None and not args and not more
        with torch.no_grad(), compat.sizes_stay_apart(), compat.causal_prompts():
            if not for_logits:
                outputs = self._prompt_of(_outputs)(self.model, *args, **kwargs)
            else:
                kwargs.pop("return_dict", None)
                prompt = self._prompt_of(_logits)
                try:
                    outputs = compat.logits_with(cache, prompt(self.model, **kwargs))
                finally:
                    prompt.let_go()
        if isinstance(cache, caches.Prompt):
            tokens = next(kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None)
            cache.advance(tokens.shape[1])
        return outputs

    def _prompt_of(self, function: Callable) -> Callable:
        """``function`` compiled for any number of tokens."""
        if function not in self._prompts:
            # Op by op: the products of a prompt keep a device busy, and a graph for all lengths is there in a moment.
            options = replace(self.settings.options, compiler="eager", mode=None)
            if options.sparsify != "all":
                options = replace(options, sparsity=0.0)
            compile_it = Calls if function is _logits else compiled
            self._prompts[function] = compile_it(function, options, dynamic=True)
        return self._prompts[function]

    def _generate(self, *args: object, **kwargs: object):
        return type(self.model).generate(self.model, *args, **kwargs)

    @contextlib.contextmanager
    def _owning(self) -> Iterator[None]:
        """Within it the model's own forward pass is ``forward``, where prompts go through folded weights."""
        before = self.model.__dict__.get("forward")
        if not self.settings.compiles_prompts or before is not None:
            yield
            return
        self.model.forward = Method(self.model, "forward", self.forward)
        try:
            yield
        finally:
            del self.model.forward

    # ---- what cannot be served -------------------------------------------------------------------------------------

    def _unserved(self, config: object, kwargs: Mapping[str, object]) -> str | None:
        """Why a call is left to transformers' own loop, which decodes densely; None where it is not."""
        if self.model.config.is_encoder_decoder:
            return "encoder-decoder models are not decoded sparsely"
        if compat.has_own_cache(self.model):
            return "this model decodes over a cache of its own making"
        if kwargs.get("custom_generate") is not None:
            return "custom_generate brings a loop of its own"
        if kwargs.get("synced_gpus"):
            return "synced_gpus=True keeps several processes in step"
        cache = caches.of(kwargs)
        if cache is None and self._kept.unfit:
            return self._kept.unfit
        if cache is not None and not (isinstance(cache, StaticCache) and cache.is_compileable and not cache.offloading):
            return f"past_key_values is a {type(cache).__name__}, and sparse steps need a StaticCache"
        mode = config.get_generation_mode(kwargs.get("assistant_model")).value
        if mode not in _TOKEN_BY_TOKEN:
            return f"{mode.replace('_', ' ')} is not decoded sparsely"
        if config.use_cache is False:
            return "use_cache=False runs the whole sequence for every token"
        if config.cache_implementation not in _OURS:
            return f"cache_implementation={config.cache_implementation!r} is asked for, and sparse steps need a static cache"
        if config.disable_compile:
            return "disable_compile=True is asked for"
        if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
            return "attentions and hidden states are not kept by compiled steps"
        if added := self._pool.layout(self.model).added:
            return f"this model puts {added} positions of its own before a prompt"
        return None

    def _leave(self, reason: str, *args: object, **kwargs: object):
        if self.settings.options.sparsify != "all":  # else every pass that the loop makes is sparse
            self._dense(f"{reason}; transformers' own loop runs instead")
        if self.settings.compiles_prompts:  # compiling around the compiled forward pass would trace through it
            kwargs["disable_compile"] = True
        with self._owning():
            return self._generate(*args, **kwargs)

    def _dense(self, reason: str) -> None:
        """Say once why a call decodes densely; LarosaError under strict."""
        if self.settings.options.strict:
            raise LarosaError(f"larosa (strict): this would decode densely: {reason}")
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"larosa: decodes densely: {reason}", stacklevel=4)

    # ---- serving ---------------------------------------------------------------------------------------------------

    def _decode(self, model: torch.nn.Module, input_ids: torch.Tensor, *, logits_processor: LogitsProcessorList,
                stopping_criteria: StoppingCriteriaList, generation_config: object, own: bool,
                streamer: object | None = None, synced_gpus: bool = False, **model_kwargs: object):
        """The loop that ``generate`` calls once it has prepared everything. ``own``: the cache is not a user's."""
        rows, new = len(input_ids), stopping_criteria.max_length - input_ids.shape[1]
        cache = caches.of(model_kwargs)
        if own:
            prompt = model_kwargs.get("inputs_embeds", input_ids)
            verified = (self.settings.draft_tokens or MOST) if self.settings.lossless else 0  # beyond what is asked for
            cache = self._pool.take(model, rows, prompt.shape[1] + new - 1 + verified, self.settings.max_cache_len)
        else:
            self._check_values(cache)
        lent = None
        run = loop.Run(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        try:
            self._tokens(cache, caches.with_cache(model_kwargs, cache), run, new, own)
            if own and generation_config.return_dict_in_generate:
                lent = self._pool.lend(cache, rows)
                lent.larosa_mapping = self._mapping
        except _NotOver as error:
            self._dense(f"{error}; transformers' own loop runs instead")
            self._give_up_nothing()
            growing = DynamicCache(config=model.config.get_text_config(decoder=True))
            tokens = compat.sample(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
                                   caches.with_cache(model_kwargs, growing))
            self._kept.unfit = str(error)  # now that it was the cache, and not what the call asks for
            return tokens
        finally:
            if own and lent is None:  # also where a streamer breaks off, because nobody listens any more
                self._pool.give_back(cache, rows)
        if streamer is not None:
            streamer.end()
        return run.output(lent or cache)

    @property
    def _mapping(self) -> str | None:
        """What names the maps of values in the caches that are filled here; None where they lie as the model has them."""
        return self.plan.digest if self.settings.options.rotate_cache and self.plan.heads else None

    def _check_values(self, cache: StaticCache) -> None:
        """LarosaError where a user's cache holds values that were mapped otherwise than they would be read."""
        if not caches.lies_alike(cache, self._mapping):
            raise LarosaError("larosa: past_key_values was filled by another model, plan or setting of rotate_cache than "
                              "reads it, which would misread its values; pass an empty StaticCache, or rotate_cache=False "
                              "to both")

    def _tokens(self, cache: StaticCache, model_kwargs: dict[str, object], run: loop.Run, new: int, own: bool) -> None:
        """Prompt and decoding, of at most ``new`` tokens."""
        before, config = run.length, run.generation_config
        if caches.keeps_states(cache):
            try:
                fits = self._may_give_up(run, model_kwargs)
            except _NotOver:
                if own:
                    raise
                fits = False  # a user's cache may be short enough
            if self.settings.owns and not fits:
                self._give_up_nothing()
        logits, filled = self._prompt(cache, run.input_ids, config, model_kwargs, empty=own)
        stays = caches.every_position_stays(cache)
        if stays and filled + new - 1 > caches.capacity(cache):
            raise ValueError(f"larosa: past_key_values holds {caches.capacity(cache)} positions, and {filled + new - 1} are "
                             "asked for; make a longer StaticCache, or lower max_new_tokens")
        # A pass too many is undone where the cache is seen again and can be undone; else none is made.
        ahead = run.input_ids.device.type == "cuda" and (stays or (own and not config.return_dict_in_generate))
        undo = partial(_undo, cache, stays) if ahead else None
        inputs = loop.StepInputs(self.model, model_kwargs, filled, before)
        calls = backend.calls()
        with compat.decoding(self.model):
            how = self._losslessly if self.settings.lossless and stays and len(run.input_ids) == 1 else self._plainly
            remarks = how(inputs, run, logits, cache, undo)
        if backend.calls() != calls:
            report = backend.last_report()
            for name, remark in remarks.items():
                setattr(report, name, remark)
            if "reason" not in remarks and (reason := _why_dense(report)):
                self._dense(f"no site of a step is sparse: {reason}")
        elif run.length > before + 1:
            self._dense("no compiled graph was reached")

    def _heed_rehearsals(self) -> None:
        """Give up nothing where another engine of the model has found that it must not be, while all of it is there."""
        kept = self._kept
        if (kept.unfit or kept.rehearsed.get(self.plan.digest) is False) and self.settings.owns and not any(
                map(STORE.is_replaced, self.model.parameters())):
            self._give_up_nothing()

    def _give_up_nothing(self) -> None:
        options = replace(self.settings.options, weights="copy", rotate_cache=False)
        self.settings = replace(self.settings, options=options)

    def _may_give_up(self, run: loop.Run, model_kwargs: dict[str, object]) -> bool:
        """Whether the model's weights may be given up: not where a step's graph is none of the plan's.

        A recurrence goes over a prompt in another way than over one token, so its linears may be found in one of the two
        graphs alone. Once a prompt's graph has folded the weights, there are none that a dense step could read.
        """
        known, digest = self._kept.rehearsed, self.plan.digest
        if digest not in known:  # a pack's weights are gone already
            gone = any(map(STORE.is_replaced, self.model.parameters()))
            known[digest] = gone or self._rehearse(run, model_kwargs)
        return known[digest]

    def _rehearse(self, run: loop.Run, model_kwargs: dict[str, object]) -> bool:
        """Whether a step behind this prompt is sparse, found by tracing it with the model's own weights in a cache apart."""
        options = replace(self.settings.options, weights="copy", rotate_cache=False, mode=None)
        longest = caches.beyond_windows(self.model, caches.capacity(caches.of(model_kwargs)) or run.length + 1)
        kwargs = caches.with_cache(model_kwargs, StaticCache(config=self.model.config.get_text_config(decoder=True),
                                                             max_cache_len=longest))
        forward = self.model.__dict__.pop("forward", None)
        try:
            with self._over(longest):
                compat.prefill(self.model, run.input_ids, run.generation_config, kwargs)
            one_more = torch.cat([run.input_ids, run.input_ids.new_zeros(len(run.input_ids), 1)], dim=1)
            inputs = loop.StepInputs(self.model, kwargs, caches.filled(caches.of(kwargs)), run.length).after(one_more)
            return backend.rehearse(renamed(_logits), options, self.model, **inputs).treatment != "dense"
        except RuntimeError as error:
            if not compat.is_trace_failure(error):
                raise
            if not (stays := caches.every_position_stays(caches.of(kwargs))):
                with self._over(longest):
                    _logits(self.model, **inputs)  # as it would then be, see _other_step
            return stays
        finally:
            if forward is not None:
                self.model.forward = forward

    @contextlib.contextmanager
    def _over(self, positions: int) -> Iterator[None]:
        """Within it a model runs as transformers has it, over a static cache; _NotOver where it fails."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model makes of it
            raise _NotOver(f"over a static cache of {positions} positions this model fails ({_brief(error)})") from error

    def _plainly(self, inputs: loop.StepInputs, run: loop.Run, logits: torch.Tensor, cache: StaticCache,
                 undo: Callable[[], None] | None) -> dict[str, object]:
        """Decode token by token, sparsely, or densely where that is faster or asked for. Returns what a report is to say."""
        rows, limit, sparsity, reason = len(run.input_ids), self.sparse_rows, self.settings.options.sparsity, ""
        if self.settings.lossless and rows > 1:
            reason = f"{rows} sequences at once: lossless decoding drafts for one alone"
        elif self.settings.lossless:
            reason = "not every layer of the cache keeps every position, so refused drafts could not be taken back"
        elif rows > limit:
            reason = (f"{rows} sequences at once: above {limit}, reading all weights once is faster here than reading each "
                      "sequence's share; option sparse_rows sets another limit")
        if reason:
            self._dense(reason)
            sparsity = 0.0
        loop.decode(self._step(sparsity, watched=run.watched), inputs, run, logits, undo)
        return {"drafting": None, **({"reason": reason} if reason else {})}

    def _losslessly(self, inputs: loop.StepInputs, run: loop.Run, logits: torch.Tensor, cache: StaticCache,
                    undo: Callable[[], None] | None) -> dict[str, object]:
        """Draft sparsely and decide densely. Returns what a report is to say."""
        if self._pace is None:
            asked = self.settings.options.sparsity
            self._pace = Pace(self.model.device, self.plan.sparsity if asked is None else asked, adapts=asked is None,
                              tokens=self.settings.draft_tokens)
        step = partial(self._step, watched=run.watched)
        steps = drafting.Steps(step, step(0.0), partial(step, 0.0))
        drafting.decode(steps, inputs, run, logits, cache, self._pace, undo, self._dense)
        return {"drafting": self._pace.report}

    def _prompt(self, cache: StaticCache, input_ids: torch.Tensor, generation_config: object,
                model_kwargs: dict[str, object], *, empty: bool) -> tuple[torch.Tensor, int]:
        """Fill the cache with the prompt. Returns its logits and how many positions the cache holds then.

        ``empty``: whether nothing can be in the cache, so that no one need wait for the device to ask.
        """
        view = None
        shapes = self._pool.layout(self.model).shapes
        if caches.prepare(cache, self.model, shapes, len(input_ids)) and caches.every_position_stays(cache):
            view = caches.Prompt(cache, 0 if empty else caches.filled(cache))
            model_kwargs = caches.with_cache(model_kwargs, view)
        with self._owning():
            logits = compat.prefill(self.model, input_ids, generation_config, model_kwargs).logits
        if view is None:
            return logits, caches.filled(cache)
        view.settle(cache.layers)
        return logits, caches.filled(view)

    def _step(self, sparsity: float | None, tokens: int = 1, *, watched: bool) -> loop.Step:
        """The compiled forward pass of so many tokens of a sequence. Each has code of its own, so that its graph fits it
        alone. All engines of a model share them. watched: whether somebody's own code runs in between, which may change the
        model."""
        options = replace(self.settings.options, sparsity=sparsity)
        steps, key = self._kept.steps, (options, tokens)
        if key not in steps:
            steps[key] = Calls(_logits, options)

        def step(**inputs: object) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            if watched and isinstance(steps[key], (Calls, _Growing)):
                steps[key].look_again()
            try:
                return steps[key](self.model, **inputs)
            except RuntimeError as error:
                if not compat.is_trace_failure(error):
                    raise
                steps[key] = self._other_step(options, caches.of(inputs), _brief(error))
            return steps[key](self.model, **inputs)

        return step

    def _other_step(self, options: Options, cache: StaticCache, failure: str) -> Callable:
        """For a model that Dynamo cannot trace over a static cache: in Python it asks how long that is, which a tensor says.

        Over a view whose length is a size the same step can be traced, though no CUDA graph replays it.
        """
        if caches.every_position_stays(cache):
            return _Growing(Calls(_logits, replace(options, mode=None), dynamic=True))
        reason = f"torch.compile cannot trace a step of this model: {failure}"
        if self.settings.owns:
            raise LarosaError(f"larosa: {reason}. The model's weights were given up for folded ones, so nothing else can "
                              "run it; load it again, and enable it with weights='copy', which leaves such a model dense")
        self._dense(reason)
        return _logits


def attach(plan: Plan, model: torch.nn.Module, parameters: Sequence[torch.Tensor]) -> None:
    """Make ``plan`` the one that graphs of a model, with these parameters, find. PlanError where it is another model's.

    LarosaError where the weights were folded with other rotations and are gone.
    """
    current = ATTACHED.find(parameters)
    if current is plan:
        return
    if not any(map(STORE.is_replaced, parameters)):
        plan.attach(model)
        return
    if current is None or current.digest != plan.digest:
        raise LarosaError("larosa: the model's weights were folded for another plan with weights='replace' and are gone; "
                          "load the model again, or enable it with weights='copy'")
    ATTACHED.attach(plan, [model.get_parameter(name) for site in plan.sites for name in site.weights])


class Method:
    """A method of one model in the place of its class's, with its signature; a copy of the model has its class's again."""

    def __init__(self, model: torch.nn.Module, name: str, call: Callable) -> None:
        self._model, self._name, self._call = model, name, call
        functools.update_wrapper(self, getattr(type(model), name).__get__(model))

    def __call__(self, *args: object, **kwargs: object):
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable:
        return getattr(type(self._model), self._name).__get__(memo[id(self._model)])


def _undo(cache: StaticCache, stays: bool) -> None:
    if stays:
        caches.forget(cache, 1)


def _why_dense(report: Report) -> str:
    """Why a step that keeps fewer channels than there are multiplies by all of them, where the backend has not said so."""
    asked = [site for site in report.sites if site.k < site.channels]
    if any(site.form != "dense" or site.unserved for site in asked):
        return ""
    return "; ".join(dict.fromkeys(site.reason for site in asked))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _settings(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of ``generate`` that a GenerationConfig may know; tensors and caches are none of its business."""
    return {name: value for name, value in kwargs.items() if not isinstance(value, (torch.Tensor, Cache))}


def _outputs(model: torch.nn.Module, *args: object, **kwargs: object):
    return type(model).forward(model, *args, **kwargs)


def _logits(model: torch.nn.Module, **inputs: object) -> torch.Tensor:
    return type(model).forward(model, **inputs, return_dict=True).logits


class _Growing:
    """A compiled forward pass over a view of the cache that is as long as what it holds."""

    def __init__(self, forward: Calls) -> None:
        self._forward, self.let_go, self.look_again = forward, forward.let_go, forward.look_again

    def __call__(self, model: torch.nn.Module, **inputs: object) -> torch.Tensor:
        cache = caches.of(inputs)
        view = caches.Prompt(cache, caches.filled(cache))
        logits = self._forward(model, **caches.with_cache(loop.masks_up_to(inputs, view.get_seq_length()), view))
        view.advance(logits.shape[1])
        view.settle(cache.layers)
        return logits
