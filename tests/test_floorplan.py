"""The floor plan of the house: imports go down only, and every outside library has its rooms."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the roof down. A module may import what lies on a lower floor than its own; "*" stands for any name.
FLOORS = [
    ["server.__main__"],
    ["server.cli"],
    ["server.commands.*"],
    ["server.commands.reach"],
    ["server.commands.serve", "server.commands.bar"],
    ["server.connection"],
    ["server.app"],
    ["server.routes.description", "server.routes.door", "server.routes.jobs", "server.routes.openai"],
    ["server.routes.*"],
    ["server.routes.http"],
    ["server.auth"],
    ["server.jobs"],
    ["server.course"],
    ["server.admission"],
    ["server.ledger"],
    ["server.orders", "server.outlooks", "server.register", "server.records"],
    ["server.job"],
    ["server.store"],
    ["server.store_thread", "server.pictures"],
    ["server.engine_room"],
    ["server.worker", "server.fleet"],
    ["server.life", "server.passengers", "server.paces"],
    ["server.suspects"],
    ["server.engine_process"],
    ["server.engines"],
    ["server.loader"],
    ["server.messages", "server.machine", "server.residents"],
    ["server.faults"],
    ["server.store_*", "server.clock"],
    [
        "server.backend",
        "server.feed",
        "server.images",
        "server.metrics",
        "server.hub",
        "server.limits",
        "server.openai",
    ],
    ["server.owners", "server.origins"],
    ["server.forecast", "server.devices"],
    ["server.schemas", "server.wire"],
    ["server.settings", "server.logs"],
    ["server.bounds"],
    ["server.errors"],
    ["model.engine"],
    ["model.runner", "model.scheduler", "model.snapshot", "model.footprint", "model.lead"],
    ["model.checkpoint", "model.slots", "model.exact_kernels"],
    ["model.cpu_net"],
    ["model.openvino_net"],
    ["model.nets"],
    ["model.unet", "model.lucid_unet"],
    ["model.convolution"],
    ["model.kernels"],
    ["model.triton_net", "model.triton_step", "model.triton_conv", "model.triton_slots"],
    ["model.triton_launch", "model.triton_noise"],
    ["model.noise", "model.events", "model.gpu"],
    ["model.plan", "model.card"],
    ["model.activations"],
    ["model.schedule", "model.lucid_architecture"],
    ["model.architecture"],
    ["model.options"],
    ["model.errors"],
]
# These stand beside the house: they may look into every room, and nobody in it knows them.
OFF_THE_PATH = [
    "model.train",
    "model.trainer",
    "model.data",
    "model.convert",
    "model.convert.*",
    "model.reference",
    "server.client",
    "server.client_*",
]
ENTRANCES = ["server.cli", "server.commands.*"]  # these alone open every door, that of a client too
TORCH_FREE = [
    f"model.{room}"
    for room in (
        "errors",
        "options",
        "schedule",
        "architecture",
        "lucid_architecture",
        "plan",
        "card",
        "events",
        "scheduler",
    )
]
ROOMS = {
    "torch": ["model.*", "server.engine_process", "server.engines", "server.loader", "server.machine", "server.faults"],
    "triton": [
        "model.triton_net",
        "model.triton_step",
        "model.triton_conv",
        "model.triton_launch",
        "model.triton_noise",
        "model.triton_slots",
    ],
    "openvino": ["model.openvino_net"],
    "safetensors": ["model.checkpoint", "model.train", "model.trainer", "model.convert", "model.convert.*"],
    "numpy": ["model.*", "server.*"],
    "PIL": ["server.images", "server.client_values", "model.data"],
    "fastapi": ["server.app", "server.routes.*", "server.auth"],
    "starlette": ["server.app", "server.routes.*", "server.auth"],
    "pydantic": ["server.bounds", "server.schemas", "server.openai", "server.settings"],
    "uvicorn": ["server.commands.serve", "server.commands.reach", "server.connection"],
    "sqlite3": ["server.store", "server.store_*"],
    "httpx": ["server.client_*"],
    "websockets": ["server.client_lines", "server.connection"],
    "huggingface_hub": ["server.hub"],
    "httpx2": ["server.hub"],  # what it speaks to a hub with
    "prometheus_client": ["server.metrics"],
}
# Never imported by the API process.
ENGINE_PROCESS = {f"server.{room}" for room in ("engine_process", "engines", "loader", "machine", "faults")}
UPSTAIRS_ONLY = {
    "asyncio",
    "threading",
    "multiprocessing",
    "subprocess",
    "concurrent",
    "socket",
    "http",
    "urllib",
    "os",
}


def name_of(path: Path) -> str:
    """The name under which this file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for package in ("model", "server") for path in sorted((ROOT / package).rglob("*.py"))}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
