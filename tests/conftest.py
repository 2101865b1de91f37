"""Shared fixtures; nothing is downloaded."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Tests run in parallel: more threads than cores would make them and their subprocesses several times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts background jobs with Ctrl-C ignored, which the subprocesses of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with Llama's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what color is the red circle? USER: ASSISTANT:"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> Path:
    """A pipeline in the layout of Stable Diffusion 1.5, with random weights."""
    from tests.model.tiny_pipelines import stable_diffusion

    return stable_diffusion(tmp_path_factory.mktemp("pipelines") / "stable_diffusion")


@pytest.fixture(scope="session", autouse=True)
def memory_that_is_returned() -> Iterator[None]:
    """A training in this process does not let it keep freed memory: later tests measure that of forks."""
    from mmlab.runs import freed_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freed_memory, "OPTIONS", ())
        yield


@pytest.fixture(autouse=True)
def own_products() -> Iterator[None]:
    """Matrix products are torch's again after a test that trained in this process."""
    yield
    if module := sys.modules.get("mmlab.training.cpu_products"):
        module.use_products("torch")
