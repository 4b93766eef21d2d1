"""Adds the committed pictures of results to the site, so that there is no second copy of them."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FOLDERS = ["benchmarks/*/results", "examples/results/*"]


def on_files(files, config):
    for folder in FOLDERS:
        for path in sorted(ROOT.glob(f"{folder}/*.png")):
            files.append(File.generated(config, f"img/{path.name}", abs_src_path=str(path)))
    return files
