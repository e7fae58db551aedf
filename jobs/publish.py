"""The release folder and the report; after sample.py.

Give the settings of the whole run, the same to every stage; stages that are done are kept:

python jobs/publish.py data=image_folder data.path=FOLDER data.name=pets privacy.epsilon=4 privacy.delta=1e-6
"""

from entry import job

from e2h.curriculum.run import Run


def publish(run: Run) -> None:
    from e2h.distributed import stages

    stages.publish(run)


if __name__ == "__main__":
    job(publish)
