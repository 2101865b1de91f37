import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.sources import image_folder
from mmlab.verbs.shards import main
from tests.tiny_files import png, write_tar


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["build", "shapes", "drawn", "--count", "12", "--size", "32", "--shard-samples", "5"]) == 0
    return tmp_path / "drawn"


def test_build_verify_stats_show_tokenizer(drawn, capsys):
    assert main(["verify", "drawn"]) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    assert main(["index", "drawn", "--require", "json", "--require", "jpg|png"]) == 0
    capsys.readouterr()
    assert main(["stats", "drawn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 12
    assert main(["stats", "drawn"]) == 0
    assert "min 32" in capsys.readouterr().out
    assert main(["show", "drawn", "--out", "sheet.png", "-n", "6"]) == 0
    assert Image.open("sheet.png").width > 500
    assert main(["tokenizer", "drawn", "drawn", "--out", "tok", "--vocab-size", "300", "--text", "USER:"]) == 0
    assert os.path.exists("tok/tokenizer.json")


def test_show_samples_as_a_recipe_trains_on_them(drawn, capsys):
    assert main(["tokenizer", "drawn", "--out", "tok", "--vocab-size", "300"]) == 0
    recipe = ["experiment=llava/finetune_tiny", "model/vision=siglip_tiny", "model.language.tokenizer=tok"]
    recipe += ["stage.prompt.turns=conversations"]
    capsys.readouterr()
    assert main(["show", "drawn", *recipe, "--key", "train-0000003", "--out", "one.png"]) == 0
    printed = capsys.readouterr().out
    assert "sample train-0000003 (image 64 × 64)" in printed and "<image: 64 tokens>" in printed
    assert re.search("ASSISTANT:⟦ [a-z0-9]+</s>⟧", printed) and "cut off: ⟪…⟫" in printed
    assert "as llava/finetune_tiny trains on them" in printed and Image.open("one.png").width > 1000
    anyres = [*recipe, "model=llava_next", "data.aspect=anyres", "data.max_length=1024"]
    assert main(["stats", "drawn", *anyres]) == 0
    assert re.search(r"image tokens +min 136  median 136  95 % 136  max 136", capsys.readouterr().out)
    for command, message in {
        "stats drawn experiment=llava/language_tiny model.language.tokenizer=tok": "neither tokens nor buckets",
        "show drawn --key x": "--key shows a sample as a recipe trains on it",
        "show drawn experiment=llava/finetne_tiny": "Did you mean 'llava/finetune_tiny'?",
        "show drawn experiment=llava/finetune_tiny": "tokenizer of model.language is not on this machine",
        f"show drawn {' '.join(recipe)} --key train-000003": "has no sample 'train-000003'. Did you mean 'train-0000",
    }.items():
        assert main(command.split()) == 2
        assert message in capsys.readouterr().err


def test_overwrite(drawn, capsys):
    assert main(["build", "shapes", "drawn", "--count", "3"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["build", "shapes", "drawn", "--count", "3", "--overwrite"]) == 0


def test_foreign_formats(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.makedirs("pictures")
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    (tmp_path / "pictures" / "a.txt").write_text("a red thing")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    (tmp_path / "t.csv").write_text("image,caption\na.png,red\nb.png,blue\n")
    assert main(["build", "captions", "pictures", "out/side"]) == 0
    assert main(["build", "captions", "pictures", "out/table", "--captions", "t.csv", "--missing-budget", "0.5"]) == 0
    assert "missing 1" in capsys.readouterr().out
    assert main(["build", "llava_json", "chat.json", "pictures", "out/chat"]) == 0
    assert main(["build", "captions", "pictures", "out/strict", "--captions", "t.csv"]) == 1
    assert sorted(os.listdir("out")) == ["chat", "side", "table"]


def test_splits_limits_and_a_build_that_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.makedirs("pictures/red")
    for n in range(30):
        (tmp_path / "pictures" / "red" / f"{n:02d}.png").write_bytes(png(n + 1))
    build = ["build", "images", "pictures", "out", "--split", "val=0.3", "--limit", "20", "--shard-samples", "4"]
    convert = image_folder.check_sample
    with monkeypatch.context() as context:
        seen = []

        def stop(record, *rest):
            seen.append(record)
            if len(seen) == 15:
                raise KeyboardInterrupt
            return convert(record, *rest)

        context.setattr(image_folder, "check_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            main([*build, "--workers", "1"])
    assert os.listdir() == ["pictures", "out.building"] or sorted(os.listdir()) == ["out.building", "pictures"]
    capsys.readouterr()
    assert main([*build, "--workers", "3"]) == 0
    printed = capsys.readouterr()
    assert "continuing a build that was stopped after 1" in printed.err
    assert "rows 20 = written 20 + left out 0" in printed.out and "out/val: " in printed.out
    build[3] = "again"
    assert main(build) == 0
    for name in ("train", "val"):
        assert ShardIndex.open(f"out/{name}").hash == ShardIndex.open(f"again/{name}").hash
    assert len(ShardIndex.open("out/train")) + len(ShardIndex.open("out/val")) == 20
    assert sorted(os.listdir()) == ["again", "out", "pictures"]


def test_made_dialogues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build = ["build", "instructions", "--count", "6", "--size", "32"]
    assert main([*build, "three", "--kinds", "circle", "star"]) == 0
    assert main([*build, "one", "--types", "conversation", "--split", "val"]) == 0
    assert "one: 6 samples" in capsys.readouterr().out
    types = {name: ShardIndex.open(name).type_names for name in ("three", "one")}
    assert types == {"three": ("complex_reasoning", "conversation", "detail_description"), "one": ("conversation",)}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "--help"),
        ("bild", "Did you mean 'build'?"),
        ("build shaps out", "Did you mean 'shapes'?"),
        ("build shapes out --cuont 3", "Did you mean '--count'?"),
        ("build shapes out --count many", "invalid int value: 'many'"),
        ("build shapes out --max-objects 9", "max_objects <= 4"),
        ("build shapes out --types colour", "Did you mean 'color'?"),
        ("build easy_vqa drawn out --split tset", "Did you mean 'test'?"),
        ("build instructions out --types conversatoin", "Did you mean 'conversation'?"),
        ("stats drwan", "Did you mean 'drawn'?"),
        ("index pipe:touch", "'pipe:touch' is neither a folder nor an address such as s3://bucket/laion; commands"),
        ("show drawn --out nowhere/x.png", "existing folder"),
        ("index drawn --workers 0", "--workers: it must be a whole number of at least 1, not 0"),
        ("verify drawn --workers -1", "--workers: it must be a whole number of at least 1, not -1"),
        ("show drawn -n 0", "argument -n: it must be a whole number of at least 1, not 0"),
        ("show drawn --columns 0", "--columns: it must be a whole number of at least 1, not 0"),
        ("tokenizer drawn --out tok --vocab-size 3", "at least 259"),
        ("tokenizer drawn --out s3://b/tok", "s3://b/tok is an address; give a local folder."),
        ("build images s3://b/pictures out", "s3://b/pictures is an address; give a local folder."),
        ("build images drawn out --split val", "it is a name and a share between 0 and 1, such as val=0.05, not val"),
        ("build images drawn out --split val=1.5", "such as val=0.05, not val=1.5"),
        ("build images drawn out --split val=.1 --split val=.2", "--split gives 'val' two shares"),
        ("build images drawn out --split train=.1", "the split 'train' is what the others leave"),
        ("build images drawn out --limit 0", "--limit: it must be a whole number of at least 1, not 0"),
        ("build tars drawn out --members input.jpg", "such as image=input.jpg,text=output.txt, not input.jpg"),
        ("build tars drawn out --members imgae=jpg", "Did you mean 'image'? Options: image, text, json, class;"),
        ("build llava_json drawn/shard-000000.tar drawn out --captions frm", "there is no file frm"),
        ("build images drawn out --missing-budget nan", "--missing-budget: it must be a share from 0 to 1, not nan"),
        ("build images drawn/shard-000000.tar out", "drawn/shard-000000.tar is a file; give a folder."),
        ("build llava_json drawn drawn out", "drawn is a folder; give a file, such as shard-000000.tar, shard-0"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(drawn, capsys, command, message):
    capsys.readouterr()
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err and "Traceback" not in printed.err


def test_bad_data_is_one_sentence_and_exit_code_1(drawn, capsys):
    path = drawn / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    write_tar(drawn.parent / "evil" / "0.tar", ("a.pyd", b"x"))
    commands = {
        "verify drawn": "shard-000001.tar",
        "index evil": "hold no samples, only .pyd (1)",
        "stats evil": "mmlab shards index",
        "build easy_vqa evil out": "no easy-VQA",
    }
    for command, message in commands.items():
        capsys.readouterr()
        assert main(command.split()) == 1, command
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("command", [["--help"], ["build", "shapes", "--help"]])
def test_help_is_quick(command, capsys):
    assert main(command) == 0
    assert "usage: mmlab shards" in capsys.readouterr().out
    script = f"import sys; from mmlab.verbs.shards import main; main({command}); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)
