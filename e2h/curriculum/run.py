"""The run directory: where each stage's files lie, what the run is bound to, and which stages are done."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from e2h.binding import binding, digest
from e2h.config import PRODUCTS, Config, expect, run_name
from e2h.curriculum.environment import check_float32
from e2h.curriculum.lease import SURELY_STALE_S, only_driver
from e2h.curriculum.notes import check_binding, describe, usable
from e2h.data.filesystem import write_bytes
from e2h.data.remote import Place, S3Path, abort_uploads, place, scratch_folder
from e2h.errors import InputError
from e2h.privacy.accounting import epsilon
from e2h.privacy.dataset_ledger import DatasetLedger
from e2h.privacy.keys import TEST_SECRET, create_secret, create_secret_object, derive_key, load_secret
from e2h.privacy.ledger import Budget, Ledger
from e2h.privacy.logs import ObjectLog, open_log
from e2h.privacy.plan import PrivacyPlan, code_digest


@dataclass(frozen=True)
class Run:
    """One run in a folder or a bucket; every artefact's path comes from here.

    Attributes:
      root: the run's directory.
      owner: token of the driver in the ledger; it travels to the workers. None: this copy only reads.
      common: of a trial of a search: the folder whose `prepared/` all trials share.
    """

    root: Place
    config: Config
    owner: str | None = None
    common: Place | None = None

    @property
    def prepared(self) -> Place:
        return (self.common or self.root) / "prepared"

    @property
    def mapped(self) -> Path:
        """Where this machine keeps the training images that workers map."""
        return self.prepared if isinstance(self.prepared, Path) else self.scratch / "prepared"

    def easy(self, stage: str) -> Place:
        """What an easy stage of the curriculum released, and the images it gave."""
        return self.root / stage

    @property
    def central(self) -> Place:
        return self.easy("central")

    @property
    def checkpoints(self) -> Place:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Place:
        return self.checkpoints / "model.safetensors"

    @property
    def synthetic(self) -> Place:
        return self.root / "synthetic"

    @property
    def evaluation(self) -> Place:
        return self.root / "evaluation.json"

    @property
    def release(self) -> Place:
        return self.root / "release"

    @property
    def refusal(self) -> Place:
        """Where this driver's workers leave what they refused; those of an older driver leave it elsewhere."""
        return self.root / f"refused-{self.owner}.json"

    @property
    def scratch(self) -> Path:
        """A folder of this very machine for files that the run can do without: Ray's log, unpacked training images."""
        return self.root if isinstance(self.root, Path) else scratch_folder(self.root)

    @property
    def ledger(self) -> Ledger:
        """The run's own ledger, in the run directory unless `ledger.path` puts it elsewhere."""
        settings = self.config.ledger
        own = settings.path if settings.scope == "run" and settings.path else self.root / "ledger.jsonl"
        return Ledger(open_log(own), self.owner, witness_path(self.root))

    @property
    def dataset_ledger(self) -> DatasetLedger | None:
        """The ledger that all runs on the data set share; None with ledger.scope=run."""
        settings, data = self.config.ledger, self.config.data
        if settings.scope != "dataset" or settings.epsilon is None:
            return None
        shared = settings.path or self.root.parent / ".ledgers" / f"{data.name}.jsonl"
        folder = self.root.parent / ".secrets"
        return DatasetLedger(open_log(shared), folder, data.name, settings.epsilon, self.config.privacy.delta)

    def shared_plan(self, plan: PrivacyPlan) -> PrivacyPlan:
        """The plan with what all runs on the data set hold, this one included; writes nothing.

        Raises:
          BudgetError: if that exceeds the data set's budget.
        """
        shared = self.dataset_ledger
        if shared is None or self.charged_to_its_end():
            return plan
        return replace(plan, shared=shared.check(self._holder(), self.root.name, plan.releases))

    def open_budget(self, budget: Budget) -> None:
        """Opens the run's budget, and holds all of it in the data set's; spends nothing, and twice is once.

        Call it before any charge: one that was interrupted after the first of the two makes up for the second.

        Raises:
          InputError, BudgetError: as `Ledger.open`, `DatasetLedger.hold` and `check_float32`.
        """
        check_float32()
        ledger, shared = self.ledger, self.dataset_ledger
        ledger.open(budget, lambda releases, delta: epsilon(releases, delta).epsilon)
        # A run that was charged to its end holds already, and can't spend any more; its key may be deleted.
        if shared is not None and not self.charged_to_its_end():
            shared.hold(self._holder(), self.root.name, budget.planned)

    def charged_to_its_end(self) -> bool:
        """Whether the whole plan is paid, so that nothing more can be."""
        state = self.ledger.state()
        return state.budget is not None and set(state.charged()) == set(state.budget.planned)

    def _holder(self) -> str:
        """Names this run's ledger and secret to the data set's ledger; empty before the ledger is opened.

        A copy of the run directory has another secret, so its noise is its own, and it holds for itself.
        """
        identity = self.ledger.state().identity
        return derive_key(self.secret(), "hold", identity).hex() if identity else ""

    @property
    def secret_reference(self) -> str:
        """Where the master secret lies: apart from the run directory, which people copy and publish from."""
        return self.config.privacy.secret or f"file:{self.root.parent / '.secrets' / (self.root.name + '.key')}"

    def secret(self) -> bytes:
        """The master secret; in test mode a published one. A trial's is derived, so that trials are independent."""
        secret = TEST_SECRET if self.config.privacy.test_mode else load_secret(self.secret_reference)
        return secret if self.common is None else derive_key(secret, "trial", self.root.name)

    @property
    def training_binding(self) -> str:
        """Digest of all settings that the weights depend on."""
        kept = ("data", "model", "privacy", "curriculum", "central", "warmup", "frequency", "finetune", "seed")
        return digest({key: value for key, value in binding(self.config).items() if key in kept})

    def domain(self, release: str, event: dict[str, Any], dataset_digest: str, fingerprint: str) -> str:
        """Names everything that determines a release bit for bit (see `e2h.privacy.ledger`).

        Also the release, since two may have equal events, the run, and of a trial the search: where several have one
        secret, their noise is their own all the same.
        Keyed, because the ledger keeps it: without the secret it tells nothing about the data.
        """
        names = [self.root.name, self.common.name if self.common else ""]
        parts = [names, self.training_binding, code_digest(), release, event, dataset_digest, fingerprint]
        return derive_key(self.secret(), "domain", digest(parts)).hex()

    def done(self, stage: str) -> bool:
        """Whether a stage of this very configuration has finished and what it made is there; a damaged mark is none."""
        path = self._marker(stage)
        if not path.exists() or not self._product(stage).exists():
            return False
        with suppress(ValueError, KeyError, TypeError):
            return bool(json.loads(path.read_text())["binding"] == digest(binding(self.config)))
        return False

    def bind(self) -> None:
        """From now on only this configuration may go on with the run: what was prepared depends on it."""
        write_bytes(self.root / "binding.json", json.dumps(binding(self.config), indent=2).encode())

    def mark_done(self, stage: str) -> None:
        content = json.dumps({"stage": stage, "binding": digest(binding(self.config))})
        write_bytes(self._marker(stage), content.encode())

    def _marker(self, stage: str) -> Place:
        return self._product(stage).parent / "_SUCCESS.json"

    def _product(self, stage: str) -> Place:
        root = self.prepared.parent if stage == "prepare" else self.root
        return root / PRODUCTS[stage]


