"""Checkpoints: from a file to a state dict, and strictly into a module. Never a pickle."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Wrappers around a state dict, and prefixes that training frameworks put before every name. EfficientNet's own names
# begin with ``model.``, so a prefix is taken off only if the module's names don't have it.
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "model.")
_BACKBONE = "backbone."

# Names that differ between writers of the same tensor: pattern → name in our modules.
_RENAMES = (
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
)

# A head for another task, which an embedding doesn't pass through. Inside of a backbone these words mean nothing.
_CLASSIFIER = re.compile(r"^(module\.)?(model\.)?(classifier|head|classification_head)\.")
# Constant buffers that some checkpoints hold and the module computes if they don't.
_COMPUTED = re.compile(r"(^|\.)fbank\.(window|mel_fb)$")


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a checkpoint by name: safetensors, or a torch file that holds nothing but tensors.

    Wrappers of training frameworks are taken off, and names brought to ours.

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
    return {_rename(name): tensor for name, tensor in content.items()}


def load_backbone(module: nn.Module, state: StateDict, source: str, *, keep_classifier: bool) -> None:
    """Load a checkpoint into a backbone, whole or not at all.

    Names may carry the prefixes of training frameworks, and lack or carry ``backbone.``. Constant buffers of the
    front end may be missing. Unless `keep_classifier`, a classifier is loaded if it fits the module's, and left out
    otherwise.

    Raises:
        ValueError: no values or only zeros; missing or unexpected names, or other shapes, all listed.
    """
    _refuse_placeholder(state, source)
    own = module.state_dict()
    state = _with_backbone_prefix(without_prefixes(state, own), own)
    optional = {name for name in own if _COMPUTED.search(name)}
    if not keep_classifier:
        optional |= {name for name in own if _CLASSIFIER.match(name)}
        state = {
            n: t for n, t in state.items() if not _CLASSIFIER.match(n) or (n in own and own[n].shape == t.shape)
        }
    load_strictly(module, {**{name: own[name] for name in optional}, **state}, source)


def without_prefixes(state: StateDict, own: Iterable[str]) -> StateDict:
    """The state dict without the prefixes of training frameworks that a module with these names doesn't have."""
    own = list(own)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict whose names and shapes are exactly the module's.

    Raises:
        ValueError: otherwise, with what differs.
    """
    own = module.state_dict()
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


def fingerprint(module: nn.Module) -> str:
    """Hex sha256 over names, types, shapes and bytes of what makes a backbone's embedding (no classifier)."""
    digest = hashlib.sha256()
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


def _with_backbone_prefix(state: StateDict, own: Iterable[str]) -> StateDict:
    wanted = any(name.startswith(_BACKBONE) for name in own)
    if wanted == any(name.startswith(_BACKBONE) for name in state):
        return state
    if not wanted:
        return {name.removeprefix(_BACKBONE): tensor for name, tensor in state.items()}
    return {name if _CLASSIFIER.match(name) else f"{_BACKBONE}{name}": t for name, t in state.items()}


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
