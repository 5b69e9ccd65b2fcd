"""A local server with OpenAI's interface that fails as real ones do."""

import contextlib
import http.server
import json
import random
import socket
import struct
import threading
import time

FAULTS = ("429", "500", "reset", "malformed", "cut", "silent")


class Server(http.server.ThreadingHTTPServer):
  """Answers with texts that tell prompt, seed and place; keeps what it was asked and answered.

  Args:
    fault_share: share of calls that end in one of `faults`.
    faults: kinds, drawn in turn at random.
    silence: seconds that a silent call takes.
    delay: seconds that a good call takes.
    change: prompt, a choice of the answer -> what is sent in its place.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, fault_share=0.0, faults=FAULTS, silence=1.0, delay=0.0, change=None):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.fault_share, self.faults, self.silence, self.delay = fault_share, faults, silence, delay
    self.change = change or (lambda prompt, choice: choice)
    self.random, self.lock = random.Random(0), threading.Lock()
    self.bodies, self.answered, self.headers, self.failures = [], [], [], []
    self.running, self.most_running = 0, 0
    self.url = f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, request, client_address):
    """Says nothing: broken connections are what it is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments):
    pass

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with server.lock:
      server.bodies.append((self.path, body))
      server.headers.append(dict(self.headers))
      fault = server.random.choice(server.faults) if server.random.random() < server.fault_share else None
      if fault:
        server.failures.append(fault)
      server.running += 1
      server.most_running = max(server.most_running, server.running)
    time.sleep(server.silence if fault == "silent" else server.delay)
    # Before the answer leaves: whoever has it may ask again at once.
    with server.lock:
      server.running -= 1
    self.answer(body, fault)

  def answer(self, body, fault):
    server = self.server
    if fault == "reset":
      # Closing with linger 0 sends RST.
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      self.close_connection = True
      self.connection.close()
      return
    if fault in ("429", "500", "401", "302"):
      status = int(fault)
      extra = {"429": [("Retry-After", "0.02")], "302": [("Location", "/elsewhere")]}.get(fault, [])
      told = "bad key: " + self.headers.get("Authorization", "")
      return self.send(status, json.dumps({"error": told}).encode(), extra)
    count = body["n"] - 1 if fault == "few" else body["n"]
    raw = json.dumps(self.choices(body, count)).encode()
    if fault == "malformed":
      raw = raw[: len(raw) // 2]
    if fault is None:
      with server.lock:
        server.answered.append(body)
    self.send(200, raw, claimed=len(raw) + 10 if fault == "cut" else None)

  def choices(self, body, count):
    is_chat = self.path.endswith("chat/completions")
    prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
    found = []
    for place in range(count):
      text = f"{prompt}|{body['seed']}|{place}"
      choice = {"index": place, "finish_reason": "stop"}
      choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
      if body.get("logprobs") is not None:
        pieces, values = ["a", "b"], [-0.5, -1.5]
        content = [{"token": piece, "logprob": value} for piece, value in zip(pieces, values)]
        choice["logprobs"] = {"content": content} if is_chat else {"tokens": pieces, "token_logprobs": values}
      found.append(self.server.change(prompt, choice))
    usage = {"prompt_tokens": 7, "completion_tokens": 3 * count}
    # Texts may come in any order.
    return {"model": "served", "choices": found[::-1], "usage": usage}

  def send(self, status, raw, extra=(), claimed=None):
    with contextlib.suppress(OSError):
      self.send_response(status)
      for name, value in extra:
        self.send_header(name, value)
      self.send_header("Content-Length", str(claimed or len(raw)))
      self.end_headers()
      self.wfile.write(raw)
      self.close_connection = claimed is not None


@contextlib.contextmanager
def serving(**settings):
  """Runs a server in a thread."""
  server = Server(**settings)
  thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
