"""`python -m tests.mutants [WORDS …]`: say something else in a line, see a test fail; for every mutation of the table.

Those whose names have all the words are tried, in copies of this checkout, two at a time. Exits 1 if a test that
should have failed passed, or if tests fail without a mutation.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.mutants.table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "benchmarks", "docs", "scripts")
PROCESSES = 2
PASSED, FAILED = 0, 1  # of pytest's statuses; others say that the tests could not be run at all


@dataclass(frozen=True)
class Outcome:
    """What pytest's status was with the mutation in place, and the last lines it wrote."""

    mutation: Mutation
    status: int
    seconds: float
    told: str

    @property
    def verdict(self) -> str:
        return {FAILED: "died", PASSED: "SURVIVED"}.get(self.status, f"BROKEN (pytest's status {self.status})")


def main(words: list[str]) -> int:
    """Try them, print a line each as they end, and how many died."""
    chosen = [each for each in MUTATIONS if all(word.lower() in each.name.lower() for word in words)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(PROCESSES):
            trees.put(copy_of_checkout(Path(folder) / f"tree-{number}"))
        if not whole(trees, chosen):
            return 1
        with ThreadPoolExecutor(PROCESSES) as pool:
            outcomes = []
            for outcome in pool.map(lambda mutation: tried(mutation, trees), chosen):
                outcomes.append(outcome)
                print(f"{outcome.verdict:<9} {outcome.seconds:4.0f} s  {outcome.mutation.name}", flush=True)
    alive = [outcome for outcome in outcomes if outcome.status != FAILED]
    for outcome in alive:
        print(f"\n{outcome.mutation.name}: {outcome.mutation.file}; {outcome.mutation.tests}\n{outcome.told}")
    print(f"{len(outcomes) - len(alive)}/{len(outcomes)} died, {time.monotonic() - begin:.0f} s")
    return 1 if alive else 0


def copy_of_checkout(folder: Path) -> Path:
    """What tests need, in a new folder."""
    folder.mkdir()
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    return folder


def whole(trees: "Queue[Path]", chosen: list[Mutation]) -> bool:
    """Run all tests that are to fail, which must pass without a mutation; they are shared out among the trees."""
    tests = sorted({test for mutation in chosen for test in mutation.tests.split()})
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = [tests[number::PROCESSES] for number in range(PROCESSES)]
        found = list(pool.map(lambda share: run_tests(trees, share, None), [share for share in shares if share]))
    for status, told in found:
        if status != PASSED:
            print(f"tests fail without a mutation:\n{told}")
    return all(status == PASSED for status, _ in found)


def tried(mutation: Mutation, trees: "Queue[Path]") -> Outcome:
    """The tests' status with the mutation in place."""
    begin = time.monotonic()
    status, told = run_tests(trees, mutation.tests.split(), mutation)
    return Outcome(mutation, status, time.monotonic() - begin, told)


def run_tests(trees: "Queue[Path]", tests: list[str], mutation: Mutation | None) -> tuple[int, str]:
    """Pytest's status and last words in one of the trees, which is as it was afterwards."""
    tree = trees.get()
    try:
        if mutation is not None:
            (tree / mutation.file).write_text(mutated(mutation), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        command += ["-x"] if mutation else []
        done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
        return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])
    finally:
        if mutation is not None:
            shutil.copy2(ROOT / mutation.file, tree / mutation.file)
        trees.put(tree)


def mutated(mutation: Mutation) -> str:
    """The file's text with the mutation in it. Raises ValueError unless there is exactly one place for it."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.before!r} is {text.count(mutation.before)} times in {mutation.file}"
        )
    return text.replace(mutation.before, mutation.after)


def environment(tree: Path) -> dict[str, str]:
    """One thread, no network, and the tree's own package."""
    own = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
