"""`python -m vcrd plan`."""

from __future__ import annotations

import argparse
import json

from vcrd.plan.options import scenario_of

SUMMARY = "what each payload costs for given models and layouts, and which is the best"
DESCRIPTION = """\
For two models and their layouts: the bytes that each payload moves, its memory on either side, how many teacher GPUs
are needed so that the student never waits, and which payload is the best. Bytes are exact, as the link counts them;
seconds come from the peaks and shares of them that are printed as assumed.

The best payload needs at most a tenth of the student GPU's memory and keeps no rank's network busy for more than half
of the time. Of such, it is the one with the shortest step, where 8 bits count 5 % longer than they are and top-k 25 %,
for their error. Of equals, the one that costs the student the least time.
"""


def run(options: argparse.Namespace) -> tuple[str, int]:
    """What is to be printed, and the exit status; OptionError of one sentence for a wrong option."""
    scenario = scenario_of(options)
    # Here, for they import torch, and a wrong option should not have to wait for that.
    from vcrd.plan.choice import choose
    from vcrd.plan.costs import costs
    from vcrd.plan.report import plain, text_of

    found = costs(scenario)
    choice = choose(found, scenario.student_gpu.memory)
    if options.json:
        return json.dumps(plain(scenario, found, choice), indent=1), 0
    return text_of(scenario, found, choice), 0
