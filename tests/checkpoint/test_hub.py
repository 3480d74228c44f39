"""The hub: which files are asked for, that the cache serves offline, and one line for each failure.

The real client talks to a small server on this machine that speaks the hub's HTTP as far as
`snapshot_download` needs it. Each run is a process of its own, because the client reads its
endpoint and its cache folder when it is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

MAIN, OLD = "a" * 40, "b" * 40
WANTED = {
    "config.json": b'{"at": "main"}',
    "model.safetensors": b"not really" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
    "README.md": b"# hello",
    "training_args.pt": b"pickle",
    "consolidated.safetensors": b"a second copy",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"a third",
}
FILES = {MAIN: WANTED | UNWANTED, OLD: WANTED | UNWANTED | {"config.json": b'{"at": "old"}'}}
REVISIONS = {"main": MAIN, "old": OLD, MAIN: MAIN, OLD: OLD}

RESOLVE = """
import json, sys
from lethe_mini.errors import UserError
from lethe_mini.checkpoint.load import resolve
answers = []
for asked in json.loads(sys.argv[1]):
    try:
        answers.append(str(resolve(*asked)))
    except UserError as error:
        answers.append("UserError: " + str(error))
print(json.dumps(answers))
"""
THERE = [("team/model",), ("team/model", "old"), ("team/model", OLD)]
REFUSED = {  # what is asked for -> words of the answer
    ("team/nothing",): "no folder and no hub repository 'team/nothing'",
    ("nothing",): "no folder and no hub repository 'nothing'",
    ("team/model", "nope"): "'team/model' has no revision 'nope'",
    ("team/gated",): "'team/gated' is gated; accept its terms",
    ("team/not a name",): "neither a folder nor a hub id",
    ("team/broken",): "'team/broken' could not be fetched",
}


class Hub(BaseHTTPRequestHandler):
    """`team/model` is there, `team/gated` wants terms accepted, `team/broken` answers 403."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        path = path.removeprefix("api/models/")
        repo, parts = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo == "team/gated":
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        if repo == "team/broken":
            return self.answer(403, b"", {"X-Error-Message": "two\tlines"})
        if repo != "team/model":
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        sha = REVISIONS.get(parts[1] if len(parts) > 1 else "main")
        if sha is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "resolve":
            return self.file(FILES[sha]["/".join(parts[2:])], sha)
        if parts[0] == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
                for name, data in FILES[sha].items()
            ]
        else:
            siblings = [{"rfilename": name} for name in FILES[sha]]
            listing = {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings}
        headers = {"Content-Type": "application/json"}
        return self.answer(200, json.dumps(listing).encode(), headers)

    do_HEAD = do_GET

    def file(self, data, sha):
        self.answer(200, data, {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": sha})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def run(home, port, asked, **extra):
    """`resolve` in a process, for each of `asked` in turn: the answers, and standard error."""
    outside = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # not this test's business
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(outside)}
    environment = kept | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", RESOLVE, json.dumps(asked)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | extra, cwd=home.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Four runs over one cache: the hub is there, there again, gone, and forbidden."""
    home = tmp_path_factory.mktemp("hub") / "home"
    told = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            told["first"] = run(home, server.server_port, THERE + list(REFUSED))
            told["asked first"] = server.asked
            server.asked = []
            told["again"] = run(home, server.server_port, THERE)
            told["asked again"] = server.asked
        finally:
            server.shutdown()
            thread.join()
    uncached = [*THERE, ("team/other",)]
    told["gone"] = run(home, server.server_port, uncached)  # nobody listens there any more
    told["forbidden"] = run(home, server.server_port, uncached, HF_HUB_OFFLINE="1")
    return told


def test_only_weights_json_and_templates_are_fetched(story):
    folder = Path(story["first"][0][0])
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == WANTED
    asked = [path.split("/resolve/")[1] for path in story["asked first"] if "/resolve/" in path]
    assert {path.split("/", 1)[1] for path in asked} == set(WANTED)


def test_a_revision_is_honoured(story):
    at = [
        json.loads((Path(path) / "config.json").read_text())["at"] for path in story["first"][0][:3]
    ]
    assert at == ["main", "old", "old"]


@pytest.mark.parametrize("run", ["again", "gone", "forbidden"])
def test_a_cached_copy_serves_whether_the_hub_answers_or_not(story, run):
    assert story[run][0][:3] == story["first"][0][:3]


def test_what_is_cached_is_not_fetched_again(story):
    assert story["asked again"]
    assert not [path for path in story["asked again"] if "/resolve/" in path]


@pytest.mark.parametrize("asked", REFUSED, ids="-".join)
def test_what_the_hub_refuses_is_one_line(story, asked):
    answer = story["first"][0][len(THERE) + list(REFUSED).index(asked)]
    assert answer.startswith("UserError: ")
    assert REFUSED[asked] in answer
    assert len(answer.splitlines()) == 1


@pytest.mark.parametrize(("run", "why"), [("gone", "Connection"), ("forbidden", "HF_HUB_OFFLINE")])
def test_an_unreachable_hub_without_a_cached_copy_is_one_line(story, run, why):
    answer = story[run][0][3]
    assert answer.startswith("UserError: 'team/other' could not be fetched from the hub")
    assert why in answer
    assert len(answer.splitlines()) == 1


@pytest.mark.parametrize("run", ["first", "again", "gone", "forbidden"])
def test_the_client_shows_its_progress_and_nothing_else(story, run):
    err = story[run][1]
    assert "Traceback" not in err
    assert "arning" not in err
    lines = err.replace("\r", "\n").splitlines()
    assert not [line for line in lines if line.strip() and "%" not in line and "B/s" not in line]
    assert run != "first" or "Fetching 5 files" in err
