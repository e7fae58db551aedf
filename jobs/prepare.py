"""Private images in any supported layout -> canonical shards (sensitive)."""

from entry import job

from e2h.curriculum.run import Run


def prepare(run: Run) -> None:
    from e2h.distributed import stages

    stages.prepare(run)


if __name__ == "__main__":
    job(prepare)
