"""From COCO's files to a trained model, through the command line."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from mmlab import cli
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import ScriptedEndpoint

THINGS = ("cat", "dog", "cup", "bus", "kite", "sofa")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A user's folder: photos, their captions and boxes as in COCO, an example of each type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("photos").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(len(THINGS))]
    for i, image in enumerate(images):
        data = io.BytesIO()
        Image.new("RGB", (40, 20), (40 * i, 90, 160)).save(data, "PNG")
        Path("photos", image["file_name"]).write_bytes(data.getvalue())
    notes = [{"image_id": i, "category_id": i, "bbox": [4, 5, 20, 10]} for i in range(len(THINGS))]
    categories = [{"id": i, "name": name} for i, name in enumerate(THINGS)]
    instances = {"images": images, "categories": categories, "annotations": notes}
    Path("instances.json").write_text(json.dumps(instances))
    captions = [{"image_id": i, "caption": f"A {name} waits."} for i, name in enumerate(THINGS)]
    Path("captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for kind in RESPONSE_TYPES:
        Path("shots", kind).mkdir(parents=True)
        Path("shots", kind, "000_caps.txt").write_text("A hat.")
        Path("shots", kind, "000_conv.txt").write_text(answer(kind, "A hat."))
        Path("shots", kind, "system_message.txt").write_text(f"Look: {kind}.")
    return tmp_path


def answer(kind: str, caption: str) -> str:
    pair = f"Question:\nWhat is here?\n===\nAnswer:\n{caption}"
    return {"conversation": f"{pair}\n===\n{pair}", "detail_description": caption}.get(kind, pair)


def words(messages: list[dict[str, str]]) -> str:
    """The type of a question, from its example or prompt, and its caption."""
    prompt, example = messages[0]["content"], messages[2]["content"]
    kind = next(kind for kind in RESPONSE_TYPES if kind in prompt or answer(kind, "A hat.") == example)
    return f"{kind}\n{messages[-1]['content']}"


def mmlab(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


FILES = ("data.images=photos", "data.captions=captions.json", "data.instances=instances.json", "examples=shots")


def test_from_captions_and_boxes_to_a_finetuned_model(work, capsys):
    with ScriptedEndpoint(answer=lambda said: answer(*said.split("\n")[:2]), words=words) as server:
        llm = (f"llm.url={server.url}", "llm.model=m", "llm.prompt_price=1", "llm.completion_price=1")
        null = [f"prompts.{kind}=null" for kind in RESPONSE_TYPES[1:]]
        code, out, err = mmlab(capsys, "curate", "llava_instruct", "out=made", *FILES, *llm, *null)
        assert code == 0, err
        assert server.bodies[0]["max_tokens"] == 1024 and len(server.asked) == 18
        prompts = {body["messages"][0]["content"] for body in server.bodies}
        assert len(prompts) == 3 and {f"Look: {kind}." for kind in RESPONSE_TYPES[1:]} < prompts
        assert server.bodies[0]["messages"][-1]["content"].endswith(": [0.1, 0.25, 0.6, 0.75]")
        assert "written             18 dialogues, 18 of them to shards" in out and "cost" in out
        assert mmlab(capsys, "curate", "llava_instruct", "out=made", *FILES, *llm, *null)[1] == out
        assert len(server.asked) == 18
    index = ShardIndex.open("made/shards")
    assert [index.type_of(i) for i in range(18)] == list(RESPONSE_TYPES) * 6
    for command in (
        "shards build llava_json made/llava_instruct.json photos again --separate",
        "shards tokenizer made/shards --out made/tokenizer",
        "train experiment=llava/finetune_tiny data.root=made data.train=[{path:shards}] data.val=[] data.balance=type "
        "stage.init_from=[] data.global_batch=6 data.micro_batch=3 trainer.max_steps=2 trainer=cpu logger=none "
        "run.name=chat",
    ):
        code, _, err = mmlab(capsys, *command.split())
        assert code == 0, err
    again = ShardIndex.open("again")
    assert [again.type_of(i) for i in range(18)] == list(RESPONSE_TYPES) * 6
    report = json.loads(Path("runs/chat/data_report.json").read_text())["train"]
    assert report["types"] == {kind: {"seen": 4, "share": pytest.approx(1 / 3)} for kind in RESPONSE_TYPES}
    assert all(row["tokens_with_loss"] > 0 and not row["replaced_share"] for row in report["sources"].values())


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("llm.model=m",), 2, "Give data.path=… for shards, or data.captions=…"),
        (("llm.model=m", "data.path=x", *FILES), 2, "Give data.path=… for shards"),
        (("llm.model=m", "data.path=x", "data.images=photos"), 2, "Give data.path=… for shards"),
        (("llm.model=m", "data.images=photos"), 2, "Give data.path=… for shards"),
        (("llm.model=m", "data.path=nowhere"), 1, "there is no folder nowhere"),
        (
            ("llm.model=m", "data.captions=caption.json"),
            1,
            "there is no file caption.json. Did you mean 'captions.json'?",
        ),
        (("llm.model=m", "data.path=x", "samples.conversations=3"), 2, "Did you mean 'conversation'?"),
        (("llm.model=m", "data.path=x", "samples.conversation=-3"), 2, "samples.conversation"),
        (("llm.model=m", "data.path=x", "rules=[caption,captoin]"), 2, "There is no rule 'captoin'."),
        (
            ("llm.model=m", "data.path=x", "prompts.conversation=null"),
            2,
            "read from a folder with examples; set examples=…",
        ),
        (("llm.model=m", "data.path=x", "examples=shot"), 2, "there is no folder shot. Did you mean 'shots'?"),
        (("data.path=x",), 2, "'llm.model' has no value"),
        (("llm.model=m", "data.path=x", "llm.url=http://box/v1"), 2, "would be sent unencrypted to box"),
    ],
)
def test_errors_are_one_sentence(work, capsys, monkeypatch, argv, code, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    result, _, err = mmlab(capsys, "curate", "llava_instruct", "out=x", *argv)
    assert result == code and message in err and err.count("\n") == 1, err


def test_help(capsys):
    code, out, _ = mmlab(capsys, "curate", "llava_instruct", "--help", "keys")
    assert code == 0 and "\nexamples:" in out and "detail_description: 23000" in out
