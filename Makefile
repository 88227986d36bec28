# `make demo` and `make test` need nothing but Python 3.11+ and a package index: each sets up first.
# A smaller install on Linux, with the CPU build of torch:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo readme docs test lint release-check setup clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scaleprop needs Python 3.11+; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)  ## compile a sentence encoder with every recipe; writes demo/
	@$(BIN)/python -m benchmarks.demo

readme: $(STAMP)  ## put the last demo's table into README.md
	@$(BIN)/python -m benchmarks.readme_table

docs: $(STAMP)  ## the documentation, strict, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# One thread a worker: they would fight otherwise.
test: $(STAMP)  ## ruff, pyright, the documentation, pytest
	@$(MAKE) --no-print-directory -j$(JOBS) lint docs
	@OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest \
		-n $(JOBS) --dist worksteal

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/pyright

release-check: $(STAMP)  ## build, check contents and licences, install and test the wheel elsewhere
	@$(BIN)/python -m release.check $(if $(TORCH),--torch $(TORCH))

clean:
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .ruff_cache
