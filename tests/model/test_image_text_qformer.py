"""The Q-Former with its text side: each task sees what BLIP-2's figure 2 lets it see, and the size is the published."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from mmlab.config.errors import ConfigError
from mmlab.model.config import QFormerConfig
from mmlab.model.image_text_qformer import QueryContrast, Words
from mmlab.model.qformer import QFormer
from tests.model import tiny
from tests.tiny_tokenizers import llama_3, wordpiece

IDS = torch.tensor([[1, 7, 8, 9, 2, 0], [1, 10, 11, 12, 13, 2], [1, 14, 2, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def model(tokenizer_folder):
    return tiny.image_text_qformer(tokenizer_folder)


@pytest.fixture(scope="module")
def features(model):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.vision(pixels)


def moved(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    return (~torch.isclose(before, after, atol=1e-5)).nonzero().tolist()


@torch.no_grad()
def test_a_text_s_similarity_hangs_on_that_text_and_a_picture_s_on_that_picture(model, features):
    before = model.similarities(features, IDS, MASK)
    ids, changed = IDS.clone(), features.clone()
    ids[1, 2] = 20
    assert moved(before, model.similarities(features, ids, MASK)) == [[0, 1], [1, 1], [2, 1]]
    changed[2] += 1 + torch.arange(5.0)[:, None]
    changed[2, :, :16] -= 3
    assert moved(before, model.similarities(changed, IDS, MASK)) == [[2, 0], [2, 1], [2, 2]]


@torch.no_grad()
def test_a_caption_s_words_follow_from_the_picture_and_the_words_before(model, features):
    before = model.captions(features, IDS, MASK)
    ids = IDS.clone()
    ids[1, 3] = 20
    places = {(row, place) for row, place, _ in moved(before, model.captions(features, ids, MASK))}
    assert places == {(1, 3), (1, 4), (1, 5)}
    ids[1] = IDS[1]
    ids[:, 0] = 30
    assert not moved(before, model.captions(features, ids, MASK)), "[DEC] stands in the first place"
    other = model.captions(features.flip(0), IDS, MASK)
    assert not torch.isclose(before[0], other[0], atol=1e-5).all(-1).any()


@torch.no_grad()
def test_a_match_follows_from_the_picture_and_every_word(model, features):
    before = model.matches(features, IDS, MASK)
    for place in range(5):
        ids = IDS.clone()
        ids[0, place] = 30
        assert {row for row, _ in moved(before, model.matches(features, ids, MASK))} == {0}
    ids = IDS.clone()
    ids[0, 5] = 30
    assert not moved(before, model.matches(features, ids, MASK)), "padding is not read"
    assert {row for row, _ in moved(before, model.matches(features.flip(0), IDS, MASK))} == {0, 2}


@torch.no_grad()
def test_the_best_query_speaks_for_the_picture():
    torch.manual_seed(0)
    contrast = QueryContrast(8, 4)
    queries, texts = torch.randn(2, 3, 8), torch.randn(2, 8)
    for i in range(2):
        for j in range(2):
            text = contrast.text(texts[j])
            best = max(float(F.cosine_similarity(contrast.picture(q), text, dim=0)) for q in queries[i])
            assert float(contrast(queries, texts)[i, j]) == pytest.approx(best / 0.07, rel=1e-4)


@torch.no_grad()
def test_similarities_are_float32_under_autocast():
    torch.manual_seed(0)
    contrast, queries, texts = QueryContrast(8, 4), torch.randn(2, 3, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = contrast(queries, texts)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@torch.no_grad()
def test_words_are_predicted_as_bert_does():
    config = BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2)
    head, words = BertOnlyMLMHead(config), Words(20, config)
    theirs = head.predictions
    words.transform[0].load_state_dict(theirs.transform.dense.state_dict())
    words.transform[2].load_state_dict(theirs.transform.LayerNorm.state_dict())
    words.tokens.weight.copy_(theirs.decoder.weight)
    words.bias.copy_(torch.randn(20))
    theirs.decoder.bias.copy_(words.bias)
    hidden = torch.randn(2, 3, 8)
    assert torch.allclose(words.predict(hidden), head(hidden), atol=1e-6)


@pytest.mark.parametrize(("fast", "begin", "end"), [(wordpiece, "[CLS]", "[SEP]"), (llama_3, None, None)])
def test_texts_begin_and_end_with_the_tokenizer_s_own_marks(tmp_path, fast, begin, end):
    tokenizer = fast()
    tokenizer.save_pretrained(tmp_path)
    model = tiny.image_text_qformer(tmp_path)
    expected = (begin or tokenizer.bos_token, end or tokenizer.eos_token)
    assert tuple(tokenizer.convert_ids_to_tokens(list(model.frame))) == expected
    assert model.decode == len(tokenizer) and model.words.tokens.num_embeddings == len(tokenizer) + 1


def test_a_tokenizer_without_marks_is_refused(tmp_path):
    fast = wordpiece()
    bare = fast.__class__(tokenizer_object=fast.backend_tokenizer, pad_token="[PAD]")
    bare.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokens that begin and end a text"):
        tiny.image_text_qformer(tmp_path)


def test_the_published_q_former_is_counted():
    """BLIP-2, section 3.1: "Q-Former contains 188M parameters", the queries among them: 187M within what is named.

    BERT-base, with a second feed-forward layer for the queries and cross-attention in every other layer; the count
    on the right follows from these sizes alone.
    """
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(), 1408, text=True)
        words = Words(30523, qformer.config)  # BERT's 30,522 and [DEC]
        heads = (QueryContrast(768, 256), torch.nn.Linear(768, 2))
    d, v, inner, norm = 768, 1408, 3072, 2 * 768
    square = d * d + d
    feed_forward = d * inner + inner + inner * d + d + norm
    layers = 12 * (4 * square + norm + 2 * feed_forward) + 6 * (2 * square + 2 * (v * d + d) + norm)
    text = 30523 * d + 512 * d + norm + square + norm + 30523
    rest = 32 * d + 2 * v + 2 * (d * 256 + 256) + 1 + 2 * d + 2
    count = sum(p.numel() for part in (qformer, words, *heads) for p in part.parameters())
    assert count == layers + text + rest
    assert abs(count - 188e6) < 0.01 * 188e6
