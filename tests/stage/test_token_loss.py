"""The loss is one mean over the supervised tokens of a global batch, however that batch is cut."""

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from mmlab.data.config import Prompt
from mmlab.stage.config import EndToEndFinetuningConfig
from mmlab.stage.token_loss import rescale_gradients, supervised
from mmlab.stage.vision_language import EndToEndFinetuning
from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW
from tests.model import tiny
from tests.stage.tiny_stage import data_of, fit
from tests.tiny_files import png
from tests.tiny_shapes import make_records

STEPS = 3


class SGD(AdamW):
    """Plain gradient descent: what differs in a gradient differs as much in the weights."""

    def build(self, model, total_steps):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


class PerMicroBatchMean(EndToEndFinetuning):
    """What most trainers do: a mean in each micro-batch."""

    def training_step(self, batch, batch_idx):
        loss, tokens = self.loss(batch)
        self.log("train/loss", loss / tokens, batch_size=1)
        return loss / tokens

    def on_before_optimizer_step(self, optimizer):
        pass


class KeepWeights(L.Callback):
    """Every rank writes down where it ended."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        torch.save({"metrics": metrics, "state": state}, self.folder / f"{trainer.global_rank}.pt")


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process must not wait for the threads of the one it came from."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Answers of 1 to 60 words; one in four samples has no picture."""
    words = [1, 60, 1, 2, 40, 1, 1, 25]
    records = [
        {"questions": [{"question": f"what is {i}?", "answer": " ".join(["red"] * n)}]} for i, n in enumerate(words)
    ]
    pictures = [None if i % 4 == 3 else png(8 + i, 8) for i in range(len(words))]
    root = tmp_path_factory.mktemp("records") / "train"
    make_records(root, records, pictures)
    return root


def trained(folder, shards, tokenizer, micro_batch, devices=1, stage=EndToEndFinetuning):
    """[what each rank has after `STEPS` steps in double precision]."""
    folder.mkdir()
    model = tiny.vlm(tokenizer)
    config = EndToEndFinetuningConfig(trainable=["connector", "language"], prompt=Prompt("v1", system=""))
    module = stage(config, model, SGD(AdamWConfig()))
    data = data_of(module, [shards], 8, micro_batch, max_length=400)
    fit(module, data, STEPS, devices, [KeepWeights(folder)], precision="64-true")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


def furthest(one, other) -> float:
    """Largest difference between the weights of two runs."""
    assert one["state"].keys() == other["state"].keys()
    return max(float((one["state"][k] - other["state"][k]).abs().max()) for k in one["state"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards, tokenizer_folder):
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("whole") / "run", shards, tokenizer_folder, 8)[0]


def test_the_weights_move(whole, tokenizer_folder):
    """Otherwise equality would say nothing."""
    before = tiny.vlm(tokenizer_folder).state_dict()
    moved = [float((whole["state"][f"model.{k}"] - v).abs().max()) for k, v in before.items()]
    assert max(moved) > 0.05


@pytest.mark.parametrize(("micro_batch", "devices"), [(1, 1), (2, 1), (4, 2), (1, 2)])
def test_micro_batches_and_processes_change_nothing(tmp_path, shards, tokenizer_folder, whole, micro_batch, devices):
    for rank in trained(tmp_path / "run", shards, tokenizer_folder, micro_batch, devices):
        assert furthest(rank, whole) < 1e-6  # the cross-entropy itself is fp32
        assert rank["metrics"]["train/loss"] == pytest.approx(whole["metrics"]["train/loss"], rel=1e-6)
        assert rank["metrics"]["train/tokens"] == whole["metrics"]["train/tokens"] > 100


def test_a_mean_per_micro_batch_would_differ(tmp_path, shards, tokenizer_folder, whole):
    one = trained(tmp_path / "whole", shards, tokenizer_folder, 8, stage=PerMicroBatchMean)[0]
    assert furthest(one, whole) < 1e-6, "in one micro-batch both are the same mean"
    cut = trained(tmp_path / "cut", shards, tokenizer_folder, 1, stage=PerMicroBatchMean)[0]
    assert furthest(cut, whole) > 1e-2


def test_places_predict_the_next_labelled_token_of_their_segment():
    labels = torch.tensor([[5, -100, 7, 8, 9, 3, -100, -100]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]])
    keep, targets = supervised(labels, segments)
    assert keep.tolist() == [[False, True, True, False, True, False, False, False]]
    assert targets.tolist() == [7, 8, 3], "nothing predicts the first token of a segment"


def test_gradients_are_rescaled_where_there_are_any():
    with_gradient, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    F.mse_loss(with_gradient, torch.zeros(2)).backward()
    rescale_gradients([with_gradient, without], torch.tensor(3.0))
    assert with_gradient.grad is not None and with_gradient.grad.tolist() == [3.0, 3.0]
    assert without.grad is None
    rescale_gradients([without], torch.tensor(3.0))


def test_a_run_says_once_how_it_computes(tmp_path, shards, tokenizer_folder, capsys):
    trained(tmp_path / "run", shards, tokenizer_folder, 4)
    lines = capsys.readouterr().out.splitlines()
    ways = [line for line in lines if line.startswith("attention of the language model: ")]
    assert ways and len(ways) == len(set(ways))
