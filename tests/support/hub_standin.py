"""A loopback stand-in of the Hugging Face Hub: what its Python client needs to push and load model folders.

It checks the client's calls, not the real Hub: no large files (LFS, Xet), no pages, no pull requests.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from folder_files import bytes_of
from launched import run_code

REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/validate-yaml": "validate_yaml",
    "POST /api/repos/create": "create",
    f"GET /api/models/{REPO}(/revision/{REVISION})?": "info",
    f"GET /api/models/{REPO}/tree/{REVISION}(/(?P<path>.+))?": "tree",
    f"POST /api/models/{REPO}/branch/{REVISION}": "branch",
    f"POST /api/models/{REPO}/preupload/{REVISION}": "preupload",
    f"POST /api/models/{REPO}/commit/{REVISION}": "commit",
    f"GET /{REPO}/resolve/{REVISION}/(?P<path>.+)": "resolve",
}


@dataclass
class Reply(Exception):
    """A response; raised if it is a refusal."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, code: str = "", **headers: str) -> Reply:
    headers |= {"X-Error-Message": message, "X-Error-Code": code}
    return Reply(status, {"error": message}, headers)


def object_id(data: bytes) -> str:
    """Return the hash that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    repo_id: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = [len(self.commits), {path: object_id(data) for path, data in files.items()}]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


class HubStandIn:
    """`with HubStandIn() as hub:` serves `hub.endpoint`; `token` may write to the namespace `user`.

    `role` is what the token may do; `requests` lists what was asked ("POST /api/repos/create"); `broken` is a part of
    the requests to answer with a 500 ("/commit/"); `refused_in_cards` lists what is not valid in the metadata of a
    card.
    """

    def __init__(self, token: str = "hf_test", user: str = "tester") -> None:
        self.token, self.user, self.role = token, user, "write"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        self.refused_in_cards: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self})
        )
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return path -> content at a branch or commit."""
        return self.repositories[repo_id].at(revision)[1]

    def answer(self, request: str, authorization: str | None, body: bytes) -> Reply:
        """Answer "METHOD /path"; the decoded groups of the route are the keyword arguments of its method."""
        with self._lock:
            self.requests.append(request)
            try:
                if self.broken is not None and self.broken in request:
                    raise refusal(500, "The stand-in is broken on purpose")
                if authorization != f"Bearer {self.token}":
                    raise refusal(401, "Invalid credentials in Authorization header")
                for route, name in ROUTES.items():
                    if match := re.fullmatch(route, request.replace("HEAD", "GET", 1)):
                        found = {
                            key: unquote(value or "") for key, value in match.groupdict().items()
                        }
                        return self._dispatch(name, found, body)
                raise refusal(404, f"The stand-in does not serve {request}")
            except Reply as reply:
                return reply

    def _dispatch(self, name: str, found: dict[str, Any], body: bytes) -> Reply:
        if "repo" in found:
            repo_id, found["repo"] = found["repo"], self.repositories.get(found["repo"])
            if found["repo"] is None:
                raise refusal(404, "Repository not found", "RepoNotFound")
            if name not in ("info", "tree", "resolve"):
                self._check_namespace(repo_id.split("/")[0])
        return getattr(self, f"_{name}")(**found, body=body)

    def _check_namespace(self, namespace: str) -> None:
        if namespace != self.user:
            raise refusal(
                403, f"You don't have the rights to write under the namespace {namespace!r}"
            )

    def _whoami(self, body: bytes) -> Reply:
        return Reply(
            200,
            {
                "type": "user",
                "name": self.user,
                "orgs": [],
                "auth": {"accessToken": {"role": self.role}},
            },
        )

    def _validate_yaml(self, body: bytes) -> Reply:
        metadata = json.loads(body)["content"].split("---")[1]
        refused = [name for name in self.refused_in_cards if name in metadata]
        if refused:
            return Reply(
                400, {"errors": [{"message": f'"{refused[0]}" is not allowed'}], "warnings": []}
            )
        return Reply(200, {"errors": [], "warnings": []})

    def _create(self, body: bytes) -> Reply:
        asked = json.loads(body)
        namespace = asked["organization"] or self.user
        self._check_namespace(namespace)
        repo_id = f"{namespace}/{asked['name']}"
        reply = {"name": repo_id, "url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repositories:
            return Reply(409, {"error": "You already created this model repo", **reply})
        self.repositories[repo_id] = Repository(
            repo_id, private=asked.get("visibility") == "private"
        )
        self.repositories[repo_id].commit("main", {})
        return Reply(200, reply)

    def _info(self, repo: Repository, revision: str, body: bytes) -> Reply:
        sha, files = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        return Reply(
            200, {"id": repo.repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        )

    def _tree(self, repo: Repository, revision: str, path: str, body: bytes) -> Reply:
        entries = [
            {"type": "file", "path": name, "oid": object_id(data), "size": len(data)}
            for name, data in repo.at(revision)[1].items()
            if name.startswith(f"{path}/" if path else "")
        ]
        if path and not entries:
            raise refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        return Reply(200, entries)

    def _branch(self, repo: Repository, revision: str, body: bytes) -> Reply:
        if revision in repo.branches:
            raise refusal(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.at(json.loads(body).get("startingPoint", "main"))[0]
        return Reply(201)

    def _preupload(self, repo: Repository, revision: str, body: bytes) -> Reply:
        present, answers = repo.at(revision)[1], []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            known = {"oid": object_id(present[path])} if path in present else {}
            answers.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, **known})
        return Reply(200, {"files": answers})

    def _commit(self, repo: Repository, revision: str, body: bytes) -> Reply:
        files = dict(repo.at(revision)[1])
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key != "header":
                raise refusal(400, f"Cannot apply {key} {value}: absent, or not stored that way")
        sha = repo.commit(revision, files)
        return Reply(
            200, {"commitUrl": f"{self.endpoint}/{repo.repo_id}/commit/{sha}", "commitOid": sha}
        )

    def _resolve(self, repo: Repository, revision: str, path: str, body: bytes) -> Reply:
        sha, files = repo.at(revision)
        if path not in files:
            raise refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        return Reply(
            200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{object_id(files[path])}"'}
        )


class Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        reply = self.hub.answer(f"{self.command} {path}", self.headers["Authorization"], body)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[HubStandIn]:
    """A running stand-in; `from hub_standin import hub_fixture  # noqa: F401` gives a test module `hub`."""
    with HubStandIn() as running:
        yield running


def connect(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the stand-in the Hub of this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def run_with_hub(hub: HubStandIn, code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with its cache in `tmp_path`, whose Hub is the stand-in.

    It is forked from one that has imported everything, which takes a fifth of the time.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSF"))
    }
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_test",
    }
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    # A repository without safetensors of the usual names makes Transformers ask a service on the internet, and wait.
    environment |= {"DISABLE_SAFETENSORS_CONVERSION": "1"}
    return run_code(_CONNECT + textwrap.dedent(code), json.dumps(environment), tmp_path)


def assert_pushed(
    hub: HubStandIn, process: subprocess.CompletedProcess[str], folder: Path, name: str
) -> None:
    """The process ended with the address of a commit, and the private repository holds what the folder does."""
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith(f"{hub.endpoint}/{name}/commit/")
    assert hub.files(name) == bytes_of(folder)
    assert hub.repositories[name].private


_CONNECT = """
import importlib, json, os, sys
import huggingface_hub.constants, huggingface_hub.hf_api
os.chdir(sys.argv[2])
os.environ.clear()
os.environ.update(json.loads(sys.argv[1]))
importlib.reload(huggingface_hub.constants)  # what it read from the environment
huggingface_hub.hf_api.api.endpoint = os.environ["HF_ENDPOINT"]
"""
