"""Which windows train and which evaluate: groups of recordings, never single windows. Needs no torch."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from avex_serve.errors import InputError

FOLDS: Final = 5
HELD_OUT: Final = 5  # one group in five
ENOUGH: Final = 10  # groups with a label, so that a fifth of them says something about it
ALIKE: Final = 0.999  # cosine of embeddings, less their mean, from which on two windows are near-duplicates
_BLOCK: Final = 2048  # windows that are compared at once
_SKETCH: Final = 64  # numbers of a sketch


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
        The split of the data if it has one; else a fifth of the groups held out, if `ENOUGH` groups have each label;
        else up to five folds of groups; else, with one group, nothing to evaluate on.

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
    holding = [np.unique(groups[targets[:, i] == 1]).size for i in range(targets.shape[1])]
    if min(holding) >= ENOUGH:
        test = folds(targets, groups, HELD_OUT, seed) == 0
        return Split("hold-out", ((~test, test),))
    fold = folds(targets, groups, min(FOLDS, count), seed)
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


def near_duplicates(
    embeddings: np.ndarray, train: np.ndarray, test: np.ndarray, limit: int = 20
) -> list[tuple[int, int, float]]:
    """Pairs of windows across a split that are nearly the same, such as copies in another format.

    Args:
        embeddings: (N, D) or (N, ..., D) float32; of the latter, means are compared.
        train: (N,) bool.
        test: (N,) bool.
        limit: most pairs to return, one for each window of the test at most.

    Returns:
        Index of the window of the test and of that of the training, and their cosine, the closest first.
    """
    ours, theirs = np.flatnonzero(test), np.flatnonzero(train)
    if not theirs.size or not ours.size:
        return []
    embeddings = _means(embeddings)
    mean = embeddings[theirs[:: max(1, theirs.size // _BLOCK)]].mean(axis=0)
    # The nearest window is found among sketches, which keep angles up to a tenth, and then compared as it is.
    width = embeddings.shape[1]
    sketch = (
        np.random.default_rng(0).standard_normal((width, _SKETCH), np.float32) if width > _SKETCH else np.eye(width)
    )
    left, right = (
        np.concatenate([_unit(_directions(embeddings, block, mean) @ sketch) for block in _blocks(rows)]).astype(
            np.float32
        )
        for rows in (ours, theirs)
    )
    pairs = []
    for first in _blocks(np.arange(ours.size)):
        best, where = np.full(first.size, -1.0), np.zeros(first.size, int)
        for second in _blocks(np.arange(theirs.size)):
            cosines = left[first] @ right[second].T
            nearest = cosines.argmax(axis=1)
            found = cosines[np.arange(first.size), nearest]
            where = np.where(found > best, second[nearest], where)
            best = np.maximum(found, best)
        test_rows, train_rows = ours[first], theirs[where]
        exact = (_directions(embeddings, test_rows, mean) * _directions(embeddings, train_rows, mean)).sum(axis=1)
        pairs += [(int(test_rows[i]), int(train_rows[i]), float(exact[i])) for i in np.flatnonzero(exact >= ALIKE)]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]


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
