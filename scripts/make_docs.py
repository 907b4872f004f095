"""Write the pages of the site, for zensical or Material for MkDocs: those of docs/, and a reference from the code.

``python scripts/make_docs.py`` fills ``build/docs``, which ``mkdocs.yml`` names; ``make docs`` then builds the site.
"""

import argparse
import inspect
import pkgutil
import re
import shutil
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import avex_serve
import avex_serve.training
from avex_export.cli import _parser as export_parser
from avex_serve import annotations
from avex_serve.annotations.formats import FORMATS
from avex_serve.cli import _parser as serve_parser
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.service.http.app import ENDPOINTS
from avex_serve.service.settings import list_settings

ROOT = Path(__file__).parents[1]
# Files that pages link to, which the site has as they are.
LINKED = ("examples", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")


def main() -> None:
    """Write all pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "docs", help="folder, replaced")
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(ROOT / "docs", output)
    for name in LINKED:
        source, target = ROOT / name, output / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (output / "index.md").write_text((ROOT / "README.md").read_text())
    for page in output.rglob("*.md"):
        page.write_text(_relinked(page, output))
    (output / "reference").mkdir()
    for write in (settings, command_line, routes, configuration, formats, python):
        text = f"# {_title(write)}\n\n" + "\n".join(write()).rstrip() + "\n"
        (output / "reference" / f"{write.__name__.replace('_', '-')}.md").write_text(text)


def _relinked(page: Path, output: Path) -> str:
    """Its text, with links that lead to the places of files in the site."""

    def moved(link: re.Match[str]) -> str:
        path, place = link[1], page.parent.relative_to(output)
        if path.startswith("https://"):
            return link[0]
        source = ROOT if page.name in ("index.md", *LINKED) else ROOT / "docs" / place
        target = (source / path).resolve()
        found = target.relative_to(ROOT / "docs" if target.is_relative_to(ROOT / "docs") else ROOT)
        return f"]({'../' * len(place.parts)}{'index.md' if str(found) == 'README.md' else found}"

    return re.sub(r"\]\(([^)#]+)", moved, page.read_text())


def _title(write: Any) -> str:
    return inspect.getdoc(write).rstrip(".")  # type: ignore[union-attr]


def _table(*head: str) -> str:
    return "| " + " | ".join(head) + " |\n|" + "---|" * len(head)


def _row(*cells: object) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in cells) + " |"


def settings() -> Iterator[str]:
    """Settings of the service."""
    yield "Each is an environment variable. [Operating](../operating.md) says how sizes and durations are written.\n"
    yield _table("variable", "meaning", "default")
    for setting in list_settings(environment={}):
        told = "by default" in setting.description or not setting.default
        yield _row(f"`{setting.variable}`", setting.description, "" if told else f"`{setting.default}`")


def command_line() -> Iterator[str]:
    """Command line."""
    for parser in (serve_parser(), export_parser()):
        yield from _command(parser, 2)


def _command(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    yield f"{'#' * level} {parser.prog}\n\n```\n{parser.format_help().rstrip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _command(command, level + 1)


def routes() -> Iterator[str]:
    """Routes over HTTP."""
    yield "The service has the whole description as OpenAPI, at `/docs.json`.\n"
    yield _table("route", "what it does", "options")
    for endpoint in ENDPOINTS:
        operation = endpoint.operation
        if operation is not None:
            options = ", ".join(f"`{each['name']}`" for each in operation.get("parameters", ()))
            yield _row(f"`{endpoint.methods[0]} {endpoint.path}`", operation["summary"], options)


def configuration() -> Iterator[str]:
    """Configuration of models and probes."""
    for model in (ProbeConfig, ModelSpec, AudioConfig):
        yield f"## {model.__name__}\n\n{_text(model)}\n"
        yield _table("field", "type", "default")
        for name, field in model.model_fields.items():
            annotation = field.annotation
            kind = annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")
            default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
            yield _row(f"`{name}`", kind, default)
        yield ""


def formats() -> Iterator[str]:
    """Formats of tables."""
    yield "What `--format` of `avex-serve run` and `tables` writes. [Archives](../archives.md) has examples.\n"
    for module in pkgutil.iter_modules(annotations.__path__, f"{annotations.__name__}."):
        content = vars(import_module(module.name))
        written = content.get("FORMATS", (content.get("FORMAT"),))
        if all(one in FORMATS.values() for one in written):
            yield f"## {', '.join(one.name for one in written)}\n\n{content['__doc__']}\n"


def python() -> Iterator[str]:
    """Python."""
    for module in (avex_serve, avex_serve.training):
        yield f"## {module.__name__}\n"
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield f"### {name}\n\n```python\n{name}{inspect.signature(value)}\n```\n\n{_text(value)}\n"


def _text(value: Any) -> str:
    """Its docstring, with sections of arguments as lists."""
    text = inspect.getdoc(value) or ""
    sections = re.split(r"^(Args|Returns|Raises|Attributes|Yields):\n", text, flags=re.MULTILINE)
    parts = [sections[0].strip()]
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        entries = re.sub(r"^(\w[\w.]*): ", r"- `\1`: ", textwrap.dedent(body), flags=re.MULTILINE)
        parts.append(f"**{title}**\n\n{entries.strip()}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
