"""A small Hub on localhost: what huggingface_hub asks of one, kept in memory. Standard library only."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_owner"
LFS = (".safetensors", ".png", ".bin")


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        oid = hashlib.sha1(f"{branch}{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state of the server, and faults to order: `fault(method, path)` returns `cut`, a status, or `None`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], object] = lambda method, path: None
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def new_repo() -> Repo:
        return Repo()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].find(revision)
        return self.repos[repo].commits[found] if found else {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        fault = self.state.fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if isinstance(fault, int):
            return self._json({"error": "try again later"}, fault)
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, **match.groupdict())
        self._json({"error": f"no route for {self.command} {path}"}, 404)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _error(self, code: str, status: int = 404) -> None:
        self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or an answer that says why not."""
        repo = self.state.repos.get(name)
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            self._json({"error": "Invalid user token."}, 401)
        elif repo is None or (repo.private and not self._owner()):
            self._error("RepoNotFound", 404 if self._owner() else 401)
        elif write and not self._owner():
            self._json({"error": "a token is needed"}, 401)
        else:
            return repo
        return None

    def _commit(self, repo: Repo, revision: str) -> str | None:
        found = repo.find(revision)
        if found is None:
            self._error("RevisionNotFound")
        return found

    ##########
    # Routes #
    ##########

    def create(self) -> None:
        asked = json.loads(self.body)
        if not self._owner():
            return self._json({"error": "Invalid username or password."}, 401)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name}", "name": name, "id": name}
        if name in self.state.repos:
            return self._json({**url, "error": "You already created this model repo"}, 409)
        repo = self.state.repos[name] = Repo(
            private=bool(asked.get("private") or asked.get("visibility") == "private")
        )
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json(url)

    def whoami(self) -> None:
        self._json({"name": "user", "type": "user", "orgs": []}) if self._owner() else self._json({"error": "no"}, 401)

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        if repo := self._repo(name, write=True):
            if branch in repo.refs:
                return self._json({"error": "Reference already exists"}, 409)
            repo.refs[branch] = repo.refs["main"]
            self._json({})

    def preupload(self, name: str, revision: str) -> None:
        if (repo := self._repo(name, write=True)) and (oid := self._commit(repo, revision)):
            files = []
            for file in json.loads(self.body)["files"]:
                there = repo.commits[oid].get(file["path"])
                mode = "lfs" if file["path"].endswith(LFS) else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
                if there is not None:
                    files[-1]["oid"] = _sha256(there) if mode == "lfs" else _git_oid(there)
            self._json({"files": files})

    def lfs_batch(self, name: str) -> None:
        if self._repo(name, write=True):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                objects.append({"oid": wanted["oid"], "size": wanted["size"]})
                if wanted["oid"] not in self.state.blobs:
                    objects[-1]["actions"] = {
                        "upload": {"href": f"{self.state.url}/lfs-upload/{wanted['oid']}"},
                        "verify": {"href": f"{self.state.url}/lfs-verify"},
                    }
            self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self._json({"error": "the content is not what its name says"}, 400)
        self.state.blobs[oid] = self.body
        self._json({})

    def lfs_verify(self) -> None:
        self._json({}, 200 if json.loads(self.body)["oid"] in self.state.blobs else 404)

    def commit(self, name: str, revision: str) -> None:
        if (repo := self._repo(name, write=True)) and (oid := self._commit(repo, revision)):
            files = dict(repo.commits[oid])
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.state.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            oid = repo.commit(revision, files)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"})

    def info(self, name: str, revision: str = "main") -> None:
        if (repo := self._repo(name)) and (oid := self._commit(repo, revision)):
            siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
            self._json(
                {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
            )

    def tree(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) and (oid := self._commit(repo, revision)):
            entries = []
            for path, data in sorted(repo.commits[oid].items()):
                entries.append({"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)})
                if path.endswith(LFS):
                    entries[-1]["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            self._json(entries)

    def paths_info(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) and (oid := self._commit(repo, revision)):
            form = parse_qs(self.body.decode())
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else form.get("paths", [])
            files = repo.commits[oid]
            self._json(
                [
                    {"type": "file", "path": p, "size": len(files[p]), "oid": _git_oid(files[p])}
                    for p in asked
                    if p in files
                ]
            )

    def refs(self, name: str) -> None:
        if repo := self._repo(name):
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in repo.refs.items()]
            self._json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) and (oid := self._commit(repo, revision)):
            data = repo.commits[oid].get(path)
            if data is None:
                return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            if path.endswith(LFS):
                self.state.blobs[_sha256(data)] = data
                # To another host: a redirect to the same one would be followed, and lose the headers.
                headers = {"X_Linked_Etag": f'"{_sha256(data)}"', "X_Linked_Size": str(len(data))}
                location = f"http://localhost:{self.state.port}/blob/{_sha256(data)}"
                return self._send(b"", 302, X_Repo_Commit=oid, Location=location, **headers)
            self._content(data, X_Repo_Commit=oid, ETag=f'"{_git_oid(data)}"')

    def blob(self, oid: str) -> None:
        self._content(self.state.blobs[oid], ETag=f'"{oid}"')

    def _content(self, data: bytes, **headers: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.command == "GET":
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            span = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            return self._send(data[start : end + 1], 206, Content_Range=span, **headers)
        self._send(data, **headers)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ID = r"(?P<name>[\w.-]+/[\w.-]+)"
_REV = r"(?P<revision>[\w.%-]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_ID}/branch/(?P<branch>[\w.-]+)", _Handler.branch),
    (rf"POST /api/models/{_ID}/preupload/{_REV}", _Handler.preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs-upload/(?P<oid>\w+)", _Handler.lfs_upload),
    (r"POST /lfs-verify", _Handler.lfs_verify),
    (rf"POST /api/models/{_ID}/commit/{_REV}", _Handler.commit),
    (rf"GET /api/models/{_ID}/refs", _Handler.refs),
    (rf"GET /api/models/{_ID}/revision/{_REV}", _Handler.info),
    (rf"GET /api/models/{_ID}", _Handler.info),
    (rf"GET /api/models/{_ID}/tree/{_REV}(/.*)?", _Handler.tree),
    (rf"POST /api/models/{_ID}/paths-info/{_REV}", _Handler.paths_info),
    (rf"(GET|HEAD) /{_ID}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    (r"(GET|HEAD) /blob/(?P<oid>\w+)", _Handler.blob),
]
