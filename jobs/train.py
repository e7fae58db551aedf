"""Warm-up on the central images, then DP-SGD (event 2)."""

from entry import job

from e2h.curriculum.run import Run


def train(run: Run) -> None:
    from e2h.distributed import stages

    prepared = stages.prepare(run)
    plan = stages.calibrate(run, prepared)
    stages.release_central_images(run, prepared, plan)
    stages.train(run, plan)


if __name__ == "__main__":
    job(train)
