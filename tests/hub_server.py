"""A stand-in for the Hugging Face Hub on this machine: repositories, commits, rights.

It answers what ``huggingface_hub`` asks to create a repository, to upload a folder and to download
one, over HTTP, and keeps what was committed. The client reads ``HF_ENDPOINT`` when it is imported,
so it runs in a process of its own::

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment()})
    assert hub.repositories["photographer/model"].files["README.md"] == ...
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

_NAME = r"[\w.-]+/[\w.-]+"
_ERROR_CODES = {"Repository not found": "RepoNotFound", "Revision not found": "RevisionNotFound"}


@dataclass
class Repository:
    """What the server knows of a repository.

    Attributes:
        private: as the client asked when it was created; None if it did not say.
        files: content by path, after all commits.
        commit_messages: in order.
    """

    private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    commit_messages: list[str] = field(default_factory=list)


@dataclass
class HubServer:
    """A Hub with one account; use it as a context manager.

    Attributes:
        token: the one that is taken; any other is refused (401).
        account: whose token it is. Repositories of others are public and cannot be written (403).
        refused_commits: HTTP status with which commits are refused, if they are.
        repositories: by "owner/name".
        requests: (method, path, authorization header) of all requests.
    """

    token: str = "hf_stand_in"
    account: str = "photographer"
    refused_commits: int | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Variables with which a process takes this server for the Hub."""
        proxies = ("http_proxy", "https_proxy", "all_proxy")
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **{name: "" for proxy in proxies for name in (proxy, proxy.upper())},
        }

    # What is asked, by method and path; the answer is a status and JSON.

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if (method, path) == ("POST", "/api/validate-yaml"):
            return self._validate_metadata(json.loads(body)["content"])
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        found = re.fullmatch(rf"/api/models/({_NAME})(/.*)?", path)
        if found is None:
            return 404, {"error": f"this stand-in does not answer {method} {path}"}
        name, request = found[1], found[2] or ""
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if (method, request) == ("GET", ""):
            return 200, {"id": name, "sha": self._last_commit(name)}
        asked = re.fullmatch(r"/(revision|tree)/([\w.-]+)", request)
        if method == "GET" and asked is not None:
            if asked[2] not in ("main", self._last_commit(name)):
                return 404, {"error": "Revision not found"}
            if asked[1] == "revision":
                return 200, {"id": name, "sha": self._last_commit(name)}
            return 200, self._tree(name)
        if not name.startswith(f"{self.account}/"):
            return 403, {"error": "You don't have write access to this repository."}
        if (method, request) == ("GET", "/auth-check/write"):
            return 200, {}
        if (method, request) == ("POST", "/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": path, **how} for path in paths]}
        if (method, request) == ("POST", "/commit/main"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"this stand-in does not answer {method} {path}"}

    def file(self, path: str) -> tuple[str, bytes] | None:
        """The commit and the content of what ``/owner/name/resolve/revision/path`` asks for."""
        found = re.fullmatch(rf"/({_NAME})/resolve/([\w.-]+)/(.+)", path)
        if found is None or found[1] not in self.repositories:
            return None
        content = self.repositories[found[1]].files.get(found[3])
        return None if content is None else (self._last_commit(found[1]), content)

    def _tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
            for path, content in sorted(self.repositories[name].files.items())
        ]

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        owner = wanted["organization"] or self.account
        name = f"{owner}/{wanted['name']}"
        if owner != self.account:
            return 403, {"error": f"You don't have the rights to create a model under {owner}"}
        answer = {"url": f"{self.endpoint}/{name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **answer}
        visibility = wanted.get("visibility")
        private = None if visibility is None else visibility == "private"
        self.repositories[name] = Repository(private)
        return 200, answer

    def _validate_metadata(self, card: str) -> tuple[int, dict[str, Any]]:
        """Refuse what the Hub refuses of a base model: what cannot be the name of a model."""
        front_matter = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
        base = metadata.get("base_model")
        if base is not None and re.fullmatch(rf"{_NAME}|[\w.-]+", base) is None:
            message = f'"base_model" with value "{base}" is not valid. Use a model id.'
            return 400, {"errors": [{"message": message}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        if self.refused_commits is not None:
            return self.refused_commits, {"error": "Commits are refused."}
        repository = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commit_messages.append(value["summary"])
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64"), line["key"]
                repository.files[value["path"]] = base64.b64decode(value["content"])
        commit = self._last_commit(name)
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit}

    def _last_commit(self, name: str) -> str:
        number = len(self.repositories[name].commit_messages)
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        authorization = self.headers.get("Authorization")
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path, authorization))
        if authorization == f"Bearer {hub.token}":
            status, answer = hub.answer(self.command, path, body)
        else:
            status, answer = 401, {"error": "Invalid username or password."}
        content = json.dumps(answer).encode()
        file = hub.file(path) if status != 401 else None
        if file is not None:
            status, (commit, content) = 200, file
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if file is not None:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{_etag(content)}"')
        else:
            self.send_header("Content-Type", "application/json")
        if status == 404 and answer["error"] in _ERROR_CODES:
            self.send_header("X-Error-Code", _ERROR_CODES[answer["error"]])
        if status >= 400 and "error" in answer:
            self.send_header("X-Error-Message", answer["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the test's output free of a line per request."""
