"""A scripted language model behind OpenAI's chat-completions protocol on loopback: endpoint.py URL_FILE LOG.

It sees no image and uses only the context that it receives: it counts the boxes, says on which side they lie, and
repeats captions. A hash of the question selects its behavior: most questions get a good reply, others a bad one (no
dialogue, a mention of the caption, coordinates, half a reply), a late one, one after a fault, or none. LOG gets one
line per request.
"""

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_BOX = re.compile(r"(.+): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]")
# Per hundred questions; the rest get a good reply.
ACTS = {
    **{"prose": 3, "no answer": 2, "names the caption": 4, "gives coordinates": 2, "half": 2},
    **{"late": 5, "500 first": 4, "429 first": 2, "garbage first": 2, "never": 1, "400": 1},
}
FIRST = {"500 first": 500, "429 first": 429}
LATE, NEVER = 1.5, 30.0  # seconds


def question_of(messages: list[dict[str, str]]) -> tuple[str, str]:
    """The response type, recognized by words of its prompt, and the context."""
    prompt = messages[0]["content"]
    kind = "detail_description" if "Describe the photo" in prompt else "conversation"
    return "complex_reasoning" if "takes thought" in prompt else kind, messages[-1]["content"]


def act_of(question: str) -> str:
    """What happens to a question; deterministic."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100
    for act, count in ACTS.items():
        place -= count
        if place < 0:
            return act
    return "well"


def told(context: str) -> tuple[list[str], list[tuple[str, float]]]:
    """The captions of a context, and each object with the horizontal center of its box."""
    captions, objects = [], []
    for line in context.splitlines():
        if box := _BOX.fullmatch(line):
            objects.append((box[1], (float(box[2]) + float(box[4])) / 2))
        elif line.strip():
            captions.append(line.strip().rstrip(".") + ".")
    return captions, objects


def counted(objects: list[tuple[str, float]]) -> str:
    """ "two persons and a dog" """
    numbers = ("no", "one", "two", "three", "four", "five", "six")
    parts = [
        f"{numbers[n] if n < len(numbers) else n} {name}{'' if n == 1 else 's'}"
        for name, n in sorted(Counter(name for name, _ in objects).items())
    ]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def side(place: float) -> str:
    return "on the left" if place < 1 / 3 else "in the middle" if place < 2 / 3 else "on the right"


def reply(kind: str, context: str) -> str:
    """A reply of the form asked for."""
    captions, objects = told(context)
    scene = captions[0] if captions else f"One sees {counted(objects)}."
    main = objects[0] if objects else None
    if kind == "detail_description":
        places = " ".join(f"A {name} is {side(at)}." for name, at in dict(objects[:6]).items())
        return f"{scene}\n\n{places}".strip()
    pairs = [("What is the main thing to be seen here?", scene)]
    if kind == "complex_reasoning":
        thing = main[0] if main else "scene"
        pairs = [
            (
                "What might somebody here have to watch out for, and why?",
                f"{scene} Where there is a {thing}, one has to leave room for it, because it may move or be moved. So "
                "it is wise to look first, and to walk around it slowly.",
            )
        ]
    elif main:
        pairs += [
            (
                f"How many things of the kind {main[0]} are there?",
                f"There are {counted([o for o in objects if o[0] == main[0]])}.",
            ),
            (f"Where is the {main[0]}?", f"It is {side(main[1])}."),
        ]
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


def bad(act: str, kind: str, context: str) -> str:
    good = reply(kind, context)
    if act == "prose":
        return f"Here is what I think of it.\n{good}" if kind != "detail_description" else f"Answer:\n{good}"
    if act == "no answer":
        return good.rpartition("===")[0] if kind != "detail_description" else "?"
    added = " The caption says so." if act == "names the caption" else " Its place is [0.12, 0.3, 0.5, 0.9]."
    return good + added


class Handler(BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, context = question_of(body["messages"])
        question = f"{kind}\n{context}"
        with self.lock:
            first = not self.asked[question]
            self.asked[question] += 1
        act = act_of(question)
        paid = act != "400" and act != "never" and not (act.endswith(" first") and first)
        with self.lock, open(sys.argv[2], "a", encoding="utf-8") as log:
            log.write(json.dumps({"question": question, "act": act, "paid": paid}) + "\n")
        if act == "never":
            time.sleep(NEVER)
            return
        if act == "400":
            return self.say(400, json.dumps({"error": {"message": "this text is not answered"}}))
        if act.endswith(" first") and first:
            return self.say(FIRST.get(act, 200), "<html>busy</html>")
        time.sleep(LATE if act == "late" else 0.02)
        text = bad(act, kind, context) if act in tuple(ACTS)[:4] else reply(kind, context)
        text, end = (text[: len(text) // 2], "length") if act == "half" else (text, "stop")
        usage = {
            "prompt_tokens": sum(len(message["content"].split()) for message in body["messages"]),
            "completion_tokens": len(text.split()),
        }
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end}
        self.say(200, json.dumps({"model": body["model"], "choices": [choice], "usage": usage}))

    def say(self, status: int, text: str) -> None:
        data = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client was killed or timed out

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Path(sys.argv[1]).write_text(f"http://127.0.0.1:{server.server_port}/v1")
    server.serve_forever()
