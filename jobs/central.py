"""The easy stages: noisy central images, or what else `curriculum` asks for.

Give the settings of the whole run, the same to every stage; stages that are done are kept:

python jobs/central.py data=image_folder data.path=FOLDER data.name=pets privacy.epsilon=4 privacy.delta=1e-6
"""

from entry import job

from e2h.curriculum.run import Run


def central(run: Run) -> None:
    from e2h.distributed import stages
    from e2h.distributed.easy import release_easy_stages

    prepared = stages.prepare(run)
    release_easy_stages(run, prepared, stages.calibrate(run, prepared))


if __name__ == "__main__":
    job(central)
