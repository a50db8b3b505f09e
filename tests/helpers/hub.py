"""A local stand-in of the Hugging Face hub, for tests of downloads and uploads.

The unmodified huggingface_hub client talks to it over HTTP on 127.0.0.1. Files are served whole or
in ranges; commits come the way the client sends them without Xet: what the hub names large goes to
the LFS store first. There are models only, and of each one the branch `main` and its commits.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, close_session, constants, file_download, hf_api
from huggingface_hub.utils import _http

TOKEN = "hf_token_of_the_stand_in"
LARGE = 10_000_000  # bytes; from here on, and for any *.safetensors, a file is kept by LFS


@dataclass
class Request:
    """One request the hub received; `bytes_sent` counts the body of the answer."""

    method: str
    path: str  # without the query
    range: str | None
    bytes_sent: int = 0


class Refused(Exception):
    """A request that is answered with an error; the client goes by the code."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code} | (headers or {})


def is_large(path: str, size: int) -> bool:
    """Whether the hub keeps a file by LFS."""
    return path.endswith(".safetensors") or size >= LARGE


class File:
    """A file in a commit: where its bytes are, and what the hub announces of them."""

    def __init__(self, path: str, source: Path | bytes):
        self.source = source
        content = self.read()
        self.size = len(content)
        sha256 = hashlib.sha256(content).hexdigest()
        if large := is_large(path, self.size):  # git has a pointer to it
            version = "version https://git-lfs.github.com/spec/v1"
            content = f"{version}\noid sha256:{sha256}\nsize {self.size}\n".encode()
        self.blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.etag = sha256 if large else self.blob
        lfs = {"oid": sha256, "sha256": sha256, "size": self.size, "pointerSize": len(content)}
        self.lfs = {"lfs": lfs} if large else {}

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes as they are now; size and hashes stay those of the commit."""
        if isinstance(self.source, bytes):
            return self.source[start:stop]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)


# what the hub itself commits to a new repository
ATTRIBUTES = File(".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def listing(files: dict[str, File]) -> list[dict]:
    """Files and the folders they are in, as the hub lists them."""
    entries = {}
    for path, file in sorted(files.items()):
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": file.blob, "size": file.size}
        entries[path] |= file.lfs
    return list(entries.values())


def span(header: str, size: int) -> tuple[int, int]:
    """The first byte that a Range header asks for and the one after the last."""
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", header).groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


ROUTES = []


def route(methods: str, path: str, token: bool = False):
    """Has a method of Hub answer these requests, with status, headers and body."""
    path = path.replace("{repo}", "(?P<repo>[^/]+/[^/]+)").replace("{path}", "(?P<path>.+)")
    pattern = re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path))

    def register(function):
        ROUTES.append((methods.split(), pattern, token, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Reads the one request of a connection, finds its route and sends the answer."""

    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, unquote(url.path), self.headers["Range"])
        self.server.hub.requests.append(request)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            status, headers, body = self.find_answer(url.path)
        except Refused as error:
            status, headers, body = error.status, error.headers, {"error": str(error)}
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            request.bytes_sent = len(body)
            with contextlib.suppress(ConnectionError):  # the client may have read enough
                self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def find_answer(self, path: str) -> tuple:
        for methods, pattern, token, function in ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                if token and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    raise Refused(401, "Invalid username or password.")
                parts = {name: part and unquote(part) for name, part in match.groupdict().items()}
                return function(self.server.hub, self, **parts)
        raise Refused(404, f"The stand-in has no {self.command} {path}")

    def log_message(self, format, *arguments):
        """Nothing: there is `Hub.requests`."""


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections that may wait; the client opens several at once


