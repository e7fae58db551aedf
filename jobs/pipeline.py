"""From private images to a publishable synthetic set: the whole curriculum, from easy to hard.

python jobs/pipeline.py data=mnist data.path=FOLDER privacy.epsilon=1
"""

from entry import job

from e2h.curriculum.run import Run


def pipeline(run: Run) -> None:
    from e2h.distributed.easy import release_easy_stages
    from e2h.distributed.stages import calibrate, evaluate, prepare, publish, sample, train

    prepared = prepare(run)  # sensitive: private images -> canonical shards
    plan = calibrate(run, prepared)  # noise multipliers that spend the target exactly; nothing is spent yet
    release_easy_stages(run, prepared, plan)  # e.g. noisy central images: the easy part of what there is to learn
    train(run, plan)  # warm-up on what they gave (free), then DP-SGD on the full set: the hard part
    sample(run)  # free: labels + one seed an image -> synthetic images
    evaluate(run)  # sensitive: train on synthetic, test on real
    publish(run)  # card, report, ledger, images, weights: only what is releasable


if __name__ == "__main__":
    job(pipeline)
