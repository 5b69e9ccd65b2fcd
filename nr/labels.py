"""How concept labels are written as numbers, in arrays and on disk."""

NO_LABEL = 65_535
"""Stands where there is no label: the largest uint16, the type in which labels are stored."""

MAX_CONCEPTS = NO_LABEL
"""Most concepts that can be labelled: their indices 0..65534 leave `NO_LABEL` free."""
