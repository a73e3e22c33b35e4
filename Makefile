# The two commands are `make demo` and `make test`. Each makes what it needs in .venv first.
#
#   PYTHON=python3.12 make test      use another Python (3.11 or newer)
#   make test ARGS="-k cache -x"     arguments for pytest; `make demo ARGS=...` for `hymba demo`
#   make test-gpu GPU_PYTHON=python3     the kernels' tests, with a Python that has torch and pytest
#
# On Linux, plain `pip install torch` brings several GB of CUDA libraries. For a CPU-only install:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt

# A worker a core, one thread each: on tiny tensors a second thread only waits for the first. More
# than 8 workers would only cost memory.
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell echo $$(( $(CORES) > 8 ? 8 : $(CORES) )))
THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu test-browser check wheel clean

help:  ## list the targets
	@echo "hymba: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.plot  ## make the environment, train a small model on this machine, show results
	@$(BIN)/hymba demo $(ARGS)

test: $(VENV)/.dev  ## make the environment and run the tests
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# One process: the tests share the device. GPU_PYTHON is for machines whose torch is their own.
GPU_PYTHON ?=
GPU_BIN := $(or $(GPU_PYTHON),$(BIN)/python)

test-gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev)  ## the tests that need a CUDA device
	@$(GPU_BIN) -c '$(NEED_CUDA)'
	$(GPU_BIN) -m pytest -m gpu $(ARGS)

# The browser is the system's, or any chromium that HYMBA_CHROMIUM names.
CHROMIUM := $(or $(HYMBA_CHROMIUM),$(shell command -v chromium chromium-browser google-chrome | head -1))

test-browser: need-chromium $(VENV)/.browser  ## the chat page's tests, in a real browser
	HYMBA_CHROMIUM=$(CHROMIUM) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest tests/browser $(ARGS)

.PHONY: need-chromium
need-chromium:
	@test -n "$(CHROMIUM)" || { echo "make test-browser: there is no chromium; install it (Debian:" \
	  "apt install chromium) or set HYMBA_CHROMIUM=/path/of/chromium" >&2; exit 1; }

check: $(VENV)/.dev  ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.dev  ## build dist/hymba-VERSION.whl
	$(BIN)/python -m build --wheel .

clean:  ## remove the environment, builds and caches (not runs/)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hymba tests -name __pycache__ -prune -exec rm -rf {} +

# The environment. A stamp is written last, so that an interrupted install starts over, and it is
# older than pyproject.toml or constraints.txt when those change.

NEED_311 := import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
  "hymba needs Python 3.11 or newer and $(PYTHON) is %d.%d: try PYTHON=python3.12 make" % v[:2])

NEED_CUDA := import sys, torch; sys.exit(None if torch.cuda.is_available() else \
  "make test-gpu: no CUDA device (torch %s of $(GPU_BIN) sees none)" % torch.__version__)

# A Python that was asked for and is not the one in .venv: make .venv anew.
ifneq "$(origin PYTHON)" "file"
ifneq "$(shell $(PYTHON) --version 2>/dev/null)" "$(shell cat $(VENV)/.python 2>/dev/null)"
$(VENV)/.python: anew
.PHONY: anew
endif
endif

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "hymba needs Python 3.11 or newer: there is no" \
	  "$(PYTHON) here; try PYTHON=/path/of/python make" >&2; exit 1; }
	@$(PYTHON) -c '$(NEED_311)'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PYTHON) --version > $@

# pip's own output is long: show what is large, and everything that goes wrong.
comma := ,
define install
@echo "installing hymba[$(1)] into $(VENV) (the first time this takes minutes; torch is large)"
@set -o pipefail; PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
  $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[$(1)]' \
  | { grep --line-buffered -oE '(Downloading|Using cached) .* MB\)|^Installing collected packages' || true; }
endef

$(VENV)/.plot: $(VENV)/.python $(PINS)
	$(call install,plot)
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(PINS)
	$(call install,dev)
	@touch $(VENV)/.plot $@

$(VENV)/.browser: $(VENV)/.dev
	$(call install,dev$(comma)browser)
	@touch $@
