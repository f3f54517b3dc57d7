PYTHON ?= python3
RUN = .venv/bin/python
# Side by side: these need one core and no server.
KERNEL_TESTS = tests/kernels
OTHER_TESTS = --ignore tests/kernels

.PHONY: demo serve test lint bench-smoke setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         start a server, hold a chat whose pages are evicted and recalled, compare with stock"
	@echo "make serve        start a server and keep it up"
	@echo "make test         lint and the whole suite"
	@echo "make lint         ruff, mypy"
	@echo "make bench-smoke  stock SGLang and arkvale in turn: three cases, about 4 minutes"

setup:
	@$(PYTHON) setup_env.py

demo: setup
	@$(RUN) examples/demo.py

serve: setup
	@$(RUN) examples/serve.py

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

test: setup lint
	@$(PYTHON) setup_env.py --release 0.5.17
	@$(PYTHON) setup_env.py --release 0.5.23
	@log=$$(mktemp); \
	$(RUN) -m pytest $(KERNEL_TESTS) >$$log 2>&1 & kernels=$$!; \
	$(RUN) -m pytest $(OTHER_TESTS); others=$$?; \
	wait $$kernels; kernels=$$?; cat $$log; rm -f $$log; exit $$((kernels + others))

bench-smoke: setup
	@$(RUN) benchmarks/smoke.py

clean:
	rm -rf .venv .venv-* build *.egg-info
