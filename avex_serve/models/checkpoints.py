"""Checkpoints: from a file to a state dict, and strictly into a module. Never a pickle."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avex_serve.models.base_model import ModelBase

StateDict = dict[str, Tensor]

# Wrappers around a state dict, and prefixes that training frameworks put before every name. Some modules' own names
# begin with ``model.``, so a prefix is taken off only where the names fit better without it.
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "model.")

# Names that differ between writers of the same tensor: pattern → name in our modules.
_RENAMES = (
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
    # EAT as fairseq writes it, which avex leaves unread.
    (re.compile(r"^modality_encoders\.IMAGE\.context_encoder\.norm\."), "model.pre_norm."),
    (re.compile(r"^modality_encoders\.IMAGE\."), "model."),
    (re.compile(r"^blocks\."), "model.blocks."),
)

# Parts of a checkpoint that only pre-training uses: EAT's decoder, which restores masked patches.
_UNUSED = re.compile(r"(^|\.)modality_encoders\.IMAGE\.decoder\.")

# A head for another task, which an embedding doesn't pass through. Inside of a backbone these words mean nothing.
_CLASSIFIER = re.compile(r"^(module\.|model\.)*(classifier|head|classification_head)\.")
# Constant buffers that some checkpoints hold and the module computes if they don't.
_COMPUTED = re.compile(r"(^|\.)fbank\.(window|mel_fb)$")


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a checkpoint by name: safetensors, or a torch file that holds nothing but tensors.

    Wrappers of training frameworks are taken off; names stay as they are, see `brought_to`.

    Raises:
        ValueError: empty, truncated, or no state dict.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"checkpoint {path} is empty (0 bytes); get it again")
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"checkpoint {path} can't be read ({error}); it may be truncated: get it again") from error
    except Exception as error:  # torch.load wraps a refused pickle in pickle.UnpicklingError
        raise ValueError(
            f"checkpoint {path} holds more than tensors ({error}); save its state dict as safetensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"checkpoint {path} holds no state dict; expected names and tensors")
    if not content:
        raise ValueError(f"checkpoint {path} holds no tensors; get it again")
    return {name: tensor for name, tensor in content.items() if not _UNUSED.search(name)}


def load_backbone(model: ModelBase, state: StateDict, source: str, *, keep_classifier: bool) -> None:
    """Load a checkpoint into a backbone, whole or not at all.

    Names are brought to the module's: they may carry the prefixes of training frameworks, lack or carry the model's
    `trunk_name`, and be of another writer. Constant buffers of the front end may be missing. Unless
    `keep_classifier`, a classifier is loaded if it fits the module's, and left out otherwise.

    Raises:
        ValueError: no values or only zeros; missing or unexpected names, or other shapes, all listed.
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
    """The state dict with names as the module has them, as far as prefixes and other writers make the difference.

    Args:
        own: the module's names.
        state: the tensors by the names in the checkpoint.
        trunk: a submodule whose name may be left out, or put before every name; see `ModelBase.trunk_name`.
    """
    names = {name: name for name in state}
    candidates = [names, _renamed(names)]
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names.values()):
            names = {given: name.removeprefix(prefix) for given, name in names.items()}
            candidates.append(_renamed(names))
    if trunk is not None:
        candidates += [change(trunk, each) for each in candidates for change in (_inside, _outside)]
    known = set(own)
    # Of those that match most of the module's names, the one with the fewest changes.
    best = max(
        (each for each in candidates if len(set(each.values())) == len(each)),
        key=lambda each: len(known.intersection(each.values())),
    )
    return {best[given]: tensor for given, tensor in state.items()}


def load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict whose names and shapes are exactly the module's.

    Raises:
        ValueError: otherwise, with what differs.
    """
    own = module.state_dict()
    # Some writers store a scalar as one value; torch takes that too.
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
        told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in differences.items() if names)
        raise ValueError(f"{source} doesn't fit {type(module).__name__}: {told}")
    module.load_state_dict(state)


def count_classes(state: StateDict) -> int | None:
    """Classes of the checkpoint's classifier, the rows of its last matrix, or None if it has none."""
    matrices = [name for name in sorted(state) if _CLASSIFIER.match(name) and state[name].ndim == 2]
    return state[matrices[-1]].shape[0] if matrices else None


def fingerprint(module: ModelBase) -> str:
    """Hex sha256 over what makes a backbone's embedding (no classifier).

    That is its settings, and the names, types, shapes and bytes of its tensors.
    """
    digest = hashlib.sha256(module.embedding_settings.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if _CLASSIFIER.match(name):
            continue
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_placeholder(state: StateDict, source: str) -> None:
    """Raise ValueError for what a failed upload or an unfinished download leaves: no values, or only zeros."""
    empty = sorted(name for name, tensor in state.items() if tensor.numel() == 0)
    if empty:
        raise ValueError(f"{source} has {len(empty)} tensors of size zero: {_some(empty)}; get it again")
    if not any(tensor.any() for tensor in state.values()):
        raise ValueError(f"{source} holds nothing but zeros in {len(state)} tensors; get it again")


def _renamed(names: Mapping[str, str]) -> dict[str, str]:
    return {given: _rename(name) for given, name in names.items()}


def _inside(trunk: str, names: Mapping[str, str]) -> dict[str, str]:
    # Some classifiers are part of the trunk, others stand beside it.
    inside = {given: f"{trunk}.{name}" for given, name in names.items()}
    return {
        g: name if _CLASSIFIER.match(name) and not _CLASSIFIER.match(inside[g]) else inside[g]
        for g, name in names.items()
    }


def _outside(trunk: str, names: Mapping[str, str]) -> dict[str, str]:
    return {given: name.removeprefix(f"{trunk}.") for given, name in names.items()}


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
