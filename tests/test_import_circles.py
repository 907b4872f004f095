"""No module of ours imports itself through others, not even inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"avex_serve": ROOT / "avex_serve", "avex_export": ROOT / "export" / "avex_export"}


def sources():
    """The source of each module by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path.read_text("utf-8")
    return found


def imports(node):
    """The names that a syntax tree imports at any depth, ``module.name`` for ``from module import name``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    only_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if only_for_types else ast.iter_child_nodes(node):
        yield from imports(child)


def find_circle(modules):
    """The modules of a circle, the first one again at its end; None if there is no circle."""
    graph = {}
    for module, source in modules.items():
        # `from a.b import c` imports the module a.b.c or, where there is none, a name in a.b.
        named = {name if name in modules else name.rpartition(".")[0] for name in imports(ast.parse(source))}
        graph[module] = named & modules.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_circle():
    modules = sources()
    assert len(modules) > 50
    assert find_circle(modules) is None


@pytest.mark.parametrize(
    ("source", "circular"),
    [
        ("from a import c", True),
        ("import a.c", True),
        ("from a.c import name", True),
        ("def f():\n    from a.c import name", True),
        ("if TYPE_CHECKING:\n    from a.c import name", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import a.c", True),
        ("import a", False),
    ],
)
def test_the_search_finds_circles(source, circular):
    circle = find_circle({"a": "", "a.b": source, "a.c": "from a.b import other"})
    assert (circle is not None) == circular