def witness_path(root: Place) -> Place:
    """What was last seen of a run's ledger; apart from the run directory."""
    return root.parent / ".secrets" / f"{root.name}.head"


def witnessed(storage: Place) -> list[Place]:
    """The roots of the runs in a storage whose ledgers were seen, whether they are still there or not."""
    return [storage / path.stem for path in (storage / ".secrets").glob("*.head") if not path.name.startswith(".")]


def run_root(config: Config) -> Place:
    """Where the run lies.

    Raises:
      InputError: if `run.storage` is neither a folder nor s3://, or a run in a bucket has no secret of its own.
    """
    storage, secret = config.run.storage, config.privacy.secret
    try:
        root = place(storage) / run_name(config)
    except InputError as error:
        raise InputError(f"run.storage={storage}: expected a folder, or s3://bucket/prefix") from error
    if isinstance(root, S3Path) and not config.privacy.test_mode:
        apart = secret is not None and not secret.startswith(f"{str(root.parent).rstrip('/')}/")
        expectation = "a secret that every machine can read and that lies apart from run.storage"
        advice = "set privacy.secret=env:NAME (on all machines) or s3://other-bucket/key (made where it is missing)"
        expect(apart, "privacy.secret", secret, expectation, advice)
    return root


def make_root(config: Config) -> Place:
    """The run's directory, made where it is missing; nothing in it.

    Raises:
      InputError: if it can't be made, or holds a run of another configuration.
    """
    root = run_root(config)
    check_binding(root, config)
    with usable(config):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


@contextmanager
def open_run(config: Config, common: Place | None = None) -> Iterator[Run]:
    """Opens or resumes the run of a configuration, alone.

    Args:
      config: validated settings.
      common: for a trial of a search, see `Run.common`.

    Raises:
      InputError: if the directory can't be used or holds a run of another configuration, or another process runs it.
    """
    run = Run(make_root(config), config, secrets.token_hex(16), common)
    with ExitStack() as held:
        with usable(config):
            # Of a trial's drivers one that still holds it is dead: the search alone starts another.
            held.enter_context(only_driver(run.root, SURELY_STALE_S if common is not None else 0.0))
            _begin(run)
        yield run


def _begin(run: Run) -> None:
    check_binding(run.root, run.config)
    if isinstance(run.root, S3Path):
        abort_uploads(run.root)
    for folder in (".secrets", ".ledgers"):
        (run.root.parent / folder).mkdir(exist_ok=True, mode=0o700)
    _create_secret(run)
    run.secret()
    for log in (run.ledger.chain.log, *([run.dataset_ledger.chain.log] if run.dataset_ledger else [])):
        if isinstance(log, ObjectLog):
            log.probe()
    describe(run.root, run.config)


def _begun(run: Run) -> bool:
    """Whether there is noise that the run would have to draw again."""
    return witness_path(run.root).exists() and not run.weights.exists() and run.ledger.budget() is not None


def _create_secret(run: Run) -> None:
    """Where the user named a file or a variable, it is his to make."""
    given, path = run.config.privacy.secret, Path(run.secret_reference.removeprefix("file:"))
    if given is None and not run.config.privacy.test_mode and not path.exists():
        if _begun(run):
            raise InputError(
                f"{path}: expected the secret that this run began with, for another one draws other noise; restore it, "
                f"or choose a new name: run.name={run.root.name}-2"
            )
        create_secret(path)
    elif given is not None and given.startswith("s3://") and not _begun(run):
        create_secret_object(given)
