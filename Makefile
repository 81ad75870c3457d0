# make quickstart | make test | make bench | make speedrun | make interop | make browser | make faults | make mutants |
# make test-machines | make clean | make help
#
# Needs Python >= 3.11 and make; everything else goes into .venv. To use another interpreter: make PYTHON=python3.12 …
# On Linux PyPI's torch carries CUDA (several GB). The CPU build, a tenth of that, comes from PyTorch's CPU index, whose
# address is on its installation page: set PIP_EXTRA_INDEX_URL to it when calling make.

SUPPORTED = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made at first import, and only for what is imported: compiling all of torch doubles the installation.
# Containers often forbid it, and then every start of torch takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
DECLARED := pyproject.toml constraints.txt
# Two test processes, one thread each, a module's tests in one of them, as they share what its fixtures made; no test
# may reach for the network.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-machines bench speedrun interop browser faults mutants lint clean

help:
	@echo 'make quickstart   install into $(VENV), then train the small model of the recipe "quickstart" (about 3 minutes)'
	@echo 'make test         install with the development tools, then lint, types and every test but the fault matrix'
	@echo 'make faults       try everything that a run should survive, and write docs/reliability.md (about 10 minutes)'
	@echo 'make test-machines   the tests on the machines that this one can play: fewer vector instructions, other threads,'
	@echo '                  other versions of Python and torch; written into docs/reliability.md (about two hours)'
	@echo 'make mutants      change one line after the other, and see a test fail for each (about 10 minutes)'
	@echo 'make bench        measure everything on this machine, others beside us (about 13 minutes); arguments in BENCH_ARGS'
	@echo 'make speedrun     quickstart against nanoGPT by time (about 15 minutes; docs/speedrun.md); arguments in SPEEDRUN_ARGS'
	@echo 'make interop      installs lm-eval (230 MB), llama.cpp (100 MB), TransformerLens, trl and more; tests of them, of Trainer,'
	@echo '                  peft and ONNX, and the tables of docs/interop.md'
	@echo 'make browser      try the pages of serve, explain and compare in headless Chromium (as make test does, where there is one)'
	@echo 'make lint         only ruff and mypy'
	@echo 'make clean        remove $(VENV) and caches; trained models under runs/ are kept'
	@echo
	@echo "On Linux without a GPU, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index (see its installation page): much smaller."

quickstart: $(VENV)/.installed
	$(BIN)/swamla quickstart

# Without the fault matrix, a twelfth of the time of all tests: `make faults` tries it, more often.
test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --ignore tests/faults/test_matrix.py

test-machines: $(VENV)/.installed-dev
	$(BIN)/python -m tests.machines

faults: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m tests.faults

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants $(MUTANTS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.cpu $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

speedrun: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.quality $(SPEEDRUN_ARGS)

# Installs no browser, which Debian has, and nothing else where there is none.
browser:
	@command -v chromedriver >/dev/null && command -v chromium >/dev/null || { \
		echo 'pages are tried in Chromium, which is missing: apt-get install chromium chromium-driver' >&2; exit 2; }
	@$(MAKE) --no-print-directory $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/serve/test_page.py tests/interpret/test_page.py tests/study/test_page.py \
		tests/study/test_two_results.py tests/study/test_nanogpt_mla.py

# lm-eval and what it needs are 230 MB, llama.cpp 100, so `make test` goes without them, TransformerLens and ONNX, whose
# graphs take seconds for each mixer (test_onnx.py: five minutes of one core), and skips what needs them, with that reason.
interop: $(VENV)/.installed-dev
	@$(INSTALL) --editable '.[dev,interop,lens,onnx]'
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/evaluate tests/interop/test_saved.py tests/interop/test_gguf.py \
	    tests/interop/test_peft_and_trl.py tests/interop/test_onnx.py tests/serve/test_together.py \
	    tests/serve/test_hostile.py tests/interpret/test_transformer_lens.py
	$(TEST_ENV) $(BIN)/python -m tests.serve.hostile --requests 1000 --schemathesis 5
	$(TEST_ENV) $(BIN)/python -m tests.interop $(INTEROP_ARGS)

clean:
	rm -rf $(VENV) .venv-machines .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after an installation that succeeded, so an interrupted one is taken up again.
$(VENV)/.installed: $(DECLARED) $(VENV)/.created
	@echo 'installing swamla into $(VENV) …'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(DECLARED) $(VENV)/.created
	@echo 'installing swamla and its development tools into $(VENV) …'
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# Python is linked into the environment before pip is put there: only the stamp says that it is whole.
$(VENV)/.created:
	@test -n '$(PYTHON)' || { echo 'swamla needs Python >= 3.11, and none was found; name one: make PYTHON=/path/to/python3.12 …' >&2; exit 2; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo 'swamla needs Python >= 3.11; $(PYTHON) is older' >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $@
