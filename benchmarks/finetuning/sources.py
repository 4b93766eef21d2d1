"""Files and packages that are not part of the project, with what to do where one is missing."""

import importlib
from pathlib import Path

FILES = {
    "leaves": "PlantVillage (Hughes & Salathé 2015, CC BY-SA 3.0)",
    "cars196": "the training part of Stanford Cars (Krause et al. 2013)",
    "clinc150": "CLINC150 (github.com/clinc/oos-eval, folder data, CC BY 3.0)",
}


def path_of(folder, name):
    path = Path(folder or ".") / name
    if not path.exists():
        raise SystemExit(f"{path} is missing, of {FILES[path.parent.name]}. --data names the folder that holds {name}.")
    return path


def package(module, distribution):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"Cannot import {module}: pip install {distribution}") from error
