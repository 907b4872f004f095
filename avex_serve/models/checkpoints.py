"""Checkpoints: read a file as a state dict, and load it strictly into a module. Pickled objects are refused."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avex_serve.models.base_model import ModelBase

StateDict = dict[str, Tensor]

# Wrappers around a state dict, and prefixes that training frameworks put before every name. The names of some
# modules begin with ``model.``, so a prefix is removed only if the names fit better without it.
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "model.", "probe.", "net.", "network.")
# What torch.compile and FSDP put before the names of a module, wherever they were applied.
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Losses and metrics, which the module of a training framework holds beside the model.
_BESIDE = re.compile(
    r"((train|val|valid|validation|test)_?)?"
    r"(metric|loss|criterion|acc|accuracy|f1|auroc|auc|ap|map|precision|recall|confmat|class_weight|pos_weight)s?"
    r"(_\w+)?(\.|$)",
    re.IGNORECASE,
)

# Names that differ between writers of the same tensor: pattern → name in our modules.
_RENAMES = (
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
    # EAT as fairseq writes it. avex doesn't load these names.
    (re.compile(r"^modality_encoders\.IMAGE\.context_encoder\.norm\."), "model.pre_norm."),
    (re.compile(r"^modality_encoders\.IMAGE\."), "model."),
    (re.compile(r"^blocks\."), "model.blocks."),
)

# Only pre-training uses these: EAT's decoder, which restores masked patches.
_UNUSED = re.compile(r"(^|\.)modality_encoders\.IMAGE\.decoder\.")

# A head for another task, which embeddings don't pass through. Only names that begin so are classifiers: these words
# also occur inside backbones.
_CLASSIFIER = re.compile(r"^(module\.|model\.|_orig_mod\.)*(classifier|head|classification_head)\.")
# Constant buffers: the module computes those that a checkpoint lacks.
_COMPUTED = re.compile(r"(^|\.)fbank\.(window|mel_fb)$")


def read_checkpoint(path: Path) -> tuple[StateDict, int | None]:
    """The state dict in a checkpoint, and the number of its classifier's classes if the file states it.

    The file is safetensors, or a torch file with only tensors, numbers and text. Wrappers of training frameworks are
    removed, names are not changed. Raises ValueError for an empty or truncated file, or one without a state dict.
    """
    content = _read(path)
    classes = _stated_classes(content)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}; expected names and tensors")
    others = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
    inner = [name for name in others if _is_state(content.get(name))]
    if len(inner) == 1 and len(others) == len(content):
        content, others = content[inner[0]], []
    elif len(inner) > 1:
        raise ValueError(f"checkpoint {path} holds several state dicts: {some(inner)}; save the one that you mean")
    if others:
        raise ValueError(
            f"checkpoint {path} holds no state dict: next to tensors it has {some(others)}; expected tensors only, "
            f"or a mapping with them under {' or '.join(_WRAPPERS)}"
        )
    if not content:
        raise ValueError(f"checkpoint {path} holds no tensors; download it again")
    return {name: tensor for name, tensor in content.items() if not _UNUSED.search(name)}, classes


def read_state_dict(path: Path) -> StateDict:
    """The state dict in a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def load_backbone(model: ModelBase, state: StateDict, source: str, *, keep_classifier: bool) -> None:
    """Load a checkpoint into a backbone, completely or not at all.

    Names are adapted to the module's, see `brought_to`. Constant buffers of the front end may be missing. Unless
    `keep_classifier`, a classifier is loaded if it fits the module's, and ignored otherwise. Raises ValueError for
    tensors without values, for only zeros, and as `load_strictly`.
    """
    _refuse_placeholder(state, source)
    module = model.called_module
    own = module.state_dict()
    state = brought_to(own, state, model.trunk_name)
    optional = {name for name in own if _COMPUTED.search(name)}
    if not keep_classifier:
        optional |= {name for name in own if _CLASSIFIER.match(name)}
        state = {
            n: t for n, t in state.items() if not _CLASSIFIER.match(n) or (n in own and own[n].shape == t.shape)
        }
    load_strictly(module, {**{name: own[name] for name in optional}, **state}, source)


def brought_to(own: Iterable[str], state: StateDict, trunk: str | None = None) -> StateDict:
    """The state dict with names changed so that as many as possible are the module's.

    Prefixes of training frameworks are removed, names of other writers (`_RENAMES`) are replaced, and the name of
    the trunk (see `ModelBase.trunk_name`) is added or removed. Losses and metrics beside the model are left out.
    """
    known = set(own)
    # The same tensor under two names is part of one model: the backbone of a training module.
    twins = {name for name in _twins(state) if not name.startswith("probe.")}
    names = {name: _INSIDE.sub("", name) for name in state if name not in twins or name in known}
    names = {given: name for given, name in names.items() if name in known or not _BESIDE.match(name)}
    candidates = [names, _renamed(names)]
    while prefixes := [p for p in _PREFIXES if names and all(name.startswith(p) for name in names.values())]:
        names = {given: name.removeprefix(prefixes[0]) for given, name in names.items()}
        candidates.append(_renamed(names))
    if trunk is not None:
        candidates += [change(trunk, each) for each in candidates for change in (_inside, _outside)]
    # `max` returns the first of equally good candidates, which is the one with the fewest changes.
    best = max(
        (each for each in candidates if len(set(each.values())) == len(each)),
        key=lambda each: len(known.intersection(each.values())),
    )
    return {name: state[given] for given, name in best.items() if name in known or not _BESIDE.match(name)}


