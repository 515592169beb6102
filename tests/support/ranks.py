"""What one rank of a model split by tensor parallelism does in tests/compiler/test_shards.py: run by torch.distributed.run.

It is given a directory with models, plans and ``tasks.pt``, and a kind of device, "cpu" or "cuda", and leaves in the
directory what it found, ``rank0.pt`` and so on.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import gc
import io
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Placement
from transformers import AutoModelForCausalLM

import decode
import larosa_fx
from larosa_fx import cli, packing, training
from larosa_fx.compiler import folds, pipeline
from larosa_fx.ir import compat, effects, shards
from larosa_fx.ir import graph as g
from larosa_fx.ir.recipe import Recipe
from larosa_fx.method import metering
from larosa_fx.serving import pack_files
from larosa_fx.training import checkpoint as checkpoint_files
from larosa_fx.training import loop
from tiny import compiled, tokenizer

TIMEOUT = datetime.timedelta(seconds=200)  # that a rank waits for another


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=dtype).eval()


def logits(path, ids, options, dtype=torch.float32):
    """Of the eager model and, for each of the options, of the compiled one, with its report."""
    model = load(path, dtype)
    ids = ids.to(model.device)
    with torch.no_grad():
        found = {"eager": model(ids).logits}
        for name, chosen in options.items():
            found[name] = compiled(model, strict=True, **chosen)(ids).logits, larosa_fx.last_report().to_dict()
    return found


def generate(path, ids, settings, calls, dtype=torch.float32, compiler="eager"):
    """What the model's own ``generate`` and the enabled one's give, and what the eager model says afterwards.

    Beside each report, how often a CUDA graph was replayed.
    """
    model, found = load(path, dtype), {}
    ids = ids.to(model.device)
    found["eager"] = without_cache(model.generate(ids, **calls))
    for name, chosen in settings.items():
        larosa_fx.enable(model, compiler=compiler, strict=True, **chosen)
        with decode.replays() as counted:
            output = without_cache(model.generate(ids, **calls))
        found[name] = output, larosa_fx.last_report().to_dict() | {"replays": len(counted)}
    found["eager afterwards"] = message(lambda: model.model.layers[0].mlp(
        torch.zeros(1, 1, model.config.hidden_size, dtype=dtype, device=model.device)))
    return found


def without_cache(output):
    output.past_key_values = None
    return output


def calibrate(path, batches):
    plan = larosa_fx.calibrate(load(path), batches, progress=False)
    return {"sites": plan.sites, "k": plan.k, "rotations": plan.rotations, "thresholds": plan.thresholds,
            "samples": plan.samples, "digest": plan.digest}


def train(path, plan, batches, validation, trainings, checkpoint, interrupted):
    """The plans that ``trainings``, options by name, end with, and that of one of them which was ``interrupted``.

    And what each rank ends with where the second has other batches or another checkpoint, and where the first cannot write.
    """
    model, plan = load(path, torch.float64), larosa_fx.Plan.load(plan)
    second = dist.get_rank() == 1

    def trained(options, batches=batches, **settings):
        return larosa_fx.train(model, plan, batches, validation, training.TrainingOptions(**options), progress=False,
                               **settings)

    found = {name: held(trained(options)) for name, options in trainings.items()}
    options, step, save = trainings[interrupted], loop._Trainer._step, checkpoint_files.save

    def stop(self, number):
        if number == options["validate_every"] + 1:
            raise KeyboardInterrupt
        return step(self, number)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loop._Trainer._step = stop
    try:
        trained(options, checkpoint=checkpoint)
    except KeyboardInterrupt:
        dist.barrier()
    finally:
        loop._Trainer._step = step
    found["left"] = Path(checkpoint).exists()
    found["other checkpoint"] = message(lambda: trained(options, checkpoint=checkpoint + ".none" if second else checkpoint))
    found["resumed"] = held(trained(options, checkpoint=checkpoint))
    dist.barrier()
    found["left afterwards"] = Path(checkpoint).exists()
    found["batches"] = message(lambda: trained(options, batches[:1 + second]))
    checkpoint_files.save = full
    try:
        found["full"] = message(lambda: trained(options, checkpoint=checkpoint))
    finally:
        checkpoint_files.save = save
    found["weights took gradients"] = any(p.grad is not None for p in model.parameters())
    return {**found, "estimate": str(training.estimate(model, plan, batches, validation))}


def held(plan):
    """What a trained plan holds."""
    return {"digest": plan.digest, "tensors": {**plan.matrices, **{f"{n}/t": t for n, t in plan.thresholds.items()}},
            "coefficients": plan.coefficients, "training": plan.provenance["training"]}


def refused(path, batches, plan):
    """What lossless decoding and different batches end with."""
    model = load(path)
    kept = larosa_fx.Plan.load(plan)
    calls = {"lossless": lambda: larosa_fx.enable(model, kept, lossless=True),
             "batches": lambda: larosa_fx.calibrate(model, batches[:1 + dist.get_rank()], progress=False)}
    return {name: message(call) for name, call in calls.items()}


def packs(path, plan, pack, ids, calls, quantize="none"):
    """What the packed model computes, and what the loaded one does; ``evaluated``: the recipes it was folded by."""
    model = load(path)
    ids = ids.to(model.device)
    larosa_fx.pack(model, plan, pack, tokenizer=tokenizer(), compiler="eager", quantize=quantize, shard_bytes=20_000)
    found = {"packed": answers(model, ids, calls)}
    evaluate, evaluated = Recipe.evaluate, []

    def watched(self, *args, device, **kwargs):
        if device.type != "meta":  # on the meta device for its shape alone
            evaluated.append(str(self))
        return evaluate(self, *args, device=device, **kwargs)

    Recipe.evaluate = watched
    try:
        loaded = larosa_fx.load(pack, compiler="eager", strict=True)
        found["loaded"] = answers(loaded, ids, calls)
    finally:
        Recipe.evaluate = evaluate
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (model, loaded)]
    return {**found, "evaluated": evaluated, "shapes": shapes, "report": larosa_fx.last_report().to_dict(),
            "held": sum(shards.local(p).untyped_storage().nbytes() for p in loaded.parameters()),
            "eager": message(lambda: loaded.model.layers[0].mlp(torch.zeros(1, 1, model.config.hidden_size)))}


def answers(model, ids, calls):
    return without_cache(model.generate(ids, **calls)), model(ids).logits


def packing_fails(path, plan, other_plan, there, out):
    """What packing ends with on each rank where one cannot write, has another plan, or the directory is there."""
    second = dist.get_rank() == 1
    model, write = load(path), pack_files.write_shards

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = {"another plan": message(lambda: larosa_fx.pack(model, other_plan if second else plan, out, compiler="eager")),
             "another format": message(lambda: larosa_fx.pack(model, plan, out, compiler="eager",
                                                              quantize="int8" if second else "none")),
             "another name": message(lambda: larosa_fx.pack(model, plan, out + " too" * second, compiler="eager")),
             "no plan": message(lambda: larosa_fx.pack(model, "none.larosa" if second else plan, out, compiler="eager")),
             "there": message(lambda: larosa_fx.pack(model, plan, there, compiler="eager"))}
    otherwise = load(path)
    otherwise.lm_head.weight = torch.nn.Parameter(otherwise.lm_head.weight.full_tensor())
    found["split otherwise"] = message(lambda: larosa_fx.pack(otherwise, plan, out, compiler="eager"))
    pack_files.write_shards = full if second else write
    try:
        found["full"] = message(lambda: larosa_fx.pack(model, plan, out, compiler="eager"))
    finally:
        pack_files.write_shards = write
    return found


def damaged_packs(pack, another, plan):
    """What loading ends with on each rank where a file of the second is missing or damaged, or plan or pack is another."""
    pack = Path(pack)
    damages = {
        "missing": lambda copy: next(copy.glob("larosa-rank1of2-00001*")).unlink(),
        "a bit": lambda copy: flip(next(copy.glob("larosa-rank1of2-00001*"))),
        "index": lambda copy: flip(copy / pack_files.INDEX),
        "plan": lambda copy: shutil.copy(plan, copy / pack_files.PLAN)}
    found = {}
    for name, damage in damages.items():
        copy = pack.with_name(f"{pack.name} {name}")
        if dist.get_rank() == 0:
            damage(Path(shutil.copytree(pack, copy)))
        dist.barrier()
        found[name] = message(lambda copy=copy: larosa_fx.load(copy))
    other = pack if dist.get_rank() == 0 else another
    found["two packs"] = message(lambda: larosa_fx.load(other))
    found["device"] = message(lambda: larosa_fx.load(pack, "meta"))
    return found


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def refused_pack(pack):
    return message(lambda: larosa_fx.load(pack))


def commands(path, plan, pack):
    """Exit status, output and errors of the commands on a pack of theirs."""
    found = {}
    packing.enable = functools.partial(larosa_fx.enable, compiler="eager")
    for name, arguments in {"pack": ["pack", path, plan, pack, "--compiler", "eager"],
                            "generate": ["generate", "--model", pack, "--prompt", "AB", "--tokens", "4"],
                            "serve": ["serve", "--model", pack]}.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
        found[name] = status, out.getvalue(), err.getvalue()
    packing.enable = larosa_fx.enable
    return found


def failing_pass(path, ids, options):
    """What all ranks compute, and say, where a pass fails on the second alone."""
    model = load(path)
    if dist.get_rank() == 1:
        def fails(ctx):
            raise KeyError("only here")

        steps = [replace(step, module=type(step.module)(step.module.__name__)) if step.name == "merge_siblings" else step
                 for step in pipeline.COMPILE]
        next(step for step in steps if step.name == "merge_siblings").module.run = fails
        pipeline.COMPILE = tuple(steps)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = {"eager": model(ids).logits, "compiled": compiled(model, **options)(ids).logits}
    return {**found, "treatment": larosa_fx.last_report().treatment,
            "said": [str(w.message) for w in said if str(w.message).startswith("larosa: ")]}


def missing_plan(path, ids, plan):
    """What each rank ends with where the second has no file of the plan: in compiling, and in enabling."""
    model = load(path)
    here = plan if dist.get_rank() == 0 else plan + ".missing"
    with torch.no_grad():
        return {"compiled": message(lambda: compiled(model, plan=here)(ids)),
                "enabled": message(lambda: larosa_fx.enable(model, here, compiler="eager"))}


def different_options(path, ids, plan):
    """What all ranks compute, and say, where the second is asked for what would hold the stream otherwise."""
    model, quantize = load(path), ("none", "int4")[dist.get_rank()]
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = {"eager": model(ids).logits,
                 "compiled": compiled(model, plan=plan, sparsity=0.0, quantize=quantize)(ids).logits}
    return {**found, "said": [str(w.message) for w in said if str(w.message).startswith("larosa: ")]}


def later_error(path, ids, plan, patience):
    """What each rank ends with where the second fails in a call of a graph that has served before, and goes on.

    The first waits for its part of a sum then: as long as the group's timeout, here so many seconds, says.
    """
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=patience), dist.group.WORLD)
    model = load(path)
    call = compiled(model, plan=plan, sparsify="all", strict=True)
    with torch.no_grad():
        call(ids)
        if dist.get_rank() == 1:
            larosa_fx.refold(model)
            folds._evaluate = None  # what folds
        started = time.monotonic()
        said = message(lambda: call(ids))
        waited = time.monotonic() - started
        if dist.get_rank() == 1:
            time.sleep(2 * patience)  # a process that ends would end the connection, and the waiting
    return {"said": said, "waited": waited}


def bench(sizes, file, arguments):
    """What bench/decode.py returns and prints for a tiny model, and the rows in its file."""
    decode.MODELS["tiny"] = ("llama", sizes)
    decode.read_bandwidth = lambda device: 1e9
    sys.argv = ["bench/decode.py", "--model", "tiny", "--device", "cpu", "--dtype", "float32", "--json", file, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = decode.main()
    dist.barrier()  # behind the first rank's last write
    return {"status": status, "printed": printed.getvalue(), "rows": json.loads(Path(file).read_text())["rows"]}


def metered_bytes(path, ids, plan):
    """Shares of the bytes here that tokens do not read by thresholds, and each site's share of the mask here."""
    model, plan, seen = load(path), larosa_fx.Plan.load(plan), {}
    with torch.no_grad():
        with metering.metered(model, plan, plan.sparsity) as meter:
            model(ids)
        with metering.thresholded(model, plan, plan.thresholds_at(), lambda site, read: seen.update({site.name: read})):
            model(ids)
    return meter.per_token(), seen


def memory():
    """The names of what shares memory with a split parameter, in a graph that writes to the part here."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Placement(0)]), requires_grad=False)
    found = []

    def backend(gm, _):
        parameter = next(node for node in gm.graph.nodes if isinstance(g.value(node), DTensor))
        found.extend("to_local" if compat.reads_local(node) else node.target
                     for node in effects.Memory(gm.graph).sharing(parameter) if node.op != "placeholder")
        found.append(parameter in effects.written_in_place(gm.graph))
        return gm

    def forward(x):
        weight.to_local().add_(1)
        return torch.nn.functional.linear(x, weight.to_local())

    with torch.no_grad():
        torch.compile(forward, backend=backend, fullgraph=True)(torch.zeros(1, 4))
    return found


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(directory, device):
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    found = {}
    for name, (task, arguments) in torch.load(directory / "tasks.pt", weights_only=False).items():
        torch.compiler.reset()
        torch.manual_seed(0)
        found[name] = globals()[task](**arguments)
    torch.save(found, directory / f"rank{dist.get_rank()}.pt")
    torch.compiler.reset()  # NCCL ends when no CUDA graph holds a sum of it any more
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]), sys.argv[2])