class Hub:
    """The stand-in; within its context it serves at `url`."""

    def __init__(self):
        self.requests: list[Request] = []  # in the order they came
        self._main: dict[str, str] = {}  # the newest commit, by repository
        self._commits: dict[tuple[str, str], dict[str, File]] = {}  # by repository and hash
        self._store: dict[str, bytes] = {}  # of LFS, by sha256
        self._cuts: list[tuple[str, int]] = []
        self._altered: tuple[str, ...] = ()

    def __enter__(self) -> "Hub":
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, directory: Path) -> str:
        """Publishes a directory, read when it is asked for, as main of a repository; its commit."""
        paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
        files = {name: File(name, path) for name, path in paths.items() if path.is_file()}
        return self._commit(repo_id, files)

    def uploaded(self, repo_id: str) -> dict[str, bytes]:
        """The files in main of a repository that clients committed, by path."""
        files = self._files(repo_id, "main")[1].items()
        sources = ((path, file.source) for path, file in files if file is not ATTRIBUTES)
        return {path: source for path, source in sources if isinstance(source, bytes)}

    def sent(self, path_suffix: str = "") -> int:
        """The bytes sent in answer to all requests of paths with this suffix."""
        return sum(each.bytes_sent for each in self.requests if each.path.endswith(path_suffix))

    def cut_after(self, path_suffix: str, size: int, times: int = 1) -> None:
        """The next GET, or some, of a file with this suffix breaks off after so many bytes."""
        self._cuts += [(path_suffix, size)] * times

    def alter(self, path_suffix: str) -> None:
        """From now on, files with this suffix are sent with a last byte that is not theirs."""
        self._altered += (path_suffix,)

    def _commit(self, repo: str, files: dict[str, File]) -> str:
        content = repr((repo, sorted((path, file.blob) for path, file in files.items())))
        commit = self._main[repo] = hashlib.sha1(content.encode()).hexdigest()
        self._commits[repo, commit] = files
        return commit

    def _files(self, repo: str, revision: str | None) -> tuple[str, dict[str, File]]:
        """The hash of a revision and its files."""
        if repo not in self._main:
            raise Refused(404, "Repository not found", "RepoNotFound")
        commit = self._main[repo] if revision in (None, "main") else revision
        if (repo, commit) not in self._commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, self._commits[repo, commit]

    @route("GET", "/api/models/{repo}(/revision/{revision})?")
    def _info(self, call, repo, revision):
        commit, files = self._files(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        for sibling in siblings if "blobs" in call.query else ():
            file = files[sibling["rfilename"]]
            sibling |= {"blobId": file.blob, "size": file.size} | file.lfs
        return 200, {}, {"id": repo, "sha": commit, "private": False, "siblings": siblings}

    @route("GET", "/api/models/{repo}/tree/{revision}(/{path})?")
    def _tree(self, call, repo, revision, path):
        folder = PurePosixPath(path or ".")
        depth = None if call.query["recursive"] == ["true"] else 1
        entries = listing(self._files(repo, revision)[1])
        return 200, {}, [e for e in entries if folder in PurePosixPath(e["path"]).parents[:depth]]

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, call, repo, revision, path):
        commit, files = self._files(repo, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        file, wanted = files[path], call.headers["Range"]
        start, stop = span(wanted, file.size) if wanted else (0, file.size)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        headers["Content-Length"] = stop - start
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        body = file.read(start, stop) if call.command == "GET" else b""
        if body and stop == file.size and path.endswith(self._altered):
            body = body[:-1] + bytes([body[-1] ^ 1])
        for cut in [cut for cut in self._cuts if body and path.endswith(cut[0])][:1]:
            self._cuts.remove(cut)
            body = body[: cut[1]]  # less than its announced length
        return 206 if wanted else 200, headers, body

    @route("POST", "/api/repos/create", token=True)
    def _create(self, call):
        wanted = json.loads(call.body)
        repo = f"{wanted['organization'] or 'tester'}/{wanted['name']}"
        if new := repo not in self._main:
            self._commit(repo, {".gitattributes": ATTRIBUTES})
        return 200 if new else 409, {}, {"url": f"{self.url}/{repo}"}

    @route("POST", "/api/validate-yaml")
    def _validate(self, call):
        return 200, {}, {"errors": [], "warnings": []}

    @route("POST", "/api/models/{repo}/preupload/{revision}", token=True)
    def _preupload(self, call, repo, revision):
        present = self._files(repo, revision)[1]
        files = json.loads(call.body)["files"]
        for file in files:
            file["uploadMode"] = "lfs" if is_large(file["path"], file["size"]) else "regular"
            file["shouldIgnore"] = False
            file["oid"] = present[file["path"]].etag if file["path"] in present else None
        return 200, {}, {"files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch", token=True)
    def _batch(self, call, repo):
        objects = json.loads(call.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._store:
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return 200, {}, {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{oid}")
    def _put(self, call, oid):
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refused(400, "The content has another sha256 than announced")
        self._store[oid] = call.body
        return 200, {}, b""

    @route("POST", "/api/models/{repo}/commit/main", token=True)
    def _receive(self, call, repo):
        files = dict(self._files(repo, "main")[1])
        for operation in map(json.loads, call.body.splitlines()):
            key, value = operation["key"], operation["value"]
            path = value.get("path")
            if key == "file":
                files[path] = File(path, base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in self._store:
                files[path] = File(path, self._store[value["oid"]])
            elif key == "deletedFile":
                del files[path]
            elif key != "header":
                raise Refused(400, f"The stand-in cannot commit this {key}")
        commit = self._commit(repo, files)
        return 200, {}, {"commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment variables that have a process use the hub, its caches under tmp_path."""
    home = tmp_path / "huggingface"
    names = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_TOKEN_PATH": "token"}
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    folders = {name: str(home / folder) for name, folder in names.items()}
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN} | folders | switches | proxies


@contextlib.contextmanager
def connected(hub: Hub, tmp_path: Path):
    """Within, this process's huggingface_hub uses the hub, and tries again without waiting."""
    saved = dict(vars(constants))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, tmp_path).items():
            patch.setenv(name, value)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        for module in (file_download, _http):
            patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        try:
            importlib.reload(constants)  # they are read from the environment
            close_session()
            yield
        finally:
            close_session()
            HfFileSystem.clear_instance_cache()
            vars(constants).update(saved)


@pytest.fixture
def hub(tmp_path):
    """A hub that this process's huggingface_hub uses."""
    with Hub() as hub, connected(hub, tmp_path):
        yield hub
