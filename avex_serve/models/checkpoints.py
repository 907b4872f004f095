"""Checkpoints: from a path or URI to a state dict, and strictly into a module. Never a pickle."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from avex_serve.models.base_model import ModelBase

StateDict = dict[str, Tensor]

# Wrappers around a state dict, and prefixes that training frameworks put before every name.
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
_UNUSED = re.compile(r"^modality_encoders\.IMAGE\.decoder\.")

# A head for another task, which an embedding doesn't pass through.
_CLASSIFIER = ("classifier.", "model.classifier.")
_CLASSIFIER_WEIGHT = re.compile(r"^(model\.)?classifier\.(1\.)?weight$")
# Constant buffers that some checkpoints hold and the module computes if they don't.
_COMPUTED = re.compile(r"(^|\.)fbank\.(window|mel_fb)$")


def resolve_checkpoint(uri: str) -> Path:
    """The local file of a checkpoint.

    Args:
        uri: a path, ``file://…``, or ``hf://owner/repository/file[@revision]``, which is taken from the hub's
            cache or downloaded (``HF_HUB_OFFLINE=1``: from the cache only).

    Raises:
        FileNotFoundError: it isn't there, with what to do.
        ValueError: a scheme that is not known.
    """
    scheme = urlparse(uri).scheme if "://" in uri else ""
    if scheme == "hf":
        return _from_hub(uri)
    if scheme not in ("", "file"):
        raise ValueError(f"checkpoint {uri!r}: scheme {scheme}:// is not known; use a path, file:// or hf://")
    path = Path(unquote(urlparse(uri).path) if scheme else uri).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint not found: {path}; check the path")
    return path


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a checkpoint by name: safetensors, or a torch file that holds nothing but tensors.

    Wrappers and prefixes of training frameworks are taken off, and names brought to ours.

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
    state = _without_prefix(dict(content))
    return {_rename(name): tensor for name, tensor in state.items() if not _UNUSED.match(name)}


def load_backbone(module: ModelBase, state: StateDict, source: str, *, keep_classifier: bool) -> None:
    """Load a checkpoint into a backbone, whole or not at all.

    Names may lack or carry the module's `trunk` as their prefix. A classifier in the checkpoint is dropped unless
    `keep_classifier`, one in the module then stays as it is; constant buffers of the front end may be missing.

    Raises:
        ValueError: missing or unexpected names, or other shapes, all listed.
    """
    own = module.state_dict()
    if not any(name.startswith(f"{module.trunk}.") for name in state):
        state = {_within(module.trunk, name): tensor for name, tensor in state.items()}
    optional = {name: tensor for name, tensor in own.items() if _COMPUTED.search(name)}
    if not keep_classifier:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_CLASSIFIER)}
        optional |= {name: tensor for name, tensor in own.items() if name.startswith(_CLASSIFIER)}
    load_strictly(module, {**optional, **state}, source)


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
    """Classes of the checkpoint's classifier, or None if it has none."""
    return next((tensor.shape[0] for name, tensor in state.items() if _CLASSIFIER_WEIGHT.match(name)), None)


def fingerprint(module: ModelBase) -> str:
    """Hex sha256 over what makes a backbone's embedding (no classifier).

    That is its settings, and the names, types, shapes and bytes of its tensors.
    """
    digest = hashlib.sha256(module.settings.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(_CLASSIFIER):
            continue
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_hub(uri: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    location, _, revision = uri.removeprefix("hf://").partition("@")
    parts = location.split("/")
    if len(parts) < 3:
        raise ValueError(f"checkpoint {uri!r}; expected hf://owner/repository/file")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"Checkpoint not found: {uri} is neither in the hub's cache nor to be had from the hub "
            f"({type(error).__name__}). Where there is network, run 'hf download {repository} {file}', or give "
            "checkpoint_path (of avex-export: a model YAML with checkpoint_path)"
        ) from error


def _without_prefix(state: StateDict) -> StateDict:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _within(trunk: str, name: str) -> str:
    # Some classifiers are part of the trunk, others stand beside it.
    inside = f"{trunk}.{name}"
    return name if name.startswith(_CLASSIFIER) and not inside.startswith(_CLASSIFIER) else inside


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
