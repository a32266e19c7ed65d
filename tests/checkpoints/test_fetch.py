"""Downloads: what is kept was whole and holds weights; all else is one error with the address, and nothing kept."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

import vicinal.zoo  # noqa: F401
from vicinal.__main__ import main
from vicinal.checkpoints import fetch, load

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3)}


class Server(ThreadingHTTPServer):
    """Answers by path: (status, headers, body), and counts how often each was asked for."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), Handler)

    def offer(self, path, body, status=200, **headers):
        """Returns the address."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body)), **headers}
        self.answers[path] = status, {name.replace("_", "-"): value for name, value in headers.items()}, body
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        status, headers, body = self.server.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if headers.get("Stalls"):
            self.wfile.flush()
            time.sleep(float(headers["Stalls"]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where downloads are kept."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def pth(tmp_path, content):
    torch.save(content, tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_comes_once_and_whole(server, hub, tmp_path, name):
    body = save(WEIGHTS) if name.endswith("safetensors") else pth(tmp_path, WEIGHTS)
    url = server.offer(f"/{name}", body)
    path = fetch(url, hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body
    assert torch.equal(load(path)["a"], WEIGHTS["a"])
    assert fetch(url) == path
    assert server.asked == [f"/{name}"]
    assert [entry.name for entry in hub.iterdir()] == [path.name]


def test_files_of_one_name_are_kept_apart(server, hub):
    """By their whole address, query included: a base name says nothing of whose file it is."""
    urls = ["/one/b.safetensors", "/two/b.safetensors", "/two/b.safetensors?version=2"]
    bodies = [save({"a": torch.full((2,), float(number))}) for number in range(3)]
    paths = [fetch(server.offer(url, body)) for url, body in zip(urls, bodies, strict=True)]
    assert [path.read_bytes() for path in paths] == bodies


WHOLE = save(WEIGHTS)
BROKEN = {
    "cut short": (
        {"body": WHOLE[:-5], "Content_Length": str(len(WHOLE))},
        rf"cut short, {len(WHOLE) - 5} of {len(WHOLE)}",
    ),
    "cut short, length unknown": ({"body": WHOLE[:-5], "Content_Length": ""}, "hold no weights"),
    "empty": ({"body": b""}, "the 0 bytes of .* hold no weights"),
    "a web page": (
        {"body": b"<html>sign in</html>", "Content_Type": "text/html"},
        "20 bytes of text/html that came hold no",
    ),
    "not found": ({"body": b"no", "status": 404}, "HTTP Error 404"),
    "chunks that end": (
        {"body": b"500\r\nabc", "Content_Length": "", "Transfer_Encoding": "chunked"},
        "IncompleteRead|hold no",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_whole_file_of_weights_is_not_kept(server, hub, kind, suffix):
    answer, message = BROKEN[kind]
    url = server.offer(f"/weights{suffix}", **answer)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"cannot download {url}: .*({message})"):
            fetch(url)
        assert not list(hub.iterdir())
    assert len(server.asked) == 2
    # Once the server has it, it is taken.
    if suffix == ".safetensors":
        assert load(fetch(server.offer("/weights.safetensors", WHOLE)))["a"].shape == (2, 3)


def test_another_hash_is_refused(server, hub):
    url = server.offer("/x.safetensors", WHOLE)
    with pytest.raises(ValueError, match=f"{url}: its SHA-256 is {hashlib.sha256(WHOLE).hexdigest()}, expected 00"):
        fetch(url, "00")
    assert not list(hub.iterdir())


def test_a_server_that_stalls_is_given_up(server, hub):
    url = server.offer("/x.safetensors", WHOLE[:10], Content_Length="1000", Stalls="5")
    with pytest.raises(ValueError, match=f"cannot download {url}: timed out"):
        fetch(url, timeout=0.2)
    assert not list(hub.iterdir())


def test_an_address_where_nobody_answers_is_one_line(hub):
    with pytest.raises(ValueError, match=r"cannot download http://127.0.0.1:1/x.pth: .*refused"):
        fetch("http://127.0.0.1:1/x.pth")


@pytest.mark.parametrize("name", ["nat_pico", "shvit_pico_vicinal"])
def test_the_models_load_their_address_through_it(server, hub, tmp_path, name):
    source = timm.create_model(name, num_classes=4)
    url = server.offer("/some/content", pth(tmp_path, {"model": source.state_dict()}))
    overlay = {"url": url, "num_classes": 4}
    for features in ({}, {"features_only": True}):
        model = timm.create_model(name, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, **features)
        key = next(iter(source.stem.state_dict()))
        stem = model.model.stem if features else model.stem
        assert torch.equal(stem.state_dict()[key], source.stem.state_dict()[key])
    assert server.asked == ["/some/content"]


def test_a_download_that_fails_is_one_line_of_the_command(server, hub, tmp_path, monkeypatch, capsys):
    from timm.models import get_pretrained_cfg

    url = server.offer("/nat_mini.pth", b"<html>gone</html>", Content_Type="text/html")
    cfg = get_pretrained_cfg("nat_mini")
    monkeypatch.setattr(cfg, "url", url)
    monkeypatch.setattr("vicinal.zoo.backbone.resolve_pretrained_cfg", lambda *_: cfg)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", "nat_mini", "--pretrained", "--device", "cpu", "--batch-size", "2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line == f"error: --model nat_mini: cannot download {url}: the 17 bytes of text/html that came hold no weights"
    )
    assert not Path("runs").exists()


def test_flushed_then_renamed_then_the_folder_flushed(tmp_path, monkeypatch):
    """What survives a power cut: the content before the name, and the name before the call returns."""
    import os

    from vicinal.checkpoints import write_atomically

    events, flush, rename = [], os.fsync, os.replace
    path = tmp_path / "note"

    def fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        content = Path(target).read_text() if os.path.isfile(target) else None
        events.append(("flush", "folder" if target == str(tmp_path) else content, path.exists()))
        flush(descriptor)

    def replace(*names):
        events.append(("rename", names[1] == path, None))
        rename(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, lambda temporary: Path(temporary).write_text("all of it"))
    assert events == [("flush", "all of it", False), ("rename", True, None), ("flush", "folder", True)]
