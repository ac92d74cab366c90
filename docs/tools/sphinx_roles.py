"""References in docstrings, ``:func:`name```, as links where the documentation has the name."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)\.?([\w.\s]+)(?:\(\))?`")


class SphinxRoles(griffe.Extension):
    """Turns the references of every docstring into links of mkdocs-autorefs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(role: re.Match[str]) -> str:
            # Long names are broken over lines.
            short, path = role[1], "".join(role[2].split())
            where = path if "." in path else f"{obj.module.path}.{path}"
            shown = path.rpartition(".")[2] if short else path
            # Optional: what has no entry is shown as code.
            return f'<autoref identifier="{where}" optional><code>{shown}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
