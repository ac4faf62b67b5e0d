"""mkdocs: what pages link to outside of docs/ becomes part of the site.

The pages are written to be read in the repository too, where ``../examples/coupling.py`` and the like work. Here files
are copied to ``repository/`` in the site and the links follow; a folder, which a site cannot show, loses its link.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\(\.\./(?P<target>[^)#]+)(?P<anchor>#[^)]*)?\)")
HOME = {"README.md": "index.md", "README.zh-CN.md": "index.md"}


def _name(target: str) -> str:
    """Where a file is in the site; Markdown as plain text, for its own links are the repository's."""
    return f"repository/{target}.txt" if target.endswith(".md") else f"repository/{target}"


def on_files(files: Files, config: Any) -> Files:
    for page in list(files.documentation_pages()):
        for link in OUTSIDE.finditer(page.content_string):
            target = link["target"]
            path = ROOT / target
            if target in HOME or not path.is_file() or files.get_file_from_path(_name(target)):
                continue
            files.append(File.generated(config, _name(target), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def inside(link: re.Match[str]) -> str:
        target = link["target"]
        if target in HOME:
            return f"{link['image']}[{link['text']}]({HOME[target]}{link['anchor'] or ''})"
        if not (ROOT / target).exists():
            return link[0]  # mkdocs says so, and --strict makes it an error
        if (ROOT / target).is_dir():
            return link["text"]
        return f"{link['image']}[{link['text']}]({_name(target)})"

    return OUTSIDE.sub(inside, markdown)
