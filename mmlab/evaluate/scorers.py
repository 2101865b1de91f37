"""The scores that can be asked for by name: `metric=…`."""

from mmlab.config.errors import ConfigError, nearest
from mmlab.evaluate.caption_scores import captions
from mmlab.evaluate.exact_match import exact
from mmlab.evaluate.facts import facts
from mmlab.evaluate.scienceqa import scienceqa
from mmlab.evaluate.scores import Scorer
from mmlab.evaluate.vqa import vqa
from mmlab.evaluate.yes_no import mme, pope

SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "vqa": vqa,
    # GQA's accuracy is exact match, as its evaluation splits it: by form, by meaning, and binary or open.
    "gqa": exact,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "captions": captions,
    "facts": facts,
}


def scorer_named(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCORERS:
        raise ConfigError(f"metric '{name}' is not one of {', '.join(SCORERS)}.{nearest(name, SCORERS)}")
    return SCORERS[name]
