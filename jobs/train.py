"""Warm-up on what the easy stages released, then DP-SGD."""

from entry import job

from e2h.curriculum.run import Run


def train(run: Run) -> None:
    from e2h.distributed import stages
    from e2h.distributed.easy import release_easy_stages

    prepared = stages.prepare(run)
    plan = stages.calibrate(run, prepared)
    release_easy_stages(run, prepared, plan)
    stages.train(run, plan)


if __name__ == "__main__":
    job(train)
