"""Recommends an expected batch and a number of DP-SGD steps: for scaling.hours on scaling.num_workers workers like
this machine, or, without hours, for the work that the settings ask for; and says roughly how long a run takes. No
image is read, and nothing is spent.

python jobs/plan.py data=mnist data.path=FOLDER privacy.epsilon=1 scaling.hours=1
"""

from dataclasses import replace

from entry import DONE, configured

from e2h.config import Config
from e2h.privacy.rounding import delta_in_words


def plan(config: Config) -> int:
    from e2h.curriculum.listing import listed, public_records
    from e2h.curriculum.speed import forecast, gradients_per_second
    from e2h.distributed.console import say
    from e2h.privacy.schedule import explained, recommended, schedules, table

    source = listed(config)
    num_records = public_records(config, source)
    gradients: float = config.finetune.num_steps * config.finetune.expected_batch_size
    draws, workers = config.finetune.noise_multiplicity, config.scaling.num_workers
    speed = gradients_per_second(config, len(source.class_names)) * workers
    say("speed", f"{speed:.0f} gradients/s of {draws} draws each on {workers} workers like this machine")
    if config.scaling.hours is not None:
        gradients = speed * config.scaling.hours * 3600
    found = schedules(config, num_records, gradients)
    best = recommended(found)
    target = f"epsilon {config.privacy.epsilon:g} at delta {delta_in_words(config.privacy.delta)}"
    say("plan", f"N {num_records}, {target}, {gradients:.3g} gradients")
    for line in table(found, best):
        say("", line)
    say("advice", explained(found, best))
    say("", f"finetune.expected_batch_size={best.expected_batch_size} finetune.num_steps={best.num_steps}")
    steps = replace(config.finetune, expected_batch_size=best.expected_batch_size, num_steps=best.num_steps)
    times = forecast(replace(config, finetune=steps), speed)
    rough = ", ".join(f"{stage} {minutes:.1f} min" for stage, minutes in times.items())
    say("time", f"roughly {rough}; preparing, evaluating and starting Ray besides")
    return DONE


if __name__ == "__main__":
    configured(plan)
