"""The Hugging Face Hub: a cache on the disk as huggingface_hub lays it out, and a server on this machine."""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from tests.standin import Handler, StandIn

REVISION = "a" * 40
WRITER, READER = "hf_writer", "hf_reader"  # tokens


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


def use_hub(monkeypatch, hub, home, token=WRITER):
    """Let this process know that server alone, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def hub_variables(hub, home, **others):
    """The same for another process."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **others}


def is_large(path):
    """Whether git LFS has the file."""
    return path.endswith((".onnx", ".data", ".pt", ".npz"))


class Refusal(Exception):
    def __init__(self, status, code=None, message="", **others):
        self.status, self.code, self.message, self.others = status, code, message, others


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = {}  # id: files by name
        self.commit({".gitattributes": b"*.onnx filter=lfs\n"})

    def commit(self, files):
        self.head = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[self.head] = files

    @property
    def files(self):
        return self.commits[self.head]


class Hub(StandIn):
    """What huggingface_hub asks of the hub to make repositories, to push by git LFS, and to download."""

    def __init__(self):
        self.repositories = {}
        self.large = {}  # of git LFS, by sha256
        self.requests = []
        hub = self

        class Answer(Handler):
            def do_GET(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
                hub.requests.append((self.command, url.path))
                headers = {}
                try:
                    answer, headers = hub.answer(self.command, unquote(url.path), body, token)
                    status = 200
                except Refusal as refusal:
                    status = refusal.status
                    answer = {"error": refusal.message, "errors": [{"message": refusal.message}], **refusal.others}
                    if refusal.code:
                        headers["X-Error-Code"] = refusal.code
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_POST = do_PUT = do_GET

        super().__init__(Answer)

    def answer(self, method, path, body, token):
        """What a request answers, and headers."""
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"]), {}
        if path == "/api/repos/create":
            return self.create(json.loads(body), token), {}
        if method == "PUT":
            self.large[path.removeprefix("/lfs/")] = body
            return {}, {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.find(match[1], token, write=True)
            return {"transfer": "basic", "objects": [self.upload(each) for each in json.loads(body)["objects"]]}, {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups(), token)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|paths-info)/(.+))?", path)
        if match is None:
            raise Refusal(404, message=f"the stand-in doesn't know {path}")
        name, what, revision = match.groups()
        repository = self.find(name, token, write=what in ("preupload", "commit"))
        if what == "preupload":
            return {"files": [self.mode(repository, each["path"]) for each in json.loads(body)["files"]]}, {}
        if what == "commit":
            return self.commit(name, repository, [json.loads(line) for line in body.splitlines()]), {}
        commit, files = self.at(repository, revision)
        if what == "paths-info":
            return [self.info(each, files[each]) for each in parse_qs(body.decode())["paths"] if each in files], {}
        siblings = [{"rfilename": each} for each in files]
        return {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}, {}

    def validate(self, text):
        from huggingface_hub import ModelCard

        try:
            ModelCard(text)
        except ValueError as error:
            raise Refusal(400, message=str(error)) from None
        return {"errors": [], "warnings": []}

    def create(self, asked, token):
        if token is None:
            raise Refusal(401, message="Invalid username or password.")
        if token != WRITER:
            raise Refusal(403, message="You don't have the rights to create a model under the namespace")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            raise Refusal(409, message="You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}"}

    def find(self, name, token, write=False):
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token is None):
            raise Refusal(404 if token else 401, "RepoNotFound")
        if write and token != WRITER:
            raise Refusal(403 if token else 401, message="the token may not write")
        return repository

    def at(self, repository, revision):
        commit = repository.head if revision in (None, "main") else revision
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def resolve(self, name, revision, file, token):
        commit, files = self.at(self.find(name, token), revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound")
        return files[file], {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}

    def mode(self, repository, path):
        there = self.info(path, repository.files[path]) if path in repository.files else {}
        return {
            "path": path,
            "uploadMode": "lfs" if is_large(path) else "regular",
            "shouldIgnore": False,
            "oid": there.get("lfs", there).get("oid"),
        }

    def upload(self, large):
        return {**large, "actions": {"upload": {"href": f"{self.url}/lfs/{large['oid']}"}}}

    def commit(self, name, repository, lines):
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit", repository.head) != repository.head:
                        raise Refusal(412, message="A commit has happened since.")
                    repository.message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commit(files)
        return {
            "success": True,
            "commitOid": repository.head,
            "commitUrl": f"{self.url}/{name}/commit/{repository.head}",
        }

    def info(self, path, content):
        if is_large(path):
            digest = hashlib.sha256(content).hexdigest()
            large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 127}}
        else:
            large = {}
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": blob, **large}
