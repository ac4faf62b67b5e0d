"""Writes what README.md and the documents say of the speed, between their markers, from a result of `bench`.

What docs/fisher.md says comes from fisher/results.json beside it, and docs/optimizers.md from optimizers/results.json.
Results of a GPU go to docs/gpu.md.

python benchmarks/readme.py benchmarks/results/NAME/results.json [--check]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ewc_fast.bench import optimizers, report
from ewc_fast.bench.fisher import report as fisher_report

ROOT = Path(__file__).resolve().parent.parent
COST = "docs/cost.md"
DOCUMENT = "docs/performance.md"
GPU = "docs/gpu.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes, or with ``--check`` compares. Returns the exit code: 1 where a text differs or has no markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose README.md and docs are meant")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a text differs")
    options = parser.parse_args(argv)
    results = report.read_json(options.results)
    folder = Path(os.path.relpath(options.results.resolve().parent, options.root.resolve())).as_posix()
    fisher, steps = (options.results.parent / name / "results.json" for name in ("fisher", "optimizers"))
    if report.main_workload(results)["device"] == "cuda":
        measured = [report.performance_section(results)]
        if steps.exists():
            measured += ["**The optimizers**", optimizers.section(optimizers.read_json(steps))]
        if fisher.exists():
            language = fisher_report.read_json(fisher)["language"]
            measured += ["**The Fisher of a language model**", fisher_report.language_table(language)]
        return write({GPU: "\n\n".join(measured)}, options)
    sections = {
        "README.md": report.readme_section(results, COST),
        COST: report.cost_section(results, f"../{folder}", Path(DOCUMENT).name),
        DOCUMENT: report.performance_section(results),
    }
    if fisher.exists():
        sections["docs/fisher.md"] = fisher_report.summary(fisher_report.read_json(fisher), f"../{folder}/fisher")
    if steps.exists():
        sections["docs/optimizers.md"] = optimizers.section(optimizers.read_json(steps))
    return write(sections, options)


def write(sections: Mapping[str, str], options: argparse.Namespace) -> int:
    """The sections by file, each between its markers. Returns the exit code."""
    for name, section in sections.items():
        path = options.root / name
        before = path.read_text()
        try:
            after = report.replace_section(before, section)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if options.check and after != before:
            print(f"{path} is not what {options.results} says: run this without --check", file=sys.stderr)
            return 1
        if not options.check:
            path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
