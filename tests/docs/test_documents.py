"""What README and docs tell a reader to type exists and is well-formed; every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest
from cluster_checks import ROOT
from doc_commands import DOCUMENTS, all_commands, check, commands

from e2h.config import Config

COMMANDS = all_commands()
MARKS = {"sh", "python", "text"}


@pytest.mark.parametrize("named", COMMANDS, ids=lambda named: f"{named.document.name}: {named.command[:60]}")
def test_a_command_is_well_formed(named, capsys):
    check(named.command)


def test_commands_are_found_in_every_guide():
    count = Counter(named.document.name for named in COMMANDS)
    assert min(count[name] for name in ("README.md", "guide.md", "cluster.md", "search.md", "scale.md")) >= 2
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```sh\nmake demo  # some minutes\n```", ["make demo"]),
        ("```sh mark\nray up \\\n    a.yaml\nray stop\n```", ["ray up a.yaml", "ray stop"]),
        ("   ```sh\n   make test\n   ```", ["make test"]),
        ("```text\nmake demo\n```", []),
        ("Say `make demo`, not `made`.\n```python\nmake = 1\n```", ["make demo"]),
    ],
)
def test_commands_are_told_from_text(text, found):
    assert commands(text) == found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_it_holds(path):
    """Otherwise a command could hide in a block that nobody reads."""
    opened = re.findall(r"(?m)^[ ]*```(\S*)[^\n]*$", path.read_text())[::2]
    assert set(opened) <= MARKS


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("make demos", "No rule to make target"),
        ("pip install e2h-extras", "e2h-extras: no such"),
        ("pip install e2h[serch]", "serch.: no such"),
        ("pip install -c requirements.txt .", "requirements.txt: no such"),
        ("python -m e2h recalculate release/ledger.json", "not in the table"),
        ("python -m e2h check --strict release", "not in the table"),
        ("python jobs/status.py --path PATH", "not in its help"),
        ("python jobs/pipelines.py", "no such job"),
        ("python pipeline.py", "not in the table"),
        ("python jobs/pipeline.py privacy.epsilon=-1", "privacy.epsilon"),
        ("python jobs/pipeline.py experiment=mnist_gpu data.path=FOLDER", "mnist_gpu"),
        ("python jobs/search.py search.privacy=selection search.scheduler=asha", "search.scheduler"),
        ("python jobs/search.py", "search.privacy"),
        ("python benchmarks/scale.py --jsonl", "--jsonl: no such option"),
        ("ray up -y clusters/azure.yaml", "azure.yaml: no such file"),
        ("ray job submit --working-dir . -- python jobs/pipeline.py scaling=gpu9", "gpu9"),
        ("docker build -f Dockerfile .", "Dockerfile: no such file"),
        ("curl https://example.org", "not in the table"),
    ],
)
def test_a_wrong_command_is_refused(wrong, said):
    with pytest.raises(Exception, match=said):
        check(wrong)


def known(name: str) -> bool:
    """Whether a dotted name is a setting, or else a function of a module: `finetune.draw`."""
    value: object = Config()
    for part in name.split("."):
        if not hasattr(value, part):
            module, _, function = name.rpartition(".")
            return any(f"def {function}(" in path.read_text() for path in (ROOT / "e2h").rglob(f"{module}.py"))
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(path):
    spans = re.findall(r"`([^`\n]+)`", path.read_text())
    sections = "|".join(vars(Config()))
    dotted = re.compile(rf"(?<![\w./-])((?:{sections})\.[a-z_.]+[a-z])(?![\w(/])")
    names = {name for span in spans for name in dotted.findall(span)}
    files = {name for name in names if re.search(r"\.(py|json|jsonl|html|yaml|log|txt|safetensors)$", name)}
    assert [name for name in sorted(names - files) if not known(name)] == []


def test_a_setting_that_does_not_exist_is_noticed():
    assert known("search.proxy.path")
    assert known("finetune.draw")
    assert not known("search.proxy.pth")
    assert not known("finetune.num_step")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_there(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_every_setting_can_be_listed():
    """The one command of the README that needs neither data nor a run."""
    [shown] = [one.command for one in COMMANDS if one.command.endswith("--cfg job --resolve")][:1]
    _, *words = shown.split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "epsilon: 10.0" in done.stdout
