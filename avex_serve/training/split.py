"""Which windows train and which evaluate: groups of recordings, never single windows. Needs no torch."""

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from avex_serve.errors import InputError

FOLDS: Final = 5  # the first of them is held out, if it has enough groups
FEW: Final = 5  # evaluated groups with a label, below which its figures say little
ALIKE: Final = 0.999  # cosine of embeddings, less their mean, from which on two windows are near-duplicates
_BLOCK: Final = 2048  # windows that are compared at once
_SKETCH: Final = 64  # numbers of a sketch
_NEAR: Final = 0.995  # cosine of the sketches of windows that are compared


@dataclass(frozen=True)
class Split:
    """Pairs of windows to train with and windows to evaluate on, each (N,) bool."""

    how: str  # "split column", "hold-out", "cross-validation" or "none"
    parts: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def trains_on_all(self) -> bool:
        """Whether the saved head is trained on all windows, and the evaluated heads on parts of them."""
        return self.how in ("cross-validation", "none")


def split(targets: np.ndarray, groups: np.ndarray, given: np.ndarray, seed: int) -> Split:
    """Split windows by their groups.

    Args:
        targets: (N, C) 1, 0 or -1.
        groups: (N,) int.
        given: (N,) str, "train", "test" or "" where the data doesn't say.
        seed: of the choice of groups.

    Returns:
        The split of the data if it has one; else a fifth of the groups held out, if at least `FEW` of these have
        each label; else up to five folds of groups; else, with one group, nothing to evaluate on.

    Raises:
        InputError: a split for some windows only, or for one of training and testing only.
    """
    said = set(given.tolist())
    if said - {""}:
        if said != {"train", "test"}:
            raise InputError(
                f"the data has the splits {', '.join(repr(name or 'none') for name in sorted(said))}; expected "
                "train and test, and one of them for each recording"
            )
        both = np.intersect1d(groups[given == "train"], groups[given == "test"])
        if both.size:
            raise InputError(
                f"{both.size} groups are in both train and test; give each group one split, or leave out --group-by"
            )
        return Split("split column", ((given == "train", given == "test"),))
    count = np.unique(groups).size
    if count < 2:
        return Split("none", ())
    fold = folds(targets, groups, min(FOLDS, count), seed)
    held_out = fold == 0
    if min(np.unique(groups[held_out & (label == 1)]).size for label in targets.T) >= FEW:
        return Split("hold-out", ((~held_out, held_out),))
    return Split("cross-validation", tuple((fold != i, fold == i) for i in range(fold.max() + 1)))


