"""Turns the reStructuredText in the package's docstrings into Markdown: formulas, references and doctests."""

import functools
import re
import textwrap
from contextlib import suppress

import griffe

MATH_BLOCK = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n(?:\1[ ]{2,}.*|[ ]*(?=\n)))*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?(?:[^`<]*<)?([^`>]+)>?`")
DOCTEST = re.compile(r"^([ ]*)(>>> .*(?:\n\1.+)*)", re.MULTILINE)


def markdown(text, link):
    text = MATH_BLOCK.sub(_block, text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # of a literal block, which is indented in Markdown, too
    text = re.sub(r":math:`([^`]+)`", lambda found: "$" + " ".join(found[1].split()) + "$", text)
    text = ROLE.sub(lambda found: link(found[1]), text)
    return DOCTEST.sub(r"\1```pycon\n\1\2\n\1```", text)


def _block(found):
    indent, formula = found[1], textwrap.dedent(found[2]).strip()
    if "&" in formula:
        formula = "\\begin{split}\n" + formula + "\n\\end{split}"  # not align, which is numbered
    # A blank line would end the block.
    lines = [line for line in formula.splitlines() if line.strip()]
    return "\n".join(indent + line for line in ["$$", *lines, "$$"]) + "\n"


class RestructuredText(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        self.package = pkg
        self._visit(pkg)

    def _visit(self, obj):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, lambda name: self._link(obj, name))
        for member in obj.members.values():
            if not member.is_alias:
                self._visit(member)

    def _link(self, obj, name):
        """To what has a place on an API page; the bare name of anything else."""
        module = obj if obj.is_module else obj.module
        for path in (name, f"{module.path}.{name}"):
            package, *parts = path.split(".")
            if package == self.package.name and parts and not any(part.startswith("_") for part in parts):
                with suppress(KeyError, griffe.AliasResolutionError):  # not ours
                    found = functools.reduce(lambda owner, part: owner.all_members[part], parts, self.package)
                    return f"[`{path if found.is_module else '.'.join(parts[1:])}`][{path}]"
        if name.startswith(f"{self.package.name}."):
            raise LookupError(f"the docstring of {obj.path} refers to {name}, which is not there")
        return f"`{name}`"
