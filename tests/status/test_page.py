"""The status page in a real browser, over canned numbers."""

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vase_vllm.status.plugin import PATH, _page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HEADLESS = [
    *["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
    *["--disable-background-networking", "--disable-component-update", "--disable-sync"],
    *["--timeout=20000", "--virtual-time-budget=4000", "--dump-dom"],
]
NUMBERS = {
    "policy": "vase",
    "settings": "budget=256, <b>window</b>=32",
    "running_requests": 3.0,
    "waiting_requests": 1.0,
    "preemptions": 7.0,
    "output_tokens": 1000.0,
    "evicting_requests": 2.0,
    "evictions": 50.0,
    "held_tokens": 500.0,
    "logical_tokens": 2000.0,
    "blocks": 95,
    "used_blocks": 60,
    "compression": 4.0,
}
REQUESTS = [
    {
        "request_id": f"id-{n}",
        "logical_tokens": n,
        "held_tokens": n // 4,
        "evictions": 9,
        "budget": b,
    }
    for n, b in ((1000, 256), (2000, None))
]


class Handler(BaseHTTPRequestHandler):
    """The routes of the page; ``trouble`` is what they answer instead of numbers."""

    trouble: str | None = None

    def do_GET(self):
        found = {PATH: _page(), "/status": json.dumps(NUMBERS), "/requests": json.dumps(REQUESTS)}
        page = self.path == PATH
        self.send_response(200 if page or not self.trouble else 503)
        self.end_headers()
        error = json.dumps({"error": {"message": self.trouble}})
        body = error if self.trouble and not page else found[self.path if page else self.path[12:]]
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def dom(tmp_path, monkeypatch):
    """Opens the page for some seconds: the document as it is then."""
    if BROWSER is None:
        pytest.skip("no chromium here: apt-get install chromium")

    def opened(trouble=None):
        monkeypatch.setattr(Handler, "trouble", trouble)
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}{PATH}"
            profile = f"--user-data-dir={tmp_path / 'profile'}"
            command = [BROWSER, *HEADLESS, profile, url]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            server.shutdown()
        return result.stdout

    return opened


def test_the_page_draws_what_it_is_told(dom):
    text = dom()
    assert "4×" in text
    assert '<span id="policy">vase</span>' in text
    # Whatever is in the numbers is text, not markup.
    assert "&lt;b&gt;window&lt;/b&gt;" in text
    assert text.count("<svg") == 4
    assert text.count("<polyline") >= 6
    assert text.index("id-2000") < text.index("id-1000")
    assert "never evicts" in text
    assert '<div id="trouble" role="alert"></div>' in text


def test_trouble_is_shown(dom):
    text = dom("there are no metrics")
    assert "No status: there are no metrics" in text
