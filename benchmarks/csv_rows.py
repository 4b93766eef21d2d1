"""The rows of a CSV file of results."""

import csv


def read(path):
    """An empty list where there is no file yet."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def append(path, row):
    """An interrupted benchmark can go on from the rows that are written."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
