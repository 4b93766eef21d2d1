"""What is published agrees with itself: the check before a release, and the text on PyPI."""

import importlib.util
import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADDRESS = "https://github.com/pml-multiproxy/pml-multiproxy"
FILES = ["pml_multiproxy/__init__.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"]


@pytest.fixture
def check_release():
    spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    """A copy of what the check reads, as version 1.2.3 about to be released."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    replace(tmp_path / FILES[0], r'^__version__ = ".*"', '__version__ = "1.2.3"')
    replace(tmp_path / FILES[1], r"^version: .*", "version: 1.2.3")
    replace(tmp_path / FILES[2], r"^## .*", "## [1.2.3] - 2030-01-31")
    return tmp_path


def replace(path, pattern, text):
    replaced, count = re.subn(pattern, text, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(replaced)


def test_a_release_that_agrees_with_itself_has_no_problems(check_release, root):
    assert check_release.problems("v1.2.3", ADDRESS, root) == []


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.4", "v1.2.3rc1"])
def test_another_tag_is_a_problem(tag, check_release, root):
    (problem,) = check_release.problems(tag, ADDRESS, root)
    assert tag in problem


@pytest.mark.parametrize(
    ("file", "pattern", "text"),
    [
        *(("CHANGELOG.md", r"^## .*", f"## {text}") for text in ("[Unreleased]", "[1.2.3]", "[1.2.2] - 2030-01-31")),
        ("CHANGELOG.md", r"^## .*", "## [1.2.3] - today"),
        ("CITATION.cff", r"^version: .*", "version: 1.2.2"),
    ],
)
def test_another_version_or_no_date_is_a_problem(file, pattern, text, check_release, root):
    replace(root / file, pattern, text)
    (problem,) = check_release.problems("v1.2.3", ADDRESS, root)
    assert file.split(".")[0] in problem


def test_another_repository_is_a_problem(check_release, root):
    (problem,) = check_release.problems("v1.2.3", "https://github.com/someone/else", root)
    assert "someone/else" in problem


@pytest.fixture(scope="module")
def text_on_pypi():
    try:
        return metadata.metadata("pml-multiproxy").get_payload()
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, so it has no metadata")


def test_links_and_pictures_on_pypi_are_absolute(text_on_pypi):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_on_pypi, flags=re.DOTALL))
    assert len(targets) > 3
    assert [target for target in targets if not target.startswith("https://")] == []


def test_pictures_on_pypi_are_files_of_the_repository(text_on_pypi):
    version = metadata.version("pml-multiproxy")
    raw = f"https://raw.githubusercontent.com/pml-multiproxy/pml-multiproxy/v{version}/"
    pictures = [path for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_on_pypi) if path.startswith(raw)]
    assert pictures
    assert all((ROOT / picture.removeprefix(raw)).exists() for picture in pictures)


def test_text_on_pypi_has_no_formulas_which_it_would_show_raw(text_on_pypi):
    assert re.findall(r"\$[^$`]+\$", re.sub(r"```.*?```", "", text_on_pypi, flags=re.DOTALL)) == []
