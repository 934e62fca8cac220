# `make check` before each commit; CONTRIBUTING.md says when to run the others.
PYTEST = uv run pytest -n 2

.PHONY: check lint types test test-slow test-all compile transformers gpu docs gate

check: lint types test

lint:
	uv run ruff check .
	uv run ruff format --check .

types:
	uv run pyright

test:
	$(PYTEST)

test-slow:
	$(PYTEST) -m slow

compile:
	uv run --isolated --group compile pytest -n 2 -m compile

# What transformers reads and computes of the files that are written here.
transformers:
	uv run --isolated --with 'torch == 2.13.0' --with 'transformers == 5.24.0' pytest -m transformers tests/pretrained

# All tests that need no GPU.
test-all: test test-slow compile transformers

gpu:
	JAX_PLATFORMS=cuda python -m pytest -m gpu

# The benchmark page and its plots, from the JSON files alone.
docs:
	uv run fsa-jax bench --report benchmarks/results --out docs

gate:
	bash .ci/run
