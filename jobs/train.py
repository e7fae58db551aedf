"""Warm-up on what the easy stages released, then DP-SGD.

Give the settings of the whole run, the same to every stage; stages that are done are kept:

python jobs/train.py data=image_folder data.path=FOLDER data.name=pets privacy.epsilon=4 privacy.delta=1e-6
"""

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
