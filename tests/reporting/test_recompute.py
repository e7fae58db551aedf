from __future__ import annotations

import json
import math

import dp_accounting
import pytest

from e2h.__main__ import main
from e2h.errors import InputError
from e2h.reporting import facts
from e2h.reporting.publish import publish
from e2h.reporting.recompute import recompute


@pytest.fixture
def release(make_run):
    return publish(make_run())


@pytest.fixture
def ledger(release):
    return json.loads((release / "ledger.json").read_text())


def test_equals_one_composed_event(ledger, epsilons):
    assert recompute(ledger) == pytest.approx(epsilons["pld"], abs=1e-7)
    assert recompute(ledger | {"accountant": "rdp"}) == pytest.approx(epsilons["rdp"], abs=1e-9)


def test_every_parameter_counts(ledger):
    stated = recompute(ledger)
    for key, value in (("sampling_prob", 0.11), ("noise_multiplier", 3.9), ("count", 101)):
        changed = json.loads(json.dumps(ledger))
        changed["releases"][1]["event"][key] = value
        assert recompute(changed) > stated + 1e-3
    assert recompute(ledger | {"releases": ledger["releases"][:1]}) < stated - 1e-3


def test_sampling_prob_one_is_the_plain_gaussian(ledger):
    event = {"type": "poisson_sampled_gaussian", "sampling_prob": 1.0, "noise_multiplier": 5.0, "count": 3}
    found = recompute(ledger | {"releases": [{"name": "central", "event": event}]})
    exact = dp_accounting.get_epsilon_gaussian(5 / math.sqrt(3), ledger["delta"])
    assert found == pytest.approx(exact, rel=1e-4)
    assert found >= exact


@pytest.mark.parametrize(
    "change",
    [
        {"accountant": "gdp"},
        {"neighbouring_relation": "MAGIC"},
        {"delta": None},
        {"releases": [{"name": "x", "event": {"type": "magic"}}]},
        {"releases": [{"name": "x"}]},
    ],
)
def test_unknown_entries_are_refused_in_one_line(ledger, change):
    with pytest.raises(InputError, match="ledger: expected the entries") as refusal:
        recompute(ledger | change)
    assert "\n" not in str(refusal.value)


def test_command_check(release, capsys):
    assert main(["check", str(release)]) == 0
    assert "no problem found" in capsys.readouterr().out
    (release / "evaluation.json").write_text("{}")
    (release / "grid.png").unlink()
    assert main(["check", str(release)]) == 2
    assert capsys.readouterr().out.splitlines() == ["evaluation.json: unexpected file", "grid.png: missing"]


def test_command_recompute(release, ledger, capsys):
    path = release / "ledger.json"
    assert main(["recompute", str(path)]) == 0
    assert f"stated {ledger['epsilon']:.9g}, recomputed" in capsys.readouterr().out
    for off, code in ((5e-7, 0), (1e-5, 1)):
        path.write_text(json.dumps(ledger | {"epsilon": ledger["epsilon"] + off}))
        assert main(["recompute", str(path)]) == code
    assert "differ by more than" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "no json", "{}", '{"epsilon": null}', '{"epsilon": "NaN"}'])
def test_command_recompute_of_something_else_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "ledger.json"
    if content is not None:
        path.write_text(content)
    assert main(["recompute", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_printed_epsilon_never_understates():
    assert facts.up(0.12341) == "0.1235"
    assert facts.up(9.99858) == "9.999"
    assert facts.up(1.0) == "1.000"
    assert facts.up(123456.0) == "123500"
    assert facts.up(math.inf) == "∞"
    assert facts.up(0.0) == "0"


def test_a_share_is_rounded_up_and_never_to_all():
    assert facts.percent_up(0.81361) == "81.4 %"
    assert facts.percent_up(0.5) == "50.0 %"
    assert facts.percent_up(0.99974) == "99.974 %"
    assert facts.percent_up(1.0) == "100.000 %"
