"""Runs a program of the project on the null GPU: python -m tests.cuda run --opt demo.json --debug

Prints how often each line of a training step or validation batch waits or copies, and launches and memory.
"""

import os
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from tests.cuda.build import missing, run_cases

if reason := missing():
    sys.exit(reason)
with tempfile.TemporaryDirectory() as folder:
    case, devices = {"program": sys.argv[1], "words": sys.argv[2:]}, int(os.environ.get("NULLGPU_COUNT", 1))
    found = run_cases({"case": case}, Path(folder), devices=devices)["case"]
phases = defaultdict(list)
for step in found["steps"]:
    phases[step["phase"]].append(step)
for phase, steps in phases.items():
    launches = median(step["launches"] for step in steps)
    print(f"\n{len(steps)} x {phase}: {launches:g} kernel launches; in each, on average:")
    events = Counter(tuple(event) for step in steps for event in step["events"])
    for (call, memory, size, line, caller), count in events.most_common():
        print(f"{count / len(steps):7.2f} {call:<24} {memory:<8} {size:>11,} B  {line} <- {caller}")
print(f"peak memory in MiB: {', '.join(f'{peak / 2**20:.0f}' for peak in found['peaks'])}")
sys.exit(found["error"])
