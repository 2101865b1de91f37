"""Who leaves, and what for: ranks agree, and what is raised can be sent to another process."""

import json
import pickle
import signal
from pathlib import Path

from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from mmlab.training.preemption import Preempted, Signals
from tests.tiny_ranks import ranks


def test_what_is_raised_can_be_sent():
    sent = pickle.loads(pickle.dumps(Preempted("stopped", signal.SIGINT)))
    assert (str(sent), sent.exit_code) == ("stopped", 130)


def agree(number: int, folder: Path, noted: list[tuple[int, int]]) -> None:
    agreed = []
    for pair in noted:
        signals = Signals()
        signals.noted = pair[number]
        agreed.append(signals.agreed())
    (folder / f"{number}.json").write_text(json.dumps(agreed))


def test_ranks_agree_and_a_new_start_is_not_hidden(tmp_path):
    term, usr1, usr2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
    ranks(2, agree, tmp_path, [(0, 0), (0, term), (usr1, term), (term, usr2)])
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == [0, term, usr1, usr2]


def test_a_terminated_run_that_is_leaving_waits_for_no_other_rank():
    broadcasts: list[int] = []
    there = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGTERM, _HandlersCompose([lambda number, frame: broadcasts.append(number)]))
        signals = Signals()
        signals.listen()
        signals.restore()
        signal.raise_signal(signal.SIGTERM)
        assert broadcasts == [] and signal.getsignal(signal.SIGUSR1) == there[signal.SIGUSR1]
    finally:
        for number, handler in there.items():
            signal.signal(number, handler)
