"""Bundles on the Hugging Face Hub: found and fetched through the hub's own cache, and pushed as one commit."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from avex_serve.bundles.manifest import CARD, MANIFEST
from avex_serve.bundles.reading import Bundle, check_files, decode_manifest, sha256_of
from avex_serve.errors import (
    AvexServeError,
    BundleError,
    DependencyError,
    ForbiddenError,
    InputError,
    NotFoundError,
    UnavailableError,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME: Final = "hf"
ADDRESS: Final = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)
# What the hub puts into a new repository.
OF_THE_HUB: Final = frozenset({".gitattributes", CARD})
REFUSED: Final = (401, 403)
CHANGED: Final = (409, 412)
TOKEN: Final = "set HF_TOKEN to a token of yours, or run 'hf auth login'"


class Address(NamedTuple):
    """A repository of models on the hub."""

    repository: str  # owner/name
    revision: str | None  # a branch, tag or commit; None: the default branch


def parse_address(url: str) -> Address:
    """The parts of ``hf://owner/name[@revision]``; InputError for something else."""
    match = ADDRESS.fullmatch(url)
    if match is None:
        raise InputError(f"{url}: expected hf://owner/name, or hf://owner/name@revision")
    return Address(match["repository"], match["revision"])


class HubSource:
    """The bundle in a repository, as a source of `avex_serve.bundles.remote.Mirror`.

    With ``HF_HUB_OFFLINE=1``, or without network, it is what the hub's cache has.
    """

    def __init__(self, url: str) -> None:
        """Nothing is asked yet; InputError for a URL that names no repository."""
        self._url = url
        self._repository, self._revision = parse_address(url)
        self._commit = ""

    @property
    def advice(self) -> str:
        """What may help if a file is not the one of the manifest."""
        return f"; if the one on the hub is whole: hf download {self._repository} --force-download"

    def find(self) -> dict[str, dict[str, str]]:
        """The digests of its files by name, at the place "".

        Raises:
            AvexServeError: as of `asking_hub`.
        """
        path = self._download(MANIFEST, self._revision)
        text = path.read_bytes()
        manifest = decode_manifest(text, source=f"{self._url}/{MANIFEST}")
        self._commit = path.parent.name  # the hub's cache: …/snapshots/COMMIT/manifest.json
        return {"": {MANIFEST: hashlib.sha256(text).hexdigest(), **manifest.files}}

    def fetch(self, place: str, files: Mapping[str, str], folder: Path) -> None:
        """Put these files, of which `find` has told, into a folder.

        They share their disk space with the hub's cache if that is on the same file system, and are copies
        otherwise. Either way they stay when the cache is cleaned.

        Raises:
            AvexServeError: as of `asking_hub`.
        """
        for name in files:
            cached = self._download(name, self._commit).resolve()
            try:
                (folder / name).hardlink_to(cached)
            except OSError:
                shutil.copyfile(cached, folder / name)

    def _download(self, name: str, revision: str | None) -> Path:
        with asking_hub(self._url, name):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self._repository, name, revision=revision))


def check_push(url: str) -> str:
    """The repository to push to; what can be known without asking the hub is checked.

    Raises:
        DependencyError: huggingface_hub is not installed.
        ForbiddenError: there is no token.
        InputError: not ``hf://owner/name``.
    """
    repository, revision = parse_address(url)
    if revision is not None:
        raise InputError(f"{url}: a push goes to the default branch; leave out @{revision}")
    with asking_hub(url):
        from huggingface_hub import get_token

        if get_token() is None:
            raise ForbiddenError(f"{url}: pushing needs a token that may write; {TOKEN}")
    return repository


