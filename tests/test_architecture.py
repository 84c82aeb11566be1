"""The floors of the house, checked on the syntax tree of every file: imports go down only (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vtp"
FLOORS = (
    {"config", "dist", "files", "images", "schedules", "tokenizers"},
    {"models", "objectives", "flow", "metrics", "data", "engine"},
    {"pretrain", "finetune", "generation", "evaluation"},
    {"recipes", "studies", "report"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = sys.stdlib_module_names | {"torch", "omegaconf", "jaxtyping"}  # all that floor 0 stands on
SLOW = {  # seconds to import, so imported by the function that needs them
    *("transformers", "open_clip", "torchmetrics", "torch_fidelity", "lpips", "diffusers", "matplotlib", "sklearn"),
    *("onnx", "onnxscript", "onnxruntime", "wandb"),
    *("scipy", "webdataset", "torchvision", "tensorboard", "datasets", "timm"),
}
SUBCLASSES = {  # who subclasses whose classes, and so imports them at once
    *(("transformers", f"vtp.models.{name}") for name in ("vtp_hf", "vtp_hf_processing")),
    ("diffusers", "vtp.models.diffusers_vae"),
}
JUNK_DRAWERS = {"util", "utils", "common", "helper", "helpers", "misc"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def check(source: str, module: str) -> list[str]:
    """Lines "path:line: rule" for everything in a file of this dotted name that breaks a rule of the house."""
    parts = module.split(".")
    path = "/".join(parts) + ".py"
    room = "" if parts[1] == "__init__" else parts[1]  # the package's own file: no floor, all may read it
    found = []
    if room and room not in FLOOR:
        found.append(f"{path}:1: '{room}' is no room of the house; rooms are {', '.join(FLOOR)}")
    if JUNK_DRAWERS & set(parts):
        found.append(f"{path}:1: there are no {', '.join(sorted(JUNK_DRAWERS))}: a helper lives with its caller")
    tree = ast.parse(source)
    for line, name, at_import in imports(tree, parts):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "vtp" and other in FLOOR and other != room:
            if not room or FLOOR[other] > FLOOR.get(room, -1):
                found.append(f"{path}:{line}: imports {name}, upwards; imports go down only")
            elif FLOOR[other] == FLOOR[room]:
                found.append(f"{path}:{line}: imports {name}, sideways; rooms of floor {FLOOR[room]} are strangers")
        if FLOOR.get(room) == 0 and room != "tokenizers" and top not in GROUND | {"vtp"}:
            found.append(f"{path}:{line}: imports {name}; floor 0 stands on torch, omegaconf and the standard library")
        if at_import and top in SLOW and (top, module) not in SUBCLASSES:
            found.append(f"{path}:{line}: imports {top} when it is imported; import it in the function that uses it")
        if top in PICKLES:
            found.append(f"{path}:{line}: imports {top}; nothing that a run reads is a pickle")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                found.append(f"{path}:{node.lineno}: torch.load without weights_only=True; that is a pickle")
            if given.get("allow_pickle") is True:
                found.append(f"{path}:{node.lineno}: allow_pickle=True; nothing that a run reads is a pickle")
    return found


def imports(tree: ast.AST, parts: list[str]) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute name, whether it runs when the file is imported) of everything imported below this node.

    `from vtp import x` counts as vtp.x, `from . import x` in vtp/room/file.py as vtp.room.x.
    """

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(parts[: -node.level] if node.level else []), *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "vtp" else [base]
            yield from ((node.lineno, name, at_import) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, arg.value, at_import) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_import)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_import)

    yield from walk(tree, True)


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=dotted)
def test_house_rules(file: Path):
    broken = check(file.read_text(), dotted(file))
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("vtp.models.vit", "from vtp.pretrain.config import PretrainConfig", "upwards"),
        ("vtp.models.vit", "def f():\n    import vtp.cli", "upwards"),
        ("vtp.models.vit", "if TYPE_CHECKING:\n    from vtp.evaluation import probes", "upwards"),
        ("vtp.objectives.clip", "from vtp.models.vit import Tokens", "sideways"),
        ("vtp.objectives.clip", "from ..models import vit", "sideways"),
        ("vtp.objectives.clip", "from .. import models", "sideways"),
        ("vtp.pretrain.run", "from vtp import evaluation", "sideways"),
        ("vtp.studies.sweep", "import importlib\nimportlib.import_module('vtp.recipes.pretrain')", "sideways"),
        ("vtp.images", "from vtp.config import ConfigError", "sideways"),
        ("vtp.__init__", "from vtp.models.vtp_hf import VTPModel", "upwards"),
        ("vtp.images", "import numpy as np", "floor 0 stands on"),
        ("vtp.engine.utils", "", "a helper lives with its caller"),
        ("vtp.extras.thing", "", "no room of the house"),
        ("vtp.data.loader", "import webdataset as wds", "in the function that uses it"),
        ("vtp.data.loader", "class A:\n    from torchvision.transforms import v2", "in the function that uses it"),
        ("vtp.models.vit", "try:\n    import transformers\nexcept ImportError: ...", "in the function that uses it"),
        ("vtp.engine.checkpoint", "import pickle", "pickle"),
        ("vtp.engine.checkpoint", "import torch\ntorch.load('x')", "weights_only"),
        ("vtp.engine.checkpoint", "import torch\ntorch.load('x', weights_only=False)", "weights_only"),
        ("vtp.generation.latents", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
    ],
)
def test_the_checker_sees(module: str, source: str, rule: str):
    (broken,) = check(source, module)
    assert rule in broken
    assert broken.startswith(f"{module.replace('.', '/')}.py:{max(1, len(source.splitlines()))}: ") or "try" in source


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vtp.models.vtp_hf", "from transformers import PreTrainedModel"),
        ("vtp.models.diffusers_vae", "try:\n    import diffusers\nexcept ImportError: ..."),
        (
            "vtp.models.vit",
            "from vtp import images\nfrom vtp.models import layers\nfrom .rope import rope",
        ),
        ("vtp.data.loader", "def f():\n    import webdataset\nif TYPE_CHECKING:\n    import torchvision"),
        ("vtp.cli", "from vtp.recipes import PRETRAIN\ndef f():\n    from vtp.models.vtp_hf import VTPModel"),
        ("vtp.tokenizers", "import regex\ndef f():\n    import open_clip"),
        ("vtp.engine.checkpoint", "import torch\ntorch.load('x', weights_only=True)\nfrom vtp import __version__"),
    ],
)
def test_the_checker_lets_pass(module: str, source: str):
    assert check(source, module) == []


def test_help_imports_nothing_slow():
    """`vtp --help` answers at once, because it knows no torch."""
    program = (
        "import sys\nfrom vtp.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        f"slow = sorted({{'torch', 'numpy', 'omegaconf', *{sorted(SLOW)}}} & set(sys.modules))\n"
        "assert not slow, f'vtp --help imports {slow}'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout
