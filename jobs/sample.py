"""Synthetic images from the released weights; after train.py."""

from entry import job

from e2h.curriculum.run import Run


def sample(run: Run) -> None:
    from e2h.distributed import stages

    stages.sample(run)


if __name__ == "__main__":
    job(sample)
