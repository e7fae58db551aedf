"""The easy stage: noisy central images (event 1)."""

from entry import job

from e2h.curriculum.run import Run


def central(run: Run) -> None:
    from e2h.distributed import stages

    prepared = stages.prepare(run)
    stages.release_central_images(run, prepared, stages.calibrate(run, prepared))


if __name__ == "__main__":
    job(central)
