"""A Hugging Face Hub on a loopback port, for tests of publishing and loading: standard library only.

It speaks what huggingface_hub asks for when a repository is created, branched, filled (regular files and git-lfs),
listed and downloaded. Point a process at it with `LoopbackHub.environment`, before huggingface_hub is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback_token"
KERNEL_CLIENT = "2.0"  # the first huggingface_hub that creates and fills repositories of type "kernel"
LFS_FROM_BYTES = 64 * 1024
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
API = re.compile(r"/api/(models|datasets|spaces|kernels)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?$")
RESOLVE = re.compile(r"/(?:(datasets|spaces|kernels)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
LFS_BATCH = re.compile(r"/(?:(?:datasets|spaces|kernels)/)?[^/]+/[^/]+\.git/info/lfs/objects/batch$")


@dataclass
class File:
    """One version of a file; `lfs` decides which hash names it."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees; branches name commits."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch: str, tree: dict[str, File]) -> str:
        parent = self.branches.get(branch, "")
        text = (
            parent + "".join(f"{path}\0{file.oid}\n" for path, file in sorted(tree.items())) + str(len(self.commits))
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class LoopbackHub:
    """The server; use as a context manager. `requests` logs `(method, path)`; `cut` breaks connections on purpose."""

    def __init__(self, trusted: tuple[str, ...] = ()):
        self.trusted = trusted
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._cuts: list[list] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """Variables that point a fresh process at this Hub, with its cache under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            # "1" makes kernels 0.17 send a user agent that httpx refuses
            "HF_HUB_DISABLE_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def cut(self, method: str, path_part: str, times: int = 1) -> None:
        """Close the connection without an answer for the next `times` requests that match."""
        self._cuts.append([method, path_part, times])

    def take_cut(self, method: str, path: str) -> bool:
        for cut in self._cuts:
            if cut[0] == method and cut[1] in path and cut[2] > 0:
                cut[2] -= 1
                return True
        return False


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _dispatch(self):
        parts = urlsplit(self.path)
        self.where, self.query = parts.path, parse_qs(parts.query)
        self.hub.requests.append((self.command, unquote(self.where)))
        body = self._body()
        if self.hub.take_cut(self.command, self.where):
            self.close_connection = True
            self.connection.close()
            return
        authorization = self.headers.get("Authorization")
        self.may_write = authorization == f"Bearer {TOKEN}"
        if authorization and not self.may_write:
            self._error(401, "Invalid credentials in Authorization header")
        elif self.where == "/api/whoami-v2":
            self._whoami()
        elif self.where.startswith("/lfs/"):
            self._lfs_put(body)
        elif self.command in ("POST", "PUT", "DELETE") and not self.may_write:
            self._error(401, "Unauthorized: a token is needed to write")
        elif self.where == "/api/repos/create":
            self._create(json.loads(body))
        elif self.where == "/api/validate-yaml":
            missing = not json.loads(body)["content"].startswith("---\n")
            self._json({"errors": [], "warnings": [{"message": "no metadata block"}] if missing else []})
        elif match := re.fullmatch(r"/api/organizations/([^/]+)/overview", self.where):
            name = match[1]
            self._json(
                {"avatarUrl": "", "name": name, "fullname": name, "trustedKernelPublisher": name in self.hub.trusted}
            )
        elif LFS_BATCH.match(self.where):
            self._lfs_batch(json.loads(body))
        elif match := RESOLVE.match(self.where):
            self._resolve(match)
        elif match := API.match(self.where):
            self._api(match, body)
        else:
            self._error(404, f"no such page: {self.where}")

    # answers

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = ""):
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {}))

    # account and repositories

    def _whoami(self):
        if not self.may_write:
            return self._error(401, "Invalid credentials in Authorization header")
        self._json(
            {"type": "user", "name": "tester", "fullname": "Tester", "orgs": [], "auth": {"type": "access_token"}}
        )

    def _create(self, payload: dict):
        kind = payload.get("type", "model") + "s"
        name = f"{payload.get('organization') or 'tester'}/{payload['name']}"
        exists = (kind, name) in self.hub.repos
        self.hub.repos.setdefault((kind, name), Repo())
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name}
        self._json(answer | ({"error": "You already created this repo"} if exists else {}), 409 if exists else 200)

    def _api(self, match: re.Match, body: bytes):
        kind, name, verb, revision, rest = (unquote(part) if part else part for part in match.groups())
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        if verb == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
            return self._json({"branches": branches, "converts": [], "tags": []})
        if verb == "branch":
            start = repo.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
            if revision in repo.branches:
                return self._error(409, f"Reference already exists: {revision}")
            if start is None:
                return self._error(404, "Revision not found", "RevisionNotFound")
            repo.branches[revision] = start
            return self._json({})
        sha = repo.resolve(revision or "main")
        if sha is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = repo.commits[sha]
        if verb in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(tree)]
            author = name.split("/")[0]
            self._json({"id": name, "author": author, "sha": sha, "private": False, "tags": [], "siblings": siblings})
        elif verb == "tree":
            self._tree(tree, rest or "")
        elif verb == "preupload":
            self._json({"files": [self._upload_mode(entry, tree) for entry in json.loads(body)["files"]]})
        elif verb == "commit":
            self._commit(repo, name, revision, body)
        else:
            self._error(404, f"no such page: {self.where}")

    def _tree(self, tree: dict[str, File], folder: str):
        prefix = folder.rstrip("/") + "/" if folder else ""
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        rows: dict[str, dict] = {}
        for path, file in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
                directory = prefix + "/".join(inner[:depth])
                rows[directory] = {"type": "directory", "path": directory, "oid": "0" * 40, "size": 0}
            if recursive or len(inner) == 1:
                rows[path] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                if file.lfs:
                    rows[path]["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
        if prefix and not rows:
            return self._error(404, f"{folder} does not exist", "EntryNotFound")
        self._json(list(rows.values()))

    # writing

    def _upload_mode(self, entry: dict, tree: dict[str, File]) -> dict:
        path = entry["path"]
        lfs = entry["size"] >= LFS_FROM_BYTES or path.endswith(LFS_SUFFIXES)
        mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        return mode | ({"oid": tree[path].oid} if path in tree else {})

    def _commit(self, repo: Repo, name: str, branch: str, body: bytes):
        if branch not in repo.branches:
            return self._error(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        tree = dict(repo.commits[repo.branches[branch]])
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    return self._error(400, f"lfs object {value['oid']} of {value['path']} was never uploaded")
                tree[value["path"]] = File(self.hub.lfs_objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                tree.pop(value["path"], None)
            elif key == "deletedFolder":
                tree = {p: f for p, f in tree.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        sha = repo.commit(branch, tree)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _lfs_batch(self, payload: dict):
        objects = []
        for item in payload["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes):
        oid = self.where.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "content does not match its sha256")
        self.hub.lfs_objects[oid] = body
        self._json({})

    # reading

    def _resolve(self, match: re.Match):
        kind, name, revision, path = (unquote(part) if part else part for part in match.groups())
        repo = self.hub.repos.get((kind or "models", name))
        if repo is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        sha = repo.resolve(revision)
        if sha is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        file = repo.commits[sha].get(path)
        if file is None:
            return self._error(404, f"{path} does not exist", "EntryNotFound")
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) < len(file.content):
            start, total = int(wanted[1]), len(file.content)
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            return self._send(206, file.content[start:], headers)
        self._send(200, file.content, headers)
