"""Adds the committed notebooks to the site as pages, with the outputs that they were committed with."""

import re
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

FOLDER = "examples/notebooks"


def on_files(files, config):
    main = f"{config.repo_url}/blob/main"
    for path in sorted((Path(__file__).parent.parent / FOLDER).glob("*.ipynb")):
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        text, resources = MarkdownExporter().from_filename(str(path), resources=names)
        # On GitHub, the links of a notebook have to be whole addresses.
        text = re.sub(rf"{main}/docs/(\w+\.md)", r"../\1", text)
        text = re.sub(rf"{main}/{FOLDER}/(\w+)\.ipynb", r"\1.md", text)
        text += f"\n\nThis page is the notebook [`{FOLDER}/{path.name}`]({main}/{FOLDER}/{path.name}).\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files
