"""The release folder and the report; after sample.py."""

from entry import job

from e2h.curriculum.run import Run


def publish(run: Run) -> None:
    from e2h.distributed import stages

    stages.publish(run)


if __name__ == "__main__":
    job(publish)
