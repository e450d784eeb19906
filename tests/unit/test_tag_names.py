"""Proposed names: nearest phrases, and a vision-language model behind a local server that speaks the protocol."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from curation import tag_names
from curation.contrast import DAMAGE
from curation.tag_names import Endpoint, by_looking, by_text, say, show

RED, BLUE = (np.full((40, 60, 3), color, np.uint8) for color in ((220, 20, 20), (20, 20, 220)))


class Model(BaseHTTPRequestHandler):
    """Calls red pictures red; wrong answers and failures are set by the tests."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        if self.server.failures:
            self.send_response(self.server.failures.pop(0))
            self.end_headers()
            self.wfile.write(b"busy")
            return
        parts = body["messages"][0]["content"]
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        colors = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))).reshape(-1, 3).mean(0) for url in pictures]
        text = f' "{self.server.name}." ' if len(pictures) > 1 else ("Yes." if colors[0][0] > 120 else "No, it is blue.")
        answer = self.server.answer or {"choices": [{"message": {"content": text}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    http.seen, http.failures, http.answer, http.name = [], [], None, "strong red tint"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def endpoint(server):
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "looker", key="secret")


def test_a_name_comes_from_shown_images_and_is_scored_on_others(server, endpoint):
    named = by_looking(endpoint, [RED] * 6, [BLUE] * 6)
    assert named == {"name": "strong red tint", "by": "looker", "detection": 1.0, "num": 8}
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "looker"
    assert sum(part["type"] == "image_url" for part in body["messages"][0]["content"]) == 4, "four are kept for the score"
    assert len(server.seen) == 1 + 8
    assert all('"strong red tint"' in seen[2]["messages"][0]["content"][0]["text"] for seen in server.seen[1:])


def test_a_name_that_does_not_tell_the_images_apart_has_no_score(server, endpoint):
    assert by_looking(endpoint, [RED] * 6, [RED] * 6)["detection"] == 0.5


def test_too_few_images_give_no_name(endpoint):
    with pytest.raises(ValueError, match="4 top and 6 near-miss images; a name and its score take 5 of each"):
        by_looking(endpoint, [RED] * 4, [BLUE] * 6)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server, endpoint):
    waits = []
    server.failures = [503, 429]
    assert "red" in endpoint.ask([say("which?"), show(RED), show(RED)], waits.append)
    assert waits == [1.0, 2.0] and len(server.seen) == 3
    server.failures = [401, 503]
    with pytest.raises(ConnectionError, match="answered 401: busy"):
        endpoint.ask([say("which?")], waits.append)
    assert len(server.seen) == 4
    server.failures = [503] * 9
    with pytest.raises(ConnectionError, match="answered 503"):
        endpoint.ask([say("which?")], waits.append)


def test_an_answer_that_is_no_completion_and_a_silent_place_are_named(server, endpoint):
    server.answer = {"error": "no such model"}
    with pytest.raises(ConnectionError, match="no chat completion"):
        endpoint.ask([say("which?"), show(RED)])
    with pytest.raises(ConnectionError, match="is the server up"):
        Endpoint("http://127.0.0.1:9/v1", "looker").ask([say("which?")], lambda seconds: None)


def test_images_are_shown_small_and_almost_without_loss():
    picture = np.random.default_rng(0).integers(0, 256, (700, 500, 3)).astype(np.uint8)
    url = show(picture)["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert max(shown.size) == tag_names.SIDE


def test_the_nearest_phrase_is_found_whatever_all_phrases_share():
    rng = np.random.default_rng(0)
    shared, kinds = rng.normal(size=8) * 10, np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    phrases = np.stack([np.stack([shared + kinds[i] + kinds.sum(0), shared]) for i in range(3)])
    found = by_text(kinds[[2, 0]] * 5, phrases, ["a", "b", "c"], top=2)
    assert [row[0][0] for row in found] == ["c", "a"] and found[0][0][1] > 0.7 > found[0][1][1]


def test_every_kind_of_damage_has_phrases():
    assert set(tag_names.PHRASES) == set(DAMAGE)
