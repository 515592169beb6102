"""The house: who imports whom, under which names, and what importing costs."""

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import larosa_fx

ROOT = Path(larosa_fx.__file__).resolve().parent.parent
ROOMS = {"kernels": ROOT / "kernels", "passes": ROOT / "passes"} | {
    path.name: path for path in (ROOT / "larosa_fx").iterdir() if (path / "__init__.py").is_file()}
MODULES = {f"larosa_fx.{path.stem}": path for path in (ROOT / "larosa_fx").glob("*.py") if path.stem != "__init__"} | {
    f"larosa_fx.{room}" + ("" if path.stem == "__init__" else f".{path.stem}"): path
    for room, folder in ROOMS.items() for path in folder.glob("*.py")}
#: What a room may import besides itself. The face, the modules of larosa_fx itself, stands on all of them.
BELOW = {
    "kernels": set(),
    "ir": {"kernels"},
    "passes": {"ir", "kernels"},
    "plan": {"ir"},
    "compiler": {"kernels", "ir", "passes", "plan"},
    "serving": {"kernels", "ir", "plan", "compiler"},
    "method": {"kernels", "ir", "passes", "plan", "compiler"},
    "training": {"ir", "plan", "compiler", "method"},
    "study": {"ir", "plan", "compiler", "method", "training", ""},
}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not a checkout")


def imports(name):
    """Dotted names of all modules that a module imports, wherever in it; "from a import b" is a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {name}"
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return found


def ours(name):
    return {found for found in imports(name) if found.partition(".")[0] in ("larosa_fx", "passes", "kernels")}


def test_modules_are_found():
    assert {"larosa_fx.ir.graph", "larosa_fx.passes.match", "larosa_fx.kernels.ops"} <= MODULES.keys()
    assert {"larosa_fx.ir.graph", "larosa_fx.ir.report"} <= ours("larosa_fx.passes.match")


def test_arrows_do_not_turn_back():
    TopologicalSorter({name: ours(name) & MODULES.keys() for name in MODULES}).prepare()


def room(name):
    """The room that a module stands in; "" for the face."""
    first = name.removeprefix("larosa_fx").removeprefix(".").partition(".")[0]
    return first if first in ROOMS else ""


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name)))
def test_arrows_point_down(name):
    above = {found for found in ours(name) if found != "larosa_fx" and room(found) not in BELOW[room(name)] | {room(name)}}
    assert not above


def test_rooms_are_on_floors():
    assert BELOW.keys() == ROOMS.keys()
    TopologicalSorter({name: below - {""} for name, below in BELOW.items()}).prepare()


#: Names with an underscore that torch documents: a tensor's version (notes on autograd), a module's own parameters.
DOCUMENTED = {"_version", "_parameters", "_modules", "_buffers"}
#: torch._C is asked for the file that it lies in, alone.
ALLOWED = {"larosa_fx.kernels.cpu": {"torch._C"}}


def private_names(tree):
    """What a module uses of others that starts with an underscore: modules, names imported from them, attributes. Not its
    own: of self and cls, or defined in this very file."""
    def hidden(name):
        return name.startswith("_") and not name.startswith("__")

    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                path = f"{module}.{alias.name}" if module else alias.name
                if any(map(hidden, path.split("."))):
                    yield path
        elif isinstance(node, ast.Attribute) and hidden(node.attr) and node.attr not in own | DOCUMENTED and not (
                isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield f"{ast.unparse(node.value)}.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr") and (
                isinstance(node.args[1], ast.Constant) and hidden(str(node.args[1].value))):
            yield f"{ast.unparse(node.args[0])}.{node.args[1].value}"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"larosa_fx.ir.compat"}))
def test_only_compat_uses_private_names(name):
    """torch's and transformers' private names change without notice: one file follows them."""
    assert set(private_names(ast.parse(MODULES[name].read_text()))) <= ALLOWED.get(name, set())


@pytest.mark.parametrize("code", ["import torch._dynamo", "from torch import _C", "from transformers.utils import _x",
                                  "config._compile_all_devices = True", "torch._ops.OpOverload",
                                  "getattr(model, '_prefill')"])
def test_private_names_are_seen(code):
    assert list(private_names(ast.parse(code)))


def test_two_folders_are_no_packages():
    """A regular package "kernels" at the root would shadow Hugging Face's."""
    for folder in ("passes", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", [".", "bench", "tests", "tests/support", "larosa_fx"])
def test_kernels_is_not_ours(folder):
    """transformers imports a top-level module "kernels" where there is one: from no folder of ours may it get a file.

    The folder at the root counts as none: a namespace package yields to any installed module and holds no code.
    """
    code = ("import importlib.util, json, sys\n"
            "found = importlib.util.find_spec('kernels')\n"
            "print(json.dumps(found and found.origin))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    origin = json.loads(done.stdout)
    assert origin is None or ROOT not in Path(origin).resolve().parents or ".venv" in Path(origin).parts
    assert importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin == origin


def test_packaging_names_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"].keys() == set(setuptools["packages"])
    for package, folder in setuptools["package-dir"].items():
        assert list((ROOT / folder).glob("*.py")), package
    for package, patterns in setuptools["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / setuptools["package-dir"][package]).glob(pattern)), f"{package} has no {pattern}"
    scripts, points = project["project"]["scripts"], project["project"]["entry-points"]
    for target in (*scripts.values(), *points["torch_dynamo_backends"].values()):
        assert target.partition(":")[0] in MODULES


def python(code):
    """What the code prints as JSON, in an interpreter of its own with the repository's root on sys.path."""
    code = f"import json, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_from_the_root():
    """Inductor stays unloaded, transformers imports beside the folder "kernels", modules have one name each, and
    torch.compile lists the backend without importing it."""
    inductor, loaded, listed, imported = python(
        "import larosa_fx\n"
        "inductor = [m for m in sys.modules if m.startswith('torch._inductor')]\n"
        "import transformers, larosa_fx.passes.match, larosa_fx.kernels.ops, torch\n"
        "from transformers import LlamaForCausalLM\n"
        "torch.ops.larosa.topk_select.default\n"
        "loaded = sorted(sys.modules)\n"
        "for name in [m for m in sys.modules if m.partition('.')[0] == 'larosa_fx']:\n"
        "    del sys.modules[name]\n"
        "listed = 'larosa' in torch.compiler.list_backends()\n"
        "print(json.dumps([inductor, loaded, listed, 'larosa_fx' in sys.modules]))")
    assert inductor == []
    assert {"transformers", "larosa_fx.passes.match", "larosa_fx.kernels.ops"} <= set(loaded)
    assert not {"passes", "passes.match", "kernels.ops"} & set(loaded)
    assert listed and not imported


def test_entry_point():
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="larosa")
    assert entry.value == "larosa_fx.compiler.backend:larosa"
