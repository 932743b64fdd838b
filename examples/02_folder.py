"""A folder of pictures, as `sanrt run` does it: `python examples/02_folder.py FOLDER RESULTS`.

What is done already is skipped, a picture that cannot be read stops no other.
"""

import sys

import sanrt

folder, results = sys.argv[1:3]
outcomes = sanrt.upscale_files(folder, results, scale=2, format="webp", quality=90)
for outcome in outcomes:
    match outcome:
        case sanrt.Written():
            print(f"{outcome.job.destination}: written in {sum(outcome.seconds.values()):.1f} s", *outcome.notes, sep="\n  ")
        case sanrt.Skipped():
            print(f"{outcome.job.destination}: there already")
        case sanrt.Failed():
            print(outcome.reason, file=sys.stderr)
sys.exit(any(isinstance(outcome, sanrt.Failed) for outcome in outcomes))
