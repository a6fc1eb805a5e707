"""A small Hub on loopback: what `huggingface_hub` asks for when a model is pushed, listed and loaded; all in memory.

Files `*.safetensors` go through LFS, as on the real Hub; its newer storage, xet, is not there. Only `TOKEN` may write,
and only to repositories of `OWNER`.
"""

import hashlib
import json
import re
from base64 import b64decode
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN, OWNER = "hf_of_acme", "acme"
ROUTES = {  # method and path: function of the handler, called with the groups
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    r"POST /api/models/(\w+/[\w.-]+)/branch/(.+)": "branch",
    r"POST /api/models/(\w+/[\w.-]+)/preupload/(.+)": "preupload",
    r"POST /api/models/(\w+/[\w.-]+)/commit/(.+)": "commit",
    r"POST /(\w+/[\w.-]+)\.git/info/lfs/objects/batch": "batch",
    r"PUT /lfs/(\w+)": "store",
    r"(?:GET|HEAD) /lfs/(\w+)": "large_file",
    r"GET /api/models/(\w+/[\w.-]+)": "information",
    r"GET /api/models/(\w+/[\w.-]+)/revision/(.+)": "information",
    r"GET /api/models/(\w+/[\w.-]+)/tree/([^/]+)": "tree",
    r"GET /api/models/(\w+/[\w.-]+)/tree/([^/]+)/(.+)": "tree",
    r"(?:GET|HEAD) /(\w+/[\w.-]+)/resolve/([^/]+)/(.+)": "file",
}


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Repository:
    """Commits, each all of its files, and the branches that name them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.branches[branch] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str:
        """Branch or commit, as a commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


def is_large(name: str) -> bool:
    return fnmatchcase(name, "*.safetensors")


def blob_id(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Runs in a thread of its own while it is entered. `requests` is the log, "METHOD path" each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = Lock()

    def __enter__(self) -> "HubServer":
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]

    def take_requests(self) -> list[str]:
        taken, self.requests = self.requests, []
        return taken


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {path}")
        try:
            with self.server.lock:
                for route, name in ROUTES.items():
                    if match := re.fullmatch(route, f"{self.command} {path}"):
                        return getattr(self, name)(*match.groups())
            raise HubError(404, "EntryNotFound", "no such route")
        except HubError as error:
            self.reply({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: Any) -> None:
        pass

    # Talking

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_writer(self, repo_id: str) -> None:
        if not self.is_owner():
            raise HubError(401, "", "Invalid credentials in Authorization header")
        if repo_id.split("/")[0] != OWNER:
            raise HubError(403, "", f"You don't have the rights to write to {repo_id}")

    def repository(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.is_owner()):
            raise HubError(401, "RepoNotFound", "Repository not found")
        return repository

    # Writing

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.check_writer(repo_id)
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self.reply({"error": "You already created this model repo", **url}, 409)
        self.server.repositories[repo_id] = Repository(asked.get("visibility") == "private")
        self.reply(url)

    def validate(self) -> None:
        if "licence: " in json.loads(self.body)["content"]:  # a mistake for tests to make
            return self.reply({"errors": [{"message": '"licence" is not allowed'}], "warnings": []}, 400)
        self.reply({"errors": [], "warnings": []})

    def branch(self, repo_id: str, name: str) -> None:
        self.check_writer(repo_id)
        repository = self.repository(repo_id)
        if name in repository.branches:
            raise HubError(409, "", "Reference already exists")
        repository.branches[name] = repository.branches["main"]
        self.reply({})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.check_writer(repo_id)
        there = self.server.files(repo_id, self.repository(repo_id).resolve(revision))
        self.reply({"files": [self.mode(file["path"], there) for file in json.loads(self.body)["files"]]})

    def mode(self, name: str, there: dict[str, bytes]) -> dict[str, Any]:
        mode = {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}
        if name in there:
            mode["oid"] = hashlib.sha256(there[name]).hexdigest() if is_large(name) else blob_id(there[name])
        return mode

    def batch(self, repo_id: str) -> None:
        self.check_writer(repo_id)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large_files:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", "the content is not what was announced")
        self.server.large_files[oid] = self.body
        self.reply({})

    def commit(self, repo_id: str, revision: str) -> None:
        self.check_writer(repo_id)
        repository = self.repository(repo_id)
        files, message = dict(repository.commits[repository.resolve(revision)]), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, "", f"unknown operation {key}")
        sha = repository.add(revision, files, message)
        self.reply({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    # Reading

    def information(self, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        self.reply({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        repository, entries = self.repository(repo_id), []
        for name, content in repository.commits[repository.resolve(revision)].items():
            if name.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entries.append({**entry, "lfs": large} if is_large(name) else entry)
        if folder and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        self.reply(entries)

    def file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        sha = repository.resolve(revision)
        content, headers = repository.commits[sha].get(name), {"X-Repo-Commit": sha}
        if content is None:
            raise HubError(404, "EntryNotFound", f"{name} does not exist", **headers)  # so that this is cached, too
        if not is_large(name):
            return self.reply(content, headers={**headers, "ETag": f'"{blob_id(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # large files come from another host
        headers |= {"Location": f"{elsewhere}/lfs/{oid}", "X-Linked-ETag": f'"{oid}"'}
        self.reply(b"", 302, {**headers, "X-Linked-Size": str(len(content))})

    def large_file(self, oid: str) -> None:
        self.reply(self.server.large_files[oid], headers={"ETag": f'"{oid}"'})
