"""Stands in for a vLLM server: `python fake_vllm_server.py PORT [MODE]`. Answers /health, and nothing else."""

import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


port, mode = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "serves"
if mode == "dies":
    raise SystemExit("RuntimeError: CUDA out of memory")
if mode == "hangs":
    signal.pause()
if mode == "leaves a worker":
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    print("worker", worker.pid, flush=True)
HTTPServer(("127.0.0.1", port), Health).serve_forever()
