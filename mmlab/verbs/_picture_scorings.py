"""The scorings of `mmlab eval` of models that reconstruct or draw images, and the report of scores with images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate import descriptions as described
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, feature_network, feature_networks
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.reconstructions import reconstruction_sheet, score_reconstructions
from mmlab.evaluate.pictures.rejection import ClassProbe, Rejection
from mmlab.evaluate.pictures.sample_scores import score_samples
from mmlab.evaluate.scores.score_table import write_scores
from mmlab.runs.disk import replacing, to_json
from mmlab.training.config import HardwareConfig
from mmlab.training.ema_snapshots import PostHocAverage
from mmlab.training.trainer import place
from mmlab.verbs._generators import (
    buckets_of,
    check_guidance,
    chosen_average,
    generator_of,
    generator_settings,
    restore_with,
)
from mmlab.verbs._repetition import check_inputs, comparison, provenance


def score_first_stage(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Encode and decode images with a first stage."""
    inputs = picture_inputs(cfg, trained)
    origin = checked_provenance(cfg, folder, inputs)
    model = restore_for_pictures(cfg, folder, inputs)
    scores = score_reconstructions(model, inputs.pictures, inputs.networks, inputs.train, cfg.batch_size)
    sheets = {"reconstructions": reconstruction_sheet(model.first_stage, inputs.pictures)}
    scores = {"run": folder.name, **scores, **origin}
    report(scores, sheets, out, inputs.pictures.bad, inputs.train_bad, cfg.scores)


