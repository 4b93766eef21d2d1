"""Ends with an error unless all that a release says of itself agrees: tag, version, CHANGELOG, CITATION, address.

    python .ci/check_release.py TAG REPOSITORY

Nobody can change a file on PyPI, so this runs before anything is built.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def find(root: Path, path: str, pattern: str) -> str:
    match = re.search(pattern, (root / path).read_text(), re.MULTILINE)
    return match[1] if match else "nothing"


def problems(tag: str, repository: str, root: Path = ROOT) -> list[str]:
    version = find(root, "pml_multiproxy/__init__.py", r'^__version__ = "(.+)"')
    cited = find(root, "CITATION.cff", r"^version: (.+)")
    newest = find(root, "CHANGELOG.md", r"^## (.+)")
    homepage = find(root, "pyproject.toml", r'^Homepage = "(.+)"')
    found = []
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, but the version is {version}.")
    if cited != version:
        found.append(f"CITATION.cff has version {cited} instead of {version}.")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest):
        found.append(f"CHANGELOG.md begins with '{newest}' instead of '[{version}] - YYYY-MM-DD'.")
    if homepage != repository:
        found.append(f"pyproject.toml has Homepage {homepage}, but this is {repository}: PyPI would link elsewhere.")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(*sys.argv[1:])) or 0)