def load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict whose names and shapes are the module's. If they differ, a ValueError lists how."""
    own = module.state_dict()
    # Some writers store a scalar with shape (1,), which torch accepts too.
    state = {n: t.reshape(()) if t.shape == (1,) and n in own and own[n].ndim == 0 else t for n, t in state.items()}
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    differences = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(shapes),
    }
    if any(differences.values()):
        listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in differences.items() if names)
        raise ValueError(f"{source} doesn't fit {type(module).__name__}: {listed}{_readings(own, state)}")
    module.load_state_dict(state)


def differing(own: StateDict, state: StateDict) -> list[str]:
    """Names of the weights in both whose values differ when compared in the precision of `state`."""
    both = [n for n, t in own.items() if n in state and t.is_floating_point() and not _COMPUTED.search(n)]
    return sorted(n for n in both if not torch.equal(own[n].to(state[n]).flatten(), state[n].flatten()))


def count_classes(state: StateDict) -> int | None:
    """Number of classes of the checkpoint's classifier (rows of its last matrix), or None without a classifier."""
    matrices = [name for name in state if _CLASSIFIER.match(name) and state[name].ndim == 2]
    return state[max(matrices, key=_natural)].shape[0] if matrices else None


def fingerprint(module: ModelBase) -> str:
    """Hex sha256 of everything that determines a backbone's embedding.

    That is its settings, and the names, types, shapes and bytes of its tensors, without a classifier's.
    """
    digest = hashlib.sha256(module.embedding_settings.encode())
    for name, tensor in sorted(plain_names(module.state_dict()).items()):
        if _CLASSIFIER.match(name):
            continue
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain_names(state: StateDict) -> StateDict:
    """The state dict without what torch.compile and FSDP put before the names of a module."""
    return {_INSIDE.sub("", name): tensor for name, tensor in state.items()}


def some(names: list[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(path: Path) -> Any:
    """The content of the file. Its first bytes determine the format, not its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"checkpoint {path} is empty (0 bytes); download it again")
    try:
        if start[8:] == b"{":  # the length of a header, and the header
            return load_file(path)
        if start[:2] in (b"PK", b"\x80\x02"):  # a zip archive, or torch's older format
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {refused[1]}" if refused else "objects"
        raise ValueError(
            f"checkpoint {path} holds more than tensors: {what}, which is not loaded because it could run code; "
            "save the state dict as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} can't be read ({error}); it may be truncated: download it again"
        ) from error
    raise ValueError(
        f"checkpoint {path} is neither safetensors nor a torch file; it begins with {start!r}: download it again"
    )


def _is_state(content: Any) -> bool:
    """Whether it is a state dict."""
    return (
        isinstance(content, Mapping) and bool(content) and all(isinstance(each, Tensor) for each in content.values())
    )


def _twins(state: StateDict) -> Iterator[str]:
    """Names of tensors that are there under ``probe.…`` too."""
    places = {t.data_ptr() for name, t in state.items() if name.startswith("probe.") and t.numel()}
    return (name for name, t in state.items() if t.numel() and t.data_ptr() in places)


def _readings(own: Collection[str], state: StateDict) -> str:
    """How many names would fit without a prefix, for the two best prefixes; nothing if none would fit better."""
    prefixes = {"", *(name[: match.end()] for name in state for match in re.finditer(r"\.", name))}
    fits = {p: sum(name.startswith(p) and name[len(p) :] in own for name in state) for p in prefixes}
    best = sorted(prefixes, key=lambda prefix: (-fits[prefix], len(prefix)))[:2]
    if not best[0] or not fits[best[0]]:
        return ""
    listed = [f"{f'without {p!r}' if p else 'as they are'} {fits[p]} of {len(own)} fit" for p in best]
    nearest = f"the nearest readings of its {len(state)} names: {'; '.join(listed)}"
    return f"; {nearest}. Save the state dict of the model alone"


def _stated_classes(content: Any) -> int | None:
    # Where avex's trainer and others write it.
    places = [content] if isinstance(content, Mapping) else []
    places += [place["model_config"] for place in places if isinstance(place.get("model_config"), Mapping)]
    found = [place["num_classes"] for place in places if isinstance(place.get("num_classes"), int)]
    return found[0] if found else None


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts 10 after 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _refuse_placeholder(state: StateDict, source: str) -> None:
    """Raise ValueError for the remains of a failed upload or download: tensors without values, or only zeros."""
    empty = sorted(name for name, tensor in state.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(f"{source} has {len(empty)} tensors of size zero: {some(empty)}; download it again")
    weights = [tensor for tensor in state.values() if tensor.is_floating_point()]
    if not any(tensor.any() for tensor in weights):
        raise ValueError(f"{source} holds nothing but zeros in {len(state)} tensors; download it again")


def _inside(trunk: str, names: Mapping[str, str]) -> dict[str, str]:
    # Some classifiers are inside the trunk, others are next to it.
    inside = {given: f"{trunk}.{name}" for given, name in names.items()}
    return {
        g: name if _CLASSIFIER.match(name) and not _CLASSIFIER.match(inside[g]) else inside[g]
        for g, name in names.items()
    }


def _outside(trunk: str, names: Mapping[str, str]) -> dict[str, str]:
    return {given: name.removeprefix(f"{trunk}.") for given, name in names.items()}


def _renamed(names: Mapping[str, str]) -> dict[str, str]:
    for pattern, replacement in _RENAMES:
        names = {given: pattern.sub(replacement, name) for given, name in names.items()}
    return dict(names)
