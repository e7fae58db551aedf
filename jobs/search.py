"""Chooses settings by trials inside the one budget, and publishes the best: `search.privacy` says how it is paid for.

python jobs/search.py search.privacy=selection search.expected_trials=8 dry_run=true
"""

from entry import job

from e2h.curriculum.run import Run


def search(run: Run) -> None:
    from e2h.distributed.easy import release_easy_stages
    from e2h.distributed.search import search_trials
    from e2h.distributed.stages import calibrate, evaluate, prepare, publish, sample, train

    prepared = prepare(run)  # sensitive: private images -> canonical shards
    run = search_trials(run, prepared)  # the choice, and all that its trials cost; from here on, the best of them
    plan = calibrate(run, prepared)  # what everything together costs
    release_easy_stages(run, prepared, plan)  # done already, unless the trials read public images alone
    train(run, plan)  # the same
    sample(run)  # free: labels + one seed an image -> synthetic images
    evaluate(run)  # sensitive: train on synthetic, test on real; after the choice, which never sees it
    publish(run)  # card, report, ledger, images, weights: only what is releasable


if __name__ == "__main__":
    job(search, searches=True)
