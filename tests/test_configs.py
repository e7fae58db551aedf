"""Presets compose into the schema, and every value that can't work is refused by name."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from e2h.binding import binding, differences, digest
from e2h.config import Config, run_name
from e2h.errors import InputError
from e2h.privacy.plan import make_plan
from e2h.settings import flat
from e2h.validation import validate

CONF = Path(__file__).resolve().parents[1] / "e2h" / "conf"
MODEL_OF = {
    "digits": "px8",
    "mnist": "px28",
    "fashion_mnist": "px28",
    "cifar10": "px32",
    "celeba32": "px32",
    "celeba64": "px64",
    "celeba128": "px128",
    "camelyon32": "px32",
    "image_folder": "px32",
    "parquet": "px32",
}


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra_ready():
    ConfigStore.instance().store("schema", Config)
    with initialize_config_module("e2h.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> Config:
    config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, Config)
    return config


def changed(name: str, value: object) -> Config:
    """The defaults with one value set."""
    config = Config()
    *sections, key = name.split(".")
    part = config
    for section in sections:
        part = getattr(part, section)
    assert hasattr(part, key)
    setattr(part, key, value)
    return config


def test_without_overrides_the_schema_alone_decides():
    assert composed() == Config()
    assert validate(Config()) == Config()


def test_the_data_presets_are_those_of_the_issue():
    assert set(presets("data")) == set(MODEL_OF)


@pytest.mark.parametrize("name", sorted(MODEL_OF))
def test_a_data_preset_composes_with_a_model_of_its_size(name):
    config = validate(composed(f"data={name}", *(["data.path=/data"] if name != "digits" else [])))
    assert config.data.name == name
    assert asdict(config.model).items() >= yaml.safe_load((CONF / f"model/{MODEL_OF[name]}.yaml").read_text()).items()
    assert f"px{config.data.image_size}" == MODEL_OF[name]
    assert config.privacy.delta <= 1e-4
    assert run_name(config) == f"{name}-eps10-seed0"


@pytest.mark.parametrize("name", [name for name in MODEL_OF if name != "digits"])
def test_a_data_preset_asks_for_the_path(name):
    with pytest.raises(InputError, match=r"^data\.path=null: expected where the \w+ data lies; set data\.path="):
        validate(composed(f"data={name}"))


@pytest.mark.parametrize("name", presets("model"))
def test_a_model_preset_composes_with_images_of_its_size(name):
    config = validate(composed(f"model={name}", f"data.image_size={name.split('_')[0].removeprefix('px')}"))
    assert asdict(config.model).items() >= yaml.safe_load((CONF / f"model/{name}.yaml").read_text()).items()


@pytest.mark.parametrize("name", presets("scaling"))
def test_a_scaling_preset_changes_nothing_that_a_run_is_bound_to(name):
    config = validate(composed(f"scaling={name}"))
    assert binding(config) == binding(Config())


@pytest.mark.parametrize("name", presets("experiment"))
def test_an_experiment_composes_and_states_its_command(name):
    # The one that is for any data has none of its own.
    data = ["data=mnist"] if name == "gpu" else []
    config = validate(composed(f"experiment={name}", *data, "data.path=/data"))
    text = (CONF / f"experiment/{name}.yaml").read_text()
    for key, section in yaml.safe_load(text).items():
        if is_dataclass(getattr(config, key, None)):
            assert dict(flat(asdict(getattr(config, key)))).items() >= dict(flat(section)).items()
    assert f"experiment={name}" in text


def test_every_section_of_every_preset_is_of_the_schema():
    # Hydra refuses an unknown key only where the preset is composed; a typo in a rare preset would wait for its user.
    known = {field.name for field in fields(Config)}
    for group in ("data", "model", "scaling", "experiment"):
        for name in presets(group):
            text = (CONF / group / f"{name}.yaml").read_text()
            whole = text.startswith("# @package _global_")
            keys = set(yaml.safe_load(text)) - {"defaults"}
            assert keys <= (known if whole else set(asdict(Config())[group])), name


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigCompositionException) as refused:
        composed("privacy.epsilom=1")
    assert "epsilom" in f"{refused.value} {refused.value.__cause__}"


def test_overrides_are_the_words_of_the_design():
    words = """data.path=/x privacy.epsilon=1 privacy.delta=1e-5 curriculum=[] central.num_rounds=3
    central.sampling_prob=0.1 central.noise_multiplier=5 warmup.num_steps=7 finetune.num_steps=9
    finetune.expected_batch_size=10 finetune.noise_multiplicity=2 finetune.max_grad_norm=0.5 sampling.num_images=11
    scaling.num_workers=3 run.storage=/s run.name=mine dry_run=true"""
    config = validate(composed("data=mnist", "scaling=gpu8", *words.split()))
    assert (config.privacy.epsilon, config.privacy.delta, config.central.noise_multiplier) == (1.0, 1e-5, 5.0)
    assert (config.finetune.expected_batch_size, config.sampling.num_images, config.scaling.num_workers) == (10, 11, 3)
    assert (run_name(config), config.dry_run, config.curriculum) == ("mine", True, [])


NAN, INF = float("nan"), float("inf")
REFUSED = [
    *(("privacy.epsilon", value) for value in (0.0, -1.0, NAN, INF, 101.0)),
    *(("seed", value) for value in (-1, 2**31)),
    *(("privacy.delta", value) for value in (0.0, 1.0, -1e-5, 1.5, NAN, 1e-11)),
    *(("data.source", value) for value in ("", "mnist")),
    ("data.channels", 2),
    ("data.path", "/my/images"),  # of what kind?
    ("data.image_size", 0),
    ("data.image_size", 9),  # two levels
    ("data.resize", "stretch"),
    ("data.num_records", 0),
    ("data.class_names", []),
    ("data.class_names", ["cat", "cat"]),
    *(("data.test_fraction", value) for value in (-0.1, 1.0, NAN)),
    *(("central.sampling_prob", value) for value in (0.0, 1.1, NAN)),
    *(("central.noise_multiplier", value) for value in (0.0, -1.0, NAN, INF, 2e5)),
    *(("central.budget_share", value) for value in (0.0, 1.0, NAN)),
    *(("central.max_norm", value) for value in (0.0, NAN, INF)),
    *(("central.centre", value) for value in (-0.1, 1.1, NAN)),
    *(("central.count_weight", value) for value in (-1.0, 11.0, NAN)),
    *((f"central.{key}", value) for key, value in (("num_rounds", 0), ("num_bins", 1), ("pool_factor", 3))),
    ("central.query", "median"),
    ("model.width_multipliers", []),
    ("model.patch_size", 0),
    ("warmup.num_steps", -1),
    ("warmup.label_dropout", 1.0),
    *((f"finetune.{key}", 0) for key in ("num_steps", "expected_batch_size", "noise_multiplicity", "ledger_block")),
    *(("finetune.max_grad_norm", value) for value in (0.0, -1.0, NAN, INF)),
    ("finetune.learning_rate", 0.0),
    ("finetune.ema_decay", 1.0),
    ("finetune.engine", "magic"),
    ("sampling.num_images", 0),
    ("sampling.sampler", "euler"),
    ("sampling.guidance", -1.0),
    ("sampling.class_fractions", [0.5, 0.6]),
    ("sampling.class_fractions", [1.5, -0.5]),
    ("scaling.num_workers", 0),
    *(("scaling.min_workers", value) for value in (0, 3)),  # num_workers is 2
    ("scaling.physical_batch_size", 0),
    ("run.storage", ""),
    ("run.name", "a/b"),
    ("run.name", ".hidden"),
    ("run.name", "é" * 100),
    *(("data.name", value) for value in ("../x", "a/b", ".x", "")),
    ("ledger.scope", "person"),
    ("ledger.epsilon", 20.0),  # one run has privacy.epsilon
    *(("ledger.path", value) for value in ("", "relative/ledger", "s3://bucket", "s3://bucket/", "gs://bucket/x")),
]


def test_guidance_needs_images_without_a_label_in_training():
    config = changed("sampling.guidance", 1.0)
    validate(config)
    config.finetune.label_dropout = 0.0
    with pytest.raises(InputError, match=r"^sampling\.guidance=1\.0: expected 0 with finetune\.label_dropout=0"):
        validate(config)


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value}" for name, value in REFUSED])
def test_a_value_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(InputError) as refused:
        validate(changed(name, value))
    message = str(refused.value)
    assert message.startswith(f"{name}={value}: expected ")
    assert "\n" not in message


ACCEPTED = [
    *(("privacy.epsilon", value) for value in (1e-3, 100.0)),
    *(("privacy.delta", value) for value in (1e-10, 0.5)),
    ("privacy.secret", "env:NAME"),
    *(("central.sampling_prob", value) for value in (1e-6, 1.0)),
    *(("central.centre", value) for value in (0.0, 1.0)),
    ("central.pool_factor", 4),
    ("warmup.num_steps", 0),
    ("data.class_names", ["one class"]),
    ("sampling.class_fractions", [0.0, 0.25, 0.75]),
]


@pytest.mark.parametrize(("name", "value"), ACCEPTED, ids=[f"{name}={value}" for name, value in ACCEPTED])
def test_a_value_at_the_edge_is_accepted(name, value):
    validate(changed(name, value))


def test_a_secret_on_the_command_line_is_refused_and_not_repeated():
    with pytest.raises(InputError, match=r"^privacy\.secret=\.\.\.: expected file:PATH, env:NAME or s3://") as refused:
        validate(changed("privacy.secret", "ab" * 32))
    assert "abab" not in str(refused.value)


def of_all_runs(**values) -> Config:
    config = changed("ledger.scope", "dataset")
    for name, value in {"epsilon": 10.0, **values}.items():
        setattr(config.ledger, name, value)
    return config


def test_a_budget_of_all_runs_holds_at_least_one():
    for accepted in ({}, {"epsilon": 10.5}, {"path": "/shared/pets.jsonl"}, {"path": "s3://bucket/ledgers/pets"}):
        validate(of_all_runs(**accepted))
    for epsilon in (None, 9.99, NAN, INF):
        shown = "null" if epsilon is None else epsilon
        with pytest.raises(InputError, match=rf"^ledger\.epsilon={shown}: expected what all runs together may cost"):
            validate(of_all_runs(epsilon=epsilon))
    unsafe, public = of_all_runs(), of_all_runs()
    unsafe.data.name = "a/b"
    public.privacy.test_mode = True
    for config, name in ((unsafe, "data.name"), (public, "privacy.test_mode")):
        with pytest.raises(InputError, match=rf"^{name}="):
            validate(config)


def test_a_central_stage_that_is_off_needs_no_sense():
    config = changed("central.sampling_prob", 7.0)
    config.curriculum = []
    validate(config)


@pytest.mark.parametrize("overrides", [["privacy.epsilon=nan"], ["privacy.epsilon=0"], ["privacy.delta=1"]])
def test_a_bad_override_is_refused_on_its_way_through_hydra(overrides):
    with pytest.raises(InputError, match=f"^{overrides[0].split('=')[0]}="):
        validate(composed(*overrides))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match=r"^finetune\.expected_batch_size=256: expected at most the 255 training"):
        make_plan(Config(), 255, ["a"])


def test_the_run_name_follows_from_what_people_compare():
    assert run_name(Config()) == "digits-eps10-seed0"
    assert run_name(changed("privacy.epsilon", 0.5)) == "digits-eps0.5-seed0"
    assert run_name(changed("curriculum", [])) == "digits-eps10-noeasy-seed0"
    assert run_name(changed("seed", 3)) == "digits-eps10-seed3"
    assert run_name(changed("run.name", "mine")) == "mine"


def test_a_run_is_bound_to_everything_but_where_it_runs():
    for name, value in (("scaling.num_workers", 9), ("run.storage", "/elsewhere"), ("dry_run", True)):
        assert binding(changed(name, value)) == binding(Config())
    for name, value in (("privacy.epsilon", 9.0), ("seed", 1), ("data.path", "/x"), ("central.sharpen", True)):
        assert differences(binding(Config()), binding(changed(name, value))) == [
            (name, {"privacy.epsilon": 10.0, "seed": 0, "data.path": None, "central.sharpen": False}[name], value)
        ]


def test_differences_name_dotted_keys_that_come_go_or_change():
    old, new = {"a": {"b": 1, "c": [1]}, "gone": 1}, {"a": {"b": 2, "c": [1]}, "come": 2}
    assert differences(old, new) == [("a.b", 1, 2), ("come", None, 2), ("gone", 1, None)]
    assert differences(old, old) == []


def test_a_digest_knows_values_and_not_their_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
