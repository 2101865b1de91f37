#!/usr/bin/env bash
# Your own data, from LLaVA's JSON to an exported model: experiments/own_data/run.sh DATA OUT
# DATA holds images/, train.json and test.json, and is drawn if it does not exist; all other output goes to OUT. The last
# line holds the results as one JSON object.
set -euo pipefail
source "$(dirname "$0")/../begin.sh"

[ -f "$data/train.json" ] || "$python" "$here/draw.py" "$data"
"$mmlab" shards build llava_json "$data/train.json" "$data/images" data/mine --captions from-first-answer \
    --split val=0.05 --overwrite
"$mmlab" shards build llava_json "$data/test.json" "$data/images" data/mine/test --captions from-first-answer --overwrite
"$mmlab" init mydata data/mine --overwrite | tee commands.txt
# As printed, with a vocabulary that fits the data; the line is quoted for a shell.
tokenizer=$(grep -m 1 '^mmlab shards tokenizer ' commands.txt)
eval "\"\$mmlab\" ${tokenizer#mmlab }"

for page in language align finetune; do
    [ ! -f "conf/experiment/mydata/$page.yaml" ] || "$mmlab" train experiment=mydata/$page
done

"$mmlab" eval run=mydata/finetune data.path=data/mine/test data.train_from=data/mine/train blind=null out=eval batch_size=256
"$mmlab" export run=mydata/finetune to=transformers out=exported
"$python" "$here/answer.py" exported "$data/test.json" "$data/images"

"$python" "$here/figures.py" eval $((SECONDS - start))
