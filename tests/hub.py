"""A hub cache on the disk, as huggingface_hub lays it out."""

REVISION = "a" * 40


def hub_cache(home, repository, file, write, revision=REVISION):
    """Put a file of a repository into the cache at ``home/hub``; `write` is given its path."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    write(snapshot / file)


def use_cache(monkeypatch, home):
    """Let this process know that cache alone: no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
