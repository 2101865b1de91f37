"""A scripted language model behind OpenAI's chat-completions protocol on loopback: endpoint.py URL_FILE.

It drops repeated sentences, and turns a fragment that names one color and one shape into a sentence. It does not know
the image, so factual errors in a description remain.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mmlab.data.sources.easy_vqa import COLORS, SHAPES

_SENTENCE = re.compile(r"[^.!?]+[.!?]?")


def mend(text: str) -> str:
    """The complete sentences of a text, each once; an unambiguous fragment becomes a sentence."""
    kept: list[str] = []
    for piece in _SENTENCE.findall(text.replace("#", " ").replace("\n", " ")):
        words = re.findall(r"\w+", piece)
        sentence = piece.strip()
        if not sentence.endswith((".", "!", "?")) or not sentence[0].isupper() or len(words) < 3:
            named = [{word for word in words if word in known} for known in (COLORS, SHAPES)]
            if any(len(found) != 1 for found in named):
                continue
            sentence = f"The image shows a {' '.join(found.pop() for found in named)}."
        if sentence not in kept:
            kept.append(sentence)
    return " ".join(kept) or text.strip()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text = mend(prompt.partition("\n\n")[2])
        answer = {
            "model": body["model"],
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())},
        }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(sys.argv[1]).write_text(f"http://127.0.0.1:{server.server_port}/v1")
    server.serve_forever()
