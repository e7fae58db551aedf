"""From private images to a publishable synthetic set: the whole curriculum, from easy to hard.

python jobs/pipeline.py data=mnist data.path=FOLDER privacy.epsilon=1
"""

from entry import job

from e2h.curriculum.run import Run


def pipeline(run: Run) -> None:
    from e2h.distributed.stages import calibrate, evaluate, prepare, publish, release_central_images, sample, train

    prepared = prepare(run)  # sensitive: private images -> canonical shards
    plan = calibrate(run, prepared)  # noise multipliers that spend the target exactly; nothing is spent yet
    release_central_images(run, prepared, plan)  # event 1: noisy central images, the easy stage
    train(run, plan)  # warm-up on them (free), then event 2: DP-SGD on the full set, the hard stage
    sample(run)  # free: labels + one seed an image -> synthetic images
    evaluate(run)  # sensitive: train on synthetic, test on real
    publish(run)  # card, report, ledger, images, weights: only what is releasable


if __name__ == "__main__":
    job(pipeline)
