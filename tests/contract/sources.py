"""Reads what a Python package offers from its sources, without importing or installing it."""

import ast
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """A package's sources.

    Args:
        root: the directory that has the package's directory in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._module = cache(self._parse)

    def describe(self, symbol: str) -> str | None:
        """What a symbol is, as far as its users depend on it; None if there is no such symbol.

        Args:
            symbol: ``module:name`` or ``module:Class.member``.

        Returns:
            The parameters of a function, or its kind.
        """
        module, _, path = symbol.partition(":")
        name, _, member = path.partition(".")
        found = self._find(module, name)
        if found is None or not member:
            return None if found is None else _described(found[1])
        if not isinstance(found[1], ast.ClassDef):
            return None
        node = self._member(*found, member)
        return None if node is None else _described(node)

    def ancestors(self, module: str, name: str) -> list[tuple[str, ast.ClassDef]]:
        """A class and those that it inherits from, as far as they are in the package."""
        found = self._find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return []
        where, node = found
        result = [(where, node)]
        for base in node.bases:
            # Of a generic base `A[T]` and of `module.A` the name counts.
            of = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(of, ast.Name):
                result += self.ancestors(where, of.id)
        return result

    def _parse(self, module: str) -> ast.Module | None:
        path = self._root.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def _find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines a name, and the definition; imports are followed."""
        tree = self._module(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) in (name, "*"):
                        wanted = name if alias.name == "*" else alias.name
                        if found := self._find_imported(module, node, wanted):
                            return found
            for target, value in _assigned(node):
                if isinstance(target, ast.Name) and target.id == name:
                    return module, node
                # Lazy imports of a package: {"LLM": ".entrypoints.llm:LLM"}.
                if isinstance(value, ast.Dict) and (path := _entry(value, name)) and ":" in path:
                    where, _, other = path.partition(":")
                    return self._find(module + where, other)
        submodule = f"{module}.{name}"
        return (submodule, ast.Module([], [])) if self._module(submodule) else None

    def _find_imported(
        self, module: str, node: ast.ImportFrom, name: str
    ) -> tuple[str, ast.AST] | None:
        package = module
        if node.level:
            is_package = self._root.joinpath(*module.split("."), "__init__.py").is_file()
            parts = module.split(".")
            package = ".".join(parts[: len(parts) - node.level + is_package])
            source = f"{package}.{node.module}" if node.module else package
        else:
            source = node.module or ""
        return self._find(source, name)

    def _member(self, module: str, node: ast.AST, name: str) -> ast.AST | None:
        assert isinstance(node, ast.ClassDef)
        for _, of in self.ancestors(module, node.name):
            for child in _statements(of.body):
                if isinstance(child, Function | ast.ClassDef) and child.name == name:
                    return child
                for target, _ in _assigned(child):
                    if isinstance(target, ast.Name) and target.id == name:
                        return child
            for child in ast.walk(of):
                for target, _ in _assigned(child):
                    if (
                        isinstance(target, ast.Attribute)
                        and target.attr == name
                        and isinstance(target.value, ast.Name)
                        and target.value.id == "self"
                    ):
                        return child
        return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Those of a body, and of the conditions and tries in it."""
    found = []
    for node in body:
        found.append(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                found += _statements(getattr(node, name, []))
    return found


def _assigned(node: ast.AST) -> list[tuple[ast.expr, ast.expr | None]]:
    """Targets and value of an assignment."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, ast.AnnAssign):
        return [(node.target, node.value)]
    return []


def _entry(node: ast.Dict, name: str) -> str | None:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
    return None


def _described(node: ast.AST) -> str:
    if isinstance(node, Function):
        return f"({_parameters(node.args)})"
    if isinstance(node, ast.ClassDef):
        return "class"
    return "module" if isinstance(node, ast.Module) else "value"


def _parameters(arguments: ast.arguments) -> str:
    """Names, order and kinds, and which of them have defaults."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parts = [a.arg + "=" * (i >= first_default) for i, a in enumerate(positional)]
    if arguments.vararg:
        parts.append("*" + arguments.vararg.arg)
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg + "=" * (default is not None))
    if arguments.kwarg:
        parts.append("**" + arguments.kwarg.arg)
    return ", ".join(parts)
