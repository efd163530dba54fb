"""The rules of the house, read from the source: which room may import which, and what no file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import recollect

SRC = Path(recollect.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

ROOMS: dict[str, set[str]] = {
    "core": set(),
    "ops": {"core"},
    "layers": {"core", "ops"},
    "models": {"core", "ops", "layers"},
    "hf": {"core", "ops", "layers", "models", "text"},
    "envs": {"core"},
    "tasks": {"core"},
    "text": {"core"},
    "data": {"core", "envs", "tasks"},
    "train": {"core", "ops", "layers", "models", "envs", "tasks", "data", "eval", "text", "hf"},
    "eval": {"core", "ops", "layers", "models", "envs", "tasks", "data", "train", "text", "hf"},
    "recipes": {"core", "ops", "layers", "models", "envs", "tasks", "data", "train", "eval", "text", "hf"},
    "cli": {"core", "ops", "layers", "models", "envs", "tasks", "data", "train", "eval", "recipes", "text", "hf"},
}
"""Room -> the other rooms it may import."""

HEAVY = {"torch", "numpy", "gymnasium", "safetensors", "matplotlib", "numba"}
REGISTRIES = {"layers": "LAYERS", "tasks": "TASKS", "envs": "ENVS", "recipes": "RECIPES", "text/suite": "SUITE"}
MAX_LINES = 500


def module_name(path: Path) -> str:
    parts = ["recollect", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, *, at_load: bool = False) -> Iterator[str]:
    """Absolute names a file imports; with ``at_load`` only those that importing it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            yield from (name if (name := f"{base}.{alias.name}") in MODULES else base for alias in child.names)
        elif not (at_load and (isinstance(child, ast.FunctionDef | ast.Lambda) or is_type_checking(child))):
            yield from imports(child, at_load=at_load)


def loaded_by(module: str) -> set[str]:
    """Everything that importing ``module`` imports, ours followed to the end (packages above a module included)."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        for each in (name, *(parents if name in MODULES else ())):
            if each not in seen:
                seen.add(each)
                if each in MODULES:
                    waiting.extend(imports(tree(MODULES[each]), at_load=True))
    return seen


def test_this_test_sees_the_source() -> None:
    assert {"recollect.core.layer", "recollect.cli", "recollect.train.loop"} <= set(MODULES)
    assert "torch" in loaded_by("recollect.train.loop")
    assert "recollect.core.state" in set(imports(tree(MODULES["recollect.layers.gru"]))) | {"recollect.core.state"}


def test_every_room_is_known() -> None:
    rooms = {path.relative_to(SRC).parts[0] for path in FILES if path.parent != SRC}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    room = module.split(".")[1] if module.count(".") else ""
    if room not in ROOMS:
        return
    for name in imports(tree(MODULES[module])):
        parts = name.split(".")
        if parts[0] == "recollect" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] == room or parts[1] in ROOMS[room], f"{module} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Over the imports that loading runs: a circle works only for whoever enters it at the right place."""
    graph = {
        name: {each for each in imports(tree(path), at_load=True) if each in MODULES and each != name}
        for name, path in MODULES.items()
    }
    while leaves := [name for name, needs in graph.items() if not needs]:
        for name in leaves:
            del graph[name]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"circles among {sorted(graph)}"


@pytest.mark.parametrize("module", ["recollect", "recollect.cli", "recollect.cli.arguments", "recollect.recipes"])
def test_help_and_the_list_of_recipes_import_nothing_heavy(module: str) -> None:
    found = {name.split(".")[0] for name in loaded_by(module)} & HEAVY
    assert not found, f"importing {module} imports {sorted(found)}"


@pytest.mark.parametrize("room", ["envs", "tasks", "data", "text"])
def test_worlds_and_tasks_do_without_torch(room: str) -> None:
    """They are numpy; where a torch tensor is handed out, torch is imported by the function that does."""
    for name in MODULES:
        if name.startswith(f"recollect.{room}"):
            assert "torch" not in {each.split(".")[0] for each in loaded_by(name)}, name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_kernels_are_reached_through_dispatch_only(module: str) -> None:
    if module == "recollect.ops.dispatch" or module.startswith("recollect.ops.kernels"):
        return
    assert not [name for name in imports(tree(MODULES[module])) if name.startswith("recollect.ops.kernels")]


@pytest.mark.parametrize("room", sorted(REGISTRIES))
def test_registries_are_literal_dicts(room: str) -> None:
    """A reader sees the product in one dict: every key a string, every value a name, a lazy string or a config."""
    found: dict[str, ast.expr | None] = {}
    for node in tree(SRC / room / "__init__.py").body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    registry = found[REGISTRIES[room]]
    assert isinstance(registry, ast.Dict)
    assert registry.keys, f"{REGISTRIES[room]} is empty"
    for key, value in zip(registry.keys, registry.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(key.value, str)
        is_config = isinstance(value, ast.Call) and ast.unparse(value.func).endswith(".Config")
        is_string = isinstance(value, ast.Constant) and isinstance(value.value, str)
        assert isinstance(value, ast.Name) or is_string or is_config


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_are_of_a_size_to_read(module: str) -> None:
    path = MODULES[module]
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{path} has {len(lines)} lines"
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, "a helper lives with its noun"
    assert ast.get_docstring(tree(path)) or not lines, f"{path} does not say what it is"


def test_nothing_unpickles() -> None:
    """Loading a checkpoint or a store never executes code."""
    for path in FILES:
        text = path.read_text()
        assert "pickle.load" not in text, path
        # Foreign checkpoints come as pickles too: what reads them must be told to take tensors alone.
        assert all("weights_only=True" in rest.partition("\n")[0] for rest in text.split("torch.load(")[1:]), path
        assert "allow_pickle=True" not in text, path


@cache
def names_of(module: str) -> frozenset[str]:
    """What importing from a module may name: what it binds at its top, and the modules below it."""
    found = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def test_scripts_import_what_there_is() -> None:
    """No test runs the bench scripts: a name that moved would be missed where it matters, at the end of a long run."""
    scripts = sorted((SRC.parents[1] / "bench").rglob("*.py"))
    assert len(scripts) > 5
    for script in scripts:
        for node in ast.walk(tree(script)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recollect":
                assert node.module in MODULES, f"{script.name}: no module {node.module}"
                missing = {alias.name for alias in node.names} - names_of(node.module)
                assert not missing, f"{script.name}: {node.module} has no {missing}"