def push_bundle(bundle: Bundle, url: str, *, private: bool = False) -> str:
    """Upload a bundle to the hub as one commit, and compare what arrived with the manifest.

    A bundle that is there is replaced. Other files in the repository stay.

    Args:
        bundle: is checked first.
        url: ``hf://owner/name``. The repository is made if there is none.
        private: make a new repository private.

    Returns:
        The address of what was pushed, ``hf://owner/name@commit``.

    Raises:
        BundleError: the bundle is not whole, the hub refuses its card, or another file arrived.
        ForbiddenError: the token may not write there.
        InputError: the repository holds something else, or is public although `private` is asked for.
        AvexServeError: as of `check_push` and `asking_hub`.
    """
    repository = check_push(url)
    check_files(bundle)
    with asking_hub(url):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        info = api.model_info(repository)
        if private and not info.private:
            raise InputError(f"{url} is public; make it private in its settings, or leave out --private")
        there = {file.rfilename for file in info.siblings or ()}
        if MANIFEST not in there and there - OF_THE_HUB:
            raise InputError(
                f"{url} holds {min(there - OF_THE_HUB)} and no {MANIFEST}: not replaced; choose another repository"
            )
        names = [*bundle.manifest.files, MANIFEST]
        gone = there & _listed(repository, str(info.sha), there) - set(names)
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, bundle.directory / name) for name in names),
                *(CommitOperationDelete(name) for name in sorted(gone)),
            ],
            commit_message=f"{bundle.manifest.name}, version {bundle.manifest.version}",
            parent_commit=info.sha,
        )
        if wrong := _differing(api, repository, commit.oid, bundle, names):
            raise BundleError(f"{url}@{commit.oid}: {', '.join(wrong)} arrived changed; push again")
    return f"{url}@{commit.oid}"


def _listed(repository: str, commit: str, there: set[str]) -> set[str]:
    """The files of the bundle that is there."""
    if MANIFEST not in there:
        return set()
    from huggingface_hub import hf_hub_download

    text = Path(hf_hub_download(repository, MANIFEST, revision=commit)).read_bytes()
    return set(decode_manifest(text, source=f"hf://{repository}/{MANIFEST}").files)


def _differing(api: "HfApi", repository: str, commit: str, bundle: Bundle, names: list[str]) -> list[str]:
    """The files that the hub has another content of, or none. It knows large files by sha256, others by git's id."""
    found = {each.path: each for each in api.get_paths_info(repository, names, revision=commit)}
    return [name for name in names if not _arrived(found.get(name), bundle.directory / name)]


def _arrived(found: Any, path: Path) -> bool:
    if found is None:
        return False
    if found.lfs is not None:
        return bool(found.lfs.sha256 == sha256_of(path))
    content = path.read_bytes()
    return bool(found.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def asking_hub(url: str, name: str = MANIFEST) -> Iterator[None]:
    """Turn what goes wrong in the block, which asks the hub, into errors of ours.

    Args:
        url: ``hf://owner/name[@revision]``.
        name: of the file that is asked for.

    Raises:
        BundleError: the repository has no such file, or the hub refuses what is pushed.
        DependencyError: huggingface_hub is not installed.
        ForbiddenError: the token may not do that.
        InputError: no name of a repository.
        NotFoundError: no such repository or revision, or no token that may read it.
        UnavailableError: the hub doesn't answer, or is not to be asked.
    """
    try:
        from huggingface_hub import errors
    except ImportError:
        raise DependencyError(
            f"{url} needs huggingface_hub, which is not installed; pip install 'avex-serve[hub]'"
        ) from None
    repository, revision = parse_address(url)
    try:
        yield
    except AvexServeError:
        raise
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"{url}: its terms must be accepted on its page on the hub first, and then {TOKEN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{url}: there is no such repository, or no token that may read it; check the name, or {TOKEN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(
            f"{url}: the repository has no revision {revision}; leave it out for the latest"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        download = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        raise UnavailableError(
            f"{url}: the hub's cache has no {name} of it, and the hub is out of reach (or HF_HUB_OFFLINE is set); "
            f"run '{download}' where there is network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise BundleError(f"{url} has no {name}; expected a bundle, as avex-export --push uploads it") from error
    except errors.HFValidationError as error:
        raise InputError(f"{url}: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in REFUSED:
            raise ForbiddenError(f"{url}: the hub refuses the token ({status}); {TOKEN} that may do that") from error
        if status in CHANGED:
            raise UnavailableError(f"{url} was changed by somebody else at the same time; try again") from error
        raise UnavailableError(f"{url}: the hub answers {error}") from error
    except ValueError as error:  # such as of the card
        raise BundleError(f"{url}: the hub refuses the bundle: {error}") from error
    except Exception as error:  # of the connection
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise UnavailableError(f"{url}: the hub can't be asked: {error or type(error).__name__}{cause}") from error
