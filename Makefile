.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format peers routers bench lock clean

PY := .venv/bin/python

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## .venv with everything that demo and test need (done by them, too)
	@bash scripts/setup.sh

demo: setup ## real vLLM prefill and decode engines on this machine (MODEL=..., XPYD=2P2D)
	@$(PY) -m mooncake_connector demo

test: setup ## every layer of tests, quickest first (LAYERS="unit proxy" for some)
	@bash scripts/test.sh $(LAYERS)

lint: setup ## ruff and mypy --strict
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup ## rewrite the code in the house format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

peers: setup ## the connectors we compare with, in an environment of their own
	@bash scripts/peers.sh

routers: setup ## the proxies we compare with, in an environment of their own
	@bash scripts/routers.sh

bench: setup peers ## every benchmark, results to benchmarks/results
	@mkdir -p benchmarks/results
	@$(PY) benchmarks/transfer.py --json benchmarks/results/transfer-cpu.json
	@$(PY) benchmarks/ttft.py --json benchmarks/results/ttft-cpu.json

lock: setup ## choose newest versions again: requirements/cpu.txt
	@bash scripts/lock.sh

clean: ## remove environments and caches
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
