"""A Hugging Face Hub in this process, for tests: what huggingface_hub needs to create, fill and read repositories.

It keeps everything in memory, knows two tokens, and can be told to break off an upload. Files above `LFS_BYTES` go
through the large-file protocol. Endpoints are those of huggingface_hub 2.4 without xet.

    with FakeHub() as hub:
        subprocess.run(..., env=os.environ | hub.environment(cache_folder))
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_BYTES = 20_000
TOKEN = "hf_test_token"
READ_TOKEN = "hf_read_token"
USER = "alice"
_REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_FILE = r"(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


@dataclass
class Repository:
    private: bool
    sdk: str | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    """Files by path, by the name of the branch; pull requests are branches refs/pr/N."""

    def commit_id(self, revision: str) -> str:
        names = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[revision].items())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        by_commit = {self.commit_id(branch): branch for branch in self.branches}
        return self.branches.get(by_commit.get(revision, revision))


class FakeHub:
    """Use as a context manager.

    Attributes:
        repositories: By (kind, name), e.g. ("models", "alice/tiny").
        uploads: Hashes of the large files that arrived, in order; a file that is sent twice is in it twice.
        uploads_until_break: After so many large files each further one is refused; None for never.
        max_file_bytes: Larger files are refused; None for no limit.
        card_refusal: Status with which every card is refused; None for none.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.uploads_until_break: int | None = None
        self.max_file_bytes: int | None = None
        self.card_refusal: int | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, *, token: str = TOKEN) -> dict[str, str]:
        """Variables for a process that takes this for the Hub; huggingface_hub reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, name: str, *, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        return self.repositories[kind, name].branches[revision]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        try:
            for route_method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in route_method:
                    self._send(*answer(self, **match.groupdict()))
                    return
            raise _Refused(404, f"no route {method} {path}", "RepoNotFound")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            headers["X-Error-Message"] = str(refused)
            self._send(refused.status, {"error": str(refused)}, headers)

    def _send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who may do what

    def _check_token(self) -> None:
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _check_owner(self, name: str) -> None:
        self._check_token()
        if not name.startswith(f"{USER}/") or self.headers.get("Authorization") == f"Bearer {READ_TOKEN}":
            raise _Refused(403, f"Forbidden: you don't have the rights to write to {name}")

    def _repository(self, kind: str | None, name: str) -> Repository:
        repository = self.hub.repositories.get((kind or "models", name))
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise _Refused(404, f"Repository {name} not found", "RepoNotFound")
        return repository

    def _branch(self, kind: str | None, name: str, revision: str) -> dict[str, bytes]:
        files = self._repository(kind, name).find(revision)
        if files is None:
            raise _Refused(404, f"Revision {revision} not found", "RevisionNotFound")
        return files

    # --- answers: status, content, headers

    def whoami(self) -> tuple:
        self._check_token()
        return 200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self) -> tuple:
        fields = json.loads(self.body)
        name = f"{fields.get('organization') or USER}/{fields['name']}"
        self._check_owner(name)
        key = (f"{fields.get('type', 'model')}s", name)
        url = f"{self.hub.url}/{'' if key[0] == 'models' else key[0] + '/'}{name}"
        if key in self.hub.repositories:
            return 409, {"error": "You already created this repo", "url": url}
        private = fields.get("visibility") == "private" or fields.get("private", False)
        self.hub.repositories[key] = Repository(private=private, sdk=fields.get("sdk"))
        return 200, {"url": url}

    def control(self) -> tuple:
        """For tests in other processes: set attributes of the hub (others go back to None), and see the uploads."""
        if self.command == "POST":
            settings = json.loads(self.body)
            limit = settings.get("uploads_until_break")
            self.hub.uploads_until_break = None if limit is None else len(self.hub.uploads) + limit
            self.hub.max_file_bytes = settings.get("max_file_bytes")
            self.hub.card_refusal = settings.get("card_refusal")
        return 200, {"uploads": self.hub.uploads}

    def preupload(self, kind: str, name: str, revision: str) -> tuple:
        self._check_owner(name)
        self._repository(kind, name)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return 200, {"files": files}

    def lfs_batch(self, kind: str | None, name: str) -> tuple:
        self._check_owner(name)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if self.hub.max_file_bytes is not None and item["size"] > self.hub.max_file_bytes:
                answer["error"] = {"code": 413, "message": "The file is larger than the limit"}
            elif item["oid"] not in self.hub.large_files:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> tuple:
        with self.hub.lock:  # files arrive several at a time
            limit = self.hub.uploads_until_break
            if limit is not None and len(self.hub.uploads) >= limit:
                raise _Refused(403, "the line is broken")
            self.hub.uploads.append(oid)
        self.hub.large_files[oid] = self.body
        return 200, {}

    def commit(self, kind: str, name: str, revision: str) -> tuple:
        self._check_owner(name)
        repository = self._repository(kind, name)
        files = dict(repository.branches[revision])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"success": True}
        if self.query.get("create_pr") == ["1"]:
            number = len(repository.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        repository.branches[revision] = files
        commit = repository.commit_id(revision)
        return 200, answer | {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}

    def info(self, kind: str, name: str, revision: str = "main") -> tuple:
        repository = self._repository(kind, name)
        self._branch(kind, name, revision)
        files = repository.find(revision)
        branch = next(branch for branch, held in repository.branches.items() if held is files)
        return 200, {
            "id": name,
            "_id": "0" * 24,
            "sha": repository.commit_id(branch),
            "private": repository.private,
            "sdk": repository.sdk,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> tuple:
        files = self._branch(kind, name, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if not inside and folder:
            raise _Refused(404, f"{folder} not found", "EntryNotFound")
        folders = {
            parent.as_posix()
            for path in inside
            for parent in Path(path).parents
            if parent.as_posix() != "." and parent.as_posix() != folder
        }
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [_describe_file(path, data) for path, data in sorted(inside.items())]
        return 200, entries

    def paths_info(self, kind: str, name: str, revision: str) -> tuple:
        files = self._branch(kind, name, revision)
        asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        return 200, [_describe_file(path, files[path]) for path in asked if path in files]

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> tuple:
        files = self._branch(kind, name, revision)
        repository = self._repository(kind, name)
        branch = next(branch for branch, held in repository.branches.items() if held is files)
        headers = {"X-Repo-Commit": repository.commit_id(branch)}
        if path not in files:
            raise _Refused(404, f"{path} not found", "EntryNotFound")
        digest = hashlib.sha256(files[path]).hexdigest()
        return 200, files[path], headers | {"ETag": f'"{digest}"', "X-Linked-Size": str(len(files[path]))}

    def validate_yaml(self) -> tuple:
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        if self.hub.card_refusal is None and "license" in metadata:
            return 200, {"errors": [], "warnings": []}
        errors = [{"message": "license is required"}]
        return self.hub.card_refusal or 400, {"errors": errors, "warnings": []}


def _describe_file(path: str, data: bytes) -> dict:
    described = {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
    if len(data) > LFS_BYTES:
        described["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return described


_ROUTES = (
    (("GET", "POST"), "/control", _Handler.control),
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (("GET",), rf"/api/{_REPO}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("POST",), rf"/api/{_REPO}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (("GET",), rf"/api/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"/api/{_REPO}", _Handler.info),
    (("POST",), rf"/{_FILE}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", _Handler.lfs_upload),
    (("GET", "HEAD"), rf"/{_FILE}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler.resolve),
)
