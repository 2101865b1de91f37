"""`mmlab score` as a user types it."""

import json

import pytest

from mmlab import cli
from mmlab.evaluate.scores.score_table import show, table
from tests.curate.scripted_endpoint import ScriptedEndpoint
from tests.tiny_problems import problem, write_problems


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = {
        "1": problem(image="image.png"),
        "2": problem(hint="A window.", subject="social science", grade="grade7"),
        "3": problem(split="val"),
        "4": problem(subject="language science", answer=0),
    }
    write_problems(tmp_path / "sqa", problems)
    outputs = {"1": "See. The answer is B.", "2": "I cannot tell.", "9": "B"}
    (tmp_path / "out.json").write_text(json.dumps({"outputs": outputs, "results": {"1": 1, "2": 0}}))
    return tmp_path


@pytest.fixture
def mmlab(work, capsys):
    def run(command: str, code: int = 0) -> str:
        assert cli.main(command.split()) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


def test_recorded_outputs_of_scienceqa(mmlab, work):
    files = "references=sqa/problems.json splits=sqa/pid_splits.json"
    out = mmlab(f"score scienceqa predictions=out.json {files} split=test out=scores")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:10]}
    assert list(rows) == ["all", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"]
    assert rows["all"] == ["3", "33.33%", "1", "1", "1", "66.67%"] and rows["IMG"][:5] == [
        "1",
        "100.00%",
        "1",
        "0",
        "0",
    ]
    assert "1 of 3 questions have no prediction" in out and "1 predictions belong to none of the questions" in out
    assert "recorded indices: 2 compared, 1 differ, 0 with a letter" in out
    scores = json.loads((work / "scores" / "scores.json").read_text())
    assert (scores["accuracy"], scores["failed"], scores["missing"]) == (pytest.approx(1 / 3), 1, 1)
    assert scores["recorded"] == {"compared": 2, "differ": 1, "differ_with_letter": 0}
    results = json.loads((work / "scores" / "results.json").read_text())
    assert results["results"] == {"1": 1, "2": -1, "4": -1} and results["count"] == 3
    lines = [json.loads(line) for line in (work / "scores" / "scored.jsonl").read_text().splitlines()]
    assert lines[0] == {"key": "1", "prediction": "See. The answer is B.", "answers": ["B"], "score": 1.0}
    # What it wrote is what it reads, and it then agrees with itself.
    again = mmlab("score scienceqa predictions=scores/results.json references=sqa")
    assert "recorded indices: 3 compared, 0 differ" in again


def test_another_metric(mmlab, work):
    (work / "answers.jsonl").write_text('{"question_id": 1, "text": "Yes"}\n{"question_id": 2, "text": "No"}\n')
    (work / "coco_pope_random.json").write_text(
        '{"question_id": 1, "label": "yes"}\n{"question_id": 2, "label": "yes"}\n'
    )
    out = mmlab("score metric=pope predictions=answers.jsonl references=coco_pope_random.json")
    head, first, second, varied = (line.split() for line in out.splitlines())
    assert head == ["questions", "accuracy", "precision", "recall", "f1", "yes", "share", "neither", "constant"]
    assert first == ["all", "2", "50.00%", "100.00%", "50.00%", "66.67%", "50.00%", "0", "100.00%"]
    assert second[0] == "random" and " ".join(varied) == "2 distinct replies to 2 questions; 50.0% are 'Yes'"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("score sciencqa predictions=out.json references=sqa", 2, "Did you mean 'scienceqa'?"),
        ("score scienceqa references=sqa", 2, "'predictions' has no value"),
        ("score scienceqa predictions=ot.json references=sqa", 1, "Did you mean 'out.json'?"),
        ("score scienceqa predictions=sqa references=sqa", 1, "sqa has no <task>.txt files"),
        ("score scienceqa predictions=out.json references=sqa out=out.json", 2, "give a folder as out=…"),
        ("score scienceqa predictions=out.json references=sqa split=vall", 1, "Did you mean 'val'?"),
        ("score scienceqa predictions=out.json references=sqa split=val", 1, "no prediction has the id of a question"),
        ("score vqa predictions=out.json references=sqa/problems.json splits=x", 2, "metric=vqa has no splits"),
        ("score vqa predictions=out.json references=sqa/problems.json", 1, "does not have the format"),
    ],
)
def test_mistakes_are_one_sentence(mmlab, command, code, message):
    err = mmlab(command, code)
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_judge_marks_answers_once(mmlab, work):
    questions = [{"question_id": n, "image": "a.jpg", "text": f"why {n}?", "category": "conv"} for n in range(4)]
    lines = {"q": questions, "c": [{"image": "a.jpg", "caption": "A dog."}]}
    lines |= {name: [{"question_id": n, "text": f"{name} {n}"} for n in range(4)] for name in ("base", "said")}
    for name, rows in lines.items():
        (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = (
        "score llava_bench questions=q.jsonl contexts=c.jsonl baseline=base.jsonl predictions=said.jsonl out=bench"
    )

    def answers(prompt: str) -> str:
        return "I will not mark this." if "why 1?" in prompt else "8 6\nThe first is better."

    script = {"why 2?": ("503",), "why 3?": ("503", "ok")}  # never, late

    def acts(prompt: str, attempt: int) -> str:
        turns = next((turns for text, turns in script.items() if text in prompt), ("ok",))
        return turns[min(attempt, len(turns) - 1)]

    with ScriptedEndpoint(acts, answer=answers) as endpoint:
        llm = f"llm.url={endpoint.url} llm.model=judge llm.variable=null llm.backoff=0 llm.attempts=2"
        out = mmlab(f"{command} {llm}")
        rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:3]}
        assert rows["all"] == rows["conv"] == ["4", "75.000", "6.000", "8.000", "2"]
        assert "1 questions got no reply" in out
        script.clear()
        again = mmlab(f"{command} {llm}")
        assert again.splitlines()[1].split()[1:] == ["4", "75.000", "6.000", "8.000", "1"]
        assert sorted(endpoint.paid.values()) == [1, 1, 1, 1], "each reply is billed once"
    rows = [json.loads(line) for line in (work / "bench" / "marks.jsonl").read_text().splitlines()]
    assert [row["marks"] for row in rows] == [[8, 6], None, [8, 6], [8, 6]]
    assert rows[1]["review"] == "I will not mark this." and all(row["fault"] == "" for row in rows)
    scores = json.loads((work / "bench" / "scores.json").read_text())
    assert (scores["metric"], scores["judge"], scores["unanswered"]) == ("llava_bench", "judge", 0)
    with ScriptedEndpoint(lambda prompt, _: "cut" if "why 1?" in prompt else "ok", answer=answers) as endpoint:
        llm = f"llm.url={endpoint.url} llm.model=judge llm.variable=null"
        for _ in range(2):
            out = mmlab(f"{command.replace('bench', 'cut').replace('llava_cut', 'llava_bench')} {llm}")
            assert "1 replies were cut off" in out and "got no reply" not in out and len(endpoint.asked) == 4

    with ScriptedEndpoint(lambda *_: "503", answer=answers) as endpoint:
        lines["q"] = [{**questions[0], "question_id": n} for n in range(40)]
        for name in ("q", "base", "said"):
            rows = lines["q"] if name == "q" else [{"question_id": n, "text": f"{name} {n}"} for n in range(40)]
            (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        llm = f"llm.url={endpoint.url} llm.model=judge llm.variable=null llm.backoff=0 llm.attempts=1 llm.workers=2"
        assert "5 requests in a row failed" in mmlab(f"{command.replace('out=bench', 'out=down')} {llm}", 1)
        assert len(endpoint.asked) < 20, "a judge that is down does not get forty requests"


def test_numbers_in_a_table():
    assert [show("accuracy", 0.9092), show("correct", 3855), show("cider_d", 1.2345), show("f1", None)] == [
        "90.92%",
        "3,855",
        "1.234",
        "-",
    ]
    blind = {"accuracy": 0.25, "questions": 2, "types": {"a": {"accuracy": 0.0, "questions": 1}}}
    scores = {"accuracy": 0.5, "questions": 2, "types": {"a": {"accuracy": 1.0, "questions": 1}}, "blind": blind}
    assert [line.split() for line in table(scores).splitlines()] == [
        ["questions", "accuracy", "blind"],
        ["all", "2", "50.00%", "25.00%"],
        ["a", "1", "100.00%", "0.00%"],
    ]
