"""Multipart forms whose parts, boundaries and headers are damaged."""

from tests.fuzz import mutations, recordings
from tests.fuzz.http import OPTIONS

BOUNDARY = b"frontier"
TYPES = (
    b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"b" * 300,
    b'multipart/form-data; boundary="', b"multipart/form-data; charset=x; boundary=frontier", b"audio/wav",
    b"multipart/form-data; boundary=\xff", b"multipart/form-data; boundary=a\x0bb", b";",
    b"multipart/mixed; boundary=frontier", b"MULTIPART/FORM-DATA; BOUNDARY=frontier", b"text/plain; charset=utf-99",
    b"application/x-www-form-urlencoded",
)  # fmt: skip
# Lines between a boundary and a part.
DISPOSITIONS = (
    b'form-data; name="audio"', b"form-data", b"form-data; name=audio; filename=a", b'form-data; name="\xff\xfe"',
    b'attachment; name="audio"; filename="a"', b"form-data; name=\"audio\"; filename*=utf-8''%ff", b"",
    b'form-data; name="' + b"n" * 9000 + b'"', b'form-data; name="a\\"b"; filename="../../x"', b"form-data; name=",
)  # fmt: skip


def request(random):
    """A request with a form, or with what may have been one."""
    parts = [(b'form-data; name="audio"; filename="a.wav"', recordings.audio(random))]
    for _ in range(random.choice((0, 1, 2, 3, 40))):
        name, value = random.choice((*OPTIONS, "model")), str(random.choice(mutations.VALUES))
        parts.append((f'form-data; name="{name}"'.encode(), value.encode("utf-8", "replace")))
    if random.random() < 0.3:
        parts.append((random.choice(DISPOSITIONS), random.choice((b"", b"a", random.randbytes(3000)))))
        random.shuffle(parts)
    body = b"".join(b"--%b\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (BOUNDARY, *part) for part in parts)
    body += b"--" + BOUNDARY + random.choice((b"--\r\n", b"--\r\n", b"--", b"\r\n", b"", b"--\r\nepilogue" * 100))
    if random.random() < 0.6:
        body = mutations.spoilt(random, body)
    form = b"multipart/form-data; boundary=" + BOUNDARY
    path = random.choice((b"/predict", b"/embed", b"/predict?model=tiny", b"/embed?model=tiny"))
    return mutations.request(b"POST " + path, body, [(b"Content-Type", random.choice((form,) * 9 + TYPES))])
