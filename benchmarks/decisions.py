"""What a network decides, as opposed to the numbers it computes: classes, boxes, text, masks, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Kind = Literal["class", "box", "text", "mask", "embedding"]

# A mask value this close to its threshold may fall on either side.
TIE = 1e-3


def same_decision(
    kind: Kind, reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], cosine: float = 0.9999
) -> bool:
    """True if `outputs` lead to what `reference` leads to. Judged on the first output.

    class: arg-max of the last axis. box: the classes of all boxes scoring above 0.2 and the best box (YOLO layout:
    batch, 4 + classes, boxes). text: CTC greedy string per sample. mask: above 0.5 element by element, ties aside.
    embedding: cosine similarity of at least `cosine`.
    """
    a, b = reference[0], outputs[0]
    if a.shape != b.shape:
        return False
    if kind == "class":
        return bool(np.array_equal(a.argmax(-1), b.argmax(-1)))
    if kind == "box":
        return boxes(a) == boxes(b)
    if kind == "text":
        return greedy_text(a) == greedy_text(b)
    if kind == "mask":
        clear = np.abs(a - 0.5) > TIE
        return bool(np.array_equal((a > 0.5)[clear], (b > 0.5)[clear]))
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return bool(x @ y >= cosine * np.linalg.norm(x) * np.linalg.norm(y))


def boxes(output: np.ndarray, threshold: float = 0.2) -> set[tuple[int, int, int]]:
    """(sample, box, class) of every box whose best class scores above `threshold`, and of the best box of all."""
    scores = output[:, 4:, :]
    best, classes = scores.max(1), scores.argmax(1)
    kept = best > threshold
    kept[np.arange(len(best)), best.argmax(1)] = True
    return {(int(s), int(i), int(classes[s, i])) for s, i in zip(*np.nonzero(kept), strict=True)}


def greedy_text(output: np.ndarray) -> list[tuple[int, ...]]:
    """CTC greedy decoding of [batch, time, symbols]: repeats merged, symbol 0 (blank) dropped."""
    texts: list[tuple[int, ...]] = []
    for row in output.argmax(-1):
        merged = row[np.insert(row[1:] != row[:-1], 0, True)]
        texts.append(tuple(int(symbol) for symbol in merged if symbol))
    return texts
