"""A stand-in for the service of W&B on the loopback: it answers what the client asks, and keeps what arrives."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any

ENTITY = "tester"


@dataclass
class Run:
    """What has arrived of one run."""

    about: dict[str, Any] = field(default_factory=dict)  # variables of UpsertBucket that were given
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """name -> definition, as it travels in the config; step metrics are given by their place, from 1."""
        listed = self.config["_wandb"]["m"]
        return {entry.get("1") or entry["2"]: entry for entry in listed}


@dataclass
class Artifact:
    """What has arrived of one artifact, which is one for all that have the same name and digest."""

    name: str
    type: str
    digest: str
    committed: bool = False
    logged_by: set[str] = field(default_factory=set)
    used_by: set[str] = field(default_factory=set)
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Service:
    """Runs by id, artifacts by their id here, and the names of the queries that it does not know."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lock = RLock()
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.unknown: list[str] = []

    def artifact(self, name: str) -> Artifact:
        """The one artifact of this name."""
        found = [artifact for artifact in self.artifacts.values() if artifact.name == name]
        assert len(found) == 1, (name, [artifact.name for artifact in self.artifacts.values()])
        return found[0]

    def run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run())

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        """The data for a query; null for what this service does not know."""
        operation, root = re.search(r"(?:query|mutation)\s+(\w+)[^{]*\{\s*(\w+)", query).groups()
        known = getattr(self, f"on_{operation}", None)
        if known is None:
            self.unknown.append(operation)
        return {root: known(**variables.get("input", variables)) if known else None}

    def on_Viewer(self) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}

    def on_RunResumeStatus(self, name: str, **_: Any) -> Any:
        known = self.runs.get(name)
        if known is None:
            return None
        bucket = {
            "id": name, "name": name, "summaryMetrics": json.dumps(known.summary), "displayName": "",
            "logLineCount": 0, "historyLineCount": len(known.history), "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in known.history[-1:]]), "eventsTail": "[]",
            "config": json.dumps({key: {"value": value} for key, value in known.config.items()}),
            "tags": known.about.get("tags", []), "notes": "", "wandbConfig": "{}",
        }  # fmt: skip
        return {"id": "P", "name": "P", "entity": {"id": "E", "name": ENTITY}, "bucket": bucket}

    def on_UpsertBucket(self, name: str, config: str | None = None, **about: Any) -> Any:
        inserted, run = name not in self.runs, self.run(name)
        run.about |= {key: value for key, value in about.items() if value is not None}
        run.config |= {key: entry["value"] for key, entry in json.loads(config or "{}").items()}
        project = {"id": "P", "name": run.about.get("project"), "entity": {"id": "E", "name": ENTITY}}
        bucket = {
            "id": name, "name": name, "displayName": run.about.get("displayName"), "description": None,
            "config": None, "sweepName": None, "historyLineCount": len(run.history), "project": project,
        }  # fmt: skip
        return {"bucket": bucket, "inserted": inserted}

    def on_CreateRunFiles(self, run: str, files: list[str], **_: Any) -> Any:
        urls = [{"name": name, "uploadUrl": f"{self.url}/put/run/{run}/{name}"} for name in files]
        return {"runID": run, "uploadHeaders": [], "files": urls}

    def on_NotifyScriptableRunAlert(self, runName: str, **alert: Any) -> Any:
        self.run(runName).alerts.append(alert)
        return {"success": True}

    def on_CreateArtifact(
        self, artifactCollectionName: str, artifactTypeName: str, digest: str, runName: str | None, **_: Any
    ) -> Any:
        identity = hashlib.sha256(f"{artifactCollectionName} {digest}".encode()).hexdigest()
        new = Artifact(artifactCollectionName, artifactTypeName, digest)
        artifact = self.artifacts.setdefault(identity, new)
        artifact.logged_by |= {runName} - {None}
        state = "COMMITTED" if artifact.committed else "PENDING"
        return {"artifact": {"id": identity, "state": state, "artifactSequence": {"latestArtifact": None}}}

    def on_CreateArtifactManifest(self, artifactID: str, **_: Any) -> Any:
        file = {"uploadUrl": f"{self.url}/put/manifest/{artifactID}", "uploadHeaders": []}
        return {"artifactManifest": {"id": artifactID, "file": file}}

    def on_UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> Any:
        return self.on_CreateArtifactManifest(artifactManifestID)

    def on_CreateArtifactFiles(self, artifactFiles: list[dict[str, Any]], **_: Any) -> Any:
        nodes = [
            {"id": f"{index}", "name": file["name"], "displayName": file["name"], "storagePath": file["name"],
             "uploadUrl": f"{self.url}/put/artifact/{file['artifactID']}/{file['name']}", "uploadHeaders": [],
             "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
            for index, file in enumerate(artifactFiles)
        ]  # fmt: skip
        return {"files": {"edges": [{"node": node} for node in nodes]}}

    def on_CommitArtifact(self, artifactID: str, **_: Any) -> Any:
        self.artifacts[artifactID].committed = True
        return {"artifact": {"id": artifactID, "digest": self.artifacts[artifactID].digest}}

    def on_UseArtifact(self, artifactID: str, runName: str, **_: Any) -> Any:
        self.artifacts[artifactID].used_by.add(runName)
        return {"artifact": {"id": artifactID}}

    def put(self, kind: str, identity: str, name: str, content: bytes) -> None:
        """Keep an uploaded file."""
        if kind == "run":
            self.run(identity).files[name] = content
        elif kind == "manifest":
            self.artifacts[identity].manifest = json.loads(content)
        else:
            self.artifacts[identity].files[name] = content

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take in lines of a run; a file's offset says where they belong."""
        run = self.run(name)
        for file, chunk in sent.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if file.startswith("wandb-") else []
            if file == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines
            elif file == "wandb-summary.json":
                run.summary = lines[-1]
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def log_message(self, *_: Any) -> None:
        """Tests have an output of their own."""

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: Any = {}
        with self.service.lock:
            if self.path == "/graphql":
                asked = json.loads(content)
                answer = {"data": self.service.graphql(asked["query"], asked.get("variables") or {})}
            elif found := re.fullmatch(r"/put/(\w+)/([^/]+)/?(.*)", self.path):
                self.service.put(*found.groups(), content)
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self.service.stream(found[1], json.loads(content))
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no failure of a test."""


@contextmanager
def serving() -> Iterator[Service]:
    """A service that answers while the block runs."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        handler.service = Service(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield handler.service
        finally:
            server.shutdown()
            thread.join()
