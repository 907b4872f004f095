"""Recordings that are damaged, or may never have been any."""

from tests.fuzz import mutations
from tests.fuzz.http import query


def audio(random):
    """Something that may have been a recording."""
    if random.random() < 0.1:
        magic = random.choice((b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM", b".snd", b"caff"))
        return magic + random.randbytes(random.randrange(5000))
    return mutations.spoilt(random, random.choice(mutations.RECORDINGS))


def request(random):
    """A request with such a recording as its body."""
    path = random.choice(("/predict", "/predict", "/embed", "/predict_all", "/wav"))
    options = query(random) if random.random() < 0.3 else "" if path == "/wav" else f"?model={mutations.MODEL}"
    return mutations.request(f"POST {path}{options}".encode(), audio(random))
