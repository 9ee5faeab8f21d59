"""Checks the source files of a vLLM against the list of hooks, without importing any of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .hooks import VLLM_HOOKS, Hook

_MAX_IMPORTS = 8  # how many modules a name may be imported through


def source_faults(root: Path, hooks: Sequence[Hook] = VLLM_HOOKS) -> tuple[str, ...]:
    """Describe each of `hooks` that the package in the directory `root` lacks or that takes other parameters."""
    sources = _Sources(root)
    return tuple(fault for hook in hooks if (fault := _fault(sources, hook)))


def _fault(sources: _Sources, hook: Hook) -> str | None:
    if sources.statements(hook.module) is None:
        return f"it has no module {hook.module} (with {hook.name})"
    found = sources.find(hook.module, hook.name.split("."))
    if found is None:
        return f"it has no {hook}"
    known = set(_parameters(found))
    if missing := [parameter for parameter in hook.parameters if parameter not in known]:
        return f"{hook} takes no {', '.join(missing)}"
    if hook.replaced and not sources.uses(hook.module, hook.name.partition(".")[0]):
        return f"{hook} is imported there, but not used any more"
    return None


def _parameters(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        arguments = node.args
        yield from (one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))


class _Sources:
    """The modules below a directory, parsed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parsed: dict[str, list[ast.stmt] | None] = {}

    def statements(self, module: str) -> list[ast.stmt] | None:
        """The statements of a module; None if there is no such module."""
        if module not in self._parsed:
            path = self._root.joinpath(*module.split("."))
            files = [file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()]
            self._parsed[module] = ast.parse(files[0].read_bytes()).body if files else None
        return self._parsed[module]

    def uses(self, module: str, name: str) -> bool:
        """Whether a module defines `name`, or imports and uses it."""
        statements = self.statements(module) or []
        if not isinstance(_named(statements, name), ast.ImportFrom):
            return True
        nodes = (node for statement in statements for node in ast.walk(statement))
        return any(isinstance(node, ast.Name) and node.id == name for node in nodes)

    def find(self, module: str, names: Sequence[str], imports: int = 0) -> ast.stmt | None:
        """The statement that defines `names`, such as a class and its method, in a module, or where that imports it."""
        statement = _named(self.statements(module) or (), names[0])
        match statement:
            case ast.ImportFrom() if imports < _MAX_IMPORTS:
                return self._imported(module, statement, names, imports + 1)
            case ast.Assign(value=ast.Name(id=other)) if imports < _MAX_IMPORTS:
                return self.find(module, [other, *names[1:]], imports + 1)
            case ast.ClassDef() if len(names) > 1:
                return _named(statement.body, names[1])  # inherited, it would be another function
            case _:
                return statement if len(names) == 1 else None

    def _imported(self, module: str, statement: ast.ImportFrom, names: Sequence[str], imports: int) -> ast.stmt | None:
        (original,) = (one.name for one in statement.names if names[0] == (one.asname or one.name))
        is_package = (self._root.joinpath(*module.split(".")) / "__init__.py").is_file()
        above = module.split(".")[: len(module.split(".")) - statement.level + is_package] if statement.level else []
        source = ".".join([*above, *([statement.module] if statement.module else [])])
        return self.find(source, [original, *names[1:]], imports)


def _named(statements: Iterable[ast.stmt], name: str) -> ast.stmt | None:
    """The last of `statements`, also inside `if`, `try` and `with`, that gives `name` a meaning."""
    found = None
    for statement in statements:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [statement.name]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=target)):
                names = [target]
            case ast.ImportFrom(names=aliases):
                names = [alias.asname or alias.name for alias in aliases]
            case _:
                names = []
                found = _named(_inside(statement), name) or found
        if name in names:
            found = statement
    return found


def _inside(statement: ast.stmt) -> Iterator[ast.stmt]:
    if isinstance(statement, (ast.If, ast.Try, ast.With)):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield child
            elif isinstance(child, ast.ExceptHandler):
                yield from child.body
