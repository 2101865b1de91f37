"""Write questions of shards twice: as a task of lmms-eval, and as LLaVA's JSON, which `mmlab shards build` reads.

python make_task.py SHARD.tar OUT COUNT
"""

import json
import sys
import tarfile
from pathlib import Path

TASK = """task: own_questions
dataset_path: imagefolder
dataset_kwargs: {{data_files: {{test: {pictures}/**}}}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
metadata: {{version: 1}}
"""


def main(shard: str, out: str, count: str) -> None:
    task, pictures = Path(out, "task"), Path(out, "pictures").resolve()
    for folder in (task, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    rows, talks = [], []
    with tarfile.open(shard) as tar:
        for n, member in enumerate([one for one in tar.getmembers() if one.name.endswith(".json")][: int(count)]):
            record = json.load(tar.extractfile(member))  # type: ignore[arg-type]
            name = member.name.replace(".json", ".png")
            (pictures / name).write_bytes(tar.extractfile(name).read())  # type: ignore[union-attr]
            one = record["questions"][n % len(record["questions"])]
            rows.append({"file_name": name, "question": one["question"], "answer": one["answer"]})
            turns = [{"from": "human", "value": f"<image>\n{one['question']}"}, {"from": "gpt", "value": one["answer"]}]
            talks.append({"id": Path(name).stem, "image": name, "conversations": turns})
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "own_questions.yaml").write_text(TASK.format(pictures=pictures))
    Path(out, "questions.json").write_text(json.dumps(talks))


if __name__ == "__main__":
    main(*sys.argv[1:])
