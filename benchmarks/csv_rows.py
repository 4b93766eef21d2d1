"""The rows of a CSV file of results."""

import csv


def read(path):
    """An empty list where there is no file yet."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append(path, row):
    """At once, so that an interrupted benchmark goes on from there."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
