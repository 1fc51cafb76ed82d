"""Folders are floors: imports go down only, in no circle, and every outside library has its rooms."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS: list[str | tuple[str, ...]] = [
    "server.cli",
    "server.web",
    "server.jobs",
    ("server.engines", "server.store", "server.webhooks"),
    "server.worker",
    "server",
    "model.convert.layouts",  # which model.convert finds by their names
    ("model.convert", "model.train", "model.tune"),
    "model.engine",
    "model.checkpoint",
    "model.nets",
    "model.kernels",
    "model.sampling",
    "model",
    "ddpm_client",
]
ROOMS = {
    "torch": ("model", "server.worker"),
    "triton": ("model.kernels",),
    "openvino": ("model.nets.openvino_graph", "model.nets.openvino_symbols"),
    "safetensors": ("model.train", "model.convert"),
    "numpy": ("model", "server"),
    "PIL": (
        "server.jobs.encode",
        "model.train.data",
        "model.train.packages",
        "model.train.sheet",
        "model.train.source",
        "ddpm_client",
    ),
    "fastapi": ("server.web",),
    "starlette": ("server.web",),
    "pydantic": (
        "server.bounds",
        "server.settings",
        "server.documents",
        "server.status",
        "server.jobs.schemas",
        "server.web",
    ),
    "uvicorn": ("server.web.protocol", "server.cli"),
    "sqlite3": ("server.store",),
    "httpx": ("ddpm_client",),
    "h11": ("server.webhooks.post",),
    "websockets": ("server.web.protocol", "ddpm_client"),
    "huggingface_hub": ("server.hub",),
    "httpx2": ("server.hub",),  # what it speaks to a hub with
    "prometheus_client": ("server.metrics",),
    "tqdm": ("server.cli",),
    "typing_extensions": ("ddpm_client", "server.documents", "server.status", "server.web"),
}
NOT_IN_MODEL = {"asyncio", "threading", "multiprocessing", "subprocess", "concurrent", "socket", "http", "urllib", "os"}
OFF_THE_PATH = ("model.convert", "model.train", "model.tune")  # entrances of their own, which read and write files


def name_of(path: Path) -> str:
    """The name under which this file is imported."""
    return ".".join(path.with_suffix("").parts).removeprefix("client.").removesuffix(".__init__")


FILES = {
    name_of(path.relative_to(ROOT)): path
    for package in ("client/ddpm_client", "model", "server")
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = [name for name, path in FILES.items() if path.stem not in ("__init__", "__main__") or name == "ddpm_client"]


def within(name: str, place: str | tuple[str, ...]) -> bool:
    """Whether a module is in one of these packages, or is one of these modules."""
    return any(f"{name}.".startswith(f"{one}.") for one in ([place] if isinstance(place, str) else place))


def floor(module: str) -> int:
    """How far from the roof a module lies: the innermost of the floors that it is in."""
    return min((number for number, place in enumerate(FLOORS) if within(module, place)))


def folder(module: str) -> str:
    """The package that a module is in."""
    return module.rpartition(".")[0] or module


def imports(module: str, lazily: bool = True) -> set[str]:
    """Everything a module imports, as full names: at its top or, if `lazily`, anywhere."""
    tree = ast.parse(FILES[module].read_text())
    found = set[str]()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide where they lead"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & FILES.keys()) or {node.module}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    ours = {name for name in imports(module) & FILES.keys() if folder(name) != folder(module)}

    assert {name for name in ours if floor(name) <= floor(module)} == set()


def test_imports_go_in_no_circle() -> None:
    TopologicalSorter({name: imports(name) & FILES.keys() for name in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_outside_libraries_stay_in_their_rooms(module: str) -> None:
    names = {name.partition(".")[0] for name in imports(module)} - {"model", "server", "ddpm_client"}
    strangers = {name for name in names if name not in sys.stdlib_module_names or name in ROOMS}

    assert strangers <= ROOMS.keys()
    assert {name for name in strangers if not within(module, ROOMS[name])} == set()


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "model") and not within(m, OFF_THE_PATH)])
def test_the_model_knows_no_network_thread_process_or_environment(module: str) -> None:
    assert {name.partition(".")[0] for name in imports(module)} & NOT_IN_MODEL == set()


@pytest.mark.parametrize(
    "package", [name for name, path in FILES.items() if path.stem == "__init__" and name != "ddpm_client"]
)
def test_packages_import_nothing(package: str) -> None:
    assert imports(package) == set()


@pytest.mark.parametrize("module", ["server.web.app", "server.cli.serve", "server.cli.main", "server.hub"])
def test_the_api_process_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'safetensors'}} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values()}))
def test_no_folder_has_more_than_13_modules(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]

    assert len(modules) <= 13


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions in a file, methods too."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("module", [module for module in MODULES if not within(module, "model.kernels")])
def test_files_and_functions_are_short(module: str) -> None:
    long = [each.name for each in functions_of(FILES[module]) if (each.end_lineno or 0) - each.lineno >= 40]

    assert len(FILES[module].read_text().splitlines()) <= 250
    assert long == []


def test_who_reads_the_log_says_from_which_level_on() -> None:
    """Else it hears what a server that ran in the same process has left of it."""
    heard = [
        (path.name, each.name, "at_level" in ast.unparse(each))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for each in functions_of(path)
        if any(argument.arg == "caplog" for argument in each.args.args)
    ]

    assert heard
    assert [(file, name) for file, name, levelled in heard if not levelled] == []


TELL_CLASSES = {  # to logs and the engine's supervisor, or of errors that say nothing else
    "model/errors.py",
    "model/kernels/launch.py",
    "model/nets/cpu.py",
    "model/nets/exact.py",
    "model/nets/layers.py",
    "server/hub.py",
    "server/worker/device.py",
    "server/worker/main.py",
}


def test_people_are_told_reasons_and_not_the_names_of_pythons_classes() -> None:
    naming = {
        str(path.relative_to(ROOT))
        for top in ("model", "server")
        for path in (ROOT / top).rglob("*.py")
        if re.search(r"type\(\w*(error|trouble|counts)\w*\)\.__name__", path.read_text())
    }

    assert naming == TELL_CLASSES


def test_every_error_is_caught_in_three_places_and_kept_by_two() -> None:
    """CONTRIBUTING.md names them. A handler that cleans up and raises is none."""
    catching = {
        str(path.relative_to(ROOT)): isinstance(node.body[-1], ast.Raise)
        for top in ("model", "server")
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception")
    }

    assert catching == {"model/errors.py": False, "server/worker/main.py": False, "server/web/app.py": True}
