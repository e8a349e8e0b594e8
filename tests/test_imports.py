"""The shape of the package: imports point down, model names stay in architectures/, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_shrink"

# Lowest first. A room may import rooms of the layers before its own, and itself; never a neighbour in its layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("registry", "modes", "paths"),
    ("values",),
    ("ranges",),
    ("scheme", "sparsity", "stacks", "tokens"),
    ("plan", "report", "speed_report", "resources", "progress", "recall", "residence", "sharding"),
    ("recipe", "front"),
    ("ops",),
    ("architectures",),
    ("runtime", "reporting", "hub"),
    ("surgery",),
    ("calibration", "checkpoint"),
    ("quantization", "transforms", "tuning", "pruning", "evaluation"),
    ("search",),
    ("pipeline",),
    ("training",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ROOT_LEVEL = LEVEL["cli"]  # hf_shrink/__init__.py: above all that it re-exports, below the command line

# Counted anywhere inside a word ("gemma3_patch", "DistilBertModel") ...
MODEL_NAMES = (
    *("llama", "mistral", "mixtral", "qwen", "gemma", "smollm", "gptj", "gpt2", "neox", "bert", "deberta", "electra"),
    *("siglip", "whisper", "wav2vec", "mamba", "deepseek", "olmo", "starcoder"),
)
# ... and these, which are or hide in ordinary words, only as a whole string literal, as a model_type is.
MODEL_TYPES = {"phi", "phi3", "opt", "mpt", "vit", "clip", "bart", "bloom", "falcon", "t5"}
FILES = {"sentence_bert_config.json"}  # that libraries call so, whatever model there is
METHOD_ROOMS = ("quantization", "transforms", "pruning")
MAX_LINES = 300


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    """The room a file belongs to; "" for the package's own __init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    room = first.removesuffix(".py")
    return "" if room == "__init__" else room


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_rooms(tree: ast.Module, package: tuple[str, ...]) -> set[str]:
    """Rooms of hf_shrink imported in `tree`, a file of the dotted `package`; "" is hf_shrink itself."""
    rooms: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "hf_shrink":
                    rooms.add(parts[1] if len(parts) > 1 else "")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module or "").split(".")] if node.module else list(base)
            if parts[:1] != ["hf_shrink"]:
                continue
            if len(parts) > 1:
                rooms.add(parts[1])
            else:  # from hf_shrink import x: a room, or a name of the package itself
                rooms.update(alias.name if alias.name in LEVEL else "" for alias in node.names)
    return rooms


def violations(room: str, imported: set[str]) -> list[str]:
    level = LEVEL[room] if room else ROOT_LEVEL
    return sorted(
        other or "hf_shrink itself"
        for other in imported
        if other != room and (ROOT_LEVEL if not other else LEVEL[other]) >= level
    )


