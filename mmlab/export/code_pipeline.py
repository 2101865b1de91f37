"""Images from an exported prior over codes. The exported file needs only torch, diffusers and transformers.

    from loader import Pipeline
    images = Pipeline("folder")(["cat", "dog"], guidance=2, top_k=100, seed=0)

`first_stage` is diffusers' VQModel; `prior` is transformers' GPT2LMHeadModel over the codes 0 … K - 1 and further
tokens, which come before an image's codes; `card.json` gives the first of these tokens. Texts become the hidden states
of `text_encoder`, through the linear layer in `context.safetensors`.

Legend: B images, P tokens in front, K codes, V tokens of the vocabulary.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from mmlab.class_names import class_index

NO_CODE: dict[str, Any] = {"trust_remote_code": False}


class Pipeline:
    """Generates images.

    Args:
        folder: written by `mmlab export`.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        self.first_stage: Any = VQModel.from_pretrained(str(folder / "first_stage")).eval()
        self.prior: Any = GPT2LMHeadModel.from_pretrained(folder / "prior").eval()
        self.map_stage: Any = None
        if (folder / "map_stage").is_dir():
            self.map_stage = VQModel.from_pretrained(str(folder / "map_stage")).eval()
        if (folder / "text_encoder").is_dir():
            from safetensors.torch import load_file
            from transformers import AutoModelForTextEncoding, AutoTokenizer

            self.text_encoder: Any = AutoModelForTextEncoding.from_pretrained(folder / "text_encoder", **NO_CODE).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "text_encoder", **NO_CODE)
            self.context = load_file(folder / "context.safetensors")

    @torch.no_grad()
    def __call__(
        self, conditions: Sequence[Any] | Tensor | None = None, count: int = 1, **settings: Any
    ) -> list[Image.Image]:
        """Generate images; arguments as for `codes`."""
        codes = self.codes(conditions, count, **settings)
        vectors = self.first_stage.quantize.embedding(codes).permute(0, 3, 1, 2)
        pixels = self.first_stage.decode(vectors, force_not_quantize=True).sample
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]

    @torch.no_grad()
    def codes(
        self,
        conditions: Sequence[Any] | Tensor | None = None,
        count: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> Tensor:
        """Sample the codes of images, int64 `[B, side, side]`.

        Args:
            conditions: for each image its class (name or number), its text, or its map (`[B, 3, S, S]` in [-1, 1]);
                None for an unconditional model.
            count: number of images of an unconditional model.
            seed: of all images together.
            **settings: in place of the run's own, which are `sampler` in the card: `guidance` (1 is the conditional
                model), `temperature` (0 takes the likeliest codes), `top_k` (sample among the k likeliest codes) and
                `top_p` (among the likeliest codes that together reach this probability).
        """
        if unknown := settings.keys() - self.card["sampler"].keys():
            raise TypeError(f"There is no setting {min(unknown)}; the settings are {', '.join(self.card['sampler'])}.")
        chosen = {**self.card["sampler"], **settings}
        guidance = chosen["guidance"]
        side, book = self.card["side"], self.card["codes"]
        batch = count if conditions is None else len(conditions)
        front, mask = self.front(conditions, batch, null=False)
        if guidance != 1:
            null_front, null_mask = self.front(conditions, batch, null=True)
            front = torch.cat([front, null_front])
            mask = None if mask is None or null_mask is None else torch.cat([mask, null_mask])
        drawn = torch.Generator().manual_seed(seed)
        codes, past, tokens = [], None, {"inputs_embeds": front}
        for n in range(side * side):
            start = 0 if n == 0 else front.shape[1] + n - 1
            positions = torch.arange(start, front.shape[1] + n)[None]
            seen = None if mask is None else F.pad(mask, (0, n), value=1)
            cache: dict[str, Any] = {"past_key_values": past, "use_cache": True}
            out = self.prior(**tokens, position_ids=positions, attention_mask=seen, **cache)
            past, logits = out.past_key_values, out.logits[:, -1, :book]
            if guidance != 1:
                conditional, null = logits.chunk(2)
                logits = null + guidance * (conditional - null)
            code = _choose(logits, chosen["temperature"], chosen["top_k"], chosen["top_p"], drawn)
            codes.append(code)
            tokens = {"input_ids": (torch.cat([code, code]) if guidance != 1 else code)[:, None]}
        return torch.stack(codes, 1).view(batch, side, side)

    def front(self, conditions: Any, batch: int, null: bool) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings in front of images, `[B, P, D]`, and a mask `[B, P]` if padding is hidden.

        Args:
            conditions: see `codes`.
            batch: B.
            null: return those of a dropped condition.
        """
        embed, first = self.prior.transformer.wte, self.card["first_token"]
        reads = self.card["reads"]
        if reads == "class":
            names, nothing = self.card["classes"], len(self.card["classes"])
            if conditions is None:
                raise ValueError(f"This model needs a class for each image, one of {', '.join(names)}.")
            classes = conditions.tolist() if isinstance(conditions, Tensor) else conditions
            numbers = [nothing if null else class_index(one, names) for one in classes]
            rows = torch.tensor(numbers)[:, None] + first
            return embed(rows if self.card["start"] is None else self._with_start(rows)), None
        if reads == "map":
            quantized = self.map_stage.quantize(self.map_stage.encode(conditions).latents)
            rows = quantized[2][2].view(batch, -1) + first
            rows = torch.full_like(rows, first + self.map_stage.config["num_vq_embeddings"]) if null else rows
            return embed(self._with_start(rows)), None
        start = embed(torch.full((batch, 1), self.card["start"]))
        if reads != "text":
            return start, None
        length = self.card["max_length"]
        texts = [""] * batch if null else list(conditions)
        rows = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for text in texts:
            if len(self.tokenizer(text, verbose=False)["input_ids"]) > length:
                warnings.warn(f"Only the first {length} tokens are read of the text {text!r}.", stacklevel=2)
        hide = {"attention_mask": rows["attention_mask"]} if self.card["hide_padding"] else {}
        hidden = self.text_encoder(input_ids=rows["input_ids"], **hide).last_hidden_state
        front = torch.cat([F.linear(hidden, self.context["weight"], self.context["bias"]), start], 1)
        return front, F.pad(rows["attention_mask"], (0, 1), value=1) if hide else None

    def _with_start(self, rows_BP: Tensor) -> Tensor:
        return F.pad(rows_BP, (0, 1), value=self.card["start"])


def _choose(
    logits_BK: Tensor, temperature: float, top_k: int | None, top_p: float | None, drawn: torch.Generator
) -> Tensor:
    """Draw one code for each row, int64 `[B]`."""
    if temperature == 0:
        return logits_BK.argmax(1)
    logits = logits_BK / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    shares = logits.softmax(1)
    if top_p is not None:
        falling, order = shares.sort(dim=1, descending=True)
        nucleus = falling.masked_fill(falling.cumsum(1) - falling >= top_p, 0.0)
        shares = torch.zeros_like(shares).scatter(1, order, nucleus)
    return torch.multinomial(shares, 1, generator=drawn)[:, 0]
