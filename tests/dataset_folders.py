"""Folders in the layouts of CUB200, Cars196 and StanfordOnlineProducts, as powerful-benchmarker reads them.

It insists on their true numbers of classes and images, so few pictures go by as many names. Two images are of each
class, and all that are left of the last, which is for the test, so that the folds are small.
"""

import numpy as np
from PIL import Image
from scipy.io import savemat

PICTURES = 200


def draw(folder):
    """Names of pictures, each of a colour of its own, by which they can be retrieved."""
    folder.mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(PICTURES)]
    colours = np.random.default_rng(0).integers(256, size=(PICTURES, 3))
    for name, colour in zip(names, colours.tolist(), strict=True):
        Image.new("RGB", (32, 32), tuple(colour)).save(folder / name)
    return names


def labels(classes, images):
    return [*np.arange(classes).repeat(2).tolist(), *[classes - 1] * (images - 2 * classes)]


def cub200(root):
    folder = root / "cub2011" / "CUB_200_2011"
    names = draw(folder / "pictures")
    for label in range(200):
        (folder / "images" / f"{label:03}").mkdir(parents=True)
    for number, label in enumerate(labels(200, 11788)):
        (folder / "images" / f"{label:03}" / f"{number}.jpg").hardlink_to(folder / "pictures" / names[label])


def cars196(root):
    folder = root / "cars196"
    names = draw(folder / "car_ims")
    rows = [(f"car_ims/{names[label]}", label + 1) for label in labels(196, 16185)]
    annotations = np.array([rows], dtype=[("relative_im_path", object), ("class", object)])
    class_names = np.array([[f"car {label}" for label in range(196)]], dtype=object)
    savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": class_names})


def stanford_online_products(root):
    folder = root / "Stanford_Online_Products"
    names = draw(folder / "bicycle_final")
    rows = [
        f"{number} {label + 1} 1 bicycle_final/{names[label % PICTURES]}\n"
        for number, label in enumerate(labels(22634, 120053), 1)
    ]
    header = "image_id class_id super_class_id path\n"
    (folder / "Ebay_train.txt").write_text(header + "".join(rows[: 2 * 11318]))
    (folder / "Ebay_test.txt").write_text(header + "".join(rows[2 * 11318 :]))