def test_imports_point_down() -> None:
    upward = {}
    for path in files():
        package = ("hf_shrink", *path.relative_to(PACKAGE).parent.parts)
        imported = imported_rooms(tree_of(path), package)
        unknown = ({room_of(path)} | imported) - set(LEVEL) - {""}
        assert not unknown, f"{ids(path)}: give {sorted(unknown)} a layer in {Path(__file__).name}"
        upward[ids(path)] = violations(room_of(path), imported)
    assert not {path: rooms for path, rooms in upward.items() if rooms}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from hf_shrink.ops.grid import Grid", ("hf_shrink", "pruning"), {"ops"}),
        ("import hf_shrink.pipeline", ("hf_shrink", "ops"), {"pipeline"}),
        ("from hf_shrink import pipeline, shrink", ("hf_shrink", "ops"), {"pipeline", ""}),
        ("from ..pipeline import shrink", ("hf_shrink", "ops"), {"pipeline"}),
        ("from . import grid", ("hf_shrink", "ops"), {"ops"}),
        ("def f():\n    from .. import search", ("hf_shrink", "ops"), {"search"}),
        ("if TYPE_CHECKING:\n    from hf_shrink.pipeline import x", ("hf_shrink", "ops"), set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import hf_shrink.cli", ("hf_shrink", "ops"), {"cli"}),
        ("import torch\nfrom transformers import pipeline", ("hf_shrink", "ops"), set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert imported_rooms(ast.parse(source), package) == expected


def test_upward_and_sideways_imports_are_violations() -> None:
    assert violations("ops", {"plan", "ops", "errors"}) == []
    assert violations("ops", {"architectures"}) == ["architectures"]
    assert violations("pruning", {"quantization"}) == ["quantization"]
    assert violations("pipeline", {""}) == ["hf_shrink itself"]
    assert violations("cli", {"pipeline"}) == []


def docstrings(tree: ast.Module) -> set[int]:
    """ids of the string nodes that are docstrings or other bare strings."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def words_of(node: ast.AST, skip: set[int]) -> list[tuple[str, bool]]:
    """(text, whether it is a string literal) of everything in a node that could hold a name."""
    if isinstance(node, ast.Constant):
        return [(node.value, True)] if isinstance(node.value, str) and id(node) not in skip else []
    if isinstance(node, ast.Name):
        return [(node.id, False)]
    if isinstance(node, ast.Attribute):
        return [(node.attr, False)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.alias):
        return [(node.name, False)]
    if isinstance(node, ast.arg | ast.keyword):
        return [(node.arg or "", False)]
    return []


def model_names_in(tree: ast.Module) -> set[str]:
    """Names of model families in the literals and identifiers of `tree`; comments and docstrings do not count."""
    skip = docstrings(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        for text, literal in words_of(node, skip):
            lower = text.lower()
            if lower in FILES:
                continue
            found.update(name for name in MODEL_NAMES if name in lower)
            if literal and lower in MODEL_TYPES:
                found.add(lower)
    return found


def test_model_names_stay_in_architectures() -> None:
    found = {ids(p): model_names_in(tree_of(p)) for p in files() if room_of(p) != "architectures"}
    assert not {path: names for path, names in found.items() if names}


def test_the_search_for_model_names_finds_them() -> None:
    for source, names in {
        "if config.model_type == 'llama': pass": {"llama"},
        "if kind == 'opt': pass": {"opt"},
        "from transformers import BertModel": {"bert"},
        "def gemma3_patch(qwen2): pass": {"gemma", "qwen"},
        '"""Works for Llama."""\n# and BERT\nx = torch.clip(option, adopt)': set(),
    }.items():
        assert model_names_in(ast.parse(source)) == names


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=ids)
def test_ops_never_sees_a_module(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if re.match(r"torch\.nn(?!\.functional)", a.name)]
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "nn" not in [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.nn"):
            assert node.module == "torch.nn.functional" or [a.name for a in node.names] == ["functional"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.nn":
            assert node.attr == "functional"


def test_files_stay_small() -> None:
    lines = {ids(path): len(path.read_text().splitlines()) for path in files()}
    large = {path: count for path, count in lines.items() if count > MAX_LINES}
    assert not large, "find the second subject in it and give it a file"


def registered(path: Path) -> list[ast.ClassDef]:
    """The classes that a file registers."""
    return [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and any(".register(" in ast.unparse(d) for d in node.decorator_list)
    ]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.fixture(scope="module")
def method_files() -> list[Path]:
    return [path for path in files() if room_of(path) in METHOD_ROOMS and registered(path)]


def test_a_method_is_one_frozen_dataclass_in_a_file_of_its_own(method_files: list[Path]) -> None:
    assert {room_of(path) for path in method_files} == set(METHOD_ROOMS)
    for path in method_files:
        assert len(registered(path)) == 1, ids(path)
        (method,) = registered(path)
        assert "frozen=True" in " ".join(ast.unparse(d) for d in method.decorator_list), ids(path)
        assert ast.get_docstring(method), ids(path)


def test_no_file_names_a_method_so_that_deleting_one_touches_nothing(method_files: list[Path]) -> None:
    methods = {dotted(method) for method in method_files}
    for path in files():
        imported: set[str] = set()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module or "")
                imported.update(f"{node.module}.{alias.name}" for alias in node.names)
        assert not imported & methods, ids(path)
