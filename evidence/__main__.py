"""Collect the raw rows of studies that ran, and write all pages anew from the rows that are there.

    python -m afterglow.evidence glow       # after `afterglow run evidence/glow.yaml`
    python -m afterglow.evidence            # pages only

Run it at the root of the repository: rows lie in evidence/results, pages in docs/evidence.
"""

import argparse
import sys
from pathlib import Path

from ..core.errors import AfterglowError
from ..core.run_folder import write_atomic
from .page import overview, replace_overview, study_figure, study_page
from .results import Results, collect, read_results
from .study import RECIPES, Study, read_study

PAGES = Path("docs/evidence")


def studies() -> dict[str, tuple[Study, Results | None]]:
    """Return name -> statement and rows of every study, in the order of the overview."""
    names = sorted(path.stem for path in Path("recipes/evidence").glob("*.yaml") if "\nstudy:" in path.read_text())
    return {name: (read_study(name), read_results(name)) for name in names}


def pages(found: dict[str, tuple[Study, Results | None]]) -> dict[Path, str]:
    """Return file -> text of every page and figure, and of the two pages that hold an overview."""
    texts: dict[Path, str] = {}
    for name, (study, results) in found.items():
        if results is not None:
            texts[PAGES / f"{name}.md"] = study_page(name, study, results)
            texts[PAGES / f"{name}.svg"] = study_figure(study, results)
    for path, folder, all_studies in ((PAGES / "README.md", "", True), (Path("README.md"), f"{PAGES}/", False)):
        texts[path] = replace_overview(path.read_text(encoding="utf-8"), overview(found, folder, all_studies))
    return texts


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m afterglow.evidence", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="STUDY", help="Studies whose run folders are collected first.")
    try:
        for name in parser.parse_args(arguments).names:
            collect(name, RECIPES.format(name), read_study(name).arms)
        for path, text in pages(studies()).items():
            write_atomic(path, text)
            print(path)
    except AfterglowError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
