"""What every job shares: compose the configuration, turn refusals into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from usage import usage
from words import check_words, quoted

from e2h.binding import differences
from e2h.config import Config, expect
from e2h.curriculum.listing import remarks
from e2h.curriculum.run import Run, open_run, run_root
from e2h.curriculum.search import check_search
from e2h.distributed.console import warn
from e2h.distributed.failures import RunFailedError, budget_refusal, causes, noted, refusal
from e2h.distributed.preflight import dry_run, search_dry_run
from e2h.distributed.session import session
from e2h.validation import validate

DONE, FAULT, BAD_INPUT, NO_BUDGET, INTERRUPTED = 0, 1, 2, 3, 130


def job(stages: Callable[[Run], None], searches: bool = False) -> None:
    """Runs `stages` on the run that the command line describes, and exits as `configured` says.

    Args:
      stages: what the job does.
      searches: whether it is the search job, which alone takes `search.privacy`.
    """
    configured(lambda config: _run(config, stages, searches))


def configured(action: Callable[[Config], int]) -> None:
    """Calls `action` with the configuration of the command line, and exits with its code, or with one of these:

    0 done; 2 bad configuration or input; 3 the privacy budget refuses; 130 Ctrl-C; 1 anything else (one line, and
    the tracebacks in the run's `failure.txt`; outside a run with its traceback).
    """
    if {"-h", "--help"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
        print(usage(f"jobs/{Path(sys.argv[0]).name}", sys.modules["__main__"].__doc__ or ""))
        sys.exit(DONE)
    code = DONE
    ConfigStore.instance().store("schema", Config)

    # Raw exceptions from Hydra: they are explained in one line here instead of its page.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path="pkg://e2h.conf", config_name="config")
    def compose(values: DictConfig) -> None:
        composed.append(values)

    try:
        sys.argv[1:] = quoted(sys.argv[1:])
        check_words(sys.argv[1:])
        compose()
        # Empty after --help or --cfg, which Hydra answers itself.
        for values in composed:
            code = action(_checked(values))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(_explain(error), BAD_INPUT)
    except KeyboardInterrupt:
        _refuse("stopped; the same command goes on", INTERRUPTED)
    except RunFailedError as error:
        _refuse(str(error), FAULT)
    except Exception as error:
        if message := budget_refusal(error):
            _refuse(message, NO_BUDGET)
        if message := refusal(error):
            _refuse(message, BAD_INPUT)
        raise
    sys.exit(code)


def _checked(values: DictConfig) -> Config:
    config = OmegaConf.to_object(values)
    assert isinstance(config, Config)
    # `+key=value` forces a key past the schema: it is refused as any other typo.
    given: Any = OmegaConf.to_container(values)
    for name, value, _ in differences(given, asdict(config)):
        expect(False, name, value, "a known key (see --cfg job)")
    return validate(config)


def _run(config: Config, stages: Callable[[Run], None], searches: bool) -> int:
    if searches:
        check_search(config)
    else:
        mode = config.search.privacy
        expect(mode is None, "search.privacy", mode, "no value here", "run jobs/search.py with it")
    if config.dry_run:
        (search_dry_run if searches else dry_run)(config, run_root(config))
        return DONE
    warn(remarks(Run(run_root(config), config)))
    with open_run(config) as run, noted(run.root), session(config.scaling, run.scratch / "ray.log"):
        stages(run)
    return DONE


def _explain(error: Exception) -> str:
    """The first lines of the error and of what caused it: Hydra names the key in one and the reason in the other."""
    chain = [one for one in causes(error) if isinstance(one, (HydraException, OmegaConfBaseException))]
    lines = [str(one).strip().splitlines()[0].rstrip(".") for one in chain]
    return "; ".join(list(dict.fromkeys(lines))[:2]) + "; expected a key and value of the configuration (see --cfg job)"


def _refuse(message: str, code: int) -> None:
    print(f"e2h: {message}", file=sys.stderr, flush=True)
    # Ray has been stopped by its session; nothing else may talk after the one line.
    sys.exit(code)
