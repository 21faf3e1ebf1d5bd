"""Pages: every link, module, name in a module, and flag that they mention exists."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from pathlib import Path

import pytest
import typer.main

from scale_rae.cli.app import COMMANDS, load_command
from scale_rae.cli.signature import Spellings
from scale_rae.shapes import evaluate

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scale_rae"
READMES = [ROOT / "recipes" / "shapes" / "README.md", ROOT / "integrations" / "comfyui" / "README.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *READMES]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OTHER_PROGRAMS = {  # flags of SLURM, torchrun, Ray and ComfyUI; official spelling with underscores; the beginning of several flags
    *(
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--cpus-per-task",
        "--time",
        "--requeue",
        "--kill-on-bad-exit",
    ),
    *("--build", "--index-url"),  # Docker and pip
    *("--nproc-per-node", "--generate", "--head", "--address", "--model_path", "--post-qa-"),
    *("--preview-method", "--local-dir"),
}
OTHER_FILES = {"random.py"}  # a user's own file
SUFFIXES = {"json", "jsonl", "pt", "py", "md", "safetensors", "bin", "png", "toml", "txt"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(module: Path) -> dict[str, set[str]]:
    """The names that a module defines or imports, each with its own attributes: methods and fields of a class."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {part for child in node.body for part in defined_by(child)}
            found[node.name] |= {
                n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            }
        else:
            found |= {name: set() for name in defined_by(node)}
    return found


def defined_by(node: ast.stmt) -> set[str]:
    """The names that a statement binds, those in a try or an if too."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt) for name in defined_by(child)}


@functools.cache
def package() -> dict[str, dict[str, set[str]]]:
    """The names in each module of the package, by the module's name without `scale_rae.`."""
    modules = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = names_in(file)
    modules[""]["ScaleRAE"] = set()  # made by __getattr__
    return modules


def exists(name: str) -> bool:
    """Whether `name`, such as `fast_blocks.spread` or `dit.DiT.forward`, is a module of the package or a name in one."""
    parts = name.split(".")
    for cut in range(len(parts), -1, -1):
        if (module := package().get(".".join(parts[:cut]))) is not None:
            rest = parts[cut:]
            return not rest or (
                rest[0] in module and (len(rest) == 1 or (len(rest) == 2 and rest[1] in module[rest[0]]))
            )
    return False


def flags_of(command: object) -> set[str]:
    """Every spelling of every flag of a click command and its subcommands."""
    found = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    found |= {f"--{name}" for name in getattr(command, "spellings", Spellings()).aliases}
    return found.union(*(flags_of(inner) for inner in getattr(command, "commands", {}).values()))


@functools.cache
def flags() -> set[str]:
    """The flags of all commands, benchmarks and steps of the recipe. Nothing that is imported for it loads torch."""
    found = {"--help", "--version", "--install-completion", "--show-completion"} | flags_of(
        typer.main.get_command(evaluate.app)
    )
    for name in COMMANDS:
        found |= flags_of(load_command(name))
    for file in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        found |= set(re.findall(r'"(--[a-z][\w-]*)"', file.read_text()))
    return found | {"--encoder", "--joint"}  # recipes.shapes.train makes a flag of each stage's name


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        target = "".join(target)
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_pages_name_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    files = set(re.findall(r"\b((?:scale_rae|benchmarks|recipes|tests)/[\w/]+\.py)\b", text))
    files |= set(re.findall(r"python ((?:[\w/]+/)?\w+\.py)", text))
    assert not [file for file in files if not (ROOT / file).exists()]
    alone = set(re.findall(r"`([\w/]+\.py)`", text)) - files - OTHER_FILES
    assert not [file for file in alone if not any(ROOT.glob(f"{top}/**/{file}") for top in ("scale_rae", "recipes"))]
    modules = set(re.findall(r"-m ((?:scale_rae|recipes|benchmarks)[.\w]*)", text))
    assert not [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").exists() and m != "scale_rae"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_modules_that_pages_name_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for module, imported in re.findall(r"from scale_rae([.\w]*) import ([\w, ]+)", text):
        assert not [n for n in imported.split(", ") if not exists(f"{module[1:]}.{n}".strip("."))], module
    wrong = []
    for span in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", text):
        first, *rest = span.split(".")
        if not rest or rest[-1] in SUFFIXES:
            continue
        if first == "scale_rae":
            wrong += [span] if not exists(".".join(rest)) else []
        elif first in package():
            wrong += [span] if not exists(span) else []
        elif homes := [module[first] for module in package().values() if module.get(first)]:  # a class
            wrong += [span] if not any(rest[0] in home for home in homes) else []
        elif first[0].isupper() and not hasattr(builtins, first):
            wrong.append(span)
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_flags_that_pages_name_exist(name: str) -> None:
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / name).read_text()))
    assert not found - flags() - OTHER_PROGRAMS


@pytest.mark.parametrize(
    "package", ["geneval", "scaling", "training"]
)  # packages whose docstrings were all gone through
def test_first_lines_of_docstrings_are_short(package: str) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    long: list[str] = []
    for file in (ROOT / "scale_rae" / package).rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]
        first_lines = [(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes]
        long += [f"{file.name}: {line}" for line in first_lines if len(line) > 100]
    assert long == []


def test_arguments_that_docstrings_describe_exist() -> None:
    """Each on a line of its own, as the API reference needs it."""
    wrong: list[str] = []
    for file in PACKAGE.rglob("*.py"):
        if "Args:\n" not in (text := file.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                described = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
                names = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
                wrong += [
                    f"{node.name}: {name}"
                    for name in re.findall(r"^    (\S[^:]*):", described, re.M)
                    if name not in names
                ]
    assert wrong == []