def score_generator(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Draw samples under the conditions of real images, and compare them with these."""
    if cfg.features is None:
        raise ConfigError(
            "FID and KID need a network; set features to a run of stage=contrastive (experiment=classes/features is "
            "trained on classes), to a pretrained vision encoder, or to inception."
        )
    process, sampler, about = generator_settings(cfg, trained)
    check_rejection(cfg, trained)
    classifier = None if cfg.classifier is None else feature_network(cfg.classifier, cfg.root)
    inputs = picture_inputs(cfg, trained)
    average = chosen_average(cfg, folder)
    origin = checked_provenance(cfg, folder, inputs, classifier, average)
    model = restore_for_pictures(cfg, folder, inputs, average)
    check_guidance(cfg.run, about.get("guidance", 1), model.conditioner, trained)
    network, *others = inputs.networks
    rejection = None
    if cfg.candidates > 1:
        if classifier is not None:
            classifier.to(model.first_stage.latent_mean.device)
        assert inputs.train is not None
        probe = ClassProbe(classifier or network, inputs.train, model.conditioner.names, cfg.batch_size)
        rejection = Rejection(probe, cfg.candidates)
    generator = generator_of(model, trained, process, sampler, None)
    numbers = (cfg.samples, cfg.batch_size, cfg.seed)
    scores, sheets = score_samples(generator, network, inputs.pictures, inputs.train, *numbers, rejection, others)
    own = getattr(sampler, "config", None)
    about |= {"sampler_settings": None if own is None else asdict(own), "seed": cfg.seed}
    # The artifacts of a run with an average hold the average.
    kept = trained.callbacks.get("ema")
    about |= {"ema": average.describe() if average else None if kept is None else OmegaConf.to_container(kept)}
    scores = {"run": folder.name, **scores, **about, **origin}
    report(scores, sheets, out, inputs.pictures.bad, inputs.train_bad, cfg.scores)


def check_rejection(cfg: DictConfig, trained: DictConfig) -> None:
    """Refuse rejection sampling of a model without classes, or without data to train the classifier on.

    Raises:
        ConfigError: either of them, or a classifier without candidates.
    """
    if cfg.candidates == 1:
        if cfg.classifier is not None:
            raise ConfigError(f"classifier={cfg.classifier} selects among several candidates; set candidates=4 or so.")
        return
    if "classes" not in trained.model.conditioner:
        raise ConfigError(f"candidates={cfg.candidates} needs a class-conditional model, and {cfg.run} is not one.")
    if cfg.data.train_from is None:
        raise ConfigError(f"candidates={cfg.candidates} trains a classifier on labeled images; set data.train_from=…")


class PictureInputs(NamedTuple):
    """What images are compared with: there may be no networks, and the training pictures may be None."""

    pictures: PictureSet
    train: PictureSet | None
    networks: list[FeatureNetwork]

    @property
    def train_bad(self) -> BadSamples | None:
        return None if self.train is None else self.train.bad


def picture_inputs(cfg: DictConfig, trained: DictConfig) -> PictureInputs:
    """Open shards and network, before the model is loaded: a wrong name then costs no time."""
    spec = ImageSpec(trained.data.size, trained.data.aspect, reduce_jpegs=trained.data.reduce_jpegs)
    if buckets_of(trained):
        print(f"scores are of squares of {spec.size} px; the other shapes of data.buckets are not scored")
    budget, train_from = cfg.data.bad_budget, cfg.data.train_from
    pictures = PictureSet(cfg.data.path, spec, cfg.limit, budget)
    train = None if train_from is None else PictureSet(train_from, spec, budget=budget)
    return PictureInputs(pictures, train, feature_networks(cfg.features, cfg.root))


def checked_provenance(
    cfg: DictConfig,
    folder: Path,
    inputs: PictureInputs,
    classifier: FeatureNetwork | None = None,
    average: PostHocAverage | None = None,
) -> dict[str, Any]:
    """Return what `provenance` does; raises RunError if scores are to be repeated from other inputs."""
    used = {"data.path": inputs.pictures.index.hash}
    if inputs.train is not None:
        used["data.train_from"] = inputs.train.index.hash
    if inputs.networks:
        used["features"] = " ".join(network.describe()["hash"] for network in inputs.networks)
    if classifier is not None:
        used["classifier"] = classifier.describe()["hash"]
    if average is not None:
        used["ema"] = average.describe()["hash"]
    origin = provenance(cfg, folder, used)
    if cfg.scores is not None:
        check_inputs(cfg, origin)
    return origin


def restore_for_pictures(
    cfg: DictConfig, folder: Path, inputs: PictureInputs, average: PostHocAverage | None = None
) -> Any:
    """Restore the model in float32, so that its scores do not depend on the machine, and the network on its device."""
    hardware = HardwareConfig(accelerator=cfg.trainer.accelerator, precision="32-true")
    model = place(restore_with(average, folder), hardware)
    for network in inputs.networks:
        network.to(model.first_stage.latent_mean.device)
    return model


def report(
    scores: dict,
    sheets: dict,
    out: Path,
    bad: BadSamples,
    train_bad: BadSamples | None = None,
    repeated: str | None = None,
) -> None:
    """Write scores and sheets, and print the numbers, one on each line, and the samples that were left out.

    Args:
        scores: by name.
        sheets: images by name.
        out: folder.
        bad, train_bad: samples that were left out.
        repeated: file of scores that these should equal.
    """
    train_counts = {"bad_samples_of_train_from": train_bad.as_json()} if train_bad else {}
    write_scores(out, {**scores, "bad_samples": bad.as_json(), **train_counts})
    for name, sheet in sheets.items():
        with replacing(out / f"{name}.png") as draft:
            sheet.save(draft)
    groups = {name: scores.get(name) or {} for name in ("neighbours", "rejection")}
    rows = {**scores, **{f"{group}_{name}": value for group, rows in groups.items() for name, value in rows.items()}}
    print_numbers(rows)
    for line in described.description_notes(scores):
        print(line)
    if features := scores.get("features"):
        print(f"features: {features['network']}{' (a stand-in: no published FID)' if features['stand_in'] else ''}")
    if reason := scores.get("linear_left_out"):
        print(f"no linear baseline: {reason}")
    for group in (scores, groups["rejection"]):
        if group.get("caution"):
            print(group["caution"])
    for other in scores.get("others", ()):
        print(f"in the features of: {other['features']['network']}")
        print_numbers(other)
        print(*filter(None, [other["caution"]]), sep="\n", end="\n" * bool(other["caution"]))
    print_bad(bad, train_bad)
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in sheets)}")
    if repeated is not None:
        print(comparison(repeated, json.loads(to_json(scores))))


def print_numbers(scores: dict) -> None:
    """Print the numbers among scores."""
    for name, value in scores.items():
        if isinstance(value, int | float):
            print(f"{name.replace('_', ' '):<28}{value:>12,.4g}")


def print_bad(*sets: BadSamples | None) -> None:
    """Print a line about each set of shards with samples that are left out."""
    for bad in sets:
        if bad:
            print(f"{bad.root}: {bad}")