MODULES = sorted(FILES.keys() - PACKAGES)


def among(name: str, patterns: list[str]) -> bool:
    """Whether one of the patterns fits this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def floor(module: str) -> int | None:
    """How far from the roof a module lies, or None if it has no floor. Its own name goes before a pattern."""
    exact = [number for number, names in enumerate(FLOORS) if module in names]
    fitting = [number for number, names in enumerate(FLOORS) if among(module, names)]
    return next(iter(exact + fitting), None)


def imported(node: ast.AST) -> set[str]:
    """What one statement imports, as full names; `from package import module` gives the module."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide where they lead"
        assert node.module is not None
        inside = {f"{node.module}.{alias.name}" for alias in node.names}
        return (inside & FILES.keys()) or {node.module}
    return set()


def imports(module: str) -> set[str]:
    """Everything a module imports, at its top or later."""
    return set().union(*map(imported, ast.walk(ast.parse(FILES[module].read_text()))))


def imports_at_once(module: str) -> set[str]:
    """What a module imports when it is imported itself."""
    return set().union(*map(imported, ast.parse(FILES[module].read_text()).body))


def outside(module: str) -> set[str]:
    """The top-level packages that a module imports and that are not ours."""
    return {name.split(".")[0] for name in imports(module)} - {"model", "server"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module: str) -> None:
    assert among(module, OFF_THE_PATH) or floor(module) is not None


@pytest.mark.parametrize("module", [module for module in MODULES if not among(module, OFF_THE_PATH)])
def test_imports_go_down(module: str) -> None:
    ours = {name for name in imports(module) & FILES.keys() - PACKAGES if not among(name, OFF_THE_PATH)}
    here = floor(module)
    assert here is not None

    assert {name for name in ours if (floor(name) or 0) <= here} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if not among(module, OFF_THE_PATH + ENTRANCES)])
def test_nobody_in_the_house_knows_what_stands_beside_it(module: str) -> None:
    assert {name for name in imports(module) if among(name, OFF_THE_PATH)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_outside_libraries_stay_in_their_rooms(module: str) -> None:
    strangers = {name for name in outside(module) if name not in sys.stdlib_module_names or name in ROOMS}

    assert strangers <= ROOMS.keys()
    assert {name for name in strangers if not among(module, ROOMS[name])} == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("model.") and not among(m, OFF_THE_PATH)])
def test_the_engine_knows_no_network_thread_process_or_environment(module: str) -> None:
    assert outside(module) & UPSTAIRS_ONLY == set()
    assert {name for name in imports(module) if name.startswith("server")} == set()


@pytest.mark.parametrize("module", [module for module in TORCH_FREE if module in FILES])
def test_what_the_api_process_needs_of_the_model_is_free_of_torch(module: str) -> None:
    assert outside(module) & {"torch", "safetensors"} == set()
    assert {name for name in imports(module) & FILES.keys() - PACKAGES if name not in TORCH_FREE} == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("server.") and m not in ENGINE_PROCESS])
def test_the_api_process_uses_nothing_else_of_the_model(module: str) -> None:
    ours = imports_at_once(module) & FILES.keys() - PACKAGES

    assert ours & ENGINE_PROCESS == set()
    assert {name for name in ours if name.startswith("model.") and name not in TORCH_FREE} == set()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_nothing(package: str) -> None:
    assert imports(package) == set()


@pytest.mark.parametrize("module", ["server.app", "server.commands.serve", "server.cli", "server.client", "server.hub"])
def test_the_api_process_starts_without_torch(module: str) -> None:
    if module not in FILES or find_spec("fastapi") is None:
        pytest.skip("the server, or what it is built with, is not here")
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'safetensors'}} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stderr) == (0, "")


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_who_reads_the_log_says_from_which_level_on() -> None:
    """Else it hears what a server that ran in the same process has left of it."""
    heard = [
        (path.name, each.name, "at_level" in ast.unparse(each))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for each in functions_of(path)
        if any(argument.arg == "caplog" for argument in each.args.args)
    ]

    assert heard
    assert [(file, name) for file, name, from_some_level in heard if not from_some_level] == []
