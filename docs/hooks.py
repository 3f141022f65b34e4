"""Hooks of mkdocs: links that leave docs/, and the names of the API reference.

On a code host the pages link to files of the repository (`../WORKSPACE.md`). The site has none of these files: there,
such a link becomes its text and the file's name, or a link into `repo_url` if mkdocs.yml sets it.
"""

import ast
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_NAMES = "<!-- names of mmrf_jax -->"


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrite a page before it is converted."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match) -> str:
        text, target = found[1], found[2]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return found[0]
        if path == "README.md":
            return f"[{text}]({posixpath.relpath('index.md', folder or '.')})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text if path in text or target in text else f"{text} (`{path}`)"

    return _LINK.sub(link, markdown).replace(_NAMES, "\n\n".join(f"::: {name}" for name in public_names()))


def public_names(package: str = "mmrf_jax") -> list[str]:
    """Return the names in `__all__` of a package, and in that of each module among them."""
    names = []
    for name in _exported(ROOT / package / "__init__.py"):
        if (ROOT / package / name / "__init__.py").exists():
            names += [f"{package}.{name}.{inner}" for inner in _exported(ROOT / package / name / "__init__.py")]
        elif not name.startswith("_"):
            names.append(f"{package}.{name}")
    return names


def _exported(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(eval(compile(ast.Expression(node.value), path.name, "eval"), {"__builtins__": {}}))
    raise ValueError(f"{path} has no __all__; add one")
