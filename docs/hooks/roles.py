"""mkdocstrings: the docstrings' Sphinx roles and double backticks as Markdown, with links where there is a target."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?P<role>class|func|meth|mod|attr):`(?P<short>~?)(?P<name>[\w.]+)`")
MODULES = ("ewc_fast.", "torch.")


class Roles(griffe.Extension):
    """Changes the docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None or obj.is_alias:
            return

        def link(role: re.Match[str]) -> str:
            name = role["name"]
            text = name.rpartition(".")[2] if role["short"] else name
            owner = obj if obj.is_class else obj.parent
            if name.startswith(MODULES) or owner is None:
                target = name
            elif name[0].isupper():  # a class of the package
                target = f"ewc_fast.{name}"
            else:  # a function of the same module, or a member of the same class
                target = f"{(obj.module if role['role'] == 'func' else owner).path}.{name}"
            return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'

        obj.docstring.value = re.sub(r"``(.+?)``", r"`\1`", ROLE.sub(link, obj.docstring.value), flags=re.DOTALL)