def folds(targets: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Assign groups to folds so that each fold gets its share of every label.

    The method is the iterative stratification of Sechidis et al. 2011: the groups with the rarest label are placed
    first, each into the fold that lacks most of this label.

    Args:
        targets: (N, C) 1, 0 or -1.
        groups: (N,) int.
        count: number of folds, at most the number of groups.
        seed: of the order of groups, and of the choice between equal folds.

    Returns:
        (N,) int, the fold of each window.
    """
    known, member = np.unique(groups, return_inverse=True)
    holds = np.zeros((known.size, targets.shape[1]), bool)
    np.logical_or.at(holds, member, targets == 1)
    rng = np.random.default_rng(seed)
    lacking = np.tile(holds.sum(axis=0) / count, (count, 1))  # groups with each label that a fold still lacks
    room = np.full(count, known.size / count)  # groups that it lacks in all
    fold = np.full(known.size, -1)

    def place(group: int, label: int | None) -> None:
        keys = [room] if label is None else [room, lacking[:, label]]
        best = int(np.lexsort([rng.random(count), *keys])[-1])
        fold[group] = best
        room[best] -= 1
        lacking[best] -= holds[group]

    while (left := holds[fold < 0]).any():
        counts = left.sum(axis=0)
        label = int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        for group in rng.permutation(np.flatnonzero((fold < 0) & holds[:, label])):
            place(int(group), label)
    for group in rng.permutation(np.flatnonzero(fold < 0)):
        place(int(group), None)
    return fold[member]


class Copies(NamedTuple):
    """Two recordings whose windows are nearly the same, and the two windows that are closest."""

    recordings: tuple[int, int]
    windows: tuple[int, int]
    cosine: float


def near_duplicates(embeddings: np.ndarray, recording: np.ndarray) -> list[Copies]:
    """Pairs of recordings that are nearly the same, such as copies in another format, by index.

    A pair is one if at least half of the windows of one of them are nearly the same as some of the other: a stretch
    of silence that two recordings share makes none.

    Args:
        embeddings: (N, D) or (N, ..., D) float32; of the latter, means are compared.
        recording: (N,) int.
    """
    embeddings = _means(embeddings)
    rows = np.arange(len(recording))
    mean = embeddings[:: max(1, rows.size // _BLOCK)].mean(axis=0)
    # Near windows are found among sketches, which keep angles up to a tenth, and then compared as they are.
    width = embeddings.shape[1]
    sketch = (
        np.random.default_rng(0).standard_normal((width, _SKETCH), np.float32) if width > _SKETCH else np.eye(width)
    )
    sketches = np.concatenate(
        [_unit(_directions(embeddings, block, mean) @ sketch).astype(np.float32) for block in _blocks(rows)]
    )
    matches: list[np.ndarray] = []  # window, and a recording that has one like it
    closest: dict[tuple[int, int], Copies] = {}
    for first in _blocks(rows):
        for second in _blocks(rows[first[0] :]):
            alike = sketches[first] @ sketches[second].T >= _NEAR
            i, j = np.nonzero(alike & (recording[first][:, None] != recording[second]))
            if not i.size:
                continue
            cosine = _cosines(_directions(embeddings, first, mean), _directions(embeddings, second, mean), i, j)
            near = cosine >= ALIKE
            one, other, cosine = first[i[near]], second[j[near]], cosine[near]
            swapped = recording[one] > recording[other]  # the recording with the lower number is the first of a pair
            one, other = np.where(swapped, other, one), np.where(swapped, one, other)
            matches += [np.stack(each, 1) for each in ((one, recording[other]), (other, recording[one]))]
            best = np.argsort(-cosine, kind="stable")
            pairs, found = np.unique(
                np.stack([recording[one], recording[other]])[:, best], axis=1, return_index=True
            )
            for (a, b), n in zip(pairs.T.tolist(), best[found].tolist(), strict=True):
                if (a, b) not in closest or cosine[n] > closest[a, b].cosine:
                    closest[a, b] = Copies((a, b), (int(one[n]), int(other[n])), float(cosine[n]))
    if not closest:
        return []
    windows, others = np.unique(np.concatenate(matches), axis=0).T
    counts = Counter(zip(recording[windows].tolist(), others.tolist(), strict=True))
    sizes = np.bincount(recording)
    return [
        found
        for (a, b), found in sorted(closest.items())
        if counts[a, b] >= sizes[a] / 2 or counts[b, a] >= sizes[b] / 2
    ]


def _cosines(first: np.ndarray, second: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The cosine of each pair of unit vectors, row `i` of the first and row `j` of the second."""
    return np.concatenate([(first[i[block]] * second[j[block]]).sum(axis=1) for block in _blocks(np.arange(i.size))])


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _BLOCK] for start in range(0, rows.size, _BLOCK)]


def _directions(embeddings: np.ndarray, rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Embeddings less their mean as unit vectors, (rows, D); zero for silence, which equals itself."""
    return _unit(embeddings[rows] - mean)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-6))


def _means(embeddings: np.ndarray) -> np.ndarray:
    """(N, D); sequences are read a few at a time, since they may be larger than memory."""
    if embeddings.ndim == 2:
        return embeddings
    width = embeddings.shape[-1]
    return np.concatenate(
        [
            embeddings[i : i + 64].reshape(-1, np.prod(embeddings.shape[1:-1]), width).mean(axis=1)
            for i in range(0, len(embeddings), 64)
        ]
    )
