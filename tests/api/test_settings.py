"""Settings in programs and notebooks are those of the command line: the same words make the same configuration."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import hydra
import pytest
import yaml
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import e2h
import e2h.settings
from e2h.binding import differences
from e2h.config import Config
from e2h.errors import InputError
from e2h.settings import compose, value, with_values
from e2h.validation import validate

PRESETS = sorted((Path(e2h.__file__).parent / "conf").glob("*/*.yaml"))
WORDS = [
    [],
    *([f"{path.parent.name}={path.stem}"] for path in PRESETS),
    ["experiment=mnist_cpu", "model=px28"],
    ["experiment=mnist", "data=fashion_mnist", "scaling=gpu8", "scaling.num_workers=3"],
    ["data=image_folder", "model=px28", "data.image_size=28", "privacy.epsilon=4", "curriculum=[frequency]"],
]


@pytest.fixture(scope="module", autouse=True)
def hydra_ready() -> Iterator[None]:
    ConfigStore.instance().store("schema", Config)
    with initialize_config_module("e2h.conf", version_base="1.3"):
        yield


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_same_words_as_on_the_command_line_make_the_same_configuration(words):
    words = [*words, "data.path=images", "data.image_size=128"]
    on_the_command_line = OmegaConf.to_object(hydra.compose("config", words))
    settings = {name: yaml.safe_load(text) for name, text in (word.split("=") for word in words)}
    assert differences(asdict(on_the_command_line), asdict(compose(settings))) == []


def test_nothing_given_is_the_demo_and_a_configuration_is_taken_as_it_is():
    assert compose() == compose({}) == Config()
    given = Config(curriculum=[])
    assert compose(given) == given
    assert compose(given) is not given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "mnist_"}, "data=mnist_: expected one of camelyon32, "),
        ({"model": 28}, "model=28: expected one of px128, px28, "),
        (
            {"privacy.epsilonn": 1.0},
            "privacy.epsilonn=1.0: expected a known key (docs/guide.md); did you mean privacy",
        ),
        (
            {"epsilon": 1.0},
            "epsilon=1.0: expected a known key (docs/guide.md); did you mean privacy.",
        ),
        ({"privacy": 1.0}, "privacy=1.0: expected a known key"),
        ({"seed.value": 1}, "seed.value=1: expected a known key"),
        ({"seed.real": 1}, "seed.real=1: expected a known key"),
        ({"privacy.epsilon": "1"}, "privacy.epsilon='1': expected values of type float"),
        ({"finetune.num_steps": 2.5}, "finetune.num_steps=2.5: expected values of type int"),
        ({"privacy.test_mode": 1}, "privacy.test_mode=1: expected values of type bool"),
        ({"model.width_multipliers": ["wide"]}, "model.width_multipliers=['wide']: expected values of type list[int]"),
        ({"privacy.epsilon": -1}, "privacy.epsilon=-1.0: expected a number above 0"),
        ({"data": "mnist"}, "data.path=null: expected where the idx data lies"),
        (Config(seed=1, curriculum=["centre"]), "curriculum=centre: expected one of central, frequency"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(InputError) as refused:
        validate(compose(settings))
    assert str(refused.value).startswith(message)


def test_values_are_set_in_a_copy_and_refusals_name_the_setting_that_holds_them():
    config = Config()
    changed = with_values(config, {"warmup.num_steps": 7, "privacy.epsilon": 2, "data.num_records": None})
    assert (value(changed, "warmup.num_steps"), value(changed, "privacy.epsilon")) == (7, 2.0)
    assert type(changed.privacy.epsilon) is float
    assert config == Config()
    for values, message in [({"a.b": 1}, "search.space=a.b: "), ({"seed": "x"}, "search.space.seed='x': ")]:
        with pytest.raises(InputError, match=message):
            with_values(config, values, "search.space")


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(e2h.settings) == doctest.TestResults(failed=0, attempted=2)
