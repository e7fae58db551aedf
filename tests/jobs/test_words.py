"""Wrong words on a command line are named before Hydra reads them, with what is like them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import entry
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from words import check_words, quoted

from e2h.errors import InputError
from e2h.settings import presets

PIPELINE = Path(__file__).parents[2] / "jobs" / "pipeline.py"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("privacy.epsilno=1", "privacy.epsilno=1: expected a known key (see --help); did you mean privacy.epsilon?"),
        ("epsilon=4", "epsilon=4: expected a known key (see --help); did you mean privacy.epsilon or ledger.epsilon?"),
        ("modle=px8", "modle=px8: expected a known key (see --help); did you mean model?"),
        ("seeds=3", "seeds=3: expected a known key (see --help); did you mean seed?"),
        ("xyzzy=3", "xyzzy=3: expected a known key (see --help)"),
        ("data=image-folder", "data=image-folder: expected one of " + ", ".join(presets("data"))),
        ("curriculum=central", "curriculum=central: expected a list; written 'curriculum=[...]'"),
        ("curriculum='[central]'", "curriculum='[central]': expected a list; written 'curriculum=[...]'"),
        ("data.path=/a,b", "data.path=/a,b: expected one value; what has a comma, 'data.path=\"...\"'"),
        (
            "data.class_names=a,b",
            "data.class_names=a,b: expected one value; a list is written 'data.class_names=[...]'",
        ),
        ("privacy.epsilon=1,2", "privacy.epsilon=1,2: expected one value; what has a comma, 'privacy.epsilon=\"...\"'"),
        (
            'data.path=a"b',
            """data.path=a"b: expected one value; what has quotes in it, 'data.path="..."' with \\" for each""",
        ),
        (
            "data.class_names=[été,b]",
            """data.class_names=[été,b]: expected a list; written 'data.class_names=["...", "..."]'""",
        ),
        ("privacy.epsilon=abc", "privacy.epsilon=abc: expected a number"),
        ("central.noise_multiplier=none", "central.noise_multiplier=none: expected a number, or null"),
        ("finetune.num_steps=1.5", "finetune.num_steps=1.5: expected a whole number"),
        ("data.num_records=many", "data.num_records=many: expected a whole number, or null"),
        ("dry_run=maybe", "dry_run=maybe: expected true or false"),
        ("--dry-run", "option=--dry-run: expected settings as key=value; e.g. dry_run=..., see --help"),
        ("--epsilon=4", "option=--epsilon: expected settings as key=value; e.g. privacy.epsilon=..., see --help"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_like_it(word: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check_words(["seed=1", word])
    assert str(refused.value) == message


def test_right_words_pass_and_hydras_own_are_left_to_it() -> None:
    every = [f"{group}={name}" for group in ("data", "model", "scaling", "experiment") for name in presets(group)]
    check_words(
        [
            *every,
            "experiment=null",
            "privacy.epsilon=1",
            "curriculum=[central,frequency]",
            "frequency.warmup.num_steps=3",
            "privacy.delta=1e-5",
            "privacy.delta=1E-05",
            "privacy.epsilon='4'",
            "privacy.epsilon=.5",
            "scaling.num_workers='2'",
            "seed=007",
            "seed=-1",
            "data.labelled=no",
            "data.labelled='true'",
            "dry_run=on",
            "privacy.epsilon=4",
            "central.noise_multiplier=null",
            "data.class_names=null",
            "data.class_names=[a, b]",
            "data.name=2024",
            "data.path='/with space, comma'",
            'data.path="a\\"b"',
            'data.class_names=["été", "b"]',
            "run.name=${oc.env:USER}",
            "finetune.num_steps=${oc.env:STEPS}",
            "dry_run=true",
        ]
    )
    check_words(
        ["search.space={warmup.num_steps: [1, 2]}", "search.space.seed=[1]", "central={}", "hydra.verbose=true"]
    )
    check_words(["--cfg", "job", "--resolve", "+anything=1", "~privacy.epsilon", "data=mine", "--config-dir=presets"])


ODD_PATHS = [
    "~/pets",
    "/tmp/données",
    "/a/my pets (2020)",
    "/a/my pets (2020), done=1",
    "it's",
    "a#1",
    "my(2020)",
    "{a}",
]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_a_text_that_hydra_has_no_grammar_for_is_quoted_for_it(path: str) -> None:
    (word,) = quoted([f"data.path={path}"])
    assert word == f'data.path="{path}"'
    check_words([word])
    assert OverridesParser.create().parse_override(word).value() == path


def test_other_words_are_left_as_they_are() -> None:
    words = ["data.path=/a/b c", "data.path='~/pets'", "data.path=/a,b", "data.path=~/${oc.env:USER}", "~data.path"]
    words += [
        "data.path=null",
        "run.name=",
        "data.class_names=[été]",
        "privacy.epsilon=(1)",
        "data=été",
        "--cfg",
        "job",
    ]
    words += ['data.path=a"b', "data.path=glob(*)", "+data.path=~/pets", "pfad=~/pets"]
    assert quoted(words) == words


def test_a_job_takes_a_path_in_the_home_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "pets (été)" / "cat").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["data=image_folder", "data.path=~/pets (été)", "dry_run=true", f"run.storage={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *words])
    with pytest.raises(SystemExit, match="2"):
        entry.job(lambda run: None)
    assert capsys.readouterr().err.startswith("e2h: data.path=~/pets (été): expected images (.png")


def test_help_into_a_pipe_that_closes_says_nothing_more() -> None:
    program = f"{sys.executable} {PIPELINE} --help | head -n 1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
