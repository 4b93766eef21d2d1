"""Files and packages that are not part of the project, with what to do where one is missing."""

import importlib
from pathlib import Path

FILES = {
    "leaves": "photographs of PlantVillage (Hughes & Salathé 2015, arXiv 1511.08060, CC BY-SA 3.0) at 128x128 pixels "
    "in images128.zip, and labels.csv with the columns image, crop, condition, photo",
    "cars196": "the training images of Stanford Cars (Krause et al. 2013) at 144x144 pixels in images144.zip, and "
    "labels.csv with the columns image, class",
    "clinc150": "data_full.json and domains.json from github.com/clinc/oos-eval, folder data (CC BY 3.0)",
}


def path_of(folder, name):
    path = Path(folder or ".") / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: {FILES[path.parent.name]}. --data names the folder that holds {name}.")
    return path


def package(module, distribution):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"Cannot import {module}: pip install {distribution}") from error
