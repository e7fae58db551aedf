"""Train on synthetic, test on real (sensitive); after sample.py."""

from entry import job

from e2h.curriculum.run import Run


def evaluate(run: Run) -> None:
    from e2h.distributed import stages

    stages.evaluate(run)


if __name__ == "__main__":
    job(evaluate)
